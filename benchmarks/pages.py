"""Tables of benchmarks -> a page: between its marks a page has what a benchmark writes, and nothing by hand."""

from pathlib import Path

from nanovlm.errors import UserError
from nanovlm.files import write_file


def put(page: Path, name: str, by: str, text: str):
    """Put a text between the marks of a name, which say who writes it."""
    before, _old, after = find(page, name, by)
    write_file(page, f"{before}{text}{after}")


def find(page: Path, name: str, by: str) -> tuple[str, str, str]:
    """Return what stands before a table, the table, and what stands after it, marks among both."""
    first, last = f"<!-- {name}: written by benchmarks/{by} -->\n", f"\n<!-- {name} end -->"
    before, begin, rest = page.read_text("utf-8").partition(first)
    table, end, after = rest.partition(last)
    if not begin or not end:
        raise UserError(f"{page} has no {first.strip()} with {last.strip()} after it, for a table to stand between")
    return before + begin, table, end + after
