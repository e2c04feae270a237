"""Records -> what the stages say of each: the lines of a ledger, files of JSON lines.

    {"number": 7, "content": "..", "bytes": 9000, "scores": {..}, "marks": {..}}     kept so far
    {"number": 8, "stage": "size", "reason": "..", "like": 3, "scores": {..}}        dropped, and by which stage
    end

`content` tells whether the record is still the same; `like` is there where another record is kept in its place. A file
without its end was not written to the disk when the machine died, and is made again: so none is flushed, which would
take longer than what it holds.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from nanovlm.data.build.items import Drop, Item, Judge, read_item
from nanovlm.data.source import Ref
from nanovlm.errors import UserError

BATCH = 16  # records that a stage judges at a time, whose decoded pictures are in memory
END = b"end\n"


def judge_batch(
    read: Callable,
    refs: Sequence[Ref],
    options: dict,
    judges: dict[str, Judge],
    seconds: defaultdict[str, float],
    before: dict[int, dict] | None = None,
) -> list[dict]:
    """Return the lines of some records, in their order; `before` are those of earlier steps. Adds to `seconds`."""
    found: dict[int, dict] = {}
    start, items = time.process_time(), []
    for ref in refs:
        item = read_item(read, ref, options)
        if isinstance(item, Drop):
            found[ref.number] = as_dropped({"number": ref.number, "scores": {}}, item.stage, item)
        else:
            items.append(item)
    if before is not None:
        check_unchanged(refs, items, before)
    seconds["read"] += time.process_time() - start
    for name, judge in judges.items():
        start = time.process_time()
        drops = judge(items)
        for item, drop in zip(items, drops, strict=True):
            if drop is not None:
                found[item.number] = as_dropped({"number": item.number, "scores": item.scores}, name, drop)
        items = [item for item, drop in zip(items, drops, strict=True) if drop is None]
        seconds[name] += time.process_time() - start
    found |= {item.number: as_kept(item) for item in items}
    return [found[ref.number] for ref in refs]


def check_unchanged(refs: Sequence[Ref], items: Sequence[Item], before: dict[int, dict]):
    """Take over the scores and marks of earlier steps. Raises UserError for a record that is not what it was then."""
    contents = {item.number: item.content for item in items}
    for ref in refs:
        if contents.get(ref.number) != before[ref.number]["content"]:
            raise UserError(
                f"{ref.source}, {ref.where}, is not what it was when the run began: remove the folder and begin again"
            )
    for item in items:
        item.scores |= before[item.number]["scores"]
        item.marks |= before[item.number]["marks"]


def as_kept(item: Item) -> dict:
    line = {"number": item.number, "content": item.content, "bytes": item.num_bytes, "scores": item.scores}
    return line | {"marks": item.marks}


def as_dropped(line: dict, stage: str, drop: Drop) -> dict:
    about = {"number": line["number"], "stage": drop.stage or stage, "reason": drop.reason}
    return about | ({"like": drop.like} if drop.like >= 0 else {}) | {"scores": line["scores"]}


def is_whole(path: Path) -> bool:
    """Tell whether a file is there with its end."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(END)))
        return file.read() == END


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().removesuffix(END).splitlines()]


def write_lines(path: Path, lines: Iterable[dict]):
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode() + END)
    temporary.rename(path)
