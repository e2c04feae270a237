"""Linear layers -> the same layers with weights in 8 or 4 bits (formats: kernels/quantized_weight.py).

```
model --quantize--> decoder's linear layers in codes and scales, and if asked for the experts of its mixtures
                    (quantized_experts.py); encoder, projector, router, norms, embeddings and head as they were
```

A weight is rounded to the nearest code. With `search` smaller ranges are also tried for each group, which round
most weights more finely but clip the largest: of 16 ranges the one with the least squared error is taken. Methods
that look at what the layers read are in nanovlm/quant.
"""

import dataclasses
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanovlm.config import QuantizationConfig
from nanovlm.errors import UserError
from nanovlm.kernels.quantized_weight import (
    NUM_BITS,
    QuantizedWeight,
    dequant_matmul_ref,
    dequantize_ref,
    make_tables,
    pack,
    unpack,
)
from nanovlm.model.moe import MoE
from nanovlm.model.packed import PackedWeight
from nanovlm.model.quantized_experts import STACKS, QuantizedStack, replace_experts
from nanovlm.model.vlm import VLM

# Fractions of a group's range to try, from 1 down to about a half, closer together near 1. On normal weights, 40 evenly
# spaced ones find errors that differ by less than 1 %.
CLIPS = [1 - (step / 22) ** 2 for step in range(16)]


def quantize(model: VLM, config: QuantizationConfig, search: bool = True) -> VLM:
    """Replace the linear layers that the config names, in place, and note the config in the model's own.

    Raises UserError as `find_layers` does, and for weights that are not finite.
    """
    for name, linear in find_layers(model, config).items():
        try:
            layer = QuantizedLinear(linear, config, search)
        except ValueError as error:
            raise UserError(f"{name} cannot be quantised: {error}") from error
        replace_layer(model, name, layer)
    for name, mixture in find_mixtures(model, config).items():
        round_experts(name, mixture, config, search)
    model.config = dataclasses.replace(model.config, quantization=config)
    return model


def find_layers(model: VLM, config: QuantizationConfig) -> dict[str, nn.Linear]:
    """Return the linear layers that the config names, by their names.

    The head and the routers are never among them, nor are the experts of a mixture, which are stacked parameters
    (`find_mixtures`). Raises UserError if the model is already quantised or no name matches.
    """
    if done := next((x for x in model.modules() if isinstance(x, QuantizedLinear | QuantizedStack)), None):
        raise UserError(f"the model is quantised already, to {done.format}")
    if config.activations != "none" and config.format != "int8":
        raise UserError(
            f"quantization.activations = {config.activations!r} is for format int8, not for {config.format!r}"
        )
    if model.adapters is not None and not model.adapters.merged:
        raise UserError("the model has adapters, which are for its weights as they are: merge them, or quantise before")
    try:
        pattern = re.compile(config.layers)
    except re.error as error:
        raise UserError(f"quantization.layers = {config.layers!r} is no regular expression: {error}") from error
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and pattern.search(name) and not name.endswith(("lm_head", "router"))
    }
    if not layers and not find_mixtures(model, config):
        raise UserError(f"quantization.layers = {config.layers!r} is found in the name of no linear layer")
    return layers


def find_mixtures(model: VLM, config: QuantizationConfig) -> dict[str, MoE]:
    """Return the mixtures whose experts the config names, by their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if config.experts
        and isinstance(module, MoE)
        and all(re.search(config.layers, f"{name}.{stack}") for stack in STACKS)
    }


def round_experts(name: str, mixture: MoE, config: QuantizationConfig, search: bool):
    """Put codes in the place of a mixture's experts. Raises UserError for weights that are not finite."""
    try:
        replace_experts(mixture, lambda w: quantize_weight(w, config.format, config.group_size, search))
    except ValueError as error:
        raise UserError(f"experts of {name} cannot be quantised: {error}") from error


