"""Web pages as headless Chromium shows them, many in one screenshot.

Each page is an element of the fixed WIDTH and of the height that it needs. A strip of one colour at its left edge, of
another one for the next page, tells where it ends. The font is part of the file, so that none of the system is used.
"""

import base64
import hashlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from nanovlm.data.documents.fonts import Family
from nanovlm.data.documents.page import SIDE, Drawing
from nanovlm.data.documents.papers import Asked
from nanovlm.data.documents.words import Words, money
from nanovlm.data.pictures import FORMATS
from nanovlm.errors import UserError

WIDTH, TALLEST = 480, 15_000  # pixels of a page, and of a screenshot
EDGE = 4  # width of the strip
COLORS = ((255, 0, 255), (0, 255, 255), (255, 255, 0))  # of the strips in turn; the last one ends the file
PATIENCE = 120  # seconds
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


# --- pages: each returns its HTML and what is asked ------------------------------------------------------------------


def article(words: Words, accent: str) -> tuple[str, Asked]:
    rng = words.rng
    site, author, date = f"{words.one('city')} News", words.person(), words.date()
    menu = [word.capitalize() for word in words.some("topic", 4)]
    title = f"{words.one('last')} opens a new {words.one('goods').lower()} shop in {words.one('city')}"
    visitors, minutes = str(rng.randint(100, 9999)), str(rng.randint(2, 15))
    body = (
        f"The shop is in {words.street()} and was seen by {visitors} visitors on its first day. "
        f"It is open from {(time := words.time())} on, and {(other := words.person())} is its head."
    )
    page = f"""<div style="background:{accent};color:#fff;padding:10px 16px;font-size:20px"><b>{site}</b></div>
        <div style="padding:8px 16px;border-bottom:1px solid #ccc">{" &nbsp; ".join(menu)}</div>
        <div style="padding:4px 16px 14px"><h1 style="font-size:22px;margin:10px 0">{title}</h1>
        <div style="color:#555">By {author} - {date} - {minutes} min</div><p style="line-height:1.5">{body}</p></div>"""
    return page, [
        ("web", "what is the name of the site?", site),
        ("web", "who wrote the article?", author),
        ("web", "when was the article published?", date),
        ("web", "what is the headline?", title),
        ("web", "what is the last entry of the menu?", menu[-1]),
        ("web", "how many visitors came on the first day?", visitors),
        ("web", "from what time on is the shop open?", time),
        ("web", "who is the head of the shop?", other),
    ]


def product(words: Words, accent: str) -> tuple[str, Asked]:
    rng = words.rng
    name, price, stock = (
        f"{words.company()} {words.one('goods')}",
        money(rng.randint(500, 49999)),
        str(rng.randint(2, 90)),
    )
    rating, button = f"{rng.randint(10, 49) / 10} of 5", rng.choice(("Add to cart", "Buy now", "Order"))
    rows = {"Color": words.one("color"), "Weight": f"{rng.randint(1, 30)} kg", "Model": words.code()}
    cells = "".join(
        f'<tr><td style="padding:4px 20px 4px 0;color:#555">{key}</td><td>{value}</td></tr>'
        for key, value in rows.items()
    )
    # The picture of the product is grey, as its color is asked for and stands in words.
    page = f"""<div style="display:flex;gap:16px;padding:16px"><div style="width:130px;height:150px;flex:none;
        background:linear-gradient(#bbb,#eee);border-radius:8px"></div><div>
        <h1 style="font-size:20px;margin:0 0 8px">{name}</h1><div>Rating: {rating}</div>
        <div style="font-size:24px;color:{accent};margin:8px 0">{price}</div>
        <div>{stock} in stock</div><div style="display:inline-block;background:{accent};color:#fff;border-radius:6px;
        padding:8px 18px;margin-top:10px">{button}</div></div></div><table style="margin:0 16px 16px">{cells}</table>"""
    return page, [
        ("web", "what is the price?", price),
        ("web", "how many are in stock?", stock),
        ("web", "what is written on the button?", button),
        ("web", "what is the name of the product?", name),
        ("web", "what is the rating?", rating),
        *[("web", f"what is the {key.lower()}?", value) for key, value in rows.items()],
    ]


def shop(words: Words, accent: str) -> tuple[str, Asked]:
    """A search with its hits, two a row."""
    rng = words.rng
    sought, names = words.one("color"), words.some("goods", 4)
    prices = [money(cents) for cents in words.numbers(4, 500, 29999, 5)]
    stars = [f"{x / 10}" for x in words.numbers(4, 10, 50)]
    hits = str(rng.randint(20, 999))
    cards = "".join(
        f"""<div style="border:1px solid #bbb;border-radius:10px;padding:10px"><b>{name}</b><div
        style="color:{accent};margin:6px 0">{price}</div><div>Rating {star}</div></div>"""
        for name, price, star in zip(names, prices, stars, strict=True)
    )
    page = f"""<div style="padding:14px 16px;background:#f1f1f1"><div style="border:2px solid {accent};
        border-radius:18px;padding:7px 16px;background:#fff">{sought}</div></div>
        <div style="padding:10px 16px">{hits} results</div>
        <div style="display:grid;grid-template-columns:1fr 1fr;gap:12px;padding:0 16px 16px">{cards}</div>"""
    place = rng.randrange(4)
    return page, [
        ("web", "what was searched for?", sought),
        ("web", "how many results are there?", hits),
        ("web", f"what is the price of {names[place]}?", prices[place]),
        ("web", f"what is the rating of {names[place]}?", stars[place]),
        ("web", f"which product costs {prices[place]}?", names[place]),
        ("web", "which product has the highest rating?", names[stars.index(max(stars, key=float))]),
    ]


