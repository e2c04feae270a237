"""Which records are held out of training: a hash of their pictures decides, or of their text where there are none.

A picture is held out, by its bytes alone (one that comes decoded: by its pixels), with probability `data.val_fraction`,
and a record is held out if one of its pictures is. So no training record shows a held-out picture, whatever is asked
about it and in whatever place. A held-out record has at least one such picture; where it has several, others of them
may be trained on elsewhere, and n of them hold it out with probability 1 - (1 - val_fraction) ** n. Where a pair of
answers has no pictures, its prompt alone decides, as there may be several pairs of one prompt.
"""

import hashlib
import itertools
import json
from collections.abc import Sized

from nanovlm.data.mixture import parts_of
from nanovlm.data.records import check, content_parts, is_pair
from nanovlm.data.source import Source
from nanovlm.data.sources import sample_records

SURVEYED = 1000  # records of a source that are hashed to say how its pictures fall


def is_validation(raw: dict, fraction: float, options: dict | None = None) -> bool:
    """Decide by a record's contents alone; one that cannot be understood is not held out, so it is counted once.

    `options` are those of `records.check`.
    """
    pictures, texts = digests(raw, options)
    return any(is_below(digest, fraction) for digest in pictures or texts)


def digests(raw: dict, options: dict | None = None) -> tuple[list[bytes], list[bytes]]:
    """Hash each picture of a record, and its text; return nothing for what is no record."""
    all_turns = {name: value for name, value in (options or {}).items() if name != "min_ratings"}
    try:
        images, messages, _independent = check(raw, **all_turns)
        messages = messages[:-1] if is_pair(raw, **all_turns) else messages
        said = [(m["role"], "".join(part.get("text", "") for part in content_parts(m["content"]))) for m in messages]
        pictures = [_hash(image if isinstance(image, bytes) else image.tobytes()) for image in images]
        return pictures, [_hash(json.dumps(said).encode())]
    except Exception:  # whatever a record does: where it is read to be trained on, it is named
        return [], []


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def is_below(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest) < fraction * 2**64


def describe_split(source: Source, fraction: float, options: dict | None = None) -> list[str]:
    """Say, for each part of a source, how many of about SURVEYED records, and of their pictures, are held out."""
    return [_describe_part(part, fraction, options) for part in parts_of(source)]


def _describe_part(source: Source, fraction: float, options: dict | None) -> str:
    num, shown = {False: 0, True: 0}, {False: set(), True: set()}
    for raw in itertools.islice(sample_records(source, SURVEYED), SURVEYED):
        pictures, texts = digests(raw, options)
        is_held_out = any(is_below(digest, fraction) for digest in pictures or texts)
        num[is_held_out] += 1
        shown[is_held_out].update(pictures)
    read, sides = sum(num.values()), []
    for side in (True, False):
        has_pictures = f" with {len(shown[side])} pictures" if shown[True] or shown[False] else ""
        sides.append(f"{num[side]}{has_pictures} are {'held out' if side else 'trained on'}")
    of_all = f" of {len(source)}" if isinstance(source, Sized) and read < len(source) else ""
    both = len(shown[True] & shown[False])
    note = f"; {both} of the pictures are on both sides, beside others of a record" if both else ""
    return f"{source.name}, {read}{of_all} records: {', '.join(sides)}{note}"
