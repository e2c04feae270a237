"""Where samples come from: raw records, as datasets publish them -> Sample.

A source of known size has `name`, `__len__` and `raw(index)`; a stream has `name` and `stream(start, epoch)`, an
iterator over raw records in a fixed order from the start-th on. Both have `damaged`: one sentence for each loss that
was found when the source was opened. A raw record is a dict in one of two forms, its images still encoded files
(bytes) or PIL images, none for a text-only sample:

    {"images": [...], "texts": [{"user": str, "assistant": str}, ...], "independent": bool}
    {"images": [...], "messages": [{"role": str, "content": str | [{"type": "text", "text": str}, {"type": "image"}]}]}

Without `images`, an `image` (one or a list) stands for them.

`to_sample` checks a record and decodes it. Sources keep no open file, so that forked processes can share them.
"""

import bisect
import glob
import itertools
import json
import math
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from nanovlm.data import scenes
from nanovlm.data.images import decode_image, to_rgb
from nanovlm.data.types import Filtered, Sample

# Of every image file that PIL reads; of some kinds it knows no more than that they are one.
IMAGE_SUFFIXES = frozenset(
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in ("BUFR", "GRIB", "HDF5", "MPEG")
)
# What FineVision says of each turn, from 1 (bad) to 5: columns parallel to `texts`.
RATINGS = ("relevance_ratings", "visual_dependency_ratings", "image_correspondence_ratings", "formatting_ratings")
# The question to a picture that has only a caption.
CAPTION_QUESTION = "describe the image."


# --- a raw record -> Sample ----------------------------------------------------------------------------------