def replace_layer(model: nn.Module, name: str, layer: nn.Module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


class QuantizedLinear(nn.Module):
    """y = x @ W.T + bias with quantised W; frozen, but differentiable in x.

    While it is `packed` (packed.py), the codes of int8 and int4 are there alone, and `codes` is None. A state dict has
    them as ever; loading one and moving or casting the layer first unpack it.
    """

    codes: Tensor | None
    scales: Tensor

    def __init__(
        self, linear: nn.Linear, config: QuantizationConfig, search: bool = True, w: QuantizedWeight | None = None
    ):
        """Round the weight of a linear layer, or take `w` for it."""
        super().__init__()
        if w is None:
            w = quantize_weight(linear.weight, config.format, config.group_size, search)
        # No buffers, as they are not in a state dict and a model that is built without contents is filled from one.
        self.format, self.shape, self.group, self.tables = w.format, w.shape, w.group, w.tables
        self.rounds_inputs = config.activations == "int8"
        for name in TENSORS:
            self.register_buffer(name, getattr(w, name))
        self.bias = linear.bias
        # Shared by layers that are multiplied together, and which of them this is.
        self.packed: PackedWeight | None = None
        self.index = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None and not torch.is_grad_enabled():
            y = self.packed(x)
            y = y if len(self.packed.sizes) == 1 else y.split(self.packed.sizes, dim=-1)[self.index]
            return y if self.bias is None else y + self.bias
        x = round_tokens(x) if self.rounds_inputs else x
        return (load_kernel() if x.is_cuda else dequant_matmul)(x, self.weight(), self.bias)

    def weight(self) -> QuantizedWeight:
        tensors = {name: getattr(self, name) for name in TENSORS}
        if self.codes is None:
            assert self.packed is not None
            tensors["codes"] = self.packed.unpack(self.index)
        return QuantizedWeight(self.format, self.shape, self.group, **tensors, tables=self.tables)

    def dequantize(self) -> Tensor:
        """Return the weight, fp32[N, K]."""
        return dequantize_ref(self.weight())

    def pack(self, packed: PackedWeight, index: int):
        """Multiply with the packed weight from now on, of which this layer's is part `index`."""
        self.packed, self.index = packed, index
        if self.format != "nf4":
            self.codes = None

    def unpack(self):
        """Undo `pack`."""
        self.codes, self.packed = self.weight().codes, None

    def _apply(self, fn, recurse=True):
        """Keep the dtype of scales when a model is cast: viewed as integers, they are only moved. Make new tables."""
        self.unpack()
        as_bits, buffers = {4: torch.int32, 1: torch.uint8}, {id(t) for t in self.buffers()}
        super()._apply(lambda t: fn(t.view(as_bits[t.itemsize])).view(t.dtype) if id(t) in buffers else fn(t), recurse)
        self.tables = make_tables(self.weight().codes.device) if self.format == "nf4" else None
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "codes"] = self.weight().codes

    def _load_from_state_dict(self, *args):
        self.unpack()
        super()._load_from_state_dict(*args)


def round_tokens(x: Tensor) -> Tensor:
    """Round x [..., K] to the 255 multiples of a 127th of its largest number, for each token; gradients go through.

    The product with int8 weights is then that of integers times two scales, but for the rounding of floats.
    """
    scale = positive(x.detach().float().abs().amax(-1, keepdim=True) / 127)
    rounded = ((x.detach() / scale).round() * scale).to(x.dtype)
    return rounded + (x - x.detach()) if torch.is_grad_enabled() and x.requires_grad else rounded


def load_kernel():
    """Import the fused product on demand, as a CPU does not need Triton; without Triton return torch's."""
    try:
        from nanovlm.kernels import dequant_matmul as kernel
    except ModuleNotFoundError:
        return dequant_matmul
    return kernel.dequant_matmul


