"""Keys and values <-> codes of 8 or 4 bits: what a slot of the cache holds.

```
x ~ code * scale + offset        for each head of a token: code from 0 to L = 255 or 15, scale and offset bf16
                                 offset = min(x, 0), scale = (max(x, 0) - offset) / L
```

A token is rounded once, from its own numbers alone, when it is written; all that read it read the same bits. Scale and
offset are rounded away from 0, so that no number lies outside the codes: none is off by more than half a scale, which
is r / (2 L) * (1 + 2^-7)^2 at most, r = max(x, 0) - min(x, 0).

Four bits lie in a byte each: channel h in the lower half, channel h + H / 2 in the upper.
Legend: S slots, K key/value heads, H head size.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SCALE_BYTES = 4  # scale and offset


class Codes(NamedTuple):
    """Stands for slots [S, K, H]; `read` (a range of slots) and `read_blocks` dequantise some of them."""

    # uint8[S, K, H], or of 4 bits [S, K, H / 2].
    codes: Tensor
    # bf16[S, K, 2], scale and offset.
    scales: Tensor
    num_bits: int
    # What they are dequantised to.
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def shape(self) -> tuple[int, int, int]:
        S, K, width = self.codes.shape
        return S, K, width * 8 // self.num_bits

    def read(self, first: int, last: int) -> Tensor:
        """Return the slots from `first` to `last`, [last - first, K, H]."""
        return self._decode(self.codes[first:last], self.scales[first:last])

    def read_blocks(self, blocks: Tensor, size: int) -> Tensor:
        """Return the slots of blocks int64[n] of so many slots, one block after the other, [n * size, K, H]."""
        found = (x.view(-1, size * x[0].numel()).index_select(0, blocks) for x in (self.codes, self.scales))
        codes, scales = (x.view(-1, *like.shape[1:]) for x, like in zip(found, (self.codes, self.scales), strict=True))
        return self._decode(codes, scales)

    def _decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        if self.num_bits == 4:
            codes = torch.cat((codes & 15, codes >> 4), dim=-1)
        values, (scale, offset) = codes.to(self.dtype), scales.to(self.dtype)[..., None].unbind(-2)
        return torch.addcmul(offset, values, scale, out=values)


def encode(x: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """x [..., H] -> codes uint8[..., H], of 4 bits [..., H / 2], and scale and offset bf16[..., 2]."""
    x, most = x.float(), 2**num_bits - 1
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    offset = round_away(low)
    scale = round_away((high - offset) / most)
    codes = ((x - offset) / torch.where(scale > 0, scale, 1)).round().clamp(0, most).to(torch.uint8)
    if num_bits == 4:
        lower, upper = codes.chunk(2, dim=-1)
        codes = lower | upper << 4
    return codes, torch.cat((scale, offset), dim=-1).bfloat16()


def round_away(x: Tensor) -> Tensor:
    """Round fp32 to numbers of bf16, away from 0."""
    return ((x.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def write(slots: Tensor | Codes, index: Tensor, x: Tensor):
    """Write x [T, K, H] into the slots int64[T]."""
    if isinstance(slots, Codes):
        codes, scales = encode(x, slots.num_bits)
        slots.codes.index_copy_(0, index, codes)
        slots.scales.index_copy_(0, index, scales)
    else:
        slots.index_copy_(0, index, x)


# --- allocating slots [S, K, H], and the bytes of a head of a token -------------------------------------------


def allocate_float(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    return allocate(shape, device, dtype)


def allocate_int8(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Codes:
    return allocate_codes(shape, device, dtype, 8)


def allocate_int4(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Codes:
    return allocate_codes(shape, device, dtype, 4)


def allocate_codes(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, num_bits: int) -> Codes:
    S, K, H = shape
    codes = allocate((S, K, H * num_bits // 8), device, torch.uint8)
    return Codes(codes, allocate((S, K, 2), device, torch.bfloat16), num_bits, dtype)


def allocate(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros; on a CPU the system gives the memory when it is first written to, as it does not to torch.zeros."""
    if device.type != "cpu" or not math.prod(shape):  # of an empty array torch knows no stride
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


CACHE_FORMATS = {
    "float": (allocate_float, lambda head_dim, dtype: head_dim * dtype.itemsize),
    "int8": (allocate_int8, lambda head_dim, _: head_dim + SCALE_BYTES),
    "int4": (allocate_int4, lambda head_dim, _: head_dim // 2 + SCALE_BYTES),
}
