"""Words to read: short texts, signs on photographs, and formulas."""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from nanovlm.data.documents.fonts import load_font
from nanovlm.data.documents.page import MARGIN, Page
from nanovlm.data.documents.papers import Asked
from nanovlm.data.documents.words import Words
from nanovlm.data.pictures import FORMATS
from nanovlm.errors import UserError

ORDINALS = ("first", "second", "third", "fourth", "fifth")
LONGEST_LINE = 22  # characters


# --- texts --------------------------------------------------------------------------------------------------------


def _lines(words: Words) -> tuple[list[str], Asked]:
    """Return lines of different words, with a number in one of them, and the questions."""
    rng = words.rng
    chosen = words.some("word", 20)
    lines = []
    for _ in range(rng.randint(3, 5)):
        line = [chosen.pop()]
        while chosen and len(" ".join([*line, chosen[-1]])) <= LONGEST_LINE and len(line) < 3 and rng.random() < 0.9:
            line.append(chosen.pop())
        lines.append(line)
    place = rng.randrange(len(lines))
    number = str(rng.randint(10, 9999))
    before, after = (*lines[place], chosen.pop())[:2]
    lines[place] = [before, number, after]  # as it is no first or last word
    joined = [" ".join(line) for line in lines]
    row = rng.randrange(len(lines))
    asked = [
        ("text", "what is written in the picture?", " ".join(joined)),
        ("text", f"what is the {ORDINALS[row]} line?", joined[row]),
        ("text", "what is the first word?", lines[0][0]),
        ("text", "what is the last word of the text?", lines[-1][-1]),
        ("text", "which number is written?", number),
        ("text", "how many lines are there?", str(len(lines))),
    ]
    if len(lines[row]) > 1:
        asked.append(("text", f"what is the last word of the {ORDINALS[row]} line?", lines[row][-1]))
    return joined, asked


def _write_lines(page: Page, lines: list[str], align: str = "l", left: float = MARGIN, skip: float = 1.3):
    x = page.width / 2 if align == "m" else left
    for line in lines:
        page.put(line, x=x, room=page.right - left, align=align, skip=skip)


def text_plain(page: Page, words: Words) -> Asked:
    lines, asked = _lines(words)
    _write_lines(page, lines)
    return asked


def text_framed(page: Page, words: Words) -> Asked:
    lines, asked = _lines(words)
    page.y += 8
    _write_lines(page, lines, align="m")
    page.y += 4
    page.box(7, 7, page.width - 8, page.y + MARGIN - 8, outline=page.accent, width=3)
    return asked


def text_note(page: Page, words: Words) -> Asked:
    """A sheet with ruled lines and a margin."""
    lines, asked = _lines(words)
    for number in range(len(lines)):
        page.rule(
            page.y + page.size + 5 + number * round(1.5 * page.step), left=0, right=page.width, ink=page.tint(0.5)
        )
    page.canvas.line((MARGIN + 8, 0, MARGIN + 8, 512), fill=page.accent, width=2)
    _write_lines(page, lines, left=MARGIN + 18, skip=1.5)
    return asked


# --- signs --------------------------------------------------------------------------------------------------------

# Photographs that the wheel of scikit-image carries, by split.
PHOTOGRAPHS = {
    "train": ("coffee.png", "brick.png", "chelsea.png", "gravel.png", "motorcycle_left.png"),
    "test": ("astronaut.png", "grass.png", "rocket.jpg"),
}
SIGN = (384, 288)  # pixels of a picture


@cache
def photographs() -> Path | None:
    """Return the folder of scikit-image's photographs, None where it is not installed."""
    found = importlib.util.find_spec("skimage")
    folder = Path(next(iter(found.submodule_search_locations))) / "data" if found else None  # pyright: ignore
    return folder if folder and all((folder / x).is_file() for y in PHOTOGRAPHS.values() for x in y) else None


def _photograph(words: Words) -> Image.Image:
    """Return a part of a photograph."""
    folder, rng = photographs(), words.rng
    if folder is None:
        raise UserError('signs stand on the photographs of scikit-image: pip install -e ".[documents]"')
    with Image.open(folder / rng.choice(PHOTOGRAPHS[words.split]), formats=FORMATS) as file:
        image = file.convert("RGB")
    scale = rng.uniform(0.6, 0.95) * min(image.width / SIGN[0], image.height / SIGN[1])
    wide, high = round(scale * SIGN[0]), round(scale * SIGN[1])
    left, top = rng.randint(0, image.width - wide), rng.randint(0, image.height - high)
    return image.crop((left, top, left + wide, top + high)).resize(SIGN, Image.Resampling.BICUBIC)


def _sign(page: Page, words: Words) -> tuple[list[str], Asked]:
    """Put a photograph on the page; return the words of the sign on it, and the questions."""
    page.image.paste(_photograph(words))
    said = [word.upper() for word in words.some("word", words.rng.randint(2, 3))]
    place = words.rng.randrange(len(said))
    return said, [
        ("sign", "what does the sign say?", " ".join(said)),
        ("sign", f"what is the {ORDINALS[place]} word on the sign?", said[place]),
        ("sign", "how many words are on the sign?", str(len(said))),
    ]


def sign_plate(page: Page, words: Words) -> Asked:
    """A board in the middle, with a word a line."""
    said, asked = _sign(page, words)
    high, wide = 34 * len(said) + 24, 240
    left = words.rng.randint(20, SIGN[0] - wide - 20)
    top = words.rng.randint(16, SIGN[1] - high - 16)
    page.box(left, top, left + wide, top + high, fill=page.paper, outline=page.ink, width=4)
    for number, word in enumerate(said):
        page.write(left + wide / 2, top + 12 + 34 * number, word, wide - 30, bold=True, scale=1.5, align="m")
    page.y = SIGN[1] - MARGIN
    return asked


