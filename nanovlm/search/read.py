"""The bytes of a text file -> its text, and where its sections begin: plain text, Markdown, HTML and PDF.

Markdown has sections at its headings, HTML too, PDF at its pages; plain text is one section. A section is called by the
headings above it: `Training > Resume`. HTML is read by the standard library's parser, which takes any input and needs
no package; PDF by pypdf, which is Python alone, so that a stranger's file cannot reach the memory of the process.
"""

import io
import logging
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

from nanovlm.errors import UserError
from nanovlm.limits import time_limit
from nanovlm.search.extra import needed

SECONDS = 60  # of computing for a file
LONGEST = 2**25  # characters of a file


class Section(NamedTuple):
    """Where a section begins, in characters, and what it is called: a title, or several joined by ` > `."""

    start: int
    title: str


class Text(NamedTuple):
    """The text of a file, and its sections, the first of which begins at 0."""

    text: str
    sections: list[Section]


def read(data: bytes, name: str) -> Text:
    """Read a file by its suffix. Raises UserError for a file that is damaged, endless or without text."""
    with time_limit(SECONDS, f"reading {name}"):
        text = READERS[Path(name).suffix.lower()](data, name)
    if len(text.text) > LONGEST:
        raise UserError(f"{name} has {len(text.text)} characters, more than {LONGEST}: cut it into several files")
    if not text.text.strip():
        raise UserError(f"{name} has no text" + (": its pages may be pictures" if name.lower().endswith("pdf") else ""))
    return text


def read_text(data: bytes, name: str) -> Text:
    return Text(decode(data, name), [Section(0, "")])


def decode(data: bytes, name: str, encoding: str = "utf-8-sig") -> str:
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise UserError(f"{name} is no text in UTF-8: {error}") from error


def nest(titles: list[tuple[int, str]], level: int, title: str) -> str:
    """Put a title below the titles of higher levels, in place, and return them joined."""
    while titles and titles[-1][0] >= level:
        titles.pop()
    titles.append((level, " ".join(title.split())))
    return " > ".join(title for _, title in titles if title)


# --- Markdown --------------------------------------------------------------------------------------------------


def read_markdown(data: bytes, name: str) -> Text:
    """Take `#` headings and underlined ones, outside of code blocks; the text stays as it is written."""
    text = decode(data, name)
    sections, titles, fence, start, before = [Section(0, "")], [], "", 0, (0, "")
    for line in text.splitlines(keepends=True):
        mark = re.match(r" {0,3}(`{3,}|~{3,})", line)
        heading = re.match(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$", line.rstrip("\r\n"))
        underline = re.match(r" {0,3}(=+|-+)[ \t]*$", line.rstrip("\r\n"))
        if mark and (not fence or (mark[1].startswith(fence) and not line.strip().strip(fence[0]))):
            fence = "" if fence else mark[1]
        elif not fence and heading:
            sections.append(Section(start, nest(titles, len(heading[1]), heading[2])))
        elif not fence and underline and before[1].strip() and not re.match(r"\s*([-*>|+]|\d+[.)])", before[1]):
            level = 1 if underline[1][0] == "=" else 2
            sections.append(Section(before[0], nest(titles, level, before[1])))
        is_text = not fence and not heading and not underline and not mark
        before, start = (start, line if is_text else ""), start + len(line)
    return Text(text, sections[1:] if len(sections) > 1 and sections[1].start == 0 else sections)


# --- HTML ------------------------------------------------------------------------------------------------------

# Elements that begin a new line, and those whose text nobody reads.
BLOCKS = frozenset(
    "address article aside blockquote br caption dd details dialog div dl dt fieldset figcaption figure footer form h1 "
    "h2 h3 h4 h5 h6 header hr li main nav ol option p pre section summary table td th tr ul".split()
)
UNSEEN = frozenset("title script style template noscript svg math iframe object select textarea".split())


class HTML(HTMLParser):
    """Collects the text of a page, a line for each block, and its headings."""

    def __init__(self):
        super().__init__()
        self.pieces, self.length, self.sections, self.titles = [], 0, [Section(0, "")], []
        self.unseen: list[str] = []  # open elements whose text does not count
        self.heading: tuple[int, int, list[str]] | None = None  # level, start and words of the open one
        self.pre = 0

    def add(self, text: str):
        self.pieces.append(text)
        self.length += len(text)

    def break_line(self):
        if self.pieces and not self.pieces[-1].endswith("\n"):
            self.add("\n")

    def handle_starttag(self, tag, attrs):
        if tag in UNSEEN:
            self.unseen.append(tag)
        if self.unseen:
            return
        if tag in BLOCKS:
            self.break_line()
        self.pre += tag == "pre"
        if re.fullmatch("h[1-6]", tag):
            self.heading = int(tag[1]), self.length, []

    def handle_startendtag(self, tag, attrs):
        if tag not in UNSEEN:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag in self.unseen:
            del self.unseen[len(self.unseen) - 1 - self.unseen[::-1].index(tag) :]
        elif self.unseen:
            return
        if tag in BLOCKS:
            self.break_line()
        self.pre = max(0, self.pre - (tag == "pre"))
        if self.heading and tag == f"h{self.heading[0]}":
            level, start, words = self.heading
            self.sections.append(Section(start, nest(self.titles, level, "".join(words))))
            self.heading = None

    def handle_data(self, data):
        if self.unseen:
            return
        if not self.pre:
            data = re.sub(r"\s+", " ", data)
            if not self.pieces or self.pieces[-1][-1:].isspace():
                data = data.lstrip()
        if data:
            self.add(data)
            if self.heading:
                self.heading[2].append(data)


def read_html(data: bytes, name: str) -> Text:
    """Take what a reader sees, with its headings; a page says its encoding, or it is UTF-8."""
    declared = re.search(rb"""<meta[^>]{0,200}charset=["']?([\w-]{1,40})""", data[:4096], flags=re.I)
    encoding = declared[1].decode().lower() if declared else "utf-8"
    parser = HTML()
    parser.feed(decode(data, name, "utf-8-sig" if encoding in ("utf-8", "utf8") else encoding))
    parser.close()
    sections = parser.sections
    return Text("".join(parser.pieces), sections[1:] if len(sections) > 1 and not sections[1].start else sections)


# --- PDF -------------------------------------------------------------------------------------------------------


def read_pdf(data: bytes, name: str) -> Text:
    """Take the text of each page; a page that is a picture has none."""
    pypdf = needed("pypdf")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells of faults that it mends
    text, sections = "", []
    try:
        for number, page in enumerate(pypdf.PdfReader(io.BytesIO(data)).pages, start=1):
            sections.append(Section(len(text), f"page {number}"))
            text += page.extract_text() + "\n\n"
    except Exception as error:  # of a damaged file, whatever its parts raise where they do not fit
        raise UserError(f"{name} cannot be read as PDF: {type(error).__name__}: {error}") from error
    return Text(text, sections or [Section(0, "")])


READERS: dict[str, Callable[[bytes, str], Text]] = {
    ".txt": read_text,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
}
