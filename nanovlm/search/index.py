"""An index on disk: files, the items in them, and a vector for each.

```
OUT/index/    about.json     what was indexed how, and by which model
              files.jsonl    a line for each file: name, size, time, hash, number of items, or why it cannot be read
              items.jsonl    a line for each item: a picture, or a passage of a document
              places.npy     int64[N, 2]: where an item's line begins, and that of its file
              vectors.npy    float16[N, D] or float32[N, D], if a model made vectors
OUT/parts/0/  the same, of some files: what a run that has not ended has done so far (update.py)
```

The items of a file are neighbours, in the order of the files. A search maps the arrays into memory and reads the lines
of what it has found, however many there are.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from nanovlm.errors import UserError
from nanovlm.files import find_folder, new_folder, read_json
from nanovlm.search.vectors import open_vectors

DTYPES = {"fp16": "float16", "fp32": "float32"}  # of vectors


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A file: its name below the folder, size, time of change in ns, hash, items, and why it cannot be read, if so."""

    name: str
    size: int
    modified: int
    hash: str = ""
    items: int = 0
    why: str = ""


class Piece(NamedTuple):
    """A file, the lines of its items, and their vectors [n, D]."""

    file: File
    lines: list[bytes]
    vectors: Tensor | None


class Index:
    """An open index, of which `about` alone is in memory. It stays as it is when a new one takes its place on disk."""

    def __init__(self, folder: Path):
        """Raise UserError that names what is missing or damaged."""
        self.folder = find_folder(folder)
        self.about = read_json(self.folder / "about.json")
        try:
            self.places = np.load(self.folder / "places.npy", mmap_mode="r")
            has_vectors = self.about["vector_size"] > 0
            self.vectors = open_vectors(self.folder / "vectors.npy") if has_vectors else None
            self._items = open(self.folder / "items.jsonl", "rb")  # as long as the index is used
            self._files = open(self.folder / "files.jsonl", "rb")
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise UserError(f"the index {folder} is damaged: {error}") from error

    def __len__(self):
        return len(self.places)

    def read(self, row: int) -> tuple[File, dict]:
        """Return the file of an item, and the item."""
        item, file = self.places[row].tolist()
        self._items.seek(item)
        self._files.seek(file)
        return File(**json.loads(self._files.readline())), json.loads(self._items.readline())

    def items(self) -> Iterator[dict]:
        """Yield all items, in order."""
        self._items.seek(0)
        yield from map(json.loads, self._items)

    def files(self) -> Iterator[tuple[File, int]]:
        """Yield all files, in order, each with the row of its first item."""
        self._files.seek(0)
        row = 0
        for line in self._files:
            file = File(**json.loads(line))
            yield file, row
            row += file.items

    def piece(self, file: File, row: int) -> Piece:
        """Return as many items from a row on as a file has, be it of another name."""
        lines = []
        if file.items:
            self._items.seek(int(self.places[row, 0]))
            lines = [self._items.readline() for _ in range(file.items)]
        return Piece(file, lines, None if self.vectors is None else self.vectors[row : row + file.items])


def open_index(folder: Path) -> Index:
    """Open the index in a folder. Raises UserError if there is none."""
    if not find_folder(folder / "index").is_dir():
        is_begun = (folder / "parts").is_dir()
        raise UserError(f"{folder} has no index" + (" yet: give the command that makes it again" if is_begun else ""))
    return Index(folder / "index")


def write_index(
    folder: Path, about: dict, pieces: Iterable[Piece], num_items: int, finish: Callable[[Path], None] | None = None
):
    """Write an index of pieces with so many items in all; `finish` adds what else belongs to it."""
    with new_folder(folder) as new:
        places, vectors, row = np.zeros((num_items, 2), np.int64), None, 0
        if about["vector_size"]:
            shape = (num_items, about["vector_size"])
            vectors = np.lib.format.open_memmap(new / "vectors.npy", "w+", about["dtype"], shape)
        with ExitStack() as stack:
            files, items = (stack.enter_context(open(new / f"{name}.jsonl", "wb")) for name in ("files", "items"))
            for piece in pieces:
                for i, line in enumerate(piece.lines, start=row):
                    places[i] = items.tell(), files.tell()
                    items.write(line)
                if vectors is not None:
                    assert piece.vectors is not None
                    vectors[row : row + len(piece.lines)] = piece.vectors.numpy()
                row += len(piece.lines)
                files.write(as_line(dataclasses.asdict(piece.file)))
        assert row == num_items
        if vectors is not None:
            vectors.flush()
        np.save(new / "places.npy", places)
        (new / "about.json").write_text(json.dumps(about, indent=2))
        if finish is not None:
            finish(new)


def as_line(data: dict) -> bytes:
    return json.dumps(data).encode() + b"\n"