def to_sample(raw: dict, min_ratings: dict[str, int] | None = None) -> Sample:
    """Check a raw record and decode its images.

    Images that no image part places stand at the beginning of the first user turn, or of every one with
    `independent`. Turns of `texts` that are rated below `min_ratings` are dropped. Raises ValueError for anything
    malformed, Filtered where no turn is left.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"a record must be a dict, not {_kind(raw)}")
    texts, messages, independent = raw.get("texts"), raw.get("messages"), raw.get("independent")
    if (texts is None) == (messages is None):
        keys = ", ".join(map(str, itertools.islice(raw, 10)))
        raise ValueError(f"a record needs either texts or messages; this one has the keys: {keys or 'none'}")
    if not isinstance(independent, bool | None):
        raise ValueError(f"independent must be true or false, not {_kind(independent)}")
    pairs = _read_texts(raw, min_ratings or {}) if messages is None else messages
    if not isinstance(pairs, list):
        raise ValueError(f"messages must be a list, not {_kind(pairs)}")
    messages, carried = [], []
    for number, message in enumerate(pairs):
        messages.append(_read_message(message, f"message {number}", carried))
    _check_roles([message["role"] for message in messages], independent)

    images = [] if raw.get("images") is None else raw["images"]
    if _is_empty(images) and not _is_empty(image := raw.get("image")):
        images = image if isinstance(image, list) else [image]
    if not isinstance(images, list):
        raise ValueError(f"images must be a list, not {_kind(images)}")
    num_parts = sum(_num_images(message) for message in messages)
    if carried:
        if images or independent or len(carried) != num_parts:
            raise ValueError("image parts that carry their image must all do so, without images or independent beside")
        images = carried
    if images and num_parts == 0:
        for message in [message for message in messages if message["role"] == "user"][: None if independent else 1]:
            message["content"] = [{"type": "image"} for _ in images] + _parts(message["content"])
    elif independent:
        for number, message in enumerate(messages):
            if _num_images(message) != (len(images) if message["role"] == "user" else 0):
                raise ValueError(f"message {number} shows {_num_images(message)} images, the record has {len(images)}")
    elif num_parts != len(images):
        raise ValueError(f"the messages show {num_parts} images, the record has {len(images)}")
    if not any(_text(message).strip() for message in messages if message["role"] == "assistant"):
        raise ValueError("every answer of the record is empty")
    return Sample([_to_image(image, i) for i, image in enumerate(images)], messages, bool(independent))


def _to_image(image, number: int) -> Image.Image:
    """Decode one item of `images`."""
    if isinstance(image, bytes):
        return decode_image(image, f"image {number}")
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except Exception as error:  # it may not have been read yet
            raise ValueError(f"image {number} cannot be read: {error}") from error
    name = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
    found = f"only the name {name!r}" if isinstance(name, str) else _kind(image)
    raise ValueError(f"image {number} must be an encoded file (bytes) or a PIL image, not {found}")


def _read_texts(raw: dict, min_ratings: dict[str, int]) -> list[dict]:
    """The turns of `texts` that are rated well enough, as messages."""
    texts = raw["texts"]
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"texts must be a list of at least one turn, not {_kind(texts)}")
    for number, turn in enumerate(texts):
        for key in ("user", "assistant"):
            if not isinstance(turn, dict) or not isinstance(turn.get(key), str):
                raise ValueError(f"turn {number} of texts must be a dict with the strings user and assistant")
    low = set()
    for name, lowest in min_ratings.items():
        if name not in RATINGS:
            raise ValueError(f"unknown rating {name!r}; there are {', '.join(RATINGS)}")
        ratings = [turn.get(name) for turn in texts] if raw.get(name) is None else raw[name]
        is_list = isinstance(ratings, list) and len(ratings) == len(texts)
        if not is_list or not all(isinstance(rating, int | float | None) for rating in ratings):
            raise ValueError(f"{name} must be a list of one number for each of {len(texts)} turns")
        low |= {number for number, rating in enumerate(ratings) if rating is not None and rating < lowest}
    if len(low) == len(texts):
        raise Filtered(f"all {len(texts)} turns are rated below the minimum")
    pairs = [(turn["user"], turn["assistant"]) for number, turn in enumerate(texts) if number not in low]
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]  # noqa: B905


def _read_message(message, where: str, carried: list) -> dict:
    """Check one message and bring its parts to their plain form; add images that parts carry to `carried`."""
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be a dict with role and content, not {_kind(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"{where} must have the role system, user or assistant, not {str(role)[:40]!r}")
    if isinstance(content, str):
        _check_text(content, where)
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise ValueError(f"the content of {where} must be a string or a list of parts, not {_kind(content)}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            _check_text(part["text"], where)
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image":
            carried += [part[key] for key in ("bytes", "image", "path") if part.get(key) is not None][:1]
            parts.append({"type": "image"})
        else:
            raise ValueError(f"each part of {where} must be a text part with a string text or an image part")
    return {"role": role, "content": parts}


def _check_text(text: str, where: str):
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"the text of {where} has half a surrogate pair, which is not valid Unicode")


def _check_roles(roles: list[str], independent: bool | None):
    if "assistant" not in roles:
        raise ValueError(f"a record needs an assistant turn; its messages are of: {', '.join(roles) or 'nobody'}")
    if independent and roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"independent questions must be pairs of user and assistant, not {', '.join(roles)}")
    first = roles[0] == "system"
    for number, role in enumerate(roles[first:]):
        if role != ("user", "assistant")[number % 2]:
            raise ValueError(f"message {number + first} is of {role}; after an optional system message user and "
                             "assistant must take turns")  # fmt: skip


def _parts(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _num_images(message: dict) -> int:
    return sum(part["type"] == "image" for part in _parts(message["content"]))


def _text(message: dict) -> str:
    return "".join(part.get("text", "") for part in _parts(message["content"]))


def _is_empty(image) -> bool:
    """Tell whether a value of `image` or `images` says that there is none."""
    return image is None or (isinstance(image, str | list | dict) and not image)


def _kind(value) -> str:
    return "nothing" if value is None else f"an empty {type(value).__name__}" if value == [] else type(value).__name__


# --- sources of known size -----------------------------------------------------------------------------------


class Scenes:
    """The drawn scenes of one split, asked everything or a lesson: these kinds of question alone."""

    damaged = ()

    def __init__(self, split: str, length: int = 1_000_000, kinds: tuple[str, ...] = ()):
        self.split, self.length, self.kinds = split, length, kinds
        self.name = f"scenes:{','.join(kinds)}" if kinds else "scenes"
        if unknown := [kind for kind in kinds if kind not in scenes.LESSON_KINDS]:
            raise ValueError(f"{self.name}: unknown kind {unknown[0]!r}; there are {', '.join(scenes.LESSON_KINDS)}")

    def __len__(self):
        return self.length

    def raw(self, index: int) -> dict:
        return scenes.draw(self.split, index, self.kinds)


class JsonLines:
    """A text file with one JSON record a line; images are file names, relative to the file's folder.

    Only the places of the lines are kept in memory.
    """

    def __init__(self, path: str | Path):
        self.path, self.name, self.damaged = Path(path), str(path), []
        self.starts, self.numbers = array("q"), array("q")  # of each line with content: byte offset, line number
        offset = 0
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if not self.starts and self.path.suffix == ".json" and line.lstrip().startswith(b"["):
                        raise ValueError(f"{path} is one JSON list; it must have one record (an object) a line")
                    if not line.isspace():
                        self.starts.append(offset)
                        self.numbers.append(number)
                    offset += len(line)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not self.starts:
            raise ValueError(f"{path} has no records")

    def __len__(self):
        return len(self.starts)

    def raw(self, index: int) -> dict:
        _check_index(self, index)
        where = f"line {self.numbers[index]} of {self.path}"
        try:
            with open(self.path, "rb") as file:
                file.seek(self.starts[index])
                record = _read_json(file.readline(), where)
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
        return _fetch_images(record, lambda name: _read_file(self.path.parent / name, where))


class Folder:
    """A folder of image files, each with a caption (same name, .txt) or a record (.json) beside it.

    Where there is a metadata.jsonl, its lines are the records. An image that a record does not name is its only one.
    """

    def __init__(self, path: str | Path):
        self.path, self.name, self.damaged = Path(path), str(path), []
        self.lines = JsonLines(self.path / "metadata.jsonl") if (self.path / "metadata.jsonl").is_file() else None
        self.images = []
        if self.lines is None:
            found = sorted(file for file in self.path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            self.images = [file for file in found if any(file.with_suffix(s).is_file() for s in (".json", ".txt"))]
            if not self.images:
                raise ValueError(f"{path} has no image file with a .txt or .json of its name")
            if alone := len(found) - len(self.images):
                self.damaged.append(f"{path}: {alone} of {len(found)} images have no .txt or .json beside them")

    def __len__(self):
        return len(self.images) if self.lines is None else len(self.lines)

    def raw(self, index: int) -> dict:
        _check_index(self, index)
        if self.lines is not None:
            return self.lines.raw(index)
        image = self.images[index]
        beside = {s: _read_file(file, str(file)) for s in (".json", ".txt") if (file := image.with_suffix(s)).is_file()}
        record = _read_record(beside.get(".json"), beside.get(".txt"), str(image), has_image=True)
        if all(record.get(key) is None for key in ("images", "image")):
            record["images"] = [image.name]
        return _fetch_images(record, lambda name: _read_file(image.parent / name, str(image)))


class Parquet:
    """Records in the rows of parquet files: a file, a glob, a folder, or a list of these.

    Images are bytes or structs of bytes and path, one or a list, as FineVision and The Cauldron have them. The row
    group that was read last stays in memory, so rows are read fast in an order that keeps to a row group for a while.
    """

    columns = ("images", "image", "texts", "messages", "independent", *RATINGS)

    def __init__(self, paths: str | Path | Iterable[str | Path]):
        parquet = _import_parquet()
        self.files, self.damaged = _find_files(paths, ".parquet"), []
        self.name = _join_names(self.files)
        self.groups = []  # of each row group: file, number in the file
        self.starts = self.blocks = array("q", [0])  # the first row of each row group, and the end
        for file in self.files:
            try:
                metadata = parquet.read_metadata(file)
                names = metadata.schema.to_arrow_schema().names
            except (OSError, ValueError, NotImplementedError) as error:
                raise ValueError(f"{file} is damaged or no parquet file: {error}") from error
            if not {"texts", "messages"} & set(names):
                raise ValueError(f"{file} needs a column texts or messages; it has {', '.join(names)}")
            for number in range(metadata.num_row_groups):
                self.groups.append((file, number))
                self.starts.append(self.starts[-1] + metadata.row_group(number).num_rows)
        if not len(self):
            raise ValueError(f"{self.name} has no rows")
        self.last = None  # (row group, its table)

    def __len__(self):
        return self.starts[-1]

    def raw(self, index: int) -> dict:
        _check_index(self, index)
        group = bisect.bisect_right(self.starts, index) - 1
        file, number = self.groups[group]
        row = index - self.starts[group]
        where = f"row {row} of row group {number} of {file}"
        last = self.last
        try:
            if last is None or last[0] != group:
                # One thread, as a forked process has no others.
                with _import_parquet().ParquetFile(file) as opened:
                    names = [name for name in opened.schema_arrow.names if name in self.columns]
                    last = self.last = group, opened.read_row_group(number, columns=names, use_threads=False)
            record = last[1].slice(row, 1).to_pylist()[0]
        except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
        return _fetch_images(record, lambda name: _read_file(file.parent / name, where))


class Tar:
    """WebDataset shards: tar files in which the members with the same key are one sample, in whatever order.

    The key is the member's name up to the first dot of its last part. Files that PIL reads are images, several in
    the order of their names (`a.0.jpg a.1.jpg`); `.json` is the record, or `.txt` a caption. The headers are read
    once, then each member by its place. Of a shard that is cut off, the whole samples before the cut remain: the last
    of them if a header after it was readable or if an earlier sample has the same suffixes. Where the members of a
    sample do not stand together, those remain that lack none of the suffixes of another.
    """

    def __init__(self, paths: str | Path | Iterable[str | Path]):
        self.files, self.damaged = _find_files(paths, ".tar"), []
        self.name = _join_names(self.files)
        self.samples = []  # (file, key, [(suffix, offset, size), ...])
        shapes, scattered = set(), False  # the suffixes of every whole sample; whether some do not stand together
        for file in self.files:
            members, damage = _scan_tar(file)
            groups, comes_back = _group_members(members)
            scattered |= comes_back
            if scattered:
                shapes |= {_shape(group) for _key, group in groups}
            num_samples, alone = len(self.samples), []
            for number, (key, group) in enumerate(groups, start=1):
                shape = _shape(group)
                if damage:
                    is_last = number == len(groups) and shape not in shapes
                    lacks = scattered and any(shape < other for other in shapes)
                    if is_last or lacks or any(size is None for _suffix, _offset, size in group):
                        continue
                shapes.add(shape)
                if shape & {"json", "txt"}:
                    self.samples.append((file, key, group))
                elif any(map(_is_image, shape)):
                    alone.append(key)
            if damage:
                kept = len(self.samples) - num_samples
                self.damaged.append(f"{file} {damage}: {kept} whole samples are before that")
            if alone:
                self.damaged.append(
                    f"{file}: {len(alone)} samples have images and no .txt or .json, the first is {alone[0]}"
                )
        if not self.samples:
            raise ValueError("; ".join(self.damaged) or f"{self.name} has no samples")

    def __len__(self):
        return len(self.samples)

    def raw(self, index: int) -> dict:
        _check_index(self, index)
        file, key, members = self.samples[index]
        where = f"sample {key} of {file}"
        contents = {}
        try:
            with open(file, "rb") as opened:
                for suffix, offset, size in members:
                    if suffix in ("json", "txt") or _is_image(suffix):
                        if suffix in contents:
                            raise ValueError(f"{where} has two members .{suffix}")
                        opened.seek(offset)
                        contents[suffix] = opened.read(size)
                        if len(contents[suffix]) != size:
                            raise ValueError(f"{where} is cut off: the file became shorter since it was opened")
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
        images = [contents[suffix] for suffix in sorted(filter(_is_image, contents), key=_natural_order)]
        record = _read_record(contents.get("json"), contents.get("txt"), where, has_image=bool(images))
        for name in ("images", "image"):
            named = record.pop(name, None)
            num_named = 0 if _is_empty(named) else len(named) if isinstance(named, list) else 1
            if num_named > len(images):
                raise ValueError(f"{where} names {num_named} images in {name!r} and has {len(images)}")
        if images:
            record["images"] = images
        return record


def _scan_tar(file: Path) -> tuple[list[tuple], str]:
    """Read the headers of a tar file: (key, suffix, offset, size) of every member, and what is wrong with the file.

    The size of a member that the file's end cuts is None.
    """
    members, damage = [], ""
    try:
        size = file.stat().st_size
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                folder, _, name = member.name.rpartition("/")
                key, dot, suffix = name.partition(".")
                if member.isreg() and key and dot:
                    is_whole = member.offset_data + member.size <= size
                    key = f"{folder}/{key}".lstrip("./")
                    members.append((key, suffix.lower(), member.offset_data, member.size if is_whole else None))
                tar.members.clear()  # it would grow with the file
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).count(0) < tarfile.BLOCKSIZE:
                damage = f"has no further header and no end mark at byte {tar.offset}"
    except (tarfile.TarError, OSError, ValueError, OverflowError, LookupError) as error:
        damage = f"is cut off, damaged or compressed ({error})"
    return members, damage


def _group_members(members: list[tuple]) -> tuple[list[tuple], bool]:
    """Group members by key, in the order of the first of each; tell whether a key comes back after others.

    A key that comes back with a suffix that it has is another sample, as in shards that were joined.
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
    """Tell whether a member is an image: jpg, 0.jpg, left.jpg, jpg.0."""
    return "." + re.sub(r"\.\d+$", "", suffix).rpartition(".")[2] in IMAGE_SUFFIXES


