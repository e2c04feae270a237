"""Attention over a cache in blocks, out = softmax(scale * q k^T) v over the positions of its row that a query sees.

Keys and values of all rows lie in one pool of slots, cut into blocks. Each row has a table of its blocks:

```
position p of row b      slot table[b, p // BLOCK] * BLOCK + p % BLOCK
query t of row b         sees positions first[b, t] .. last[b, t], where first is 0 unless there is a window
```

It sees none where last is -1, and out is 0. A sink is one more score for each query head, of a value of 0; the softmax
over the first part counts it.

A program has BM pairs of a query of one row and a head of one group, so a key is read once for the whole group. The
few queries of a decode step give too few programs to fill a GPU: there the positions of a row are cut into parts of
equal size, each with a program of its own, which writes its softmax over that part (out in fp32 and lse in powers of 2)
for a second kernel to merge:

```
out = sum over parts of 2^(lse - m) out_part / sum of 2^(lse - m)      m the largest lse
```

Slots may hold codes of 8 or 4 bits (BITS) in place of numbers, each head of a slot with a scale and an offset:

```
x = code * scale + offset        of 4 bits channel h lies in the lower half of byte h, channel h + H / 2 in the upper
```

They become numbers of the dtype of q between memory and the tensor cores; without codes BITS is 0. Of 4 bits a byte is
read once, and gives the two parts of the head: A is its lower half, B its upper one.

How long a part is follows from the longest row that its own queries see, the number of queries and heads, and the GPU.
Neither the number of rows nor the width of the table has a say, so a row gets the same bits alone and among others.
Nothing is read on the host: what is launched depends on shapes alone, and a CUDA graph can replay it with longer rows.

Blocks that several rows share are read by each of them, and no kernel goes over a shared prefix first for all its rows
at once. Programs are ordered so that those at one part of all rows run side by side, and all but the first find the
shared slots in the L2 cache: a prefix of 4,096 tokens with 8 heads of 128 is 16 MB a layer, where an H100 has 50. What
would be saved is bandwidth of L2. It would cost a third kernel, a grouping of rows on the host that changes at every
step, so no graph, and results that depend on which rows run together.

Legend: B rows, T query tokens, N query heads, K key/value heads, G = N / K, H head size; BLOCK slots a block of the
cache; BM (token, head) pairs and BN positions a block of scores. In kernels: i_ program index, o_ offsets, m_ masks,
p_ pointers, b_ blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovlm.kernels.attention import (
    LOG2E,
    add_parts,
    check_inputs,
    check_sinks,
    choose_blocks,
    divide_strides,
    dot_parts,
    load_part,
    load_parts,
    split_head,
    store_parts,
    weigh,
    zero_parts,
)
from nanovlm.kernels.register import operator

# As in attention.py: (BM, BN, warps, stages) by class of GPU or "fp32", the first whose width is at least HA + HB.
# "few" is for up to 16 pairs of a token and a head of a group, as decoding has, "many" for more. Keys wait for the
# table, which has half of the stages. By benchmarks/kernels_static.py on Hopper, clocks for 1,000 pairs of a chunk of
# 512 tokens: 218 with 5 stages, 277 with 3; for 1,000 slots of one token: 52,300 with 5, 35,600 with 3. A loop that
# reads the table a step ahead, with 3 stages, took 292 where this one took 277, and 54,000 where it took 37,600.
BLOCKS = {
    "many": {
        90: {128: (64, 64, 4, 5), 256: (64, 32, 8, 2)},
        80: {128: (64, 32, 4, 5), 256: (64, 32, 8, 2)},
        "hip": {256: (64, 16, 4, 1)},
        "fp32": {64: (32, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
    },
    "few": {
        90: {128: (16, 64, 4, 3), 256: (16, 32, 4, 3)},
        80: {256: (16, 32, 4, 3)},
        "hip": {256: (16, 32, 4, 1)},
        "fp32": {128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
}
LEAST_PART = tl.constexpr(128)  # positions; a multiple of every BN


def attend_blocks_ref(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, last: Tensor, block_size=16, scale=None, first=None,
    sinks=None,
):  # fmt: skip
    """Specify `attend_blocks`: gather each row's slots up to its last, and attend. Any dtype."""
    S = int(last.max()) + 1 if last.numel() else 0
    p = torch.arange(S, device=q.device)
    visible = p <= last[..., None]  # [B, T, S]
    if first is not None:
        visible &= p >= first[..., None]
    is_read = visible.any(1)
    slots = torch.where(is_read, table[:, p // block_size].long() * block_size + p % block_size, 0)
    k, v = (x[slots].masked_fill(~is_read[..., None, None], 0) for x in (keys, values))
    q_BTKGH = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k) * (scale or q.shape[3] ** -0.5)
    visible = visible[:, None, None]
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, k.shape[2], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1)[..., :S].masked_fill(~visible, 0)
    return torch.einsum("bkgts,bskh->btkgh", weights, v).flatten(2, 3)


