"""y = x @ dequant(W).T + bias, for quantised weights W [N, K] that are never written out at small M.

quantized_weight.py has the formats, the layout and `dequant_matmul_ref`, the specification in plain PyTorch.

Plane i of a tile, the codes that `words >> (i * bits)` lays open, is RUN neighbouring weights: it is multiplied with
RUN neighbouring x. A load of 128 bits brings a thread 4 words of one row. A code becomes a float without a conversion:
its bits, or'ed into those of 2**23, are the float 2**23 + code, and subtracting 2**23 + zero is exact. Beside x in 16
bits there are cheaper ways: decode_16, look_up and DENORMAL.

How x [M, K] is multiplied depends on M alone; measured on a GPU: not yet.

    M = 1            gemv: every weight is decoded in registers and multiplied in fp32
    M <= 256         matmul: tiles of 64 outputs are decoded and multiplied by tensor cores with 16, 32 or 64 rows of x;
                     K is split over programs where there are few, whose sums in fp32 a last kernel adds up in order
    otherwise, fp8   the weight is written out once in the dtype of x, and torch multiplies

Nothing is saved for the backward pass but W itself: dx = dy @ dequant(W), through a weight that is written out.
Legend: M rows, N outputs, K inputs; G groups a row. `run` and the other choices depend on shapes alone, and nothing is
added atomically: the same inputs give the same bits.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanovlm.kernels.gpu import device_class
from nanovlm.kernels.quantized_weight import NF4, NUM_BITS, QuantizedWeight, dequantize_ref, make_tables, run_length
from nanovlm.kernels.register import autocast, is_interpreted, operator

MAX_FUSED_ROWS = 256


# ---- kernels ----


@triton.jit
def load_group(scales, nested_scales, nested_offset, dynamic, o_group, FORMAT: tl.constexpr):
    """fp32, what the codes of groups are multiplied with, and int32, the codes that stand for 0.

    An int8 row has one scale, which is applied to the sum later.
    """
    if FORMAT == "int8":
        return 1.0, 128
    elif FORMAT == "int4":
        b_group = tl.load(scales + o_group)
        return (b_group & -16).to(tl.float32, bitcast=True), b_group & 15
    else:
        b_absmax = tl.load(dynamic + tl.load(scales + o_group).to(tl.int32))
        return b_absmax * tl.load(nested_scales + o_group // 256) + tl.load(nested_offset), 7


@triton.jit
def decode(b_words, b_zero, b_table, i: tl.constexpr, FORMAT: tl.constexpr, BITS: tl.constexpr):
    """fp32: plane i of words; nf4 by its table, others 2 ** (i * BITS % 12) times the number that the code stands for.

    So the codes stay where they are in a word, but for shifts by 12 and 24 bits that bring all among the last 23.
    """
    SHIFT: tl.constexpr = i * BITS % 12
    if FORMAT == "nf4":
        b_code = (b_words >> (i * BITS)) & 15
        return tl.reshape(tl.gather(b_table, tl.reshape(b_code, [b_code.numel]), 0), b_code.shape)
    else:
        b_code = (b_words >> (i * BITS - SHIFT)) & ((2**BITS - 1) << SHIFT)
        b_value = (b_code | 0x4B000000).to(tl.float32, bitcast=True)
        if FORMAT == "int8":
            return b_value - (2.0**23 + 128 * 2.0**SHIFT)
        else:
            return b_value - ((b_zero << SHIFT) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def look_up(b_words, ASSEMBLY: tl.constexpr):
    """Four int32 for every word of nf4: planes 0 and 1, 2 and 3, ... in 16 bits each, by what write_lookup wrote."""
    FOUR: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
    return tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,=r,=r,r", [b_words], dtype=FOUR, is_pure=True, pack=1)


@triton.jit
def decode_16(b_words, b_zero, b_pairs, i: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """Plane i of 4-bit words in bf16 or fp16: nf4 rounded, int4 exact.

    An int4 code is or'ed into the bits of 128 in bf16 or 1024 in fp16, planes i and i + 4 at a time; subtracting 128 +
    zero or 1024 + zero is exact.
    """
    if FORMAT == "nf4":
        b_pair = b_pairs[i // 2]
        b_half = b_pair if i % 2 == 0 else b_pair >> 16
        return b_half.to(tl.int16).to(DTYPE, bitcast=True)
    else:
        BASE: tl.constexpr = 0x4300 if DTYPE == tl.bfloat16 else 0x6400
        b_pair = ((b_words >> (i % 4 * 4)) & 0x000F000F) | (BASE << 16 | BASE)
        b_half = b_pair if i < 4 else b_pair >> 16
        b_base = (b_zero | BASE).to(tl.int16).to(DTYPE, bitcast=True)
        return b_half.to(tl.int16).to(DTYPE, bitcast=True) - b_base


@triton.jit
def lay_open(b_words, i: tl.constexpr, BITS: tl.constexpr):
    """fp32: plane i of words as it lies there, which are the bits of code * 2 ** (i * BITS % 12 - 149)."""
    SHIFT: tl.constexpr = i * BITS % 12
    return ((b_words >> (i * BITS - SHIFT)) & ((2**BITS - 1) << SHIFT)).to(tl.float32, bitcast=True)


@triton.jit
def spread(b, RUN: tl.constexpr):
    """[BN, BT] -> [BN, BT * RUN]: what belongs to a tile, for each of its words."""
    BN: tl.constexpr = b.shape[0]
    BT: tl.constexpr = b.shape[1]
    return tl.reshape(tl.broadcast_to(b[:, :, None], [BN, BT, RUN]), [BN, BT * RUN])


@triton.jit
def gemv_kernel(
    x, codes, scales, nested_scales, nested_offset, dynamic, table, bias, y,
    N, K, TILES: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    FORMAT: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, WHOLE: tl.constexpr,
    DENORMAL: tl.constexpr,
):  # fmt: skip
    """y [N] = x [K] @ W.T: a program has BN outputs, and takes BT tiles of each at a time; WHOLE, none beyond the last.

    With DENORMAL a code is multiplied where it lies, as the denormal number of its bits, and the zero point of a group
    with the sum of its x. x is multiplied by 2**80 for that, so it must be below 2**47.
    """
    PLANES: tl.constexpr = 32 // BITS
    BW: tl.constexpr = BT * RUN
    o_n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    o_row = tl.minimum(o_n, N - 1)[:, None]
    b_table = tl.load(table + tl.arange(0, 16)) if FORMAT == "nf4" else 0
    acc = tl.zeros([BN, BW], tl.float32)
    for t in range(0, TILES, BT):
        o_word = (t * RUN + tl.arange(0, BW))[None, :]
        o_tile = tl.minimum(t + tl.arange(0, BT), TILES - 1)[None, :]  # beyond the last, x is 0
        p_words = codes + o_row * (TILES * RUN) + o_word
        if TILES % BT == 0:
            b_words = tl.load(p_words, eviction_policy="evict_first")
        else:
            b_words = tl.load(p_words, mask=o_word < TILES * RUN, other=0, eviction_policy="evict_first")
        part, b_sum = tl.zeros([BN, BW], tl.float32), tl.zeros([1, BW], tl.float32)
        for i in tl.static_range(PLANES):
            if i == 0 or i * RUN % GROUP == 0:
                o_group = o_row * GROUPS + (o_tile * (PLANES * RUN) + i * RUN) // GROUP
                b_scale, b_zero = load_group(scales, nested_scales, nested_offset, dynamic, o_group, FORMAT)
                if DENORMAL:
                    b_zero = ((b_zero | 0x4B000000).to(tl.float32, bitcast=True) - 2.0**23) * b_scale
                b_scale = b_scale if FORMAT == "int8" else spread(b_scale, RUN)
                b_zero = spread(b_zero, RUN) if FORMAT == "int4" else b_zero
            o_k = o_word // RUN * (PLANES * RUN) + i * RUN + o_word % RUN
            if WHOLE:
                b_x = tl.load(x + o_k).to(tl.float32)
            else:
                b_x = tl.load(x + o_k, mask=o_k < K, other=0.0).to(tl.float32)
            if DENORMAL:
                b_sum += b_x
                part += lay_open(b_words, i, BITS) * (b_x * 2.0 ** (80 - i * BITS % 12))
            elif FORMAT == "nf4":
                part += decode(b_words, b_zero, b_table, i, FORMAT, BITS) * b_x
            else:
                part += decode(b_words, b_zero, b_table, i, FORMAT, BITS) * (b_x * 2.0 ** -(i * BITS % 12))
            if i == PLANES - 1 or (i + 1) * RUN % GROUP == 0:
                if DENORMAL:
                    acc += part * (b_scale * 2.0**69)
                    acc -= b_zero * b_sum
                else:
                    acc += part * b_scale
                part, b_sum = tl.zeros([BN, BW], tl.float32), tl.zeros([1, BW], tl.float32)
    b_y = tl.sum(acc, 1)
    m_n = o_n < N
    if FORMAT == "int8":
        b_y *= tl.load(scales + o_n, mask=m_n, other=0.0)
    if bias is not None:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(y + o_n, b_y.to(y.dtype.element_ty), mask=m_n)


@triton.jit
def matmul_kernel(
    x, codes, scales, nested_scales, nested_offset, dynamic, table, out,
    M, N, K, stride_xm, TILES: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    FORMAT: tl.constexpr, BITS: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    BW: tl.constexpr, SCALES_SUMS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """out fp32[SPLIT, M, N] = x [M, K] @ W.T, each of SPLIT over its own steps of BW words along K.

    The tile of W is the left operand, so that it goes from registers into the tensor cores and the few rows of x lie
    along the side that may be short. With SCALES_SUMS codes are multiplied in 16 bits, and the scale of a group with
    the sum over its codes.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    PLANES: tl.constexpr = 32 // BITS
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_row = tl.minimum(o_n, N - 1).to(tl.int64)[:, None]
    p_x = x + tl.minimum(o_m, M - 1).to(tl.int64)[None, :] * stride_xm
    b_table = tl.load(table + tl.arange(0, 16)) if FORMAT == "nf4" and not SCALES_SUMS else 0
    acc = tl.zeros([BN, BM], tl.float32)
    for step in range(tl.program_id(2), tl.cdiv(TILES * RUN, BW), SPLIT):
        o_word = step * BW + tl.arange(0, BW)
        if TILES * RUN % BW == 0:
            b_words = tl.load(codes + o_row * (TILES * RUN) + o_word[None, :])
        else:
            b_words = tl.load(
                codes + o_row * (TILES * RUN) + o_word[None, :], mask=o_word[None, :] < TILES * RUN, other=0
            )
        # Of one tile, the words of a row share their groups.
        o_tile = tl.full([1, 1], step, tl.int32) if BW == RUN else tl.minimum(o_word // RUN, TILES - 1)[None, :]
        b_pairs = look_up(b_words, ASSEMBLY) if FORMAT == "nf4" and SCALES_SUMS else 0
        for i in tl.static_range(PLANES):
            if i == 0 or i * RUN % GROUP == 0:
                o_group = o_row * GROUPS + (o_tile * (PLANES * RUN) + i * RUN) // GROUP
                b_scale, b_zero = load_group(scales, nested_scales, nested_offset, dynamic, o_group, FORMAT)
                part = tl.zeros([BN, BM], tl.float32)
            o_k = o_word // RUN * (PLANES * RUN) + i * RUN + o_word % RUN
            b_x = tl.load(p_x + o_k[:, None], mask=o_k[:, None] < K, other=0.0)  # [BW, BM]
            if SCALES_SUMS:
                part = tl.dot(decode_16(b_words, b_zero, b_pairs, i, FORMAT, DTYPE), b_x, part)
                if i == PLANES - 1 or (i + 1) * RUN % GROUP == 0:
                    acc += part * b_scale
            else:
                b_w = decode(b_words, b_zero, b_table, i, FORMAT, BITS)
                b_w *= b_scale if FORMAT == "nf4" else b_scale * 2.0 ** -(i * BITS % 12)
                acc = tl.dot(b_w.to(DTYPE), b_x, acc, input_precision="ieee")
    if FORMAT == "int8":
        acc *= tl.load(scales + o_row)
    o_out = (tl.program_id(2).to(tl.int64) * M + o_m[None, :]) * N + o_n[:, None]
    tl.store(out + o_out, acc, mask=(o_m[None, :] < M) & (o_n[:, None] < N))


@triton.jit
def reduce_kernel(parts, bias, y, N, SIZE, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y [SIZE] = sum of parts fp32[SPLIT, SIZE], in order, + bias [N]."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < SIZE
    acc = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(SPLIT):
        acc += tl.load(parts + s * SIZE + o, mask=m, other=0.0)
    if bias is not None:
        acc += tl.load(bias + o % N, mask=m, other=0.0).to(tl.float32)
    tl.store(y + o, acc.to(y.dtype.element_ty), mask=m)


@triton.jit
def dequantize_kernel(
    codes, scales, nested_scales, nested_offset, dynamic, table, out,
    N, K, TILES: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    FORMAT: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """out [N, K] = W."""
    PLANES: tl.constexpr = 32 // BITS
    o_row = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)[:, None, None]
    o_tile = tl.program_id(1) * BT + tl.arange(0, BT)[None, :, None]
    o_run = tl.arange(0, RUN)[None, None, :]
    m_n = o_row < N
    o_row, o_here = tl.minimum(o_row, N - 1), tl.minimum(o_tile, TILES - 1)
    b_table = tl.load(table + tl.arange(0, 16)) if FORMAT == "nf4" else 0
    b_words = tl.load(codes + o_row * (TILES * RUN) + o_here * RUN + o_run)
    for i in tl.static_range(PLANES):
        o_group = o_row * GROUPS + (o_here * (PLANES * RUN) + i * RUN) // GROUP
        b_scale, b_zero = load_group(scales, nested_scales, nested_offset, dynamic, o_group, FORMAT)
        b_w = decode(b_words, b_zero, b_table, i, FORMAT, BITS)
        b_w *= b_scale if FORMAT == "nf4" else b_scale * 2.0 ** -(i * BITS % 12)
        if FORMAT == "int8":
            b_w *= tl.load(scales + o_row)
        o_k = o_tile * (PLANES * RUN) + i * RUN + o_run
        tl.store(out + o_row * K + o_k, b_w.to(out.dtype.element_ty), mask=m_n & (o_k < K))


# ---- host ----


def forward(x: Tensor, w: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N], by the method that suits the number of rows."""
    (M, K), N = x.shape, w.shape[0]
    if M > MAX_FUSED_ROWS or w.format == "fp8":
        return F.linear(x, dequantize(w, x.dtype), bias)
    y = x.new_empty(M, N)
    if M == 0 or N == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    shape, tensors = _layout(w), _tensors(w)
    if M == 1:
        # 32 threads, 4 words of every row for each: so x, loaded once for all BN rows, lies in the threads as words do.
        BN, BT = 8, 128 // shape["RUN"]
        is_whole = K == w.codes.shape[1] * 32 // NUM_BITS[w.format] and shape["TILES"] % BT == 0
        is_denormal = w.format == "int4" and x.dtype != torch.float32
        gemv_kernel[(triton.cdiv(N, BN),)](
            x, *tensors, bias, y, N, K, **shape, BN=BN, BT=BT, WHOLE=is_whole, DENORMAL=is_denormal, num_warps=1
        )
        return y
    # Rows for which there are registers beside the sums of wgmma and of mma, and without tensor cores.
    most = 16 if x.dtype == torch.float32 else 64 if device_class(x) == 90 else 32
    BN, BM, BW = 64, min(most, max(16, triton.next_power_of_2(M))), max(16, shape["RUN"])
    steps = triton.cdiv(shape["TILES"] * shape["RUN"], BW)
    grid = (triton.cdiv(N, BN), triton.cdiv(M, BM), split_k(triton.cdiv(N, BN) * triton.cdiv(M, BM), steps))
    parts = torch.empty(grid[2], M, N, dtype=torch.float32, device=x.device)
    blocks = dict(SPLIT=grid[2], BN=BN, BM=BM, BW=BW, **choose_decoding(x, w.format, BW == shape["RUN"]))
    matmul_kernel[grid](x, *tensors, parts, M, N, K, x.stride(0), **shape, **blocks, num_warps=4, num_stages=3)
    reduce_kernel[(triton.cdiv(M * N, 1024),)](parts, bias, y, N, M * N, SPLIT=grid[2], BLOCK=1024)
    return y


def choose_decoding(x: Tensor, format: str, shares_groups: bool) -> dict:
    """Say whether scales multiply sums, for 4 bits beside 16 where a row's words share groups; and how nf4 is read."""
    scales_sums = shares_groups and format != "int8" and x.dtype != torch.float32
    if format == "nf4" and device_class(x) == "hip":  # PTX
        scales_sums = False
    return dict(SCALES_SUMS=scales_sums, ASSEMBLY=LOOKUPS.get(x.dtype, "") if format == "nf4" else "")


def write_lookup(dtype: torch.dtype) -> str:
    """Write the PTX that looks up eight codes of nf4 in a table of 16 numbers of 16 bits, held in eight constants.

    prmt takes four bytes from eight by the lower three bits of a code; two of them look up a byte of four codes in
    either half of the table, a third takes the right half by the fourth bit.
    """
    values = np.array(NF4, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to bf16
    numbers = (values.astype(np.float16).view(np.uint16) if dtype == torch.float16 else rounded).tolist()
    low, high = (
        [int.from_bytes([number >> shift & 255 for number in numbers[i : i + 4]], "little") for i in range(0, 16, 4)]
        for shift in (0, 8)
    )
    lines = [
        ".reg .b32 code, half, a, b, c, d;",
        "and.b32 code, $4, 0x77777777;",
        "shr.b32 half, $4, 1;",
        "and.b32 half, half, 0x44444444;",
        "or.b32 half, half, 0x32103210;",
    ]
    for first in (0, 2):  # codes 0 to 3, then 4 to 7
        for left, right, table in (("a", "b", low), ("c", "d", high)):
            lines += [
                f"prmt.b32 {left}, {table[0]:#x}, {table[1]:#x}, code;",
                f"prmt.b32 {right}, {table[2]:#x}, {table[3]:#x}, code;",
                f"prmt.b32 {left}, {left}, {right}, half;",
            ]
        lines += [f"prmt.b32 ${first}, a, c, 0x5140;", f"prmt.b32 ${first + 1}, a, c, 0x7362;"]
        lines += ["shr.b32 code, code, 16;", "shr.b32 half, half, 16;"]
    return "{\n" + "\n".join(lines) + "\n}"


LOOKUPS = {dtype: write_lookup(dtype) for dtype in (torch.bfloat16, torch.float16)}


def split_k(programs: int, steps: int) -> int:
    """Return how many programs share K: until 264 in all, 2 per SM of a large GPU, with at least 4 steps each."""
    split = 1
    while programs * split < 264 and steps // (2 * split) >= 4:
        split *= 2
    return split


def dequantize(w: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Dequantise the weight, [N, K]."""
    if w.format == "fp8":
        return dequantize_ref(w).to(dtype)
    (N, K), shape = w.shape, _layout(w)
    out = torch.empty(N, K, dtype=dtype, device=w.codes.device)
    BN, BT = 8, max(1, 128 // shape["RUN"])
    grid = (triton.cdiv(N, BN), triton.cdiv(shape["TILES"], BT))
    if out.numel():
        # A product and a sum that are not fused give an nf4 absmax its published bits on a GPU too.
        options = dict(num_warps=4, enable_fp_fusion=False)
        dequantize_kernel[grid](*_tensors(w), out, N, K, **shape, BN=BN, BT=BT, **options)
    return out


def _layout(w: QuantizedWeight) -> dict:
    bits, num_words = NUM_BITS[w.format], w.codes.shape[1]
    run = run_length(num_words * 32 // bits, bits)
    group = num_words * 32 // bits if w.format == "int8" else w.group
    sizes = dict(TILES=num_words // run, RUN=run, GROUP=group, GROUPS=w.scales.shape[1])
    return sizes | dict(FORMAT=w.format, BITS=bits)


def _tensors(w: QuantizedWeight) -> tuple:
    table, dynamic = (w.tables or make_tables(w.codes.device)) if w.format == "nf4" else (None, None)
    return w.codes, w.scales, w.nested_scales, w.nested_offset, dynamic, table


# ---- operators, and their autograd ----


def fake_forward(x, codes, scales, nested_scales, nested_offset, table, dynamic, format, N, K, group, bias):
    return x.new_empty(len(x), N)


@operator("dequant_matmul", fake_forward)
def run_forward(
    x: Tensor, codes: Tensor, scales: Tensor, nested_scales: Tensor | None, nested_offset: Tensor | None,
    table: Tensor | None, dynamic: Tensor | None, format: str, N: int, K: int, group: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return forward(x, join(codes, scales, nested_scales, nested_offset, table, dynamic, format, N, K, group), bias)


def fake_dequantize(codes, scales, nested_scales, nested_offset, table, dynamic, format, N, K, group, dtype):
    return codes.new_empty(N, K, dtype=dtype)


@operator("dequantize", fake_dequantize)
def run_dequantize(
    codes: Tensor, scales: Tensor, nested_scales: Tensor | None, nested_offset: Tensor | None, table: Tensor | None,
    dynamic: Tensor | None, format: str, N: int, K: int, group: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return dequantize(join(codes, scales, nested_scales, nested_offset, table, dynamic, format, N, K, group), dtype)


def take_apart(w: QuantizedWeight) -> tuple:
    """What an operator can take: tensors, numbers and strings."""
    *tensors, dynamic, table = _tensors(w)
    return *tensors, table, dynamic, w.format, *w.shape, w.group


def join(codes, scales, nested_scales, nested_offset, table, dynamic, format, N, K, group) -> QuantizedWeight:
    tables = None if table is None else (table, dynamic)
    return QuantizedWeight(format, (N, K), group, codes, scales, nested_scales, nested_offset, tables)


def save(ctx, inputs, output):
    _x, *tensors, ctx.format, ctx.N, ctx.K, ctx.group, _bias = inputs
    ctx.save_for_backward(*tensors)


def differentiate(ctx, grad):
    dx = None
    if ctx.needs_input_grad[0]:
        dx = grad @ run_dequantize(*ctx.saved_tensors, ctx.format, ctx.N, ctx.K, ctx.group, grad.dtype)
    return dx, *[None] * 10, grad.sum(0) if ctx.needs_input_grad[11] else None


run_forward.register_autograd(differentiate, setup_context=save)


# ---- what a layer calls ----


def dequant_matmul(x: Tensor, w: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x fp32, fp16 or bf16 [..., K] -> [..., N] in its dtype; differentiable in x and bias.

    Under autocast x and bias are cast to its dtype, for any number of rows. A single row in bf16 must be below 2**47 in
    size beside int4, and is infinite above. Raises ValueError for x or bias of another
    width or dtype, and on the CPU where Triton does not interpret.
    """
    x, bias = (*autocast(x), None) if bias is None else autocast(x, bias)
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} columns, but the quantised weight {w.shape[1]}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x.dtype = {x.dtype} must be float32, float16 or bfloat16")
    if bias is not None and (bias.shape != w.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"bias {bias.dtype}{list(bias.shape)} must be {x.dtype}[{w.shape[0]}]")
    if not (x.is_cuda or is_interpreted()):
        raise ValueError(
            "x is on the CPU, where kernels run interpreted alone (TRITON_INTERPRET=1): see dequant_matmul_ref"
        )
    bias = None if bias is None else bias.contiguous()
    return run_forward(x.reshape(-1, x.shape[-1]), *take_apart(w), bias).view(*x.shape[:-1], w.shape[0])
