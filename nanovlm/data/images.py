"""Image -> tiles: read any image file, cut it into squares of the encoder's size.

A policy of TILING (tilings.py) decides from the size of an image alone how it is cut (`plan_tiles`), and what text
stands around its tiles (`layout`).
"""

import io
import itertools
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from nanovlm.config import DataConfig, VLMConfig, pick
from nanovlm.data.pictures import FORMATS
from nanovlm.data.tile_plan import TilePlan, find_grid
from nanovlm.data.tilings import TILING
from nanovlm.data.types import Grid
from nanovlm.errors import UserError

# PIL checks it wherever a size is read. train.py sets it to data.max_pixels of the run.
Image.MAX_IMAGE_PIXELS = DataConfig.max_pixels
LONGEST_SIDE = 65535  # that of JPEG; to resize a longer one takes memory out of proportion to its pixels
STRIP = 2**20  # pixels that are converted at a time


class TilePlace(NamedTuple):
    """The part of an image that the image tokens of a tile show, in fractions of its width and height.

    What is below 0 or above 1 is the grey around the image. `is_whole` where the tile is a view of the whole image
    beside those of a grid.
    """

    left: float
    top: float
    right: float
    bottom: float
    is_whole: bool


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB. Raises UserError that names the file when it is missing or no image."""
    if not Path(path).is_file():
        raise UserError(f"there is no image file {path}")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str = "image", most_pixels: int | None = None) -> Image.Image:
    """Read the bytes of an image file as RGB, the first frame of an animation.

    Raises UserError that begins with `name`, and where the data are from if they know it, for data that are no image,
    truncated, or of more pixels than the limit, or than `most_pixels`.
    """
    if isinstance(origin := getattr(data, "name", None), str):
        name = f"{name} ({origin})"
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(io.BytesIO(data), formats=FORMATS) as image,
        ):
            if most_pixels is not None and image.width * image.height > most_pixels:
                raise UserError(
                    f"it has {image.width * image.height} pixels, more than the {most_pixels} that are left"
                )
            return to_rgb(image)
    except Image.UnidentifiedImageError as error:
        problem = f"its {len(data)} bytes have no format that is read"
        raise UserError(f"{name} cannot be read as an image: {problem}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        number = re.search(r"\d+", str(error))
        most = f"data.max_pixels = {Image.MAX_IMAGE_PIXELS}"
        if most_pixels is not None:
            most = f"the {most_pixels} that are left"
        raise UserError(
            f"{name} cannot be read as an image: it has {number[0] if number else 'too many'} pixels, more than {most}"
        ) from error
    except Exception as error:  # on damaged files, decoders raise anything
        raise UserError(f"{name} cannot be read as an image: {error or type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any mode upright and into RGB; transparent parts become white.

    Greys of more than 8 bits are scaled down from the smallest usual range that holds them: 0 to 1 for floats, 8, 12
    or 16 bits, else up to their own maximum. Raises UserError for an image without pixels.
    """
    _check_size(*image.size)
    if image.format not in (None, "MPO", *FORMATS):  # opened elsewhere, and not decoded yet; MPO is a JPEG of several
        raise UserError(f"it is of the format {image.format}; what is read is {', '.join(FORMATS)}")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else this would be one more copy
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # palettes with byte transparency
            image = image if image.mode == "RGBA" else image.convert("RGBA")
        return _on_white(image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale greys of more than 8 bits down; the intermediate fp64 exists for one strip of rows at a time."""
    greys = np.asarray(image)
    strips = np.array_split(greys, min(len(greys), math.ceil(greys.size / STRIP)))
    largest = max(np.nan_to_num(strip.astype(np.float64)).max() for strip in strips)
    ranges = ((1,) if image.mode == "F" else ()) + (255, 4095, 65535)
    top = next((top for top in ranges if largest <= top), largest)
    scaled = [(np.nan_to_num(strip.astype(np.float64)) / top * 255).clip(0, 255).astype(np.uint8) for strip in strips]
    return Image.fromarray(np.concatenate(scaled))


def _on_white(image: Image.Image) -> Image.Image:
    """Put an RGBA image on white, RGB, one strip of rows at a time, as each step makes a copy."""
    (width, height), whole = image.size, Image.new("RGB", image.size)
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        whole.paste(strip.convert("RGB"), (0, top))
    return whole


def plan_tiles(width: int, height: int, config: VLMConfig) -> TilePlan:
    """Decide how an image of this size is cut. Raises UserError without pixels or without an encoder."""
    if config.vision is None:
        raise UserError("this model is a language model: it has no encoder for images")
    _check_size(width, height)
    return pick(TILING, config.tiling.policy, "tiling.policy").plan(width, height, config)


def make_tiles(image: Image.Image, config: VLMConfig) -> Tensor:
    """Cut an RGB image into the tiles of its plan, in the order of its layout: uint8[n, 3, S, S]."""
    plan, side = plan_tiles(*image.size, config), config.tile_size
    tiles = []
    for drawn in pick(TILING, config.tiling.policy, "tiling.policy").draw(image, plan, config):
        pixels = torch.from_numpy(np.array(drawn)) if isinstance(drawn, Image.Image) else drawn
        tiles.append(rearrange(pixels, "(row h) (column w) C -> (row column) C h w", h=side, w=side))
    return torch.cat(tiles)


def place_tiles(width: int, height: int, config: VLMConfig) -> list[TilePlace]:
    """Return where each tile of an image of this size lies in it, in the order of its layout.

    Image tokens lie in a tile row by row, and cover all of it but pixels beyond the last whole patch.
    """
    plan = plan_tiles(width, height, config)
    assert config.vision is not None  # else there is no plan
    side, patch, places = config.tile_size, config.vision.patch_size, []
    shown = side // patch * patch
    for view in pick(TILING, config.tiling.policy, "tiling.policy").views(width, height, plan, config):
        is_first = not any(place.is_whole for place in places)  # of anyres, the grid may be of one tile, too
        is_whole = plan.has_global and (view.rows, view.cols) == (1, 1) and is_first
        for row, col in itertools.product(range(view.rows), range(view.cols)):
            left, top = col * side - view.left, row * side - view.top
            across = (left / view.width, (left + shown) / view.width)
            down = (top / view.height, (top + shown) / view.height)
            places.append(TilePlace(across[0], down[0], across[1], down[1], is_whole))
    return places


def find_grids(images: Sequence[Image.Image], config: VLMConfig) -> list[Grid]:
    """Return the grid of each image whose image tokens follow from it; else nothing."""
    plans = [plan_tiles(*image.size, config) for image in images] if config.has_grids else []
    return [find_grid(plan) for plan in plans]


def layout(plan: TilePlan, image: str, config: VLMConfig, number: int | None = None) -> str:
    """Write the text that shows an image: marker tokens, and `image` in the place of each tile.

    `number` is its place among several images, from 0.
    """
    tiling = pick(TILING, config.tiling.policy, "tiling.policy")
    return ("" if number is None else tiling.number.format(number)) + tiling.layout(plan, image, config)


def marker_tokens(config: VLMConfig) -> list[str]:
    """List the special tokens besides the image token that layouts of this config can have, in a fixed order."""
    if config.vision is None:
        return []
    return pick(TILING, config.tiling.policy, "tiling.policy").markers(config)


def _check_size(width, height):
    if width < 1 or height < 1:
        raise UserError(f"an image of {width} x {height} has no pixels")
    if max(width, height) > LONGEST_SIDE:
        raise UserError(f"an image of {width} x {height} has a side of more than {LONGEST_SIDE} pixels")
