"""A folder of documents -> an index of passages, and a question -> the passages that may answer it.

A passage is found by its words, by its vector, or by both, whose rankings are then fused (rank.py). Pictures are
passages too where the model sees.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image

from nanovlm.data.chat import Processor
from nanovlm.data.images import decode_image
from nanovlm.data.source_files import IMAGE_SUFFIXES
from nanovlm.data.source_names import read_file
from nanovlm.environment import find_device
from nanovlm.errors import UserError, printable
from nanovlm.model.vlm import VLM
from nanovlm.search.chunks import split, words
from nanovlm.search.embed import INSTRUCTION, Embedder, embedder_of, open_embedder
from nanovlm.search.extra import needed
from nanovlm.search.index import DTYPES, Index, open_index
from nanovlm.search.rank import Words, fuse, write_words
from nanovlm.search.read import READERS
from nanovlm.search.read import read as read_document
from nanovlm.search.update import Item, Work, update
from nanovlm.search.vectors import search

CANDIDATES = 100  # passages of each ranking that are fused
PICTURE = {"section": "", "start": 0, "end": 0, "text": ""}  # what stands for the text of a picture


@dataclass(frozen=True)
class DocumentsConfig:
    # A folder of .txt, .md, .html and .pdf files, and of pictures if the model sees.
    folder: Path
    # The folder of the index; an index that is there is brought up to date.
    out: Path
    # What makes vectors of passages: any decoder or dual model. Empty: passages are found by their words alone.
    model: str = ""
    # What stands for a passage in a decoder: its last token, or the mean of all.
    pooling: Literal["last", "mean"] = "last"
    # What a decoder is told before a question, as Qwen3-Embedding has it; empty for nothing.
    instruction: str = INSTRUCTION
    # Cut documents at their sections, or into windows of equally many tokens.
    chunk: Literal["section", "tokens"] = "section"
    # Most tokens of a passage: the model's, or words where there is none. A longer section is cut into windows.
    chunk_tokens: int = 300
    # Tokens that neighbouring windows share.
    overlap: int = 20
    # What numbers of vectors are stored as.
    dtype: Literal["fp16", "fp32"] = "fp16"
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "auto"

    def validate(self) -> "DocumentsConfig":
        """Return self, or raise UserError that names a value and what would be right."""
        if self.chunk_tokens < 1:
            raise UserError(f"--chunk-tokens {self.chunk_tokens} must be at least 1")
        if not 0 <= self.overlap < self.chunk_tokens:
            raise UserError(f"--overlap {self.overlap} must be 0 or more, and less than --chunk-tokens")
        return self


class Passage(NamedTuple):
    """A passage: where it is from, its text (none of a picture), and its scores.

    `start` and `end` are characters of the file's text; `score` is that of the fused rankings, `cosine` that of the
    vectors and `bm25` that of the words, each None where that ranking does not have it.
    """

    file: str
    section: str
    start: int
    end: int
    text: str
    score: float
    cosine: float | None
    bm25: float | None

    @property
    def is_picture(self) -> bool:
        return not self.text

    @property
    def source(self) -> str:
        """Where it is from, in words."""
        return ", ".join([self.file, *([self.section] if self.section else [])])

    def describe(self) -> str:
        """Write where it is from and why it was found, for a terminal."""
        scores = {"score": self.score, "cosine": self.cosine, "bm25": self.bm25}
        shown = [f"{name} {value:.4f}" for name, value in scores.items() if value is not None]
        return f"{printable(self.source)}, characters {self.start} to {self.end}  ({', '.join(shown)})"


def main(config: DocumentsConfig):
    """Index the documents of a folder, or bring their index up to date."""
    config.validate()
    for package in ("bm25s", "pypdf"):  # before what takes long
        needed(package)
    embedder = None
    if config.model:
        embedder = open_embedder(config.model, find_device(config.device), config.pooling, config.instruction)
    update(config.folder, config.out, document_work(config, embedder))


def document_work(config: DocumentsConfig, embedder: Embedder | None) -> Work:
    if embedder is not None and config.chunk_tokens > embedder.longest:
        raise UserError(
            f"--chunk-tokens {config.chunk_tokens} are more than the {embedder.longest} that a text may have"
        )
    sees = embedder is not None and embedder.sees
    tokens = words if embedder is None else embedder.tokens

    def read(data: bytes, name: str) -> list[Item]:
        if Path(name).suffix.lower() not in READERS:
            picture = decode_image(data, name)
            return [Item(PICTURE, embedder and embedder.prepare(picture))]
        text = read_document(data, name)
        items = []
        for chunk in split(text, config.chunk, config.chunk_tokens, config.overlap, tokens):
            shown = text.text[chunk.start : chunk.end]
            items.append(Item({**chunk._asdict(), "text": shown}, embedder and embedder.prepare(shown)))
        return items

    about = {"kind": "documents", "folder": str(config.folder.absolute()), "dtype": DTYPES[config.dtype]}
    about |= {"chunk": config.chunk, "chunk_tokens": config.chunk_tokens, "overlap": config.overlap}
    about |= {"model": None, "fingerprint": "", "vector_size": 0} if embedder is None else embedder.about
    suffixes = frozenset(READERS) | (IMAGE_SUFFIXES if sees else frozenset())
    part = 256 if embedder is None else embedder.part
    return Work(about, suffixes, read, embedder and embedder.embed, write_texts, part)


def write_texts(folder: Path):
    """Add the words of an index's passages to it."""
    write_words(folder, (item["text"] for item in Index(folder).items()))


