"""Quantised weights -> products on a CPU that read the few bits, by torch's own operators.

```
int8   a byte a weight, and a scale for each output      nf4: the same, rounded a second time, its codes are kept beside
int4   half a byte, in an order that torch chooses for the processor, and a scale and an offset for each group
```

Activations and results are bf16 and sums fp32, as the operators take 8 times the time of a bf16 product in fp32: a
result is as near to the product with the dequantised weights as one in bf16, also where the model's other weights are
fp32. They take time in proportion to the rows, so for many rows the weights are written out for one plain product.
Legend: R rows, N outputs, K inputs, G groups along K.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm.kernels.quantized_weight import NUM_BITS, QuantizedWeight, dequantize_ref, pack, unpack


class PackedWeight:
    """Weights of layers with the same input and format, one below the other, for one product."""

    def __init__(self, weights: Sequence[QuantizedWeight]):
        self.format, self.sizes, self.num_inputs = weights[0].format, [w.shape[0] for w in weights], weights[0].shape[1]
        self.codes, self.scales, self.group = PACK[self.format](weights)
        self.num_outputs, self.padding = sum(self.sizes), -self.num_inputs % 32
        # Rows of `codes`, padding included.
        self.num_rows = self.codes.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> the outputs of all layers [..., N], in the dtype of x."""
        x_RK = x.reshape(-1, self.num_inputs).bfloat16()
        if self.padding:
            x_RK = F.pad(x_RK, (0, self.padding))
        most_rows, few, many = PRODUCTS[self.format]
        y_RN = (few if x_RK.shape[0] <= most_rows else many)(x_RK, self)
        if self.num_rows > self.num_outputs:
            y_RN = y_RN[:, : self.num_outputs]
        return y_RN.to(x.dtype).view(*x.shape[:-1], self.num_outputs)

    def unpack(self, index: int) -> Tensor:
        """Return the codes of one of the layers as in QuantizedWeight; there is no way back from the copy of nf4."""
        assert self.format != "nf4"
        codes = int4_codes(self.codes, self.num_rows) if self.format == "int4" else self.codes.int() + 128
        return pack(codes[: self.num_outputs].split(self.sizes)[index], NUM_BITS[self.format])


# --- int8: codes int8[N, K], scales bf16[N] -------------------------------------------------------------------


def pack_int8(weights: Sequence[QuantizedWeight]) -> tuple[Tensor, Tensor, int]:
    codes = torch.cat([(unpack(w) - 128).to(torch.int8) for w in weights])
    return codes, torch.cat([w.scales for w in weights]).flatten().bfloat16(), codes.shape[1]


def pack_nf4(weights: Sequence[QuantizedWeight]) -> tuple[Tensor, Tensor, int]:
    """Round again, to int8 with a scale for each output."""
    values = torch.cat([dequantize_ref(w) for w in weights])
    values = F.pad(values, (0, -values.shape[1] % 32))
    scales = (values.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
    codes = (values / scales.float()).round().clamp(-127, 127).to(torch.int8)
    return codes, scales.flatten(), codes.shape[1]


def int8_few(x: Tensor, w: PackedWeight) -> Tensor:
    return torch._weight_int8pack_mm(x, w.codes, w.scales)  # pyright: ignore[reportPrivateImportUsage]


def int8_many(x: Tensor, w: PackedWeight) -> Tensor:
    return F.linear(x, w.codes.bfloat16()) * w.scales


# --- int4: codes uint8[N, K / 2], scales and offsets bf16[G, N, 2] --------------------------------------------
#
# W = (code - 8) * scale + offset. N is filled up to a multiple of BLOCK. Torch lays the codes of 64, or on other
# processors of 32, neighbouring outputs side by side for each input: [N / 64, K, 64], in an order that is the same for
# all and that `find_order` asks for, as it is nowhere written.

BLOCK = 64


def pack_int4(weights: Sequence[QuantizedWeight]) -> tuple[Tensor, Tensor, int]:
    codes = torch.cat([unpack(w) for w in weights])
    scales = torch.cat([w.scales for w in weights])
    K = codes.shape[1]
    group = math.gcd(weights[0].group, K)  # the operator takes whole groups alone
    scales = scales.repeat_interleave(weights[0].group // group, dim=1)[:, : K // group]
    scale, zero = (scales & -16).view(torch.float32), scales & 15
    rows = (0, 0, 0, -len(codes) % BLOCK)
    scales = F.pad(torch.stack((scale, (8 - zero) * scale)), rows).bfloat16().permute(2, 1, 0).contiguous()
    return torch._convert_weight_to_int4pack_for_cpu(F.pad(codes, rows), 1), scales, group  # pyright: ignore[reportPrivateImportUsage]


def int4_few(x: Tensor, w: PackedWeight) -> Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, w.codes, w.group, w.scales)  # pyright: ignore[reportPrivateImportUsage]


def int4_many(x: Tensor, w: PackedWeight) -> Tensor:
    order = find_order()
    # bf16[2, N / 64, G, 1, 64]
    scales = w.scales.view(-1, w.num_rows // len(order), len(order), 2)[..., order, :].permute(3, 1, 0, 2)
    scale, offset = scales.unsqueeze(3).contiguous()
    codes = nibbles(w.codes).view(len(scale), -1, w.group, len(order)).bfloat16().sub_(8)
    weight = torch.addcmul(offset, codes, scale).flatten(1, 2)  # [N / 64, K, 64]
    return F.linear(x, weight.mT[:, order.argsort()].flatten(0, 1))


def int4_codes(codes: Tensor, num_outputs: int) -> Tensor:
    """Return the codes uint8[N, K] of the packed ones."""
    order = find_order()
    return nibbles(codes).view(num_outputs // len(order), -1, len(order))[..., order.argsort()].mT.flatten(0, 1)


def nibbles(codes: Tensor) -> Tensor:
    """Return the halves of bytes, lower half first."""
    return torch.stack((codes & 15, codes >> 4), dim=-1)


@functools.cache
def find_order() -> Tensor:
    """Return the order of the outputs within a block int64[32 or 64], by packing their numbers for two inputs."""
    numbers = torch.arange(BLOCK, dtype=torch.int32)[:, None].expand(-1, 2).contiguous()
    low, high = (nibbles(torch._convert_weight_to_int4pack_for_cpu(x, 1)) for x in (numbers % 16, numbers // 16))  # pyright: ignore[reportPrivateImportUsage]
    order = (low + 16 * high).flatten().long()
    size = 1 + int((order[1:] == order[0]).nonzero()[0])  # where the second input begins
    return order[:size]


PACK = {"int8": pack_int8, "int4": pack_int4, "nf4": pack_nf4}
# The most rows for which the first product is used: where both take as long, for the matrices of SmolLM2-135M (AMD EPYC
# with AVX512, one thread, torch 2.13, 2026-11-29). For 512 rows the second takes 0.37 of the time of the first in int8,
# and 0.69 in int4, where writing the weights out takes longer.
PRODUCTS = {"int8": (16, int8_few, int8_many), "nf4": (16, int8_few, int8_many), "int4": (256, int4_few, int4_many)}
