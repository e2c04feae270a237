"""Raw records of tar shards as a stream, on this machine or at an address: each micro-batch reads shards of its own.

```
a pass, num_slots = 2     shards in a new order: 7 2 9 4 0 5 1 8 3 6
line 0 -> slot 0          7 9 0 | 1 3        windows of 3 shards, whose samples are shuffled together
line 1 -> slot 1          2 4 5 | 8 6
```

Where there are fewer shards than slots, a line is dealt to several of them in turn. Where a slot stands follows from
the number of its round, the seed and how many samples each shard has: with an index (shard_index.py) any rank can go
on with any slot at once. Without one `after` says where the windows begin, and a slot that moves to another rank counts
its shards anew.
"""

import glob
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanovlm.data.shard_cache import CacheOptions, fetch, find, is_address, read_whole
from nanovlm.data.shard_index import LARGEST_INDEX, NAME, Members, parse_index, parse_members
from nanovlm.data.source import IN_ORDER, Damaged, Order, Ref
from nanovlm.data.source_files import expand_braces
from nanovlm.data.source_tar import Shapes, find_samples, read_sample
from nanovlm.errors import UserError, printable

HEADER = 512  # bytes before the contents of a member
FETCHES = threading.BoundedSemaphore(4)  # shards that this process fetches ahead at a time
REMEMBERED = 60  # seconds for which a shard that cannot be fetched is not tried again


class ShardOptions(NamedTuple):
    """How many shards are shuffled together, where those from addresses are kept, and what share may be lost."""

    window: int = 8
    cache: CacheOptions = CacheOptions()
    most_lost: float = 1.0


USUAL = ShardOptions()


class Place(NamedTuple):
    """A window of a line: of which pass, the how manieth, and how many records of the line are before it."""

    epoch: int = 0
    window: int = 0
    first: int = 0


