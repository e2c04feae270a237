"""Images of every mode and size become one tile; what is no image is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm.data.images import make_tiles, normalize, open_image, to_rgb
from tests.conftest import noise


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"])
def test_every_mode(mode, tmp_path):
    if mode == "LAB":
        image = Image.new("LAB", (20, 10), (128, 128, 128))
    elif mode == "I;16":
        image = Image.fromarray(np.full((10, 20), 65535, dtype=np.uint16))
    else:
        image = noise(0, 20).resize((20, 10)).convert("RGBA" if mode == "LA" else mode if mode != "I;16" else "L")
        image = image.convert("LA") if mode == "LA" else image
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == (20, 10)
    if mode not in ("LAB", "I;16"):
        assert np.ptp(np.asarray(rgb)) > 100


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 255], np.int32, [0, 255]),
        ([0, 128], np.int32, [0, 128]),
        ([0, 4095], np.uint16, [0, 255]),
        ([0, 32768, 65535], np.uint16, [0, 127, 255]),
        ([0, 0.5, 1], np.float32, [0, 127, 255]),
        ([-5, 1e9, float("nan")], np.float32, [0, 255, 0]),
    ],
)
def test_deep_greys_are_scaled_to_the_range_that_holds_them(values, dtype, expected):
    image = Image.fromarray(np.array([values], dtype=dtype))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == expected


def test_transparent_is_white():
    assert to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (10, 20)


@pytest.mark.parametrize("size", [(1, 1), (10000, 50), (50, 10000), (64, 64), (65, 63), (7, 300)])
def test_every_size(size):
    tile = make_tiles(Image.new("RGB", size, (255, 255, 255)), 64)
    assert tile.shape == (1, 3, 64, 64) and tile.dtype == torch.uint8
    white = (tile[0, 0] == 255).sum(0)
    assert white.max() == max(1, round(64 * size[1] / max(size)))


def test_pixels_are_normalised_like_siglip():
    image = noise(3, 8)
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255 - 0.5) / 0.5
    assert (normalize(make_tiles(image, 8))[0] - expected).abs().max() < 1e-6


def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "a.avif").write_bytes(b"")

    def fail(path):
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ValueError, match=r"a.avif cannot be read as an image: Failed to decode"):
        open_image(tmp_path / "a.avif")


def test_what_is_no_image_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no image file .*missing.png"):
        open_image(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text.png cannot be read as an image"):
        open_image(tmp_path / "text.png")
    noise(0, 64).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut.png cannot be read as an image"):
        open_image(tmp_path / "cut.png")
