"""Document -> Row. Pack whole documents into rows of fixed length.

```
row 0  [0 0 0 0 0 0 1 1 1 1 1 2 2 . ]      digits: doc_ids, dots: padding
row 1  [0 0 0 0 0 0 0 0 1 1 1 1 . . ]
```

`pack` is the packer of the loader. packing_baselines.py has the usual strategies, for comparison
(benchmarks/packing.py prints and draws them all).
"""

import heapq
import math
from bisect import bisect_left, insort
from collections import defaultdict

import torch
from torch import Tensor

from nanovlm.data.types import IGNORE, Document, Row
from nanovlm.errors import UserError

# Shares of the tokens that best fit places after the longer documents have been spread, in the order in which they are
# tried: from the most even rows to best fit alone (1).
FITTED_SHARES = (0.1, 0.2, 0.3, 1.0)
# No other share is tried once there are at most FEW_ENOUGH times as many rows as the tokens or tiles fill, or at most
# NEARLY times as many when a share was worse than the best.
FEW_ENOUGH, NEARLY = 1.0005, 1.01
# Rows that best fit tries before it leaves a document for an additional row: keeps packing O(n log n).
MOST_TRIES = 16


def document_cost(length: int, num_tiles: int) -> float:
    """Predict what a document costs to compute, in units of a token without attention.

    A decoder block of hidden size D multiplies a token by about 12 D^2 weights and, with a causal mask, by D L / 2
    keys and as many values in a document of length L: length + length^2 / (12 D), here with D = 768. A tile counts as
    256 tokens: the 576 patches of a 384-pixel tile in a SigLIP-B/16 of 86 M parameters are as much work as 370 tokens
    in a decoder of 135 M parameters, or 140 in one of 360 M.
    """
    return length + length * length / (12 * 768) + 256 * num_tiles


def image_cost(document: Document) -> float:
    """Predict what the images of a document cost, in the same unit.

    A picture that is read at its own size counts by its P patches, in which each sees all: P + P^2 / (6 D), so that one
    of 576 patches costs what a tile of as many does; a patch is taken for one of 16 pixels a side.
    """
    if not document.grids or len(document.grids[0]) > 2:  # tiles that are read by themselves
        return document_cost(0, len(document.tiles))
    of_tile = document.tiles[0, 0].numel() / 16**2
    pictures = [rows * columns * of_tile for rows, columns, *_ in document.grids]
    return 256 * sum(P + P * P / (6 * 768) for P in pictures) / (576 + 576 * 576 / (6 * 768))


def pack(
    lengths: list[int],
    num_tiles: list[int],
    row_length: int,
    max_tiles: int | None = None,
    image_costs: list[float] | None = None,
) -> list[list[int]]:
    """Assign documents to as few rows as possible, so that all rows cost about the same.

    First the longer documents are spread: each, longest first, goes into the emptiest row. So every row gets long and
    short ones, and a fair share of the tiles. The rest is placed by best fit: each goes into the fullest row that has
    room, which leaves hardly a token free. The more best fit places, the fewer and the less even the rows are, so
    several shares are tried. Finally documents of equal length are exchanged to put costly images into cheap rows.
    O(n log n). Without `image_costs` (image_cost) each tile is taken for one that is read by itself.

    Returns one list of document indices per row, with every index exactly once; the same for the same input.
    Raises UserError for a document with more tokens or tiles than a row may have.
    """
    limit = sum(num_tiles) if max_tiles is None else max_tiles
    for i, (length, tiles) in enumerate(zip(lengths, num_tiles, strict=True)):
        if length > row_length:
            raise UserError(f"document {i} has {length} tokens, more than row_length = {row_length}")
        if tiles > limit:
            raise UserError(f"document {i} has {tiles} tiles, more than max_tiles = {max_tiles}")
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], -num_tiles[i], i))
    least = max(math.ceil(sum(lengths) / row_length), math.ceil(sum(num_tiles) / max(1, limit)))
    best = []
    for share in FITTED_SHARES:
        rows, left = [], longest_first
        while left:
            more, rest = _spread_and_fit(left, lengths, num_tiles, row_length, limit, share)
            rows += more
            if best and 2 * len(rest) > len(left):
                break  # this share makes too little progress, and another one worked
            left = rest
        if left:
            continue
        if not best or len(rows) < len(best):
            best = rows
        got_worse = len(rows) > len(best)
        if len(best) <= (NEARLY if got_worse else FEW_ENOUGH) * least:
            break
    return _exchange_tiles(best, lengths, num_tiles, limit, image_costs)


