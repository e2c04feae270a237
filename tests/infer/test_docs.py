"""The tables of docs/inference.md are those of the result lines. `python -m tests.infer.test_docs` writes them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "inference.md", ROOT / "benchmarks" / "results" / "engine.jsonl"
NAMES = {
    "questions": "64 questions about 16 pictures",
    "vllm": "32 questions about 8 pictures",
    "decode": "one answer",
    "llama.cpp": "one answer",
    "speculate": "one answer, guesses by",
}


def newest():
    """Return the last line of each thing that was measured."""
    lines = {}
    for line in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines()):
        key = [line.get(name) for name in ("what", "shape", "weights", "peer", "guesses", "prompt")]
        lines[tuple(key)] = line
    return list(lines.values())


def speed():
    """Return the table of rates and ratios."""
    rows = ["| what | model, weights | ours | peer | ratio |", "|---|---|---|---|---|"]
    for line in newest():
        ratio = f"{line['ratio']:.2f} ({line['least']:.2f} to {line['most']:.2f})" if "ratio" in line else ""
        about = f"{line['shape']}, {line['weights']}"
        if line["what"] in NAMES:
            what = NAMES[line["what"]]
            if line["what"] == "speculate":
                what += f" {line['guesses']} ({line['prompt']}: {line['accepted']} of {line['drafted']} accepted)"
            peer = {"before": "before"}.get(line["peer"], line["peer"])
            if "peer_weights" in line:
                peer += f" {line['peer_weights'].rpartition('-')[2]}"
            rows.append(
                f"| {what} | {about} | {line['per_second']:.3g} {line['unit']} a second | "
                f"{line['peer_per_second']:.3g}, {peer} | {ratio} |"
            )
        elif line["what"] == "chat":
            rows.append(
                f"| first token of a chat's second turn | {about} | {line['second_s']:.3g} s | "
                f"{line['first_s']:.3g} s, its first turn | {ratio} |"
            )
        elif line["what"] == "answers":
            rows.append(
                f"| 8 answers to a prompt with a picture have begun | {about} | {line['first_s']:.3g} s, "
                f"{line['cache_ratio']:.2f} of the cache | {line['first_s_of_one']:.3g} s, one answer | {ratio} |"
            )
    return rows


def memory():
    """Return the table of what a model takes."""
    rows = ["| model | weights | of weights | a token in the cache | features of a tile |", "|---|---|---|---|---|"]
    for line in newest():
        if line["what"] == "memory":
            rows.append(
                f"| {line['shape']} | {line['weights']} | {line['weight_bytes'] / 1e6:,.1f} MB | "
                f"{line['cache_bytes_a_token']:,} | {line['feature_bytes_a_tile']:,} "
                f"({line['tokens_a_tile']} tokens) |"
            )
    return rows


TABLES = {"speed": speed, "memory": memory}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_the_results(name):
    found = re.search(rf"<!-- {name}: [^>]*-->\n(.*?)<!-- {name} end -->", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert found and found[1].splitlines() == TABLES[name](), "run python -m tests.infer.test_docs"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- {name} end -->)"
        text = re.sub(pattern, lambda m, table=table: m[1] + "\n".join(table()) + "\n" + m[2], text, flags=re.S)
    PAGE.write_text(text, encoding="utf-8")
