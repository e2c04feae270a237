"""How fast tar shards are read, beside webdataset and datasets, from the same files on one core.

    pip install webdataset datasets
    python benchmarks/shards.py    append to benchmarks/results/shards.jsonl, and write the table of docs/data.md

A sample is a JPEG and a JSON record, read into memory, the JSON parsed, the JPEG not decoded. All shuffle: shards, and
the samples of a buffer of 1000 (ours: of a window of shards). Before anything is timed each reader must give every
sample once, with the bytes that were written. Sides take turns, a pass over all shards each; a line has the median of
`repeats` turns and its ratio to ours.
"""

import hashlib
import io
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import arguments, pages
from benchmarks.speed import append_lines
from nanovlm import cli
from nanovlm.data.shard_index import write_index
from nanovlm.data.shard_writer import ShardSize, ShardWriter
from nanovlm.data.source import Order, first_pass
from nanovlm.data.source_shards import Shards
from nanovlm.data.source_tar import Tar
from nanovlm.environment import describe_environment

RESULTS = Path(__file__).resolve().parent / "results" / "shards.jsonl"
DOCS = RESULTS.parents[2] / "docs" / "data.md"
BUFFER = 1000  # samples

Sample = tuple[dict, bytes]


@dataclass(frozen=True)
class ShardsConfig:
    # Turns of each reader.
    repeats: int = 5
    num_shards: int = 12
    # Samples of a shard.
    num_samples: int = 500
    # Pixels of a side of a JPEG, about 0.55 bytes each.
    side: int = 256


def write_shards(folder: Path, config: ShardsConfig) -> dict[str, bytes]:
    """Write shards with an index; return the hash of each JPEG by the question in its record."""
    rng, pictures = np.random.default_rng(0), []
    for _ in range(32):
        file, small = io.BytesIO(), rng.integers(0, 256, (config.side // 4, config.side // 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((config.side, config.side), Image.Resampling.BICUBIC).save(
            file, "JPEG", quality=90
        )
        pictures.append(file.getvalue())
    written = {}
    with ShardWriter(folder, ShardSize(config.num_samples, 1e6)) as writer:
        for number in range(config.num_shards * config.num_samples):
            question, picture = f"what is in picture {number}?", pictures[number % len(pictures)]
            record = {"texts": [{"user": question, "assistant": f"it is noise of kind {number % len(pictures)}"}]}
            writer.write(f"{number:08}", {"jpg": picture, "json": json.dumps(record).encode()})
            written[question] = digest(picture)
    write_index(folder, writer.shards)
    return written


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def read_ours(source) -> Iterator[Sample]:
    for ref in first_pass(source):
        record = source.read(ref.key)
        yield record, record["images"][0]


def read_webdataset(files: list[str]) -> Iterator[Sample]:
    import webdataset  # pyright: ignore[reportMissingImports]

    dataset = webdataset.WebDataset(files, shardshuffle=len(files), seed=0).shuffle(BUFFER)
    return ((json.loads(sample["json"]), sample["jpg"]) for sample in dataset)


def read_datasets(files: list[str]) -> Iterator[Sample]:
    import datasets

    about = {"data_files": {"train": files}, "cache_dir": str(Path(files[0]).parent / "cache")}
    dataset = datasets.load_dataset("webdataset", split="train", streaming=True, **about)
    dataset = dataset.decode(False).shuffle(seed=0, buffer_size=BUFFER)
    return ((sample["json"], sample["jpg"]["bytes"]) for sample in dataset)


def check(name: str, read: Callable[[], Iterator[Sample]], written: dict[str, bytes]):
    """Refuse to time a reader that loses, repeats or changes a sample."""
    found = [(record["texts"][0]["user"], digest(picture)) for record, picture in read()]
    assert len(found) == len(written) and dict(found) == written, f"{name} does not give what was written"
    assert [question for question, _ in found] != list(written), f"{name} does not shuffle"


def main(config: ShardsConfig):
    torch.set_num_threads(1)
    logging.getLogger("datasets").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder, order = Path(name), Order(0, shuffle=True)
        written = write_shards(folder, config)
        files = [str(file) for file in sorted(folder.glob("*.tar"))]
        sides: dict[str, Callable[[], Iterator[Sample]]] = {
            "ours": lambda: read_ours(Shards(str(folder), order)),
            "ours without an index": lambda: read_ours(Shards(f"{folder}/*.tar", order)),
            "ours, all samples shuffled": lambda: read_ours(Tar(folder, order)),
            "webdataset": lambda: read_webdataset(files),
            "datasets": lambda: read_datasets(files),
        }
        for side, read in sides.items():
            check(side, read, written)
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(config.repeats):
            for side, read in sides.items():
                begin = time.perf_counter()
                num = sum(1 for _sample in read())
                seconds[side].append(time.perf_counter() - begin)
                assert num == len(written)
    lines, ours = [], statistics.median(seconds["ours"])
    for side, each in seconds.items():
        median = statistics.median(each)
        lines.append(
            {
                "reader": side,
                "samples_per_second": round(len(written) / median),
                "ours_is_times_as_fast": round(median / ours, 2),
            }
        )
    append_lines(RESULTS, lines, describe_environment(torch.device("cpu"), threads=1))
    pages.put(DOCS, "shards", "shards.py", format_table(pages.read_lines(RESULTS)))


def format_table(lines: list[dict]) -> str:
    """Lay out the last line of each reader."""
    newest = {line["reader"]: line for line in lines}
    if not newest:
        return "not measured yet"
    rows = [
        (reader, f"{line['samples_per_second']:,}", f"{line['ours_is_times_as_fast']:.2f}")
        for reader, line in newest.items()
    ]
    table = pages.lay_out(("reader", "samples a second", "ours is so many times as fast"), rows)
    return f"{table}\n\n({pages.where(lines[-1])})"


if __name__ == "__main__":
    cli.run(lambda: main(arguments.read(ShardsConfig, __doc__)))
