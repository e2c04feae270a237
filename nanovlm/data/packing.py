"""Document -> Row. Pack whole documents into rows of fixed length.

```
row 0  [0 0 0 0 0 0 1 1 1 1 1 2 2 . ]      digits: doc_ids, dots: padding
row 1  [0 0 0 0 0 0 0 0 1 1 1 1 . . ]
```
"""

from bisect import bisect_left, insort

import torch

from nanovlm.data.types import IGNORE, Document, Row


def pack(lengths: list[int], row_length: int) -> list[list[int]]:
    """Assign documents to rows by best-fit decreasing: each, longest first, to the fullest row it fits.

    Returns one list of document indices a row; every index exactly once. Raises ValueError for a document
    longer than a row.
    """
    rows = []
    free = []  # (free tokens, row), ascending
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] > row_length:
            raise ValueError(f"document {i} has {lengths[i]} tokens, more than row_length = {row_length}")
        at = bisect_left(free, (lengths[i], -1))
        if at < len(free):
            room, row = free.pop(at)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(i)
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