def dequant_matmul(x: Tensor, w: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., N] by torch's own operators."""
    return DequantMatmul.apply(x, w, bias)  # pyright: ignore[reportReturnType]


class DequantMatmul(torch.autograd.Function):
    """Keeps the codes for the backward pass, which dequantises again, not the weight: equal bits, an eighth of it."""

    @staticmethod
    def forward(ctx, x: Tensor, w: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.w = w
        return dequant_matmul_ref(x, w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = grad @ dequantize_ref(ctx.w).to(grad.dtype)
        if ctx.needs_input_grad[2]:
            db = grad.flatten(0, -2).sum(0)
        return dx, None, db


# The tensors of a quantised layer's state dict that take the place of its weight.
TENSORS = ("codes", "scales", "nested_scales", "nested_offset")


def is_quantized(name: str) -> bool:
    """Return whether a tensor of this name belongs to a quantised weight."""
    return name.endswith(tuple(f".{tensor}" for tensor in TENSORS))


# ---- quantise ----


@torch.no_grad()
def quantize_weight(
    weight: Tensor, format: str, group_size: int = 64, search: bool = True, gram: Tensor | None = None
) -> QuantizedWeight:
    """Weight float[N, K] -> codes and scales; `group_size` is that of int4.

    With the `gram` [K, K] of what the layer reads, the search looks for the least squared error of what each group adds
    to the output instead of the least of its weights. Without `search`, nf4 gives the same codes as bitsandbytes.
    Raises UserError for weights that are not finite.
    """
    if not weight.is_meta and not weight.isfinite().all():
        raise UserError("it has weights that are not finite")
    N, K = weight.shape
    padded = math.ceil(K / 32) * 32
    group = {"int8": padded, "fp8": padded, "nf4": 64}.get(format, group_size)
    w_NGg = F.pad(weight.float(), (0, -K % group)).view(N, -1, group)
    gram_Ggg = None if gram is None else diagonal_blocks(gram.float(), group)
    codes, *scales = QUANTIZERS[format](w_NGg, CLIPS if search else CLIPS[:1], gram_Ggg)
    codes = pack(codes.reshape(N, -1)[:, :padded], NUM_BITS[format])
    tables = make_tables(codes.device) if format == "nf4" else None
    named = dict(zip(TENSORS[1:], scales, strict=False))
    return QuantizedWeight(format, (N, K), group, codes, **named, tables=tables)


def store_int4(codes: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N, K], scales and zero points [N, G] -> the tensors `codes` and `scales` of int4."""
    padding = zero[:, -1:].expand(-1, -codes.shape[1] % 32)  # stands for 0
    scales = scale.float().contiguous().view(torch.int32) & -16 | zero.int()
    return pack(torch.cat((codes.int(), padding.int()), dim=1), NUM_BITS["int4"]), scales


def read_codes(w: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 or int4 -> codes int32[N, K], scales fp32[N, G] and, of int4, zero points int32[N, G]."""
    codes = unpack(w)[:, : w.shape[1]]
    if w.format == "int8":
        return codes, w.scales, None
    return codes, (w.scales & -16).view(torch.float32), w.scales & 15


def quantize_int8(w: Tensor, clips: list[float], gram: Tensor | None) -> tuple[Tensor, ...]:
    """Return codes around 128, and a scale for each row of [N, 1, K]."""

    def encode(clip):
        scale = positive(clip * w.abs().amax(-1, keepdim=True) / 127)
        codes = (w / scale).round().clamp(-127, 127)
        return codes * scale, codes + 128, scale

    codes, scale = least_error(w, encode, clips, gram)
    return codes, scale.squeeze(-1)


def quantize_fp8(w: Tensor, clips: list[float], gram: Tensor | None) -> tuple[Tensor, ...]:
    """Return the bytes of e4m3 numbers, and a scale for each row of [N, 1, K] that makes its largest 448."""

    def encode(clip):
        scale = positive(clip * w.abs().amax(-1, keepdim=True) / 448)
        rounded = (w / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return rounded.float() * scale, rounded.view(torch.uint8), scale

    codes, scale = least_error(w, encode, clips, gram)
    return codes, scale.squeeze(-1)


def quantize_int4(w: Tensor, clips: list[float], gram: Tensor | None) -> tuple[Tensor, ...]:
    """Return codes from 0 to 15, and a bf16 scale and a zero point for each group of [N, G, group]; 0 stays 0."""
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)

    def encode(clip):
        scale = positive((clip * (high - low) / 15).bfloat16().float())
        zero = (-clip * low / scale).round().clamp(0, 15)
        codes = ((w / scale).round() + zero).clamp(0, 15)
        return (codes - zero) * scale, codes, scale, zero

    codes, scale, zero = least_error(w, encode, clips, gram)
    return codes, scale.squeeze(-1).view(torch.int32) | zero.squeeze(-1).int()


def quantize_nf4(w: Tensor, clips: list[float], gram: Tensor | None) -> tuple[Tensor, ...]:
    """Return NF4 codes for [N, G, 64], each absmax minus the mean in 8 bits, a scale for 256 of these, and the mean."""
    values, table = make_tables(w.device)

    def nearest(table, x):
        return torch.bucketize(x, (table[1:] + table[:-1]) / 2, out_int32=True)

    def encode(clip):
        absmax = clip * w.abs().amax(-1, keepdim=True)
        codes = nearest(values, (w * (1 / absmax.clamp(min=1e-38))).clamp(-1, 1))
        return values[codes] * absmax, codes, absmax

    codes, absmax = least_error(w, encode, clips, gram)
    offset = absmax.mean()
    flat = (absmax - offset).flatten()
    blocks = F.pad(flat, (0, -len(flat) % 256)).view(-1, 256)
    scales = blocks.abs().amax(-1, keepdim=True)
    nested = nearest(table, (blocks * (1 / scales.clamp(min=1e-38))).clamp(-1, 1))
    if len(clips) > 1:  # the absmax was itself rounded: choose the codes anew for its new value
        absmax = ((table[nested] * scales).flatten()[: len(flat)] + offset).view_as(absmax)
        codes = nearest(values, w / positive(absmax))
    nested = nested.flatten()[: len(flat)].view(absmax.shape[:2]).to(torch.uint8)
    return codes, nested, scales.flatten(), offset


QUANTIZERS = {"int8": quantize_int8, "int4": quantize_int4, "nf4": quantize_nf4, "fp8": quantize_fp8}


def diagonal_blocks(gram: Tensor, group: int) -> Tensor:
    """[K, K] -> [G, group, group], the blocks of the groups along K, filled up with zeros."""
    gram = F.pad(gram, (0, -len(gram) % group, 0, -len(gram) % group))
    return gram.view(-1, group, len(gram) // group, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def least_error(w: Tensor, encode, clips: list[float], gram: Tensor | None) -> list[Tensor]:
    """Return the result of `encode` for the best clip of each group of w [N, G, group].

    `encode(clip)` returns the dequantised values [N, G, group], then codes and scales. The error of a group is that of
    its weights, or with `gram` [G, group, group] that of what it adds to the output.
    """

    def measure(clip):
        values, *found = encode(clip)
        error = values - w
        turned = error if gram is None else torch.einsum("ngi,gij->ngj", error, gram)
        return found, (error * turned).sum(-1, keepdim=True)

    best, least = measure(clips[0])
    for clip in clips[1:]:
        found, error = measure(clip)
        best = [torch.where(error < least, new, old) for new, old in zip(found, best, strict=True)]
        least = torch.minimum(error, least)
    return best


def positive(scale: Tensor) -> Tensor:
    """Replace scales of 0, of groups that are all 0, by 1 so that they can be divided by."""
    return torch.where(scale > 0, scale, 1)
