"""The drawn clips: reproducible, truthful, balanced, and told by no single frame."""

import hashlib
import json
import math
from collections import Counter

import numpy as np
import pytest

from nanovlm.data import scenes_video
from nanovlm.data.scene_pixels import COLORS
from nanovlm.data.scenes import HELD_OUT
from nanovlm.data.scenes_video import MIDDLE, NUM_FRAMES, Clips, draw
from nanovlm.data.sources import open_source


@pytest.mark.parametrize(("split", "digest"), [("train", "3436ef82d76b798c"), ("test", "a914b8642bb1206d")])
def test_same_on_any_machine(split, digest):
    clip = draw(split, 7)
    pixels = b"".join(image.tobytes() for image in clip["video"].images)
    assert pixels == b"".join(image.tobytes() for image in draw(split, 7)["video"].images)
    assert hashlib.sha256(pixels + clip["question"].encode() + clip["answer"].encode()).hexdigest()[:16] == digest


def follow(record, frames=None):
    """Return for each frame, or some by their numbers, where a shape of the color is that the question names first.

    None where it is not.
    """
    named = record["question"].removeprefix("what came first, the ").split()
    color = np.array(COLORS[next(word for word in named if word in COLORS)])
    places = []
    for image in record["video"].images if frames is None else [record["video"].images[i] for i in frames]:
        rows, columns = np.nonzero(np.abs(np.asarray(image, dtype=int) - color).max(axis=2) < 45)
        places.append((columns.mean(), rows.mean()) if len(rows) > 14 else None)
    return places


def test_answers_agree_with_the_pixels():
    """Work the answers out again from the pictures, for clips whose two shapes are of different colors."""
    seen = Counter()
    for index in range(120):
        record = draw("test", index)
        words = [word for word in record["question"].rstrip("?").split() if word in COLORS]
        places, kind = follow(record), record["kind"]
        if kind == "moves":
            first, last = places[0], places[-1]
            if first is None or last is None:
                continue
            (dx, dy), far = (b - a for a, b in zip(first, last, strict=True)), 6
            ways = {"left": -dx, "right": dx, "up": -dy, "down": dy}
            if max(ways.values()) > far:  # else the background has the color
                assert max(ways, key=ways.get) == record["answer"], index
                seen[kind] += 1
        elif kind == "times" and places[MIDDLE] is not None and None in places:
            shown = [place is not None for place in places]
            runs = sum(now and not before for before, now in zip([False, *shown], shown, strict=False))
            assert runs == int(record["answer"]), index
            seen[kind] += 1
        elif kind == "first" and len(set(words)) == 2 and places[MIDDLE] is not None:
            other = follow({**record, "question": f"the {words[1]}"})
            starts = [next((i for i, place in enumerate(p) if place is not None), NUM_FRAMES) for p in (places, other)]
            if other[MIDDLE] is not None and starts[0] != starts[1]:
                assert record["answer"].split()[0] == words[starts[1] < starts[0]], index
                seen[kind] += 1
    assert all(seen[kind] > 10 for kind in scenes_video.QUESTIONS), seen


def test_no_question_and_no_middle_frame_tells_the_answer():
    """Each answer is about as common as the others, whatever is in the middle frame: where, how many and which."""
    told = {kind: Counter() for kind in scenes_video.QUESTIONS}
    halves = Counter()
    for index in range(450):
        record = draw("train", index)
        kind, answer = record["kind"], record["answer"]
        if kind == "first":
            answer = str(record["question"].index(answer) < 30)
        told[kind][answer] += 1
        if kind == "moves" and (place := follow(record, [MIDDLE])[0]) is not None:
            halves[(answer in ("left", "right"), place[0] < 24, place[1] < 24)] += 1
    for kind, chances in {"moves": 4, "first": 2, "times": 3}.items():
        n = told[kind].total()
        assert len(told[kind]) == chances and n > 110
        assert max(told[kind].values()) < n / chances + 4 * math.sqrt(n / chances), told
    assert len(halves) == 8 and max(halves.values()) < 3 * min(halves.values())


def test_what_the_middle_frame_shows_does_not_depend_on_the_answer():
    """Exactly: the things in it are there for each answer, and where they are is drawn before the answer."""
    for patterns in scenes_video.PATTERNS.values():
        assert all(bits[MIDDLE] for bits in patterns) and patterns
    for index in range(30):
        for kind in scenes_video.QUESTIONS:
            record = draw("train", index, (kind,))
            assert record["kind"] == kind
            assert len(record["video"].images) == len(record["video"].times) == NUM_FRAMES
            named = " ".join((record["question"], record["answer"]))
            assert not any(f"{color} {shape}" in named for color, shape in HELD_OUT)


def test_clips_are_a_source(tmp_path):
    source = open_source("scenes_video:moves,times", split="test")
    assert source.name == "scenes_video:moves,times" and source.read(3) == draw("test", 3, ("moves", "times"))
    assert {source.read(i)["kind"] for i in range(20)} == {"moves", "times"}
    assert open_source("scenes_video").kinds == () and len(Clips("train")) == 1_000_000
    with pytest.raises(ValueError, match="scenes_video:dance: unknown kind 'dance'; there are moves, first, times"):
        open_source("scenes_video:dance")
    with pytest.raises(ValueError, match="unknown split 'compositional' of clips"):
        draw("compositional", 0)
    scenes_video.main(tmp_path / "clips", num=2)
    lines = [json.loads(line) for line in (tmp_path / "clips" / "records.jsonl").read_text().splitlines()]
    assert [line["video"] for line in lines] == ["0.gif", "1.gif"] and lines[1]["answer"] == draw("test", 1)["answer"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; name a folder"):
        scenes_video.main(tmp_path / "file")
