"""Write whole tensors into sharded ones, of which every rank holds some rows.

```
writable(tensor)     the tensor itself; if it is sharded, a `Rows`, which accepts whole tensors and keeps its own rows
```
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Rows:
    """This rank's shard of a tensor of `shape`: `local`, which begins at `start` along dimension `dim`.

    It has the tensor methods that are needed to fill it. All ranks copy the same whole tensor; each keeps its own part.
    """

    def __init__(self, local: Tensor, shape: tuple[int, ...], start: int, dim: int = 0):
        self.local, self.shape, self.start, self.dim = local, torch.Size(shape), start, dim
        self.ndim, self.dtype, self.device, self.is_meta = len(shape), local.dtype, local.device, local.is_meta

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> "Iterator[Tensor | Rows]":
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key: int | slice | None) -> "Tensor | Rows":
        """Return one row, a slice of rows, or with None all rows with a new first dimension."""
        if key is None:
            return Rows(self.local[None], (1, *self.shape), self.start, self.dim + 1)
        assert self.dim == 0
        here = range(self.start, self.start + len(self.local))
        if isinstance(key, int):
            row = self.shape[1:]
            return self.local[key - self.start] if key in here else Rows(self.local.new_empty(0, *row[1:]), row, 0)
        first, end, _step = key.indices(len(self))
        mine = self.local[max(0, first - self.start) : max(0, end - self.start)]
        return Rows(mine, (end - first, *self.shape[1:]), min(max(0, self.start - first), end - first))

    def is_floating_point(self) -> bool:
        return self.local.is_floating_point()

    def part_of(self, whole: Tensor) -> Tensor:
        """Return this rank's part of a tensor of the whole shape."""
        return whole.narrow(self.dim, self.start, self.local.shape[self.dim])

    def copy_(self, whole: Tensor):
        self.local.copy_(self.part_of(whole))

    def equal(self, whole: Tensor) -> bool:
        return self.shape == whole.shape and self.local.equal(self.part_of(whole))


Places = dict[str, Tensor | Rows]


def writable(tensor: Tensor) -> Tensor | Rows:
    """Return a destination for a whole tensor; for a sharded one it keeps this rank's rows only."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    sharded = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    assert len(sharded) == 1 and tensor.placements[sharded[0]].is_shard(0), tensor.placements
    mesh, local = tensor.device_mesh, tensor.to_local()
    num_ranks, rank = mesh.size(sharded[0]), mesh.get_local_rank(sharded[0])
    size = (len(tensor) + num_ranks - 1) // num_ranks  # as torch.chunk does: the last ranks may have fewer or none
    start = min(rank * size, len(tensor))
    assert len(local) == min(size, len(tensor) - start), (tensor.shape, local.shape)
    return Rows(local, tensor.shape, start)


def local_part(place: Tensor | Rows) -> Tensor:
    """Return this rank's memory of a destination."""
    return place.local if isinstance(place, Rows) else place


def places(model: nn.Module) -> Places:
    """Return the destinations of a model's tensors, by name."""
    return {name: writable(tensor) for name, tensor in model.state_dict().items()}
