"""A name, a path or a glob -> a source of raw records (source.py)."""

import itertools
import math
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path

from tqdm import tqdm

from nanovlm.config import DataConfig
from nanovlm.data.documents.draw import Documents
from nanovlm.data.mixture import Concatenation, Mixture, by_temperature, parts_of
from nanovlm.data.records import check, content_parts
from nanovlm.data.scenes import Scenes
from nanovlm.data.scenes_video import Clips
from nanovlm.data.shard_cache import CacheOptions, is_address
from nanovlm.data.shard_index import is_indexed
from nanovlm.data.source import IN_ORDER, Order, Source, first_pass
from nanovlm.data.source_arrow import Arrow, is_saved, open_saved
from nanovlm.data.source_files import find_paths, suffix_of, walk
from nanovlm.data.source_folder import Classes, Folder, find_images, is_described
from nanovlm.data.source_hub import Hub
from nanovlm.data.source_lines import SUFFIXES, TextFiles
from nanovlm.data.source_parquet import Parquet
from nanovlm.data.source_shards import USUAL, ShardOptions, Shards
from nanovlm.data.source_tar import Tar
from nanovlm.errors import UserError

# Sources that are drawn: NAME, or NAME:KIND,KIND for some kinds alone.
DRAWN = {"scenes": Scenes, "scenes_video": Clips, "documents": Documents}
FILES = {**dict.fromkeys(SUFFIXES, TextFiles), ".parquet": Parquet, ".arrow": Arrow, ".tar": Tar}
# What is no source, and what to do with it.
OTHERS = {
    ".zip": "unpack it",
    ".tgz": "unpack it to a .tar, whose members are found by their place",
    ".gz": "unpack it: .jsonl, .json, .csv and .tsv may be compressed",
    ".zst": "unpack it: .jsonl, .json, .csv and .tsv may be compressed",
    ".xlsx": "save it as .csv",
    ".txt": "write one JSON record a line, into a .jsonl file",
}
# JSON files beside data that say something about it and hold no records.
ABOUT = frozenset("dataset_info.json dataset_infos.json dataset_dict.json state.json".split())
METADATA = ("metadata.jsonl", "metadata.csv")  # of the folders that datasets calls ImageFolder


def open_source(
    spec: str,
    split: str = "train",
    order: Order = IN_ORDER,
    allow_urls: bool = False,
    shards: ShardOptions = USUAL,
) -> Source:
    """Open the source given by a name, a path, a glob, a name with braces or an address.

    Drawn scenes and documents, hub datasets and saved datasets use `split`. With `allow_urls`, images that records name
    by their addresses are fetched.
    """
    name, colon, kinds = spec.partition(":")
    if name in DRAWN:
        return DRAWN[name](split, kinds=tuple(kinds.split(",")) if colon else (), order=order)
    if spec.startswith("hub:"):
        return Hub(spec, split, order, allow_urls)
    if is_address(spec):
        return Shards(spec, order, shards)
    paths = find_paths(spec)
    if len(paths) == 1 and is_indexed(paths[0]):
        return Shards(spec, order, shards)
    if len(paths) == 1 and paths[0].is_dir():
        return _open_folder(paths[0], split, order, allow_urls)
    if paths and all(path.is_dir() for path in paths):
        return Concatenation([_open_folder(path, split, order, allow_urls) for path in paths], order)
    kinds = {FILES.get(suffix_of(path)) if path.is_file() else None for path in paths}
    if len(kinds) == 1 and (kind := kinds.pop()) is not None:
        return kind(paths, order, allow_urls)
    problem = "does not exist"
    if paths:
        problem = "is of no kind that is understood" if len(paths) == 1 else "stands for files of more than one kind"
        problem = f"cannot be read: {advice}" if (advice := OTHERS.get(paths[0].suffix.lower())) else problem
    raise UserError(
        f"the source {spec!r} {problem}: give scenes, scenes:KIND,KIND, documents, documents:KIND,KIND, files .jsonl, "
        ".json, .csv, .tsv (also .gz, .zst), .parquet, .arrow or .tar, a folder of these, of images with .txt or .json "
        "beside them or of a folder for each class, hub:owner/name, or the address of .tar files, as in https://, "
        "s3:// or hf://"
    )


