"""A text of records -> where each begins and ends: by lines, by the brackets of a JSON list, by the rows of a table.

None of the records is kept, so a file may be larger than memory, and none is parsed, so a damaged one is found when it
is read.
"""

import csv
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from nanovlm.data.source_files import LARGEST_RECORD, suffix_of
from nanovlm.data.source_text import BLOCK, Text
from nanovlm.errors import UserError, printable

# A list of objects that has one of these names belongs to a record; one of another name may hold the records.
FIELDS = frozenset("texts messages conversations conversation prompt completion chosen rejected".split())
# What tells where the parts of JSON end: strings, objects that hold no others (in one go, for speed), brackets, commas,
# and last a quote whose string is not all there.
STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
TOKEN = re.compile(rb'%b|\{[^][{}"]*+(?:%b[^][{}"]*+)*+\}|[][{},]|"' % (STRING, STRING), re.DOTALL)

csv.field_size_limit(LARGEST_RECORD)


def _places() -> array:
    return array("q")


@dataclass
class Index:
    """The records of a text: bytes [start, end), and the number of each in the file, from 1, in lines or records."""

    starts: array = field(default_factory=_places)
    ends: array = field(default_factory=_places)
    numbers: array = field(default_factory=_places)
    unit: str = "line"
    damage: str = ""
    # Of a table: the names of its columns, and what separates them.
    columns: list[str] | None = None
    delimiter: str = ","

    def add(self, start: int, end: int, number: int):
        self.starts.append(start)
        self.ends.append(end)
        self.numbers.append(number)


def index_lines(text: Text) -> Index:
    """Find the lines that are not blank. A file that is one JSON list, whatever its name, is read as the list."""
    if text.read(text.first, BLOCK).lstrip().startswith(b"["):
        lists, end = _scan(text, 1)
        is_first_line = b"\n" not in text.read(text.first, min(end or BLOCK, BLOCK)).strip()
        if lists and not (end and is_first_line and text.read(end, BLOCK).strip()):  # else each line is a list
            return _only_list(text, lists[""], end)
    index, offset, number = Index(), text.first, 1
    with text.open() as file:
        start, is_blank = offset, True
        while piece := file.readline(BLOCK):  # a line may be larger than memory
            offset += len(piece)
            is_blank = is_blank and piece.isspace()
            if piece.endswith(b"\n"):
                if not is_blank:
                    index.add(start, offset, number)
                start, is_blank, number = offset, True, number + 1
        if not is_blank and not text.damage:  # half a line is no record
            index.add(start, offset, number)
    return index


def index_json(text: Text) -> Index:
    """Find the records of a .json file: a list, lines, an object with one list of objects, or a single object."""
    head = text.read(text.first, BLOCK).lstrip()
    first, newline, rest = head.partition(b"\n")
    if not head.startswith(b"{") or (newline and rest.strip() and _is_json(first)):
        return index_lines(text)
    lists, end = _scan(text, 2)
    if end and text.read(end, BLOCK).strip():
        return index_lines(text)
    lists = {name: index for name, index in lists.items()
             if index.starts and text.read(index.starts[0], BLOCK).lstrip().startswith(b"{")}  # fmt: skip
    if len(lists) == 1 and not FIELDS & lists.keys():
        return _only_list(text, *lists.values(), end)
    if len(lists) > 1 and not FIELDS & lists.keys():
        names = ", ".join(printable(name, most=40) for name in lists)
        raise UserError(
            f"{text.path} is a JSON object with {len(lists)} lists of objects: {names}; it must have one, or be a "
            "list of records, or have one record a line"
        )
    if not end:
        return Index(damage="is cut off or damaged: its object has no end")
    index = Index(unit="record")
    index.add(text.first, end, 1)
    return index


