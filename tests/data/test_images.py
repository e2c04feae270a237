"""Images of every mode and size become tiles; what is no image is named."""

import dataclasses
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm.config import TilingConfig
from nanovlm.data import images
from nanovlm.data.images import (
    decode_image,
    make_tiles,
    marker_tokens,
    open_image,
    place_tiles,
    plan_tiles,
    to_rgb,
)
from nanovlm.data.places import count_places
from nanovlm.data.tile_plan import TilePlan, find_grid
from nanovlm.data.tilings import TILING, _resize
from nanovlm.model.vision import normalize
from tests.conftest import TINY, noise


def square(image_size, **tiling):
    """The config of an encoder that reads tiles of this size."""
    vision = dataclasses.replace(TINY.vision, image_size=image_size)
    return dataclasses.replace(TINY, vision=vision, tiling=TilingConfig(**tiling))


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
    tile = make_tiles(Image.new("RGB", size, (255, 255, 255)), square(64))
    assert tile.shape == (1, 3, 64, 64) and tile.dtype == torch.uint8
    white = (tile[0, 0] == 255).sum(0)
    assert white.max() == max(1, round(64 * size[1] / max(size)))


def test_pixels_are_normalised_like_siglip():
    image = noise(3, 8)
    expected = (torch.from_numpy(np.array(image)).permute(2, 0, 1).double() / 255 - 0.5) / 0.5
    assert (normalize(make_tiles(image, square(8)))[0] - expected).abs().max() < 1e-6


def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "a.avif").write_bytes(b"")

    def fail(path, **options):
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


