"""The usual ways to lay documents in rows, under their usual names, to compare our packing with.

```
naive padding          one document a row, as long as the longest of its batch
constrained padding    one document a row, all of one length; what is longer is left out
naive packing          in their order, the next row begins with the first that does not fit
greedy knapsack        longest first, each into the first row that has room
balanced knapsack      longest first, each into the emptiest row that has room
```

Those of IN_ORDER take documents as they come; those of CHOOSING choose in a pool of them, which `in_pools` deals out.
"""

import random
from bisect import insort
from collections.abc import Callable
from typing import NamedTuple

from nanovlm.data.packing import pack


class Packed(NamedTuple):
    """Rows of document indices, and the number of tokens that each row is padded to."""

    rows: list[list[int]]
    widths: list[int]


def naive_padding(lengths, num_tiles, row_length, max_tiles=None, batch_rows: int = 16) -> Packed:
    """One document a row; every row as long as the longest of its batch."""
    batches = [lengths[start : start + batch_rows] for start in range(0, len(lengths), batch_rows)]
    return Packed([[i] for i in range(len(lengths))], [max(batch) for batch in batches for _ in batch])


def constrained_padding(lengths, num_tiles, row_length, max_tiles=None, cap: int | None = None) -> Packed:
    """One document a row; every row of `cap` tokens, half a row, and longer documents are left out."""
    cap = row_length // 2 if cap is None else cap
    rows = [[i] for i, length in enumerate(lengths) if length <= cap]
    return Packed(rows, [cap] * len(rows))


def naive_packing(lengths, num_tiles, row_length, max_tiles=None) -> Packed:
    """Documents as they come; the first that does not fit begins the next row."""
    rows, tokens, tiles = [], row_length, 0
    for i, (length, more) in enumerate(zip(lengths, num_tiles, strict=True)):
        if tokens + length > row_length or (max_tiles is not None and tiles + more > max_tiles):
            rows.append([])
            tokens = tiles = 0
        rows[-1].append(i)
        tokens, tiles = tokens + length, tiles + more
    return Packed(rows, [row_length] * len(rows))


def greedy_knapsack(lengths, num_tiles, row_length, max_tiles=None) -> Packed:
    """Textbook bin packing (first-fit decreasing): longest first, each into the first row that has room. O(n^2)."""
    rows, tokens, tiles = [], [], []
    limit = sum(num_tiles) if max_tiles is None else max_tiles
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (r for r in range(len(rows)) if tokens[r] >= lengths[i] and tiles[r] >= num_tiles[i])
        row = next(fits, len(rows))
        if row == len(rows):
            rows, tokens, tiles = [*rows, []], [*tokens, row_length], [*tiles, limit]
        rows[row].append(i)
        tokens[row], tiles[row] = tokens[row] - lengths[i], tiles[row] - num_tiles[i]
    return Packed(rows, [row_length] * len(rows))


def balanced_knapsack(
    lengths, num_tiles, row_length, max_tiles=None, delta: int = 0, seed: int | None = None
) -> Packed:
    """Eagle 2's packing (arXiv:2501.14818): longest first, each into the emptiest row, so that rows are equally full.

    It begins with as many rows as the tokens fill, and `delta` more, and adds one for a document that fits nowhere.
    With a limit of tiles rows are tried from the emptiest on. Rows that stay empty are dropped; with `seed` the others
    are shuffled, as the first have the longest documents.
    """
    limit = sum(num_tiles) if max_tiles is None else max_tiles
    rows = [[] for _ in range((sum(lengths) + row_length - 1) // row_length + delta)]
    tiles = [0] * len(rows)
    loads = [(0, row) for row in range(len(rows))]  # (tokens, row), the emptiest first
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (
            place
            for place, (tokens, row) in enumerate(loads)
            if tokens + lengths[i] <= row_length and tiles[row] + num_tiles[i] <= limit
        )
        place = next(fits, None)
        tokens, row = (0, len(rows)) if place is None else loads.pop(place)
        if place is None:
            rows.append([])
            tiles.append(0)
        rows[row].append(i)
        tiles[row] += num_tiles[i]
        insort(loads, (tokens + lengths[i], row))
    rows = [row for row in rows if row]
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return Packed(rows, [row_length] * len(rows))


def balanced_knapsack_with_delta(lengths, num_tiles, row_length, max_tiles=None) -> Packed:
    """The balanced knapsack as huggingface/nanoVLM runs it: five rows more at the beginning, shuffled at the end."""
    return balanced_knapsack(lengths, num_tiles, row_length, max_tiles, delta=5, seed=0)


def ours(lengths, num_tiles, row_length, max_tiles=None) -> Packed:
    """`pack` of the loader."""
    rows = pack(lengths, num_tiles, row_length, max_tiles)
    return Packed(rows, [row_length] * len(rows))


def in_pools(strategy: Callable[..., Packed], size: int, lengths, num_tiles, row_length, max_tiles=None) -> Packed:
    """Pack `size` documents after the other by themselves, as they come."""
    rows, widths = [], []
    for start in range(0, len(lengths), size):
        pool = slice(start, start + size)
        packed = strategy(lengths[pool], num_tiles[pool], row_length, max_tiles)
        rows += [[start + i for i in row] for row in packed.rows]
        widths += packed.widths
    return Packed(rows, widths)


IN_ORDER = {
    "naive padding": naive_padding,
    "constrained padding": constrained_padding,
    "naive packing": naive_packing,
}
CHOOSING = {
    "greedy knapsack": greedy_knapsack,
    "balanced knapsack": balanced_knapsack,
    "balanced knapsack, delta 5": balanced_knapsack_with_delta,
    "ours": ours,
}
STRATEGIES = IN_ORDER | CHOOSING
