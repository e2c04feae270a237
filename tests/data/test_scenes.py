"""The drawn scenes: reproducible, truthful, balanced, and without leaks between splits."""

import hashlib
import itertools
import math
import random
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from nanovlm.data import scenes
from nanovlm.data.boxes import contains, read_boxes, read_places
from nanovlm.data.scene_pixels import blend
from nanovlm.data.scenes import COLORS, HELD_OUT, SEEN, SHAPES, SPLITS, Scenes, draw
from nanovlm.presets import PRESETS


@pytest.mark.parametrize(
    ("split", "image", "texts"),
    [
        ("train", "4301ce58ddf87a8b", "535341cf3dd4dea1"),
        ("test", "5c45fc4cbb3ec00a", "4576c67b55596cb5"),
        ("compositional", "d4f276e83d1272fe", "1f88644b03ad8d93"),
    ],
)
def test_same_on_any_machine(split, image, texts):
    scene = draw(split, 7)
    assert scene["images"][0].tobytes() == draw(split, 7)["images"][0].tobytes()
    assert hashlib.sha256(scene["images"][0].tobytes()).hexdigest()[:16] == image
    assert hashlib.sha256(repr(scene["texts"]).encode()).hexdigest()[:16] == texts


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_pairs_are_only_in_the_compositional_split(split):
    held_out = [f"{color} {shape}" for color, shape in HELD_OUT]
    shown = Counter()
    for i in range(300):
        scene = draw(split, i)
        mentioned = " ".join(text["user"] + " " + text["assistant"] for text in scene["texts"])
        shown[any(pair in mentioned for pair in held_out)] += 1
    assert shown == ({True: 300} if split == "compositional" else {False: 300})


def test_every_color_and_shape_keeps_partners():
    for value in (*COLORS, *SHAPES):
        assert sum(value in pair for pair in SEEN) >= 4


def compose(split, i):
    return scenes._compose(random.Random(f"{split} {i}"), split == "compositional")


def find(scene, name):
    """The one object that fits "circle", "red object" or "red circle"."""
    wanted = {word for word in name.split() if word != "object"}
    (found,) = [o for o in scene.objects if wanted <= set(o.pair)]
    return found