class Shards:
    """Tar shards, found by `find_shards`; a stream, as not all of their samples need be counted.

    A shard that cannot be opened, or is damaged, is as many records that cannot be read as its index says, and one with
    more than its index says is named in place of the last that the index knows. Without an index it is one loss, and
    reading ends with a UserError where more than `most_lost` of the shards are lost whole.
    """

    def __init__(self, spec: str, order: Order = IN_ORDER, options: ShardOptions = USUAL):
        self.name, self.order, self.options = spec, order, options
        self.files, self.counts, self.damaged = find_shards(spec)
        self.is_remote = is_address(self.files[0])
        self.has_count = [count is not None for count in self.counts]
        self.lost: set[int] = set()  # the shards without a count of which no record can be read
        self.num_dealt = float(len(self.files))
        self.tables: dict[int, list[tuple[str, Members | None]]] = {}  # of the shards that were opened last
        self.most_tables = 2
        self.fetched: dict[int, Path] = {}
        self.failed: dict[int, tuple[float, str]] = {}

    @property
    def num_samples(self) -> int | None:
        """The number of samples by the index; None without one."""
        counts = [count for count in self.counts if count is not None]
        return sum(counts) if len(counts) == len(self.counts) else None

    def refs(self, slots: Sequence[int], num_slots: int, start: dict | None = None) -> Iterator[Ref]:
        """Deal the records; a key is a shard, the name of a sample there and its members."""
        start = start or {"number": 0, "places": {}}
        num_lines = max(n for n in range(1, num_slots + 1) if num_slots % n == 0 and n <= len(self.files))
        self.most_tables = 2 * self.options.window * min(len(slots), num_lines)
        self.num_dealt = len(self.files) * len(slots) / num_slots
        places = dict(start["places"])
        readers = {slot: self._walk(slot, num_slots, num_lines, start["number"],
                                    Place(*places.get(str(slot), ()))) for slot in slots}  # fmt: skip
        for number in itertools.count(start["number"]):
            now = {slot: next(reader) for slot, reader in readers.items()}
            places |= {str(slot): list(place) for slot, (_ref, place) in now.items()}
            after = {"number": number + 1, "places": dict(places)}
            for slot in slots:
                yield now[slot][0]._replace(after=after)

    def read(self, key: tuple[int, str, Members | None]) -> dict:
        shard, name, members = key
        if members is None:
            raise UserError(name) if self.has_count[shard] else Damaged(name)
        where = f"sample {name} of {self.files[shard]}"
        for is_last in (False, True):
            try:
                with open(self._local(shard), "rb") as opened:
                    for suffix, offset, size in members:
                        opened.seek(offset - HEADER)
                        check_header(opened.read(HEADER), f"{name}.{suffix}", size, f".{suffix} of {where}")
                    return read_sample(opened, members, where)
            except FileNotFoundError as error:  # the cache made room for others in this moment
                if is_last or not self.is_remote:
                    raise UserError(f"{where} cannot be read: {error}") from error
            except OSError as error:
                raise UserError(f"{where} cannot be read: {error}") from error
        raise AssertionError

    def _walk(
        self, slot: int, num_slots: int, num_lines: int, number: int, place: Place
    ) -> Iterator[tuple[Ref, Place]]:
        """Yield the records of a slot from a round on, each with the window that it is in; `place` is not behind it."""
        line, share = slot % num_lines, num_slots // num_lines
        (epoch, window, first), shards, begin = place, self._shards(place.epoch, line, num_lines), -1
        size, samples = self._size(shards, window), None
        for at in itertools.count(number):
            count = at * share + slot // num_lines
            while count - first >= size:
                first, window = first + size, window + 1
                if window * self.options.window >= len(shards):
                    if begin == first:
                        raise UserError(f"{self.name} has no samples in the {len(shards)} shards of a micro-batch")
                    epoch, window, begin = epoch + 1, 0, first
                    shards = self._shards(epoch, line, num_lines)
                size, samples = self._size(shards, window), None
            if samples is None:
                samples = self._mix(epoch, line, window, shards)
            shard, index = samples[count - first]
            name, members = self._sample(shard, index)
            file = self.files[shard]
            where = f"sample {name} of {file}" if members is not None else file
            ref = Ref(slot, at, epoch, (shard, name, members), self.name, where, None)
            yield ref, Place(epoch, window, first)

    def _shards(self, epoch: int, line: int, num_lines: int) -> Sequence[int]:
        """Return the shards of a line in a pass."""
        return [int(shard) for shard in self.order(epoch, len(self.files))[line::num_lines]]

    def _window(self, shards: Sequence[int], window: int) -> list[int]:
        return list(shards[window * self.options.window : (window + 1) * self.options.window])

    def _size(self, shards: Sequence[int], window: int) -> int:
        return sum(map(self._count, self._window(shards, window)))

    def _mix(self, epoch: int, line: int, window: int, shards: Sequence[int]) -> list[list[int]]:
        """Return shard and index of each sample of a window in the order in which they are read."""
        now = self._window(shards, window)
        self._fetch_ahead(now + self._window(shards, window + 1))
        counts = [self._count(shard) for shard in now]
        samples = np.stack([np.repeat(now, counts), np.concatenate([np.arange(n) for n in counts])], axis=1)
        if self.order.shuffle:
            seeds = [self.order.seed, epoch, line, window, *([] if self.order.part is None else [self.order.part])]
            samples = np.random.default_rng(seeds).permutation(samples)
        return samples.tolist()

    def _count(self, shard: int) -> int:
        """Return how many samples a shard has, by the index or by looking."""
        if self.counts[shard] is None:
            self.counts[shard] = len(self._table(shard))
        return self.counts[shard]  # pyright: ignore[reportReturnType]

    def _sample(self, shard: int, index: int) -> tuple[str, Members | None]:
        """Return name and members of a sample; of what cannot be read the reason, and None."""
        table, told = self._table(shard), self._count(shard)
        if index >= len(table):
            return f"{self.files[shard]} has {len(table)} samples, and its index says {told}", None
        # Its places are counted by the index, so the last of them tells of those that have none.
        if index == told - 1 and self.has_count[shard]:
            num = sum(members is not None for _name, members in table)
            if num > told:
                why = f"the last {num - told + 1} are not read, as the shard has changed since, so write its index anew"
                return f"{self.files[shard]} has {num} samples, and its index says {told}: {why}", None
        return table[index]

    def _table(self, shard: int) -> list[tuple[str, Members | None]]:
        """Return the samples of a shard, by its .idx or by its headers, and after them what is lost of it."""
        if shard not in self.tables:
            self.tables[shard] = self._find_samples(shard)
            for other in list(self.tables)[: -self.most_tables]:
                del self.tables[other]
        return self.tables[shard]

    def _find_samples(self, shard: int) -> list[tuple[str, Members | None]]:
        name = f"{self.files[shard].removesuffix('.tar')}.idx"
        try:
            if self.counts[shard] is not None and (data := read_beside(name)) is not None:
                return list(parse_members(data, name))
        except (UserError, OSError):
            pass  # the headers say the same
        num = self.counts[shard] or 1
        try:
            samples, losses = find_samples(self._local(shard), Shapes())
            losses = [f"{self.files[shard]}: {loss}" if self.is_remote else loss for loss in losses]
        except (UserError, OSError) as error:
            samples, losses = [], [str(error)] * num
        if losses and not samples and not self.has_count[shard]:
            self._lose(shard, losses[0])
            losses = [f"the whole shard is lost, and nothing tells how many records it has: {losses[0]}"] * num
        else:
            self.lost.discard(shard)
        return [*((key, tuple(members)) for key, members in samples), *((loss, None) for loss in losses)]

    def _lose(self, shard: int, why: str):
        """Note a shard that is lost whole. Raises UserError when these are too many of those that are dealt here."""
        self.lost.add(shard)
        num, total = len(self.lost), len(self.files)
        if num > self.options.most_lost * self.num_dealt or num == total:
            allowed = "" if num == total else f", more than data.max_bad_fraction = {self.options.most_lost} allows"
            name = printable(self.name, most=200)
            raise UserError(f"{num} of the {total} shards of {name} cannot be read at all{allowed}: {why}")

    def _local(self, shard: int) -> Path:
        """Return the file of a shard on this machine."""
        if not self.is_remote:
            return Path(self.files[shard])
        if shard in self.fetched:
            try:
                os.utime(self.fetched[shard])  # so that the cache keeps it
                return self.fetched[shard]
            except FileNotFoundError:
                pass
        when, why = self.failed.get(shard, (-REMEMBERED, ""))
        if time.monotonic() - when < REMEMBERED:
            raise UserError(why)
        try:
            self.fetched[shard] = fetch(self.files[shard], self.options.cache)
        except UserError as error:
            self.failed[shard] = time.monotonic(), str(error)
            raise
        return self.fetched[shard]

    def _fetch_ahead(self, shards: list[int]):
        """Begin to fetch shards in the order in which they will be needed."""
        for shard in shards if self.is_remote else ():
            threading.Thread(target=self._fetch_one, args=(shard,), daemon=True).start()

    def _fetch_one(self, shard: int):
        with FETCHES:
            try:
                self._local(shard)
            except (UserError, OSError):
                pass  # who reads it says so


