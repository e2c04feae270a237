"""The four kinds of data, in the order in which they are made.

```
Sample     images: list[PIL.Image], messages: list[{role, content}]      data/records.py
   |       chat template, image placeholders, loss mask
Document   input_ids, labels int64[L]  branch_ids int32[L]               data/chat.py
   |       tiles uint8[n, C, H, W]  grids [(rows, columns)]
   |       knapsack
Row        input_ids, labels, position_ids int64[T]                      data/packing.py
   |       doc_ids, branch_ids int32[T]  tiles uint8[n, C, H, W]  tile_doc_ids int32[n]  grids
   |       stack rows, renumber the documents
Batch      input_ids, labels, position_ids int64[B, T]                   data/loader.py
           doc_ids, branch_ids int32[B, T]
           pixel_values uint8[I, C, H, W]  tile_doc_ids int32[I]  grids  trained int64[N]  row_tiles int64[B, M]
```

All three may have `span_ids` int32, of the shape of input_ids, where the model's decoder asks for them
(decoder.prefix_attention): tokens of a document with the same number above 0, which are neighbours, see each other,
also those behind them.

`doc_ids` is the only grouping: unique in a batch, -1 on padding. A document may be a shared prefix
(`branch_ids` 0) followed by branches (1, 2, ...) that see the prefix and themselves but not each other:

```
            prefix      branch 1   branch 2
prefix      causal      .          .
branch 1    all         causal     .
branch 2    all         .          causal
```

Where the encoder reads pictures at their own size (tiling.policy = native or qwen), a tile is one image token, and
`grids` are the rows and columns of tiles of each picture, in order (of anyres: places.py); elsewhere it is empty, as
each tile is read by itself. They are plain numbers, not a tensor, as the shapes of what is computed follow from them.

Where a frozen encoder's features are stored (features.py), they stand in the place of tiles: float[n, P, F], P patches
a tile.

Labels are already shifted: `labels[t]` is the token to predict after `input_ids[t]`, -100 for none. What else is
known about each trained token, such as a weight or the log-probability under a reference, travels beside the labels as
`values`: by its name a float32 tensor of their shape, or of one dimension more.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import PIL.Image
import torch
from torch import Tensor

IGNORE = -100
# Rows and columns of tiles of a picture; of tiling.policy = anyres rows and columns of the features that show it, too.
Grid = tuple[int, ...]


@dataclass
class Sample:
    """One training example, before tokenisation.

    `messages` are dicts with `role` (user, assistant, system) and `content`, a string or a list of parts
    `{"type": "text", "text": ...}` and `{"type": "image"}`; the n-th image part shows `images[n]`. A part
    `{"type": "video", "times": [...], "duration": ...}` shows as many images as it has times. A single message of
    the role text is no conversation, but text to go on with.
    With `independent` the user/assistant pairs are separate questions, each about all the images.
    """

    images: list[PIL.Image.Image]
    messages: list[dict]
    independent: bool = False
    # An answer that is worse than the last message, in its place, and the log-probabilities of both under a reference.
    rejected: dict | None = None
    ref_logprobs: tuple[float, float] | None = None


class Filtered(ValueError):
    """Raised for a well-formed record whose turns are all rated too low."""


@dataclass
class Document:
    """One tokenised sample: the unit of attention, positions and packing."""

    input_ids: Tensor
    labels: Tensor
    branch_ids: Tensor
    tiles: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    grids: list[Grid] = field(default_factory=list)
    # int32[at most L], of which 0, no span, is left out at the end.
    span_ids: Tensor | None = None

    def __len__(self):
        return len(self.input_ids)

    @property
    def position_ids(self) -> Tensor:
        """int64[L]: 0, 1, ... along the prefix; every branch continues from the end of the prefix."""
        index = torch.arange(len(self))
        prefix = int((self.branch_ids == 0).sum())
        starts = torch.searchsorted(self.branch_ids, self.branch_ids)  # branch ids ascend
        return torch.where(self.branch_ids == 0, index, prefix + index - starts)


@dataclass
class Shrunk(Document):
    """A document whose images have fewer tiles than the model gives them, as it would have been too long."""


@dataclass
class Row:
    """Whole documents one after the other, padded to a fixed number of tokens."""

    input_ids: Tensor
    labels: Tensor
    doc_ids: Tensor
    branch_ids: Tensor
    position_ids: Tensor
    tiles: Tensor
    # int32[n]: the document of each tile.
    tile_doc_ids: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    grids: list[Grid] = field(default_factory=list)
    span_ids: Tensor | None = None


@dataclass
class Batch:
    """The input of the model. Pixels are raw uint8 or already normalised floats."""

    input_ids: Tensor
    labels: Tensor
    doc_ids: Tensor
    branch_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    tile_doc_ids: Tensor
    # int64[N]: flat indices of the positions with a label. Computed on creation: on a GPU the host would have to wait.
    trained: Tensor = None  # pyright: ignore[reportAssignmentType]
    # int64[B, M]: the tiles that each row shows, in order, -1 behind the last. Computed on creation, too: else the host
    # would have to wait to know M.
    row_tiles: Tensor = None  # pyright: ignore[reportAssignmentType]
    values: dict[str, Tensor] = field(default_factory=dict)
    grids: list[Grid] = field(default_factory=list)
    span_ids: Tensor | None = None

    def __post_init__(self):
        if self.trained is None:
            self.trained = (self.labels.flatten() != IGNORE).nonzero()[:, 0]
        if self.row_tiles is None:
            self.row_tiles = find_row_tiles(self.doc_ids, self.tile_doc_ids)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with every tensor on `device`; a copy to a GPU overlaps with the computation there."""
        device = torch.device(device)
        if device.type != "cuda":
            return self._map(lambda tensor: tensor.to(device))
        with torch.cuda.stream(copy_stream(device)):
            batch = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        now = torch.cuda.current_stream(device)
        now.wait_stream(copy_stream(device))
        batch._map(lambda tensor: tensor.record_stream(now) or tensor)
        return batch

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which a GPU copies while it computes."""
        return self._map(lambda tensor: tensor.pin_memory())

    def value(self, name: str) -> Tensor:
        """fp32[N, ...]: `values[name]` at the trained positions; fp32[N], 0, where no document of the batch has any."""
        if name not in self.values:
            return torch.zeros(len(self.trained), device=self.trained.device)
        return self.values[name].flatten(0, 1)[self.trained]

    def tiles_of(self, number: int) -> tuple[Tensor, list[Grid]]:
        """Return the tiles of a document, and the grids of its pictures."""
        is_own = self.tile_doc_ids == number
        shown_in = self.tile_doc_ids.tolist() if self.grids else []
        ends = count_tiles(self.grids)
        grids = [grid for grid, end in zip(self.grids, ends, strict=True) if shown_in[end - 1] == number]
        return self.pixel_values[is_own], grids

    def _map(self, function: Callable) -> "Batch":
        """Apply a function to every tensor."""
        tensors = {name: function(x) for name, x in vars(self).items() if isinstance(x, Tensor)}
        values = {name: function(tensor) for name, tensor in self.values.items()}
        return Batch(**tensors, values=values, grids=self.grids)


def count_tiles(grids: Sequence[Grid]) -> list[int]:
    """Count the tiles up to the end of each picture."""
    return list(itertools.accumulate(map(num_tiles, grids)))


def num_tiles(grid: Grid) -> int:
    """Count the tiles of a picture; one of anyres has one more, which shows it whole."""
    return grid[0] * grid[1] + (len(grid) > 2)


def find_row_tiles(doc_ids: Tensor, tile_doc_ids: Tensor) -> Tensor:
    """Return the tiles of each row, int64[B, M], -1 behind the last, from int32[B, T] and int32[I]."""
    if not len(tile_doc_ids):
        return tile_doc_ids.new_empty(len(doc_ids), 0, dtype=torch.int64)
    row_of = torch.zeros(int(doc_ids.max()) + 2, dtype=torch.int64, device=doc_ids.device)
    index = torch.arange(len(doc_ids), device=doc_ids.device)
    row_of[doc_ids.long() + 1] = index[:, None].expand(doc_ids.shape)
    rows, tiles = row_of[tile_doc_ids.long().clamp(max=len(row_of) - 2) + 1].sort(stable=True)
    counts = rows.bincount(minlength=len(doc_ids))
    found = torch.full((len(doc_ids), int(counts.max())), -1, device=doc_ids.device)
    found[rows, torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]] = tiles
    return found


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the CUDA stream of a GPU that copies batches."""
    return torch.cuda.Stream(device)
