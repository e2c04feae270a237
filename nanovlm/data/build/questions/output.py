"""What was kept of a record -> records that data.sources reads, as JSON lines or parquet.

Single questions about a picture are one record, each a branch of its own (`independent`); a conversation is one, and so
is each multiple choice, with its options. `id` names a record, or a turn of independent ones, in the page that a person
judges (review.py). `record` is the number of the record that the pictures are of.
"""

import base64
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from nanovlm.data.build.questions.kinds import Item
from nanovlm.data.build.records import Found, encode
from nanovlm.data.layouts import LETTERS
from nanovlm.data.source_parquet import import_arrow

ROWS = 64  # records in a row group of parquet


class Letters:
    """Deals letters to the right options of multiple choices, so that each comes as often as any other.

    Of every N choices with N options each letter is right once, in an order that is drawn: none can be told from those
    before it but the last.
    """

    def __init__(self, seed: int):
        self.rng, self.left, self.dealt = random.Random(seed), defaultdict(list), defaultdict(lambda: defaultdict(int))

    def order(self, options: list[str]) -> tuple[list[str], str]:
        """Return options, of which the first is right, in a new order, and the letter of that one."""
        num = len(options)
        if not self.left[num]:
            self.left[num] = self.rng.sample(range(num), num)
        place = self.left[num].pop()
        others = self.rng.sample(options[1:], num - 1)
        self.dealt[num][LETTERS[place]] += 1
        return [*others[:place], options[0], *others[place:]], LETTERS[place]

    def counts(self) -> dict[int, dict[str, int]]:
        return {num: dict(sorted(counts.items())) for num, counts in self.dealt.items()}


def to_records(number: int, found: Found, kept: list[tuple[str, Item]], letters: Letters) -> Iterator[dict]:
    """Yield the records of what was kept of one."""
    images, single, counts = [encode(image) for image in found.images], [], defaultdict(int)
    for kind, item in kept:
        name = f"{number}-{kind}-{counts[kind]}"
        counts[kind] += 1
        if item.options:
            ((question, _answer),) = item.turns
            options, letter = letters.order(item.options)
            about = {"question": question, "options": options, "answer": letter}
            yield {"id": name, "kind": kind, "record": number, "images": images, **about}
        elif len(item.turns) > 1:
            turns = [{"user": question, "assistant": answer} for question, answer in item.turns]
            yield {"id": name, "kind": kind, "record": number, "images": images, "texts": turns}
        else:
            ((question, answer),) = item.turns
            single.append({"user": question, "assistant": answer, "id": name, "kind": kind})
    if single:
        record = {"id": str(number), "kind": "single", "record": number, "images": images, "texts": single}
        yield record | ({"independent": True} if len(single) > 1 else {})


def write_json_lines(file: BinaryIO, records: Iterable[dict]):
    for record in records:
        file.write(json.dumps(record).encode() + b"\n")


def write_parquet(file: BinaryIO, records: Iterable[dict]):
    """Write rows with pictures as bytes, which need a quarter less than base64."""
    pa, parquet = import_arrow("pyarrow"), import_arrow("pyarrow.parquet")
    text = pa.string()
    turn = pa.struct([("user", text), ("assistant", text), ("id", text), ("kind", text)])
    schema = pa.schema(
        [
            ("id", text),
            ("kind", text),
            ("record", pa.int64()),
            ("images", pa.list_(pa.binary())),
            ("texts", pa.list_(turn)),
            ("independent", pa.bool_()),
            ("question", text),
            ("options", pa.list_(text)),
            ("answer", text),
        ]
    )
    rows = []
    with parquet.ParquetWriter(file, schema) as writer:

        def flush():
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema))
            rows.clear()

        for record in records:
            rows.append({**record, "images": [base64.b64decode(image) for image in record["images"]]})
            if len(rows) == ROWS:
                flush()
        flush()


OUTPUTS: dict[str, Callable[[BinaryIO, Iterable[dict]], None]] = {".jsonl": write_json_lines, ".parquet": write_parquet}
