"""Stacked experts of a mixture in 8 or 4 bits, and the feed-forward layer on them.

```
gate_proj, up_proj, down_proj     parameters [E, N, K] -> stacks of codes and scales; stack[e] is what a linear layer's
                                  weight would be (kernels/quantized_weight.py), the scales of each expert its own
```

By torch's own operators one expert after the other is dequantised, those with tokens alone, so that one expert's
matrices are written out at a time. The backward pass keeps x and the routing, and dequantises again; a stack is frozen.
Beside adapters of the experts all matrices of a layer are written out at a time (adapted.py).
Without gradients experts of a model that is prepared for inference on a CPU are multiplied as codes (packed.py).
Legend: R tokens, k experts a token, E experts, D hidden, W width of an expert; N outputs and K inputs of a matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanovlm.errors import UserError
from nanovlm.kernels.quantized_weight import QuantizedWeight, dequantize_ref, make_tables
from nanovlm.model.moe import EXPERTS, MoE, experts_biased, product_dtype, swiglu
from nanovlm.model.packed import PACK, PackedWeight

STACKS = ("gate_proj", "up_proj", "down_proj")
TENSORS = QuantizedWeight._fields[3:7]  # codes, scales, nested_scales, nested_offset


class QuantizedStack(nn.Module):
    """The matrices of all experts [E, N, K] in codes; frozen.

    While it is `packed`, with a product for each expert, `codes` is None where they can be unpacked again; a state dict
    has them as ever. Loading one and moving or casting the stack first unpack it.
    """

    codes: Tensor | None
    scales: Tensor
    ndim = 3

    def __init__(self, experts: Sequence[QuantizedWeight]):
        super().__init__()
        w = experts[0]
        self.format, self.shape, self.group, self.tables = w.format, (len(experts), *w.shape), w.group, w.tables
        for name in TENSORS:
            tensors = [getattr(expert, name) for expert in experts]
            self.register_buffer(name, None if tensors[0] is None else torch.stack(tensors))
        # Of an expert's matrices that are multiplied together, and which of them this stack has.
        self.packed: list[PackedWeight] | None = None
        self.index = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, e: int) -> QuantizedWeight:
        """Return the matrix of an expert, which shares the memory."""
        parts: dict[str, Any] = {name: None if (x := getattr(self, name)) is None else x[e] for name in TENSORS}
        if self.codes is None:
            assert self.packed is not None
            parts["codes"] = self.packed[e].unpack(self.index)
        return QuantizedWeight(self.format, self.shape[1:], self.group, **parts, tables=self.tables)

    def whole(self) -> QuantizedWeight:
        """Return all matrices in one, whose tensors have a first dimension of E more."""
        tensors = {name: getattr(self, name) for name in TENSORS} | {"codes": self.all_codes()}
        return QuantizedWeight(self.format, self.shape[1:], self.group, **tensors, tables=self.tables)

    def all_codes(self) -> Tensor:
        return torch.stack([self[e].codes for e in range(len(self))]) if self.codes is None else self.codes

    def numel(self) -> int:
        E, N, K = self.shape
        return E * N * K

    def dequantize(self) -> Tensor:
        """Return all matrices, fp32[E, N, K]."""
        return torch.stack([dequantize_ref(self[e]) for e in range(len(self))])

    def pack(self, packed: list[PackedWeight], index: int):
        """Multiply with the packed weights from now on, of each of which this stack's matrix is part `index`."""
        self.packed, self.index = packed, index
        if self.format != "nf4":
            self.codes = None

    def unpack(self):
        """Undo `pack`."""
        self.codes, self.packed = self.all_codes(), None

    def _apply(self, fn, recurse=True):
        """Keep the dtype of scales when a model is cast: viewed as integers, they are only moved. Make new tables."""
        self.unpack()
        as_bits = {4: torch.int32, 1: torch.uint8}
        super()._apply(lambda x: fn(x.view(as_bits[x.itemsize])).view(x.dtype), recurse)
        self.tables = make_tables(self.scales.device) if self.format == "nf4" else None
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "codes"] = self.all_codes()

    def _load_from_state_dict(self, *args):
        self.unpack()
        super()._load_from_state_dict(*args)


def replace_experts(mixture: MoE, quantize: Callable[[Tensor], QuantizedWeight]):
    """Put stacks of codes in the place of a mixture's experts; `quantize` makes those of one matrix [N, K]."""
    for name in STACKS:
        parameter = getattr(mixture, name)
        # On the meta device all are alike.
        experts = [quantize(parameter[0])] * len(parameter) if parameter.is_meta else [*map(quantize, parameter)]
        delattr(mixture, name)
        setattr(mixture, name, QuantizedStack(experts))
    backend = mixture.config.experts
    if mixture.config.has_bias:
        mixture.run_experts = run_biased
    else:
        mixture.run_experts = partial(run_either, EXPERTS[backend], QUANTIZED_EXPERTS[backend])


def run_either(plain: Callable, quantized: Callable, x: Tensor, choice: Tensor, weights: Tensor, *experts) -> Tensor:
    """Run a backend of moe.py, or on stacks of codes one of this file: adapters make plain stacks of them."""
    return (plain if isinstance(experts[0], Tensor) else quantized)(x, choice, weights, *experts)


