"""A raw record -> the members of a sample of a shard: its pictures as encoded files, and the rest of it as JSON.

    0.jpg 1.png    the pictures or videos, as they were encoded; a decoded picture as PNG
    json           the record as it is, of whatever layout: its references, options, kinds and ratings, too

A record whose parts carry its pictures, or which only `data.layout` tells how to read, is written as messages. Columns
have the names of `data.fields`, so that what is written reads as the record did, and without either. What JSON cannot
hold, such as a date in a column that no layout reads, is left out.
"""

import io
import json

from PIL import Image

from nanovlm.data.columns import FIELDS
from nanovlm.data.layouts import REFERENCE, recognise
from nanovlm.data.pictures import FORMATS, KINDS, PICTURE_KEYS, VIDEO_KEYS, Record, Video, fetch, find_pictures
from nanovlm.data.records import check, read_raw, read_rejected
from nanovlm.data.video import SUFFIX_OF, find_container
from nanovlm.errors import UserError

SHOWN = {*PICTURE_KEYS, *VIDEO_KEYS}
# Suffixes of kinds of pictures, elsewhere the name of the kind.
SUFFIXES = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2"}


def members_of(raw: dict, options: dict | None = None) -> dict[str, bytes]:
    """Return the members of a raw record by their suffixes; `options` are those of `records.check`.

    Raises UserError for what is no record, Filtered as `check` does.
    """
    images, record = to_record(raw, options)
    return name_images(images) | {"json": to_json(record)}


def to_record(raw: dict, options: dict | None = None, as_messages: bool = False) -> tuple[list, dict]:
    """Return the pictures of a raw record, encoded or decoded, or its videos, and the rest of it.

    With `as_messages` it is messages, or a pair of answers, wherever these say all that the record does.
    """
    options = options or {}
    images, messages, independent = check(raw, **options)
    raw, conversation = read_raw(raw, **options)
    rest = {name: value for name, value in raw.items() if name not in SHOWN and is_json(value)}
    beside, read = find_pictures(raw), raw.read if isinstance(raw, Record) else None
    is_whole = not set(FIELDS) & (raw.keys() - rest.keys() - SHOWN)
    says_more = bool(conversation.references or conversation.options or "texts" in rest)
    if is_whole and is_told(raw, options.get("layout")) and (beside or not images) and (says_more or not as_messages):
        return [fetch(picture, read) for picture in beside], rest
    record: dict = {"messages": messages}
    if conversation.rejected is not None:
        rejected = read_rejected(conversation.rejected)
        record = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [rejected]}
        record |= dict(zip(REFERENCE, conversation.ref_logprobs or (), strict=False))
    elif independent:
        record["independent"] = True
    return images, record | {name: value for name, value in rest.items() if name not in FIELDS}


def is_told(raw: dict, layout: str | None) -> bool:
    """Tell whether the keys of a record tell the layout in which it is read."""
    try:
        return not layout or recognise(raw) == layout
    except UserError:
        return False


def is_json(value) -> bool:
    try:
        return bool(to_json(value))
    except (TypeError, ValueError, RecursionError):
        return False


def to_json(value) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def name_images(images: list) -> dict[str, bytes]:
    """Return the files of pictures, by their number and kind."""
    return {f"{number}.{kind}": data for number, (kind, data) in enumerate(map(encode, images))}


def encode(image: bytes | Image.Image | Video) -> tuple[str, bytes]:
    """Return the suffix and the bytes of a picture's or a video's file: as it is, or a PNG of what is decoded."""
    if isinstance(image, Video):
        kind = SUFFIX_OF.get(find_container(image.source) or "") if isinstance(image.source, bytes) else None
        if kind is None:
            raise UserError("the record has a video that is no mp4 or webm file, and others are not written to shards")
        return kind, image.source
    if isinstance(image, bytes):
        kind = next((name for head, name in KINDS.items() if image.startswith(head)), None)
        if kind is None:
            with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
                kind = (opened.format or "").lower()
        return SUFFIXES.get(kind, kind), bytes(image)
    file = io.BytesIO()
    image.save(file, "PNG")
    return "png", file.getvalue()
