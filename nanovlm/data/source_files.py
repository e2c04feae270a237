"""What the sources of files share: paths -> files, and limits on what one of them may hold."""

import glob
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from nanovlm.data.pictures import FORMATS
from nanovlm.errors import UserError

# Suffixes of the image formats that are read.
IMAGE_SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)
COMPRESSED = (".gz", ".zst")
LARGEST_FILE = 2**29  # bytes of a file that a record names, and of a member of a tar file
LARGEST_RECORD = 2**26  # bytes of a record in a text file; as JSON of empty lists it takes 20 times as much memory
MOST_NAMES = 100_000  # that braces may stand for


def suffix_of(path: str | Path) -> str:
    """Return the suffix of a file in lower case, without the one that says how it is compressed: .jsonl of a.jsonl.gz.

    A tar file is the exception: its members are found by their place, which a compressed one does not have.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower()
    return inner if suffix in COMPRESSED and inner not in ("", ".tar") else suffix


def find_paths(spec: str | Path) -> list[Path]:
    """Return what a path, a glob or a name with braces (`shard-{000..127}.tar`) stands for; a glob's paths sorted.

    Raises UserError if one of the names that braces stand for does not exist.
    """
    if os.path.exists(spec):
        return [Path(spec)]
    names = expand_braces(str(spec))
    found = [sorted(map(Path, glob.glob(name, recursive=True))) for name in names]
    if any(found) and (missing := [name for name, paths in zip(names, found, strict=True) if not paths]):
        raise UserError(f"{spec} stands for {len(names)} names, and there is no {missing[0]}")
    return list(itertools.chain(*found))


def find_files(paths: str | Path | Iterable[str | Path], *suffixes: str) -> list[Path]:
    """Return the files of paths, globs and folders in the given order, those of one glob or folder sorted."""
    files = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        found = list(find_paths(path))
        if len(found) == 1 and found[0].is_dir():
            found = sorted(file for file in walk(found[0]) if suffix_of(file) in suffixes)
        if not found:
            raise UserError(f"there is no {' or '.join(suffixes)} file {path}")
        files += found
    if not files:
        raise UserError(f"no {' or '.join(suffixes)} files were given")
    return files


def walk(folder: Path) -> list[Path]:
    """Return the files in a folder and its folders, sorted; hidden ones, as caches are, do not count."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def expand_braces(text: str) -> list[str]:
    """Write out `{000..127}` (as wide as the first number) and `{a,b}`, as a shell does."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if match is None:
        return [text]
    first, last, words = match.groups()
    if words is None and not 0 <= int(last) - int(first) < MOST_NAMES:
        raise UserError(f"{match[0]} in {text} must count up, to at most {MOST_NAMES} names")
    middles = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)] if words is None else words.split(",")
    names = []
    for middle in middles:
        names += expand_braces(text[: match.start()] + middle + text[match.end() :])
        if len(names) > MOST_NAMES:
            raise UserError(f"{text} stands for more than {MOST_NAMES} names")
    return names


def join_names(files: list[Path]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def check_index(source, index: int):
    if not 0 <= index < len(source):
        raise IndexError(f"{source.name} has {len(source)} records, there is no record {index}")
