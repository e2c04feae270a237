"""Raw record -> Item: a record on its way through the funnel, and what a stage is.

A stage judges records in small batches, in the order of the source, and says of each why it is left out, or nothing.
It leaves `scores` behind, which go with the record to the end as its provenance. A stage that compares records leaves
a `mark` in each, JSON that stands for the record; once the marks of a chunk are there, `compare` reads them in order.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from nanovlm.data.members import SHOWN, encode, is_json
from nanovlm.data.pictures import Video
from nanovlm.data.reader import RECORD_SECONDS, explain
from nanovlm.data.records import check, content_parts, to_sample
from nanovlm.data.source import Ref
from nanovlm.data.types import Filtered
from nanovlm.errors import UserError, printable
from nanovlm.limits import time_limit


class Drop(NamedTuple):
    """Why a record is left out."""

    reason: str
    # The number of the record that is kept in its place, -1 if there is none.
    like: int = -1
    # The stage, where it is not the one that says so.
    stage: str = ""


@dataclass
class Item:
    """A record: where it is from, what it holds, and what the stages found."""

    number: int
    source: str
    where: str
    raw: dict
    # Of records.check.
    options: dict
    # The pictures as encoded files or PIL images, or the videos, and the messages.
    images: list
    messages: list[dict]
    independent: bool
    scores: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, Any] = field(default_factory=dict)
    # Vectors of the first picture, by the name of the model.
    vectors: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def pictures(self) -> list[Image.Image]:
        """The pictures, RGB, decoded as training does; of videos frames."""
        return to_sample(self.raw, **self.options).images

    def texts(self, *roles: str) -> list[str]:
        """Return the texts of the messages of these roles."""
        return [text_of(message).strip() for message in self.messages if message["role"] in roles]

    @functools.cached_property
    def answers(self) -> list[str]:
        """What is trained: answers, or the text of a record that is no conversation."""
        return self.texts("assistant", "text")

    @functools.cached_property
    def content(self) -> str:
        """A digest of the encoded pictures and all else of the record that JSON holds, by which it is known again."""
        rest = {name: value for name, value in self.raw.items() if name not in SHOWN and is_json(value)}
        digest = hashlib.blake2b(json.dumps([self.messages, rest]).encode(), digest_size=8)
        for image in self.images:
            data = image if isinstance(image, bytes) else image.tobytes()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        """About how large the record is in a shard."""
        files = [image.source if isinstance(image, Video) else image for image in self.images]
        sizes = [len(x) if isinstance(x, bytes) else x.width * x.height * 3 for x in files]
        return sum(sizes) + len(json.dumps(self.messages))


def text_of(message: dict, shown: str = "") -> str:
    """Return the text of a message, with `shown` in the places of its pictures."""
    return "".join(part.get("text", shown) for part in content_parts(message["content"]))


Judge = Callable[[Sequence[Item]], list[Drop | None]]


class Compare(NamedTuple):
    """Compares records with those before them; `add` takes what it kept in an earlier attempt. Marks come in order."""

    judge: Callable[[list[int], list], list[Drop | None]]
    add: Callable[[list[int], list], None]


class Stage(NamedTuple):
    """A stage: the class of its options, what judges or marks a record, and what compares the marks.

    `open` takes the options and returns a Judge; `compare` takes them and the folder of the run's temporary files. A
    costly stage begins when all before it have judged and compared. With `shows_words` the report shows what is said in
    the records that it drops, beside their pictures. `digest` tells the model or the files that the options name from
    others of the same name, so that a run does not go on with these.
    """

    options: type
    open: Callable[[Any], Judge]
    compare: Callable[[Any, Path], Compare] | None = None
    is_costly: bool = False
    shows_words: bool = False
    digest: Callable[[Any], str] | None = None


def read_item(read: Callable[[Any], dict], ref: Ref, options: dict) -> Item | Drop:
    """Read the record of a ref's key; one that cannot be read is dropped."""
    try:
        with time_limit(RECORD_SECONDS, "the record"):
            raw = read(ref.key)
            images, messages, independent = check(raw, **options)
            for video in (image for image in images if isinstance(image, Video)):
                encode(video)  # which refuses what shards cannot hold
            return Item(ref.number, ref.source, ref.where, raw, options, images, messages, independent)
    except Filtered as error:
        return Drop(str(error), stage="ratings")
    except Exception as error:  # whatever a record does, it is counted and named
        return Drop(printable(explain(error)), stage="corrupt")


def each(find: Callable[[Item], str | None]) -> Judge:
    """Make a judge of a function that says why one record is left out. One that fails is left out for that."""

    def judge(items: Sequence[Item]) -> list[Drop | None]:
        drops = []
        for item in items:
            try:
                with time_limit(RECORD_SECONDS, "the record"):
                    reason, stage = find(item), ""
            except Exception as error:  # whatever a record does, it is counted and named
                reason, stage = explain(error), "corrupt"
            drops.append(Drop(printable(reason), stage=stage) if reason else None)
        return drops

    return judge


def at_least(name: str, value: float, least: float):
    """Raise UserError if an option is too small or no number."""
    if not value >= least:
        raise UserError(f"stages.{name} = {value} must be at least {least}")