def find_shards(spec: str) -> tuple[list[str], list[int | None], list[str]]:
    """Return the shards that a name stands for, how many samples each has, and what is known to be lost of them.

    The name is that of a folder with an index.json, or of .tar files: with braces, a glob, several with commas. Sizes
    come from the index.json beside the first shard.
    """
    if not spec.endswith(".tar"):
        folder = spec.removesuffix(NAME).rstrip("/")
        if (data := read_beside(f"{folder}/{NAME}")) is None:
            raise UserError(f"there is no {printable(folder, most=200)}/{NAME}, which says what shards are there: name "
                             "the shards, as in shard-{000..127}.tar, or write it with python -m nanovlm.data.shards "
                             "index")  # fmt: skip
        shards = parse_index(data, f"{folder}/{NAME}")
        losses = [f"{folder}/{loss}" for shard in shards for loss in shard.losses]
        return [f"{folder}/{shard.name}" for shard in shards], [shard.num_samples for shard in shards], losses
    files = []
    for name in expand_braces(spec):
        is_glob = bool(set(name) & set("*["))
        files += (find(name) if is_address(name) else sorted(glob.glob(name))) if is_glob else [name]
    if not files:
        raise UserError(f"the source {spec!r} stands for no file")
    folder = files[0].rpartition("/")[0]
    data = read_beside(f"{folder}/{NAME}")
    counts = {f"{folder}/{s.name}": s.num_samples for s in parse_index(data, f"{folder}/{NAME}")} if data else {}
    return files, [counts.get(file) for file in files], []


def read_beside(name: str) -> bytes | None:
    """Read a file of an index, at an address or on this machine; None if there is none."""
    if is_address(name):
        return read_whole(name, LARGEST_INDEX)
    try:
        with open(name, "rb") as file:
            data = file.read(LARGEST_INDEX + 1)
    except FileNotFoundError:
        return None
    if len(data) > LARGEST_INDEX:
        raise UserError(f"{name} has more than {LARGEST_INDEX} bytes")
    return data


def check_header(header: bytes, name: str, size: int, where: str):
    """Raise UserError if a block is not the header of a member of this name and so many bytes."""
    if len(header) < HEADER:
        return  # what is cut off is named where it is read
    told, given = header[124:136].strip(b"\0 "), header[:100].rstrip(b"\0").lower()
    # From 8 GiB on it is written otherwise.
    is_size = told[:1] >= b"\x80" or told.lstrip(b"0") == (b"%o" % size if size else b"")
    whole = name.lower().encode()
    is_name = given.endswith(whole) or whole.endswith(given) or len(given) > 98 or not name.isascii()
    if not (is_size and is_name and given):
        raise UserError(f"{where} is not where the index says: the shard has changed since, so write its index anew")
