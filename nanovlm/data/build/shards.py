"""Records -> a shard: a tar file as WebDataset and source_tar.py read it, or a parquet file.

    000000017.0.jpg           the pictures, as they were encoded
    000000017.json            the record: messages, or prompt, chosen and rejected
    000000017.provenance.json where it is from, what it passed, and its scores

The same records make the same bytes. In a parquet file these are the columns images, those of the record, and
provenance, a text of JSON.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from nanovlm.data.build.items import Item
from nanovlm.data.images import FORMATS
from nanovlm.data.layouts import REFERENCE
from nanovlm.data.records import content_parts, is_pair, to_sample
from nanovlm.data.source_parquet import import_arrow
from nanovlm.errors import UserError
from nanovlm.files import new_file

SUFFIXES = {"JPEG": "jpg", "PPM": "ppm", "JPEG2000": "jp2", "DIB": "dib"}  # elsewhere the name of the format
GROUP = 100  # rows of a row group, which is read as a whole


class Written(NamedTuple):
    """A record to write."""

    number: int
    # (suffix, encoded file) of each picture.
    images: list[tuple[str, bytes]]
    record: dict
    provenance: dict


def to_written(item: Item, provenance: dict) -> Written:
    """Return what a shard has of a record."""
    record: dict = {"messages": item.messages}
    if is_pair(item.raw, **item.options):
        sample = to_sample(item.raw, **item.options)
        record = {"prompt": sample.messages[:-1], "chosen": sample.messages[-1:], "rejected": [sample.rejected]}
        record |= dict(zip(REFERENCE, sample.ref_logprobs, strict=True)) if sample.ref_logprobs else {}
    elif item.independent:
        record["independent"] = True
    return Written(item.number, [encode(image) for image in item.images], record, provenance)


def encode(image: bytes | Image.Image) -> tuple[str, bytes]:
    """Return the suffix and the bytes of a picture's file: as it is, or a PNG of what is decoded."""
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
            kind = opened.format or ""
        return SUFFIXES.get(kind, "jpg" if kind == "MPO" else kind.lower()), bytes(image)
    file = io.BytesIO()
    image.save(file, "PNG")
    return "png", file.getvalue()


def write_tar(file: BinaryIO, records: Sequence[Written]):
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for written in records:
            members = [(f"{i}.{suffix}", data) for i, (suffix, data) in enumerate(written.images)]
            members += [("json", to_json(written.record)), ("provenance.json", to_json(written.provenance))]
            for name, data in members:
                info = tarfile.TarInfo(f"{written.number:09d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def to_json(data: dict) -> bytes:
    return json.dumps(data).encode()


def write_parquet(file: BinaryIO, records: Sequence[Written]):
    arrow, parquet = import_arrow("pyarrow"), import_arrow("pyarrow.parquet")
    rows = []
    for written in records:
        messages = {key: [_plain(x) for x in value] for key, value in written.record.items() if key in MESSAGES}
        names = [(f"{written.number:09d}.{i}.{suffix}", data) for i, (suffix, data) in enumerate(written.images)]
        images = [{"bytes": data, "path": name} for name, data in names]
        # With a line break it cannot be taken for the name of a picture, whatever it ends in.
        rows.append(written.record | messages | {"images": images, "provenance": json.dumps(written.provenance) + "\n"})
    keys = list(dict.fromkeys(key for row in rows for key in row))
    part = arrow.struct([("type", arrow.string()), ("text", arrow.string())])
    message = arrow.struct([("role", arrow.string()), ("content", arrow.list_(part))])
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    types = {**dict.fromkeys(MESSAGES, arrow.list_(message)), "images": arrow.list_(image)}
    types |= {"provenance": arrow.string(), "independent": arrow.bool_(), **dict.fromkeys(REFERENCE, arrow.float64())}
    schema = arrow.schema([(key, types[key]) for key in keys])
    parquet.write_table(arrow.Table.from_pylist(rows, schema), file, row_group_size=GROUP)


MESSAGES = ("messages", "prompt", "chosen", "rejected")


def _plain(message: dict) -> dict:
    """Return a message whose content is a list, as a column has one type."""
    return {"role": message["role"], "content": content_parts(message["content"])}


def write_shard(path: Path, records: Sequence[Written]):
    """Write a shard under a temporary name, and rename it."""
    with new_file(path) as file:
        FORMATS_OF_SHARDS[path.suffix[1:]](file, records)


def describe_shard(path: Path, num_records: int) -> dict:
    """Return the line of the index about a shard."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return {"shard": path.name, "records": num_records, "bytes": path.stat().st_size, "sha256": digest}


FORMATS_OF_SHARDS: dict[str, Callable[[BinaryIO, Sequence[Written]], None]] = {
    "tar": write_tar,
    "parquet": write_parquet,
}
