"""Boxes and points as text: what is written is read, and overlaps are those of pixels."""

import dataclasses
import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from nanovlm.data.boxes import (
    Box,
    Point,
    contains,
    draw_places,
    iou,
    match_boxes,
    read_boxes,
    read_places,
    write_box,
    write_point,
)
from nanovlm.data.chat import Processor
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer, with_locations
from nanovlm.limits import time_limit
from tests.conftest import TINY


def random_box(rng):
    (left, right), (top, bottom) = (sorted(rng.sample(range(65), 2)) for _ in range(2))
    return Box(left / 64, top / 64, right / 64, bottom / 64)


@pytest.mark.parametrize(("form", "apart"), [("fractions", 0.0051), ("tokens", 1 / 1024)])
def test_what_is_written_is_read(form, apart):
    rng = random.Random(0)
    for _ in range(200):
        box, point = random_box(rng), Point(rng.random(), rng.random())
        said = f"a {write_box(box, form)} and {write_point(point, form)}."
        places = read_places(said)
        assert [type(place) for place in places] == [Box, Point]
        assert np.abs(np.subtract(places[0], box)).max() <= apart
        assert np.abs(np.subtract(places[1], point)).max() <= apart
    with pytest.raises(ValueError, match=r"the form of boxes = 'pixels' is unknown; there are fractions, tokens"):
        write_box(box, "pixels")


def test_location_tokens_are_those_of_paligemma():
    """y before x, each the 1024th of the picture that it lies in; the border belongs to the last."""
    assert write_box(Box(0.25, 0.0, 1.0, 0.5), "tokens") == "<loc0000><loc0256><loc0512><loc1023>"
    assert write_point((0.25, 0.75), "tokens") == "<loc0768><loc0256>"
    detected = "<loc0512><loc0000><loc1023><loc0512> cat ; <loc0000><loc0512><loc0512><loc1023><seg001> dog"
    assert read_places(detected) == [(0, 0.5, 0.5, 1023 / 1024), (0.5, 0, 1023 / 1024, 0.5)]


@pytest.mark.parametrize(
    ("said", "places"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", [(0.1, 0.2, 0.3, 0.4)]),
        ("at (0.5,.25)", [(0.5, 0.25)]),
        ('{"bbox_2d": [100, 200, 300, 400], "label": "cat"}', [(0.1, 0.2, 0.3, 0.4)]),  # Qwen2-VL
        ("<box>[[0, 0, 1000, 500]]</box>", [(0, 0, 1, 0.5)]),  # InternVL
        ('<point x="61.5" y="40.0" alt="cat">cat</point>', [(0.615, 0.4)]),  # Molmo
        ('<points x1="10" y1="20" x2="30" y2="40">cats</points>', [(0.1, 0.2), (0.3, 0.4)]),
        ("[0.3, 0.2, 0.1, 0.4]", []),  # no area
        ("[0.1, 0.2, 0.1, 0.4]", []),
        ("[100, 200, 300, 4000]", []),  # outside
        ("<loc1024><loc0000><loc0001><loc0002>", []),
        ("<loc0001><loc0000><loc0001>", []),  # neither a box nor a point
        ("[1, 2, 3]", []),
        ("the year 2024, at 0.5", []),
    ],
)
def test_places_of_other_models_are_read(said, places):
    assert len(read_places(said)) == len(places)
    assert all(place == pytest.approx(right) for place, right in zip(read_places(said), places, strict=True))
    assert read_boxes(said) == [place for place in read_places(said) if len(place) == 4]


def test_overlaps_are_those_of_pixels():
    rng, side = random.Random(0), 64
    row, col = (torch.arange(side) + 0.5) / side, (torch.arange(side) + 0.5) / side

    def paint(box):
        across, down = (col > box.left) & (col < box.right), (row > box.top) & (row < box.bottom)
        return down[:, None] & across[None]

    seen = set()
    for _ in range(300):
        a, b = random_box(rng), random_box(rng)
        shared, covered = (paint(a) & paint(b)).sum(), (paint(a) | paint(b)).sum()
        assert iou(a, b) == iou(b, a) == pytest.approx(float(shared / covered))
        point = Point(float(rng.choice(col)), float(rng.choice(row)))
        assert contains(a, point) == bool(paint(a)[int(point.y * side), int(point.x * side)])
        seen.add(iou(a, b) > 0)
    assert seen == {True, False} and iou(Box(0, 0, 0, 0), Box(0, 0, 0, 0)) == 0


def test_each_box_has_one_partner_and_the_nearest_first():
    true = [Box(0, 0, 0.5, 0.5), Box(0.5, 0.5, 1, 1)]
    said = [Box(0, 0, 0.5, 0.4), Box(0, 0, 0.5, 0.5), Box(0.9, 0.9, 1, 1)]
    assert match_boxes(said, true) == pytest.approx([1, 0.04])
    assert match_boxes(said[:1], true) == pytest.approx([0.8])
    assert match_boxes([], true) == match_boxes(said, []) == []


def test_places_are_drawn_where_they_are():
    data = draw_places(Image.new("RGB", (48, 24), "white"), [Box(0.25, 0.25, 0.75, 0.75), Point(0.9, 0.5)])
    pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=int)
    assert pixels.shape == (240, 480, 3)
    inked = (pixels.min(axis=2) < 200) & (pixels.max(axis=2) - pixels.min(axis=2) > 60)
    rows, columns = np.nonzero(inked[:, :400])
    assert abs(columns.min() - 0.25 * 479) <= 1 and abs(columns.max() - 0.75 * 479) <= 1
    assert abs(rows.min() - 0.25 * 239) <= 1 and abs(rows.max() - 0.75 * 239) <= 1
    assert not inked[85:155, 150:350].any()  # inside of the box
    assert inked[110:130, 410:].any()


def test_location_tokens_are_text_of_a_message():
    """As transformers' tokenizer, which keeps them whole; a control token that a person spells stays text."""
    transformers = pytest.importorskip("transformers")
    plain = train_tokenizer(["where is the cat? at the left"] * 9, 300)
    tokenizer, first = with_locations(plain), plain.get_vocab_size()
    assert tokenizer.get_vocab_size() == first + 1024 and tokenizer.token_to_id("<loc1023>") == first + 1023
    config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, vocab_size=first + 1024))
    processor = Processor(tokenizer, CHAT_TEMPLATE, config)
    answer = "<loc0000><loc0256><loc0512><loc1023> cat <|user|>"
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()))
    ids = processor.encode_answer(answer)
    assert ids[:4] == [first, first + 256, first + 512, first + 1023]
    bare, spelled = theirs("<loc0000><loc0256><loc0512><loc1023> cat ").input_ids, processor.encode_answer("<|user|>")
    assert ids == bare + spelled and tokenizer.token_to_id("<|user|>") not in ids
    assert processor.decode(ids) == answer
    again = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str())))  # as it is read from its file
    assert Processor(again, CHAT_TEMPLATE, config).encode_answer(answer) == ids


def test_a_text_of_digits_is_read_at_once():
    """Quadratic time would be minutes."""
    with time_limit(5, "reading"):
        assert read_places("[" + "1" * 100_000) == []
