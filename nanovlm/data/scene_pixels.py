"""The things of a drawn scene -> its picture, and where each of them is in it.

Everything is drawn from polygons and circles, so no font or file is needed: shapes and digits on a gradient, with
noise over all. The parts of `render` are there for clips (scenes_video.py), whose frames share some of them.
"""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 48
COLORS = {
    "red": (215, 35, 35),
    "green": (35, 165, 55),
    "blue": (45, 75, 225),
    "yellow": (240, 220, 40),
    "purple": (135, 45, 175),
    "orange": (245, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SCALE = 2  # shapes are drawn this much larger and averaged down, for smooth edges
GRID = np.stack(np.meshgrid(*[np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)] * 2))

# Glyphs of 5 x 7 dots: two hexadecimal digits per row, whose low five bits are the dots.
GLYPHS = (
    "0e11131519110e", "040c040404040e", "0e11010204081f", "1f02040201110e", "02060a121f0202",
    "1f101e0101110e", "0608101e11110e", "1f010204080808", "0e11110e11110e", "0e11110f01020c",
)  # fmt: skip


@dataclass(frozen=True)
class Object:
    """A shape, or a digit (then `radius` is half its height); centre and radius in pixels, angle in radians."""

    color: str
    shape: str
    radius: float
    angle: float
    digit: int | None = None
    cell: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def pair(self):
        return self.color, self.shape

    @property
    def name(self):
        return f"{self.color} {self.shape}"


def render(rng: random.Random, things: Sequence[Object]) -> Image.Image:
    """Draw things on a background of their own, the later over the earlier."""
    grey = rng.uniform(40, 215)
    inks = [choose_ink(rng, thing, grey) for thing in things]
    return blend(rng, make_background(rng, grey), things, inks)


def choose_ink(rng: random.Random, thing: Object, grey: float) -> tuple[int, ...]:
    """Choose about the color of a shape; a digit stands out from the grey of its background."""
    if thing.digit is not None:
        return (15, 15, 15) if grey > 128 else (250, 250, 250)
    return tuple(min(255, max(0, c + rng.randint(-15, 15))) for c in COLORS[thing.color])


def make_background(rng: random.Random, grey: float) -> np.ndarray:
    """Make a gradient of about this grey, float32[H, W, C]."""
    tint = np.array([grey + rng.uniform(-20, 20) for _ in range(3)], dtype=np.float32)
    return tint + (rng.uniform(-25, 25) * GRID[0] + rng.uniform(-25, 25) * GRID[1])[..., None]


def blend(
    rng: random.Random, background: np.ndarray, things: Sequence[Object], inks: Sequence[tuple[int, ...]]
) -> Image.Image:
    """Draw things over a background, and noise over all.

    Paint is black outside the shapes, so background * (1 - cover) + paint blends them.
    """
    side = IMAGE_SIZE * SCALE
    layer = Image.new("CMYK", (side, side))  # as four plain channels: red, green, blue, cover
    canvas = ImageDraw.Draw(layer)
    for thing, ink in zip(things, inks, strict=True):
        _draw_thing(canvas, thing, (*ink, 255))
    layer = np.asarray(layer.reduce(SCALE)).astype(np.float32)
    paint, cover = layer[..., :3], layer[..., 3:] / 255
    noise = np.frombuffer(rng.randbytes(paint.size), dtype=np.uint8).reshape(paint.shape) * np.float32(24 / 255) - 12
    pixels = background * (1 - cover) + paint + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def find_extent(thing: Object) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a thing, in pixels."""
    if thing.shape == "circle":
        r = thing.radius
        return thing.x - r, thing.y - r, thing.x + r, thing.y + r
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    points = [point for polygon in _polygons(thing) for point in polygon]
    across = [thing.x + x * cos - y * sin for x, y in points]
    down = [thing.y + x * sin + y * cos for x, y in points]
    return min(across), min(down), max(across), max(down)


def _draw_thing(canvas, thing, ink):
    """Draw a shape or a digit about its centre."""
    cos, sin = math.cos(thing.angle) * SCALE, math.sin(thing.angle) * SCALE
    left, top, r = thing.x * SCALE, thing.y * SCALE, thing.radius
    if thing.shape == "circle":
        canvas.ellipse([round(c + side * r * SCALE) for side in (-1, 1) for c in (left, top)], fill=ink)
        return
    for polygon in _polygons(thing):
        canvas.polygon(
            [(round(left + x * cos - y * sin), round(top + x * sin + y * cos)) for x, y in polygon], fill=ink
        )


def _polygons(thing) -> list[list[tuple[float, float]]]:
    """Return the polygons of a digit or of a shape that is no circle, about its centre and before it is turned."""
    r = thing.radius
    if thing.digit is not None:
        dot, found = 2 * r / 7, []
        for row, bits in enumerate(bytes.fromhex(GLYPHS[thing.digit])):
            for run in re.finditer("1+", f"{bits:05b}"):
                left_dot, right_dot, top_dot = run.start() - 2.5, run.end() - 2.5, row - 3.5
                found.append(_box(left_dot * dot, top_dot * dot, right_dot * dot, (top_dot + 1) * dot))
        return found
    if thing.shape == "square":
        return [_box(-0.75 * r, -0.75 * r, 0.75 * r, 0.75 * r)]
    if thing.shape == "triangle":
        return [_polar(r, r, r)]
    if thing.shape == "star":
        return [_polar(*(r, 0.42 * r) * 5)]
    return [_box(-r, -0.28 * r, r, 0.28 * r), _box(-0.28 * r, -r, 0.28 * r, r)]  # a cross


def _polar(*radii):
    """Return corners at equal angles and these distances from the origin, the first at the top."""
    steps = [(r, 2 * math.pi * i / len(radii)) for i, r in enumerate(radii)]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in steps]


def _box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]
