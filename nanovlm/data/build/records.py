"""Records of a source -> a file of records, so that a kill at any moment loses little.

```
.OUT.jsonl.part/   records.jsonl, in the order of the source, and settings.json, what they are made with
OUT.jsonl          once all are written
```

Records are made in chunks of CHUNK that depend on nothing else, so a chunk is the same however often it is begun.
"""

import base64
import dataclasses
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import nn
from tqdm import tqdm

from nanovlm.data.build.reading import ReadConfig
from nanovlm.data.build.settings import digest_weights, keep_settings
from nanovlm.data.pictures import BASE64, FORMATS, Video
from nanovlm.data.reader import RECORD_SECONDS, explain
from nanovlm.data.records import check, to_sample
from nanovlm.data.source import Source, first_pass
from nanovlm.data.types import Filtered, Sample
from nanovlm.errors import UserError, printable
from nanovlm.files import flush, lock
from nanovlm.limits import time_limit

NAME = "records.jsonl"
CHUNK = 64  # records that are made at a time
JUDGED_AFTER = 100  # records to read before the share of unusable ones is checked
NAMED = 5  # records that were left out to name


class Found(NamedTuple):
    """A record of a source: its number, what it holds, its pictures as encoded files or PIL images, and all of it."""

    number: int
    sample: Sample
    images: list
    raw: dict


class Unusable(Exception):
    """Raised for a record that is left out; the message says why."""


@dataclasses.dataclass(frozen=True)
class BuildConfig(ReadConfig):
    # A model: a folder, a repository of the hub, a .gguf file or smollm2.
    model: str
    # What data.sources of train.py takes: scenes, a file, a folder, hub:owner/name.
    source: str
    # The file to write, .jsonl.
    out: Path
    # How many records to read, from the first on; 0 for all.
    num: int = 0
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "auto"
    # Largest share of the records that may be unusable.
    max_bad_fraction: float = 0.05

    def validate(self):
        """Raise UserError with the value of the first contradiction."""
        if self.out.suffix != ".jsonl":
            raise UserError(f"{self.out} must end in .jsonl: a line is a record")
        if self.num < 0:
            raise UserError(f"--num {self.num} must be at least 0")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"--max-bad-fraction {self.max_bad_fraction} must be between 0 and 1")
        self.check_reading()


def write_records(
    config: BuildConfig, source: Source, model: nn.Module, make: Callable[[list[Found]], Iterable[dict | Unusable]]
):
    """Write what `make`, which asks the model, makes of each record to config.out, with a progress bar.

    Raises UserError if the file is there, was begun with another config or model, or too many records are unusable.
    """
    with lock(config.out.absolute().with_name(f".{config.out.name}.part")) as folder:
        if config.out.exists():
            raise UserError(f"{config.out} is there already: name another file, or remove it")
        settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
        settings["weights"] = digest_weights(model)  # the model may be another of the same name
        del settings["max_bad_fraction"]  # which changes no record: a run that it ended goes on with a larger one
        part, (num_read, num_kept), named = folder / NAME, take_up(folder, settings), 0
        total = min(len(source), config.num or len(source)) if isinstance(source, Sized) else config.num or None
        refs = itertools.islice(first_pass(source), num_read, config.num or None)

        def judge():
            num_lost = num_read - num_kept
            if num_lost > config.max_bad_fraction * num_read:
                raise UserError(
                    f"{num_lost} of {num_read} records are unusable, more than --max-bad-fraction "
                    f"{config.max_bad_fraction} allows; the others are in {part}"
                )

        with open(part, "a", encoding="utf-8") as lines, tqdm(total=total, initial=num_read, unit="record") as progress:
            for chunk in iter(lambda: list(itertools.islice(refs, CHUNK)), []):
                results = [read(source, ref, config.options) for ref in chunk]
                made = iter(make([found for found in results if isinstance(found, Found)]))
                for ref, found in zip(chunk, results, strict=True):
                    result = next(made) if isinstance(found, Found) else found
                    if isinstance(result, Unusable):
                        if (named := named + 1) <= NAMED:
                            tqdm.write(printable(f"left out: {ref.source}, {ref.where}: {result}"))
                    else:
                        lines.write(json.dumps({**result, "record": ref.number}) + "\n")
                        num_kept += 1
                lines.flush()
                num_read += len(chunk)
                progress.update(len(chunk))
                if num_read >= JUDGED_AFTER:
                    judge()
        judge()
        flush(part)
        part.rename(config.out)
        flush(folder.parent)
        shutil.rmtree(folder)
        print(f"wrote {config.out}: {num_kept} of {num_read} records")


def take_up(folder: Path, settings: dict) -> tuple[int, int]:
    """Return how many records an earlier attempt read, and how many of them it wrote.

    Its last chunk, which may not be whole, is cut off.
    """
    part = folder / NAME
    part.touch()
    keep_settings(folder / "settings.json", settings, "other settings", has_written=part.stat().st_size > 0)
    with open(part, "rb") as lines:
        written = [(json.loads(line)["record"], len(line)) for line in lines if line.endswith(b"\n")]
    num_read = written[-1][0] // CHUNK * CHUNK if written else 0
    kept = [length for number, length in written if number < num_read]
    os.truncate(part, sum(kept))
    return num_read, len(kept)


def read(source: Source, ref, options: dict) -> Found | Unusable:
    """Read a record."""
    try:
        with time_limit(RECORD_SECONDS, "the record"):
            raw = source.read(ref.key)
            images = check(raw, **options)[0]
            if any(isinstance(image, Video) for image in images):
                raise UserError("the record has a video, which JSON lines do not hold")
            return Found(ref.number, to_sample(raw, **options), images, raw)
    except Filtered as error:
        return Unusable(str(error))
    except Exception as error:  # whatever a record does, it is counted and named
        return Unusable(explain(error))


def as_record(found: Found, messages: list[dict]) -> dict:
    """Return a record with the pictures in it, in base64: their files as they are, where JSON records may have them."""
    record: dict = {"images": [encode(image) for image in found.images], "messages": messages}
    return record | ({"independent": True} if found.sample.independent else {})


def encode(image: bytes | Image.Image | Video) -> str:
    """Return a picture as base64; what is no PNG, JPEG, GIF or WebP becomes a PNG."""
    if isinstance(image, bytes) and (text := base64.b64encode(image).decode()).startswith(BASE64):
        return text
    if isinstance(image, Video):
        raise UserError("the record has a video, which JSON lines do not hold")
    file = io.BytesIO()
    # Without FORMATS the bytes of a stranger could name any format, as EPS, for which Pillow runs Ghostscript.
    (Image.open(io.BytesIO(image), formats=FORMATS) if isinstance(image, bytes) else image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
