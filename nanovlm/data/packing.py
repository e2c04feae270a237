"""Document -> Row. Pack whole documents into rows of fixed length.

```
row 0  [0 0 0 0 0 0 1 1 1 1 1 2 2 . ]      digits: doc_ids, dots: padding
row 1  [0 0 0 0 0 0 0 0 1 1 1 1 . . ]
```
"""

from bisect import bisect_left, insort

import torch

from nanovlm.data.types import IGNORE, Document, Row


def pack(lengths: list[int], num_tiles: list[int], row_length: int, max_tiles: int | None = None) -> list[list[int]]:
    """Assign documents to rows by best-fit decreasing: each, longest first, to the fullest row it fits.

    Returns one list of document indices a row; every index exactly once. Raises ValueError for a document
    longer than a row or with more than `max_tiles` tiles.
    """
    for i, (length, tiles) in enumerate(zip(lengths, num_tiles, strict=True)):
        if length > row_length:
            raise ValueError(f"document {i} has {length} tokens, more than row_length = {row_length}")
        if max_tiles is not None and tiles > max_tiles:
            raise ValueError(f"document {i} has {tiles} tiles, more than max_tiles = {max_tiles}")
    rows, tiles_in_row = [], []
    free = []  # (free tokens, row), ascending
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[i], -1))
        if max_tiles is not None:
            while at < len(free) and tiles_in_row[free[at][1]] + num_tiles[i] > max_tiles:
                at += 1
        if at < len(free):
            room, row = free.pop(at)
        else:
            room, row = row_length, len(rows)
            rows.append([])
            tiles_in_row.append(0)
        rows[row].append(i)
        tiles_in_row[row] += num_tiles[i]
        insort(free, (room - lengths[i], row))
    return rows


def make_row(documents: list[Document], row_length: int, pad_token_id: int) -> Row:
    """Lay documents side by side and pad to `row_length` (pad_token_id, no label, doc_id -1)."""
    padding = row_length - sum(len(d) for d in documents)

    def join(pieces, fill):
        return torch.cat([*pieces, pieces[0].new_full((padding,), fill)])

    return Row(
        input_ids=join([d.input_ids for d in documents], pad_token_id),
        labels=join([d.labels for d in documents], IGNORE),
        doc_ids=join([torch.full((len(d),), i, dtype=torch.int32) for i, d in enumerate(documents)], -1),
        branch_ids=join([d.branch_ids for d in documents], 0),
        position_ids=join([d.position_ids for d in documents], 0),
        tiles=torch.cat([d.tiles for d in documents]),
    )
