"""Tables of benchmarks -> a page: between its marks a page has what a benchmark writes, and nothing by hand."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from nanovlm.environment import short_commit
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


def read_lines(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []


def lay_out(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def where(line: dict) -> str:
    """Return what a line was measured on; a + says that files were changed after the commit."""
    threads = f"{line['threads']} thread{'s' if line['threads'] > 1 else ''}"
    commit = short_commit(line["commit"]) if line["commit"] else "no commit"
    return f"{line['device']}, {threads}, {commit}, {line['date']}"
