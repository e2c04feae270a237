"""How full and how even the rows of each packing strategy are.

    python benchmarks/packing.py            measure all, then write the page
    python benchmarks/packing.py page       the page from the committed results

Packs 10,000 documents of each of LENGTHS into rows of 2048 tokens: as they come, in pools of 50 and all at once,
without a limit of tiles and with 18. Every packing is checked before it counts. Writes benchmarks/results/packing.json,
and from it docs/packing.png and the tables of docs/packing.md.
"""

import itertools
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
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import pages
from nanovlm import cli
from nanovlm.config import DataConfig
from nanovlm.data.loader import Loader
from nanovlm.data.packing import document_cost
from nanovlm.data.packing_baselines import CHOOSING, IN_ORDER, STRATEGIES, Packed, in_pools
from nanovlm.data.source import IN_ORDER as AS_THEY_COME
from nanovlm.data.source import deal
from nanovlm.data.types import Document
from nanovlm.environment import device_name, git_commit
from nanovlm.files import read_json, write_file

RESULTS, PAGE = cli.PROJECT / "benchmarks" / "results" / "packing.json", cli.PROJECT / "docs" / "packing.md"
NUM, ROW_LENGTH, LIMITS, POOLS, REPEATS = 10_000, 2048, (None, 18), (50, None), 3
LOADER, LOADER_ROWS = "ours, in the loader", 8


