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
import itertools
import json
import os
import tarfile
from collections.abc import Sized
from pathlib import Path

from tqdm import tqdm

from nanovlm.data.members import members_of
from nanovlm.data.reader import RECORD_SECONDS, explain
from nanovlm.data.shard_index import NAME, Shard, format_members, write_index
from nanovlm.data.source import Source, first_pass
from nanovlm.errors import UserError, printable
from nanovlm.files import changes, flush, lock, write_file
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


class TarShard:
    """A tar file that is written under a temporary name, until `finish` gives it its own, and a .idx beside it.

    As a context it is finished at the end, and removed on an error.
    """

    def __init__(self, path: Path):
        self.path, self.temporary = path, path.with_name(f".{path.name}.tmp")
        self.file = open(self.temporary, "wb")
        self.samples: list[tuple[str, list[tuple[str, int, int]]]] = []

    def __enter__(self):
        return self

    def __exit__(self, kind, _error, _trace):
        if kind is None:
            self.finish()
        else:
            self.discard()

    def write(self, key: str, members: dict[str, bytes]):
        """Write a sample, whose members are named by their suffixes."""
        places = []
        for suffix, data in members.items():
            self.file.write(make_header(f"{key}.{suffix}", len(data)))
            places.append((suffix.lower(), self.file.tell(), len(data)))
            self.file.write(data.ljust(_padded(len(data)), b"\0"))
        self.samples.append((key, places))

    def has_room(self, key: str, members: dict[str, bytes], size: ShardSize) -> bool:
        """Tell whether a shard of limited size may have this sample, too; the first one it may have in any case."""
        needed = sum(len(make_header(f"{key}.{suffix}", len(x))) + _padded(len(x)) for suffix, x in members.items())
        is_small = self.file.tell() + needed <= size.max_mb * 1e6 - END
        return not self.samples or (len(self.samples) < size.max_samples and is_small)

    def finish(self) -> Shard:
        """Give the file its name once it is on the disk."""
        self.file.write(bytes(END))
        self.file.flush()
        os.fsync(self.file.fileno())
        shard = Shard(self.path.name, len(self.samples), self.file.tell())
        self.file.close()
        if (text := format_members(self.samples)) is not None:
            write_file(self.path.with_suffix(".idx"), text)
        self.temporary.rename(self.path)
        flush(self.path.parent)
        return shard

    def discard(self):
        self.file.close()
        self.temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes samples into the shards of a folder, one after the other; `shards` are those that are whole.

    Use it as a context: what is written is whole at its end, and left as it is on an error.
    """

    def __init__(self, folder: Path, size: ShardSize = USUAL, shards: tuple[Shard, ...] = (), prefix: str = ""):
        self.folder, self.size, self.prefix, self.shards = folder, size, prefix, list(shards)
        self.open: TarShard | None = None

    def __enter__(self):
        return self

    def __exit__(self, kind, _error, _trace):
        if kind is None:
            self.finish()
        elif self.open is not None:
            self.open.discard()

    def write(self, key: str, members: dict[str, bytes]) -> bool:
        """Write a sample, whose members are named by their suffixes; return whether a shard was finished before it."""
        is_full = self.open is not None and not self.open.has_room(key, members, self.size)
        if is_full:
            self.finish()
        if self.open is None:
            self.open = TarShard(self.folder / f"{self.prefix}{len(self.shards):06}.tar")
        self.open.write(key, members)
        return is_full

    def finish(self):
        """Give the shard that is being written its name."""
        if self.open is not None:
            self.shards.append(self.open.finish())
            self.open = None


def make_header(name: str, size: int) -> bytes:
    """Return the header of a member, which depends on nothing else."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)


def _padded(size: int) -> int:
    return (size + tarfile.BLOCKSIZE - 1) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE


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
        if others := sorted(file for file in folder.iterdir() if not file.name.startswith(".")):
            raise UserError(f"{others[0]} is there, which an index would hide from readers: name a new or empty folder")
        write_file(path, json.dumps(settings) + "\n")
        return [], 0, 0
    first, *lines = [
        json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
    if not lines:  # nothing is written yet, so a mistake in the settings can be corrected
        first = settings
    elif changed := changes(first, settings):
        raise UserError(f"{folder} was begun with other settings ({changed}): use the same, or remove it")
    shards = [Shard(*line["shard"]) for line in lines]
    write_file(path, "".join(json.dumps(line) + "\n" for line in (first, *lines)))  # without half a line
    return shards, lines[-1]["read"] if lines else 0, lines[-1]["lost"] if lines else 0
