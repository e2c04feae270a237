"""The words on the sheets of a report: whole, in their width, and nothing but letters."""

import pytest

from nanovlm.data.build.report import LINES, WIDTH, letters, wrap

REASON = "image 0 (000015.png, line 16 of planted/metadata.jsonl) cannot be read as an image: image file is truncated"


def test_a_reason_breaks_between_its_words():
    lines = wrap(REASON, 12).splitlines()
    assert " ".join(lines) == REASON and all(len(line) <= WIDTH for line in lines)


@pytest.mark.parametrize("text", [REASON, 500 * "a", 500 * "a b ", 10**6 * "ab-c "])
def test_what_does_not_fit_is_left_out(text):
    lines = wrap(text, LINES).splitlines()
    assert len(lines) == LINES and all(len(line) <= WIDTH for line in lines) and lines[-1].endswith("...")


def test_letters_of_other_alphabets_are_drawn():
    missing = bytes(letters(10).getmask("\ue000"))
    assert all(bytes(letters(10).getmask(sign)) != missing for sign in "aü\u0416\u03c9\u0142\N{REPLACEMENT CHARACTER}")


def test_signs_that_are_no_letters_are_replaced():
    assert wrap("a\x1b[31m\u202eb\0c", LINES) == "a\N{REPLACEMENT CHARACTER}[31m" + (
        "\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    )
