"""Features of tiles -> image tokens of whole pictures, of LLaVA-OneVision (arXiv 2408.03326).

```
whole    tile 1 | tile 2         whole, row by row; then the features of the grid, row by row, each row with a newline:
         -------+-------         a b c d /
         tile 3 | tile 4         e f g h /
```

What shows only the border around a picture is left out, and large pictures are shrunk (places.py).
Legend: I tiles, P features of a tile, K image tokens of all pictures, D hidden.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nanovlm.config import VLMConfig
from nanovlm.data.places import shrink
from nanovlm.data.types import Grid, count_tiles


def join_tiles(x: Tensor, grids: Sequence[Grid], newline: Tensor, config: VLMConfig) -> Tensor:
    """Features [I, P, D] of the tiles of pictures with these grids, and newline [D] -> [K, 1, D]."""
    tokens, start = [], 0
    for grid, end in zip(grids, count_tiles(grids), strict=True):
        rows, columns, height, width = grid
        whole_PD, side = x[start], math.isqrt(x.shape[1])
        tiles = x[start + 1 : end].unflatten(1, (side, side))
        x_hwD = rearrange(tiles, "(row column) y x D -> (row y) (column x) D", row=rows)
        top, left = (rows * side - height) // 2, (columns * side - width) // 2
        x_hwD = x_hwD[top : top + height, left : left + width]
        if (size := shrink(config, grid)) != (height, width):
            down, across = (resize(*sizes, x) for sizes in zip((height, width), size, strict=True))
            with torch.autocast(x.device.type, enabled=False):
                x_hwD = torch.einsum("hH,wW,hwD->HWD", down, across, x_hwD.float()).to(x.dtype)
        ends = newline.to(x.dtype).expand(len(x_hwD), 1, -1)
        tokens += [whole_PD, torch.cat((x_hwD, ends), dim=1).flatten(0, 1)]
        start = end
    return torch.cat(tokens)[:, None]


def resize(before: int, after: int, like: Tensor) -> Tensor:
    """Weights fp32[before, after] of torch's linear interpolation: a product adds in the same order on a GPU, too."""
    one = torch.eye(before, device=like.device)
    return F.interpolate(one[None], after, mode="linear")[0]