def test_answers_agree_with_the_objects():
    """Work every answer out again from the objects alone."""
    seen = Counter()
    for split, i in itertools.product(SPLITS, range(300)):
        scene, texts = compose(split, i), draw(split, i)["texts"]
        names = [o.name for o in scene.objects]
        for text in texts:
            q, a, kind = text["user"].rstrip("?"), text["assistant"], text["kind"]
            words = q.split()
            if kind == "color":
                assert [o.color for o in scene.objects if o.shape == words[-1]] == [a]
            elif kind == "shape":
                assert [o.shape for o in scene.objects if o.color == words[-2]] == [a]
            elif kind == "count":
                what = words[2].removesuffix("es") if words[2] == "crosses" else words[2].removesuffix("s")
                assert sum(what in ("object", *o.pair) for o in scene.objects) == int(a)
            elif kind == "existence":
                assert (" ".join(words[-2:]) in names) == (a == "yes")
            elif kind == "position":
                o = find(scene, q.removeprefix("where is the "))
                column, row = int(o.x * 3 // 48), int(o.y * 3 // 48)
                words = [("top", "", "bottom")[row], ("left", "", "right")[column]]
                assert a == (" ".join(w for w in words if w) or "center")
            elif kind == "relation":
                first, second = (
                    find(scene, name) for name in q.removeprefix("where is the ").split(" relative to the ")
                )
                dx, dy = first.x - second.x, first.y - second.y
                assert {"left": -dx, "right": dx, "above": -dy, "below": dy}[a] == max(abs(dx), abs(dy))
            elif kind == "digits":
                assert str(scene.digit.digit) == a
            elif kind == "caption":
                assert all(name in a for name in names) and a.count(" at the ") == len(names)
            seen[kind] += 1
    assert set(seen) == set(scenes.QUESTIONS)


def test_training_scenes_practise_what_is_hard():
    numbers = Counter(text["kind"] for i in range(600) for text in draw("train", i)["texts"])
    possible = Counter()
    for i in range(600):
        rng, scene = random.Random(i), compose("train", i)
        possible.update({kind: min(len(ask(rng, scene, scene.objects)), 3) for kind, ask in scenes.QUESTIONS.items()})
    assert numbers["relation"] == pytest.approx(possible["relation"], rel=0.02)
    assert numbers["existence"] == numbers["count"] == 600
    for kind, share in (("digits", 0.5), ("caption", 0.1)):
        assert abs(numbers[kind] / 600 - share) < 0.05, kind


def test_pictures_show_the_objects():
    """The pixel at an object's centre has its colour; nothing overlaps or leaves the picture."""
    for i in range(100):
        scene, image = compose("test", i), np.asarray(draw("test", i)["images"][0], dtype=int)
        for o in scene.objects:
            nearest = min(COLORS, key=lambda c: np.abs(image[int(o.y), int(o.x)] - COLORS[c]).sum())
            assert nearest == o.color
        things = [*scene.objects, scene.digit]
        for a, b in itertools.combinations(things, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
        assert all(o.radius <= o.x <= 48 - o.radius and o.radius <= o.y <= 48 - o.radius for o in scene.objects)


@pytest.fixture(scope="module")
def answers():
    """Answers of 40,000 undrawn scenes by kind and by question."""
    by_kind = defaultdict(lambda: defaultdict(Counter))
    rng = random.Random(0)
    for _ in range(40000):
        scene = scenes._compose(rng, compositional=False)
        for kind, ask in scenes.QUESTIONS.items():
            for question, answer in dict(ask(rng, scene, scene.objects)).items():
                by_kind[kind][question][answer] += 1
    return by_kind


@pytest.mark.parametrize(
    ("kind", "chances"),
    [("color", 5), ("shape", 4), ("count", 3), ("position", 9), ("existence", 2), ("relation", 4), ("digits", 10)],
)
def test_no_question_gives_its_answer_away(answers, kind, chances):
    """The commonest answer to a question is hardly commoner than a fair draw from the least number of answers."""
    common = {question: counts for question, counts in answers[kind].items() if sum(counts.values()) >= 100}
    assert sum(map(Counter.total, common.values())) > 10000
    for question, counts in common.items():
        n = sum(counts.values())
        commonest = counts.most_common(1)[0][1]
        spread = math.sqrt(n / chances * (1 - 1 / chances))
        assert commonest <= n / chances + 4 * spread, (question, counts)


def test_relations_are_balanced_over_all_texts(answers):
    total = sum(answers["relation"].values(), Counter())
    assert max(total.values()) / sum(total.values()) < 0.28


def test_a_scene_is_a_record_like_public_data():
    scene = draw("test", 0)
    assert scene["independent"] is True
    assert scene["images"][0].size == (48, 48) and scene["images"][0].mode == "RGB"
    assert all({"user", "assistant"} <= set(text) for text in scene["texts"])
    kinds = Counter(text["kind"] for text in scene["texts"])
    assert max(kinds.values()) == 1
    with pytest.raises(ValueError, match="unknown split 'tset'"):
        draw("tset", 0)
    with pytest.raises(ValueError, match="scenes has no split 'tset'; there are train, test, compositional"):
        Scenes("tset")


def test_a_lesson_asks_its_kinds_alone():
    """Without one, training scenes, like held-out ones, are asked everything but what only lessons ask."""

    def kinds(split, lesson=()):
        texts = [draw(split, i, lesson)["texts"] for i in range(200)]
        assert all(texts)  # never a scene without a question
        return {text["kind"] for one in texts for text in one}

    assert kinds("train") == kinds("test") == set(scenes.QUESTIONS) < set(scenes.LESSON_KINDS)
    for source in PRESETS["scenes"]().data.sources[:-1]:
        lesson = tuple(source.removeprefix("scenes:").split(","))
        assert kinds("train", lesson) == set(lesson)
        assert Scenes("train", kinds=lesson).read(3)["texts"] == draw("train", 3, lesson)["texts"]
        assert draw("train", 3, lesson)["images"][0] != draw("train", 3)["images"][0]


def test_a_lesson_asks_for_all_there_is(monkeypatch):
    composed, compose = [], scenes._compose
    monkeypatch.setattr(scenes, "_compose", lambda *a, **b: composed.append(compose(*a, **b)) or composed[-1])
    for i in range(50):
        texts = draw("train", i, ("position", "cells"))["texts"]
        scene = composed[-1]
        places = [text["assistant"] for text in texts if text["kind"] == "position"]
        assert places == [scenes.CELLS[o.cell] for o in scene.objects if scenes._names(o, scene)]
        cells = {text["user"]: text["assistant"] for text in texts if text["kind"] == "cells"}
        assert len(cells) == len(scene.objects) + 2  # the digit, and an empty one
        for o in scene.objects:
            assert cells.pop(f"what is at the {scenes.CELLS[o.cell]}?").split()[1:] == [o.color, o.shape]
        assert cells.pop(f"what is at the {scenes.CELLS[scene.digit.cell]}?") == f"the digit {scene.digit.digit}"
        assert [*cells.values()] == ["nothing"]


def test_scenes_are_written_to_a_folder(tmp_path):
    command = [sys.executable, "-m", "nanovlm.data.scenes", str(tmp_path / "new" / "folder"), "--num", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "wrote 3 test scenes" in done.stdout
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {"0.png", "1.png", "2.png", "questions.jsonl"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        scenes.main(tmp_path / "file")


def test_boxes_and_points_are_those_of_the_pixels(monkeypatch):
    """Each answer is about one object, and its box ends where the object's pixels do."""
    composed, compose = [], scenes._compose
    monkeypatch.setattr(scenes, "_compose", lambda *a, **b: composed.append(compose(*a, **b)) or composed[-1])
    seen = Counter()
    for i in range(40):
        texts = draw("train", i, ("box", "point"))["texts"]
        scene = composed[-1]
        objects = [o for o in scene.objects if scenes._names(o, scene)]
        boxes, points = texts[: len(objects)], texts[len(objects) :]
        for o, box, point in zip(objects, boxes, points, strict=True):
            black = np.zeros((48, 48, 3), np.float32)
            alone = np.asarray(blend(random.Random(0), black, [o], [(255, 255, 255)]))
            rows, columns = np.nonzero(alone.min(axis=2) > 128)
            (read,) = read_boxes(box["assistant"])
            edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert np.abs(np.array(read) * 48 - edges).max() < 1.5, o
            assert (box["kind"], point["kind"]) == ("box", "point")
            assert find(scene, box["user"].removeprefix("draw a box around the ").rstrip(".")) is o
            assert find(scene, point["user"].removeprefix("point at the ").rstrip(".")) is o
            (place,) = read_places(point["assistant"])
            assert contains(read, place) and "references" not in box and point["references"] == [box["assistant"]]
            seen[o.shape] += 1
        in_tokens = draw("train", i, ("box_tokens", "point_tokens"))["texts"]
        assert all(text["kind"].endswith("_tokens") and "<loc" in text["assistant"] for text in in_tokens)
    assert len(seen) == len(SHAPES)
