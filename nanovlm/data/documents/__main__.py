"""Draw documents with questions whose answers are known, into a folder that train.py and eval read.

    python -m nanovlm.data.documents data/documents --train 2000 --test 400
    python train.py small --data.sources data/documents/train --model.tiling.max-tiles 4
    python -m nanovlm.eval.run runs/small/model --data data/documents/test --metric anls

OUT/train and OUT/test have the pictures, and metadata.jsonl with the questions; OUT/sheet.png shows some of them;
OUT/documents.json says what was drawn with which fonts and versions, and what was left out and why. The same seed,
kinds, fonts and versions give the same files. What needs no file beside the packages that are always there is a source
of its own: `--data.sources documents`.
"""

import contextlib
import importlib.metadata
import itertools
import json
import multiprocessing
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from nanovlm import cli
from nanovlm.data.documents import web
from nanovlm.data.documents.draw import SPLITS, TEMPLATES, choose_asked, compose, to_record
from nanovlm.data.documents.fonts import read_families
from nanovlm.data.documents.page import Drawing
from nanovlm.data.documents.texts import photographs
from nanovlm.data.documents.words import Words
from nanovlm.errors import UserError, printable
from nanovlm.files import new_folder, write_file

ALL_KINDS = (*TEMPLATES, "web")
AT_ONCE = 16  # web pages in a screenshot
AHEAD = 64  # pictures that each worker draws before they are written
SHOWN, COLUMNS, CELL, LINE = 12, 4, 380, 15  # pictures of a split on the sheet


@dataclass(frozen=True)
class DocumentsConfig:
    # Folder to write; it must not exist.
    out: Path
    # Pictures of the split that is for training.
    train: int = 1000
    # Pictures of the split that is for tests: other templates, fonts, photographs and words.
    test: int = 200
    # Kinds of documents: letter, form, receipt, table, chart, text, sign, formula, web; empty for all that can be drawn
    # here. sign needs scikit-image, web a Chromium.
    kinds: tuple[str, ...] = ()
    # More fonts, files or folders, or system for those of this machine; a family is of the split that its name gives.
    fonts: tuple[str, ...] = ()
    # Another seed draws other documents.
    seed: int = 0
    # Processes that draw; what they draw does not depend on their number.
    num_workers: int = 0


def main(config: DocumentsConfig):
    """Draw both splits, their sheet and the account of them."""
    if config.out.exists():
        raise UserError(f"{config.out} is there already: name a new folder")
    if min(config.train, config.test, config.num_workers) < 0:
        raise UserError(
            f"--train {config.train}, --test {config.test} and --num-workers {config.num_workers} must be at least 0"
        )
    if unknown := [kind for kind in config.kinds if kind not in ALL_KINDS]:
        raise UserError(f"--kinds {unknown[0]!r} is no kind of document; there are {', '.join(ALL_KINDS)}")
    missing = find_missing()
    if named := [kind for kind in config.kinds if kind in missing]:
        raise UserError(f"{named[0]} cannot be drawn: {missing[named[0]]}")
    kinds = tuple(dict.fromkeys(config.kinds)) or tuple(kind for kind in ALL_KINDS if kind not in missing)
    families, no_use = read_families(config.fonts)
    account = {
        "what": "drawn documents, not scanned ones",
        "config": {key: value for key, value in asdict(config).items() if key not in ("out", "num_workers")},
        "left_out": {} if config.kinds else missing,
        "versions": versions() | ({"browser": browser_version()} if "web" in kinds else {}),
        "fonts": {split: [family.name for family in families[split]] for split in SPLITS},
        "fonts_left_out": no_use,
        "splits": {},
    }
    shown: list[tuple[Image.Image, dict]] = []
    with new_folder(config.out) as folder:
        for split in SPLITS:
            number = getattr(config, split)
            drawings = draw_all(split, number, kinds, config, families)
            counts = write_split(folder / split, tqdm(drawings, desc=split, total=number, delay=2), shown)
            account["splits"][split] = counts
        write_file(folder / "documents.json", json.dumps(account, indent=1) + "\n")
        draw_sheet(shown).save(folder / "sheet.png")
    for kind, reason in account["left_out"].items():
        print(f"left out: {kind}: {reason}")
    if no_use:
        name, reason = next(iter(no_use.items()))
        print(f"left out: {len(no_use)} fonts, such as {printable(name)}: {reason} (fonts_left_out in documents.json)")
    print(
        f"wrote {config.train} pictures for training and {config.test} for tests to {config.out}: see sheet.png there"
    )


