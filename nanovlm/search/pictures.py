"""A folder of pictures -> an index, and a text or a picture -> the pictures that are most like it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from nanovlm.data.images import decode_image
from nanovlm.data.source_files import IMAGE_SUFFIXES
from nanovlm.environment import find_device
from nanovlm.errors import UserError
from nanovlm.search.embed import Content, Embedder, open_embedder
from nanovlm.search.index import DTYPES, Index
from nanovlm.search.update import Item, Work, update
from nanovlm.search.vectors import search


@dataclass(frozen=True)
class PicturesConfig:
    # A folder of pictures; those in its folders count too.
    folder: Path
    # The folder of the index; an index that is there is brought up to date.
    out: Path
    # A dual model, whose embeddings of pictures and texts share a space: a folder, or owner/name on the hub.
    model: str = ""
    # What numbers are stored as; fp16 takes half the room and time.
    dtype: Literal["fp16", "fp32"] = "fp16"
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "auto"

    def validate(self) -> "PicturesConfig":
        """Return self, or raise UserError that names a value and what would be right."""
        if not self.model:
            raise UserError("pictures are indexed by a dual model: name one by --model")
        return self


class Match(NamedTuple):
    """A picture that was found: its name below the folder of the index, and its cosine with the query."""

    file: str
    score: float


def main(config: PicturesConfig):
    """Index the pictures of a folder, or bring their index up to date."""
    config.validate()
    update(config.folder, config.out, picture_work(config, open_embedder(config.model, find_device(config.device))))


def picture_work(config: PicturesConfig, embedder: Embedder) -> Work:
    if not embedder.sees:
        raise UserError(f"{config.model} is a language model, which sees no pictures: give --model one that does")

    def read(data: bytes, name: str) -> list[Item]:
        image = decode_image(data, name)
        return [Item({"width": image.width, "height": image.height}, embedder.prepare(image))]

    about = {"kind": "pictures", "folder": str(config.folder.absolute()), "dtype": DTYPES[config.dtype]}
    return Work(about | embedder.about, IMAGE_SUFFIXES, read, embedder.embed, part=embedder.part)


def find_pictures(index: Index, embedder: Embedder, query: Content, k: int) -> list[Match]:
    """Return the k pictures whose vectors have the largest inner products with that of the query, the best first."""
    assert index.vectors is not None  # an index of pictures has a model
    scores, rows = search(index.vectors, embedder.query(query), k)
    return [
        Match(index.read(row)[0].name, score) for score, row in zip(scores[0].tolist(), rows[0].tolist(), strict=True)
    ]
