"""Records of a source -> the same records in a file of JSON lines, whatever else they hold."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from nanovlm.data.build.records import NAMED, Unusable, encode
from nanovlm.data.columns import FIELDS
from nanovlm.data.members import to_record
from nanovlm.data.reader import RECORD_SECONDS, explain
from nanovlm.data.records import RATINGS, check, read_raw, to_sample
from nanovlm.data.source import Ref, Source, first_pass
from nanovlm.errors import printable
from nanovlm.limits import time_limit


class Carried(NamedTuple):
    """A record: its number in the source, all of it, its pictures in base64, the rest as JSON, and its messages.

    Columns have the names of `fields`.
    """

    number: int
    raw: dict
    pictures: list[str]
    rest: dict
    messages: list[dict]
    independent: bool
    layout: str

    def decode(self) -> list[Image.Image]:
        """Return its pictures, RGB."""
        return to_sample(self.raw, layout=self.layout).images


def carry(number: int, raw: dict, options: dict | None = None) -> Carried:
    """Return a record to carry. Raises what `check` does, and UserError for what JSON lines cannot hold."""
    options = options or {}
    _images, messages, independent = check(raw, **options)
    pictures, rest = to_record(raw, options)
    raw, files, layout = read_raw(raw, **options)[0], list(map(encode, pictures)), options.get("layout", "")
    return Carried(number, raw, files, rest, messages, independent, layout)


def read_carried(source: Source, ref: Ref, options: dict | None = None) -> Carried | Unusable:
    """Read a record; a picture that JSON lines hold as it is is not decoded."""
    try:
        with time_limit(RECORD_SECONDS, "the record"):
            return carry(ref.number, source.read(ref.key), options)
    except Exception as error:  # whatever a record does
        return Unusable(explain(error))


def walk(source: Source, options: dict, is_told: bool = True) -> Iterator[Carried]:
    """Yield the records that can be read, in the order of the source; count the others, and name the first of them."""
    lost = 0
    for ref in first_pass(source):
        if isinstance(carried := read_carried(source, ref, options), Carried):
            yield carried
        elif (lost := lost + 1) <= NAMED and is_told:
            tqdm.write(printable(f"left out: {ref.source}, {ref.where}: {carried}"))
    if lost and is_told:
        print(f"{lost} records of {printable(source.name, 200)} cannot be read, and are left out")


def as_line(carried: Carried, kept: Sequence[int] | None = None, **more) -> dict:
    """Return a record for a file of JSON lines, with `more` keys; of independent questions, those of indices `kept`."""
    rest, messages = carried.rest, carried.messages
    if kept is not None:
        if isinstance(rest.get("texts"), list) and 2 * len(rest["texts"]) == len(messages):
            turns = len(rest["texts"])
            columns = [name for name in ("texts", *RATINGS) if isinstance(rest.get(name), list)]
            rest = rest | {name: [rest[name][i] for i in kept] for name in columns if len(rest[name]) == turns}
        else:
            pairs = [message for i in kept for message in messages[2 * i : 2 * i + 2]]
            others = {name: value for name, value in rest.items() if name not in FIELDS}
            rest = {"messages": pairs, "independent": True} | others
    return rest | ({"images": carried.pictures} if carried.pictures else {}) | more
