"""Drawn scenes with questions whose answers are known exactly.

`draw(split, index)` is a pure function: the same picture and questions on any machine. A scene has one to three shapes
of random colour, size, position and rotation, a digit among them, and a noisy gradient as background (scene_pixels.py).

Splits differ by seed. Each `compositional` scene contains a colour-shape pair of HELD_OUT and asks about
it; `train` and `test` scenes never show or mention such a pair, but do show each of its colours and shapes.

The questions of a scene are independent: each is asked by itself, as some would answer others. Their answers
are balanced for each question text, so a model that does not look can hardly do better than chance. On the colour or
shape of a held-out pair it does worse: training never gives the right answer to such a question.

A lesson asks only some kinds of questions (LESSON_KINDS). Only lessons ask what is in each cell, and for the boxes and
centers of objects, as fractions of the picture's sides or as location tokens (boxes.py). A model that is asked
all other kinds from the start learns to see much more slowly (docs/log.md).

`python -m nanovlm.data.scenes FOLDER` writes scenes as PNG files with their questions, to look at.
"""

import functools
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from nanovlm import cli
from nanovlm.data.boxes import Box, write_box, write_point
from nanovlm.data.drawn import Drawn
from nanovlm.data.scene_pixels import COLORS, IMAGE_SIZE, SHAPES, Object, find_extent, render
from nanovlm.errors import UserError

SPLITS = ("train", "test", "compositional")
# Mean number of questions of a kind in a training scene that allows that many, outside lessons; 1 for all other kinds.
# Kinds that are learned late are asked often, those that are known by then seldom.
PRACTICE = {"relation": 3, "digits": 0.5, "caption": 0.1}
CELL_SIZE = IMAGE_SIZE / 3
HELD_OUT = (("red", "star"), ("green", "circle"), ("blue", "cross"), ("yellow", "triangle"), ("purple", "square"))
# Numbers of objects to choose from when 0, 1, 2 or 3 of them have the counted colour or shape.
NUMBERS = ((1, 1, 2, 3), (1, 1, 2, 3), (2, 2, 3, 3), (3, 3, 3, 3))
SEEN = tuple(pair for pair in itertools.product(COLORS, SHAPES) if pair not in HELD_OUT)
CELLS = tuple(
    " ".join(filter(None, words)) or "center"
    for words in itertools.product(("top", "", "bottom"), ("left", "", "right"))
)


@dataclass(frozen=True)
class Scene:
    """The contents of a picture. `counted` is a colour or shape that 0, 1, 2 or 3 objects have, equally often."""

    objects: list[Object]
    digit: Object
    counted: str
    known: tuple[tuple[str, str], ...]  # pairs that a question may name as absent

    @cached_property
    def values(self):
        """The colour, the shape and the pair of both of every object, with repeats."""
        return [value for o in self.objects for value in (o.color, o.shape, o.pair)]