def _spread_and_fit(documents, lengths, num_tiles, row_length, limit, fitted_share):
    """Fill the least number of rows that could hold these documents; return the rows and the documents left over."""
    num_tokens, tiles = (sum(numbers[i] for i in documents) for numbers in (lengths, num_tiles))
    num_rows = max(math.ceil(num_tokens / row_length), math.ceil(tiles / max(1, limit)), 1)
    rows = [[] for _ in range(num_rows)]
    tokens_free, tiles_free = [row_length] * num_rows, [limit] * num_rows
    emptiest = [(0.0, row) for row in range(num_rows)]  # (share of tokens or tiles that is used, row)
    num_spread, to_spread = 0, (1 - fitted_share) * num_tokens
    while num_spread < len(documents) and to_spread > 0:
        i, row = documents[num_spread], emptiest[0][1]
        if lengths[i] > tokens_free[row] or num_tiles[i] > tiles_free[row]:
            break
        rows[row].append(i)
        tokens_free[row] -= lengths[i]
        tiles_free[row] -= num_tiles[i]
        to_spread -= lengths[i]
        num_spread += 1
        used = max(1 - tokens_free[row] / row_length, 1 - tiles_free[row] / max(1, limit))
        heapq.heapreplace(emptiest, (used, row))
    free = sorted((tokens_free[row], row) for row in range(num_rows) if tokens_free[row])
    left = []
    for i in documents[num_spread:]:
        at = bisect_left(free, (lengths[i], -1))
        end = min(len(free), at + MOST_TRIES)
        while at < end and num_tiles[i] > tiles_free[free[at][1]]:
            at += 1
        if at == end:
            left.append(i)
            continue
        tokens, row = free.pop(at)
        rows[row].append(i)
        tiles_free[row] -= num_tiles[i]
        if tokens > lengths[i]:
            insort(free, (tokens - lengths[i], row))
    return [row for row in rows if row], left


def _exchange_tiles(rows, lengths, num_tiles, limit, image_costs=None):
    """Among documents of equal length, put the one with the costliest images into the cheapest row, and so on."""
    image_costs = image_costs or [document_cost(0, tiles) for tiles in num_tiles]
    costs = [document_cost(length, 0) + images for length, images in zip(lengths, image_costs, strict=True)]
    row_costs = [sum(costs[i] for i in row) for row in rows]
    row_tiles = [sum(num_tiles[i] for i in row) for row in rows]
    slots = defaultdict(list)  # length -> (row, place in the row)
    for row, documents in enumerate(rows):
        for place, i in enumerate(documents):
            slots[lengths[i]].append((row, place))
    for _length, places in sorted(slots.items(), reverse=True):
        documents = [rows[row][place] for row, place in places]
        costliest_first = sorted(documents, key=lambda i: (-image_costs[i], i))
        if image_costs[costliest_first[0]] == image_costs[costliest_first[-1]]:
            continue
        # Costs without these documents: each of their places counts as the average until it is filled.
        mean = sum(costs[i] for i in documents) / len(documents)
        for (row, _place), i in zip(places, documents, strict=True):
            row_costs[row] += mean - costs[i]
            row_tiles[row] -= num_tiles[i]
        cheapest = [(row_costs[row], row, place) for row, place in places]
        heapq.heapify(cheapest)
        chosen = []
        for i in costliest_first:
            while cheapest[0][0] != row_costs[cheapest[0][1]]:  # the row got another document since
                _cost, row, place = cheapest[0]
                heapq.heapreplace(cheapest, (row_costs[row], row, place))
            _cost, row, place = heapq.heappop(cheapest)
            chosen.append((row, place, i))
            row_costs[row] += costs[i] - mean
            row_tiles[row] += num_tiles[i]
        if any(row_tiles[row] > limit for row, _place in places):
            for row, _place, i in chosen:
                row_costs[row] -= costs[i]
                row_tiles[row] -= num_tiles[i]
            chosen = [(row, place, i) for (row, place), i in zip(places, documents, strict=True)]
            for row, _place, i in chosen:
                row_costs[row] += costs[i]
                row_tiles[row] += num_tiles[i]
        for row, place, i in chosen:
            rows[row][place] = i
    return rows


# --- rows --------------------------------------------------------------------------------------------------


def make_row(documents: list[Document], row_length: int, pad_token_id: int) -> Row:
    """Lay documents side by side and pad to `row_length` (pad_token_id, no label, doc_id -1)."""
    padding = row_length - sum(len(d) for d in documents)

    def join(pieces, fill):
        return torch.cat([*pieces, pieces[0].new_full((padding, *pieces[0].shape[1:]), fill)])

    for name in documents[0].values:
        if len(widths := {d.values[name].shape[1:].numel() for d in documents}) > 1:  # read by different workers
            found = " and ".join(map(str, sorted(widths)))
            raise UserError(f"records bring {name} of {found} numbers a token: all records of a run need equally many")
    return Row(
        input_ids=join([d.input_ids for d in documents], pad_token_id),
        labels=join([d.labels for d in documents], IGNORE),
        doc_ids=join([torch.full((len(d),), i, dtype=torch.int32) for i, d in enumerate(documents)], -1),
        branch_ids=join([d.branch_ids for d in documents], 0),
        position_ids=join([d.position_ids for d in documents], 0),
        tiles=torch.cat([d.tiles for d in documents]),
        tile_doc_ids=torch.cat([torch.full((len(d.tiles),), i, dtype=torch.int32) for i, d in enumerate(documents)]),
        span_ids=join([padded_spans(d) for d in documents], 0)
        if any(d.span_ids is not None for d in documents)
        else None,
        values={name: join([d.values[name] for d in documents], 0.0) for name in documents[0].values},
        grids=[grid for d in documents for grid in d.grids],
    )


def padded_spans(document: Document) -> Tensor:
    """Return the spans of a document, int32[L], 0 where it says none."""
    spans = document.input_ids.new_zeros(len(document), dtype=torch.int32)
    if document.span_ids is not None:
        spans[: len(document.span_ids)] = document.span_ids
    return spans
