"""How full and how even the rows of each packing strategy are.

    python benchmarks/packing.py

Packs 10,000 documents (log-normal lengths, median 400, sigma 0.9, 16 to 2048 tokens; 1 to 4 tiles) into rows of 2048
tokens, without a limit of tiles and with 18. Every packing is checked before it counts. Writes
benchmarks/results/packing.json, docs/packing.md and docs/packing.png.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nanovlm import cli
from nanovlm.data.packing import document_cost
from nanovlm.data.packing_baselines import STRATEGIES, pad
from nanovlm.environment import device_name, git_commit
from nanovlm.files import write_file

ROW_LENGTH, LIMITS, REPEATS = 2048, (None, 18), 3
TEXT = """# Packing

Written by `python benchmarks/packing.py`: 10,000 documents (log-normal lengths, median 400, sigma 0.9, 16 to 2048
tokens; 1 to 4 tiles) in rows of 2048 tokens. *Cost* is what `document_cost` of `nanovlm/data/packing.py` predicts for
a row; its spread (standard deviation) is what ranks wait for each other. {ratios}
{device}, {date}, commit {commit}.

{table}
Rows of each strategy (limit of 18 tiles), one bar a row, one color a document, padding grey:

![rows of each strategy](packing.png)
"""


def documents(num: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Draw lengths and numbers of tiles."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log(400), 0.9, num).clip(16, ROW_LENGTH).astype(int)
    return lengths.tolist(), rng.integers(1, 5, num).tolist()


def measure(strategy: str, lengths, num_tiles, limit) -> tuple[dict, list[list[int]]]:
    """Pack, check and count; CPU seconds are the least of several runs."""
    seconds = []
    for _ in range(REPEATS):
        begin = time.process_time()
        rows = STRATEGIES[strategy](lengths, num_tiles, ROW_LENGTH, limit)
        seconds.append(time.process_time() - begin)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths))), "a document is lost or doubled"
    widths = pad(strategy, rows, lengths, ROW_LENGTH)
    assert all(sum(lengths[i] for i in row) <= width for row, width in zip(rows, widths, strict=True))
    tiles = [sum(num_tiles[i] for i in row) for row in rows]
    assert limit is None or max(tiles) <= limit or min(map(len, rows)) == 1
    costs = [sum(document_cost(lengths[i], num_tiles[i]) for i in row) for row in rows]
    return {
        "strategy": strategy,
        "limit": limit,
        "rows": len(rows),
        "padding_percent": round(100 * (1 - sum(lengths) / sum(widths)), 3),
        "cost_spread": round(statistics.pstdev(costs)),
        "most_tiles": max(tiles),
        "cpu_seconds": round(min(seconds), 3),
    }, rows


def main():
    lengths, num_tiles = documents(10_000)
    lines, drawn = [], {}
    for limit in LIMITS:
        for strategy in STRATEGIES:
            line, drawn[strategy] = measure(strategy, lengths, num_tiles, limit)
            lines.append(line)
    table = format_table(lines)
    print(table)
    place = {"commit": git_commit(), "device": device_name(torch.device("cpu"))}
    place["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    results = {"least_rows": math.ceil(sum(lengths) / ROW_LENGTH), **place, "strategies": lines}
    write_file(cli.PROJECT / "benchmarks" / "results" / "packing.json", json.dumps(results, indent=2))
    spread = {(line["strategy"], line["limit"]): line["cost_spread"] for line in lines}
    ratios = "Our spread as a share of that of first-fit\ndecreasing: " + ", ".join(
        f"{spread['ours', a] / spread['first-fit decreasing', b]:.2f} ({text})"
        for a, b, text in ((None, None, "both without limit"), (18, 18, "both with"), (18, None, "ours alone with"))
    )
    alone, bound = least_spread(lengths, num_tiles, lines[-1]["rows"])
    ratios += (
        f".\nNo packing in {lines[-1]['rows']} rows has a spread below {bound:.0f}: {alone} documents fill a row alone."
    )
    text = TEXT.format(table=table, ratios=ratios, **place)
    write_file(cli.PROJECT / "docs" / "packing.md", text)
    draw(drawn, lengths, cli.PROJECT / "docs" / "packing.png")


def least_spread(lengths: list[int], num_tiles: list[int], num_rows: int) -> tuple[int, float]:
    """Count the documents beside which no other fits; return what spread is left if all other rows cost the same."""
    costs = list(map(document_cost, lengths, num_tiles))
    alone = [cost for cost, length in zip(costs, lengths, strict=True) if length + min(lengths) > ROW_LENGTH]
    others = num_rows - len(alone)
    return len(alone), statistics.pstdev([*alone, *[(sum(costs) - sum(alone)) / others] * others])


def format_table(lines: list[dict]) -> str:
    """Lay the lines out as Markdown."""
    names = ("strategy", "limit", "rows", "padding_percent", "cost_spread", "most_tiles", "cpu_seconds")
    heads = ("strategy", "tile limit", "rows", "padding %", "cost spread", "most tiles", "CPU s")
    text = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    text += [f"| {' | '.join('none' if line[n] is None else str(line[n]) for n in names)} |" for line in lines]
    return "\n".join(text) + "\n"


def draw(drawn: dict[str, list[list[int]]], lengths: list[int], path: Path, num_rows: int = 40):
    """Draw rows taken evenly from each strategy's packing as horizontal bars."""
    figure, axes = plt.subplots(1, len(drawn), figsize=(14, 4), sharey=True, layout="constrained")
    colors = plt.colormaps["tab20"].colors
    for axis, (strategy, rows) in zip(axes, drawn.items(), strict=True):
        widths = pad(strategy, rows, lengths, ROW_LENGTH)
        for bar, number in enumerate(range(0, len(rows), math.ceil(len(rows) / num_rows))):
            axis.barh(bar, widths[number], color="0.85", height=0.9)
            left = 0
            for place, i in enumerate(rows[number]):
                axis.barh(bar, lengths[i], left=left, color=colors[place % len(colors)], height=0.9)
                left += lengths[i]
        axis.set(title=strategy, xlim=(0, ROW_LENGTH), xlabel="tokens", yticks=[])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
