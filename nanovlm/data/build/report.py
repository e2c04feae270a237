"""What a funnel left out, and why: counts, a bar chart, and for each stage a sheet with some of the records it dropped.

The records of a sheet are chosen by a hash of their numbers, so they are from all over the source and the same in every
run. What a record says is drawn, or written with the signs of Markdown and HTML escaped: it is shown and never read.
"""

import hashlib
import heapq
import html
import io
import json
import re
import textwrap
from collections import Counter
from collections.abc import Sized
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps

from nanovlm.data.build.items import text_of
from nanovlm.data.build.texts import SIGNS
from nanovlm.data.records import to_sample
from nanovlm.data.source import Ref, Source
from nanovlm.errors import printable
from nanovlm.files import write_file

SHOWN = 20  # records on a sheet
SIDE, GAP, LINE, LINES = 160, 10, 13, 3
COLUMNS = 6  # even, so that a record stands beside the one that is kept in its place
WIDTH = 26  # letters in a line below a picture


class Dropped(NamedTuple):
    """A record that a stage dropped, and what the report shows of it."""

    number: int
    ref: Ref
    line: dict
    picture: Image.Image | None
    words: str


class Report:
    """Counts what became of each record; keeps some of those that were dropped."""

    def __init__(self, stages: tuple[str, ...], worded: set[str], source: Source, options: dict):
        """Of the stages, those that are `worded` look at what is said."""
        self.stages, self.worded, self.source, self.options, self.num = stages, worded, source, options, 0
        self.dropped, self.signs, self.of_source = Counter(), Counter(), Counter()
        self.chosen: dict[str, list[tuple]] = {}  # of each stage a heap of (-hash, number, ref, line)

    @property
    def kept(self) -> int:
        return self.num - self.dropped.total()

    def count(self, ref: Ref, line: dict):
        """Count a record by the last line of the ledger about it."""
        self.num += 1
        self.signs.update(name for name in SIGNS if line["scores"].get(name))
        stage = line.get("stage", "")
        self.of_source[ref.source, bool(stage)] += 1
        if stage:
            self.dropped[stage] += 1
            order = int.from_bytes(hashlib.blake2b(str(ref.number).encode(), digest_size=8).digest())
            heap, entry = self.chosen.setdefault(stage, []), (-order, ref.number, ref, line)
            if len(heap) < SHOWN:
                heapq.heappush(heap, entry)
            elif entry > heap[0]:
                heapq.heapreplace(heap, entry)

    def write(self, out: Path, seconds: dict[str, float]) -> dict:
        """Write report.json, report.md and the pictures; return what report.json has."""
        names = [*self.stages, *sorted(self.dropped.keys() - {*self.stages})]
        left, rows = self.num, []
        for name in names:
            left -= self.dropped[name]
            rows.append((name, self.dropped[name], left))
        sources = sorted({name for name, _is_dropped in self.of_source})
        found = {
            "read": self.num,
            "kept": self.kept,
            "dropped": {name: number for name, number, _left in rows},
            "signs": {name: self.signs[name] for name in SIGNS},
            "sources": {
                name: {"read": self.of_source[name, False] + self.of_source[name, True],
                       "kept": self.of_source[name, False]}
                for name in sources
            },
            "seconds": {name: round(value, 6) for name, value in seconds.items()},
        }  # fmt: skip
        assert found["kept"] + sum(found["dropped"].values()) == found["read"]
        write_file(out / "funnel.png", draw_funnel(self.num, rows))
        examples = {}
        for name in (name for name in names if name in self.chosen):
            chosen = sorted(self.chosen[name], key=lambda entry: entry[1])
            examples[name] = [Dropped(number, ref, line, *self.look(ref.key)) for _order, number, ref, line in chosen]
            write_file(out / f"dropped-{name}.png", self.draw_sheet(name, examples[name]))
        write_file(out / "report.json", json.dumps(found, indent=2) + "\n")
        write_file(out / "report.md", to_markdown(found, rows, examples, self.worded))
        return found

    def draw_sheet(self, name: str, chosen: list[Dropped]) -> bytes:
        """Draw some records that a stage dropped, as PNG; beside each what it says, or the one kept in its place."""
        cells = []
        for number, _ref, line, picture, words in chosen:
            reason = str(number) if words == line["reason"] else f"{number}: {line['reason']}"
            cells.append((picture or words, reason))
            if picture and name in self.worded:
                cells.append((words, ""))
            if "like" in line and isinstance(self.source, Sized):
                like, said = self.look(line["like"])
                cells.append((like or said, f"{line['like']} is kept"))
        height = SIDE + LINES * LINE + GAP
        rows = (len(cells) + COLUMNS - 1) // COLUMNS
        sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, 30 + rows * height + GAP), "white")
        canvas, font = ImageDraw.Draw(sheet), letters(10)
        title = f"{name}: {len(chosen)} of {self.dropped[name]} records that were left out"
        canvas.text((GAP, 8), title, fill="black", font=letters(14))
        for place, (picture, text) in enumerate(cells):
            x, y = GAP + place % COLUMNS * (SIDE + GAP), 30 + place // COLUMNS * height
            if isinstance(picture, Image.Image):
                sheet.paste(picture, (x, y))
            else:
                canvas.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), fill="#eee")
                canvas.multiline_text((x + 4, y + 4), wrap(picture, 12), fill="#555", font=font, spacing=1)
            canvas.multiline_text((x, y + SIDE + 1), wrap(text, LINES), fill="black", font=font, spacing=1)
        png = io.BytesIO()
        sheet.save(png, "PNG")
        return png.getvalue()

    def look(self, key) -> tuple[Image.Image | None, str]:
        """Return the first picture of a record, if it has one, and what its answers say; or why it cannot be read."""
        try:
            sample = to_sample(self.source.read(key), **self.options)
            words = [text_of(message) for message in sample.messages if message["role"] in ("assistant", "text")]
            if not sample.images:
                return None, "\n".join(words)
            picture = sample.images[0]
            method = Image.Resampling.NEAREST if max(picture.size) < SIDE else Image.Resampling.LANCZOS
            return ImageOps.pad(picture, (SIDE, SIDE), method, color=(235, 235, 235)), "\n".join(words)
        except Exception as error:  # whatever a record does, the sheet has the others
            return None, str(error)


