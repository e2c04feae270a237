"""Stages that compare a record with those before it: exact and near duplicates, and how many there may be of a kind.

Of records that are the same, the first is kept. What is compared is marks, in the order of the source, so the result
depends on nothing else.
"""

import dataclasses
import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np

from nanovlm.data.build import hashes
from nanovlm.data.build.items import Compare, Drop, Item, Judge, at_least, each, text_of
from nanovlm.data.records import read_raw, read_rejected, turns_of_texts
from nanovlm.errors import UserError

MOST_KINDS = 100_000  # that are counted


@dataclasses.dataclass(frozen=True)
class ExactOptions:
    # What must be the same: the pixels of all pictures and the text, or one of these. To the text belongs all that
    # training and scoring read: the worse answer of a pair, all right answers, options, kinds, what a teacher says. A
    # record without pictures is compared by its text in any case.
    of: Literal["both", "pictures", "text"] = "both"


def mark_exact(options: ExactOptions) -> Judge:
    def mark(item: Item):
        pixels = [] if options.of == "text" else [hashes.digest_pixels(picture) for picture in item.pictures]
        item.marks["exact"] = hashes.digest_text(" ".join([*pixels, *said(item, options.of)]))

    return each(mark)


def said(item: Item, of: str) -> list[str]:
    """Return the digest of all that training and scoring read beside the pictures, if it is compared.

    Neither case nor white space counts in a text; where pictures stand in it does, if they are compared too.
    """
    if of == "pictures" and item.images:
        return []
    raw, told = read_raw(item.raw, **item.options)
    worse = [] if told.rejected is None else [read_rejected(told.rejected)]
    place = " \N{OBJECT REPLACEMENT CHARACTER} " if of == "both" else ""
    messages = [(message["role"], fold(text_of(message, place))) for message in [*item.messages, *worse]]
    right = told.references or [(answer,) for answer in item.texts("assistant")]
    right = [[fold(text) for text in one] for one in right]
    turns = [(turn.get("kind"), turn.get("references")) for turn in turns_of_texts(item.raw, **item.options)]
    about = raw.get("kind"), [(i, turn) for i, turn in enumerate(turns) if any(turn)], raw.get("teacher")
    read = (item.independent, messages, len(worse), told.ref_logprobs, right, [*map(fold, told.options)], about)
    return [hashes.digest_text(repr(read))]


def fold(text: str) -> str:
    return " ".join(text.split())


def compare_exact(_options: ExactOptions, folder: Path) -> Compare:
    """Keep digests in a file, so that memory does not grow with the records."""
    file = folder / "digests.db"
    file.unlink(missing_ok=True)
    database = sqlite3.connect(file, isolation_level=None)
    for line in (
        "PRAGMA journal_mode = OFF",  # it is made anew in each attempt
        "PRAGMA synchronous = OFF",
        "PRAGMA cache_size = -65536",  # kB
        "CREATE TABLE seen (digest BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID",
        "BEGIN",
    ):
        database.execute(line)

    def add(kept: list[int], marks: list[str]):
        rows = [(bytes.fromhex(mark), number) for number, mark in zip(kept, marks, strict=True)]
        database.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?)", rows)

    def judge(numbers: list[int], marks: list[str]) -> list[Drop | None]:
        add(numbers, marks)
        drops = []
        for number, mark in zip(numbers, marks, strict=True):
            [first] = database.execute("SELECT number FROM seen WHERE digest = ?", (bytes.fromhex(mark),)).fetchone()
            drops.append(None if first == number else Drop(f"the same as record {first}", first))
        return drops

    return Compare(judge, add)


@dataclasses.dataclass(frozen=True)
class NearOptions:
    # Largest number of 256 bits in which the perceptual hashes of all pictures, one by one, differ.
    most_bits: int = 31
    # pictures: whatever is said about them; both: only where the text is the same.
    of: Literal["pictures", "both"] = "pictures"

    def __post_init__(self):
        hashes.HashIndex(self.most_bits)


def mark_near(options: NearOptions) -> Judge:
    """Mark a record with the hashes of its pictures, and its text if that is compared; [] if there is nothing to."""

    def mark(item: Item):
        found = [hashes.hash_picture(picture) for picture in item.pictures]
        is_flat = not all(found)
        item.marks["near"] = [] if is_flat or not found else [found, said(item, options.of)]

    return each(mark)


