"""Raw records in the members of tar files: WebDataset shards."""

import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from nanovlm.data import video
from nanovlm.data.pictures import PICTURE_KEYS, VIDEO_KEYS, is_empty
from nanovlm.data.source import IN_ORDER, Order, Ref, deal
from nanovlm.data.source_files import IMAGE_SUFFIXES, LARGEST_FILE, check_index, find_files, join_names
from nanovlm.data.source_folder import read_record
from nanovlm.errors import UserError

LARGEST_HEADER = 2**20  # bytes of a header, long names included


class Tar:
    """WebDataset shards: tar files in which the members with the same key are one sample, in any order.

    The key is a member's path up to the first dot of the file name. Members with an image suffix are images, sorted by
    name (`a.0.jpg a.1.jpg`), and where there are none those with a video suffix are videos; `.json` is the record, or
    `.txt` a caption. Headers are scanned once; members are read by offset. A damaged shard keeps its complete samples.
    The last sample counts as complete only if an earlier one has the same suffixes; if the members of a sample are not
    adjacent, any sample counts unless its suffixes are a proper subset of another's.
    """

    blocks = None

    def __init__(self, paths: str | Path | Iterable[str | Path], order: Order = IN_ORDER, allow_urls: bool = False):
        # The images of a sample are its members, so none is fetched from an address.
        self.files, self.damaged, self.order = find_files(paths, ".tar"), [], order
        self.name = join_names(self.files)
        self.samples = []  # (file, key, [(suffix, offset, size), ...])
        shapes = Shapes()
        for file in self.files:
            samples, losses = find_samples(file, shapes)
            self.samples += [(file, key, group) for key, group in samples]
            self.damaged += losses
        if not self.samples:
            raise UserError("; ".join(self.damaged) or f"{self.name} has no samples")

    def __len__(self):
        return len(self.samples)

    def refs(self, slots: Sequence[int], num_slots: int, start: int | None = None) -> Iterator[Ref]:
        return deal(self, slots, num_slots, start)

    def read(self, key: int) -> dict:
        check_index(self, key)
        file, name, members = self.samples[key]
        where = f"sample {name} of {file}"
        try:
            with open(file, "rb") as opened:
                return read_sample(opened, members, where)
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error}") from error


class Shapes:
    """What the samples of shards look like so far: the suffixes of each, and whether some sample is not contiguous."""

    def __init__(self):
        self.seen: set[frozenset[str]] = set()
        self.scattered = False


def find_samples(file: Path, shapes: Shapes) -> tuple[list[tuple], list[str]]:
    """Return (key, [(suffix, offset, size), ...]) of each whole sample of a shard, and a sentence for each loss."""
    members, damage = _scan_tar(file)
    groups, comes_back = _group_members(members)
    shapes.scattered |= comes_back
    if shapes.scattered:
        shapes.seen |= {_shape(group) for _key, group in groups}
    samples, alone, losses = [], [], []
    for number, (key, group) in enumerate(groups, start=1):
        shape = _shape(group)
        if damage:
            is_last = number == len(groups) and shape not in shapes.seen
            lacks = shapes.scattered and any(shape < other for other in shapes.seen)
            if is_last or lacks or any(size is None for _suffix, _offset, size in group):
                continue
        shapes.seen.add(shape)
        if shape & {"json", "txt"}:
            samples.append((key, group))
        elif any(map(_is_image, shape)):
            alone.append(key)
    if damage:
        losses.append(f"{file} {damage}: {len(samples)} whole samples are before that")
    if alone:
        losses.append(f"{file}: {len(alone)} samples have images and no .txt or .json, the first is {alone[0]}")
    return samples, losses


