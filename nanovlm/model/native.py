"""Pictures at their own size in one row of patches: their order, their positions, and each attending to itself.

```
pictures    A: 1 x 3 tiles   B: 2 x 1   C: 3 x 1      a tile is what becomes one image token: scale_factor^2 patches
row         [ B B | A A A C C C ]                     pictures with equally many tiles side by side
attention     B     (A, C)                            one call for each of these groups, no mask
```

The linear layers see one row of all pictures (NaViT, arXiv 2307.06304); attention sees a group as a batch, so no
backend computes a pair of different pictures. The learned table of positions is stretched over each picture by linear
interpolation, with antialiasing where it shrinks (SigLIP 2's NaFlex, arXiv 2502.14786).
Legend: I tiles, P patches a tile, T patches of all pictures, G side of the table of positions, D hidden.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from nanovlm.data.types import Grid

Group = tuple[int, int]  # how many neighbouring pictures, and how many patches each of them has


def sort_tiles(grids: Sequence[Grid]) -> tuple[list[Grid], list[int], list[int]]:
    """Sort pictures by their number of tiles.

    Returns their grids, the tile that goes to each place of the row, and the place to which each tile has gone.
    """
    sizes = [rows * columns for rows, columns in grids]
    starts = [0, *itertools.accumulate(sizes)]
    order = sorted(range(len(grids)), key=lambda i: sizes[i])
    tiles = [tile for i in order for tile in range(starts[i], starts[i] + sizes[i])]
    return [grids[i] for i in order], tiles, sorted(range(len(tiles)), key=lambda place: tiles[place])


def group_pictures(grids: Sequence[Grid], num_patches: int) -> list[Group]:
    """Group sorted pictures with equally many tiles, of `num_patches` patches each."""
    groups: dict[int, int] = {}
    for rows, columns in grids:
        length = rows * columns * num_patches
        groups[length] = groups.get(length, 0) + 1
    return [(number, length) for length, number in groups.items()]


def attend_groups(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group]) -> Tensor:
    """Attend within each picture: [1, T, N, H] three times -> [1, T, N, H]."""
    pieces = zip(*(x[0].split([number * length for number, length in groups]) for x in (q, k, v)), strict=True)
    found = []
    for (number, length), piece in zip(groups, pieces, strict=True):
        found.append(attend(*(x.unflatten(0, (number, length)) for x in piece), None).flatten(0, 1))
    return torch.cat(found)[None]


def cut_windows(grids: Sequence[Grid], num_patches: int, side: int) -> tuple[list[int], list[Group]]:
    """Cut pictures into squares of side x side tiles, from the left upper corner on, at the edges what is left of them.

    Returns the tiles of one square after the other, those of equal size in a picture side by side, and their groups.
    """
    order, sizes, start = [], [], 0
    for rows, columns in grids:
        windows = [
            [start + y * columns + x for y in range(rows)[top : top + side] for x in range(columns)[left : left + side]]
            for top in range(0, rows, side)
            for left in range(0, columns, side)
        ]
        windows.sort(key=len)
        order += itertools.chain.from_iterable(windows)
        sizes += map(len, windows)
        start += rows * columns
    return order, [(len(list(same)), size * num_patches) for size, same in itertools.groupby(sizes)]


def stretch_positions(table: Tensor, grids: Sequence[Grid], num_patches: int, to: str = "centres") -> Tensor:
    """Table [G * G, D] -> [I, P, D], the positions of the patches of each tile, picture after picture.

    As torch's interpolation (bilinear, antialias; without it and with align_corners for corners), but as matrix
    products: its own gradient on a GPU adds in an order that changes.
    """
    side, shrunk = math.isqrt(len(table)), math.isqrt(num_patches)
    table_GGD = table.float().unflatten(0, (side, side))
    found: dict[Grid, Tensor] = {}
    with torch.autocast(table.device.type, enabled=False):
        for rows, columns in dict.fromkeys(grids):
            down, across = (STRETCH[to](number * shrunk, side, table.device) for number in (rows, columns))
            grid = torch.einsum("xg,ygD->yxD", across, torch.einsum("yG,GgD->ygD", down, table_GGD))
            found[rows, columns] = rearrange(grid, "(y a) (x b) D -> (y x) (a b) D", a=shrunk, b=shrunk)
    return torch.cat([found[grid] for grid in grids]).to(table.dtype)


def place_patches(grids: Sequence[Grid], num_patches: int) -> Tensor:
    """Return row and column of each patch in its picture, int64[T, 2], tile after tile."""
    side, places = math.isqrt(num_patches), []
    for rows, columns in grids:
        grid = torch.cartesian_prod(torch.arange(rows * side), torch.arange(columns * side))
        places.append(rearrange(grid, "(y a x b) d -> (y x a b) d", y=rows, a=side, b=side))
    return torch.cat(places)


@functools.lru_cache(1024)
def stretch(size: int, side: int, device: torch.device) -> Tensor:
    """Weights fp32[size, side] that interpolate `side` numbers to `size`: triangles around the new centres."""
    with torch.inference_mode(False):  # these are kept, and a forward pass with gradients may follow
        ratio = side / size
        centres = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * ratio
        distances = (torch.arange(side, dtype=torch.float64) + 0.5 - centres).abs()
        weights = (1 - distances / max(ratio, 1)).clamp(min=0)
        return (weights / weights.sum(1, keepdim=True)).float().to(device)


@functools.lru_cache(1024)
def stretch_corners(size: int, side: int, device: torch.device) -> Tensor:
    """The same between the first and the last number, which stay what they are."""
    with torch.inference_mode(False):
        places = torch.arange(size, dtype=torch.float32)[:, None] * (side - 1) / max(size - 1, 1)
        return (1 - (torch.arange(side) - places).abs()).clamp(min=0).to(device)


STRETCH = {"centres": stretch, "corners": stretch_corners}