def log_normal(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Median 400, sigma 0.9; 1 to 4 tiles, whatever the length."""
    return rng.lognormal(np.log(400), 0.9, num), rng.integers(1, 5, num)


def uniform(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """All lengths alike; 1 to 4 tiles."""
    return rng.integers(16, ROW_LENGTH + 1, num), rng.integers(1, 5, num)


def captions_and_pages(rng: np.random.Generator, num: int) -> tuple[np.ndarray, np.ndarray]:
    """Three captions of about 150 tokens and one tile to each page of about 1,200 tokens and 5 to 9 tiles."""
    is_page = rng.random(num) < 0.25
    lengths = np.where(is_page, rng.normal(1200, 200, num), rng.normal(150, 40, num))
    return lengths, np.where(is_page, rng.integers(5, 10, num), 1)


LENGTHS = {"log-normal": log_normal, "uniform": uniform, "captions and pages": captions_and_pages}


def documents(num: int, kind: str = "log-normal", seed: int = 0) -> tuple[list[int], list[int]]:
    """Draw lengths, of 16 to ROW_LENGTH tokens, and numbers of tiles."""
    lengths, num_tiles = LENGTHS[kind](np.random.default_rng(seed), num)
    return lengths.clip(16, ROW_LENGTH).astype(int).tolist(), num_tiles.tolist()


class Tokenised:
    """A source of documents that are tokenised already, each of them its index again and again, and blank tiles."""

    name, damaged, blocks, order = "tokenised text", (), None, AS_THEY_COME

    def __init__(self, lengths: list[int], num_tiles: list[int]):
        self.lengths, self.num_tiles = lengths, num_tiles

    def __len__(self):
        return len(self.lengths)

    def refs(self, slots, num_slots, start=None):
        return deal(self, slots, num_slots, start)

    def read(self, index: int) -> dict:
        return {"input_ids": np.full(self.lengths[index], index), "num_tiles": self.num_tiles[index]}


def make_document(raw: dict) -> Document:
    """Wrap tokens: every one is trained."""
    ids = torch.from_numpy(raw["input_ids"])
    branch_ids = torch.zeros(len(ids), dtype=torch.int32)
    return Document(ids, ids, branch_ids, torch.empty(raw["num_tiles"], 3, 1, 1, dtype=torch.uint8))


# --- measuring ------------------------------------------------------------------------------------------------


def load(lengths: list[int], num_tiles: list[int], pool: int, limit: int | None) -> Packed:
    """Return the rows that the loader makes: what it does not take from the pool is packed again with what comes."""
    config = DataConfig(row_length=ROW_LENGTH, batch_rows=LOADER_ROWS, pack_buffer=pool, max_tiles=limit or 0)
    rows = []
    for [batch] in Loader(Tokenised(lengths, num_tiles), make_document, config, pad_token_id=0, num_epochs=1):
        for ids, doc_ids in zip(batch.input_ids, batch.doc_ids, strict=True):
            rows.append([int(ids[doc_ids == i][0]) for i in doc_ids[doc_ids >= 0].unique()])
    return Packed(rows, [ROW_LENGTH] * len(rows))


def pack_by(strategy: str, lengths: list[int], num_tiles: list[int], pool: int | None, limit: int | None) -> Packed:
    """Pack by a key of STRATEGIES, where it chooses among the documents of a pool, or all."""
    size = pool if pool and strategy in CHOOSING else len(lengths)
    return in_pools(STRATEGIES[strategy], size, lengths, num_tiles, ROW_LENGTH, limit)


def measure(strategy: str, kind: str, pool: int | None, limit: int | None) -> dict:
    """Pack, check and count; CPU seconds are the least of several runs, of packing alone."""
    lengths, num_tiles = documents(NUM, kind)
    if strategy == LOADER:
        assert pool
        seconds, packed = [], load(lengths, num_tiles, pool, limit)
    else:
        seconds, packed = [], Packed([], [])
        for _ in range(REPEATS):
            begin = time.process_time()
            packed = pack_by(strategy, lengths, num_tiles, pool, limit)
            seconds.append(time.process_time() - begin)
    rows, widths = packed
    kept = sorted(i for row in rows for i in row)
    assert len({*kept}) == len(kept), "a document is doubled"
    if strategy != "constrained padding":
        assert len(kept) == NUM, "a document is lost"
    assert all(sum(lengths[i] for i in row) <= width for row, width in zip(rows, widths, strict=True))
    tiles = [sum(num_tiles[i] for i in row) for row in rows]
    assert limit is None or max(tiles) <= limit
    costs = [sum(document_cost(lengths[i], num_tiles[i]) for i in row) for row in rows]
    return {
        "lengths": kind,
        "strategy": strategy,
        "pool": pool,
        "limit": limit,
        "rows": len(rows),
        "discarded": NUM - len(kept),
        "padding_percent": round(100 * (1 - sum(lengths[i] for i in kept) / sum(widths)), 2),
        "cost_spread_percent": round(100 * statistics.pstdev(costs) / statistics.fmean(costs), 1),
        "most_tiles": max(tiles),
        "cpu_seconds": round(min(seconds), 3) if seconds else None,
    }


def list_jobs() -> list[tuple[str, str, int | None, int | None]]:
    """List what is measured: strategies that take documents as they come need no pool, the loader does."""
    return [
        (strategy, kind, pool, limit)
        for kind in LENGTHS
        for limit in LIMITS
        for strategy, pools in {
            **dict.fromkeys(IN_ORDER, (None,)),
            **dict.fromkeys(CHOOSING, POOLS),
            LOADER: POOLS[:1],
        }.items()
        for pool in pools
    ]


# --- the page -------------------------------------------------------------------------------------------------


def format_table(lines: list[dict], kind: str) -> str:
    """Return the table of one kind of lengths: a line for each strategy and pool."""
    found = {(line["strategy"], line["pool"], line["limit"]): line for line in lines if line["lengths"] == kind}
    least = math.ceil(sum(documents(NUM, kind)[0]) / ROW_LENGTH)
    heads = "pool", "rows", "padding %", "without limit", "cost spread %", "CPU s", "discarded"
    text = [f"**{kind}**: {LENGTHS[kind].__doc__} The tokens fill {least:,} rows.", ""]
    text += [f"| strategy | {' | '.join(heads)} |", "|---" + "|--:" * len(heads) + "|"]
    for strategy, pool, limit in found:
        if limit is None:
            continue
        line, free = found[strategy, pool, limit], found[strategy, pool, None]
        numbers = line["rows"], line["padding_percent"], free["padding_percent"], line["cost_spread_percent"]
        cells = [f"{number:,}" for number in numbers] + ["" if line["cpu_seconds"] is None else line["cpu_seconds"]]
        where = pool or ("none" if strategy in IN_ORDER else "all")
        text.append(f"| {strategy} | {' | '.join(map(str, (where, *cells, line['discarded'])))} |")
    return "\n".join(text)


def write_page(results: dict):
    """Put the tables of the results on the page, and draw the picture."""
    lines, bounds = results["lines"], []
    for kind in LENGTHS:
        rows = next(x["rows"] for x in lines if (x["strategy"], x["lengths"], x["pool"], x["limit"])
                    == ("ours", kind, None, LIMITS[1]))  # fmt: skip
        alone, bound = least_spread(*documents(NUM, kind), rows)
        bounds.append(f"{bound:.1f} % ({kind}, where {alone} documents fill a row alone)")
    text = "\n\n".join(format_table(lines, kind) for kind in LENGTHS)
    text += f"\n\nNo packing in as many rows as ours, all at once, has a smaller spread than {', '.join(bounds)}."
    text += f"\n\n{results['device']}, one thread, {results['date']}, commit {results['commit']}."
    pages.put(PAGE, "strategies", "packing.py", text)
    draw(PAGE.with_suffix(".png"))


def least_spread(lengths: list[int], num_tiles: list[int], num_rows: int) -> tuple[int, float]:
    """Count documents beside which no other fits; return the spread, in percent, if all other rows cost the same."""
    costs = list(map(document_cost, lengths, num_tiles))
    alone = [cost for cost, length in zip(costs, lengths, strict=True) if length + min(lengths) > ROW_LENGTH]
    others = num_rows - len(alone)
    even = [*alone, *[(sum(costs) - sum(alone)) / others] * others]
    return len(alone), 100 * statistics.pstdev(even) / statistics.fmean(even)


def draw(path: Path, num: int = 600, num_bars: int = 40):
    """Draw rows taken evenly from each strategy's packing, in pools of 50, as horizontal bars."""
    figure, axes = plt.subplots(len(LENGTHS), len(STRATEGIES), figsize=(16, 9), layout="constrained")
    colors = plt.colormaps["tab20"].colors
    for kind, of_kind in zip(LENGTHS, axes, strict=True):
        lengths, num_tiles = documents(num, kind)
        for strategy, axis in zip(STRATEGIES, of_kind, strict=True):
            rows, widths = pack_by(strategy, lengths, num_tiles, POOLS[0], LIMITS[1])
            for bar in range(num_bars):
                at = bar * len(rows) // num_bars
                ends = np.cumsum([0, *(lengths[i] for i in rows[at])]).tolist()
                axis.barh(bar, widths[at], color="0.85", height=0.9)
                spans = [(left, right - left) for left, right in itertools.pairwise(ends)]
                axis.broken_barh(spans, (bar - 0.45, 0.9), facecolors=[colors[n % 20] for n in range(len(spans))])
            axis.set(xlim=(0, ROW_LENGTH), yticks=[], ylim=(num_bars - 0.5, -0.5))
            axis.tick_params(labelsize=7)
        of_kind[0].set_ylabel(kind)
    for strategy, axis in zip(STRATEGIES, axes[0], strict=True):
        axis.set_title(strategy, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("tokens", fontsize=8)
    figure.savefig(path, dpi=72)
    plt.close(figure)


def main(arguments: list[str]):
    if arguments not in ([], ["page"]):
        sys.exit(__doc__)
    if not arguments:
        place = {"commit": git_commit(), "device": device_name(torch.device("cpu"))}
        place["date"] = time.strftime("%Y-%m-%d", time.gmtime())
        torch.set_num_threads(1)
        lines = [measure(*job) for job in tqdm(list_jobs(), unit="packing")]
        write_file(RESULTS, json.dumps({**place, "lines": lines}, indent=1))
    write_page(read_json(RESULTS))


if __name__ == "__main__":
    main(sys.argv[1:])