def read_sample(opened: BinaryIO, members: Sequence[tuple[str, int, int]], where: str) -> dict:
    """Return the record in some members of an open shard. Raises UserError that begins with `where`."""
    contents, is_shown = {}, _is_image if any(_is_image(suffix) for suffix, *_ in members) else _is_video
    for suffix, offset, size in members:
        if suffix in ("json", "txt") or is_shown(suffix):
            if suffix in contents:
                raise UserError(f"{where} has two members .{suffix}")
            if size > LARGEST_FILE:
                raise UserError(f"{where} has a member .{suffix} of more than {LARGEST_FILE} bytes")
            opened.seek(offset)
            contents[suffix] = opened.read(size)
            if len(contents[suffix]) != size:
                raise UserError(f"{where} is cut off: the file became shorter since it was opened")
    shown = [contents[suffix] for suffix in sorted(filter(is_shown, contents), key=_natural_order)]
    record = read_record(contents.get("json"), contents.get("txt"), where, has_image=bool(shown))
    for kind, names, is_own in (("images", PICTURE_KEYS, _is_image), ("videos", VIDEO_KEYS, _is_video)):
        num = len(shown) if is_shown is is_own else 0
        for name in names:
            named = record.pop(name, None)
            num_named = 0 if is_empty(named) else len(named) if isinstance(named, list) else 1
            if num_named > num:
                raise UserError(f"{where} names {num_named} {kind} in {name!r} and has {num}")
        if num:
            record[kind] = shown
    return record


class _Headers:
    """A tar file of which headers are read and nothing else, in order.

    A long name is a member with a size of its own, which damage may turn into that of all memory, and a negative size
    leads back to a header that was read before.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.furthest, self.tell = file, 0, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header at byte {self.tell()} has a size of {size}")
        return self.file.read(size)

    def seek(self, place: int, whence: int = 0) -> int:
        if whence == 0 and place < self.furthest:
            raise tarfile.ReadError(f"a header leads from byte {self.furthest} back to {place}")
        self.furthest = self.file.seek(place, whence)
        return self.furthest


def _scan_tar(file: Path) -> tuple[list[tuple], str]:
    """Scan the headers of a tar file: return (key, suffix, offset, size) of each file with a suffix, and the damage.

    The size of a truncated member is None.
    """
    members, damage = [], ""
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened, tarfile.open(fileobj=_Headers(opened), mode="r:") as tar:  # pyright: ignore
            while (member := tar.next()) is not None:
                if member.size < 0:  # the next header would be at or before this one
                    raise tarfile.ReadError(f"{member.name} has a size of {member.size}")
                folder, _, name = member.name.rpartition("/")
                key, dot, suffix = name.partition(".")
                if member.isreg() and key and dot:
                    is_whole = member.offset_data + member.size <= size
                    key = re.sub(r"^(\./|/)+", "", f"{folder}/{key}")
                    members.append((key, suffix.lower(), member.offset_data, member.size if is_whole else None))
                tar.members.clear()  # the list would grow with the file  # pyright: ignore[reportAttributeAccessIssue]
            opened.seek(tar.offset)
            if opened.read(tarfile.BLOCKSIZE).count(0) < tarfile.BLOCKSIZE:
                damage = f"has no further header and no end mark at byte {tar.offset}"
    except (tarfile.TarError, OSError, ValueError, OverflowError, LookupError) as error:
        damage = f"is cut off, damaged or compressed ({error})"
    return members, damage


def _group_members(members: list[tuple]) -> tuple[list[tuple], bool]:
    """Group members by key, in order of first occurrence; also return whether some group is not contiguous.

    A key that recurs after others with a suffix that its group already has starts a new sample, as in joined shards.
    """
    groups, latest, comes_back, last = [], {}, False, None
    for key, *member in members:
        group = latest.get(key)
        if group is None or (key != last and member[0] in _shape(group)):
            group = latest[key] = []
            groups.append((key, group))
        elif key != last:
            comes_back = True
        group.append(tuple(member))
        last = key
    return groups, comes_back


def _shape(group: list[tuple]) -> frozenset[str]:
    return frozenset(suffix for suffix, _offset, _size in group)


def _is_image(suffix: str) -> bool:
    """Return whether a member's suffix is that of an image: jpg, 0.jpg, left.jpg, jpg.0."""
    return "." + re.sub(r"\.\d+$", "", suffix).rpartition(".")[2] in IMAGE_SUFFIXES


def _is_video(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in video.SUFFIXES


def _natural_order(name: str) -> list:
    """Return a sort key that orders numbers by value: 9 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
