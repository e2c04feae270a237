"""A folder of files -> its index, brought up to date: new, changed, moved and removed files.

A run reads files whose size or time are not those of its last run. What has the bytes of a file that is known, under
whatever name, is taken over, and the rest is embedded, some hundred items at a time. Each such part is renamed into
place once it is whole, so that a run that was killed goes on behind it, and ends in the same bytes as one that was not.
At the end old and new become one index, in the order of the files' names, in place of the old one.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from nanovlm.data.source_files import walk
from nanovlm.data.source_names import read_file
from nanovlm.errors import UserError, printable
from nanovlm.files import lock, restore
from nanovlm.search.index import File, Index, Piece, as_line, open_index, write_index

PART = 256  # items that are embedded and stored together
SHOWN = 10  # files that cannot be read, named at the end of a run

Place = tuple[File, Path, int]  # a file, the index that has its items, and the row of the first


class Item(NamedTuple):
    """What is to be found: its line in the index, and what the embedder made of the picture or text."""

    line: dict
    prepared: Any = None


class Work(NamedTuple):
    """What is done with a folder: all that shapes the index, the suffixes of files, and three functions.

    `part` is how many items are prepared, embedded and stored together; a file without any counts as one.

    `read` makes the items of a file's bytes and name, or raises UserError. `embed` makes vectors fp32[n, D] of what
    items have prepared. `finish` adds to a new index what else belongs to it.
    """

    about: dict
    suffixes: frozenset[str]
    read: Callable[[bytes, str], list[Item]]
    embed: Callable[[list], Tensor] | None = None
    finish: Callable[[Path], None] | None = None
    part: int = PART


def update(folder: Path, out: Path, work: Work) -> dict[str, int]:
    """Bring the index of a folder up to date, print what was done, and return how many files that were.

    A file that cannot be read is counted and named. Raises UserError where the index was made otherwise.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    with lock(out):
        restore(out / "index")  # which a kill may have left between two names
        shutil.rmtree(out / ".index.old", ignore_errors=True)
        old = open_index(out) if (out / "index").is_dir() else None
        if old and (other := differences(old.about, work.about)):
            raise UserError(f"{out} was indexed with {other}: name another folder, or delete this one")
        known = ([out / "index"] if old else []) + find_parts(out, work.about)
        by_name = {file.name: (file, path, row) for path in known for file, row in Index(path).files()}
        by_hash = {found[0].hash: found for found in by_name.values() if found[0].hash}
        before = {file.name for file, _ in old.files()} if old else set()
        here = find_files(folder, out, work.suffixes)
        done, waiting = {}, []
        counts: dict[str, int] = dict.fromkeys(("as before", "new", "changed", "moved", "removed", "unreadable"), 0)
        counts["removed"] = len(before - {file.name for file in here})
        for file in tqdm(here, unit="file", desc=f"{folder}", disable=None):
            found = by_name.get(file.name)
            if found and (found[0].size, found[0].modified) == (file.size, file.modified) and found[0].hash:
                done[file.name] = found
                counts["as before"] += 1
                continue
            file, items = read_items(folder, file, by_hash, work.read)
            if file.hash in by_hash:
                same, path, row = by_hash[file.hash]
                done[file.name] = replace(file, items=same.items, why=same.why), path, row
                counts["as before" if found and found[0].hash == file.hash else "moved"] += 1
                continue
            counts["changed" if file.name in before else "new"] += 1
            waiting.append((file, items))
            if sum(max(1, len(items)) for _, items in waiting) >= work.part:
                done |= store(out, work, waiting)
        done |= store(out, work, waiting)
        files = [done[file.name][0] for file in here]
        if old is None or files != [file for file, _ in old.files()]:
            pieces = read_pieces([done[file.name] for file in files])
            write_index(out / "index", work.about, pieces, sum(file.items for file in files), work.finish)
        shutil.rmtree(out / "parts", ignore_errors=True)
    unreadable = [file for file in files if file.why]
    counts["unreadable"] = len(unreadable)
    print(f"{out}: {sum(file.items for file in files)} items of {len(files)} files:", end=" ")
    print(", ".join(f"{number} {name}" for name, number in counts.items() if number) or "none")
    for file in unreadable[:SHOWN]:
        print(f"  not read: {printable(file.why)}")
    if len(unreadable) > SHOWN:
        print(f"  and {len(unreadable) - SHOWN} more, in {out / 'index' / 'files.jsonl'}")
    return counts


def differences(old: dict, new: dict) -> str:
    """Name what shapes an index and differs; a folder or a model may have another name by now."""
    names = [name for name in new if old.get(name) != new[name] and name not in ("folder", "model")]
    return ", ".join(f"{name} = {old.get(name)!r}, not {new[name]!r}" for name in names)


def find_parts(out: Path, about: dict) -> list[Path]:
    """Find what a killed run has done; if it did something else, remove it."""
    paths = [out / "parts" / str(number) for number in part_numbers(out)]
    if any(differences(Index(path).about, about) for path in paths):
        shutil.rmtree(out / "parts")
        return []
    return paths


def part_numbers(out: Path) -> list[int]:
    return sorted(int(path.name) for path in out.glob("parts/*") if path.name.isdecimal())


def find_files(folder: Path, out: Path, suffixes: frozenset[str]) -> list[File]:
    """List the files of a folder with these suffixes, in the order of their names, without those of the index."""
    found = []
    for path in walk(folder):
        if path.suffix.lower() in suffixes and not path.absolute().is_relative_to(out.absolute()):
            try:
                stat = path.stat()
            except OSError:  # a link to nothing, or gone by now; reading it tells
                found.append(File(path.relative_to(folder).as_posix(), 0, 0))
                continue
            found.append(File(path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns))
    return found


def read_items(folder: Path, file: File, by_hash: dict, read) -> tuple[File, list[Item]]:
    """Read a file; if its bytes are new, make items of them, or note why that is impossible."""
    try:
        data = read_file(folder / file.name, folder, str(folder))
    except UserError as error:  # no hash, so that the next run tries again
        return replace(file, why=str(error)), []
    file = replace(file, hash=hashlib.sha256(data).hexdigest())
    if file.hash in by_hash:
        return file, []
    try:
        items = read(data, file.name)
    except UserError as error:
        return replace(file, why=str(error)), []
    return replace(file, items=len(items)), items


def read_pieces(places: list[Place]) -> Iterator[Piece]:
    """Yield the files at these places, with one index open at a time: neighbours are mostly of the same."""
    index = None
    for file, path, row in places:
        if index is None or index.folder != path:
            index = Index(path)
        yield index.piece(file, row)


def store(out: Path, work: Work, waiting: list[tuple[File, list[Item]]]) -> dict[str, Place]:
    """Embed what waits, and write it as the next part; return its files, and where their items are."""
    if not waiting:
        return {}
    part = out / "parts" / str(max(part_numbers(out), default=-1) + 1)
    prepared = [item.prepared for _, items in waiting for item in items]
    vectors = None
    if work.embed is not None:
        vectors = work.embed(prepared) if prepared else torch.empty(0, work.about["vector_size"])
    pieces, row = [], 0
    for file, items in waiting:
        own = None if vectors is None else vectors[row : row + len(items)]
        pieces.append(Piece(file, [as_line(item.line) for item in items], own))
        row += len(items)
    write_index(part, work.about, pieces, row)
    waiting.clear()
    return {file.name: (file, part, row) for file, row in Index(part).files()}
