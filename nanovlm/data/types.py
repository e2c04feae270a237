"""The four kinds of data, in the order in which they are made.

```
Sample     images: list[PIL.Image], messages: list[{role, content}]      data/records.py
   |       chat template, image placeholders, loss mask
Document   input_ids, labels int64[L]  branch_ids int32[L]               data/chat.py
   |       tiles uint8[n, C, H, W]
   |       knapsack
Row        input_ids, labels, position_ids int64[T]                      data/packing.py
   |       doc_ids, branch_ids int32[T]  tiles uint8[n, C, H, W]  tile_doc_ids int32[n]
   |       stack rows, number the documents through
Batch      input_ids, labels, position_ids int64[B, T]                   data/loader.py
           doc_ids, branch_ids int32[B, T]
           pixel_values uint8[I, C, H, W]  tile_doc_ids int32[I]  trained int64[N]
```

`doc_ids` is the only grouping: unique in a batch, -1 on padding. A document may be a shared prefix
(`branch_ids` 0) followed by branches (1, 2, ...) that see the prefix and themselves but not each other:

```
            prefix      branch 1   branch 2
prefix      causal      .          .
branch 1    all         causal     .
branch 2    all         .          causal
```

Labels are already shifted: `labels[t]` is the token to predict after `input_ids[t]`, -100 for none.
"""

import functools
from dataclasses import dataclass

import PIL.Image
import torch
from torch import Tensor

IGNORE = -100


@dataclass
class Sample:
    """One training example as people write it.

    `messages` are dicts with `role` (user, assistant, system) and `content`, a string or a list of parts
    `{"type": "text", "text": ...}` and `{"type": "image"}`; the n-th image part shows `images[n]`.
    With `independent` the user/assistant pairs are separate questions about the same images.
    """

    images: list[PIL.Image.Image]
    messages: list[dict]
    independent: bool = False


class Filtered(ValueError):
    """A record is well-formed, but every turn of it is rated too low."""


@dataclass
class Document:
    """One tokenised sample: the unit of attention, positions and packing."""

    input_ids: Tensor
    labels: Tensor
    branch_ids: Tensor
    tiles: Tensor

    def __len__(self):
        return len(self.input_ids)

    @property
    def position_ids(self) -> Tensor:
        """int64[L]: 0, 1, ... along the prefix; every branch goes on from the end of the prefix."""
        index = torch.arange(len(self))
        prefix = int((self.branch_ids == 0).sum())
        starts = torch.searchsorted(self.branch_ids, self.branch_ids)  # branch ids ascend
        return torch.where(self.branch_ids == 0, index, prefix + index - starts)


@dataclass
class Row:
    """Whole documents side by side in a fixed number of tokens, the rest padding."""

    input_ids: Tensor
    labels: Tensor
    doc_ids: Tensor
    branch_ids: Tensor
    position_ids: Tensor
    tiles: Tensor
    # int32[n]: of each tile, the document that shows it.
    tile_doc_ids: Tensor


@dataclass
class Batch:
    """What the model sees. It takes pixels as they are in an image, uint8, or as floats that are normalised already."""

    input_ids: Tensor
    labels: Tensor
    doc_ids: Tensor
    branch_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor
    tile_doc_ids: Tensor
    # int64[N]: where the labels are, in all rows end to end. Found when the batch is made: a GPU would be waited for.
    trained: Tensor | None = None

    def __post_init__(self):
        if self.trained is None:
            self.trained = (self.labels.flatten() != IGNORE).nonzero()[:, 0]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with every tensor on `device`; to a GPU it is copied beside what is still computed there."""
        device = torch.device(device)
        if device.type != "cuda":
            return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})
        with torch.cuda.stream(copy_stream(device)):
            batch = Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})
        now = torch.cuda.current_stream(device)
        now.wait_stream(copy_stream(device))
        for tensor in vars(batch).values():
            tensor.record_stream(now)
        return batch

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from where a GPU copies while it computes."""
        return Batch(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the queue of a GPU in which batches are copied."""
    return torch.cuda.Stream(device)