def letters(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's DejaVu Sans, as Pillow's own font has no letters but those of English."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def wrap(text: str, num_lines: int) -> str:
    """Break a text into lines between words, longer words anywhere, and leave out what does not fit."""
    most = num_lines * WIDTH + 1  # a stranger's text may be long
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:most])
    return textwrap.fill(shown, WIDTH, max_lines=num_lines, placeholder="...", break_on_hyphens=False)


def draw_funnel(num: int, rows: list[tuple[str, int, int]]) -> bytes:
    """Draw how many records are left after each stage, and how many it dropped; return a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, left = ["read", *(name for name, _n, _left in rows)], [num, *(left for _name, _n, left in rows)]
    dropped = [0, *(number for _name, number, _left in rows)]
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.36 * len(names)), layout="constrained")
    axis.barh(names, left, color="#4477aa", label="left")
    axis.barh(names, dropped, left=left, color="#ee6677", label="dropped")
    for place, (some, lost) in enumerate(zip(left, dropped, strict=True)):
        axis.text(some + lost + num / 100, place, f"{some}" + (f"  (-{lost})" if lost else ""), va="center", fontsize=8)
    axis.set_xlim(0, 1.18 * max(1, num))
    axis.invert_yaxis()
    axis.set_xlabel("records")
    axis.legend(fontsize=8, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, dpi=100, metadata={"Software": None})
    plt.close(figure)
    return png.getvalue()


def to_markdown(
    found: dict, rows: list[tuple[str, int, int]], examples: dict[str, list[Dropped]], worded: set[str]
) -> str:
    lines = [f"{found['kept']} of {found['read']} records passed.", "", "![records after each stage](funnel.png)", ""]
    lines += ["| stage | dropped | left | ms a record |", "|---|--:|--:|--:|"]
    for name, number, left in rows:
        each = 1000 * found["seconds"].get(name, 0) / max(1, left + number)
        lines.append(f"| {escape(name)} | {number} | {left} | {each:.2f} |")
    signs = ", ".join(f"{name} {number}" for name, number in found["signs"].items())
    lines += ["", f"Records whose text has signs of what is no text (counted, and never obeyed): {signs}.", ""]
    lines += ["| source | read | kept |", "|---|--:|--:|"]
    lines += [f"| {escape(name)} | {of['read']} | {of['kept']} |" for name, of in found["sources"].items()]
    for name, chosen in examples.items():
        lines += ["", f"## {escape(name)}", "", f"![dropped by {escape(name)}](dropped-{name}.png)", ""]
        for dropped in chosen:
            source, where, reason = map(escape, (dropped.ref.source, dropped.ref.where, dropped.line["reason"]))
            said = f': "{escape(dropped.words)}"' if name in worded and dropped.words != dropped.line["reason"] else ""
            lines.append(f"- {source}, {where}: {reason}{said}")
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Write a text of a stranger so that neither Markdown nor HTML finds a sign of its own in it."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~-])", r"\\\1", html.escape(printable(text, most=300), quote=False))
