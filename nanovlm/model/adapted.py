"""Layers with adapters: LoRA and DoRA on linear, quantised and expert layers. `adapt` (adapters.py) makes them.

```
LoRA     y = W x + s B A x                               A [r, in], B [out, r], s = alpha / r      arXiv 2106.09685
rsLoRA   s = alpha / sqrt(r)                                                                       arXiv 2312.03732
DoRA     y = m (W + s B A) x / |W + s B A|               m [out]; the norms, of rows, are constants in the backward
                                                         pass: arXiv 2402.09353, section 4.3
experts  the same W + s B A for each expert, made anew in each pass
```

Each is a plain layer with adapters beside: the base's tensors keep their names in a state dict, and those of an adapter
are LAYER.adapters.NAME.lora_A, .lora_B and .magnitude, in fp32 also where the base is in bf16. The stacked experts of a
mixture are parameters of one layer, so theirs are mlp.adapters.NAME.gate_proj.lora_A [E, r, in].
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanovlm.config import AdapterConfig
from nanovlm.model.moe import MoE, product_dtype
from nanovlm.model.quantized import QuantizedLinear
from nanovlm.model.quantized_experts import STACKS, QuantizedStack


class Adapters:
    """The adapters of a model, by name, and which of them are on; one object, which all layers share."""

    def __init__(self):
        self.configs: dict[str, AdapterConfig] = {}
        # A number of its own for each, which none has had before.
        self.numbers: dict[str, int] = {}
        self.num_made = 0
        # Those that every token uses.
        self.active: tuple[str, ...] = ()
        self.is_enabled = True
        # Whether `index` is a fast way to use one: all are of linear layers that see tokens, and whole on this rank.
        self.is_by_token = False
        # The name of the model that they were made for, if it is known.
        self.base = ""
        # int64[B, T], the adapter of each token in the place of `active`, -1 for none.
        self.index: Tensor | None = None
        # Whether each layer has a Stacked of all of them as they are now.
        self.is_stacked = False
        # While merged: the layers that plain ones stand for, by name.
        self.merged: dict[str, nn.Module] = {}


class Adapter(nn.Module):
    """What one adapter adds to a weight [out, in], or to a stack of experts' [E, out, in]."""

    def __init__(self, shape: Sequence[int], config: AdapterConfig, dtype: torch.dtype, device: torch.device | str):
        """Make the matrices for a weight of this shape; their contents are uninitialised."""
        super().__init__()
        *experts, num_outputs, num_inputs = shape
        self.scale, self.dropout = config.scale, config.dropout

        def make(*size):
            return nn.Parameter(torch.empty(*experts, *size, dtype=dtype, device=device))

        self.lora_A, self.lora_B = make(config.rank, num_inputs), make(num_outputs, config.rank)
        self.magnitude = make(num_outputs) if config.use_dora else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> s B A x [..., out]."""
        h = self.scale * F.linear(x, as_used(self.lora_A, x))
        return F.linear(h, as_used(self.lora_B, h))

    def changed(self, weight: Tensor) -> Tensor:
        """W + s B A."""
        return weight + self.scale * (self.lora_B @ self.lora_A)

    def norms(self, weight: Tensor) -> Tensor:
        """Return the norms of the rows of W + s B A, at least fp32, constants in the backward pass.

        |W + s B A|^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>, row by row, without a matrix as large as W.
        """
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            w, lora_A, lora_B = map(widen, (weight, self.lora_A, self.lora_B))
            crossed = ((w @ lora_A.mT) * lora_B).sum(-1)
            added = ((lora_B @ (lora_A @ lora_A.mT)) * lora_B).sum(-1)
            squares = torch.linalg.vector_norm(w, dim=-1).square() + self.scale * (2 * crossed + self.scale * added)
            return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()  # of a row of zeros

    def gain(self, weight: Tensor) -> Tensor | None:
        """DoRA's m / |W + s B A| [..., out], or None."""
        return None if self.magnitude is None else self.magnitude / self.norms(weight)

    def effective(self, weight: Tensor) -> Tensor:
        """Return the weight that a merged layer has."""
        gain, changed = self.gain(weight), self.changed(weight)
        return changed if gain is None else gain[..., None] * changed