def find_missing() -> dict[str, str]:
    """Return why kinds cannot be drawn on this machine."""
    missing = {}
    if photographs() is None:
        missing["sign"] = 'the photographs of scikit-image are not there: pip install -e ".[documents]"'
    if web.find_browser() is None:
        missing["web"] = "there is no headless Chromium: apt-get install chromium"
    return missing


def draw_all(split: str, number: int, kinds: tuple[str, ...], config, families) -> Iterator[tuple[str, Drawing]]:
    """Yield `number` kinds and drawings, the kinds in turn."""
    places = [(kinds[i % len(kinds)], i // len(kinds)) for i in range(number)]
    alone, pages = ([place for place in places if (place[0] == "web") == is_web] for is_web in (False, True))
    draw = partial(draw_one, split=split, seed=config.seed, families=families)
    with contextlib.ExitStack() as stack:
        drawings = map(draw, alone)
        if config.num_workers:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(config.num_workers))
            some = AHEAD * config.num_workers  # so that what waits to be written does not fill the memory
            drawings = itertools.chain.from_iterable(
                pool.map(draw, alone[i : i + some], chunksize=8) for i in range(0, len(alone), some)
            )
        shown = draw_web(split, len(pages), config.seed, families)
        for kind, _number in places:
            yield kind, next(shown if kind == "web" else drawings)


def draw_one(place: tuple[str, int], split: str, seed: int, families) -> Drawing:
    kind, number = place
    return compose(split, number, (kind,), seed, families)


def draw_web(split: str, number: int, seed: int, families) -> Iterator[Drawing]:
    """Yield web pages, some of which share a start of the browser."""
    for start in range(0, number, AT_ONCE):
        parts = []
        for i in range(start, min(start + AT_ONCE, number)):
            rng = Random(f"documents {seed} {split} web {i}")
            family = rng.choice(families[split])
            page, asked, template = web.write_page(rng, Words(rng, split), family)
            parts.append((page, choose_asked(rng, asked), template, family))
        yield from web.draw_pages(parts)


def write_split(folder: Path, drawings, shown: list) -> dict[str, dict[str, int]]:
    """Write pictures and metadata.jsonl, and keep the first to be shown; return counts by template, font and kind."""
    folder.mkdir()
    templates, fonts, questions = Counter(), Counter(), Counter()
    most = len(shown) + SHOWN
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for number, (kind, drawing) in enumerate(drawings):
            record = to_record(drawing, kind)
            name = f"{number:06}.png"
            drawing.image.save(folder / name)
            line = {"file_name": name} | {key: value for key, value in record.items() if key != "images"}
            file.write(json.dumps(line) + "\n")
            templates[record["template"]] += 1
            fonts[record["font"]] += 1
            questions.update(text["kind"] for text in record["texts"])
            if len(shown) < most:
                shown.append((drawing.image, record))
    counts = {"templates": templates, "fonts": fonts, "questions": questions}
    return {key: dict(sorted(value.items())) for key, value in counts.items()}


def draw_sheet(shown: list[tuple[Image.Image, dict]]) -> Image.Image:
    """Draw pictures at their own size, or as large as a cell is, with template, font and questions below."""
    font = ImageFont.load_default(12)
    cells = []
    for image, record in shown:
        image = image if image.width <= CELL else image.resize((CELL, round(image.height * CELL / image.width)))
        lines = [f"{record['template']}, {record['font']}"]
        lines += [f"{text['user']}  {text['assistant']}" for text in record["texts"]]
        cells.append((image, lines))
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    heights = [max(image.height + LINE * len(lines) + 24 for image, lines in row) for row in rows]
    sheet = Image.new("RGB", (COLUMNS * (CELL + 12) + 12, sum(heights) + 12), (205, 205, 205))
    canvas, top = ImageDraw.Draw(sheet), 12
    for row, height in zip(rows, heights, strict=True):
        for number, (image, lines) in enumerate(row):
            left = 12 + number * (CELL + 12)
            sheet.paste(image, (left, top))
            for line, text in enumerate(lines):
                while font.getlength(text) > CELL:
                    text = text[:-4] + "..."
                canvas.text((left, top + image.height + 3 + LINE * line), text, fill=(0, 0, 0), font=font)
        top += height
    return sheet


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("pillow", "matplotlib")}


def browser_version() -> str:
    browser = web.find_browser()
    assert browser is not None
    return subprocess.run([browser, "--version"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    import tyro

    cli.run(lambda: main(tyro.cli(DocumentsConfig, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))))
