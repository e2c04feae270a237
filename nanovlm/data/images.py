"""Image -> tiles: read any image file, fit it into the encoder's square; normalise pixels."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB. Raises ValueError that names the file when it is missing or no image."""
    if not Path(path).is_file():
        raise ValueError(f"there is no image file {path}")
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image of any mode upright and into RGB; transparent parts become white.

    Deeper greys are scaled down from the smallest of the usual ranges that holds them: 0 to 1 for floats, 8, 12 or
    16 bits, else their own maximum.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        ranges = ((1,) if image.mode == "F" else ()) + (255, 4095, 65535)
        grey = grey / next((top for top in ranges if grey.max() <= top), grey.max()) * 255
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # palettes with byte transparency
            image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def make_tiles(image: Image.Image, image_size: int) -> Tensor:
    """Fit an RGB image into one square tile, aspect kept, centred on grey: uint8[1, 3, image_size, image_size]."""
    if image.size != (image_size, image_size):
        scale = image_size / max(image.size)
        size = tuple(max(1, round(side * scale)) for side in image.size)
        fitted = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        image = Image.new("RGB", (image_size, image_size), (128, 128, 128))
        image.paste(fitted, tuple((image_size - side) // 2 for side in size))
    return torch.from_numpy(np.array(image).transpose(2, 0, 1)[None])


def normalize(tiles: Tensor) -> Tensor:
    """Bring uint8 pixels to float32 in [-1, 1] (mean and standard deviation 0.5, as SigLIP)."""
    return tiles.float() / 127.5 - 1
