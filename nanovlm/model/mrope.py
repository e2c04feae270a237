"""Where tokens are in time, row and column: the positions of M-RoPE (Wang et al. 2024, arXiv 2409.12191).

```
                 the  | image tokens of a picture of 2 x 3    | circle
time              0     1   1   1   1   1   1                   4
row               0     1   1   1   2   2   2                   4
column            0     1   2   3   1   2   3                   4
```

A picture takes as many positions as its longer side has tokens. Legend: B rows, T tokens, I image tokens, M pictures.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanovlm.data.types import Grid, count_tiles


def place_tokens(
    position_ids: Tensor, doc_ids: Tensor, branch_ids: Tensor, places: Tensor, grids: Sequence[Grid]
) -> Tensor:
    """Positions int64[B, T] in the documents -> int64[3, B, T].

    `places` int64[I] are the flat places of the image tokens, `grids` the rows and columns of each picture.
    """
    if not grids:
        return position_ids.expand(3, -1, -1)
    inside = [(0, y, x, y * columns + x) for rows, columns in grids for y in range(rows) for x in range(columns)]
    saved = [rows * columns - max(rows, columns) for rows, columns in grids]
    inside_I4, saved_M, ends_M = (
        torch.tensor(values).to(places.device, non_blocking=True) for values in (inside, saved, count_tiles(grids))
    )
    last_M = places[ends_M - 1]
    docs_M, branches_M = (ids.flatten()[last_M] for ids in (doc_ids, branch_ids))
    T = position_ids.shape[1]
    is_behind_BTM = (doc_ids[:, :, None] == docs_M) & (torch.arange(T, device=places.device)[:, None] > last_M % T)
    is_behind_BTM &= (branches_M == 0) | (branches_M == branch_ids[:, :, None])
    starts_BT = position_ids - torch.where(is_behind_BTM, saved_M, 0).sum(-1)
    placed = starts_BT.flatten().repeat(3, 1)
    return placed.index_add(1, places, (inside_I4[:, :3] - inside_I4[:, 3:]).T).view(3, *position_ids.shape)
