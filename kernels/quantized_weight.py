"""Weights W [N, K] of 8 or 4 bits: their formats, their layout in memory, and plain PyTorch that reads them.

```
int8   W = (code - 128) * scale           a scale fp32 for each output
fp8    W = E4M3[code] * scale             the same; 4 bits of exponent, 3 of mantissa (arXiv 2209.05433)
int4   W = (code - zero) * scale          a scale and a zero point for each group of 32, 64 or 128 along K
nf4    W = NF4[code] * absmax             absmax = DYNAMIC[scale] * nested_scale + nested_offset for each 64 along K
```

NF4 and the 8-bit absmax around their mean, 256 to a scale, are those of QLoRA (Dettmers et al. 2023, arXiv 2305.14314)
and of bitsandbytes: where K is a multiple of 64, the same codes give the same weights to the last bit.

Codes lie in words of 32 bits, `PLANES` = 8 or 4 of them in each, so that no code has to be moved to be multiplied:

```
a row       tile | tile | ...                    each of PLANES * RUN neighbouring weights, in RUN words
word j      code j | code RUN + j | code 2 RUN + j | ...        lowest bits first
```

RUN (32, 16, 8 or 4) is the largest that divides the row; rows are filled up to a multiple of 32 weights with zeros.
Legend: N outputs, K inputs; G groups a row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BITS = {"int8": 8, "int4": 4, "nf4": 4, "fp8": 8}


class QuantizedWeight(NamedTuple):
    """A matrix [N, K] in few bits. G groups of `group` weights a row; nf4 has groups of 64, int8 and fp8 one of K."""

    format: str
    shape: tuple[int, int]
    group: int
    # int32[N, words].
    codes: Tensor
    # int8, fp8: fp32[N, 1]; int4: int32[N, G], the zero point in the lowest 4 bits of a fp32 (ours are bf16, those of
    # other tools may be fp16); nf4: uint8[N, G].
    scales: Tensor
    # nf4: fp32[ceil(N G / 256)] and fp32[].
    nested_scales: Tensor | None = None
    nested_offset: Tensor | None = None
    # nf4: fp32[16] and fp32[256], what the codes and what the scales stand for; None, made anew for each product.
    tables: tuple[Tensor, Tensor] | None = None


# --- the specification ---------------------------------------------------------------------------------------


def dequant_matmul_ref(x: Tensor, w: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] -> [..., N] in the dtype of x."""
    return F.linear(x, dequantize_ref(w).to(x.dtype), bias)


def dequantize_ref(w: QuantizedWeight) -> Tensor:
    """Dequantise the weight, fp32[N, K]."""
    (N, K), codes = w.shape, unpack(w)
    group_of = torch.arange(codes.shape[1], device=codes.device) // w.group
    if w.format == "int8":
        values, scales = codes - 128, w.scales
    elif w.format == "fp8":
        values, scales = codes.to(torch.uint8).view(torch.float8_e4m3fn).float(), w.scales
    elif w.format == "int4":
        values, scales = codes - (w.scales & 15)[:, group_of], (w.scales & -16).view(torch.float32)
    else:
        assert w.nested_scales is not None and w.nested_offset is not None  # nf4
        table, dynamic = w.tables or make_tables(codes.device)
        values, scales = table[codes], dynamic[w.scales.int()].flatten()
        scales = scales * w.nested_scales.repeat_interleave(256)[: len(scales)] + w.nested_offset
    return (values * scales.view(N, -1)[:, group_of])[:, :K]


def run_length(num_weights: int, bits: int) -> int:
    """Return RUN for rows of `num_weights`, a multiple of 32."""
    return next(run for run in (32, 16, 8, 4) if num_weights % (run * 32 // bits) == 0)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Lay codes [N, K] from 0 to 2**bits - 1 into words int32[N, K * bits / 32]; K is a multiple of 32."""
    N, K = codes.shape
    planes = codes.int().view(N, -1, 32 // bits, run_length(K, bits)) << _shifts(bits, codes.device)
    return planes.sum(2, dtype=torch.int32).view(N, -1)


def unpack(w: QuantizedWeight) -> Tensor:
    """Return the codes int32[N, K], K rounded up to a multiple of 32."""
    bits = NUM_BITS[w.format]
    N, num_words = w.codes.shape
    words = w.codes.view(N, -1, 1, run_length(num_words * 32 // bits, bits))
    return (words >> _shifts(bits, words.device) & (2**bits - 1)).view(N, -1)


def _shifts(bits, device):
    return torch.arange(0, 32, bits, dtype=torch.int32, device=device)[:, None]


# --- the tables of nf4 ---------------------------------------------------------------------------------------

# Quantiles of the normal distribution, 0 among them (QLoRA, appendix E).
# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022833234, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


def list_dynamic_values() -> list[float]:
    """256, ascending: 0, 1, and +-10**(e - 6) times the middles of 2**e equal parts of 0.1 to 1, e from 0 to 6.

    Dettmers et al. 2022, arXiv 2110.02861. Of numbers that are not in fp32 the next is taken after every operation.
    """
    positive = []
    for e in range(7):
        ends = ends_of_parts(2**e)
        positive.append(np.float32(10.0 ** (e - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2)))
    values = np.concatenate(positive)
    return np.sort(np.concatenate([-values, np.array([0, 1], np.float32), values])).tolist()


def ends_of_parts(num: int) -> np.ndarray:
    """fp32[num + 1]: the ends of equal parts of 0.1 to 1, as torch.linspace has them where a processor fuses products.

    Computed from both ends with an fp32 step, each rounded once; fp64 arithmetic gives all processors the same bits.
    """
    first, last = np.float32(0.1), np.float32(1)
    step, i = np.float64((last - first) / np.float32(num)), np.arange(num + 1)
    return np.where(i < (num + 1) // 2, first + step * i, last - step * (num - i)).astype(np.float32)


DYNAMIC = tuple(list_dynamic_values())


def make_tables(device: torch.device | str) -> tuple[Tensor, Tensor]:
    """fp32[16] and fp32[256]: what nf4's codes and its scales stand for.

    Nothing is remembered: what is made while torch traces has no contents, and what is made while a CUDA graph is
    captured has them only when it is replayed. For a GPU it is a copy, which no graph can capture: keep the result.
    """
    table, dynamic = (torch.tensor(values, dtype=torch.float32, device=device) for values in (NF4, DYNAMIC))
    return table, dynamic
