"""Records -> a shard: a tar file as WebDataset and source_tar.py read it, or a parquet file.

    000000017.0.jpg           the pictures, as they were encoded
    000000017.json            the record (members.py)
    000000017.provenance.json where it is from, what it passed, and its scores

The same records make the same bytes. In a parquet file these are the columns images, those of the record, and
provenance, a text of JSON; there a column has one type, so records are messages where these say all.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from nanovlm.data.build.items import Item
from nanovlm.data.members import name_images, to_json, to_record
from nanovlm.data.records import content_parts
from nanovlm.data.shard_writer import TarShard
from nanovlm.data.source_parquet import import_arrow
from nanovlm.data.video import SUFFIX_OF
from nanovlm.errors import UserError, printable
from nanovlm.files import new_file

GROUP = 100  # rows of a row group, which is read as a whole


class Written(NamedTuple):
    """A record to write."""

    number: int
    # Encoded files of the pictures, by number and kind: 0.jpg.
    images: dict[str, bytes]
    record: dict
    provenance: dict


def to_written(item: Item, provenance: dict, kind: str = "tar") -> Written:
    """Return what a shard of this kind has of a record."""
    images, record = to_record(item.raw, item.options, as_messages=kind == "parquet")
    return Written(item.number, name_images(images), record, provenance)


def write_tar(path: Path, records: Iterable[Written]):
    with TarShard(path) as shard:
        for written in records:
            members = {"json": to_json(written.record), "provenance.json": json.dumps(written.provenance).encode()}
            shard.write(f"{written.number:09d}", written.images | members)


def write_parquet(path: Path, records: Iterable[Written]):
    """Raise UserError for what a column cannot hold, such as values of several types."""
    arrow, parquet = import_arrow("pyarrow"), import_arrow("pyarrow.parquet")
    rows = []
    for written in records:
        record = written.record
        messages = {key: [_plain(x) for x in record[key]] for key in MESSAGES if _has_messages(record, key)}
        names = [(f"{written.number:09d}.{name}", data) for name, data in written.images.items()]
        files = [{"bytes": data, "path": name} for name, data in names]
        shown = {"videos" if any(_is_video(name) for name, _data in names) else "images": files}
        # With a line break it cannot be taken for the name of a picture, whatever it ends in.
        rows.append(record | messages | shown | {"provenance": json.dumps(written.provenance) + "\n"})
    part = arrow.struct([("type", arrow.string()), ("text", arrow.string())])
    message = arrow.struct([("role", arrow.string()), ("content", arrow.list_(part))])
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    types = {**dict.fromkeys(MESSAGES, arrow.list_(message)), **dict.fromkeys(SHOWN, arrow.list_(image))}
    columns, key = {}, ""
    try:
        for key in dict.fromkeys(key for row in rows for key in row if row[key] is not None):
            kind = types.get(key) if key in SHOWN or any(_has_messages(row, key) for row in rows) else None
            columns[key] = arrow.array([row.get(key) for row in rows], kind)
        with new_file(path) as file:
            parquet.write_table(arrow.table(columns), file, row_group_size=GROUP)
    except (arrow.ArrowException, OverflowError) as error:
        raise UserError(
            f"{path.name} cannot be written, as a column has values of one type: let shards.format be tar, or leave "
            f"the column out ({printable(str(key), most=60)}: {printable(str(error), most=200)})"
        ) from error


SHOWN = ("images", "videos")
MESSAGES = ("messages", "prompt", "chosen", "rejected")


def _has_messages(record: dict, key: str) -> bool:
    """Tell whether messages are under a key, and not what a column of that name holds in another layout."""
    found = record.get(key)
    return isinstance(found, list) and all(isinstance(x, dict) and {"role", "content"} <= x.keys() for x in found)


def _is_video(name: str) -> bool:
    return name.endswith(tuple(SUFFIX_OF.values()))


def _plain(message: dict) -> dict:
    """Return a message whose content is a list, as a column has one type."""
    return {"role": message["role"], "content": content_parts(message["content"])}


def write_shard(path: Path, records: Iterable[Written]):
    """Write a shard under a temporary name, and rename it."""
    FORMATS[path.suffix[1:]](path, records)


def describe_shard(path: Path, num_records: int) -> dict:
    """Return the line of the index about a shard."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return {"url": path.name, "nsamples": num_records, "filesize": path.stat().st_size, "sha256": digest}


FORMATS: dict[str, Callable[[Path, Iterable[Written]], None]] = {"tar": write_tar, "parquet": write_parquet}