class Documents:
    """An open index of documents or pictures, and the model that made its vectors."""

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        model: str = "",
        loaded: tuple[VLM, Processor] | None = None,
    ):
        """`model` names the model of the index, if it is not where it was; `loaded` may be that model, read already.

        Raises UserError if the model is another one.
        """
        self.index = open_index(folder)
        about = self.index.about
        self.embedder = embedder_of(about, device, model, loaded)
        self.words = Words(self.index.folder) if about["kind"] == "documents" else None
        self.folder = Path(about["folder"])

    def find(self, question: str, k: int, sees: bool = True) -> list[Passage]:
        """Return the k passages that may answer a question, the likeliest first; fewer where no more have its words.

        Pictures are left out, as if the index had none, if who answers does not see them.
        """
        scores = dict(self.words.search(question, CANDIDATES)) if self.words else {}
        cosines = self._find_nearest(question, CANDIDATES, sees)
        passages = self._passages(fuse([list(cosines), list(scores)]), cosines, scores)
        return list(itertools.islice(passages, k))

    def _find_nearest(self, question: str, num: int, sees: bool) -> dict[int, float]:
        """Return the rows of the `num` vectors that are most like a question, and their cosines."""
        if self.embedder is None or self.index.vectors is None or not len(self.index):
            return {}
        query, most = self.embedder.query(question), num
        while True:
            values, rows = search(self.index.vectors, query, most)
            found = zip(rows[0].tolist(), values[0].tolist(), strict=True)
            kept = {row: value for row, value in found if sees or self.index.read(row)[1].get("text")}
            if len(kept) >= num or most >= len(self.index):
                return dict(itertools.islice(kept.items(), num))
            most *= 4

    def _passages(self, found, cosines, scores) -> Iterator[Passage]:
        for row, score in found:
            file, item = self.index.read(row)
            place = {name: item.get(name, empty) for name, empty in PICTURE.items()}
            yield Passage(file.name, **place, score=score, cosine=cosines.get(row), bm25=scores.get(row))

    def open_picture(self, passage: Passage) -> Image.Image:
        """Read the picture that a passage is. Raises UserError if it is gone."""
        return decode_image(read_file(self.folder / passage.file, self.folder, str(self.folder)), passage.file)


def with_passages(question: str, passages: list[Passage]) -> list[dict]:
    """Return the content of a user's message that asks a question and gives passages to answer it from.

    All of it is text that nobody's control tokens come from (data/chat.py), and an image part for each picture.
    """
    parts = [{"type": "text", "text": "Answer the question from the passages.\n"}]
    for number, passage in enumerate(passages, start=1):
        parts.append({"type": "text", "text": f"\n[{number}] {passage.source}\n{passage.text}"})
        parts += [{"type": "image"}] if passage.is_picture else []
        parts.append({"type": "text", "text": "\n"})
    return [*parts, {"type": "text", "text": f"\nQuestion: {question}"}]