def draw(split: str, index: int, kinds: Sequence[str] = ()) -> dict:
    """Return `{"images": [PIL], "texts": [{"user", "assistant", "kind"}, ...], "independent": True}`.

    With `kinds`, keys of LESSON_KINDS, draw another scene than without, and ask all its questions of these kinds, at
    least one. Else ask a training scene as PRACTICE says, and other scenes one question of each kind that they allow.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    rng, chosen = random.Random(" ".join((split, *kinds, str(index)))), []
    while not chosen:
        scene = _compose(rng, compositional=split == "compositional")
        about = scene.objects[:1] if split == "compositional" else scene.objects
        ask = _ask_lesson if kinds else _ask_everything
        chosen = ask(rng, scene, about, kinds or split)
    texts = [
        {"user": question, "assistant": answer, "kind": kind} | ({"references": list(more)} if more else {})
        for kind, question, answer, *more in chosen
    ]
    return {"images": [render(rng, [*scene.objects, scene.digit])], "texts": texts, "independent": True}


def _ask_lesson(rng, scene, about, kinds):
    return [(kind, *pair) for kind in kinds for pair in LESSON_KINDS[kind](rng, scene, about)]


def _ask_everything(rng, scene, about, split):
    asked = {kind: pairs for kind, ask in QUESTIONS.items() if (pairs := ask(rng, scene, about))}
    chosen = []
    for kind, pairs in asked.items():
        mean = PRACTICE.get(kind, 1) if split == "train" else 1
        number = int(mean) + (rng.random() < mean % 1)
        chosen += [(kind, *pair) for pair in rng.sample(pairs, min(number, len(pairs)))]
    return chosen


# --- what is in a scene ----------------------------------------------------------------------------------


def _compose(rng, compositional):
    """Choose objects with balanced counts, then place them with balanced positions."""
    same = rng.randrange(4)  # number of objects with the counted colour (axis 0) or shape (axis 1)
    number = rng.choice(NUMBERS[same])
    axis = rng.randrange(2)
    first = rng.choice(HELD_OUT if compositional else SEEN)
    values = (tuple(COLORS), SHAPES)[axis]
    counted = first[axis] if same else rng.choice([v for v in values if v != first[axis]])
    pairs = [first]
    while len(pairs) < number:
        pair = rng.choice(SEEN)
        if (pair[axis] == counted) == (len(pairs) < same):
            pairs.append(pair)
    things = [Object(*pair, radius=rng.uniform(5.5, 7.5), angle=rng.uniform(-0.4, 0.4)) for pair in pairs]
    things.append(Object("", "", radius=rng.uniform(6, 7.3), angle=rng.uniform(-0.2, 0.2), digit=rng.randrange(10)))
    # Each thing gets its own cell, drawn uniformly, so that all positions are equally likely.
    placed = [_place(rng, thing, cell) for thing, cell in zip(things, rng.sample(range(9), len(things)), strict=True)]
    return Scene(placed[:-1], placed[-1], counted, HELD_OUT if compositional else SEEN)


def _place(rng, thing, cell):
    """Put a thing at a random place inside a cell."""
    room = CELL_SIZE / 2 - thing.radius
    x, y = (CELL_SIZE * (third + 0.5) + rng.uniform(-room, room) for third in (cell % 3, cell // 3))
    return replace(thing, cell=cell, x=x, y=y)


# --- questions: each function returns pairs of question and answer -----------------------------------------


def _ask_color(rng, scene, about):
    return [(f"what color is the {o.shape}?", o.color) for o in about if _is_only(o.shape, scene)]


def _ask_shape(rng, scene, about):
    return [(f"what shape is the {o.color} object?", o.shape) for o in about if _is_only(o.color, scene)]


def _ask_count(rng, scene, about):
    count = sum(scene.counted in o.pair for o in scene.objects)
    what = f"{scene.counted} objects" if scene.counted in COLORS else f"{scene.counted}s".replace("sss", "sses")
    asked = [(f"how many {what} are there?", str(count))]
    # Ask this equally often of scenes with one, two and three objects, so that the answers are balanced.
    scenes_of = [sum(numbers.count(n) for numbers in NUMBERS) for n in (1, 2, 3)]
    if rng.random() < min(scenes_of) / scenes_of[len(scene.objects) - 1]:
        asked.append(("how many objects are there?", str(len(scene.objects))))
    return asked


def _ask_position(rng, scene, about):
    return [(f"where is {rng.choice(names)}?", CELLS[o.cell]) for o in about if (names := _names(o, scene))]


def _ask_relation(rng, scene, about):
    asked = []
    for a, b in itertools.product(about, scene.objects):
        dx, dy = a.x - b.x, a.y - b.y
        names_a, names_b = _names(a, scene), _names(b, scene)
        if names_a and names_b and max(abs(dx), abs(dy)) > 1.5 * min(abs(dx), abs(dy)):
            side = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
            asked.append((f"where is {rng.choice(names_a)} relative to {rng.choice(names_b)}?", side))
    return asked


def _ask_existence(rng, scene, about):
    """Answer yes and no equally often; if possible, the absent pair shares its colour or shape with an object."""
    if rng.random() < 0.5:
        return [(f"is there {_a(rng.choice(about).pair)}?", "yes")]
    present = {o.pair for o in scene.objects}
    absent = [pair for pair in scene.known if pair not in present]
    near = [p for p in absent if any(p[0] == q[0] or p[1] == q[1] for q in present)] or absent
    return [(f"is there {_a(rng.choice(near))}?", "no")]


def _ask_digits(rng, scene, about):
    return [("what digit is written?", str(scene.digit.digit))]


def _ask_caption(rng, scene, about):
    # Sort by colour, shape and cell, so that a picture has one right caption.
    order = sorted(scene.objects, key=lambda o: ([*COLORS].index(o.color), SHAPES.index(o.shape), o.cell))
    parts = [f"{_a(o.pair)} at the {CELLS[o.cell]}" for o in order]
    return [("describe the image.", f"{', '.join(parts)} and the digit {scene.digit.digit}.")]


def _ask_cells(rng, scene, about):
    """Ask what is in each occupied cell and in one empty cell."""
    inside = {o.cell: _a(o.pair) for o in scene.objects} | {scene.digit.cell: f"the digit {scene.digit.digit}"}
    empty = rng.choice([cell for cell in range(9) if cell not in inside])
    return [(f"what is at the {CELLS[cell]}?", inside.get(cell, "nothing")) for cell in sorted([*inside, empty])]


def _ask_box(rng, scene, about, form="fractions"):
    """Ask for the boxes around objects, in fractions of the picture's sides."""
    return [
        (f"draw a box around {rng.choice(names)}.", write_box(find_box(o), form))
        for o in about
        if (names := _names(o, scene))
    ]


