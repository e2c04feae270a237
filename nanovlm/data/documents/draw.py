"""Drawn documents with questions whose answers are known exactly.

`draw(split, index)` is a pure function: it says the same on any machine, and looks the same with the same versions of
Pillow and matplotlib. Kinds take turns: letters, forms, receipts, tables, charts, formulas and short texts; signs on
photographs too where they are named and scikit-image is installed, and the command beside this file (__main__.py)
writes web pages as well. Everything is drawn, not scanned: no folds, stains, blur or handwriting.

A split has templates, fonts, photographs and words of its own: what a test picture looks like, and the names in it,
never occur in training. The questions of a picture are independent. No side is longer than 512 pixels and no letter is
set smaller than 12, those of `text` and `formula` on 256.
"""

import functools
from collections.abc import Sequence
from random import Random

from nanovlm.data.documents.charts import CHARTS, draw_chart
from nanovlm.data.documents.fonts import Family, own_families
from nanovlm.data.documents.page import Drawing, Page
from nanovlm.data.documents.papers import PAPERS
from nanovlm.data.documents.tables import TABLES
from nanovlm.data.documents.texts import TEXTS
from nanovlm.data.documents.words import Words
from nanovlm.data.drawn import Drawn

SPLITS = ("train", "test")
MOST_ASKED = 5  # questions about a picture
LARGE = {"text": (15, 20), "formula": (14, 17), "sign": (16, 20)}  # sizes of fonts, where they are others
DARK = {"slide": True}  # templates that are light on dark
ON_PAPER = PAPERS | TABLES | TEXTS
TEMPLATES = PAPERS | TABLES | CHARTS | TEXTS
# Kinds that need no more than is always there.
KINDS = tuple(kind for kind in TEMPLATES if kind != "sign")


def draw(
    split: str,
    index: int,
    kinds: Sequence[str] = (),
    seed: int = 0,
    families: dict[str, tuple[Family, ...]] | None = None,
) -> dict:
    """Return `{"images": [PIL], "texts": [{"user", "assistant", "kind"}, ...], "independent": True, ...}`.

    Documents number 0, 1, ... of a split are of the kinds in turn, by default KINDS; `families` are those that it may
    be written in.
    """
    kinds = tuple(dict.fromkeys(kinds)) or KINDS
    return to_record(compose(split, index, kinds, seed, families), kinds[index % len(kinds)])


def compose(split: str, index: int, kinds=KINDS, seed: int = 0, families=None) -> Drawing:
    """Draw a document and choose what is asked about it."""
    kind, number = kinds[index % len(kinds)], index // len(kinds)
    rng = Random(f"documents {seed} {split} {kind} {number}")
    template = rng.choice(list(TEMPLATES[kind][split]))
    family = choose_family(rng, kind, (families or own_families())[split])
    words = Words(rng, split)
    if kind == "chart":
        drawing = draw_chart(rng, words, family, template, CHARTS[kind][split][template])
    else:
        write, width = ON_PAPER[kind][split][template]
        page = Page(rng, family, width, rng.randint(*LARGE[kind]) if kind in LARGE else 0, template in DARK)
        asked = write(page, words)
        drawing = Drawing(page.finish(), asked, template, family.name, page.texts)
    drawing.asked = choose_asked(rng, drawing.asked)
    return drawing


def choose_family(rng: Random, kind: str, families: Sequence[Family]) -> Family:
    """Choose one of the families that a kind can be written in: formulas need a font of mathematics."""
    return rng.choice([family for family in families if family.math or kind != "formula"])


def choose_asked(rng: Random, asked: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return rng.sample(asked, min(MOST_ASKED, len(asked)))


def to_record(drawing: Drawing, kind: str) -> dict:
    texts = [{"user": question, "assistant": answer, "kind": asked} for asked, question, answer in drawing.asked]
    return {
        "images": [drawing.image],
        "texts": texts,
        "independent": True,
        "template": f"{kind}/{drawing.template}",
        "font": drawing.font,
    }


# The drawn documents of one split, of all kinds that need no further package, or of some in turn.
Documents = functools.partial(Drawn, "documents", draw, SPLITS, TEMPLATES)
