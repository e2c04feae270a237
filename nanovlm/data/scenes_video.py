"""Drawn clips with a question about what happens in them, whose answer no single frame gives.

```
moves    which way does the red circle move?               left, right, up, down
first    what came first, the red circle or a blue cross?  one of the two
times    how many times does the red circle appear?        1, 2, 3: from the start, or back after it was away
```

`draw(split, index)` is a pure function: the same clip on any machine. A clip has NUM_FRAMES frames of one background, a
shape that the question is about, and another one. Its middle frame does not depend on the answer: what moves is in the
middle of its way, what comes has come, and what comes and goes is there. So a model that sees only this frame, over and
over, does no better than chance: the control `still` (eval/controls.py).

`python -m nanovlm.data.scenes_video FOLDER` writes clips as animated GIFs with their questions, which train.py reads.
"""

import functools
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from nanovlm import cli
from nanovlm.data.drawn import Drawn
from nanovlm.data.scene_pixels import IMAGE_SIZE, Object, blend, choose_ink, make_background
from nanovlm.data.scenes import SEEN
from nanovlm.data.video import Clip
from nanovlm.errors import UserError

SPLITS = ("train", "test")
NUM_FRAMES, MIDDLE = 7, 3
SECONDS = 0.5  # between two frames
STEP = 3.0  # pixels that a moving shape goes in that time
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# In which frames a shape may be there that appears so many times; always in the middle one.
PATTERNS = {
    times: [
        bits
        for bits in itertools.product((False, True), repeat=NUM_FRAMES)
        if bits[MIDDLE] and sum(key for key, _ in itertools.groupby(bits)) == times
    ]
    for times in (1, 2, 3)
}


def draw(split: str, index: int, kinds: Sequence[str] = ()) -> dict:
    """Return `{"video": Clip, "question", "answer", "kind"}`, of one of `kinds`, by default of QUESTIONS."""
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of clips; there are {', '.join(SPLITS)}")
    rng = random.Random(" ".join(("clip", split, *kinds, str(index))))
    kind = rng.choice(list(kinds or QUESTIONS))
    things = [Object(*pair, radius=rng.uniform(4.5, 6), angle=rng.uniform(-0.4, 0.4)) for pair in rng.sample(SEEN, 2)]
    frames, question, answer = QUESTIONS[kind](rng, *things)
    grey = rng.uniform(40, 215)
    inks = {thing.pair: choose_ink(rng, thing, grey) for thing in things}
    background = make_background(rng, grey)
    images = [blend(rng, background, shown, [inks[thing.pair] for thing in shown]) for shown in frames]
    clip = Clip(images, [i * SECONDS for i in range(NUM_FRAMES)], NUM_FRAMES * SECONDS)
    return {"video": clip, "question": question, "answer": answer, "kind": kind}


# --- what happens: each function returns the things in each frame, a question and its answer ------------------


def _move(rng, mover, other):
    """Move a shape through the middle of its way; the other is in a corner, and below it where they meet."""
    way = STEP * MIDDLE + mover.radius
    x, y = (rng.uniform(way, IMAGE_SIZE - way) for _ in range(2))
    where, (dx, dy) = rng.choice(list(DIRECTIONS.items()))
    corner = [rng.choice((0, 1)) for _ in range(2)]
    other = replace(other, **_in_corner(rng, other, corner))
    steps = [STEP * (number - MIDDLE) for number in range(NUM_FRAMES)]
    frames = [[other, replace(mover, x=x + step * dx, y=y + step * dy)] for step in steps]
    return frames, f"which way does the {mover.name} move?", where


def _come(rng, one, other):
    """Let both shapes come, not at the same time, and stay."""
    one, other = _place_apart(rng, one, other)
    starts = rng.sample(range(MIDDLE + 1), 2)
    frames = [
        [thing for thing, start in zip((one, other), starts, strict=True) if number >= start]
        for number in range(NUM_FRAMES)
    ]
    first = (one, other)[starts[1] < starts[0]]
    return frames, f"what came first, the {one.name} or the {other.name}?", first.name


def _appear(rng, blinker, other):
    """Let a shape come and go; the other stays."""
    blinker, other = _place_apart(rng, blinker, other)
    times = rng.choice(list(PATTERNS))
    frames = [[other, blinker] if is_there else [other] for is_there in rng.choice(PATTERNS[times])]
    return frames, f"how many times does the {blinker.name} appear?", str(times)


def _place_apart(rng, *things):
    """Put things into corners of their own."""
    corners = rng.sample(list(itertools.product((0, 1), repeat=2)), len(things))
    return [replace(thing, **_in_corner(rng, thing, corner)) for thing, corner in zip(things, corners, strict=True)]


def _in_corner(rng, thing, corner):
    """Choose a place in a quarter of the picture, 0 or 1 across and down."""
    x, y = (IMAGE_SIZE / 2 * side + rng.uniform(thing.radius, IMAGE_SIZE / 2 - thing.radius) for side in corner)
    return {"x": x, "y": y}


QUESTIONS = {"moves": _move, "first": _come, "times": _appear}


# The drawn clips of one split, with all kinds of questions or only with some: Clips("train", kinds=...).
Clips = functools.partial(Drawn, "scenes_video", draw, SPLITS, QUESTIONS)


def main(folder: Path, split: Literal["train", "test"] = "test", num: int = 8):
    """Write clips and their questions to a folder, to look at them, or to train on as on files of yours.

    Args:
        folder: Folder to write N.gif and records.jsonl to.
        split: Split of the clips.
        num: Number of clips.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "records.jsonl", "w", encoding="utf-8") as file:
        for index in range(num):
            record = draw(split, index)
            first, *others = record.pop("video").images
            first.save(
                folder / f"{index}.gif", save_all=True, append_images=others, duration=round(1000 * SECONDS), loop=0
            )
            file.write(json.dumps({"video": f"{index}.gif", **record}) + "\n")
    print(f"wrote {num} {split} clips to {folder}")


if __name__ == "__main__":
    import tyro

    cli.run(lambda: tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,)))