def widen(x: Tensor) -> Tensor:
    """Return x in fp32, or in fp64 if it was."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_used(weight: Tensor, x: Tensor) -> Tensor:
    """Return a matrix of an adapter in the dtype of x; autocast, which keeps what it casts for the step, does that."""
    return weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype)


class Stacked(NamedTuple):
    """All adapters of a linear layer in one: what the tokens of a pass need, each of which uses its own."""

    lora_A: Tensor  # [R, in], the rows of all
    lora_B: Tensor  # [out, R], times their scales
    owners: Tensor  # int64[R], whose a row is: the index among the model's adapters
    gains: Tensor | None  # DoRA's [adapters + 1, out]; 1 where there is none, and in the last row, of no adapter


# --- layers --------------------------------------------------------------------------------------------------


class AdaptedLinear(nn.Linear):
    """A linear layer with adapters; made by `adapt`."""

    adapters: nn.ModuleDict
    switch: Adapters
    stacked: Stacked  # made by `stack_adapters`, for inference

    def forward(self, x: Tensor) -> Tensor:
        return add_adapters(self, super().forward, x)


class AdaptedQuantizedLinear(QuantizedLinear):
    """A quantised linear layer, which is frozen, with adapters (QLoRA, arXiv 2305.14314); made by `adapt`."""

    adapters: nn.ModuleDict
    switch: Adapters
    stacked: Stacked

    def forward(self, x: Tensor) -> Tensor:
        return add_adapters(self, super().forward, x)


class AdaptedMoE(MoE):
    """A mixture whose stacked experts have adapters; made by `adapt`. In bf16 the changed weights are rounded to it."""

    adapters: nn.ModuleDict
    switch: Adapters

    def run(self, x: Tensor, choice: Tensor, weights: Tensor) -> Tensor:
        switch = self.switch
        if not switch.is_enabled:
            return super().run(x, choice, weights)
        if switch.index is None:
            return self.run_changed(switch.active, x, choice, weights)
        # All tokens pass the experts of each adapter, with the weight 0 where they use another.
        index, names = switch.index.flatten(), list(switch.configs)
        parts = [
            self.run_changed(names[i : i + 1], x, choice, weights * (index == i)[:, None]) for i in range(len(names))
        ]
        return sum(parts, super().run(x, choice, weights * (index == -1)[:, None]))

    def run_changed(self, names: Sequence[str], x: Tensor, choice: Tensor, weights: Tensor) -> Tensor:
        """Run the experts as they are with these adapters.

        Stacks of codes are written out for it, all experts of this layer; the backward pass writes them out again.
        """

        def run(x, choice, weights):
            experts = self.changed_experts(names, product_dtype(x))
            return self.run_experts(x, choice, weights, *experts, *self.biases())  # pyright: ignore[reportArgumentType]

        if torch.is_grad_enabled() and any(isinstance(getattr(self, stack), QuantizedStack) for stack in STACKS):
            return checkpoint(run, x, choice, weights, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore
        return run(x, choice, weights)

    def changed_experts(self, names: Sequence[str], dtype: torch.dtype) -> list[Tensor]:
        """Return the three stacks as they are with these adapters; those of codes in a dtype."""
        stacks = []
        for stack in STACKS:
            weight, adapters = getattr(self, stack), of_stack(self, stack, names)
            if isinstance(weight, QuantizedStack):
                stacks.append(with_adapters(weight.dequantize(), adapters).to(dtype))
            else:
                stacks.append(with_adapters(weight, adapters))
        return stacks


def of_stack(layer: AdaptedMoE, stack: str, names: Sequence[str]) -> list[Adapter]:
    """Return the adapters of these names that one of the stacks of a mixture has."""
    return [layer.adapters[name][stack] for name in names if name in layer.adapters and stack in layer.adapters[name]]  # pyright: ignore


def with_adapters(weight: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """Return a weight as it is with the sum of some adapters."""
    if len(adapters) == 1:
        return adapters[0].effective(weight).to(weight.dtype)
    return sum((adapter.effective(weight) - weight for adapter in adapters), weight).to(weight.dtype)


def add_adapters(layer: AdaptedLinear | AdaptedQuantizedLinear, product: Callable, x: Tensor) -> Tensor:
    """Return the layer's output; `product` is that of the base.

    Dropout is as in PEFT: with DoRA, the change of the base's own output is computed from the inputs that are left too.
    """
    switch, y = layer.switch, product(x)
    if not switch.is_enabled:
        return y
    if switch.index is not None:
        return add_for_tokens(layer, x, y, switch.index)
    out = y
    for name in switch.active:
        if name not in layer.adapters:
            continue
        adapter: Adapter = layer.adapters[name]  # pyright: ignore[reportAssignmentType]
        drops = layer.training and adapter.dropout > 0
        left = F.dropout(x, adapter.dropout) if drops else x
        change, gain = adapter(left), find_gain(layer, adapter)
        if gain is not None:
            change = turn(layer, product(left) if drops else y, change, gain)
        out = out + change
    return out.to(y.dtype)


def add_for_tokens(layer: AdaptedLinear | AdaptedQuantizedLinear, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """Add to y the change of each token's own adapter: one product with all A, masked, and one with all B."""
    index = index.reshape(x.shape[:-1])  # a mixture's shared expert sees tokens end to end
    is_made = layer.switch.is_stacked and not torch.is_grad_enabled()
    found = layer.stacked if is_made else stack_layer(layer, x.dtype)
    h = F.linear(x, found.lora_A) * (index[..., None] == found.owners)  # [B, T, R]
    change = F.linear(h, found.lora_B)
    if found.gains is None:
        return y + change
    return (y + turn(layer, y, change, found.gains[index])).to(y.dtype)


