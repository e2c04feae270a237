"""A stage that leaves out what evaluation asks about: a model that has seen a question is not tested by it.

A picture is found by its pixels and by its perceptual hash, so also where it was resized or saved anew; a record
without pictures by its text.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

from tqdm import tqdm

from nanovlm.data.build import hashes
from nanovlm.data.build.items import Drop, Item, Judge, each, read_item
from nanovlm.data.build.reading import ReadConfig
from nanovlm.data.reader import explain
from nanovlm.data.source import first_pass
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class LeakageOptions(ReadConfig):
    # What evaluation asks about, as data.sources of train.py; no record may show a picture of them.
    sources: tuple[str, ...] = ()
    # The split of drawn scenes, hub and saved data sets.
    split: str = "test"
    # Largest number of 256 bits in which the perceptual hashes of a picture and of one of evaluation differ.
    most_bits: int = 31

    def __post_init__(self):
        if not self.sources:
            raise UserError("stages.leakage.sources is empty: name what evaluation asks about, or leave leakage out")
        self.check_reading("stages.leakage.")


class Asked:
    """The pictures and texts of evaluation sets."""

    def __init__(self, most_bits: int):
        self.index, self.pixels, self.texts = hashes.HashIndex(most_bits), set(), set()

    def add(self, item: Item):
        """Remember a record: its pictures, or its text if it has none."""
        for picture in item.pictures:
            self.pixels.add(hashes.digest_pixels(picture))
            if found := hashes.hash_picture(picture):
                self.index.add(hashes.parse_hashes([found]))
        if not item.pictures:
            self.texts.add(digest_words(item))

    def find(self, item: Item) -> str | None:
        """Say what of a record is asked about."""
        for picture in item.pictures:
            if hashes.digest_pixels(picture) in self.pixels:
                return "shows a picture of evaluation"
            if found := hashes.hash_picture(picture):
                query = hashes.parse_hashes([found])
                if len(rows := self.index.find(query)[1]):
                    bits = int(hashes.distances(query, self.index.hashes[rows]).min())
                    return f"shows a picture like one of evaluation ({bits} bits differ)"
        return "has a text of evaluation" if not item.pictures and digest_words(item) in self.texts else None


def digest_words(item: Item) -> str:
    """Return the digest of all that is said in a record."""
    return hashes.digest_text("\n".join(item.texts("system", "user", "assistant", "text")))


def read_asked(options: LeakageOptions) -> Iterator[tuple[str, Item]]:
    """Yield what evaluation asks about, and where it is. Raises UserError for a record that cannot be read."""
    for spec in options.sources:
        source = open_source(spec, options.split, allow_urls=options.allow_urls)
        for ref in tqdm(first_pass(source), desc=f"reading {spec}", unit="record", delay=2):
            item, where = read_item(source.read, ref, options.options), f"{spec}, {ref.where}"
            if isinstance(item, Drop):
                raise UserError(f"stages.leakage.sources: {where}: {item.reason}")
            yield where, item


def open_leakage(options: LeakageOptions) -> Judge:
    """Raise UserError for a record of evaluation that cannot be read, as it could not be found."""
    asked = Asked(options.most_bits)
    for where, item in read_asked(options):
        try:
            asked.add(item)
        except Exception as error:  # whatever a record does, it is named
            raise UserError(f"stages.leakage.sources: {where}: {explain(error)}") from error
    return each(asked.find)


def digest_asked(options: LeakageOptions) -> str:
    """Return a digest of all that evaluation asks about."""
    digest = hashlib.sha256()
    for _where, item in read_asked(options):
        digest.update(item.content.encode())
    return digest.hexdigest()
