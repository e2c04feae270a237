"""A name, a path or a glob -> a source of raw records (source.py)."""

import glob
import itertools
import math
import os
from collections.abc import Iterator, Sequence, Sized
from pathlib import Path

from tqdm import tqdm

from nanovlm.data.mixture import Concatenation, Mixture, parts_of
from nanovlm.data.records import check, content_parts
from nanovlm.data.scenes import Scenes
from nanovlm.data.source import IN_ORDER, Order, Source, first_pass
from nanovlm.data.source_files import Folder, JsonLines
from nanovlm.data.source_hub import Hub
from nanovlm.data.source_parquet import Parquet
from nanovlm.data.source_tar import Tar
from nanovlm.errors import UserError

FILES = {".jsonl": JsonLines, ".json": JsonLines, ".parquet": Parquet, ".tar": Tar}


def open_source(spec: str, split: str = "train", order: Order = IN_ORDER) -> Source:
    """Open the source given by a name, a path or a glob; only drawn scenes and hub datasets use `split`."""
    if spec == "scenes" or spec.startswith("scenes:"):
        kinds = tuple(spec.partition(":")[2].split(",")) if ":" in spec else ()
        return Scenes(split, kinds=kinds, order=order)
    if spec.startswith("hub:"):
        return Hub(spec, split, order)
    path, is_file = Path(spec), os.path.isfile(spec)
    if path.is_dir():
        for suffix in (".parquet", ".tar"):
            if not (path / "metadata.jsonl").is_file() and next(path.rglob(f"*{suffix}"), None):
                return FILES[suffix](path, order)
        return Folder(path, order)
    if path.suffix in FILES and (is_file or glob.glob(spec, recursive=True)):
        return FILES[path.suffix](spec, order)
    problem = "is of no kind that is understood" if is_file else "does not exist"
    raise UserError(
        f"the source {spec!r} {problem}: give scenes, scenes:KIND,KIND, a file .jsonl, a file or glob .parquet or "
        ".tar, a folder of these or of images with .txt or .json beside them, or hub:owner/name"
    )


def open_sources(
    specs: Sequence[str],
    weights: Sequence[float] = (),
    lessons: Sequence[int] = (),
    split: str = "train",
    seed: int = 0,
    shuffle: bool = True,
) -> Source:
    """Open one source, or several combined into one, as DataConfig describes."""
    if len(specs) == 1 and not weights:
        return open_source(specs[0], split, Order(seed, shuffle))
    is_mixed = bool(weights or lessons)
    orders = [Order(seed, shuffle, part if is_mixed else None) for part in range(len(specs))]
    sources = [open_source(spec, split, order) for spec, order in zip(specs, orders, strict=True)]
    if is_mixed:
        return Mixture(sources, list(weights) or None, list(lessons) or None)
    if streams := [source.name for source in sources if not isinstance(source, Sized)]:
        raise UserError(f"{streams[0]} is a stream of unknown size: mix it with other sources by data.weights")
    return Concatenation(sources, Order(seed, shuffle))


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
