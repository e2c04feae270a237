"""A heat map lies where the pixels of its image tokens were taken from."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from nanovlm.config import TilingConfig
from nanovlm.data.images import TilePlace, make_tiles, place_tiles
from nanovlm.data.tilings import TILING
from nanovlm.infer.look_sheet import MOST_TOKENS, draw_heat, draw_look, heat_map
from tests.conftest import TINY, noise


@pytest.mark.parametrize("is_whole", [False, True], ids=["tiles", "whole"])
@pytest.mark.parametrize("corner", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (150, 64), (60, 130)], ids=str)
@pytest.mark.parametrize("policy", TILING)
def test_attention_to_a_marked_corner_lies_on_it(policy, size, corner, is_whole):
    """The one token whose pixels are white gets all the attention, in a grid of tiles or in the view of the whole.

    The corner is that of what is seen: of the middle, where the rest is cut off.
    """
    config = dataclasses.replace(TINY, tiling=TilingConfig(policy, max_tiles=12, longest_edge=64))
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    seen = [min(size)] * 2 if policy == "crop" else size
    x, y = ((n - m) // 2 + at * (m - m // 4 - 1) for at, n, m in zip(corner, size, seen, strict=True))
    pixels[y : y + seen[1] // 4, x : x + seen[0] // 4] = 255
    tiles, places = make_tiles(Image.fromarray(pixels), config), place_tiles(*size, config)
    chosen = [i for i, place in enumerate(places) if place.is_whole == is_whole]
    if not chosen:
        assert policy in ("square", "gemma", "paligemma", "crop", "native", "qwen") and is_whole
        return
    n = math.isqrt(config.num_image_features)
    side = config.tile_size // n
    is_white = (tiles[chosen] > 150).all(1).float()
    white = is_white.unflatten(-1, (n, side)).unflatten(1, (n, side)).mean((2, 4)).flatten(1)
    weights = torch.zeros_like(white)
    weights.view(-1)[white.argmax()] = 0.25
    heat = heat_map(weights, [places[i] for i in chosen], size)
    assert heat.shape == size[::-1] and 0 < heat.mean() <= 0.2501
    token = [(end - start) / n for start, end in (places[chosen[0]][0:3:2], places[chosen[0]][1:4:2])]
    for axis, first in ((0, x), (1, y)):
        n, m = size[axis], seen[axis]
        along = heat.sum(axis)
        center = (along * (torch.arange(n) + 0.5)).sum() / along.sum()
        assert abs(center - first - m // 4 / 2) <= m // 4 / 2 + token[axis] * n / 2


def test_the_mean_of_a_map_is_what_lies_on_the_picture():
    weights = torch.rand(3, 9)
    places = [TilePlace(0, 0, 0.5, 1, False), TilePlace(0.5, 0, 1, 1, False), TilePlace(0, 0, 1, 1, True)]
    heat = heat_map(weights, places, (17, 31))
    torch.testing.assert_close(heat.mean(), weights.sum())
    assert heat_map(weights[:1], [TilePlace(-0.5, 0, 0.5, 1, False)], (16, 16)).mean() < weights[0].sum() - 0.01


def test_heat_is_colored_and_the_rest_is_not():
    heat = torch.zeros(8, 8)
    heat[2, 5] = 1
    drawn = np.asarray(draw_heat(Image.new("RGB", (8, 8), (90, 90, 90)), heat, 1.0)).astype(int)
    assert drawn[2, 5, 0] - drawn[2, 5, 1] > 80
    drawn[2, 5] = drawn[0, 0]
    assert (drawn == drawn[0, 0]).all() and np.ptp(drawn[0, 0]) == 0
    blank = draw_heat(Image.new("RGB", (8, 8)), torch.zeros(8, 8), 0.0)
    assert len(set(blank.get_flattened_data())) == 1


def test_a_sheet_of_several_pictures_and_many_tokens():
    images = [noise(0, 100).resize((90, 40)), noise(1)]
    config = dataclasses.replace(TINY, tiling=TilingConfig("fit", max_tiles=4))
    places = [place_tiles(*image.size, config) for image in images]
    weights = torch.rand(40, sum(map(len, places)) * 4)
    texts = ["a"] * 20 + ["", "\n", "日本", "w" * 99, *["b"] * 16]
    sheet = Image.open(io.BytesIO(draw_look(images, places, weights, texts, ["what?" * 5, "line\n" * 50])))
    fewer = draw_look(images, places, weights[:MOST_TOKENS], texts[:MOST_TOKENS], ["what?" * 5, "line\n" * 50])
    assert np.array_equal(np.asarray(sheet), np.asarray(Image.open(io.BytesIO(fewer))))
    one = Image.open(io.BytesIO(draw_look(images[:1], places[:1], weights[:1, : 4 * len(places[0])], ["a"], ["?"])))
    assert one.width < sheet.width and one.height < sheet.height


def test_a_small_picture_beside_a_large_one_can_be_seen():
    """The longer side of each is as long."""
    images = [Image.new("RGB", size, (200, 0, 0)) for size in ((2000, 1000), (48, 48))]
    places = [[TilePlace(0, 0, 1, 1, False)] for _ in images]
    sheet = Image.open(io.BytesIO(draw_look(images, places, torch.zeros(1, 8), ["a"], ["?"])))
    red = (np.asarray(sheet) == (200, 0, 0)).all(-1)
    columns = red.sum(0)
    assert set(columns.tolist()) == {0, 80, 160}
    assert (columns == 80).sum() == (columns == 160).sum() == 160