def save(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_cut_off_file_is_named_or_read_whole(format):
    data = save(noise(0, 40), format)
    whole = decode_image(data).tobytes()
    for length in range(0, len(data), max(1, len(data) // 60)):
        try:
            assert decode_image(data[:length], "photo 7").tobytes() == whole
        except ValueError as error:
            assert str(error).startswith("photo 7 cannot be read as an image: ") and "\n" not in str(error)


def test_an_image_of_too_many_pixels_is_not_decoded(monkeypatch):
    data = save(noise(0, 10), "PNG")
    assert decode_image(data, "x", most_pixels=100).size == (10, 10)
    monkeypatch.setattr(images, "to_rgb", lambda _image: 1 / 0)
    with pytest.raises(ValueError, match="it has 100 pixels, more than the 99 that are left"):
        decode_image(data, "x", most_pixels=99)


def test_a_bomb_is_refused(monkeypatch):
    data = save(Image.new("1", (100, 100)), "PNG")
    for limit in (9999, 4999):  # above the limit PIL warns, above twice the limit it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"image cannot .*: it has 10000 pixels, more than data.max_pixels = "):
            decode_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10000)
    assert decode_image(data).size == (100, 100)


def test_files_of_many_kinds():
    red, blue = Image.new("RGB", (6, 4), "red"), Image.new("RGB", (6, 4), "blue")
    animation = save(red.convert("P"), "GIF", save_all=True, append_images=[blue.convert("P")])
    assert decode_image(animation).getpixel((0, 0)) == (255, 0, 0)
    assert np.abs(np.array(decode_image(save(red.convert("CMYK"), "JPEG")), int) - [254, 0, 0]).max() <= 3
    assert decode_image(save(red.convert("P"), "PNG")).getpixel((5, 3)) == (255, 0, 0)
    assert decode_image(save(Image.new("RGBA", (6, 4), (255, 0, 0, 0)), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 6), 65535, np.uint16))
    assert decode_image(save(deep, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    exif = red.getexif()
    exif[0x0112] = 6
    assert decode_image(save(red, "JPEG", exif=exif)).size == (4, 6)
    assert decode_image(save(Image.new("RGB", (10000, 50)), "PNG")).size == (10000, 50)
    assert decode_image(save(Image.new("L", (1, 1)), "PNG")).size == (1, 1)


def test_no_pixels_no_image():
    for size in [(0, 0), (0, 5), (5, 0)]:
        with pytest.raises(ValueError, match=f"an image of {size[0]} x {size[1]} has no pixels"):
            to_rgb(Image.new("RGB", size))
        with pytest.raises(ValueError, match="has no pixels"):
            plan_tiles(*size, TINY)


def random_sizes(seed, number, longest):
    """Sizes of all magnitudes, and extreme ones."""
    rng = random.Random(seed)
    sizes = [(1, 1), (1, 900), (900, 1), (3000, 15), (15, 3000), (63, 64), (64, 65), (65, 64), (128, 129)]
    return sizes + [tuple(round(longest ** rng.random()) for _ in "wh") for _ in range(number)]


@pytest.mark.parametrize("size", [(640, 480), (300, 500), (97, 64), (1000, 240), (40, 700), (64, 64)])
@pytest.mark.parametrize("scale", [0.03, 0.1, 0.3, 0.7, 1, 1.9])
def test_resizing_is_as_exact_as_that_of_pil(size, scale):
    image = noise(1, 8).resize(size, Image.Resampling.BICUBIC)  # smooth, as photographs are
    new_size = tuple(max(1, round(edge * scale)) for edge in size)
    ours = _resize(image, new_size).double()
    theirs = torch.from_numpy(np.array(image.resize(new_size, Image.Resampling.BICUBIC, reducing_gap=3.0))).double()
    x = torch.from_numpy(np.array(image)).double().permute(2, 0, 1)[None]
    exact = torch.nn.functional.interpolate(x, new_size[::-1], mode="bicubic", antialias=True)
    exact = exact.clamp(0, 255)[0].permute(1, 2, 0)
    assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + 0.5
    difference = (ours - theirs).abs()
    assert difference.max() <= 2 and (difference > 1).double().mean() < 1e-3


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (64, 64), (64, 1), (65, 10), (300, 200), (7, 4000)])
def test_one_tile_is_the_image_scaled_to_fit(size):
    """The formula of the first release: a model trained with it goes on seeing the same pixels, to 1/255."""
    image = noise(1, 64).resize(size)
    tile = make_tiles(image, square(64))
    fitted = image.resize([max(1, round(x * 64 / max(size))) for x in size], Image.Resampling.BICUBIC, reducing_gap=3.0)
    expected = Image.new("RGB", (64, 64), (128, 128, 128))
    expected.paste(fitted, ((64 - fitted.width) // 2, (64 - fitted.height) // 2))
    difference = tile[0].int() - torch.from_numpy(np.array(expected).transpose(2, 0, 1)).int()
    assert difference.abs().max() <= 1
    if max(size) <= 64:
        assert torch.equal(make_tiles(image, square(64, max_tiles=9)), tile)


@pytest.mark.parametrize(
    ("size", "max_tiles", "plan"),
    [
        ((32, 32), 9, TilePlan(64, 64, 1, 1, False)),
        ((64, 128), 2, TilePlan(64, 128, 2, 1, True)),
        ((65, 64), 9, TilePlan(65, 64, 1, 2, True)),
        ((129, 100), 9, TilePlan(129, 100, 2, 3, True)),
        ((640, 640), 9, TilePlan(192, 192, 3, 3, True)),
        ((640, 640), 8, TilePlan(128, 128, 2, 2, True)),
        ((640, 640), 2, TilePlan(64, 64, 1, 1, False)),
        ((10000, 50), 4, TilePlan(256, 1, 1, 4, True)),
        ((50, 10000), 4, TilePlan(1, 256, 4, 1, True)),
        ((6400, 64), 5, TilePlan(320, 3, 1, 5, True)),
    ],
)
def test_fit_takes_the_smallest_grid_that_keeps_the_detail(size, max_tiles, plan):
    assert plan_tiles(*size, square(64, max_tiles=max_tiles)) == plan


def test_fit_against_a_search_over_all_grids():
    for width, height in random_sizes(0, 300, 1000):
        for max_tiles in (1, 2, 5, 12):
            plan = plan_tiles(width, height, square(64, max_tiles=max_tiles))
            scales = {
                (r, c): min(r * 64 / height, c * 64 / width, 1)
                for r in range(1, 13)
                for c in range(1, max_tiles // r + 1)
            }
            best = max(scales.values())
            assert scales[plan.rows, plan.cols] == best
            assert plan.rows * plan.cols == min(r * c for (r, c), scale in scales.items() if scale == best)
            assert plan.width <= plan.cols * 64 and plan.height <= plan.rows * 64
            assert plan.has_global == (plan.rows * plan.cols > 1)


def test_fit_tiles_put_together_are_the_image_on_grey_and_the_whole_is_last():
    image = noise(4, 100).resize((150, 70))
    tiles = make_tiles(image, square(64, max_tiles=6))
    assert tiles.shape == (7, 3, 64, 64)
    grid = torch.cat([torch.cat(list(tiles[r : r + 3]), dim=2) for r in (0, 3)], dim=1)
    top, left = (128 - 70) // 2, (192 - 150) // 2
    inside = grid[:, top : top + 70, left : left + 150]
    assert torch.equal(inside, torch.from_numpy(np.array(image).transpose(2, 0, 1)))
    assert int((grid == 128).all(0).sum()) >= 128 * 192 - 70 * 150
    assert torch.equal(tiles[6:], make_tiles(image, square(64)))


@pytest.mark.parametrize(("longest_edge", "tile"), [(256, 64), (240, 64), (64, 64), (40, 64), (151, 50), (5000, 2048)])
def test_idefics3_tiles_are_those_of_transformers(longest_edge, tile):
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    theirs = Idefics3ImageProcessorPil(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": tile}, return_row_col_info=True, **half
    )
    config = square(tile, policy="idefics3", longest_edge=longest_edge)
    sizes = random_sizes(longest_edge, 60, 900) if tile < 1000 else [(3000, 15), (63, 64)]
    for i, size in enumerate(sizes):
        image = noise(i, 64).resize(size)
        expected = theirs(image, return_tensors="pt")
        plan, tiles = plan_tiles(*size, config), make_tiles(image, config)
        grid = (plan.rows, plan.cols) if plan.has_global else (0, 0)
        assert (expected["rows"][0][0], expected["cols"][0][0]) == grid, size
        assert len(tiles) == plan.num_tiles == expected["pixel_values"].shape[1], size
        assert torch.equal(((expected["pixel_values"][0] + 1) * 127.5).round().to(torch.uint8), tiles), size
        assert torch.allclose(expected["pixel_values"][0], normalize(tiles), atol=1e-6), size


def test_crop_cuts_as_clip_does():
    """To the bit but where a pixel lies between two values; of any aspect ratio, without computing what is cut off."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = square(20, policy="crop")
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=20, image_mean=[0] * 3, image_std=[1] * 3)
    for i, size in enumerate([(20, 20), (40, 40), (64, 30), (31, 100), (7, 9), (300, 7)]):
        image = noise(i).resize(size)
        expected = (theirs(image, return_tensors="pt")["pixel_values"] * 255).round()
        found = make_tiles(image, config)
        assert found.shape == (1, 3, 20, 20) and (found - expected).abs().max() <= 1, size
    assert make_tiles(Image.new("RGB", (1, 65535), "red"), config)[0, 0].eq(255).all()


@pytest.mark.parametrize("policy", TILING)
@pytest.mark.parametrize(("tile", "longest_edge"), [(16, 63), (15, 45), (40, 40)])
def test_markers_are_all_that_layouts_write(policy, tile, longest_edge):
    if policy == "nanovlm":  # whole tiles
        tile, longest_edge = {63: (16, 64), 45: (8, 8), 40: (16, 32)}[longest_edge]
    config = square(tile, policy=policy, longest_edge=longest_edge, max_tiles=7)
    markers, written = marker_tokens(config), set()
    for width, height in random_sizes(2, 400, 300):
        if policy == "qwen" and max(width, height) > 200 * min(width, height):  # refused
            continue
        plan = plan_tiles(width, height, config)
        text = TILING[policy].layout(plan, "@", config)
        expected = count_places(config, [find_grid(plan)])[0] if policy == "anyres" else plan.num_tiles
        assert text.count("@") == expected
        written |= {f"<{piece.split('>')[0]}>" for piece in text.split("<")[1:]}
    assert written == set(markers) and len(markers) == len(written)


def test_mistakes_in_the_tiling_are_named():
    with pytest.raises(ValueError, match=r"tiling.max_tiles = 0 must be at least 1"):
        square(16, max_tiles=0).validate()
    with pytest.raises(ValueError, match=r"tiling.policy = 'navit' is unknown; there are fit, idefics3"):
        plan_tiles(5, 5, square(16, policy="navit"))


def test_a_sliver_has_a_tile():
    """8 x 15012 pixels at a longest edge of 1648: the short side is rounded to nothing, and becomes one tile."""
    vision = dataclasses.replace(TINY.vision, image_size=16)
    config = dataclasses.replace(TINY, vision=vision, tiling=TilingConfig(policy="idefics3", longest_edge=1648))
    for size in ((8, 15012), (15012, 8)):
        plan = plan_tiles(*size, config)
        assert sorted((plan.rows, plan.cols)) == [1, 103]


def test_to_rgb_in_strips_is_to_rgb_at_once(monkeypatch):
    """Memory is saved by converting some rows at a time, and no pixel may change."""
    generator = np.random.default_rng(0)
    deep = generator.integers(0, 60000, (37, 23)).astype(np.uint16)
    rgba = Image.fromarray(generator.integers(0, 256, (37, 23, 4)).astype(np.uint8))
    monkeypatch.setattr(images, "STRIP", 10**9)
    greys = [Image.fromarray(deep), Image.fromarray(deep.astype(np.int32)), Image.fromarray(deep.astype(np.float32))]
    greys.append(Image.fromarray(np.where(deep > 30000, np.nan, deep / 60000).astype(np.float32)))
    whole = [to_rgb(image) for image in (*greys, rgba)]
    expected = np.round(deep.astype(np.float64) / 65535 * 255 - 0.5).astype(int)  # cut off, as astype does
    assert np.abs(np.asarray(whole[0])[..., 0] - expected).max() <= 1
    assert np.array_equal(whole[-1], Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    for strip in (1, 23, 50, 400):
        monkeypatch.setattr(images, "STRIP", strip)
        for image, before in zip((*greys, rgba), whole, strict=True):
            assert np.array_equal(to_rgb(image), before)


def test_an_image_longer_than_any_camera_makes_is_refused():
    with pytest.raises(ValueError, match=r"an image of 70000 x 1 has a side of more than 65535 pixels"):
        decode_image(save(Image.new("1", (70000, 1)), "PNG"))
    assert decode_image(save(Image.new("1", (65535, 1)), "PNG")).size == (65535, 1)


def test_no_format_runs_a_program():
    """PIL would start Ghostscript for an EPS file, by whatever name."""
    eps = save(noise(0, 8), "EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(ValueError, match="have no format that is read"):
        decode_image(eps)


@pytest.mark.parametrize("size", [(16, 16), (100, 64), (40, 130), (300, 7), (250, 250)])
@pytest.mark.parametrize(("side", "patch_size"), [(20, 4), (22, 5)])  # the last 2 pixels of 22 are in no token
@pytest.mark.parametrize("policy", TILING)
def test_a_token_lies_where_its_pixels_are(policy, side, patch_size, size):
    """Red and green of the picture are its own x and y, so a tile's pixels say what part of the picture they show."""
    config = square(side, policy=policy, max_tiles=6, longest_edge=4 * side)
    vision = dataclasses.replace(config.vision, patch_size=patch_size)
    config = dataclasses.replace(config, vision=vision)
    width, height = size
    x, y = ((np.arange(n) + 0.5) / n * 255 for n in size)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = x, y[:, None]
    tiles, places = make_tiles(Image.fromarray(pixels), config), place_tiles(width, height, config)
    assert len(places) == len(tiles)
    assert sum(place.is_whole for place in places) == plan_tiles(width, height, config).has_global
    grid, seen = config.tile_size // patch_size, 0
    for tile, place in zip(tiles.float(), places, strict=True):
        for row, col in np.ndindex(grid, grid):
            red, green, blue = tile[:, row * patch_size + patch_size // 2, col * patch_size + patch_size // 2]
            at = (
                place.left + (col + (patch_size // 2 + 0.5) / patch_size) / grid * (place.right - place.left),
                place.top + (row + (patch_size // 2 + 0.5) / patch_size) / grid * (place.bottom - place.top),
            )
            # So far from the edge, where the filter reaches beyond the image, and so exact, as pixels are rounded.
            near = [2 * max(1 / n, edge) for n, edge in zip(size, _pixel(place, grid * patch_size), strict=True)]
            if all(edge < fraction < 1 - edge for fraction, edge in zip(at, near, strict=True)):
                seen += 1
                assert blue == 0
                for color, fraction, edge in zip((red, green), at, near, strict=True):
                    assert abs(color / 255 - fraction) < edge / 3 + 0.01
            elif not all(-edge < fraction < 1 + edge for fraction, edge in zip(at, near, strict=True)):
                assert (red, green, blue) == ((0,) if policy == "anyres" else (128,)) * 3
    assert seen or 7 in size


def _pixel(place, shown):
    """Width and height of a pixel of a tile that shows so many a side, in fractions of the image."""
    return (place.right - place.left) / shown, (place.bottom - place.top) / shown