PAGES = {"train": {"article": article, "product": product}, "test": {"shop": shop}}
ACCENTS = ("#1a5fb4", "#a51d2d", "#26704a", "#613583", "#b5651d")

# --- the browser ------------------------------------------------------------------------------------------------------


def write_page(rng: Random, words: Words, family: Family) -> tuple[str, Asked, str]:
    """Return the HTML of a page, what may be asked about it, and its template."""
    template = rng.choice(list(PAGES[words.split]))
    body, asked = PAGES[words.split][template](words, rng.choice(ACCENTS))
    size = rng.randint(14, 16)
    style = f"font:{size}px {_name(family)};width:{WIDTH}px;box-sizing:border-box;background:#fff;color:#111"
    return f'<div style="{style};overflow-wrap:anywhere">{body}</div>', asked, template


def take_pictures(pages: Sequence[str], families: Sequence[Family]) -> list[Image.Image]:
    """Show pages one below the other in a browser, and cut its picture at the strips. Raises UserError without one."""
    browser = find_browser()
    if browser is None:
        raise UserError(
            f"web pages need a browser, {' or '.join(BROWSERS)}, and there is none: apt-get install chromium"
        )
    strips = [f"rgb{COLORS[number % 2]}" for number in range(len(pages))]
    body = "".join(
        f'<div style="display:flow-root;border-left:{EDGE}px solid {strip}">{page}</div>'
        for page, strip in zip(pages, strips, strict=True)
    )
    body += f'<div style="border-left:{EDGE}px solid rgb{COLORS[2]};height:{EDGE}px"></div>'
    text = f'<!doctype html><meta charset="utf-8"><style>{_faces(families)}body{{margin:0}}</style>{body}'
    with tempfile.TemporaryDirectory() as place:
        file, picture = Path(place) / "pages.html", Path(place) / "pages.png"
        file.write_text(text, encoding="utf-8")
        command = [
            browser,
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            "--force-device-scale-factor=1",
            "--disable-lcd-text",
            "--proxy-server=127.0.0.1:9",  # nothing of the network, which pages do not name
            f"--user-data-dir={place}/profile",
            f"--window-size={WIDTH + EDGE},{TALLEST}",
            f"--screenshot={picture}",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # which Chromium wants of root
            file.as_uri(),
        ]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{browser} took no picture of web pages in {PATIENCE} seconds") from error
        if not picture.is_file():
            last = (ended.stderr.strip() or "it says nothing").splitlines()[-1]
            raise UserError(f"{browser} took no picture of web pages: {last}")
        with Image.open(picture, formats=FORMATS) as image:
            pixels = np.asarray(image.convert("RGB"))
    return cut(pixels, len(pages))


def cut(pixels: np.ndarray, number: int) -> list[Image.Image]:
    """Cut uint8[H, W, 3] where the strip at the left edge changes its colour. Raises UserError for other numbers."""
    edge = pixels[:, EDGE // 2].astype(int)
    changes = [0, *(np.flatnonzero(np.abs(np.diff(edge, axis=0)).sum(1)) + 1).tolist(), len(edge)]
    ends = changes[: number + 1]
    is_right = len(ends) == number + 1 and all(tuple(edge[ends[i]]) == COLORS[i % 2] for i in range(number))
    if not is_right or ends[-1] >= len(edge) or tuple(edge[ends[-1]]) != COLORS[2]:
        raise UserError(f"the browser's picture does not show {number} pages whole")
    return [Image.fromarray(pixels[a:b, EDGE : EDGE + WIDTH]) for a, b in itertools.pairwise(ends)]


def _faces(families: Sequence[Family]) -> str:
    rules = []
    for family in dict.fromkeys(families):
        for weight, font in (("normal", family.regular), ("bold", family.bold)):
            data = base64.b64encode(font if isinstance(font, bytes) else font.read_bytes()).decode()
            rules.append(
                f"@font-face{{font-family:{_name(family)};font-weight:{weight};src:url(data:font/ttf;base64,{data})}}"
            )
    return "".join(rules)


def _name(family: Family) -> str:
    """Return the name that a family has in the file: its own is a stranger's."""
    return f"font-{hashlib.sha256(family.name.encode()).hexdigest()[:16]}"


def draw_pages(parts: Sequence[tuple[str, Asked, str, Family]]) -> list[Drawing]:
    """Return the drawings of some pages: HTML, questions, template and family of each."""
    images = take_pictures([part[0] for part in parts], [part[3] for part in parts])
    tallest = max(image.height for image in images)
    assert tallest <= SIDE, f"a web page is {tallest} pixels high"
    return [
        Drawing(image, asked, template, family.name)
        for image, (_page, asked, template, family) in zip(images, parts, strict=True)
    ]