def stack_layer(layer: AdaptedLinear | AdaptedQuantizedLinear, dtype: torch.dtype) -> Stacked:
    """Put the adapters of a layer together, the matrices in a dtype."""
    numbers = {number: name for number, name in enumerate(layer.switch.configs) if name in layer.adapters}
    adapters: list[Adapter] = [layer.adapters[name] for name in numbers.values()]  # pyright: ignore[reportAssignmentType]
    owners = [number for number, a in zip(numbers, adapters, strict=True) for _ in range(len(a.lora_A))]
    device, gains = adapters[0].lora_A.device, None
    if any(a.magnitude is not None for a in adapters):
        found = {number: find_gain(layer, a) for number, a in zip(numbers, adapters, strict=True)}
        ones = torch.ones(len(adapters[0].lora_B), device=device)
        kept = [ones if (gain := found.get(number)) is None else gain for number in range(len(layer.switch.configs))]
        gains = torch.stack([*kept, ones])
    lora_A = torch.cat([a.lora_A for a in adapters])
    lora_B = torch.cat([a.scale * a.lora_B for a in adapters], dim=1)
    return Stacked(lora_A.to(dtype), lora_B.to(dtype), torch.tensor(owners, device=device), gains)


def find_gain(layer: AdaptedLinear | AdaptedQuantizedLinear, adapter: Adapter) -> Tensor | None:
    """Return the adapter's gain, for which a quantised weight is written out; None without DoRA."""
    if adapter.magnitude is None:
        return None
    return adapter.gain(layer.dequantize() if isinstance(layer, QuantizedLinear) else layer.weight)


def turn(layer: AdaptedLinear | AdaptedQuantizedLinear, y: Tensor, change: Tensor, gain: Tensor) -> Tensor:
    """Return DoRA's change of a base's output y: gain (W x + s B A x) - W x, for which one tensor is kept."""
    y = y if layer.bias is None else y - layer.bias
    return gain * (y + change) - y


# What becomes of a layer that is adapted.
ADAPTED = {nn.Linear: AdaptedLinear, QuantizedLinear: AdaptedQuantizedLinear, MoE: AdaptedMoE}
