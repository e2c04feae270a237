"""Picture -> what a frozen encoder makes of its tiles, read from where `python -m nanovlm.features` stored it.

```
index.json               what the features were made with, how many there are, and what they took
pictures.safetensors     of N pictures, by their digests: digests uint8[N, 16], sizes int32[N, 2] (width, height),
                         places int64[N, 3] (shard, first tile, number of tiles; none of a picture that is unreadable)
00000.safetensors ...    shards: features float[n, P, F] of n tiles, P patches each
```

A picture is found by its contents, so records may be in any order and in any file. It is not decoded. In a document its
features are in the place of its tiles. What is in memory are 48 bytes a picture.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from nanovlm.config import VLMConfig
from nanovlm.data.images import to_rgb
from nanovlm.data.pictures import Video, kind_of
from nanovlm.errors import UserError
from nanovlm.files import changes, read_json
from nanovlm.tensor_files import open_tensors, read_tensors

INDEX, PICTURES = "index.json", "pictures.safetensors"
DIGEST = 16  # bytes
COMMAND = "python -m nanovlm.features"


class Seen(NamedTuple):
    """A picture of which an encoder has made features, float[n, P, F], of n tiles."""

    size: tuple[int, int]
    features: Tensor


class Missing(UserError):
    """Raised for a picture without stored features: that ends a run, where a broken record is counted."""


def digest(picture, number: int = 0) -> bytes:
    """Hash a picture of a record: an encoded file, or the pixels of one that comes decoded."""
    if isinstance(picture, bytes):
        return hashlib.blake2b(picture, digest_size=DIGEST).digest()
    if isinstance(picture, Video):
        raise UserError(f"video {number} has no place in data.features, which are of pictures: leave data.features out")
    if not isinstance(picture, Image.Image):
        raise UserError(f"image {number} must be an encoded file (bytes) or a PIL image, not {kind_of(picture)}")
    image = to_rgb(picture)
    return hashlib.blake2b(f"{image.size} ".encode() + image.tobytes(), digest_size=DIGEST).digest()


def describe_preprocessing(config: VLMConfig) -> dict:
    """Return all that decides which pixels the encoder gets, and what becomes of them, but its weights."""
    assert config.vision is not None
    vision = dataclasses.asdict(dataclasses.replace(config.vision, attention="sdpa"))
    return {"tiling": dataclasses.asdict(config.tiling), "vision": vision}


def shard_name(number: int) -> str:
    return f"{number:05}.safetensors"


class Features:
    def __init__(self, folder: Path, config: VLMConfig):
        """Raise UserError where the folder has no features, or those of pictures that are cut in another way."""
        if not (folder / INDEX).is_file():
            raise UserError(f"data.features = {folder} has no {INDEX}: write it first, by {COMMAND} {folder} ...")
        self.folder, self.about = folder, read_json(folder / INDEX)
        self.encoder = self.about["encoder"]
        stored, wanted = (flatten(x, "model.") for x in (self.about["preprocessing"], describe_preprocessing(config)))
        if changed := changes(stored, wanted):
            raise UserError(
                f"data.features = {folder} are of another encoder or another preprocessing than the run's "
                f"({changed}): write them anew, by {COMMAND}"
            )
        pictures = read_tensors(folder / PICTURES)
        self.sizes, self.places = pictures["sizes"], pictures["places"]
        self.digests = pictures["digests"].numpy().view(f"S{DIGEST}")[:, 0]  # S compares as bytes do
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.about["dtype"]]
        # The features of no tile.
        self.nothing = torch.empty(0, *self.about["shape"], dtype=dtype)

    def find(self, picture, number: int = 0) -> Seen:
        """Return a picture's features. Raises Missing, and UserError for what is no picture that can be read."""
        key = digest(picture, number)
        at = int(self.digests.searchsorted(key))
        if at == len(self.digests) or self.digests[at] != key.rstrip(b"\0"):
            raise Missing(
                f"image {number} is not among the {len(self.digests)} pictures of data.features = {self.folder}: write "
                f"the features of all records, by {COMMAND}"
            )
        (width, height), (shard, first, num) = self.sizes[at].tolist(), self.places[at].tolist()
        if not num:
            raise UserError(f"image {number} could not be read as an image when data.features were written")
        if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
            raise UserError(
                f"image {number} has {width * height} pixels, more than data.max_pixels = {Image.MAX_IMAGE_PIXELS}"
            )
        with open_tensors(self.folder / shard_name(shard)) as file:
            return Seen((width, height), file.get_slice("features")[first : first + num])


@functools.cache
def open_features(folder: str, config: VLMConfig) -> Features:
    """Open a folder once for all loaders of a run."""
    return Features(Path(folder), config)


def flatten(values: dict, where: str = "") -> dict:
    """Return nested settings by their dotted names, as JSON has them."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{where}{name}.")
        else:
            flat[f"{where}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
