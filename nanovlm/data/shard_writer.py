"""Raw records -> tar shards with an index: the samples of WebDataset, whose readers read them too.

```
OUT/000000.tar  OUT/000000.idx       whole shards, each under its name once it is on the disk
OUT/.000001.tar.tmp                  the one that is being written: what a kill loses
OUT/.progress.jsonl                  the settings, and a line for each whole shard
OUT/index.json                       once all are written
```

The bytes depend on the records and the settings alone: not on the date, the machine, or how often it was begun anew.
"""

import dataclasses
import io
import itertools
import json
import os
import tarfile
from collections.abc import Sized
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from tqdm import tqdm

from nanovlm.data.columns import rename
from nanovlm.data.pictures import KINDS, PICTURE_KEYS, Record, fetch, find_pictures
from nanovlm.data.reader import RECORD_SECONDS, explain
from nanovlm.data.records import check
from nanovlm.data.shard_index import NAME, Shard, format_members, write_index
from nanovlm.data.source import Source, first_pass
from nanovlm.errors import UserError, printable
from nanovlm.files import flush, lock, write_file
from nanovlm.limits import time_limit

PROGRESS = ".progress.jsonl"
NAMED = 5  # records that were left out to name
JUDGED_AFTER = 100  # records to read before the share of unusable ones is checked
END = 2 * tarfile.BLOCKSIZE  # bytes of the mark at the end of a tar file


@dataclasses.dataclass(frozen=True)
class ShardSize:
    # Most samples of a shard.
    max_samples: int = 10_000
    # Most megabytes of a shard; a sample that has more is a shard of its own.
    max_mb: float = 500.0

    def validate(self):
        """Raise UserError with the value of the first contradiction."""
        if self.max_samples < 1:
            raise UserError(f"--max-samples {self.max_samples} must be at least 1")
        if not 0 < self.max_mb < 2**40:
            raise UserError(f"--max-mb {self.max_mb} must be above 0")


USUAL = ShardSize()


class ShardWriter:
    """Writes samples into the shards of a folder, one after the other; `shards` are those that are whole.

    Use it as a context: what is written is whole at its end, and left as it is on an error.
    """

    def __init__(self, folder: Path, size: ShardSize = USUAL, shards: tuple[Shard, ...] = (), prefix: str = ""):
        self.folder, self.size, self.prefix, self.shards = folder, size, prefix, list(shards)
        self.samples: list[tuple[str, list[tuple[str, int, int]]]] = []
        self.file: BinaryIO | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, _error, _trace):
        if kind is None:
            self.finish()
        elif self.file is not None:
            self.file.close()
            self._temporary().unlink(missing_ok=True)

    def write(self, key: str, members: dict[str, bytes]) -> bool:
        """Write a sample, whose members are named by their suffixes; return whether a shard was finished before it."""
        infos = [(suffix, self._header(f"{key}.{suffix}", len(data)), data) for suffix, data in members.items()]
        needed = sum(len(header) + _padded(len(data)) for _suffix, header, data in infos)
        most = self.size.max_mb * 1e6 - END
        is_full = self.file is not None and (
            len(self.samples) >= self.size.max_samples or self.file.tell() + needed > most
        )
        if is_full:
            self.finish()
        if self.file is None:
            self.file = open(self._temporary(), "wb")
        places = []
        for suffix, header, data in infos:
            self.file.write(header)
            places.append((suffix.lower(), self.file.tell(), len(data)))
            self.file.write(data.ljust(_padded(len(data)), b"\0"))
        self.samples.append((key, places))
        return is_full

    def finish(self):
        """Give the shard that is being written its name."""
        if self.file is None:
            return
        name, file = self._name(), self.file
        file.write(bytes(END))
        file.flush()
        os.fsync(file.fileno())
        num_bytes, self.file = file.tell(), None
        file.close()
        if (text := format_members(self.samples)) is not None:
            write_file((self.folder / name).with_suffix(".idx"), text)
        self._temporary().rename(self.folder / name)
        flush(self.folder)
        self.shards.append(Shard(name, len(self.samples), num_bytes))
        self.samples = []

    def _name(self) -> str:
        return f"{self.prefix}{len(self.shards):06}.tar"

    def _temporary(self) -> Path:
        return self.folder / f".{self._name()}.tmp"

    @staticmethod
    def _header(name: str, size: int) -> bytes:
        member = tarfile.TarInfo(name)
        member.size, member.mode = size, 0o644
        return member.tobuf(tarfile.GNU_FORMAT)


def _padded(size: int) -> int:
    return (size + tarfile.BLOCKSIZE - 1) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE


