"""Image -> tiles: read any image file, cut it into squares of the encoder's size.

A policy of TILING decides from the size of an image alone how it is cut (`plan_tiles`):

```
fit, small image       fit, several tiles                    idefics3
+-------+              +-------+-------+   +-------+         no grey: the image is stretched
|  grey |              | r1 c1 | r1 c2 |   | whole |         to fill the grid
| image |              +-------+-------+ + | image |         nanovlm
|  grey |              | r2 c1 | r2 c2 |   |       |         likewise, the whole image first
+-------+              +-------+-------+   +-------+
```

Tiles are in reading order, the view of the whole image last (nanovlm: first). The text around them is the policy's
layout. Of native and qwen a tile is one image token, and the encoder reads all tiles of an image as one picture.
"""

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from nanovlm.config import DataConfig, VLMConfig, pick
from nanovlm.data.places import count_places
from nanovlm.data.types import Grid
from nanovlm.errors import UserError

Image.init()
# What is read, of all that PIL knows: formats that people keep pictures in. Among the others are programs that it would
# have Ghostscript run (EPS), and decoders that hardly anyone uses or looks after.
FORMATS = tuple(
    kind
    for kind in ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
    if kind in Image.OPEN  # AVIF and WEBP are not in every build
)
# PIL checks it wherever a size is read. train.py sets it to data.max_pixels of the run.
Image.MAX_IMAGE_PIXELS = DataConfig.max_pixels
LONGEST_SIDE = 65535  # that of JPEG; to resize a longer one takes memory out of proportion to its pixels
STRIP = 2**20  # pixels that are converted at a time
IDEFICS3_LONGEST_EDGE = 4096  # no image is made longer than this, whatever tiling.longest_edge says
GLOBAL, FAKE = "<global-img>", "<fake_token_around_image>"
NANOVLM_GLOBAL = "<|global_image|>"


class TilePlan(NamedTuple):
    """How an image is cut: its size on the canvas of rows x cols tiles, and whether a view of the whole is added."""

    width: int
    height: int
    rows: int
    cols: int
    has_global: bool
    # anyres: rows and columns of the features that show the image.
    kept: tuple[int, ...] = ()

    @property
    def num_tiles(self) -> int:
        return self.rows * self.cols + self.has_global


class View(NamedTuple):
    """Where an image lies on a canvas of rows x cols tiles: its left upper corner and its size, in pixels."""

    rows: int
    cols: int
    left: int
    top: int
    width: int
    height: int


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


def find_grid(plan: TilePlan) -> Grid:
    return (plan.rows, plan.cols, *plan.kept)


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


# ---- fit: aspect kept, as few tiles as carry the detail ----


def plan_fit(width: int, height: int, config: VLMConfig) -> TilePlan:
    """Choose one tile if the image fits, else the smallest grid without downscaling, or the one keeping most pixels."""
    side, most = config.tile_size, config.tiling.max_tiles
    rows, cols = math.ceil(height / side), math.ceil(width / side)
    if rows * cols > most:
        grids = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
        rows, cols = max(grids, key=lambda grid: (_scale(width, height, *grid, side), -grid[0] * grid[1]))
    scale = _scale(width, height, rows, cols, side)
    if rows * cols > 1:
        scale = min(scale, 1)
    return TilePlan(max(1, round(width * scale)), max(1, round(height * scale)), rows, cols, rows * cols > 1)


def draw_fit(image: Image.Image, plan: TilePlan, config: VLMConfig) -> list[Tensor]:
    return [_draw_centred(image, view, config.tile_size) for view in views_fit(*image.size, plan, config)]


def views_fit(width: int, height: int, plan: TilePlan, config: VLMConfig) -> list[View]:
    """Centre the image on the grid, then the whole image on one tile."""
    side = config.tile_size
    grid = _centre(plan.rows, plan.cols, plan.width, plan.height, side)
    if not plan.has_global:
        return [grid]
    scale = _scale(width, height, 1, 1, side)
    return [grid, _centre(1, 1, max(1, round(width * scale)), max(1, round(height * scale)), side)]


def layout_fit(plan: TilePlan, image: str, config: VLMConfig) -> str:
    return image if plan.num_tiles == 1 else f"{_grid(plan, image)}{GLOBAL}{image}"


