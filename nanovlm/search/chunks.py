"""A text and its sections -> chunks: the passages that are found, and shown to a model.

```
sections    |# A|## B  text ........|## C  text .........................................|
by section  [A and B               ][C, first window        ]
                                              [C, second window, begins in the first    ]
by tokens   [                                 ][ windows of the whole text              ]
```
"""

import bisect
import re
from collections.abc import Callable
from typing import NamedTuple

from nanovlm.search.read import Section, Text

Places = list[tuple[int, int]]  # the characters of each token


class Chunk(NamedTuple):
    """The characters from `start` to `end` of a text, and the section in which they begin."""

    section: str
    start: int
    end: int


def split(text: Text, by: str, most: int, overlap: int, tokens: Callable[[str], Places]) -> list[Chunk]:
    """Cut a text into chunks of at most so many tokens, neighbours sharing `overlap` of them.

    By section no chunk reaches over the end of one, and what is longer is cut into windows.
    """
    places = tokens(text.text)
    if by == "tokens":
        return windows(text, places, most, overlap)
    joined = join_headings(text)
    starts, token_starts = [start for start, _ in joined], [start for start, _ in places]
    chunks = []
    for (start, title), end in zip(joined, [*starts[1:], len(text.text)], strict=True):
        own = places[bisect.bisect_left(token_starts, start) : bisect.bisect_left(token_starts, end)]
        chunks += [chunk._replace(section=title) for chunk in windows(text, own, most, overlap)]
    return chunks


def join_headings(text: Text) -> list[Section]:
    """Return the sections; one that is a heading alone joins the next one, and has its title."""
    joined, first = [], None
    for section, end in zip(text.sections, [*(s.start for s in text.sections[1:]), len(text.text)], strict=True):
        first = section.start if first is None else first
        if not is_heading(text.text[section.start : end], section.title):
            joined.append(Section(first, section.title))
            first = None
    return joined if first is None else [*joined, Section(first, text.sections[-1].title)]


def is_heading(text: str, title: str) -> bool:
    """Return whether a section is its heading alone, of which a line under it is part."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip("=- \t")]
    return bool(title) and len(lines) <= 1 and title.rpartition(" > ")[2] in "".join(lines)


def windows(text: Text, places: Places, most: int, overlap: int) -> list[Chunk]:
    """Cut tokens that follow each other into windows; white space at their ends does not count."""
    chunks, starts = [], [section.start for section in text.sections]
    for first in range(0, max(1, len(places) - overlap), most - overlap):
        window = places[first : first + most]
        start, end = (window[0][0], window[-1][1]) if window else (0, 0)
        shown = text.text[start:end]
        start, end = start + len(shown) - len(shown.lstrip()), end - len(shown) + len(shown.rstrip())
        if start < end:
            chunks.append(Chunk(text.sections[bisect.bisect_right(starts, start) - 1].title, start, end))
    return chunks


def words(text: str) -> Places:
    """Return the characters of each word: of a text for which no tokenizer is there."""
    return [match.span() for match in re.finditer(r"\S+", text)]