def run_biased(x: Tensor, choice: Tensor, weights: Tensor, gate, up, down, *biases) -> Tensor:
    """Run the loop over experts with biases, those in codes written out when their turn comes."""
    written = (w if isinstance(w, Tensor) else Written(w, x.dtype) for w in (gate, up, down))
    return experts_biased(x, choice, weights, *written, *biases)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Written:
    """Stands for a stack whose matrices are dequantised as they are asked for."""

    stack: QuantizedStack
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.stack)

    def __getitem__(self, e: int) -> Tensor:
        return dequantize_ref(self.stack[e]).to(self.dtype)


def pack_experts(mixture: MoE):
    """Make products with a mixture's quantised experts fast on a CPU, where its backend and format have any."""
    gate, up, down = (getattr(mixture, name) for name in STACKS)
    if not isinstance(gate, QuantizedStack) or gate.packed is not None or gate.format not in PACK:
        return
    if mixture.config.has_bias or QUANTIZED_EXPERTS[mixture.config.experts] is not quantized_loop:
        return
    together = [PackedWeight([gate[e], up[e]]) for e in range(len(gate))]
    alone = [PackedWeight([down[e]]) for e in range(len(down))]
    for stack, packed, index in ((gate, together, 0), (up, together, 1), (down, alone, 0)):
        stack.pack(packed, index)


# --- backends: as those of moe.py, with a QuantizedStack for each of the experts' matrices -------------------------


def quantized_loop(
    x: Tensor, choice: Tensor, weights: Tensor, gate: QuantizedStack, up: QuantizedStack, down: QuantizedStack
) -> Tensor:
    """One expert after the other."""
    if gate.packed is not None and down.packed is not None and not torch.is_grad_enabled():
        return multiply_packed(x, choice, weights, gate.packed, down.packed)
    return Loop.apply(x.to(product_dtype(x)), choice, weights, gate, up, down).to(x.dtype)  # pyright: ignore


def multiply_packed(
    x: Tensor, choice: Tensor, weights: Tensor, together: list[PackedWeight], down: list[PackedWeight]
) -> Tensor:
    """The same with products of codes; `together` are gate and up of each expert."""
    y = torch.zeros_like(x)
    for e, r, j in list_experts(choice):
        gate, up = together[e](x[r]).split(together[e].sizes, dim=-1)
        y.index_add_(0, r, (weights[r, j, None] * down[e](swiglu(gate, up))).to(y.dtype))
    return y


class Loop(torch.autograd.Function):
    """The gradient of an expert's output is taken when its matrices are there, so none is kept."""

    @staticmethod
    def forward(ctx, x, choice, weights, gate, up, down):
        ctx.save_for_backward(x, choice, weights)
        ctx.stacks = gate, up, down
        y = torch.zeros_like(x)
        for e, r, j in list_experts(choice):
            y.index_add_(0, r, run_expert(x[r], weights[r, j], *(stack[e] for stack in ctx.stacks)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, choice, weights = ctx.saved_tensors
        dx, dweights = torch.zeros_like(x), torch.zeros_like(weights)
        for e, r, j in list_experts(choice):
            with torch.enable_grad():
                own = [part.detach().requires_grad_() for part in (x[r], weights[r, j])]
                y = run_expert(*own, *(stack[e] for stack in ctx.stacks))
            dx_own, dweights[r, j] = torch.autograd.grad(y, own, grad[r])
            dx.index_add_(0, r, dx_own)
        return dx, None, dweights, None, None, None


def list_experts(choice: Tensor):
    """Yield each expert that has tokens, their indices, and which of a token's choices it is."""
    for e in choice.unique().tolist():
        r, j = (choice == e).nonzero(as_tuple=True)
        yield e, r, j


def run_expert(x: Tensor, weights: Tensor, gate: QuantizedWeight, up: QuantizedWeight, down: QuantizedWeight) -> Tensor:
    """SwiGLU of x [R, D] with the matrices of one expert, times weights [R], in the dtype of x."""
    gate_WD, up_WD, down_DW = (dequantize_ref(w).to(x.dtype) for w in (gate, up, down))
    with torch.autocast(x.device.type, enabled=False):  # which is off in the backward pass
        h = F.silu(x @ gate_WD.T) * (x @ up_WD.T)
        return (weights[:, None] * (h @ down_DW.T)).to(x.dtype)


def quantized_triton(
    x: Tensor, choice: Tensor, weights: Tensor, gate: QuantizedStack, up: QuantizedStack, down: QuantizedStack
) -> Tensor:
    """Kernels that read the few bits: a tile of an expert's matrix is dequantised where it is multiplied."""
    try:
        from nanovlm.kernels.quantized_experts import quantized_experts
    except ImportError as error:
        raise UserError(f"decoder.moe.experts = 'triton' needs the package triton: {error}") from error
    stacks = (stack.whole() for stack in (gate, up, down))
    return quantized_experts(x.to(product_dtype(x)), choice, weights, *stacks).to(x.dtype)


QUANTIZED_EXPERTS = {"loop": quantized_loop, "grouped": quantized_loop, "triton": quantized_triton}
