"""Where samples come from: a name, a path or a glob -> a source of raw records (records.py).

A source of known size has `name`, `__len__` and `raw(index)`; a stream has `name` and `stream(start, epoch)`, an
iterator over raw records in a fixed order from the start-th on. Both have `damaged`: one sentence for each loss that
was found when the source was opened. Sources keep no open file, so that forked processes can share them.
"""

import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanovlm.data.mixture import Mixture
from nanovlm.data.records import content_parts, to_sample
from nanovlm.data.scenes import Scenes
from nanovlm.data.source_files import Folder, JsonLines
from nanovlm.data.source_hub import Hub
from nanovlm.data.source_parquet import Parquet
from nanovlm.data.source_tar import Tar

FILES = {".jsonl": JsonLines, ".json": JsonLines, ".parquet": Parquet, ".tar": Tar}


def open_source(spec: str, split: str = "train", seed: int = 0, shuffle: bool = True):
    """Open the source that a name, a path or a glob stands for.

    `split` is of the drawn scenes and of the hub, `seed` and `shuffle` are of the hub.
    """
    if spec == "scenes" or spec.startswith("scenes:"):
        return Scenes(split, kinds=tuple(spec.partition(":")[2].split(",")) if ":" in spec else ())
    if spec.startswith("hub:"):
        return Hub(spec, split, seed, shuffle)
    path, is_file = Path(spec), os.path.isfile(spec)
    if path.is_dir():
        for suffix in (".parquet", ".tar"):
            if not (path / "metadata.jsonl").is_file() and next(path.rglob(f"*{suffix}"), None):
                return FILES[suffix](path)
        return Folder(path)
    if path.suffix in FILES and (is_file or glob.glob(spec, recursive=True)):
        return FILES[path.suffix](spec)
    problem = "is of no kind that is understood" if is_file else "does not exist"
    raise ValueError(
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
):
    """Open one source, or several as a mixture, as DataConfig says."""
    sources = [open_source(spec, split, seed, shuffle) for spec in specs]
    if len(sources) == 1 and not weights:
        return sources[0]
    for source in sources:
        if hasattr(source, "stream"):
            raise ValueError(f"{source.name} is a stream of unknown size and cannot be mixed with other sources")
    return Mixture(sources, list(weights) or None, list(lessons) or None)


def sample_texts(source, num_samples: int) -> Iterator[str]:
    """Yield the texts of samples from the whole source (the first of a stream), to make a tokenizer from."""
    if hasattr(source, "stream"):
        records = itertools.islice(source.stream(0, 0), num_samples)
    else:
        records = map(source.raw, range(0, len(source), -(-len(source) // num_samples)))
    while True:
        try:
            sample = to_sample(next(records))
        except StopIteration:
            return
        except (ValueError, OSError):
            continue  # the loader counts and names it
        for message in sample.messages:
            yield from (part["text"] for part in content_parts(message["content"]) if part["type"] == "text")
