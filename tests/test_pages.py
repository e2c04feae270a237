"""Tables are written between their marks, and the rest of a page stays as it is."""

import re

import pytest

from benchmarks import pages
from nanovlm import cli
from nanovlm.errors import UserError

PAGES = [cli.PROJECT / "README.md", *sorted((cli.PROJECT / "docs").glob("*.md"))]
MARKS = re.compile(r"^<!-- ([\w ]+): written by (\S+) -->\n(?:.*\n)*?<!-- \1 end -->$", re.M)


def test_a_table_stands_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: written by benchmarks/x.py -->\nold\n\nold\n<!-- a end -->\nafter\n")
    pages.put(page, "a", "x.py", "new")
    assert page.read_text() == "before\n<!-- a: written by benchmarks/x.py -->\nnew\n<!-- a end -->\nafter\n"
    with pytest.raises(UserError, match=r"page\.md has no <!-- b: written by benchmarks/x.py --> with <!-- b end -->"):
        pages.put(page, "b", "x.py", "new")


def test_marks_name_a_file_and_have_an_end():
    for page in PAGES:
        text = page.read_text("utf-8")
        found = MARKS.findall(text)
        assert len(found) == text.count("<!-- ") / 2, page
        assert all((cli.PROJECT / writer).exists() for _name, writer in found), page
