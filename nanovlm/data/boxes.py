"""Boxes and points of a picture <-> the text in which a model says where they are.

```
fractions   [0.12, 0.30, 0.55, 0.80]                  left, top, right, bottom; [0.33, 0.55] is a point, x, y
tokens      <loc0307><loc0122><loc0819><loc0563>      top, left, bottom, right; <loc0563><loc0337> is a point, y, x
```

Fractions are those of the picture's width and height (Shikra, arXiv 2306.15195; LLaVA), location tokens count in 1/1024
of them (PaliGemma, arXiv 2407.07726). `read_places` reads both, and what other models write: whole numbers up to 1000
in brackets (Qwen2-VL, InternVL) and Molmo's points in percent.
"""

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from nanovlm.config import pick

NUM_LOCATIONS = 1024
# Tokens that an answer is written in, whatever control tokens a tokenizer keeps apart: PaliGemma's places and masks.
LOCATION = re.compile(r"<(?:loc[01]\d{3}|seg[01]\d\d)>")
NUMBER = r"\s*(\d+(?:\.\d+)?|\.\d+)\s*"  # one way to read each, so that long ones take no time
PLACE = re.compile(
    r"(?P<tokens>(?:<loc[01]\d{3}>)+)"
    rf"|[\[(]{NUMBER},{NUMBER}(?:,{NUMBER},{NUMBER})?[\])]"
    rf'|\bx(?P<n>\d*)="{NUMBER}"\s+y(?P=n)="{NUMBER}"'
)
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")
LEAST_SIDE = 480  # pixels of the longer side of a picture on which answers are drawn


class Box(NamedTuple):
    """A box in fractions of a picture's width and height."""

    left: float
    top: float
    right: float
    bottom: float


class Point(NamedTuple):
    """A point in fractions of a picture's width and height."""

    x: float
    y: float


def write_box(box: Box, form: str = "fractions") -> str:
    """Write a box, in a form of FORMS."""
    return pick(FORMS, form, "the form of boxes")(box)


def write_point(point: tuple[float, float], form: str = "fractions") -> str:
    """Write a point, in a form of FORMS."""
    return pick(FORMS, form, "the form of points")(point)


def _write_fractions(numbers: Sequence[float]) -> str:
    return f"[{', '.join(f'{number:.2f}' for number in numbers)}]"


def _write_tokens(numbers: Sequence[float]) -> str:
    """Write y before x, each as the number of the 1024th of the picture that it lies in."""
    places = [min(int(number * NUM_LOCATIONS), NUM_LOCATIONS - 1) for number in numbers]
    swapped = [place for x, y in zip(places[::2], places[1::2], strict=True) for place in (y, x)]
    return "".join(f"<loc{place:04}>" for place in swapped)


FORMS = {"fractions": _write_fractions, "tokens": _write_tokens}


def read_places(text: str) -> list[Box | Point]:
    """Return the boxes and points that a text names, in order; those without area or outside the picture are none."""
    found = []
    for match in PLACE.finditer(text):
        if match["tokens"]:
            numbers = [int(token) / NUM_LOCATIONS for token in re.findall(r"\d{4}", match["tokens"])]
            if any(number >= 1 for number in numbers):
                continue
            size = 2 if len(numbers) == 2 else 4
            if len(numbers) % size == 0:  # else they are no boxes
                swapped = [number for y, x in zip(numbers[::2], numbers[1::2], strict=True) for number in (x, y)]
                found += [tuple(swapped[i : i + size]) for i in range(0, len(swapped), size)]
            continue
        numbers = [float(number) for number in (*match.groups()[1:5], *match.groups()[6:]) if number is not None]
        if match["n"] is not None:
            numbers = [number / 100 for number in numbers]
        elif max(numbers) > 1:
            numbers = [number / 1000 for number in numbers]
        found.append(tuple(numbers))
    places = [Box(*numbers) if len(numbers) == 4 else Point(*numbers) for numbers in found]
    return [place for place in places if max(place) <= 1 and (isinstance(place, Point) or _area(place) > 0)]


def read_boxes(text: str) -> list[Box]:
    return [place for place in read_places(text) if isinstance(place, Box)]


def iou(a: Box, b: Box) -> float:
    """Return the area that two boxes share, as a fraction of what they cover together; 0 where they share none."""
    shared = Box(max(a.left, b.left), max(a.top, b.top), min(a.right, b.right), min(a.bottom, b.bottom))
    covered = _area(shared)
    return covered / (_area(a) + _area(b) - covered) if covered else 0.0


def match_boxes(said: Sequence[Box], true: Sequence[Box]) -> list[float]:
    """Pair boxes, each at most once, those that overlap most first; return the IoU of each pair that overlaps."""
    pairs = sorted(((iou(a, b), i, j) for i, a in enumerate(said) for j, b in enumerate(true)), reverse=True)
    left_a, left_b, found = set(range(len(said))), set(range(len(true))), []
    for overlap, i, j in pairs:
        if overlap > 0 and i in left_a and j in left_b:
            left_a.remove(i)
            left_b.remove(j)
            found.append(overlap)
    return found


def contains(box: Box, point: Point) -> bool:
    return box.left <= point.x <= box.right and box.top <= point.y <= box.bottom


def _area(box: Box) -> float:
    """Return the area of a box; 0 of one whose sides are in the wrong order."""
    return max(0.0, box.right - box.left) * max(0.0, box.bottom - box.top)


def draw_places(image: Image.Image, places: Sequence[Box | Point]) -> bytes:
    """Draw boxes and points on a picture, each in a color of its own and numbered from 1, as a PNG file."""
    scale = max(1, LEAST_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    sheet = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(14, max(size) // 40))
    line = max(2, max(size) // 200)
    for number, place in enumerate(places):
        color = COLORS[number % len(COLORS)]
        across, down = [x * (size[0] - 1) for x in place[::2]], [y * (size[1] - 1) for y in place[1::2]]
        if isinstance(place, Box):
            canvas.rectangle((across[0], down[0], across[1], down[1]), outline=color, width=line)
            corner = across[0] + line + 2, down[0] + line
        else:
            radius = 3 * line
            canvas.ellipse(
                (across[0] - radius, down[0] - radius, across[0] + radius, down[0] + radius), outline=color, width=line
            )
            corner = across[0] + radius + 2, down[0] - radius
        canvas.text(corner, str(number + 1), fill=color, font=font, stroke_width=2, stroke_fill="white")
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()
