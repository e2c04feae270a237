"""Drawn scenes with questions whose answers are known exactly.

`draw(split, index)` is a pure function: the same picture and questions on any machine. Everything is drawn
from polygons, so no font or file is needed. One to three shapes differ in colour, size, position and
rotation, half of the scenes show a number, and the background is a noisy gradient.

Splits differ by seed. Each `compositional` scene contains a colour-shape pair of HELD_OUT and asks about
it; `train` and `test` scenes never show or mention such a pair, but every colour and every shape of it.

The questions of a scene are independent: none may be read off another. Their answers are balanced for
each question text, so that a model that does not look can hardly do better than chance.

`python -m nanovlm.data.scenes FOLDER` writes scenes as PNG files with their questions, to look at.
"""

import argparse
import itertools
import json
import math
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SPLITS = ("train", "test", "compositional")
IMAGE_SIZE = 64
COLORS = {
    "red": (215, 35, 35),
    "green": (35, 165, 55),
    "blue": (45, 75, 225),
    "yellow": (240, 220, 40),
    "purple": (135, 45, 175),
    "orange": (245, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
HELD_OUT = (("red", "star"), ("green", "circle"), ("blue", "cross"), ("yellow", "triangle"), ("purple", "square"))
MAX_OBJECTS = 3
SEEN = tuple(pair for pair in itertools.product(COLORS, SHAPES) if pair not in HELD_OUT)
CELLS = tuple(
    " ".join(filter(None, words)) or "center"
    for words in itertools.product(("top", "", "bottom"), ("left", "", "right"))
)


@dataclass(frozen=True)
class Object:
    """A shape, or a number when `text` is given; centre and radius in pixels, angle in radians."""

    color: str
    shape: str
    radius: float
    angle: float
    text: str = ""
    cell: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def pair(self):
        return self.color, self.shape

    @property
    def name(self):
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What is in a picture. `counted` is the colour or shape that 0 to 3 objects share, evenly often."""

    objects: list[Object]
    numbers: list[Object]
    counted: str
    known: tuple[tuple[str, str], ...]  # the pairs that questions may mention


def draw(split: str, index: int) -> dict:
    """Return `{"images": [PIL], "texts": [{"user", "assistant", "kind"}, ...], "independent": True}`.

    A training scene has a caption and three other questions of different kinds, a scene of another split one
    question of each kind.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    rng = random.Random(f"{split} {index}")
    scene = _compose(rng, compositional=split == "compositional")
    about = scene.objects[:1] if split == "compositional" else scene.objects
    asked = {kind: pairs for kind, ask in QUESTIONS.items() if (pairs := ask(rng, scene, about))}
    kinds = [*asked]
    if split == "train":
        kinds = [*rng.sample(kinds[:-1], min(3, len(kinds) - 1)), "caption"]
    texts = []
    for kind in kinds:
        question, answer = rng.choice(asked[kind])
        texts.append({"user": question, "assistant": answer, "kind": kind})
    return {"images": [_render(rng, scene)], "texts": texts, "independent": True}


# --- what is in a scene ----------------------------------------------------------------------------------


def _compose(rng, compositional):
    """Choose the objects so that counts are balanced, then place them so that positions are."""
    same = rng.randrange(4)  # so many objects share a colour (axis 0) or a shape (axis 1)
    number = rng.randint(max(same, 1), MAX_OBJECTS)
    axis = rng.randrange(2)
    first = rng.choice(HELD_OUT if compositional else SEEN)
    values = (tuple(COLORS), SHAPES)[axis]
    counted = first[axis] if same else rng.choice([v for v in values if v != first[axis]])
    pairs = [first]
    while len(pairs) < number:
        pair = rng.choice(SEEN)
        if (pair[axis] == counted) == (len(pairs) < same):
            pairs.append(pair)
    things = [Object(*pair, radius=rng.uniform(8, 12), angle=rng.uniform(-0.4, 0.4)) for pair in pairs]
    if rng.random() < 0.5:
        text = str(rng.randrange(10)) if rng.random() < 0.5 else str(rng.randrange(10, 100))
        radius = rng.uniform(1.7, 2.0) * math.hypot(6 * len(text) - 1, 7) / 2
        things.append(Object("", "", radius=radius, angle=rng.uniform(-0.2, 0.2), text=text))
    placed = None
    while placed is None:
        placed = _place(rng, things)
    return Scene(placed[:number], placed[number:], counted, HELD_OUT if compositional else SEEN)


def _place(rng, things):
    """Give each thing a place of its own that lies clearly in one cell; None where they do not fit."""
    placed = []
    for thing in things:
        for _ in range(12):
            cell = rng.randrange(9)
            x, y = rng.uniform(*_span(cell % 3, thing.radius)), rng.uniform(*_span(cell // 3, thing.radius))
            if all(math.hypot(o.x - x, o.y - y) > o.radius + thing.radius + 1 for o in placed):
                placed.append(replace(thing, cell=cell, x=x, y=y))
                break
        else:
            return None
    return placed


def _span(third, radius):
    """Where a centre may lie along one side: 2 pixels clear of the other thirds, inside the picture."""
    low, high = IMAGE_SIZE * third / 3 + 2, IMAGE_SIZE * (third + 1) / 3 - 2
    return min(max(low, radius + 1), high), max(min(high, IMAGE_SIZE - radius - 1), low)


# --- questions: each function returns pairs of question and answer -----------------------------------------


def _ask_color(rng, scene, about):
    single = [o for o in about if sum(p.shape == o.shape for p in scene.objects) == 1]
    return [(f"what color is the {o.shape}?", o.color) for o in single]


def _ask_shape(rng, scene, about):
    single = [o for o in about if sum(p.color == o.color for p in scene.objects) == 1]
    return [(f"what shape is the {o.color} object?", o.shape) for o in single]


def _ask_count(rng, scene, about):
    count = sum(scene.counted in o.pair for o in scene.objects)
    what = f"{scene.counted} objects" if scene.counted in COLORS else f"{scene.counted}s".replace("sss", "sses")
    asked = [(f"how many {what} are there?", str(count))]
    # Scenes of 1, 2 and 3 objects come in the ratio 4 : 7 : 13; ask this equally often of each.
    if rng.random() < (1, 4 / 7, 4 / 13)[len(scene.objects) - 1]:
        asked.append(("how many objects are there?", str(len(scene.objects))))
    return asked


def _ask_position(rng, scene, about):
    return [(f"where is the {o.name}?", CELLS[o.cell]) for o in _unique(about, scene)]


def _ask_relation(rng, scene, about):
    asked = []
    for a, b in itertools.product(_unique(about, scene), _unique(scene.objects, scene)):
        dx, dy = a.x - b.x, a.y - b.y
        if abs(dx) > 1.5 * abs(dy):
            asked.append((f"where is the {a.name} relative to the {b.name}?", "left" if dx < 0 else "right"))
        elif abs(dy) > 1.5 * abs(dx):
            asked.append((f"where is the {a.name} relative to the {b.name}?", "above" if dy < 0 else "below"))
    return asked


def _ask_existence(rng, scene, about):
    """Yes and no come evenly; the absent pair shares its colour or its shape with an object."""
    if rng.random() < 0.5:
        return [(f"is there {_a(rng.choice(about).pair)}?", "yes")]
    present = {o.pair for o in scene.objects}
    absent = [pair for pair in scene.known if pair not in present]
    near = [p for p in absent if any(p[0] == q[0] or p[1] == q[1] for q in present)] or absent
    return [(f"is there {_a(rng.choice(near))}?", "no")]


def _ask_digits(rng, scene, about):
    return [("what number is written?", o.text) for o in scene.numbers]


def _ask_caption(rng, scene, about):
    parts = [f"{_a(o.pair)} at the {CELLS[o.cell]}" for o in sorted(scene.objects, key=lambda o: o.x)]
    parts += [f"the number {o.text}" for o in scene.numbers]
    return [("describe the image.", " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) + ".")]


def _a(pair):
    return f"{'an' if pair[0][0] in 'aeiou' else 'a'} {pair[0]} {pair[1]}"


def _unique(objects, scene):
    """The objects that colour and shape together name."""
    return [o for o in objects if sum(p.pair == o.pair for p in scene.objects) == 1]


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

# --- pixels ------------------------------------------------------------------------------------------------

SCALE = 2  # shapes are drawn this much larger and averaged down, for smooth edges
GRID = np.stack(np.meshgrid(*[np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)] * 2))

# Glyphs of 5 x 7 dots: a hexadecimal pair a row, its low five bits the dots.
GLYPHS = (
    "0e11131519110e", "040c040404040e", "0e11010204081f", "1f02040201110e", "02060a121f0202",
    "1f101e0101110e", "0608101e11110e", "1f010204080808", "0e11110e11110e", "0e11110f01020c",
)  # fmt: skip


def _render(rng, scene):
    """Draw the scene: paint is black outside the shapes, so background * (1 - cover) + paint blends."""
    layer = Image.new("CMYK", (IMAGE_SIZE * SCALE,) * 2)  # as four plain channels: red, green, blue, cover
    canvas = ImageDraw.Draw(layer)
    grey = rng.uniform(40, 215)
    for thing in scene.objects + scene.numbers:
        if thing.text:
            color = (15, 15, 15) if grey > 128 else (250, 250, 250)
        else:
            color = tuple(min(255, max(0, c + rng.randint(-15, 15))) for c in COLORS[thing.color])
        _draw_thing(canvas, thing, (*color, 255))
    *paint, cover = (np.asarray(channel, dtype=np.float32) for channel in layer.reduce(SCALE).split())
    background = rng.uniform(-25, 25) * GRID[0] + rng.uniform(-25, 25) * GRID[1]
    noise = np.frombuffer(rng.randbytes(3 * IMAGE_SIZE**2), dtype=np.uint8).reshape(3, *cover.shape)
    uncovered = 1 - cover / 255
    pixels = np.empty((*cover.shape, 3), dtype=np.uint8)
    for i in range(3):
        channel = (background + (grey + rng.uniform(-20, 20))) * uncovered
        channel += paint[i]
        channel += noise[i] * np.float32(24 / 255)
        pixels[..., i] = (channel - 12).clip(0, 255)
    return Image.fromarray(pixels)


def _draw_thing(canvas, thing, ink):
    """Draw a shape or a number about its centre."""
    cos, sin = math.cos(thing.angle) * SCALE, math.sin(thing.angle) * SCALE
    left, top, r = thing.x * SCALE, thing.y * SCALE, thing.radius

    def polygon(points):
        canvas.polygon([(round(left + x * cos - y * sin), round(top + x * sin + y * cos)) for x, y in points], fill=ink)

    if thing.text:
        dot = 2 * r / math.hypot(6 * len(thing.text) - 1, 7)
        for place, digit in enumerate(thing.text):
            for row, bits in enumerate(bytes.fromhex(GLYPHS[int(digit)])):
                for run in re.finditer("1+", f"{bits:05b}"):
                    x, y = 6 * place - 3 * len(thing.text) + 0.5, row - 3.5
                    polygon(_box((x + run.start()) * dot, y * dot, (x + run.end()) * dot, (y + 1) * dot))
    elif thing.shape == "circle":
        canvas.ellipse([round(c + side * r * SCALE) for side in (-1, 1) for c in (left, top)], fill=ink)
    elif thing.shape == "square":
        polygon(_box(-0.75 * r, -0.75 * r, 0.75 * r, 0.75 * r))
    elif thing.shape == "triangle":
        polygon(_polar(r, r, r))
    elif thing.shape == "star":
        polygon(_polar(*(r, 0.42 * r) * 5))
    elif thing.shape == "cross":
        polygon(_box(-r, -0.28 * r, r, 0.28 * r))
        polygon(_box(-0.28 * r, -r, 0.28 * r, r))


def _polar(*radii):
    """Corners at even angles and these distances from the origin, the first at the top."""
    steps = [(r, 2 * math.pi * i / len(radii)) for i, r in enumerate(radii)]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in steps]


def _box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def main():
    """Write scenes and their questions to a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write N.png and questions.jsonl to")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which scenes (default: test)")
    parser.add_argument("--num", type=int, default=8, help="how many (default: 8)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with open(args.folder / "questions.jsonl", "w") as file:
        for index in range(args.num):
            scene = draw(args.split, index)
            scene["images"][0].save(args.folder / f"{index}.png")
            file.write(json.dumps({"image": f"{index}.png", "texts": scene["texts"]}) + "\n")
    print(f"wrote {args.num} {args.split} scenes to {args.folder}")


if __name__ == "__main__":
    main()
