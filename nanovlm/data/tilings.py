"""How images are cut into tiles: the policies of TILING, each five functions and how it numbers images.

```
fit, small image       fit, several tiles                    idefics3
+-------+              +-------+-------+   +-------+         no grey: the image is stretched
|  grey |              | r1 c1 | r1 c2 |   | whole |         to fill the grid
| image |              +-------+-------+ + | image |         nanovlm
|  grey |              | r2 c1 | r2 c2 |   |       |         likewise, the whole image first
+-------+              +-------+-------+   +-------+
```

Tiles are in reading order, the view of the whole image last (nanovlm, anyres: first).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from nanovlm.config import VLMConfig
from nanovlm.data.tile_plan import TilePlan, View, centre, find_scale, stretch, write_grid, write_place
from nanovlm.data.tilings_by_grid import (
    draw_anyres,
    draw_native,
    draw_qwen,
    layout_anyres,
    layout_native,
    plan_anyres,
    plan_native,
    plan_qwen,
    views_anyres,
    views_native,
)

IDEFICS3_LONGEST_EDGE = 4096  # no image is made longer than this, whatever tiling.longest_edge says
GLOBAL, FAKE = "<global-img>", "<fake_token_around_image>"
NANOVLM_GLOBAL = "<|global_image|>"

# ---- fit: aspect kept, as few tiles as carry the detail ----


def plan_fit(width: int, height: int, config: VLMConfig) -> TilePlan:
    """Choose one tile if the image fits, else the smallest grid without downscaling, or the one keeping most pixels."""
    side, most = config.tile_size, config.tiling.max_tiles
    rows, cols = math.ceil(height / side), math.ceil(width / side)
    if rows * cols > most:
        grids = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
        rows, cols = max(grids, key=lambda grid: (find_scale(width, height, *grid, side), -grid[0] * grid[1]))
    scale = find_scale(width, height, rows, cols, side)
    if rows * cols > 1:
        scale = min(scale, 1)
    return TilePlan(max(1, round(width * scale)), max(1, round(height * scale)), rows, cols, rows * cols > 1)


def draw_fit(image: Image.Image, plan: TilePlan, config: VLMConfig) -> list[Tensor]:
    return [_draw_centred(image, view, config.tile_size) for view in views_fit(*image.size, plan, config)]


def views_fit(width: int, height: int, plan: TilePlan, config: VLMConfig) -> list[View]:
    """Centre the image on the grid, then the whole image on one tile."""
    side = config.tile_size
    grid = centre(plan.rows, plan.cols, plan.width, plan.height, side)
    if not plan.has_global:
        return [grid]
    scale = find_scale(width, height, 1, 1, side)
    return [grid, centre(1, 1, max(1, round(width * scale)), max(1, round(height * scale)), side)]


def layout_fit(plan: TilePlan, image: str, config: VLMConfig) -> str:
    return image if plan.num_tiles == 1 else f"{write_grid(plan, image)}{GLOBAL}{image}"


def markers_fit(config: VLMConfig) -> list[str]:
    most = config.tiling.max_tiles
    places = [write_place(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    return [GLOBAL, *places] if most > 1 else []


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
    return [stretch(plan.rows, plan.cols, config), *([stretch(1, 1, config)] if plan.has_global else [])]


def layout_idefics3(plan: TilePlan, image: str, config: VLMConfig) -> str:
    whole = f"{FAKE}{GLOBAL}{image}{FAKE}"
    if plan.num_tiles == 1:
        return whole
    rows = (
        "".join(f"{FAKE}{write_place(r, c)}{image}" for c in range(1, plan.cols + 1)) for r in range(1, plan.rows + 1)
    )
    return "".join(f"{row}\n" for row in rows) + "\n" + whole


def markers_idefics3(config: VLMConfig) -> list[str]:
    longest = config.tiling.longest_edge
    most = math.ceil(min(longest + longest % 2, IDEFICS3_LONGEST_EDGE) / config.tile_size)
    places = [write_place(r, c) for r in range(1, most + 1) for c in range(1, most + 1)]
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
    return [*([stretch(1, 1, config)] if plan.has_global else []), stretch(plan.rows, plan.cols, config)]


def layout_nanovlm(plan: TilePlan, image: str, config: VLMConfig) -> str:
    if not config.tiling.has_global:
        return write_grid(plan, image)
    return f"{NANOVLM_GLOBAL}{image}" + (write_grid(plan, image) if plan.num_tiles > 1 else "")


def markers_nanovlm(config: VLMConfig) -> list[str]:
    most = config.tiling.longest_edge // config.tile_size
    places = [write_place(r, c) for r in range(1, most + 1) for c in range(1, most + 1)]
    return [NANOVLM_GLOBAL, *(places if most > 1 else [])] if config.tiling.has_global else places


# ---- square: one tile, as in nanoVLM before it cut images ----


def plan_square(width: int, height: int, config: VLMConfig) -> TilePlan:
    return TilePlan(config.tile_size, config.tile_size, 1, 1, False)


def draw_square(image: Image.Image, plan: TilePlan, config: VLMConfig) -> list[Image.Image]:
    return [image.resize((config.tile_size, config.tile_size), Image.Resampling.BILINEAR)]


def views_square(width: int, height: int, plan: TilePlan, config: VLMConfig) -> list[View]:
    return [stretch(1, 1, config)]


def layout_square(plan: TilePlan, image: str, config: VLMConfig) -> str:
    return image


def markers_square(config: VLMConfig) -> list[str]:
    return []


# ---- gemma, paligemma: the same, between Gemma-3's markers, or by another filter ----


def layout_gemma(plan: TilePlan, image: str, config: VLMConfig) -> str:
    begin, end = markers_gemma(config)
    return f"\n\n{begin}{image}{end}\n\n"


def markers_gemma(config: VLMConfig) -> list[str]:
    return ["<start_of_image>", "<end_of_image>"]


def draw_paligemma(image: Image.Image, plan: TilePlan, config: VLMConfig) -> list[Image.Image]:
    return [image.resize((config.tile_size, config.tile_size), Image.Resampling.BICUBIC)]


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
    "paligemma": Tiling(plan_square, draw_paligemma, views_square, layout_square, markers_square),
    "crop": Tiling(plan_square, draw_crop, views_crop, layout_square, markers_square),
    "native": Tiling(plan_native, draw_native, views_native, layout_native, markers_square),
    "internvl": Tiling(plan_internvl, draw_internvl, views_idefics3, layout_internvl, markers_internvl),
    "anyres": Tiling(plan_anyres, draw_anyres, views_anyres, layout_anyres, markers_square),
    "qwen": Tiling(plan_qwen, draw_qwen, views_native, layout_native, markers_square),
}
