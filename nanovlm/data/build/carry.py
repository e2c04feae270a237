"""Records of a source -> the same records in a file of JSON lines, whatever else they hold."""

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from PIL import Image

from nanovlm.data.build.records import Found, Unusable, as_record, encode
from nanovlm.data.pictures import PICTURE_KEYS
from nanovlm.data.reader import RECORD_SECONDS, explain
from nanovlm.data.records import check, to_sample
from nanovlm.data.source import Ref, Source, first_pass
from nanovlm.limits import time_limit


class Carried(NamedTuple):
    """A record: its number in the source, all of it, its pictures (encoded files or PIL images), and its messages."""

    number: int
    raw: dict
    images: list
    messages: list[dict]
    independent: bool


def read_carried(source: Source, ref: Ref) -> Carried | Unusable:
    """Read a record; its pictures are not decoded."""
    try:
        with time_limit(RECORD_SECONDS, "the record"):
            raw = source.read(ref.key)
            return Carried(ref.number, raw, *check(raw))
    except Exception as error:  # whatever a record does
        return Unusable(explain(error))


def walk(source: Source) -> Iterator[Carried]:
    """Yield the records that can be read, in the order of the source."""
    for ref in first_pass(source):
        if isinstance(carried := read_carried(source, ref), Carried):
            yield carried


def as_line(carried: Carried, kept: Sequence[int] | None = None, **more) -> dict:
    """Return a record for a file of JSON lines, with `more` keys; of independent questions, those of indices `kept`.

    A record whose pictures are in its messages, or that JSON cannot hold as it is, becomes one of images and messages.
    """
    raw = {key: value for key, value in carried.raw.items() if key not in PICTURE_KEYS}
    pictures = carried.raw.get("images") or []
    if "texts" in raw and kept is not None:
        raw["texts"] = [raw["texts"][i] for i in kept]
    elif kept is not None or not is_plain(raw, pictures, len(carried.images)):
        kept = range(len(carried.messages) // 2) if kept is None else kept
        pairs = [message for i in kept for message in carried.messages[2 * i : 2 * i + 2]]
        sample = to_sample(carried.raw)
        messages = pairs if carried.independent else carried.messages
        names = {key: raw[key] for key in ("id", "kind", "record", "category") if isinstance(raw.get(key), str | int)}
        return names | as_record(Found(carried.number, sample, carried.images, raw), messages) | more
    shown = {"images": [encode(picture) for picture in pictures]} if pictures else {}
    return raw | shown | more


def is_plain(raw: dict, pictures: list, num: int) -> bool:
    """Tell whether JSON can hold a record whose pictures are beside it."""
    if len(pictures) != num or not all(isinstance(picture, bytes | Image.Image) for picture in pictures):
        return False
    try:
        json.dumps(raw)
    except (TypeError, ValueError):
        return False
    return True