# --- kernels -------------------------------------------------------------------------------------------------


@triton.jit
def find_slots(p_table, o_s, m_s, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Find the slots of positions o_s [BN]; where m_s is False the table is not read, and nor must the slot be."""
    if MASKED:
        b_block = tl.load(p_table + o_s // BLOCK, mask=m_s, other=0)
    else:
        b_block = tl.load(p_table + o_s // BLOCK)
    return b_block.to(tl.int64) * BLOCK + o_s % BLOCK


@triton.jit
def load_heads(p_rows, m_rows, H: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr, BITS: tl.constexpr):
    """Load both parts of queries as those of keys come: of codes of 4 bits these are the halves of the head."""
    if BITS == 4:
        HALF: tl.constexpr = H // 2
        return load_part(p_rows, m_rows, 0, HA, HALF, True), load_part(p_rows + HALF, m_rows, 0, HA, HALF, True)
    else:
        return load_parts(p_rows, m_rows, H, HA, HB, True)


@triton.jit
def store_heads(p_rows, m_rows, b_a, b_b, H: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr, BITS: tl.constexpr):
    """Store both parts, which are as load_heads has them."""
    if BITS == 4:
        HALF: tl.constexpr = H // 2
        store_parts(p_rows, m_rows, b_a, b_a, HALF, HA, 0)
        store_parts(p_rows + HALF, m_rows, b_b, b_b, HALF, HA, 0)
    else:
        store_parts(p_rows, m_rows, b_a, b_b, H, HA, HB)


@triton.jit
def decode(b_codes, b_scale, b_offset, DTYPE: tl.constexpr):
    """Return what codes int32[BN, columns] stand for; in columns from H on it is finite, and 0 in masked rows."""
    b_numbers = (b_codes | 0x4B000000).to(tl.float32, bitcast=True) - 2.0**23  # cheaper than a conversion
    return (b_numbers * b_scale[:, None] + b_offset[:, None]).to(DTYPE)


@triton.jit
def load_slots(
    p, p_scales, p_table, o_s, m_s, stride, K, BLOCK: tl.constexpr, UNIT: tl.constexpr, H: tl.constexpr,
    HA: tl.constexpr, HB: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load both parts of the head at positions o_s as load_parts does, from codes those that they stand for."""
    b_slots = find_slots(p_table, o_s, m_s, BLOCK, MASKED)
    p_rows = p + b_slots * (stride * UNIT)
    if BITS == 0:
        return load_parts(p_rows, m_s, H, HA, HB, MASKED)
    else:
        p_scales += b_slots * (K * 2)
        if MASKED:
            b_scale, b_offset = tl.load(p_scales, mask=m_s, other=0.0), tl.load(p_scales + 1, mask=m_s, other=0.0)
        else:
            b_scale, b_offset = tl.load(p_scales), tl.load(p_scales + 1)
        b_scale, b_offset = b_scale.to(tl.float32), b_offset.to(tl.float32)
        if BITS == 8:
            b_a = decode(load_part(p_rows, m_s, 0, HA, H, MASKED).to(tl.int32), b_scale, b_offset, DTYPE)
            b_b = b_a
            if HB > 0:
                b_b = decode(load_part(p_rows, m_s, HA, HB, H, MASKED).to(tl.int32), b_scale, b_offset, DTYPE)
        else:
            b_bytes = load_part(p_rows, m_s, 0, HA, H // 2, MASKED).to(tl.int32)
            b_a, b_b = decode(b_bytes & 15, b_scale, b_offset, DTYPE), decode(b_bytes >> 4, b_scale, b_offset, DTYPE)
        return b_a, b_b


@triton.jit
def blocks_step(
    b_m, b_l, acc_a, acc_b, q_a, q_b, p_k, p_v, p_ks, p_vs, p_table, stride_k, stride_v, K, i_s, limit, o_first, o_last,
    scale_log2, BLOCK: tl.constexpr, UNIT: tl.constexpr, H: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr,
    BN: tl.constexpr, BITS: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the positions from i_s on, those before limit if MASKED."""
    o_s = i_s + tl.arange(0, BN)
    m_s = o_s < limit
    k_a, k_b = load_slots(p_k, p_ks, p_table, o_s, m_s, stride_k, K, BLOCK, UNIT, H, HA, HB, BITS, q_a.dtype, MASKED)
    b_s = dot_parts(q_a, q_b, k_a, k_b, HB)  # [BM, BN]
    if MASKED:
        m = o_s[None, :] <= o_last[:, None]
        if WINDOW:
            m = m & (o_s[None, :] >= o_first[:, None])
        b_s = tl.where(m, b_s, float("-inf"))
    m_new, b_p, shrink = weigh(b_m, b_s, scale_log2, MASKED)
    acc_a = acc_a * shrink[:, None]
    if HB > 0:
        acc_b = acc_b * shrink[:, None]
    v_a, v_b = load_slots(p_v, p_vs, p_table, o_s, m_s, stride_v, K, BLOCK, UNIT, H, HA, HB, BITS, q_a.dtype, MASKED)
    acc_a, acc_b = add_parts(acc_a, acc_b, b_p, v_a, v_b, HB)
    return m_new, b_l * shrink + tl.sum(b_p, 1), acc_a, acc_b


# Rows come and go: what is compiled for one number of them, and for one width of the table, serves all.
@triton.jit(
    do_not_specialize=["most_parts", "stride_table", "B"],
    do_not_specialize_on_alignment=["p_table", "p_first", "p_last"],
)
def blocks_kernel(
    p_q, p_k, p_v, p_ks, p_vs, p_table, p_first, p_last, p_sinks, p_out, p_lse, scale_log2, most_parts,
    stride_qb, stride_qt, stride_qn, stride_ks, stride_kn, stride_vs, stride_vn, stride_table, B, T, K,
    G: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, H: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr,
    BITS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Attend to one part of the positions with all heads of a group; lse in powers of 2, -inf where nothing is seen."""
    num_blocks = tl.cdiv(T * G, BM)
    i = tl.program_id(0)  # heads of a slot, which lie together, then rows that may share it: side by side
    i_k, i_b = (i % K).to(tl.int64), (i // K % B).to(tl.int64)
    i_block, i_part = num_blocks - 1 - i // K // B % num_blocks, i // K // B // num_blocks
    o_r = i_block * BM + tl.arange(0, BM)
    m_r = o_r < T * G
    o_t, o_n = (o_r // G).to(tl.int64), i_k * G + o_r % G
    o_last = tl.load(p_last + i_b * T + o_t, mask=m_r, other=-1).to(tl.int32)
    o_out = ((i_part.to(tl.int64) * B + i_b) * T + o_t) * K * G + o_n  # [part, B, T, N]
    first_seen, o_first = 0, o_last
    if WINDOW:
        o_first = tl.load(p_first + i_b * T + o_t, mask=m_r, other=2**31 - 1).to(tl.int32)
        first_seen = tl.min(o_first)
    num_seen = tl.max(o_last) + 1
    part_size = tl.maximum(tl.cdiv(tl.cdiv(num_seen - first_seen, most_parts), BN) * BN, LEAST_PART)
    lo = first_seen + i_part * part_size
    hi = tl.minimum(lo + part_size, num_seen)
    if (hi <= lo) & (i_part > 0):  # no query sees this part
        tl.store(p_lse + o_out, tl.full([BM], float("-inf"), tl.float32), mask=m_r)
        return
    p_q += (i_b * stride_qb + o_t * stride_qt + o_n * stride_qn) * UNIT
    q_a, q_b = load_heads(p_q, m_r, H, HA, HB, BITS)
    p_k += i_k * stride_kn * UNIT
    p_v += i_k * stride_vn * UNIT
    p_ks, p_vs = p_ks + i_k * 2, p_vs + i_k * 2
    p_table += i_b * stride_table
    b_m, b_l = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    if SINKS:
        if i_part == 0:
            b_m, b_l = tl.load(p_sinks + o_n, mask=m_r, other=0.0) * LOG2E, b_l + 1.0
    acc_a, acc_b = zero_parts(BM, HA, HB)
    all_see, skip = tl.minimum(hi, tl.min(tl.where(m_r, o_last, hi)) + 1), 0
    if WINDOW:
        skip = tl.cdiv(tl.minimum(tl.maximum(tl.max(tl.where(m_r, o_first, 0)) - lo, 0), hi - lo), BN)
    full = tl.maximum(all_see - lo - skip * BN, 0) // BN
    for j in range(skip, skip + full):
        b_m, b_l, acc_a, acc_b = blocks_step(
            b_m, b_l, acc_a, acc_b, q_a, q_b, p_k, p_v, p_ks, p_vs, p_table, stride_ks, stride_vs, K, lo + j * BN, hi,
            o_first, o_last, scale_log2, BLOCK, UNIT, H, HA, HB, BN, BITS, WINDOW, False,
        )  # fmt: skip
    for j in range(full, tl.cdiv(hi - lo, BN)):
        i_s = lo + j * BN
        if WINDOW:  # the blocks before the whole ones, then those behind
            i_s = lo + tl.where(j < skip + full, j - full, j) * BN
        b_m, b_l, acc_a, acc_b = blocks_step(
            b_m, b_l, acc_a, acc_b, q_a, q_b, p_k, p_v, p_ks, p_vs, p_table, stride_ks, stride_vs, K, i_s, hi, o_first,
            o_last, scale_log2, BLOCK, UNIT, H, HA, HB, BN, BITS, WINDOW, True,
        )  # fmt: skip
    b_l = tl.where(b_l == 0, 1.0, b_l)
    store_heads(p_out + o_out * H, m_r, acc_a / b_l[:, None], acc_b / b_l[:, None], H, HA, HB, BITS)
    tl.store(p_lse + o_out, b_m + tl.log2(b_l), mask=m_r)


@triton.jit(do_not_specialize=["num_parts", "num_rows"])
def merge_kernel(p_parts, p_lse, p_out, num_parts, num_rows, H: tl.constexpr, HP: tl.constexpr, BP: tl.constexpr):
    """Merge the parts of one query and head; those with lse -inf are not read."""
    i_r = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, HP)
    b_m, b_l, acc = float("-inf"), 0.0, tl.zeros([HP], tl.float32)
    for j in range(0, num_parts, BP):
        o_p = j + tl.arange(0, BP)
        o_rows = o_p.to(tl.int64) * num_rows + i_r
        b_lse = tl.load(p_lse + o_rows, mask=o_p < num_parts, other=float("-inf"))
        m = (b_lse > float("-inf"))[:, None] & (o_h < H)[None, :]
        b_x = tl.load(p_parts + o_rows[:, None] * H + o_h[None, :], mask=m, other=0.0)  # [BP, HP]
        m_new = tl.maximum(b_m, tl.max(b_lse))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        b_w, shrink = tl.exp2(b_lse - shift), tl.exp2(b_m - shift)
        acc = acc * shrink + tl.sum(b_w[:, None] * b_x, 0)
        b_m, b_l = m_new, b_l * shrink + tl.sum(b_w)
    tl.store(p_out + i_r * H + o_h, acc / tl.where(b_l == 0, 1.0, b_l), mask=o_h < H)


# --- host ----------------------------------------------------------------------------------------------------


def attend(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, last: Tensor, block_size: int, scale: float,
    first: Tensor | None, sinks: Tensor | None, key_scales: Tensor | None, value_scales: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return out [B, T, N, H]."""
    (B, T, N, H), K = q.shape, keys.shape[1]
    out = torch.empty(B, T, N, H, device=q.device, dtype=q.dtype)
    if not out.numel():
        return out
    BM, BN, options = choose_blocks(BLOCKS["many" if T * N // K > 16 else "few"], q)
    num_blocks = triton.cdiv(T * N // K, BM)
    most_parts, num_parts = count_parts(q, K, table.shape[1] * block_size, num_blocks)
    unit, strides = divide_strides(q, keys, values)
    lse = torch.empty(num_parts, B, T, N, device=q.device, dtype=torch.float32)
    parts = out if num_parts == 1 else torch.empty(num_parts, *out.shape, device=q.device, dtype=torch.float32)
    last, has = last.contiguous(), (first is not None, sinks is not None)
    bits, parts_of_head = 0 if key_scales is None else 8 * keys.shape[2] // H, split_head(H)
    if bits == 4:
        parts_of_head = (H, *[max(16, triton.next_power_of_2(H // 2))] * 2)
    first, sinks, key_scales, value_scales = (lse if x is None else x for x in (first, sinks, key_scales, value_scales))
    blocks_kernel[(K * B * num_blocks * num_parts,)](
        q, keys, values, key_scales, value_scales, table, first.contiguous(), last, sinks, parts, lse,
        scale * LOG2E.value, most_parts, *strides, table.stride(0), B, T, K, N // K, block_size, unit, *parts_of_head,
        bits, *has, BM, BN, **options,
    )  # fmt: skip
    if num_parts > 1:
        merge_kernel[(B * T * N,)](parts, lse, out, num_parts, B * T * N, H, triton.next_power_of_2(H), 32)
    return out


def count_parts(q: Tensor, K: int, num_positions: int, num_blocks: int) -> tuple[int, int]:
    """Return into how many parts a row may be cut, so that its programs are two waves on a GPU, and how many to launch:
    no more than are needed where all positions of the table are seen."""
    most = max(1, 2 * num_processors(q) // (num_blocks * K))
    return most, max(1, min(most, triton.cdiv(num_positions, LEAST_PART.value)))


def num_processors(q: Tensor) -> int:
    """Return the number of streaming multiprocessors; when interpreting, that of an H100."""
    return torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 132


# --- operator ------------------------------------------------------------------------------------------------


@operator("attend_blocks", lambda q, *args: q.new_empty(q.shape))
def run_blocks(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, last: Tensor, block_size: int, scale: float,
    first: Tensor | None, sinks: Tensor | None, key_scales: Tensor | None, value_scales: Tensor | None,
) -> Tensor:  # fmt: skip
    return attend(q, keys, values, table, last, block_size, scale, first, sinks, key_scales, value_scales)


# --- what a model calls --------------------------------------------------------------------------------------


def attend_blocks(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    last: Tensor,
    block_size: int = 16,
    scale: float | None = None,
    first: Tensor | None = None,
    sinks: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend from q [B, T, N, H] to a cache, keys and values [num_slots, K, H]; return [B, T, N, H]. No gradients: a
    backward pass raises RuntimeError.

    Position p of row b lies in slot table[b, p // block_size] * block_size + p % block_size, `table` being int32[B,
    num_blocks] and block_size a power of two; rows may share blocks. A query sees positions `first` int64[B, T], or 0,
    to `last` int64[B, T], which is -1 for none. Slots before a row's smallest `first` and beyond its largest `last`,
    and table entries of blocks that hold no other, are not read, whatever they hold; those between must be slots of the
    cache, which is not checked. Each key/value head serves N / K neighbouring query heads; `sinks` [N] are scores of
    one more key for each of these, whose value is 0. With `scales`, bf16[num_slots, K, 2] of the keys and of the
    values, these are codes uint8[num_slots, K, H], or of 4 bits [num_slots, K, H / 2]. `scale` is H**-0.5 unless given.
    What a row gets does not depend on the others. Under autocast q is cast to the dtype of the cache, which is never
    cast. Raises ValueError for shapes and dtypes that do not fit, and without a GPU.
    """
    q = q.to(values.dtype) if torch.is_autocast_enabled(q.device.type) and scales is None else q
    q, keys, values, table = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys, values, table))
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    check(q, keys, values, table, last, block_size, scale, scales)
    if first is not None and (first.shape != last.shape or first.dtype != last.dtype):
        raise ValueError(f"first is {first.dtype}{list(first.shape)}, but must be int64{list(last.shape)} as last is")
    return run_blocks(
        q, keys, values, table, last, block_size, scale, first, check_sinks(q, sinks), *(scales or (None, None))
    )


def check(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, last: Tensor, block_size: int, scale: float,
    scales: tuple[Tensor, Tensor] | None = None,
):  # fmt: skip
    """Raise ValueError for inputs that the kernels cannot compute."""
    check_inputs(q, *((keys, values) if scales is None else (q, q)), scale)
    fits = q.dim() == 4 and keys.dim() == 3 and keys.shape == values.shape
    if scales is None:
        fits = fits and q.shape[3] == keys.shape[2]
    else:
        fits = fits and keys.shape[2] * 2 in (q.shape[3], 2 * q.shape[3]) and keys.dtype == values.dtype == torch.uint8
        for x in scales:
            if x.shape != (*keys.shape[:2], 2) or x.dtype != torch.bfloat16 or not x.is_contiguous():
                raise ValueError(
                    f"scales are {x.dtype}{list(x.shape)}, but must be bf16[num_slots, K, 2], contiguous, for codes "
                    f"{keys.dtype}{list(keys.shape)}"
                )
    if not fits or keys.shape[1] == 0 or q.shape[2] % keys.shape[1]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, keys, values))
        raise ValueError(
            f"q, keys, values have shapes {shapes}, but must have [B, T, N, H] and twice [num_slots, K, H], K a "
            "divisor of N"
        )
    if table.dim() != 2 or len(table) != len(q) or table.dtype != torch.int32:
        raise ValueError(
            f"table is {table.dtype}{list(table.shape)}, but must be int32[B, num_blocks], with B = {len(q)} rows"
        )
    if last.shape != q.shape[:2] or last.dtype != torch.int64:
        raise ValueError(f"last is {last.dtype}{list(last.shape)}, but must be int64{list(q.shape[:2])}")
    if block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"block_size = {block_size} must be a power of two")