def _ask_point(rng, scene, about, form="fractions"):
    """Ask for the centers of objects; every other point of an object is right, too: its box is a reference."""
    return [
        (
            f"point at {rng.choice(names)}.",
            write_point((o.x / IMAGE_SIZE, o.y / IMAGE_SIZE), form),
            write_box(find_box(o), form),
        )
        for o in about
        if (names := _names(o, scene))
    ]


def find_box(o: Object) -> Box:
    """Return the box around an object, in fractions of the picture's sides; corners may lie a little outside."""
    return Box(*(min(max(side / IMAGE_SIZE, 0.0), 1.0) for side in find_extent(o)))


def _a(pair):
    return f"{'an' if pair[0][0] in 'aeiou' else 'a'} {pair[0]} {pair[1]}"


def _is_only(value, scene):
    """Return whether exactly one object has this colour, shape, or pair of both."""
    return scene.values.count(value) == 1


def _names(o, scene):
    """Return all names that fit this object alone: by its shape, its colour, or both."""
    names = [(o.shape, f"the {o.shape}"), (o.color, f"the {o.color} object"), (o.pair, f"the {o.name}")]
    return [name for value, name in names if _is_only(value, scene)]


QUESTIONS = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "position": _ask_position,
    "relation": _ask_relation,
    "existence": _ask_existence,
    "digits": _ask_digits,
    "caption": _ask_caption,
}
LESSON_KINDS = QUESTIONS | {
    "cells": _ask_cells,
    "box": _ask_box,
    "point": _ask_point,
    "box_tokens": functools.partial(_ask_box, form="tokens"),
    "point_tokens": functools.partial(_ask_point, form="tokens"),
}


# The drawn scenes of one split, with all kinds of questions, or as a lesson with only some: Scenes("train", kinds=...).
Scenes = functools.partial(Drawn, "scenes", draw, SPLITS, LESSON_KINDS)


def main(
    folder: Path,
    split: Literal["train", "test", "compositional"] = "test",
    num: int = 8,
):
    """Write scenes and their questions to a folder, to look at them.

    Args:
        folder: Folder to write N.png and questions.jsonl to.
        split: Split of the scenes.
        num: Number of scenes.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "questions.jsonl", "w") as file:
        for index in range(num):
            scene = draw(split, index)
            scene["images"][0].save(folder / f"{index}.png")
            file.write(json.dumps({"image": f"{index}.png", "texts": scene["texts"]}) + "\n")
    print(f"wrote {num} {split} scenes to {folder}")


if __name__ == "__main__":
    import tyro

    cli.run(lambda: tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,)))
