"""Search pictures and documents.

    python -m nanovlm.search index FOLDER OUT --model M              index a folder of pictures by a dual model
    python -m nanovlm.search query OUT "a red circle" -k 5           the pictures most like a text
    python -m nanovlm.search query OUT --image a.png --sheet b.png   the pictures most like a picture, drawn
    python -m nanovlm.search index-documents FOLDER OUT              index documents by their words
    python -m nanovlm.search index-documents FOLDER OUT --model M    and by vectors of a decoder or dual model
    python -m nanovlm.search query OUT "how does a run resume?"      the passages that may answer a question

The first and the fourth command bring an index up to date, and go on where they were killed.
`python generate.py --documents OUT` answers questions from the passages. docs/search.md tells the rest.
"""

import sys

from nanovlm import cli

if __name__ == "__main__":
    cli.end_on_interrupt()  # the imports below take seconds

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from nanovlm.data.images import decode_image, open_image
from nanovlm.data.source_names import read_file
from nanovlm.environment import choose_threads, find_device
from nanovlm.errors import UserError, printable
from nanovlm.files import write_file
from nanovlm.search import documents, pictures
from nanovlm.search.documents import Documents
from nanovlm.search.embed import embedder_of
from nanovlm.search.index import Index, open_index
from nanovlm.search.sheet import draw_sheet


@dataclass(frozen=True)
class QueryConfig:
    # The folder of the index.
    out: Path
    # What is searched for.
    text: Annotated[str, tyro.conf.Positional] = ""
    # A picture in place of a text.
    image: Path | None = None
    # How many pictures or passages.
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 5
    # Draw the pictures that are found into this PNG file.
    sheet: Path | None = None
    # Print one JSON object for each picture or passage.
    json: bool = False
    # The model of the index, if it is not where it was.
    model: str = ""
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "auto"

    def validate(self) -> "QueryConfig":
        """Return self, or raise UserError that names a value and what would be right."""
        if bool(self.text.strip()) == (self.image is not None):
            raise UserError("search for a text or for a picture (--image FILE), and not for both")
        if self.k < 1:
            raise UserError(f"-k {self.k} must be at least 1")
        if self.sheet is not None and self.sheet.suffix.lower() != ".png":
            raise UserError(f"--sheet writes a PNG file: let the name {self.sheet} end in .png")
        return self


def query(config: QueryConfig):
    """Search an index of pictures or documents."""
    config.validate()
    index = open_index(config.out)
    if index.about.get("kind") == "pictures":
        query_pictures(config, index)
        return
    if config.image or config.sheet:
        raise UserError(
            f"{config.out} is an index of documents, which are found by a text: leave --image and --sheet out"
        )
    passages = Documents(config.out, find_device(config.device), config.model).find(config.text, config.k)
    for number, passage in enumerate(passages, start=1):
        if config.json:
            print(json.dumps(passage._asdict()))
        else:
            print(f"[{number}] {passage.describe()}")
            print("    " + printable(" ".join(passage.text.split()), most=300))


def query_pictures(config: QueryConfig, index: Index):
    asked = open_image(config.image) if config.image else None
    embedder = embedder_of(index.about, find_device(config.device), config.model)
    assert embedder is not None  # an index of pictures has a model
    found = pictures.find_pictures(index, embedder, asked or config.text, config.k)
    for number, match in enumerate(found, start=1):
        print(json.dumps(match._asdict()) if config.json else f"{number}  {match.score:.4f}  {printable(match.file)}")
    if config.sheet:
        folder = Path(index.about["folder"])
        images = [decode_image(read_file(folder / m.file, folder, str(folder)), m.file) for m in found]
        drawn = [(image, match.file, match.score) for image, match in zip(images, found, strict=True)]
        write_file(config.sheet, draw_sheet(config.text or str(config.image), asked, drawn))


COMMANDS = {
    "index": (pictures.PicturesConfig, pictures.main),
    "index-documents": (documents.DocumentsConfig, documents.main),
    "query": (QueryConfig, query),
}


def main(args: list[str]):
    """Run the command that the first argument names."""
    torch.set_num_threads(choose_threads(torch.device("cpu")))
    cli.run_command(args, COMMANDS, "python -m nanovlm.search", __doc__)


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
