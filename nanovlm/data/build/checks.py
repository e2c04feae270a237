"""Stages that look at one record: its ratings, its text, a list of what is not wanted, its pictures."""

import dataclasses
import hashlib
import re
from pathlib import Path

from nanovlm.data.build import hashes, texts
from nanovlm.data.build.items import Item, Judge, at_least, each
from nanovlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class RatingsOptions:
    # Lowest accepted ratings of a turn: relevance, visual dependency, image correspondence, formatting. Turns below are
    # left out, and a record that has no other.
    least: tuple[int, int, int, int] = (1, 1, 1, 1)


def open_ratings(_options: RatingsOptions) -> Judge:
    """Count the turns that were left out when the record was read (Recipe.options)."""

    def count(item: Item) -> str | None:
        turns = item.raw.get("texts")
        if isinstance(turns, list) and (left_out := len(turns) - len(item.answers)):
            item.scores["turns_left_out"] = left_out
        return None

    return each(count)


@dataclasses.dataclass(frozen=True)
class TextOptions:
    # Least and most characters of all answers together; 0 for no limit.
    min_characters: int = 1
    max_characters: int = 0
    # Languages that answers may be in (keys of LANGUAGES), empty for any; a text too short to tell passes.
    languages: tuple[str, ...] = ()
    # Largest share of sequences of three words that were there before, and the longest run of one character.
    max_repetition: float = 0.5
    max_run: int = 40
    # Phrases that no answer may have, in any case.
    boilerplate: tuple[str, ...] = texts.BOILERPLATE
    # Which signs leave a record out: html, injection (an order to a model), control (spelt like a special token). They
    # are counted in any case, in questions, too.
    refuse: tuple[str, ...] = ()

    def __post_init__(self):
        at_least("text.min_characters", self.min_characters, 0)
        at_least("text.max_run", self.max_run, 1)
        for name, values, known in (
            ("languages", self.languages, texts.LANGUAGES),
            ("refuse", self.refuse, tuple(texts.SIGNS)),
        ):
            if unknown := [value for value in values if value not in known]:
                raise UserError(f"stages.text.{name}: {unknown[0]!r} is unknown; there are {', '.join(known)}")


def open_text(options: TextOptions) -> Judge:
    return each(lambda item: check_text(item, options))


def check_text(item: Item, options: TextOptions) -> str | None:
    answer = "\n".join(item.answers)
    signs = texts.count_signs("\n".join([*item.texts("system", "user"), answer]))
    item.scores |= signs
    item.scores |= {"characters": len(answer), "language": texts.find_language(answer)}
    item.scores["repetition"] = round(texts.repetition(answer), 4)
    if len(answer) < options.min_characters:
        return f"{len(answer)} characters, fewer than {options.min_characters}"
    if 0 < options.max_characters < len(answer):
        return f"{len(answer)} characters, more than {options.max_characters}"
    if options.languages and item.scores["language"] not in ("", *options.languages):
        return f"in the language {item.scores['language']}"
    if item.scores["repetition"] > options.max_repetition:
        return f"{100 * item.scores['repetition']:.0f} % of it was said before"
    if (run := texts.longest_run(answer)) > options.max_run:
        return f"one character {run} times in a row"
    lower = answer.lower()
    if found := next((phrase for phrase in options.boilerplate if phrase.lower() in lower), None):
        return f"has {found!r}"
    if found := [name for name in options.refuse if name in signs]:
        return f"has {', '.join(found)}"
    return None


@dataclasses.dataclass(frozen=True)
class SafetyOptions:
    # Files with a line for each picture that is not wanted: sha256:HEX of its file, pixels:HEX of its decoded pixels,
    # or hash:HEX, the perceptual hash of pictures like it (hashes.py); what follows a # is not read.
    pictures: tuple[str, ...] = ()
    # Files with a line for each word or phrase that is not wanted, in questions and answers.
    words: tuple[str, ...] = ()
    # Largest number of 256 bits in which the perceptual hash of a picture like a listed one differs.
    most_bits: int = 31


DIGITS = {"sha256": 64, "pixels": 32, "hash": 64}


def open_safety(options: SafetyOptions) -> Judge:
    listed = {kind: set() for kind in DIGITS}
    for line in read_lines(options.pictures):
        kind, _, value = line.lower().partition(":")
        if not re.fullmatch(f"[0-9a-f]{{{DIGITS.get(kind, 0)}}}", value):
            raise UserError(f"stages.safety.pictures has the line {line[:80]!r}; it must be sha256:, pixels: or hash: "
                            "and hexadecimal digits, 64, 32 or 64 of them")  # fmt: skip
        listed[kind].add(value)
    index = hashes.HashIndex(options.most_bits)
    index.add(hashes.parse_hashes(sorted(listed["hash"])))
    phrases = "|".join(re.escape(" ".join(line.split())) for line in read_lines(options.words))
    words = re.compile(rf"(?<!\w)(?:{phrases})(?!\w)", re.IGNORECASE) if phrases else None

    def is_listed(item: Item) -> str | None:
        said = " ".join(" ".join(item.texts("system", "user", "assistant", "text")).split())
        if words and words.search(said):
            return "has a listed word"
        for image in item.images:
            if isinstance(image, bytes) and hashlib.sha256(image).hexdigest() in listed["sha256"]:
                return "shows a listed picture (its file)"
        for picture in item.pictures if listed["pixels"] or len(index) else ():
            if hashes.digest_pixels(picture) in listed["pixels"]:
                return "shows a listed picture (its pixels)"
            found = hashes.hash_picture(picture)
            if found and len(index.find(hashes.parse_hashes([found]))[0]):
                return "shows a picture like a listed one"
        return None

    return each(is_listed)


def digest_lists(options: SafetyOptions) -> str:
    """Return a digest of what is listed."""
    return hashlib.sha256(repr([read_lines(options.pictures), read_lines(options.words)]).encode()).hexdigest()


def read_lines(files: tuple[str, ...]) -> list[str]:
    """Return the lines of files that say something."""
    lines = []
    for file in files:
        try:
            found = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        lines += [text for line in found if (text := line.partition("#")[0].strip())]
    return lines


@dataclasses.dataclass(frozen=True)
class CorruptOptions:
    pass


def open_corrupt(_options: CorruptOptions) -> Judge:
    """Decode the pictures with what training decodes them with."""

    def decode(item: Item) -> str | None:
        item.scores["pictures"] = len(item.pictures)
        return None

    return each(decode)


@dataclasses.dataclass(frozen=True)
class SizeOptions:
    # Least and most pixels of the shorter side of every picture; 0 for no limit.
    min_side: int = 32
    max_side: int = 0
    # Largest ratio of the longer to the shorter side.
    max_aspect: float = 8.0

    def __post_init__(self):
        at_least("size.min_side", self.min_side, 0)
        at_least("size.max_aspect", self.max_aspect, 1)


def open_size(options: SizeOptions) -> Judge:
    return each(lambda item: check_size(item, options))


def check_size(item: Item, options: SizeOptions) -> str | None:
    sizes = [picture.size for picture in item.pictures]
    if not sizes:
        return None
    item.scores["size"] = [min(map(min, sizes)), max(map(max, sizes))]
    for width, height in sizes:
        short, long = sorted((width, height))
        if short < options.min_side:
            return f"{width} x {height} pixels, a side below {options.min_side}"
        if 0 < options.max_side < short:
            return f"{width} x {height} pixels, both sides above {options.max_side}"
        if long > options.max_aspect * short:
            return f"{width} x {height} pixels, an aspect of {long / short:.1f}, above {options.max_aspect:g}"
    return None
