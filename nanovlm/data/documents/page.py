"""A sheet of paper on which pictures of text are drawn; it knows where each text is, so that nothing overlaps."""

import re
from dataclasses import dataclass, field
from random import Random

from PIL import Image, ImageDraw

from nanovlm.data.documents.fonts import Family, load_font
from nanovlm.errors import UserError

SIDE = 512  # most pixels of a side of a picture
LEAST = 12  # smallest font, in pixels
MARGIN = 18
PAPERS = ((255, 255, 255), (251, 248, 240), (243, 247, 251), (246, 246, 244))
INKS = ((15, 15, 15), (20, 30, 75), (55, 25, 20))
ACCENTS = ((176, 38, 38), (28, 92, 160), (24, 118, 72), (120, 60, 140), (190, 95, 10))

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass
class Drawing:
    """A picture, what is asked about it (kind, question, answer), what made it, and its texts by their places."""

    image: Image.Image
    asked: list[tuple[str, str, str]]
    template: str
    font: str
    texts: list[tuple[Box, str]] = field(default_factory=list)


class Page:
    """Paper of a width, written on from the top; `y` is where the next line begins."""

    def __init__(self, rng: Random, family: Family, width: int = SIDE, size: int = 0, dark: bool = False):
        self.rng, self.family, self.width = rng, family, width
        self.size = size or rng.randint(13, 16)
        self.step = round(1.4 * self.size)  # from line to line
        paper, ink = rng.choice(PAPERS), rng.choice(INKS)
        self.accent = rng.choice(ACCENTS)
        self.paper, self.ink = (ink, paper) if dark else (paper, ink)
        self.image = Image.new("RGB", (width, SIDE), self.paper)
        self.canvas = ImageDraw.Draw(self.image)
        self.y: float = MARGIN
        self.texts: list[tuple[Box, str]] = []

    @property
    def right(self) -> int:
        return self.width - MARGIN

    def write(
        self,
        x: float,
        y: float,
        text: str,
        room: float,
        bold: bool = False,
        scale: float = 1.0,
        align: str = "l",
        ink: tuple[int, int, int] | None = None,
    ) -> Box:
        """Write a line that begins, ends (align r) or has its middle (m) at x, its top at y, in a smaller font if it
        needs more than `room` pixels; return its box."""
        file = self.family.bold if bold else self.family.regular
        size = round(scale * self.size)
        while size > LEAST and load_font(file, size).getlength(text) > room:
            size -= 1
        font = load_font(file, size)
        # Lines stand on the same foot, whatever their fonts' tops are.
        base = y + round(scale * self.size)
        self.canvas.text((x, base), text, fill=ink or self.ink, font=font, anchor=f"{align}s")
        box = self.canvas.textbbox((x, base), text, font=font, anchor=f"{align}s")
        self.texts.append((box, text))
        if box[2] - box[0] > room + 1:
            raise UserError(
                f"{text!r} needs {box[2] - box[0]:.0f} pixels in {self.family.name}, and has {room:.0f}: leave that "
                "font out of --fonts"
            )
        return box

    def put(self, text: str, x: float = MARGIN, room: float | None = None, skip: float = 1.0, scale=1.0, **how):
        """Write a line at the current height and go `skip` lines down."""
        self.write(x, self.y, text, self.right - MARGIN if room is None else room, scale=scale, **how)
        self.y += round(skip * self.step * max(scale, 1))

    def wrap(self, text: str, x: float = MARGIN, room: float | None = None):
        """Write a paragraph at the current height, in as many lines as it needs."""
        room = self.right - x if room is None else room
        font, lines = load_font(self.family.regular, self.size), [""]
        for word in re.split(r"(?<!-) ", text):
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if font.getlength(longer) <= room else [*lines, word]
        for line in lines:
            self.put(line, x, room)

    def rule(self, y: float, left: float = MARGIN, right: float | None = None, width: int = 1, ink=None):
        self.canvas.line((left, y, self.right if right is None else right, y), fill=ink or self.ink, width=width)

    def box(self, left: float, top: float, right: float, bottom: float, fill=None, outline=None, width: int = 1):
        self.canvas.rectangle((left, top, right, bottom), fill=fill, outline=outline, width=width)

    def tint(self, share: float = 0.12) -> tuple[int, int, int]:
        """Return the colour of the paper with a share of the accent."""
        red, green, blue = (round(p + share * (a - p)) for p, a in zip(self.paper, self.accent, strict=True))
        return red, green, blue

    def finish(self) -> Image.Image:
        """Cut the paper off below what was written."""
        height = round(self.y) + MARGIN
        assert height <= SIDE, f"a page is {height} pixels high"
        return self.image.crop((0, 0, self.width, height))