def sign_strip(page: Page, words: Words) -> Asked:
    """A band along one edge."""
    said, asked = _sign(page, words)
    top = words.rng.choice((0, SIGN[1] - 44))
    page.box(0, top, SIGN[0], top + 44, fill=page.accent)
    page.write(SIGN[0] / 2, top + 9, " ".join(said), SIGN[0] - 24, bold=True, scale=1.4, align="m", ink=(255, 255, 255))
    page.y = SIGN[1] - MARGIN
    return asked


def sign_painted(page: Page, words: Words) -> Asked:
    """Letters on the photograph itself, with an outline."""
    said, asked = _sign(page, words)
    font = load_font(page.family.bold, 2 * page.size)
    y = words.rng.randint(50, SIGN[1] - 44 * len(said))
    light = words.rng.random() < 0.5
    for number, word in enumerate(said):
        at, how = (SIGN[0] / 2, y + 42 * number), {"anchor": "ms", "stroke_width": 3}
        page.canvas.text(at, word, font=font, fill="white" if light else "black",
                         stroke_fill="black" if light else "white", **how)  # fmt: skip
        page.texts.append((page.canvas.textbbox(at, word, font=font, **how), word))
    page.y = SIGN[1] - MARGIN
    return asked


# --- formulas -----------------------------------------------------------------------------------------------------

GREEK = (r"\alpha", r"\beta", r"\gamma", r"\lambda", r"\mu", r"\sigma")


def _formula(words: Words) -> tuple[str, Asked]:
    """Return the LaTeX of an equation, written without needless signs, and the questions."""
    rng = words.rng
    left, a, b, c = rng.sample("abcfghkmnpqrstuvwxyz", 4)
    greek, (k, n) = rng.choice(GREEK), sorted(rng.sample(range(2, 20), 2))
    m = rng.randint(2, 19)
    below = rng.choice((rf"{b}+{n}", rf"{b}^{{{n}}}", f"{n}{b}", rf"{greek}-{b}"))
    part, question, answer = rng.choice(
        (
            (rf"\frac{{{a}+{k}}}{{{below}}}", "what is the denominator?", below),
            (rf"\sqrt{{{below}}}", "what is under the root?", below),
            (rf"\sum_{{{c}=1}}^{{{n}}}{b}_{{{c}}}", "what is the upper limit of the sum?", str(n)),
            (rf"\int_{{{k}}}^{{{n}}}{a}^{{{m}}}d{a}", "what is the lower limit of the integral?", str(k)),
        )
    )
    more = rng.choice((f"{m}{c}", f"{greek} {c}", f"{c}^{{{k}}}", str(m)))
    sign = rng.choice("+-")
    latex = rng.choice((f"{left}={more}{sign}{part}", f"{left}={part}", f"{left}={part}{sign}{more}"))
    return latex, [
        ("formula", "write the formula in LaTeX.", latex),
        ("formula", question, answer),
        ("formula", "what is left of the equals sign?", left),
    ]


def _put_formula(page: Page, latex: str, scale: float):
    """Set a formula in the middle of the page at the current height."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser

    size = scale * page.size
    while True:
        how = FontProperties(size=size, math_fontfamily=page.family.math)
        drawn = MathTextParser("agg").parse(f"${latex}$", dpi=72, prop=how)
        mask = Image.fromarray(np.asarray(drawn.image))
        if mask.width <= page.right - MARGIN:
            break
        size *= 0.9
    left = round((page.width - mask.width) / 2)
    page.image.paste(page.ink, (left, round(page.y)), mask)
    page.texts.append(((left, page.y, left + mask.width, page.y + mask.height), latex))
    page.y += mask.height


def formula_plain(page: Page, words: Words) -> Asked:
    latex, asked = _formula(words)
    _put_formula(page, latex, 1.9)
    return asked


def formula_named(page: Page, words: Words) -> Asked:
    """A sentence before the formula."""
    latex, asked = _formula(words)
    page.put(f"{words.rng.choice(('From this follows', 'We obtain', 'It holds that'))}", skip=1.4)
    _put_formula(page, latex, 1.8)
    return asked


def formula_slide(page: Page, words: Words) -> Asked:
    """A slide: light on dark, with a title that has a number."""
    latex, asked = _formula(words)
    number = str(words.rng.randint(2, 60))
    page.box(0, 0, page.width, page.step + 14, fill=page.accent)
    page.write(MARGIN, 6, f"Lemma {number}", page.right - MARGIN, bold=True, ink=(255, 255, 255))
    page.y = page.step + 34
    _put_formula(page, latex, 1.9)
    page.y += 8
    return [*asked, ("formula", "what is the number of the lemma?", number)]


TEXTS = {
    "text": {"train": {"plain": (text_plain, 256), "framed": (text_framed, 256)}, "test": {"note": (text_note, 256)}},
    "sign": {
        "train": {"plate": (sign_plate, SIGN[0]), "strip": (sign_strip, SIGN[0])},
        "test": {"painted": (sign_painted, SIGN[0])},
    },
    "formula": {
        "train": {"plain": (formula_plain, 256), "named": (formula_named, 256)},
        "test": {"slide": (formula_slide, 256)},
    },
}
