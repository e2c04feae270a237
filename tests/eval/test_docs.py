"""The tables of docs/evaluation.md are those of the dicts. `python -m tests.eval.test_docs` writes them."""

import re
from pathlib import Path

import pytest

from nanovlm.eval.benchmarks import table as benchmarks
from nanovlm.eval.corpus import CORPUS_METRICS
from nanovlm.eval.metrics import METRICS

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def metrics():
    """Return the table of metrics: the first sentence of each function."""
    lines = ["| metric | is |", "|---|---|"]
    lines += [f"| `{name}` | {first_sentence(metric)} |" for name, metric in METRICS.items()]
    return lines + [f"| `{name}` | {first_sentence(metric.combine)} |" for name, metric in CORPUS_METRICS.items()]


def first_sentence(function):
    return " ".join(function.__doc__.split("\n\n")[0].split())


TABLES = {"metrics": metrics, "benchmarks": benchmarks}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_its_dict(name):
    found = re.search(rf"<!-- {name}: [^>]*-->\n(.*?)<!-- {name} end -->", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert found and found[1].splitlines() == TABLES[name](), "run python -m tests.eval.test_docs"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in TABLES.items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- {name} end -->)"
        text = re.sub(pattern, lambda m, lines=lines: m[1] + "\n".join(lines()) + "\n" + m[2], text, flags=re.S)
    PAGE.write_text(text, encoding="utf-8")
