"""Layers that read the same input -> one product: q, k and v of an attention, gate and up of a feed-forward layer.

`prepare` (inference.py) joins them. Each layer keeps its weight, a view of its rows of the joined one, so nothing is
stored twice and a state dict is as before. The joined product is only for inference: where gradients are computed, and
once a layer was replaced, moved or cast, each layer is called for itself. Hooks of the layers run only then.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.model.packed import PackedWeight


def project(x: Tensor, joined: "Joined | None", *layers: nn.Module) -> Sequence[Tensor]:
    """Return the output of each layer for x, by one product where they are joined."""
    if joined is None or torch.is_grad_enabled() or not joined.is_current(layers):
        return [layer(x) for layer in layers]
    return joined(x)


class Joined(nn.Module):
    """The product for several layers. It has no parameters, and is a module to hear that the layers are moved."""

    def __init__(self, layers: Sequence[nn.Module], sizes: Sequence[int], weight: Tensor | PackedWeight, bias):
        super().__init__()
        self.layers = tuple(layers)  # in a tuple, as they are the children of another module
        self.sizes = list(sizes)
        self.weight: Tensor | PackedWeight | None = weight
        self.bias: Tensor | None = bias

    def is_current(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the product still is that of these layers."""
        return self.weight is not None and all(a is b for a, b in zip(self.layers, layers, strict=True))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.weight, Tensor):
            y = F.linear(x, self.weight, self.bias)
        else:
            assert self.weight is not None
            y = self.weight(x)
            y = y if self.bias is None else y + self.bias
        return torch.split_with_sizes(y, self.sizes, dim=-1)

    def _apply(self, fn, recurse=True):
        self.weight = self.bias = None
        return self

    def _load_from_state_dict(self, *args):
        self.weight = self.bias = None

    def __deepcopy__(self, memo):
        """Copies of layers share no memory with each other: their product is yet to be made."""
        return None
