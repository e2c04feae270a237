"""Where an answer looked -> heat maps -> a picture of all its tokens."""

import io
import itertools
import math

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nanovlm.data.images import TilePlace

# Tokens at most, which with the picture fill four rows; columns; pixels.
MOST_TOKENS, COLUMNS, SIDE, GAP, LINE = 23, 6, 160, 14, 17
# Of the heat, from none to the most: transparent, then from yellow to red.
RAMP = np.array([(255, 225, 60), (255, 120, 0), (225, 0, 30)], dtype=np.float64)


def heat_map(weights: Tensor, places: list[TilePlace], size: tuple[int, int]) -> Tensor:
    """Spread the weights of an image's tokens over the picture: float32[height, width] for a size (width, height).

    `weights` float32[tiles, tokens of a tile]. The mean of a map is the sum of the weights, without what lies on the
    grey around the image; where tiles overlap, as with a view of the whole, they add up.
    """
    (width, height), heat = size, torch.zeros(size[1], size[0])
    for tile, place in zip(weights, places, strict=True):
        side = math.isqrt(len(tile))
        down, across = _cover(place.top, place.bottom, side, height), _cover(place.left, place.right, side, width)
        heat += down @ rearrange(tile.float(), "(row col) -> row col", row=side) @ across.T
    return heat * (width * height)


def _cover(start: float, end: float, num_cells: int, num_pixels: int) -> Tensor:
    """Return which share of each cell from `start` to `end` falls on each pixel from 0 to 1: float32[pixels, cells]."""
    pixels = torch.arange(num_pixels + 1, dtype=torch.float64)[:, None] / num_pixels
    cells = start + (end - start) * torch.arange(num_cells + 1, dtype=torch.float64) / num_cells
    overlap = torch.minimum(pixels[1:], cells[1:]) - torch.maximum(pixels[:-1], cells[:-1])
    return (overlap.clamp(min=0) / (end - start) * num_cells).float()


def draw_heat(image: Image.Image, heat: Tensor, most: float) -> Image.Image:
    """Lay a heat map float32[H, W] over an image of its size; `most` is where the colors end."""
    picture = np.asarray(image, dtype=np.float64)
    grey = picture @ (0.299, 0.587, 0.114)
    picture = 0.35 * picture + 0.5 * grey[..., None] + 0.15 * 255  # pale, so that the heat stands out
    share = (heat.double().numpy() / most if most > 0 else np.zeros(heat.shape)).clip(0, 1)
    at = share * (len(RAMP) - 1)
    color = np.stack([np.interp(at, range(len(RAMP)), RAMP[:, channel]) for channel in range(3)], axis=-1)
    alpha = 0.62 * share[..., None] ** 1.5
    return Image.fromarray((picture * (1 - alpha) + color * alpha).round().astype(np.uint8))


def draw_look(
    images: list[Image.Image], places: list[list[TilePlace]], weights: Tensor, texts: list[str], titles: list[str]
) -> bytes:
    """Draw the images, and again for each of an answer's first tokens with what it looked at, as a PNG file.

    `weights` float32[A, P] are the attention of each token to the image tokens of all tiles, `places` those of each
    image's tiles, `texts` those of the tokens; `titles` are lines above. The longer side of every image is SIDE. The
    colors of a token reach to its own largest value.
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    shown, columns = min(len(texts), MOST_TOKENS), min(COLUMNS, len(texts) + 1)
    scaled = [(image.size, SIDE / max(image.size)) for image in images]
    sizes = [(max(1, round(width * scale)), max(1, round(height * scale))) for (width, height), scale in scaled]
    width, tallest = max(SIDE, sum(w + 4 for w, _ in sizes) - 4), max(h for _, h in sizes)
    num_tiles = [len(tiles) for tiles in places]
    weights_AIP = rearrange(weights, "A (I P) -> A I P", I=sum(num_tiles))
    across = max(columns, 3) * (width + GAP) - GAP
    lines = [line for text in titles for line in _wrap(text, font, across)]
    top, height = 2 * GAP + len(lines) * (LINE + 3), tallest + 2 * LINE + GAP
    sheet = Image.new("RGB", (across + 2 * GAP, top + math.ceil((shown + 1) / columns) * height), "white")
    canvas = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        canvas.text((GAP, GAP + number * (LINE + 3)), line, fill="black", font=font)
    for cell in range(shown + 1):
        x, y = GAP + cell % columns * (width + GAP), top + cell // columns * height
        pictures = [image.resize(s, _filter(image, s)) for image, s in zip(images, sizes, strict=True)]
        label, note = "", "the pictures" if len(images) > 1 else "the picture"
        if cell > 0:
            of_images = weights_AIP[cell - 1].split(num_tiles)
            heats = [heat_map(*what) for what in zip(of_images, places, sizes, strict=True)]
            most = max(float(heat.max()) for heat in heats)
            pictures = [draw_heat(picture, heat, most) for picture, heat in zip(pictures, heats, strict=True)]
            label, note = _show(texts[cell - 1]), f"{100 * float(weights[cell - 1].sum()):.0f} % on {note}"
        for picture, left in zip(pictures, itertools.accumulate((w + 4 for w, _ in sizes), initial=x), strict=False):
            sheet.paste(picture, (left, y))
        while font.getlength(label) > width:
            label = label.removesuffix("…")[:-1] + "…"
        canvas.text((x, y + tallest + 2), label or note, fill="black", font=font)
        if label:
            canvas.text((x, y + tallest + 2 + LINE), note, fill=(110, 110, 110), font=small)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()


def _filter(image: Image.Image, size: tuple[int, int]) -> Image.Resampling:
    return Image.Resampling.NEAREST if image.width < size[0] else Image.Resampling.LANCZOS


def _show(text: str) -> str:
    return f"“{text if text.isprintable() else repr(text)[1:-1]}”" if text else "(part of a character)"


def _wrap(text: str, font, width: int) -> list[str]:
    lines = [""]
    for word in (text if text.isprintable() else repr(text)[1:-1]).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return lines