def index_table(text: Text) -> Index:
    """Find the rows of CSV or TSV by their quotes, as the module csv reads them; the first row names the columns.

    A row that is damaged ends at the end of its line. Raises UserError if there is no header.
    """
    index = Index(delimiter="\t")
    if suffix_of(text.path) == ".csv":  # some languages write ; because , is their decimal point
        head = text.read(text.first, BLOCK).lstrip().partition(b"\n")[0].decode(errors="replace")
        index.delimiter = max(",;\t", key=head.count)
    with text.open() as file:
        number, reader = 1, None
        while True:
            start = file.tell()
            reader = reader or csv.reader(_lines(file), delimiter=index.delimiter, strict=True)
            num_lines = reader.line_num
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                if index.columns is None:
                    raise UserError(f"{text.path} has no header that can be read: {error}") from error
                is_end = not file.read(1)
                if text.damage and is_end:
                    break
                file.seek(start)
                index.add(start, _end_of_line(file), number)
                number, reader = number + 1, None
                continue
            if row and index.columns is None:
                index.columns = row
            elif row and not (text.damage and text.read(file.tell() - 1, 1) != b"\n"):  # half a row is none
                index.add(start, file.tell(), number)
            number += reader.line_num - num_lines
    if len(set(columns := index.columns or [])) < len(columns):
        raise UserError(f"the header of {text.path} must name each column once, not {', '.join(columns)}")
    return index


def _lines(file: BinaryIO) -> Iterator[str]:
    while line := file.readline(LARGEST_RECORD + 1):
        if len(line) > LARGEST_RECORD:
            raise csv.Error(f"a line has more than {LARGEST_RECORD} bytes")
        yield line.decode(errors="replace")


def _end_of_line(file: BinaryIO) -> int:
    while (piece := file.readline(BLOCK)) and not piece.endswith(b"\n"):
        pass
    return file.tell()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _only_list(text: Text, index: Index, end: int) -> Index:
    """Return the index of a file's list, with what is wrong behind it."""
    if not end:
        index.damage = "is cut off or damaged: its list has no end"
    elif text.read(end, BLOCK).strip():
        index.damage = f"has more after the end of its list at byte {end}"
    return index


def _scan(text: Text, level: int) -> tuple[dict[str, Index], int]:
    """Find the elements of the lists that are so many brackets deep, and the end of the whole value, 0 without one.

    At level 1 the list is the value and is called ""; at level 2 lists have their names in the object.
    """
    lists: dict[str, Index] = {}
    index, depth, begin, is_filled, name = None, 0, 0, False, b""
    for start, end, token in _tokens(text):
        if token in b"[{" and len(token) == 1:
            depth, is_filled = depth + 1, True
            if depth == level and token == b"[":
                index, begin, is_filled = Index(unit="record"), end, False
                lists[name.decode(errors="replace")] = index
        elif token in b"]}":
            if depth == level and index is not None:
                if is_filled or text.read(begin, min(start - begin, BLOCK)).strip():
                    index.add(begin, start, len(index.starts) + 1)
                index = None
            depth -= 1
        elif token == b",":
            if depth == level and index is not None:
                index.add(begin, start, len(index.starts) + 1)
                begin, is_filled = end, False
        else:
            is_filled = True
            if depth == 1 and token.startswith(b'"'):
                name = token[1:-1]
        if depth <= 0:
            return lists, end
    return lists, 0


def _tokens(text: Text) -> Iterator[tuple[int, int, bytes]]:
    """Yield (start, end, token) of each TOKEN; the text ends where a string is longer than a record may be."""
    offset, buffer, size = text.first, b"", BLOCK
    with text.open() as file:
        while len(buffer) <= LARGEST_RECORD:
            block = file.read(size)
            buffer, cut = buffer + block, len(buffer) + len(block)
            for match in TOKEN.finditer(buffer):
                token = match[0]
                if token == b'"':
                    cut = match.start()
                    break
                yield offset + match.start(), offset + match.end(), token
            if not block:
                return
            size = BLOCK if cut else 2 * size  # a long string is not searched anew for every block
            buffer, offset = buffer[cut:], offset + cut
