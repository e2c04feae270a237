"""The data of the recipes of post-training, and that the recipes themselves run."""

from collections import Counter

import numpy as np
import pytest

from benchmarks.recipe_data import GERMAN_CELLS, GERMAN_COLORS, find_objects, make_german, make_pair, write
from nanovlm.data.records import to_sample
from nanovlm.data.scenes import COLORS, SHAPES, draw
from nanovlm.data.sources import open_source


@pytest.mark.parametrize("split", ["train", "test", "compositional"])
def test_every_question_has_a_german_one(split):
    """Of the same kind, in the same order, and no English colour, shape or place is left."""
    left = set(COLORS) - {"orange"} | set(SHAPES) | {"top", "bottom", "center", "there", "what"}
    for index in range(40):
        scene, german = draw(split, index), make_german(split, index)
        asked = [turn for turn in scene["texts"] if turn["kind"] != "caption"]
        assert [turn["kind"] for turn in german["texts"]] == [turn["kind"] for turn in asked]
        words = " ".join(turn["user"] + " " + turn["assistant"] for turn in german["texts"])
        assert not left & set(words.replace("?", " ").replace(",", " ").split()), words
        assert len({turn["user"] for turn in german["texts"]}) == len({turn["user"] for turn in asked})


def test_answers_stay_apart():
    assert len({*GERMAN_COLORS.values()}) == 6 and len({*GERMAN_CELLS.values()}) == 9


def test_the_other_style_is_another_picture_of_the_same_things():
    before, after = (
        np.asarray(x, dtype=float) for x in (draw("train", 0)["images"][0], make_german("train", 0)["image"])
    )
    assert before.shape == after.shape and abs(before - after).mean() > 20


def test_a_rejected_caption_names_one_object_that_is_not_there():
    added, replaced = 0, 0
    for index in range(200):
        pair = make_pair("train", index)
        true, false = (Counter(find_objects(pair[name])) for name in ("chosen", "rejected"))
        assert (false - true).total() == 1 and (true - false).total() <= 1, pair
        added, replaced = added + (true <= false), replaced + (not true <= false)
        ends = [pair[name].rpartition(" and the digit ")[1:] for name in ("chosen", "rejected")]
        assert ends[0] == ends[1] and pair["rejected"].count(" and ") == 1
    assert min(added, replaced) > 60


def test_what_is_written_reads_as_a_source(tmp_path):
    [record] = list(map(open_source(str(write(tmp_path, "german", "test", 1))).read, [0]))
    sample = to_sample(record)
    assert sample.independent and sample.images[0].size == (48, 48) and sample.messages[1]["content"]
