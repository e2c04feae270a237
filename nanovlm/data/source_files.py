"""Raw records in files with images beside them: a .jsonl file, or a folder of images."""

import glob
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from nanovlm.data.images import FORMATS
from nanovlm.data.layouts import CAPTION_QUESTION
from nanovlm.data.pictures import fetch_images, kind_of
from nanovlm.data.source import IN_ORDER, Order, Ref, deal
from nanovlm.errors import UserError

# Suffixes of the image formats that are read.
IMAGE_SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)
LARGEST_FILE = 2**29  # bytes of a file that a record names


class JsonLines:
    """A text file with one JSON record a line; images are file names, relative to the file's folder.

    Only the positions of the lines are kept in memory.
    """

    blocks = None

    def __init__(self, path: str | Path, order: Order = IN_ORDER):
        self.path, self.name, self.damaged, self.order = Path(path), str(path), [], order
        self.starts, self.numbers = array("q"), array("q")  # of each non-blank line: byte offset, line number
        offset = 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if not self.starts and self.path.suffix == ".json" and line.lstrip().startswith(b"["):
                        raise UserError(f"{path} is one JSON list; it must have one record (an object) a line")
                    if not line.isspace():
                        self.starts.append(offset)
                        self.numbers.append(number)
                    offset += len(line)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not self.starts:
            raise UserError(f"{path} has no records")

    def __len__(self):
        return len(self.starts)

    def refs(self, slots: Sequence[int], num_slots: int, start: int | None = None) -> Iterator[Ref]:
        return deal(self, slots, num_slots, start)

    def read(self, key: int) -> dict:
        check_index(self, key)
        where = f"line {self.numbers[key]} of {self.path}"
        try:
            with open(self.path, "rb") as file:
                file.seek(self.starts[key])
                record = _read_json(file.readline(), where)
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        return fetch_images(record, lambda name: read_file(self.path.parent / name, where))


class Folder:
    """A folder of image files, each with a caption (same name, .txt) or a record (.json) beside it.

    If there is a metadata.jsonl, its lines are the records instead. A .json without images uses the one beside it.
    """

    blocks = None

    def __init__(self, path: str | Path, order: Order = IN_ORDER):
        self.path, self.name, self.damaged, self.order = Path(path), str(path), [], order
        self.lines = JsonLines(self.path / "metadata.jsonl") if (self.path / "metadata.jsonl").is_file() else None
        self.images = []
        if self.lines is None:
            found = sorted(file for file in self.path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            self.images = [file for file in found if any(file.with_suffix(s).is_file() for s in (".json", ".txt"))]
            if not self.images:
                raise UserError(f"{path} has no image file with a .txt or .json of its name")
            if alone := len(found) - len(self.images):
                self.damaged.append(f"{path}: {alone} of {len(found)} images have no .txt or .json beside them")

    def __len__(self):
        return len(self.images) if self.lines is None else len(self.lines)

    def refs(self, slots: Sequence[int], num_slots: int, start: int | None = None) -> Iterator[Ref]:
        return deal(self, slots, num_slots, start)

    def read(self, key: int) -> dict:
        check_index(self, key)
        if self.lines is not None:
            return self.lines.read(key)
        image = self.images[key]
        beside = {s: read_file(file, str(file)) for s in (".json", ".txt") if (file := image.with_suffix(s)).is_file()}
        record = read_record(beside.get(".json"), beside.get(".txt"), str(image), has_image=True)
        if all(record.get(key) is None for key in ("images", "image")):
            record["images"] = [image.name]
        return fetch_images(record, lambda name: read_file(image.parent / name, str(image)))


def _read_json(data: bytes, where: str) -> dict:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} must be a JSON object with texts or messages, not {kind_of(record)}")
    return record


def read_record(json_data: bytes | None, caption: bytes | None, where: str, has_image: bool) -> dict:
    """Return the record in a .json file; if it has no texts or messages, make one from the caption."""
    record = {} if json_data is None else _read_json(json_data, f"the .json of {where}")
    if "texts" in record or "messages" in record:
        return record
    if caption is None:
        raise UserError(f"{where} needs a .json with texts or messages, or a .txt with a caption")
    if not has_image:
        raise UserError(f"{where} has a caption and no image")
    try:
        return {"texts": [{"user": CAPTION_QUESTION, "assistant": caption.decode("utf-8-sig").strip()}]}
    except UnicodeDecodeError as error:
        raise UserError(f"the .txt of {where} is not UTF-8 text: {error}") from error


def read_file(path: Path, where: str) -> bytes:
    """Read a regular file that a record names; a device or a pipe might never end."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)  # some files of the system say that they are empty and never end
        if len(data) > LARGEST_FILE:
            raise UserError(f"{path} has more than {LARGEST_FILE} bytes")
        return data
    except (OSError, ValueError) as error:
        raise UserError(f"{where} names a file that cannot be read: {error}") from error


def find_files(paths: str | Path | Iterable[str | Path], suffix: str) -> list[Path]:
    """Return the files of paths, globs and folders in the given order, those of one glob or folder sorted."""
    files = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        if os.path.isdir(path):
            found = sorted(Path(path).rglob(f"*{suffix}"))
        else:
            found = [Path(path)] if os.path.isfile(path) else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not found:
            raise UserError(f"there is no {suffix} file {path}")
        files += found
    if not files:
        raise UserError(f"no {suffix} files were given")
    return files


def join_names(files: list[Path]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def check_index(source, index: int):
    if not 0 <= index < len(source):
        raise IndexError(f"{source.name} has {len(source)} records, there is no record {index}")
