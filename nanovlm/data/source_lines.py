"""Raw records in text files: JSON lines, a JSON list, CSV or TSV.

Only the places of the records are kept in memory: source_index.py finds them when the source is opened.
"""

import bisect
import csv
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nanovlm.data.pictures import kind_of
from nanovlm.data.source import IN_ORDER, Order, Ref, deal
from nanovlm.data.source_files import LARGEST_RECORD, check_index, find_files, join_names, suffix_of
from nanovlm.data.source_index import Index, index_json, index_lines, index_table
from nanovlm.data.source_names import fetch_named
from nanovlm.data.source_text import Text
from nanovlm.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


class TextFiles:
    """Records in text files: files, globs or folders of JSON lines, JSON lists, CSV and TSV, compressed or not.

    Names of images are relative to the folder of their file. The columns of a table are strings.
    """

    blocks = None

    def __init__(self, paths: str | Path | Iterable[str | Path], order: Order = IN_ORDER, allow_urls: bool = False):
        self.files, self.damaged, self.order, self.allow_urls = find_files(paths, *SUFFIXES), [], order, allow_urls
        self.name = join_names(self.files)
        self.texts: list[Text] = []
        self.indices: list[Index] = []
        self.firsts = array("q", [0])  # the first record of each file, and the end
        for file in self.files:
            text = Text(file)
            suffix = suffix_of(file)
            index = {".csv": index_table, ".tsv": index_table, ".json": index_json}.get(suffix, index_lines)(text)
            damage = text.damage or index.damage
            if damage:
                self.damaged.append(f"{file} {damage}: {len(index.starts)} whole records are before that")
            self.texts.append(text)
            self.indices.append(index)
            self.firsts.append(self.firsts[-1] + len(index.starts))
        if not len(self):
            raise UserError("; ".join(self.damaged) or f"{self.name} has no records")

    def __len__(self):
        return self.firsts[-1]

    def refs(self, slots: Sequence[int], num_slots: int, start: int | None = None) -> Iterator[Ref]:
        return deal(self, slots, num_slots, start)

    def read(self, key: int) -> dict:
        check_index(self, key)
        number = bisect.bisect_right(self.firsts, key) - 1
        file, text, index = self.files[number], self.texts[number], self.indices[number]
        i = key - self.firsts[number]
        where = f"{index.unit} {index.numbers[i]} of {file}"
        size = index.ends[i] - index.starts[i]
        if size > LARGEST_RECORD:
            raise UserError(f"{where} has {size} bytes, more than {LARGEST_RECORD}")
        try:
            data = text.read(index.starts[i], size)
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        if len(data) < size:
            raise UserError(f"{where} cannot be read: the file became shorter since it was opened")
        record = parse_json(data, where) if index.columns is None else _parse_row(data, index, where)
        return fetch_named(record, file.parent, file.parent, where, self.allow_urls)


def parse_json(data: bytes, where: str) -> dict:
    """Return the JSON object in some bytes. Raises UserError that begins with `where`."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} must be a JSON object, as a record is, not {kind_of(record)}")
    return record


def _parse_row(data: bytes, index: Index, where: str) -> dict:
    try:
        row = next(csv.reader([data.decode()], delimiter=index.delimiter, strict=True))
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text, as the file must be: {error}") from error
    except (csv.Error, StopIteration) as error:
        raise UserError(f"{where} is not a row of a table: {error or 'its quotes are damaged'}") from error
    columns = index.columns or []
    if len(row) != len(columns):
        raise UserError(f"{where} has {len(row)} fields, and the header names {len(columns)}: {', '.join(columns)}")
    return dict(zip(columns, row, strict=True))
