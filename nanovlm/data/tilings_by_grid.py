"""Policies of tiling whose image tokens follow from a picture's grid: native, qwen and anyres (see tilings.py).

Of native and qwen a tile is one image token, and the encoder reads all tiles of an image as one picture. Of anyres the
tiles' features are put together, and those of the border left out (nanovlm/model/anyres.py).
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from nanovlm.config import VLMConfig
from nanovlm.data.places import count_places
from nanovlm.data.tile_plan import TilePlan, View, centre, find_grid, find_scale, stretch
from nanovlm.errors import UserError

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
    return [stretch(plan.rows, plan.cols, config)]


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


# ---- anyres: the whole image stretched to a tile, then the grid that fits it best, as in LLaVA-OneVision ----


def plan_anyres(width: int, height: int, config: VLMConfig) -> TilePlan:
    """Choose the grid that keeps most of the image's pixels, of equal ones the smallest; the image fills one side."""
    side, most = config.tile_size, config.tiling.longest_edge // config.tile_size

    def rate(grid):
        rows, cols = grid
        scale = find_scale(width, height, rows, cols, side)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -rows * cols

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
    return [stretch(1, 1, config), centre(plan.rows, plan.cols, plan.width, plan.height, config.tile_size)]


def layout_anyres(plan: TilePlan, image: str, config: VLMConfig) -> str:
    return image * count_places(config, [find_grid(plan)])[0]