def members_of(raw: dict, options: dict | None = None) -> dict[str, bytes]:
    """Return the members of a raw record: its pictures as they are encoded, and the rest of it as JSON.

    `options` are those of `records.check`. Raises UserError for what is no record, Filtered as `check` does.
    """
    options = options or {}
    images, messages, independent = check(raw, **options)
    raw = rename(raw, options.get("fields") or {})
    read = raw.read if isinstance(raw, Record) else None
    beside = [fetch(picture, read) for picture in find_pictures(raw)]
    if beside or not images:  # the record as it is, of whatever layout
        images, record = beside, {name: value for name, value in raw.items() if name not in PICTURE_KEYS}
    else:  # its parts carry the pictures
        record = {"messages": messages} | ({"independent": True} if independent else {})
    members = {}
    for number, image in enumerate(images):
        kind, data = encode(image)
        members[f"{number}.{kind}"] = data
    try:
        members["json"] = json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UserError(f"the record cannot be written as JSON: {error}") from error
    return members


def encode(image) -> tuple[str, bytes]:
    """Return a picture's suffix and file: as it is, or of a decoded one a PNG."""
    if isinstance(image, bytes):
        kind = next((name for head, name in KINDS.items() if image.startswith(head)), None)
        if kind is None:
            with Image.open(io.BytesIO(image)) as opened:
                kind = (opened.format or "").lower()
        return {"jpeg": "jpg", "jpeg2000": "jp2"}.get(kind, kind), bytes(image)
    file = io.BytesIO()
    image.save(file, "PNG")
    return "png", file.getvalue()


def write_shards(
    source: Source,
    folder: Path,
    size: ShardSize = USUAL,
    num: int = 0,
    options: dict | None = None,
    max_bad_fraction: float = 0.05,
    settings: dict | None = None,
) -> list[Shard]:
    """Write the first `num` records of a source (0: one pass) to shards, with a progress bar; return the shards.

    Records that are none are counted, and the first of them named. Begun again with the same `settings` after a kill,
    it goes on after the last whole shard.
    """
    size.validate()
    with lock(folder):
        if (folder / NAME).exists():
            raise UserError(f"{folder / NAME} is there already: name another folder, or remove this one")
        made_with = json.loads(json.dumps(settings or dataclasses.asdict(size), default=str))
        shards, read, lost = take_up(folder, made_with)
        total = min(len(source), num or len(source)) if isinstance(source, Sized) else num or None
        refs = itertools.islice(first_pass(source), read, num or None)
        named = 0
        with (
            open(folder / PROGRESS, "a", encoding="utf-8") as progress,
            ShardWriter(folder, size, tuple(shards)) as writer,
            tqdm(refs, total=total, initial=read, unit="record") as bar,
        ):

            def note(read: int, lost: int):
                progress.write(json.dumps({"shard": writer.shards[-1], "read": read, "lost": lost}) + "\n")
                progress.flush()
                os.fsync(progress.fileno())

            for ref in bar:
                try:
                    with time_limit(RECORD_SECONDS, "the record"):
                        members = members_of(source.read(ref.key), options)
                except Exception as error:  # whatever a record does, it is counted and named
                    read, lost, named = read + 1, lost + 1, named + 1
                    if named <= NAMED:
                        tqdm.write(printable(f"left out: {ref.source}, {ref.where}: {explain(error)}"))
                    if read >= JUDGED_AFTER:
                        judge(read, lost, max_bad_fraction)
                    continue
                if writer.write(f"{read:08}", members):
                    note(read, lost)  # what came before this record is in shards that are whole
                read += 1
            judge(read, lost, max_bad_fraction)
        shards = writer.shards
        if not shards:
            raise UserError(f"{source.name} has no record that can be written")
        write_index(folder, shards)
        (folder / PROGRESS).unlink()
    print(
        f"wrote {sum(shard.num_samples or 0 for shard in shards)} of {read} records to {len(shards)} shards in {folder}"
    )
    return shards


def judge(read: int, lost: int, max_bad_fraction: float):
    """Raise UserError when too many records are unusable."""
    if lost > max_bad_fraction * read:
        raise UserError(
            f"{lost} of {read} records are unusable, more than --max-bad-fraction {max_bad_fraction} allows"
        )


def take_up(folder: Path, settings: dict) -> tuple[list[Shard], int, int]:
    """Return the shards of an earlier attempt, and how many records were read for them and lost by then."""
    path = folder / PROGRESS
    if not path.exists():
        write_file(path, json.dumps(settings) + "\n")
        return [], 0, 0
    first, *lines = [
        json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
    changed = [f"{name}: {first.get(name)!r} against {x!r}" for name, x in settings.items() if first.get(name) != x]
    if changed:
        raise UserError(f"{folder} was begun with other settings ({'; '.join(changed)}): use the same, or remove it")
    shards = [Shard(*line["shard"]) for line in lines]
    write_file(path, "".join(json.dumps(line) + "\n" for line in (first, *lines)))  # without half a line
    return shards, lines[-1]["read"] if lines else 0, lines[-1]["lost"] if lines else 0