def markers_fit(config: VLMConfig) -> list[str]:
    most = config.tiling.max_tiles
    places = [_place(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    return [GLOBAL, *places] if most > 1 else []


def _scale(width, height, rows, cols, side):
    """Return the factor at which an image just fits into a grid of tiles."""
    return min(cols * side / width, rows * side / height)


def _centre(rows: int, cols: int, width: int, height: int, side: int) -> View:
    return View(rows, cols, (cols * side - width) // 2, (rows * side - height) // 2, width, height)


def _draw_centred(image: Image.Image, view: View, side: int) -> Tensor:
    """Resize an image and put it on a grey canvas: uint8[H, W, C]."""
    pixels = _resize(image, (view.width, view.height))
    if (view.width, view.height) == (view.cols * side, view.rows * side):
        return pixels
    canvas = torch.full((view.rows * side, view.cols * side, 3), 128, dtype=torch.uint8)
    canvas[view.top : view.top + view.height, view.left : view.left + view.width] = pixels
    return canvas


def _resize(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Resize by torch's antialiased bicubic filter, which is as exact as PIL's and two to three times as fast.

    Both round between rows and columns, so a few values of a photograph differ by 1/255, very few by 2/255. PIL resizes
    what is at least six times as large, where averaging it first (`reducing_gap`) saves more. Returns uint8[H, W, C].
    """
    if any(whole >= 6 * part for whole, part in zip(image.size, size, strict=True)):
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(image))
    if size == image.size:
        return pixels
    x_1CHW = rearrange(pixels, "H W C -> 1 C H W")
    x_1CHW = F.interpolate(x_1CHW, (size[1], size[0]), mode="bicubic", antialias=True)
    return rearrange(x_1CHW, "1 C H W -> H W C")


# ---- idefics3: every image at one scale, stretched to whole tiles ----


def plan_idefics3(width: int, height: int, config: VLMConfig) -> TilePlan:
    """Follow Idefics3ImageProcessor: the size of `_idefics3_size`, both sides rounded up to whole tiles."""
    side = config.tile_size
    width, height = _idefics3_size(width, height, config.tiling.longest_edge)
    aspect = width / height
    if width >= height:
        width = math.ceil(width / side) * side
        height = max(1, math.ceil(int(width / aspect) / side)) * side
    else:
        height = math.ceil(height / side) * side
        width = max(1, math.ceil(int(height * aspect) / side)) * side
    rows, cols = height // side, width // side
    return TilePlan(width, height, rows, cols, rows * cols > 1)


def draw_idefics3(image: Image.Image, plan: TilePlan, config: VLMConfig) -> list[Image.Image]:
    """Resize as many times as Idefics3ImageProcessor does, because each resize rounds the pixels."""
    for size in (_idefics3_size(*image.size, config.tiling.longest_edge), (plan.width, plan.height)):
        image = image.resize(size, Image.Resampling.LANCZOS)
    if not plan.has_global:
        return [image]
    return [image, image.resize((config.tile_size, config.tile_size), Image.Resampling.LANCZOS)]


def views_idefics3(width: int, height: int, plan: TilePlan, config: VLMConfig) -> list[View]:
    return [_stretch(plan.rows, plan.cols, config), *([_stretch(1, 1, config)] if plan.has_global else [])]


def _stretch(rows: int, cols: int, config: VLMConfig) -> View:
    return View(rows, cols, 0, 0, cols * config.tile_size, rows * config.tile_size)


def layout_idefics3(plan: TilePlan, image: str, config: VLMConfig) -> str:
    whole = f"{FAKE}{GLOBAL}{image}{FAKE}"
    if plan.num_tiles == 1:
        return whole
    rows = ("".join(f"{FAKE}{_place(r, c)}{image}" for c in range(1, plan.cols + 1)) for r in range(1, plan.rows + 1))
    return "".join(f"{row}\n" for row in rows) + "\n" + whole


def markers_idefics3(config: VLMConfig) -> list[str]:
    longest = config.tiling.longest_edge
    most = math.ceil(min(longest + longest % 2, IDEFICS3_LONGEST_EDGE) / config.tile_size)
    places = [_place(r, c) for r in range(1, most + 1) for c in range(1, most + 1)]
    return [FAKE, GLOBAL, *(places if most > 1 else [])]


def _idefics3_size(width, height, longest_edge):
    """Bring the longest side to `longest_edge`, the other to an even number, and both below the cap."""
    aspect = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / aspect)
        height += height % 2
    else:
        width, height = int(longest_edge * aspect), longest_edge
        width += width % 2
    width, height = max(1, width), max(1, height)
    aspect = width / height
    if max(width, height) > IDEFICS3_LONGEST_EDGE:
        if width >= height:
            width, height = IDEFICS3_LONGEST_EDGE, int(IDEFICS3_LONGEST_EDGE / aspect)
        else:
            width, height = int(IDEFICS3_LONGEST_EDGE * aspect), IDEFICS3_LONGEST_EDGE
    return max(1, width), max(1, height)


# ---- nanovlm: stretched to whole tiles, small images left small ----


def plan_nanovlm(width: int, height: int, config: VLMConfig) -> TilePlan:
    """Round the long side up to whole tiles, at most `longest_edge`; scale the other alike and round it up too."""
    side, tiling = config.tile_size, config.tiling
    long, short = max(width, height), min(width, height)
    new_long = tiling.longest_edge if tiling.enlarge else min(tiling.longest_edge, math.ceil(long / side) * side)
    # In nanoVLM's order of operations, whose rounding makes some squares one tile longer than wide.
    new_short = math.ceil(short * (new_long / long) / side) * side
    width, height = (new_long, new_short) if width >= height else (new_short, new_long)
    rows, cols = height // side, width // side
    return TilePlan(width, height, rows, cols, tiling.has_global and rows * cols > 1)


def draw_nanovlm(image: Image.Image, plan: TilePlan, config: VLMConfig) -> list[Image.Image]:
    """Stretch the image to the grid, and make the view of the whole image from that.

    nanoVLM does not round that view to whole pixel values, so ours differs by up to 1/255. All other tiles are equal.
    """
    grid = image.resize((plan.width, plan.height), Image.Resampling.BICUBIC)
    return [*(draw_square(grid, plan, config) if plan.has_global else ()), grid]


def views_nanovlm(width: int, height: int, plan: TilePlan, config: VLMConfig) -> list[View]:
    return [*([_stretch(1, 1, config)] if plan.has_global else []), _stretch(plan.rows, plan.cols, config)]


def layout_nanovlm(plan: TilePlan, image: str, config: VLMConfig) -> str:
    if not config.tiling.has_global:
        return _grid(plan, image)
    return f"{NANOVLM_GLOBAL}{image}" + (_grid(plan, image) if plan.num_tiles > 1 else "")


def markers_nanovlm(config: VLMConfig) -> list[str]:
    most = config.tiling.longest_edge // config.tile_size
    places = [_place(r, c) for r in range(1, most + 1) for c in range(1, most + 1)]
    return [NANOVLM_GLOBAL, *(places if most > 1 else [])] if config.tiling.has_global else places


# ---- square: one tile, as in nanoVLM before it cut images ----


def plan_square(width: int, height: int, config: VLMConfig) -> TilePlan:
    return TilePlan(config.tile_size, config.tile_size, 1, 1, False)


def draw_square(image: Image.Image, plan: TilePlan, config: VLMConfig) -> list[Image.Image]:
    return [image.resize((config.tile_size, config.tile_size), Image.Resampling.BILINEAR)]


def views_square(width: int, height: int, plan: TilePlan, config: VLMConfig) -> list[View]:
    return [_stretch(1, 1, config)]


def layout_square(plan: TilePlan, image: str, config: VLMConfig) -> str:
    return image


def markers_square(config: VLMConfig) -> list[str]:
    return []


# ---- gemma: the same, between markers ----


def layout_gemma(plan: TilePlan, image: str, config: VLMConfig) -> str:
    begin, end = markers_gemma(config)
    return f"\n\n{begin}{image}{end}\n\n"


def markers_gemma(config: VLMConfig) -> list[str]:
    return ["<start_of_image>", "<end_of_image>"]


# ---- crop: one tile, the middle of the image, as CLIP and LLaVA 1.5 see it ----


def draw_crop(image: Image.Image, plan: TilePlan, config: VLMConfig) -> list[Image.Image]:
    return [cut_middle(image, config.tile_size, Image.Resampling.BICUBIC)]


def cut_middle(image: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """Scale the shorter side to `side` and cut the middle out, as CLIP does, to the last bit.

    Of a picture as long as a thread no pixel of the rest is computed, which rounds some of the others otherwise.
    """
    width, height, left, top = find_middle(*image.size, side)
    if max(width, height) <= 16 * side:
        return image.resize((width, height), resample).crop((left, top, left + side, top + side))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + side) * across, (top + side) * down)
    return image.resize((side, side), resample, box)


def find_middle(width: int, height: int, side: int) -> tuple[int, int, int, int]:
    """Return width and height with a shorter side of `side`, and where the middle square begins in them."""
    shorter = min(width, height)
    width, height = int(side * width / shorter), int(side * height / shorter)
    return width, height, (width - side) // 2, (height - side) // 2


def views_crop(width: int, height: int, plan: TilePlan, config: VLMConfig) -> list[View]:
    width, height, left, top = find_middle(width, height, config.tile_size)
    return [View(1, 1, -left, -top, width, height)]


# ---- native, qwen: one picture of any aspect ratio, which the encoder reads whole ----


def plan_native(width: int, height: int, config: VLMConfig) -> TilePlan:
    """Choose the largest scale at which both sides, rounded up to whole tiles, have at most max_patches patches.

    It is searched for as Siglip2ImageProcessor does, which stops at 1e-5, so that the sizes are the same.
    """
    side, most = config.tile_size, max(1, config.tiling.max_patches // config.num_tile_patches)

    def count(scale):
        return max(1, math.ceil(height * scale / side)), max(1, math.ceil(width * scale / side))

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(count(middle)) <= most else (low, middle)
    rows, cols = count(low)
    return TilePlan(cols * side, rows * side, rows, cols, False)


def draw_native(image: Image.Image, plan: TilePlan, config: VLMConfig) -> list[Tensor]:
    """Resize by the filter of Siglip2ImageProcessor."""
    x_1CHW = rearrange(torch.from_numpy(np.array(image)), "H W C -> 1 C H W")
    x_1CHW = F.interpolate(x_1CHW, (plan.height, plan.width), mode="bilinear", antialias=True)
    return [rearrange(x_1CHW, "1 C H W -> H W C")]


def views_native(width: int, height: int, plan: TilePlan, config: VLMConfig) -> list[View]:
    return [_stretch(plan.rows, plan.cols, config)]


def layout_native(plan: TilePlan, image: str, config: VLMConfig) -> str:
    return image * plan.num_tiles


def plan_qwen(width: int, height: int, config: VLMConfig) -> TilePlan:
    """Follow Qwen2VLImageProcessor: both sides rounded to whole tiles, or scaled where pixels are too few or many."""
    side, least, most = config.tile_size, config.tiling.min_pixels, config.tiling.max_pixels
    if max(width, height) > 200 * min(width, height):
        raise UserError(f"an image of {width} x {height} has a side of more than 200 times the other")
    rows, cols = round(height / side), round(width / side)
    if rows * cols * side**2 > most:
        scale = math.sqrt(height * width / most)
        rows, cols = (max(1, math.floor(length / scale / side)) for length in (height, width))
    elif rows * cols * side**2 < least:
        scale = math.sqrt(least / (height * width))
        rows, cols = (math.ceil(length * scale / side) for length in (height, width))
    return TilePlan(cols * side, rows * side, rows, cols, False)


def draw_qwen(image: Image.Image, plan: TilePlan, config: VLMConfig) -> list[Image.Image]:
    return [image.resize((plan.width, plan.height), Image.Resampling.BICUBIC)]


# ---- internvl: stretched to the grid whose shape is most like its own, then the whole image ----


def plan_internvl(width: int, height: int, config: VLMConfig) -> TilePlan:
    """Follow GotOcr2ImageProcessor: of grids of one shape the largest that is less than twice as large as the image."""
    side, most, best, least = config.tile_size, config.tiling.max_tiles, (1, 1), math.inf
    grids = [(cols, rows) for cols in range(1, most + 1) for rows in range(1, most // cols + 1)]
    for cols, rows in sorted(grids, key=math.prod):
        difference = abs(width / height - cols / rows)
        if difference < least or (difference == least and width * height > 0.5 * side * side * cols * rows):
            best, least = (cols, rows), difference
    cols, rows = best
    return TilePlan(cols * side, rows * side, rows, cols, rows * cols > 1)


def draw_internvl(image: Image.Image, plan: TilePlan, config: VLMConfig) -> list[Image.Image]:
    sizes = [(plan.width, plan.height), *([(config.tile_size,) * 2] if plan.has_global else [])]
    return [image.resize(size, Image.Resampling.BICUBIC) for size in sizes]


def layout_internvl(plan: TilePlan, image: str, config: VLMConfig) -> str:
    begin, end = markers_internvl(config)
    return f"{begin}{image * plan.num_tiles}{end}"


def markers_internvl(config: VLMConfig) -> list[str]:
    return ["<img>", "</img>"]


# ---- anyres: the whole image stretched to a tile, then the grid that fits it best, as in LLaVA-OneVision ----


def plan_anyres(width: int, height: int, config: VLMConfig) -> TilePlan:
    """Choose the grid that keeps most of the image's pixels, of equal ones the smallest; the image fills one side."""
    side, most = config.tile_size, config.tiling.longest_edge // config.tile_size

    def rate(grid):
        scale = _scale(width, height, *grid, side)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -grid[0] * grid[1]

    rows, cols = max(itertools.product(range(1, most + 1), repeat=2), key=rate)
    across, down = cols * side / width, rows * side / height
    size = (cols * side, min(math.ceil(height * across), rows * side))
    if across >= down:
        size = (min(math.ceil(width * down), cols * side), rows * side)
    # The border in whole features, from the sides of the image and not of what is drawn: as transformers leaves it out.
    grid = math.isqrt(config.num_image_features)
    kept_rows, kept_cols = rows * grid, cols * grid
    if width / height > kept_cols / kept_rows:
        kept_rows -= (kept_rows - int(round(height * (kept_cols / width), 7))) // 2 * 2
    else:
        kept_cols -= (kept_cols - int(round(width * (kept_rows / height), 7))) // 2 * 2
    return TilePlan(*size, rows, cols, True, (kept_rows, kept_cols))


def draw_anyres(image: Image.Image, plan: TilePlan, config: VLMConfig) -> list[Image.Image]:
    whole, view = views_anyres(*image.size, plan, config)
    canvas = Image.new("RGB", (view.cols * config.tile_size, view.rows * config.tile_size))
    canvas.paste(image.resize((plan.width, plan.height), Image.Resampling.BICUBIC), (view.left, view.top))
    return [image.resize((whole.width, whole.height), Image.Resampling.BICUBIC), canvas]


def views_anyres(width: int, height: int, plan: TilePlan, config: VLMConfig) -> list[View]:
    return [_stretch(1, 1, config), _centre(plan.rows, plan.cols, plan.width, plan.height, config.tile_size)]


def layout_anyres(plan: TilePlan, image: str, config: VLMConfig) -> str:
    return image * count_places(config, [find_grid(plan)])[0]


def _place(row, col):
    return f"<row_{row}_col_{col}>"


def _grid(plan, image):
    """Write the tiles of a grid, each after its position marker."""
    places = [(r, c) for r in range(1, plan.rows + 1) for c in range(1, plan.cols + 1)]
    return "".join(f"{_place(r, c)}{image}" for r, c in places)


def _check_size(width, height):
    if width < 1 or height < 1:
        raise UserError(f"an image of {width} x {height} has no pixels")
    if max(width, height) > LONGEST_SIDE:
        raise UserError(f"an image of {width} x {height} has a side of more than {LONGEST_SIDE} pixels")


class Tiling(NamedTuple):
    """A policy: size -> plan, image -> grid and whole view, plan -> text, config -> markers in such texts.

    Grid and view are RGB images, or already uint8[H, W, C]; `views` says where on them the image lies.
    `number` is the text before each of several images.
    """

    plan: Callable[[int, int, VLMConfig], TilePlan]
    draw: Callable[[Image.Image, TilePlan, VLMConfig], list[Image.Image] | list[Tensor]]
    views: Callable[[int, int, TilePlan, VLMConfig], list[View]]
    layout: Callable[[TilePlan, str, VLMConfig], str]
    markers: Callable[[VLMConfig], list[str]]
    number: str = ""


TILING = {
    "fit": Tiling(plan_fit, draw_fit, views_fit, layout_fit, markers_fit),
    "idefics3": Tiling(plan_idefics3, draw_idefics3, views_idefics3, layout_idefics3, markers_idefics3),
    "nanovlm": Tiling(plan_nanovlm, draw_nanovlm, views_nanovlm, layout_nanovlm, markers_nanovlm, "<image: {}>"),
    "square": Tiling(plan_square, draw_square, views_square, layout_square, markers_square),
    "gemma": Tiling(plan_square, draw_square, views_square, layout_gemma, markers_gemma),
    "crop": Tiling(plan_square, draw_crop, views_crop, layout_square, markers_square),
    "native": Tiling(plan_native, draw_native, views_native, layout_native, markers_square),
    "internvl": Tiling(plan_internvl, draw_internvl, views_idefics3, layout_internvl, markers_internvl),
    "anyres": Tiling(plan_anyres, draw_anyres, views_anyres, layout_anyres, markers_square),
    "qwen": Tiling(plan_qwen, draw_qwen, views_native, layout_native, markers_square),
}