def compare_near(options: NearOptions, _folder: Path) -> Compare:
    index = hashes.HashIndex(options.most_bits)
    numbers: list[int] = []
    # Of records with several pictures or a text to compare: all that is compared, by the row of their first picture.
    others: dict[int, tuple] = {}

    def is_like(a: tuple, b: tuple) -> bool:
        """Compare all but the first pictures, which are near already."""
        if len(a[0]) != len(b[0]) or a[1] != b[1]:
            return False
        return bool((hashes.distances(a[0][1:], b[0][1:]) <= options.most_bits).all())

    def insert(number: int, own: tuple):
        if len(own[0]) > 1 or own[1]:
            others[len(index)] = own
        index.add(own[0][:1])
        numbers.append(number)

    def parse(mark: list) -> tuple:
        return hashes.parse_hashes(mark[0]), mark[1]

    def add(kept: list[int], marks: list[list]):
        for number, mark in zip(kept, marks, strict=True):
            if mark:
                insert(number, parse(mark))

    def judge(asked: list[int], marks: list[list]) -> list[Drop | None]:
        drops: list[Drop | None] = [None] * len(marks)
        places = [i for i, mark in enumerate(marks) if mark]
        own = [parse(marks[i]) for i in places]
        first = np.concatenate([np.empty((0, hashes.WORDS), np.uint64), *(parts[0][:1] for parts in own)])
        matches: dict[int, list[int]] = {}
        for query, row in zip(*(array.tolist() for array in index.find(first)), strict=True):
            matches.setdefault(query, []).append(row)
        start = len(index)
        for query, i in enumerate(places):
            rows = matches.get(query, []) + _near_rows(index, start, first[query])
            like = next((row for row in rows if is_like(own[query], _all_of(index, others, row))), None)
            if like is None:
                insert(asked[i], own[query])
            else:
                drops[i] = Drop(f"its pictures are near to those of record {numbers[like]}", numbers[like])
        return drops

    return Compare(judge, add)


def _all_of(index: hashes.HashIndex, others: dict[int, tuple], row: int) -> tuple:
    return others.get(row) or (index.hashes[row : row + 1], [])


def _near_rows(index: hashes.HashIndex, start: int, query: np.ndarray) -> list[int]:
    """Return the rows from `start` on that are near to a hash."""
    near = hashes.distances(index.hashes[start : len(index)], query) <= index.most_bits
    return (start + np.flatnonzero(near)).tolist()


@dataclasses.dataclass(frozen=True)
class CapsOptions:
    # What tells the kind: source, or a field of the record (`a.b` for one within another).
    field: str = "source"
    # Most records of a kind, the first ones; 0 for no limit.
    most: int = 0
    # Other limits for some kinds: name=number.
    each: tuple[str, ...] = ()

    def __post_init__(self):
        at_least("caps.most", self.most, 0)
        self.limits()

    def limits(self) -> dict[str, int]:
        """Return the limit of each kind that has one of its own."""
        found = {}
        for entry in self.each:
            name, equals, number = entry.rpartition("=")
            if not equals or not number.isdecimal():
                raise UserError(f"stages.caps.each has {entry!r}, which must be name=number")
            found[name] = int(number)
        return found


def mark_caps(options: CapsOptions) -> Judge:
    def mark(item: Item):
        value = item.source if options.field == "source" else item.raw
        for key in options.field.split(".") if options.field != "source" else ():
            value = value.get(key) if isinstance(value, dict) else None
        text = value if isinstance(value, str) else json.dumps(value, default=lambda _other: None)
        item.marks["caps"] = item.scores["kind"] = text[:200]

    return each(mark)


def compare_caps(options: CapsOptions, _folder: Path) -> Compare:
    counts, limits = Counter(), options.limits()

    def add(_kept: list[int], marks: list[str]):
        counts.update(marks)

    def judge(_numbers: list[int], marks: list[str]) -> list[Drop | None]:
        drops = []
        for kind in marks:
            most = limits.get(kind, options.most)
            is_full = (most > 0 or kind in limits) and counts[kind] >= most
            drops.append(Drop(f"there are {most} of the kind {kind!r}") if is_full else None)
            if not is_full:
                counts[kind] += 1
        if len(counts) > MOST_KINDS:
            raise UserError(
                f"stages.caps.field = {options.field} has more than {MOST_KINDS} values: name another field"
            )
        return drops

    return Compare(judge, add)
