"""Chunks cover their text, keep to sections and to the number of tokens, and say where they begin."""

import itertools
import random

import pytest

from nanovlm.search.chunks import Chunk, join_headings, split, words
from nanovlm.search.read import Section, Text, read_markdown

PAGE = "# A\n\n## B\none two three\n\n## C\nfour five six seven eight\nnine\n## D\n"


def shown(chunks: list[Chunk], text: Text):
    return [(chunk.section, " ".join(text.text[chunk.start : chunk.end].split())) for chunk in chunks]


def test_sections_are_chunks_and_a_heading_alone_joins_the_next():
    text = read_markdown(PAGE.encode(), "a.md")
    assert shown(split(text, "section", 20, 2, words), text) == [
        ("A > B", "# A ## B one two three"),
        ("A > C", "## C four five six seven eight nine"),
        ("A > D", "## D"),
    ]
    assert join_headings(Text("# A\n", [Section(0, "A")])) == [Section(0, "A")]
    pages = Text("a title\n\nwords\n", [Section(0, "page 1"), Section(9, "page 2")])
    assert join_headings(pages) == pages.sections
    underlined = Text("A\n==\nB\n--\nwords\n", [Section(0, "A"), Section(5, "A > B")])
    assert join_headings(underlined) == [Section(0, "A > B")]


def test_a_long_section_is_cut_into_windows_that_share_tokens():
    text = read_markdown(PAGE.encode(), "a.md")
    assert shown(split(text, "section", 4, 1, words), text) == [
        ("A > B", "# A ## B"),
        ("A > B", "B one two three"),
        ("A > C", "## C four five"),
        ("A > C", "five six seven eight"),
        ("A > C", "eight nine"),
        ("A > D", "## D"),
    ]


@pytest.mark.parametrize(("most", "overlap"), [(1, 0), (5, 0), (5, 4), (180, 20), (1000, 0)])
def test_windows_cover_every_token_and_share_as_many_as_asked(most, overlap):
    rng = random.Random(most)
    whole = "".join(rng.choice(["ab", " ", "\n", "c "]) for _ in range(700))
    text = Text(whole, [Section(0, "one"), Section(300, "two")])
    chunks, places = split(text, "tokens", most, overlap, words), words(whole)
    inside = [[p for p in places if chunk.start <= p[0] and p[1] <= chunk.end] for chunk in chunks]
    assert sorted({p for own in inside for p in own}) == places
    assert all(len(own) == most for own in inside[:-1]) and len(inside[-1]) <= most
    for before, after in itertools.pairwise(inside):
        assert after[:overlap] == before[len(before) - overlap :] and len(after) > overlap
    assert all(chunk.section == ("two" if chunk.start >= 300 else "one") for chunk in chunks)


def test_a_text_without_tokens_has_no_chunks():
    assert split(Text("  \n", [Section(0, "")]), "section", 5, 1, words) == []
    assert split(Text("", [Section(0, "")]), "tokens", 5, 1, words) == []


def test_white_space_that_tokens_hold_is_not_shown():
    text = Text("a  b\n\n", [Section(0, "")])
    assert split(text, "tokens", 1, 0, lambda _: [(0, 1), (1, 4), (4, 6)]) == [Chunk("", 0, 1), Chunk("", 3, 4)]