def _natural_order(name: str) -> list:
    """Sort key by which a 10 comes after a 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


class Mixture:
    """Several sources of known size as one: in turns by their weights, as lessons, or each once, one after the other.

    With weights a fixed schedule of 1000 places repeats, in which each source has its share, evenly spread. As lessons
    each source has `lengths` samples before the next takes over, the last as many as are asked for. Both are endless;
    a source that is over begins again.
    """

    num_slots = 1000

    def __init__(self, sources: list, weights: list[float] | None = None, lengths: list[int] | None = None):
        if not sources or (weights is not None and len(weights) != len(sources)):
            num_weights = "no" if weights is None else len(weights)
            raise ValueError(
                f"a mixture needs sources and a weight for each; there are {len(sources)}, {num_weights} weights"
            )
        self.sources = list(sources)
        self.name = " + ".join(source.name for source in sources)
        self.damaged = [sentence for source in sources for sentence in source.damaged]
        self.starts = [0, *itertools.accumulate(map(len, sources))]
        self.weights, self.lengths = weights, lengths
        self.is_scheduled = weights is not None or lengths is not None
        if lengths is not None:
            self.ends = [*itertools.accumulate(lengths), math.inf]
        if any(hasattr(source, "blocks") for source in sources):
            parts = zip(self.starts, sources, strict=False)
            blocks = (start + i for start, s in parts for i in getattr(s, "blocks", range(len(s) + 1))[:-1])
            self.blocks = array("q", [*blocks, len(self)])
        if weights is not None:
            self.counts = self._count_slots(weights)
            # The j-th place of a source with n places is wanted in the middle of the j-th of n equal parts.
            wanted = [((j + 0.5) / n, k, j) for k, n in enumerate(self.counts) for j in range(n)]
            # of each place: source, how many places before it in the schedule are of this source
            self.schedule = [(k, j) for _middle, k, j in sorted(wanted)]

    def _count_slots(self, weights):
        """Round the shares to whole places that sum to num_slots, by the largest remainders."""
        for source, weight in zip(self.sources, weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"the weight of {source.name} is {weight}; it must be positive")
        shares = [weight / sum(weights) * self.num_slots for weight in weights]
        counts = [math.floor(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k])
        for k in by_remainder[: self.num_slots - sum(counts)]:
            counts[k] += 1
        for source, weight, count in zip(self.sources, weights, counts, strict=True):
            if count == 0:
                raise ValueError(f"the weight of {source.name} is {weight}, too little of {sum(weights)}: "
                                 f"it must be at least 1/{self.num_slots} of the sum")  # fmt: skip
        return counts

    def __len__(self):
        return self.starts[-1]

    def locate(self, position: int, rank: int = 0, num_ranks: int = 1) -> tuple[int, int]:
        """Return which source a rank's position-th sample is of, and how many of it all ranks read before this one.

        By weights each rank has the schedule to itself, so that all see the same shares; lessons end for all at once.
        """
        if self.lengths is not None:
            place = position * num_ranks + rank
            number = bisect.bisect_right(self.ends, place)
            return number, place - (self.ends[number - 1] if number else 0)
        cycle, slot = divmod(position, self.num_slots)
        number, before = self.schedule[slot]
        return number, (cycle * self.counts[number] + before) * num_ranks + rank

    def raw(self, index: int) -> dict:
        """Return a record by its index when the sources stand one after the other."""
        _check_index(self, index)
        source, place = self.find(index)
        return source.raw(place)

    def find(self, index: int) -> tuple:
        """Return the source in which an index of the whole falls, and the index there."""
        number = bisect.bisect_right(self.starts, index) - 1
        return self.sources[number], index - self.starts[number]


# --- streams -------------------------------------------------------------------------------------------------


class Hub:
    """A dataset of the hub, read as a stream: `hub:owner/name` or `hub:owner/name:config`.

    Each epoch reads the files in another order, or with `shuffle` False in their own. Read it in one process: inside
    a torch DataLoader, `datasets` would deal the files out to the workers.
    """

    def __init__(self, spec: str, split: str = "train", seed: int = 0, shuffle: bool = True, **options):
        """Open the dataset; `options` go to `datasets.load_dataset`."""
        try:
            import datasets
        except ImportError:
            raise ValueError(f"{spec} needs the package datasets: pip install datasets") from None
        self.name, self.seed, self.shuffle, self.damaged = spec, seed, shuffle, []
        dataset, _, config = spec.removeprefix("hub:").partition(":")
        if not dataset:
            raise ValueError(f"{spec!r} names no dataset; write hub:owner/name or hub:owner/name:config")
        try:
            self.dataset = datasets.load_dataset(dataset, config or None, split=split, streaming=True, **options)
        except Exception as error:  # the network, the hub and every builder have errors of their own
            raise ValueError(f"{spec}, split {split!r}, cannot be opened: {error}") from error
        if self.dataset.features is not None:
            self.dataset = self.dataset.decode(False)  # images as the bytes of their files

    def stream(self, start: int, epoch: int) -> Iterator[dict]:
        """Yield the records of a pass from the start-th on. An image that cannot be read is left for `to_sample`."""
        dataset = self.dataset
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch])
            # A buffer of one leaves the records of a file in their order, which is cheap to come back to.
            dataset = dataset.shuffle(generator=order, buffer_size=1, max_buffer_input_shards=1)
        for record in dataset.skip(start):
            yield _fetch_images(record, _read_remote)


def _read_remote(name: str) -> bytes | str:
    import fsspec  # comes with datasets

    try:
        with fsspec.open(name, "rb") as file:
            return file.read()
    except (OSError, ValueError, ImportError):
        return name


# --- records of files ----------------------------------------------------------------------------------------


def _read_json(data: bytes, where: str) -> dict:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be a JSON object with texts or messages, not {_kind(record)}")
    return record


def _read_record(json_data: bytes | None, caption: bytes | None, where: str, has_image: bool) -> dict:
    """Make a record of a .json file that has one, else of a caption (then the .json has other things)."""
    record = {} if json_data is None else _read_json(json_data, f"the .json of {where}")
    if "texts" in record or "messages" in record:
        return record
    if caption is None:
        raise ValueError(f"{where} needs a .json with texts or messages, or a .txt with a caption")
    if not has_image:
        raise ValueError(f"{where} has a caption and no image")
    try:
        return {"texts": [{"user": CAPTION_QUESTION, "assistant": caption.decode("utf-8-sig").strip()}]}
    except UnicodeDecodeError as error:
        raise ValueError(f"the .txt of {where} is not UTF-8 text: {error}") from error


def _fetch_images(record: dict, read: Callable[[str], bytes]) -> dict:
    """Put file contents, which `read` returns, in place of file names in `images`, `image` and image parts."""

    def fetch(image):
        if isinstance(image, dict):
            image = image.get("path") if image.get("bytes") is None else image["bytes"]
        return read(image) if isinstance(image, str) else image

    record = dict(record)
    image = record.pop("image", None)
    images = record.get("images")
    if images is None or (_is_empty(images) and not _is_empty(image)):
        images = image
    if images is not None:
        record["images"] = [fetch(image) for image in (images if isinstance(images, list) else [images])]
    if isinstance(record.get("messages"), list):
        record["messages"] = [_fetch_parts(message, fetch) for message in record["messages"]]
    return record


def _fetch_parts(message, fetch):
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    content = []
    for part in message["content"]:
        if isinstance(part, dict) and part.get("type") == "image":
            carried = part if part.get("image") is None else part["image"]
            part = {"type": "image", "image": fetch(carried)}
        content.append(part)
    return {**message, "content": content}


def _read_file(path: Path, where: str) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} names a file that cannot be read: {error}") from error


def _find_files(paths: str | Path | Iterable[str | Path], suffix: str) -> list[Path]:
    """The files that paths, globs and folders stand for, in the order of their names."""
    files = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        if os.path.isdir(path):
            found = sorted(Path(path).rglob(f"*{suffix}"))
        else:
            found = [Path(path)] if os.path.isfile(path) else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not found:
            raise ValueError(f"there is no {suffix} file {path}")
        files += found
    if not files:
        raise ValueError(f"no {suffix} files were given")
    return files


def _join_names(files: list[Path]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _check_index(source, index: int):
    if not 0 <= index < len(source):
        raise IndexError(f"{source.name} has {len(source)} records, there is no record {index}")


def _import_parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("parquet files need the package pyarrow: pip install pyarrow") from None
    return pyarrow.parquet


# --- by name -------------------------------------------------------------------------------------------------

FILES = {".jsonl": JsonLines, ".json": JsonLines, ".parquet": Parquet, ".tar": Tar}


def open_source(spec: str, split: str = "train", seed: int = 0, shuffle: bool = True):
    """Open the source that a name, a path or a glob stands for.

    `split` is of the drawn scenes and of the hub, `seed` and `shuffle` are of the hub.
    """
    if spec == "scenes" or spec.startswith("scenes:"):
        return Scenes(split, kinds=tuple(spec.partition(":")[2].split(",")) if ":" in spec else ())
    if spec.startswith("hub:"):
        return Hub(spec, split, seed, shuffle)
    path, is_file = Path(spec), os.path.isfile(spec)
    if path.is_dir():
        for suffix in (".parquet", ".tar"):
            if not (path / "metadata.jsonl").is_file() and next(path.rglob(f"*{suffix}"), None):
                return FILES[suffix](path)
        return Folder(path)
    if path.suffix in FILES and (is_file or glob.glob(spec, recursive=True)):
        return FILES[path.suffix](spec)
    problem = "is of no kind that is understood" if is_file else "does not exist"
    raise ValueError(
        f"the source {spec!r} {problem}: give scenes, scenes:KIND,KIND, a file .jsonl, a file or glob .parquet or "
        ".tar, a folder of these or of images with .txt or .json beside them, or hub:owner/name"
    )


def open_sources(
    specs: Sequence[str],
    weights: Sequence[float] = (),
    lessons: Sequence[int] = (),
    split: str = "train",
    seed: int = 0,
    shuffle: bool = True,
):
    """Open one source, or several as a mixture, as DataConfig says."""
    sources = [open_source(spec, split, seed, shuffle) for spec in specs]
    if len(sources) == 1 and not weights:
        return sources[0]
    for source in sources:
        if hasattr(source, "stream"):
            raise ValueError(f"{source.name} is a stream of unknown size and cannot be mixed with other sources")
    return Mixture(sources, list(weights) or None, list(lessons) or None)


def sample_texts(source, num_samples: int) -> Iterator[str]:
    """Yield the texts of samples from the whole source (the first of a stream), to make a tokenizer from."""
    if hasattr(source, "stream"):
        records = itertools.islice(source.stream(0, 0), num_samples)
    else:
        records = map(source.raw, range(0, len(source), -(-len(source) // num_samples)))
    while True:
        try:
            sample = to_sample(next(records))
        except StopIteration:
            return
        except (ValueError, OSError):
            continue  # the loader counts and names it
        for message in sample.messages:
            yield from (part["text"] for part in _parts(message["content"]) if part["type"] == "text")
