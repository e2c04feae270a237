"""The index of a folder of tar shards: how many samples each shard has, and where their members are.

```
index.json      {"__kind__": "wids-shard-index-v1", "wids_version": 1,
                 "shardlist": [{"url": "000000.tar", "nsamples": 1000, "filesize": 98304000}, ...]}
000000.tar
000000.idx      v1.2 1000
                0.jpg 512 20480 00000000.0.jpg json 21504 120 00000000.json
```

index.json is that of webdataset's wids, and a .idx that of NVIDIA's DALI (wds2idx: suffix, place, size and name of each
member, a line a sample), so their tools read ours and ours reads theirs. What an index says is a stranger's word: it
names files beside itself, and a place is compared with the header of its member when it is read.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from nanovlm.data.source_tar import Shapes, find_samples
from nanovlm.errors import UserError, printable
from nanovlm.files import write_file

NAME, KIND = "index.json", "wids-shard-index-v1"
VERSION = "v1.2"
LARGEST_INDEX = 2**28  # bytes of an index

# A sample of a shard: its key, and suffix, place and size of each of its members.
Members = tuple[tuple[str, int, int], ...]


class Shard(NamedTuple):
    """A shard beside its index.json; what the index does not say is None."""

    name: str
    num_samples: int | None
    num_bytes: int | None = None
    losses: Sequence[str] = ()


def write_index(folder: Path, shards: Iterable[Shard]):
    """Write the index.json of a folder."""
    listed = [
        {"url": shard.name, "nsamples": shard.num_samples, "filesize": shard.num_bytes}
        | ({"losses": list(shard.losses)} if shard.losses else {})
        for shard in shards
    ]
    write_file(folder / NAME, json.dumps({"__kind__": KIND, "wids_version": 1, "shardlist": listed}, indent=1))


def parse_index(data: bytes, where: str) -> list[Shard]:
    """Read an index.json. Raises UserError that begins with `where`, the name of the file."""
    try:
        index = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not readable JSON: {error}") from error
    listed = index.get("shardlist") if isinstance(index, dict) and index.get("__kind__") == KIND else None
    if not isinstance(listed, list) or not listed or not all(isinstance(shard, dict) for shard in listed):
        raise UserError(f"{where} is no index of shards: it must be a JSON object with __kind__ = {KIND} and a "
                         "shardlist of at least one shard")  # fmt: skip
    shards = []
    for number, shard in enumerate(listed):
        url, sizes = shard.get("url"), [shard.get("nsamples"), shard.get("filesize")]
        # Others write where the shard was when they looked: it is taken for the one beside the index.
        name = url.rpartition("/")[2] if isinstance(url, str) and re.match(r"/|[a-z0-9+]+://", url) else url
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\:?#]+(/[^/\\:?#]+)*", name) or ".." in name.split("/"):
            raise UserError(f"{where}: url of shard {number} must be the name of a file beside it or in a folder "
                             f"there, not {printable(str(name), most=60)!r}")  # fmt: skip
        if not all(size is None or (type(size) is int and 0 <= size < 2**50) for size in sizes):
            raise UserError(f"{where}: nsamples and filesize of shard {number} must be whole numbers, not {sizes}")
        losses = shard.get("losses", [])
        if not isinstance(losses, list) or not all(isinstance(loss, str) for loss in losses):
            raise UserError(f"{where}: losses of shard {number} must be a list of sentences")
        shards.append(Shard(name, sizes[0], sizes[1], losses))
    return shards


def index_shard(file: Path, name: str) -> Shard:
    """Find the samples of a shard and write the .idx beside it; return its entry, with a sentence for each loss."""
    samples, losses = find_samples(file, Shapes())
    text = format_members(samples)
    if text is not None:
        write_file(file.with_suffix(".idx"), text)
    return Shard(name, len(samples), file.stat().st_size, losses)


def format_members(samples: Iterable[tuple[str, Sequence[tuple[str, int, int]]]]) -> str | None:
    """Return the contents of a .idx; None if it cannot hold them, as a name has a space."""
    lines = []
    for key, members in samples:
        if re.search(r"\s", key + "".join(suffix for suffix, _offset, _size in members)):
            return None
        lines.append(" ".join(f"{suffix} {offset} {size} {key}.{suffix}" for suffix, offset, size in members))
    return "".join(f"{line}\n" for line in (f"{VERSION} {len(lines)}", *lines))


def parse_members(data: bytes, where: str) -> list[tuple[str, Members]]:
    """Read a .idx: the key and the members of each sample. Raises UserError that begins with `where`."""
    try:
        head, *lines = data.decode().splitlines()
        version, count = head.split()
        if version != VERSION or int(count) != len(lines):
            raise ValueError(f"{head!r} heads {len(lines)} lines")
        return [_parse_sample(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{where} is no index of a shard: {printable(str(error), most=200)}") from error


def _parse_sample(line: str) -> tuple[str, Members]:
    words = line.split(" ")
    if len(words) % 4:
        raise ValueError(f"{line[:80]!r} is not suffix, place, size and name of each member")
    members, key = [], ""
    for suffix, offset, size, name in zip(*(words[i::4] for i in range(4)), strict=True):
        place = int(offset), int(size)
        if place[0] < 512 or not 0 <= place[1] < 2**50:
            raise ValueError(f"a member of {place[1]} bytes at byte {place[0]}")
        members.append((suffix.lower(), *place))
        key = key or name.removesuffix(f".{suffix}")
    return re.sub(r"^(\./|/)+", "", key), tuple(members)


def is_indexed(folder: Path) -> bool:
    """Tell whether a folder has an index of shards; an index.json of another kind may be records."""
    if not (folder / NAME).is_file():
        return False
    with open(folder / NAME, "rb") as file:
        head = file.read(4096)
        file.seek(max(0, os.path.getsize(folder / NAME) - 4096))
        return KIND.encode() in head + file.read(4096)
