"""Raw records in a folder of images: texts beside them, or classes that are the names of their folders."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from nanovlm.data.layouts import CAPTION_QUESTION, is_conversation
from nanovlm.data.pictures import is_empty
from nanovlm.data.source import IN_ORDER, Order, Ref, deal
from nanovlm.data.source_files import IMAGE_SUFFIXES, check_index, walk
from nanovlm.data.source_lines import parse_json
from nanovlm.data.source_names import fetch_named, read_file, read_named
from nanovlm.errors import UserError

# The question for an image that has only a class.
CLASS_QUESTION = "what is in the image?"
# Folders of these names are the parts of a data set, not classes.
SPLITS = frozenset("train training val valid validation dev test testing images".split())
BESIDE = (".json", ".txt")


class Folder:
    """A folder of image files, each with a caption (same name, .txt) or a record (.json) beside it.

    A .json without images is about the image beside it.
    """

    blocks = None

    def __init__(self, path: str | Path, order: Order = IN_ORDER, allow_urls: bool = False):
        self.path, self.name, self.damaged, self.order = Path(path), str(path), [], order
        self.allow_urls = allow_urls
        found = find_images(self.path)
        self.images = [image for image in found if is_described(image)]
        if not self.images:
            raise UserError(f"{path} has no image file with a .txt or .json of its name")
        if alone := len(found) - len(self.images):
            self.damaged.append(f"{path}: {alone} of {len(found)} images have no .txt or .json beside them")

    def __len__(self):
        return len(self.images)

    def refs(self, slots: Sequence[int], num_slots: int, start: int | None = None) -> Iterator[Ref]:
        return deal(self, slots, num_slots, start)

    def read(self, key: int) -> dict:
        check_index(self, key)
        image = self.images[key]
        where = str(image)
        files = {suffix: image.with_suffix(suffix) for suffix in BESIDE}
        beside = {s: read_file(file, self.path, where) for s, file in files.items() if file.is_file()}
        record = read_record(beside.get(".json"), beside.get(".txt"), where, has_image=True)
        if all(is_empty(record.get(key)) for key in ("images", "image", "file_name", "file_names")):
            record["images"] = [image.name]
        # A record names what is beside it, in the folder that the user named.
        return fetch_named(record, image.parent, self.path, where, self.allow_urls)


class Classes:
    """A folder of folders of images, each named after what its images show: `cat/1.jpg dog/2.jpg`."""

    blocks = None

    def __init__(self, path: str | Path, order: Order = IN_ORDER):
        self.path, self.name, self.damaged, self.order = Path(path), str(path), [], order
        found = find_images(self.path)
        self.images = [image for image in found if image.parent != self.path]
        names = {image.parent.name for image in self.images}
        if not names - SPLITS or len(names) < 2:
            raise UserError(
                f"{path} has {len(found)} images and nothing about them: it needs a .txt or .json of the name of each, "
                "a metadata.jsonl or metadata.csv, a file of records, or a folder for each of at least two classes"
            )
        if alone := len(found) - len(self.images):
            self.damaged.append(f"{path}: {alone} of {len(found)} images are in no folder of a class")

    def __len__(self):
        return len(self.images)

    def refs(self, slots: Sequence[int], num_slots: int, start: int | None = None) -> Iterator[Ref]:
        return deal(self, slots, num_slots, start)

    def read(self, key: int) -> dict:
        check_index(self, key)
        image = self.images[key]
        contents = read_named(image.name, image.parent, self.path, f"the folder {self.path}", allow_urls=False)
        return {"images": [contents], "texts": [{"user": CLASS_QUESTION, "assistant": image.parent.name}]}


def find_images(folder: Path) -> list[Path]:
    return [file for file in walk(folder) if file.suffix.lower() in IMAGE_SUFFIXES]


def is_described(image: Path) -> bool:
    return any(image.with_suffix(suffix).is_file() for suffix in BESIDE)


def read_record(json_data: bytes | None, caption: bytes | None, where: str, has_image: bool) -> dict:
    """Return the record in a .json file, of whatever layout; if it has no conversation, make one from the caption."""
    record = {} if json_data is None else parse_json(json_data, f"the .json of {where}")
    if caption is None:
        if not record:
            raise UserError(f"{where} needs a .json with a record, or a .txt with a caption")
        return record
    if is_conversation(record):
        return record
    if not has_image:
        raise UserError(f"{where} has a caption and no image")
    try:
        return {"texts": [{"user": CAPTION_QUESTION, "assistant": caption.decode("utf-8-sig").strip()}]}
    except UnicodeDecodeError as error:
        raise UserError(f"the .txt of {where} is not UTF-8 text: {error}") from error