def _open_folder(path: Path, split: str, order: Order, allow_urls: bool) -> Source:
    """Open a folder by what is in it; the order of the kinds is that of the table in docs/data.md."""
    if is_saved(path):
        return open_saved(path, split, order, allow_urls)
    files = walk(path)
    if metadata := [file for file in files if file.name in METADATA]:
        return TextFiles(metadata, order, allow_urls)
    for suffix in (".parquet", ".arrow", ".tar"):
        if found := [file for file in files if suffix_of(file) == suffix]:
            return FILES[suffix](found, order, allow_urls)
    images = find_images(path)
    beside = {image.with_suffix(".json") for image in images}
    texts = [file for file in files if suffix_of(file) in SUFFIXES and file not in beside and file.name not in ABOUT]
    if any(map(is_described, images)):
        source = Folder(path, order, allow_urls)
        if texts:
            source.damaged.append(f"{path}: {texts[0]} is not read, as images have texts beside them: name it itself")
        return source
    if texts:
        return TextFiles(texts, order, allow_urls)
    return Classes(path, order)


def open_data(data: DataConfig, seed: int) -> Source:
    """Open the sources of a run, combined into one."""
    return open_sources(
        data.sources,
        data.weights,
        data.lessons,
        seed=seed,
        shuffle=data.shuffle,
        allow_urls=data.allow_urls,
        shards=shard_options(data),
        temperature=data.temperature,
        max_passes=data.max_passes,
        stages=data.stages,
        is_gradual=data.stage_change == "linear",
    )


def shard_options(data: DataConfig) -> ShardOptions:
    return ShardOptions(data.shard_window, CacheOptions(data.shard_cache, data.shard_cache_gb), data.max_bad_fraction)


def open_sources(
    specs: Sequence[str],
    weights: Sequence[float] = (),
    lessons: Sequence[int] = (),
    split: str = "train",
    seed: int = 0,
    shuffle: bool = True,
    allow_urls: bool = False,
    shards: ShardOptions = USUAL,
    temperature: float = 0.0,
    max_passes: Sequence[float] = (),
    stages: Sequence[int] = (),
    is_gradual: bool = False,
) -> Source:
    """Open one source, or several combined into one, as DataConfig describes."""
    if len(specs) == 1 and not weights:
        return open_source(specs[0], split, Order(seed, shuffle), allow_urls, shards)
    is_mixed = bool(weights or lessons or temperature)
    orders = [Order(seed, shuffle, part if is_mixed else None) for part in range(len(specs))]
    sources = [open_source(spec, split, order, allow_urls, shards) for spec, order in zip(specs, orders, strict=True)]
    if is_mixed:
        most, num, read = [], len(sources), list(weights)
        if temperature and not read:
            read = [float(size_of(s, "data.weights in place of data.temperature alone")) for s in sources]
        if temperature:
            read = [x for i in range(0, len(read), num) for x in by_temperature(read[i : i + num], temperature)]
        passes = list(max_passes) * (num if len(max_passes) == 1 else 1)
        for source, number in zip(sources, passes, strict=False):
            most.append(math.ceil(number * size_of(source, "0 for it in data.max_passes")) if number else None)
        return Mixture(sources, read or None, list(lessons) or None, stages, is_gradual, most)
    if streams := [source.name for source in sources if not isinstance(source, Sized)]:
        raise UserError(f"{streams[0]} is a stream of unknown size: mix it with other sources by data.weights")
    return Concatenation(sources, Order(seed, shuffle))


def size_of(source: Source, instead: str) -> int:
    """Return the number of records of a source. Raises UserError that says what to give `instead` if it is unknown."""
    size = len(source) if isinstance(source, Sized) else source.num_samples if isinstance(source, Shards) else None
    if size is None:
        raise UserError(f"{source.name} is a stream of unknown size: give {instead}")
    return size


def sample_records(source: Source, num: int) -> Iterator[dict]:
    """Yield about `num` raw records from all over the source (the first ones of a stream); skip unreadable ones."""
    if len(parts := parts_of(source)) > 1:
        for part in parts:
            yield from sample_records(part, math.ceil(num / len(parts)))
        return
    if isinstance(source, Sized):
        keys = range(0, len(source), math.ceil(len(source) / num))
    else:
        keys = (ref.key for ref in itertools.islice(first_pass(source), num))
    for key in keys:
        try:
            yield source.read(key)
        except Exception:
            continue  # the loader counts and names it


def sample_texts(source: Source, num_samples: int, options: dict | None = None) -> Iterator[str]:
    """Yield the texts of about `num_samples` samples, to train a tokenizer on; `options` go to `check`."""
    records = sample_records(source, num_samples)
    for record in tqdm(records, desc="reading texts for the tokenizer", total=num_samples, unit="record", delay=2):
        try:
            _images, messages, _independent = check(record, **options or {})
        except Exception:
            continue
        for message in messages:
            yield from (part["text"] for part in content_parts(message["content"]) if part["type"] == "text")
