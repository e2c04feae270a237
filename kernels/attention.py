"""Attention, out = softmax(scale * q k^T) v over the keys that a query sees: forward and backward.

The scores of a block of queries and a block of keys exist only on the chip (Dao 2023, arXiv 2307.08691). With
m the largest score of a query and l the sum of exp(score - m), kept up to date from block to block:

```
out = sum exp(score - m) v / l       lse = m + log l       both zero and -inf where a query sees nothing
p = exp(score - lse)   dv = p^T dout   ds = p * (dout v^T - delta)   dq = scale * ds k   dk = scale * ds^T q
```

with delta the sum of dout * out over the head. Saved for backward: q, k, v, out, lse. One pass over blocks of queries
makes dq, another over blocks of keys dk and dv, which adds up the query heads of a group itself: nothing is added in an
order that could change, so the same inputs give the same bits, and block sizes follow from head size, dtype and GPU.

A sink is one more score for each query head, of a key whose value is 0 (gpt-oss, arXiv 2508.10925): l begins with it,
and its gradient needs no pass of its own, dsink = -sum over queries of exp(sink - lse) * delta.

What a query sees is one of: all keys; causal, the last query sees the last key; or packed documents (`Runs`). Of a
block of queries the visible keys form at most two ranges, [lo_a, hi_a) and [lo_b, hi_b), which follow from its first
query: no other key is read, and only blocks at their ends take a mask. Within spans (SPANS) tokens see each other
in both directions; they only move the end of the second range. A window (WINDOW) moves the beginning of both: a query
sees the last `window` positions of its document up to its own. For keys in a cache see cache_attention.py.

On Hopper, forward, the copy engine (TMA) brings the blocks without a mask, as descriptors of keys and values say: one
thread asks for a block, where otherwise each computes the addresses of its own part. What it does not see is runs: it
would read the next document, and NaN times a weight of 0 is NaN. So blocks with a mask are read by pointers.

A head size that is no power of two is cut in two, A and B, where that takes fewer columns: 72 and 80 as 64 + 16, 96 as
64 + 32, but 100 is padded to 128.

Legend: B rows, T query tokens, S key tokens, N query heads, K key/value heads, G = N / K, H head size; BM queries
and BN keys a block. In kernels: i_ program index, o_ offsets, m_ masks, p_ pointers, d_ descriptors, b_ blocks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovlm.kernels.gpu import device_class
from nanovlm.kernels.register import autocast, is_interpreted, operator

LOG2E = tl.constexpr(1.4426950408889634)

# (BM, BN, warps, stages) by pass and by class of GPU (kernels/gpu.py), or "fp32": the first whose width is at least
# HA + HB. Fixed, not autotuned, so that a restarted run computes the same bits. Chosen by benchmarks/kernels_static.py
# among those that spill no register inside a loop; those of class 80 fit the 99 KB of consumer cards, and stand for
# class 120 too where that has none of its own.
BLOCKS = {
    "forward": {
        90: {64: (64, 64, 4, 4), 96: (64, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
        80: {32: (128, 32, 4, 3), 64: (128, 64, 4, 3), 96: (128, 32, 4, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
        120: {64: (128, 32, 4, 3), 96: (128, 32, 8, 3), 128: (64, 64, 4, 2), 256: (64, 32, 8, 2)},
        "hip": {128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
        "fp32": {64: (32, 32, 8, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    },
    "backward_q": {
        90: {96: (64, 64, 4, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
        80: {32: (64, 64, 4, 3), 64: (128, 64, 8, 3), 96: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)},
        120: {64: (128, 64, 8, 3), 96: (64, 32, 4, 3), 128: (64, 64, 4, 2), 256: (32, 32, 4, 2)},
        "hip": {128: (32, 32, 4, 1), 256: (32, 16, 4, 1)},
        "fp32": {64: (32, 32, 4, 2), 128: (32, 32, 8, 2), 256: (16, 16, 4, 2)},
    },
    "backward_kv": {
        90: {64: (64, 128, 8, 3), 128: (32, 64, 4, 3), 256: (32, 64, 8, 2)},
        80: {64: (64, 64, 4, 2), 96: (32, 128, 8, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 1)},
        "hip": {128: (32, 32, 4, 1), 256: (16, 32, 4, 1)},
        "fp32": {256: (16, 16, 4, 1)},
    },
}
# With spans or a window a program has more about each of its tokens, and fewer registers are left.
BLOCKS["forward, spans or window"] = BLOCKS["forward"] | {
    90: BLOCKS["forward"][90] | {256: (128, 32, 8, 2)},
    80: BLOCKS["forward"][80] | {128: (64, 32, 4, 2)},
    120: BLOCKS["forward"][120] | {128: (64, 32, 4, 2)},
}
BLOCKS["backward_kv, spans and window"] = BLOCKS["backward_kv"] | {
    80: BLOCKS["backward_kv"][80] | {128: (32, 64, 8, 2)}
}


class Runs(NamedTuple):
    """What tokens of packed rows see, int32[B, T] each: token t the keys of [first, shared) and of [own, t].

    - first, shared: where the prefix of the token's document begins and ends, if the token is on a branch; else both
      where the document begins
    - own: where the token's branch begins; its document, if it is on the prefix
    - until: the same for keys: key s is seen by the tokens of [s, until)

    Where tokens see each other in both directions, last is the last token of each one's span, which it sees, too, and
    since is the first, by which it is seen, too; both are the token itself outside of spans, and None without any.

    With a window other than 0 token t sees of these keys those with near[s] > near[t] - window, where near counts the
    tokens that a branch goes on from: t, less the branches before its own; `until` is the last of them all the same.
    """

    first: Tensor
    shared: Tensor
    own: Tensor
    until: Tensor
    last: Tensor | None = None
    since: Tensor | None = None
    near: Tensor | None = None
    window: int = 0


def find_runs(doc_ids: Tensor, branch_ids: Tensor, span_ids: Tensor | None = None, window: int = 0) -> Runs:
    """Find the runs in int32[B, T] each; a document is contiguous: prefix first, then branch after branch.

    Padding counts as one more document. Everything stays on the device. Tokens of a run with the same span above 0 are
    contiguous. A window of 0 is none.
    """
    T = doc_ids.shape[1]
    index = torch.arange(T, dtype=torch.int32, device=doc_ids.device).expand_as(doc_ids)
    new_doc, new_run = torch.ones_like(doc_ids, dtype=torch.bool), torch.ones_like(doc_ids, dtype=torch.bool)
    new_doc[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    new_run[:, 1:] = new_doc[:, 1:] | (branch_ids[:, 1:] != branch_ids[:, :-1])
    on_prefix = branch_ids == 0

    def begin(new):
        return torch.where(new, index, 0).cummax(1).values

    def end(new):
        is_last = torch.cat([new[:, 1:], torch.ones_like(new[:, :1])], dim=1)
        return torch.where(is_last, index + 1, T).flip(1).cummin(1).values.flip(1)

    first, own = begin(new_doc), begin(new_run)
    spans = [None, None]
    if span_ids is not None:
        new_span = new_run | (span_ids == 0)
        new_span[:, 1:] |= span_ids[:, 1:] != span_ids[:, :-1]
        spans = [end(new_span) - 1, begin(new_span)]
    prefix_end = torch.where(on_prefix, index + 1, 0).cummax(1).values.maximum(first)
    shared, run_end = torch.where(on_prefix, first, prefix_end), end(new_run)
    until = torch.where(on_prefix, end(new_doc), run_end)
    if not window:
        return Runs(first, shared, own, until, *spans)
    # A key near the end of a prefix is seen from every branch, in pieces: up to one on the last.
    last_branch = (own.gather(1, until.long() - 1) - run_end).clamp(min=0)
    until = until.minimum(index + window + torch.where(on_prefix & (index + window > run_end), last_branch, 0))
    return Runs(first, shared, own, until, *spans, index - own + torch.where(on_prefix, own, shared), window)


def attention_ref(q: Tensor, k: Tensor, v: Tensor, runs: Runs | None = None, causal=False, scale=None, sinks=None):
    """Specify `attention`, and, with `visible` spelt out, what the kernels compute; differentiable, any dtype."""
    T, S = q.shape[1], k.shape[1]
    t, s = torch.arange(T, device=q.device)[:, None], torch.arange(S, device=q.device)
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if causal:
        visible = s <= t + S - T
    if runs is not None:
        last = t if runs.last is None else runs.last[:, :, None]
        visible = (s <= last) & (t < runs.until[:, None])
        if runs.near is not None:
            visible = visible & (runs.near[:, None] > runs.near[:, :, None] - runs.window)
        visible = visible[:, None, None]
    q_BTKGH = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k) * (scale or q.shape[3] ** -0.5)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, k.shape[2], -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), -1)
    p = scores.softmax(-1)[..., :S].masked_fill(~visible, 0)
    return torch.einsum("bkgts,bskh->btkgh", p, v).flatten(2, 3), scores.logsumexp(-1).flatten(1, 2)


# --- forward kernels -----------------------------------------------------------------------------------------


# Strides come divided by UNIT: 8 where they allow it, so that the compiler sees that rows are aligned to 16 bytes.


@triton.jit
def point_to_rows(p, i_first, stride, ROWS: tl.constexpr, UNIT: tl.constexpr):
    return p + tl.cast(i_first, tl.int64) * (stride * UNIT) + tl.arange(0, ROWS).to(tl.int64) * (stride * UNIT)


@triton.jit
def load_part(p_rows, m_rows, BEGIN: tl.constexpr, SIZE: tl.constexpr, H: tl.constexpr, MASKED: tl.constexpr):
    """Load SIZE columns from BEGIN on; zeros in masked rows and in columns from H on."""
    o_h = BEGIN + tl.arange(0, SIZE)
    if BEGIN + SIZE > H:
        return tl.load(p_rows[:, None] + o_h[None, :], mask=m_rows[:, None] & (o_h[None, :] < H), other=0.0)
    elif MASKED:
        return tl.load(p_rows[:, None] + o_h[None, :], mask=m_rows[:, None], other=0.0)
    else:
        return tl.load(p_rows[:, None] + o_h[None, :])


@triton.jit
def load_parts(p_rows, m_rows, H: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr, MASKED: tl.constexpr):
    """Load both parts of the head, [rows, HA] and [rows, HB]; the first twice where there is no second."""
    b_a = load_part(p_rows, m_rows, 0, HA, H, MASKED)
    b_b = b_a
    if HB > 0:
        b_b = load_part(p_rows, m_rows, HA, HB, H, MASKED)
    return b_a, b_b


@triton.jit
def copy_parts(d_x, i_b, i_s, i_k, HA: tl.constexpr, HB: tl.constexpr, BN: tl.constexpr):
    """Load both parts as load_parts does, by their descriptors; those rows must exist. Columns from H on are zeros."""
    b_a = tl.reshape(d_x[0].load([i_b, i_s, i_k, 0]), [BN, HA])
    b_b = b_a
    if HB > 0:
        b_b = tl.reshape(d_x[1].load([i_b, i_s, i_k, HA]), [BN, HB])
    return b_a, b_b


@triton.jit
def store_parts(p_rows, m_rows, b_a, b_b, H: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr):
    o_h = tl.arange(0, HA)
    tl.store(p_rows[:, None] + o_h[None, :], b_a, mask=m_rows[:, None] & (o_h[None, :] < H))
    if HB > 0:
        o_h = HA + tl.arange(0, HB)
        tl.store(p_rows[:, None] + o_h[None, :], b_b, mask=m_rows[:, None] & (o_h[None, :] < H))


@triton.jit
def zero_parts(ROWS: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr):
    WIDTH_B: tl.constexpr = HB if HB > 0 else 16  # no second part: never touched
    return tl.zeros([ROWS, HA], tl.float32), tl.zeros([ROWS, WIDTH_B], tl.float32)


@triton.jit
def dot_parts(x_a, x_b, y_a, y_b, HB: tl.constexpr):
    """x y^T over both parts of the head."""
    b_s = tl.dot(x_a, tl.trans(y_a), input_precision="ieee")
    if HB > 0:
        b_s = tl.dot(x_b, tl.trans(y_b), b_s, input_precision="ieee")
    return b_s


@triton.jit
def add_parts(acc_a, acc_b, b_p, x_a, x_b, HB: tl.constexpr):
    """acc + p x, both parts of the head."""
    b_p = b_p.to(x_a.dtype)
    acc_a = tl.dot(b_p, x_a, acc_a, input_precision="ieee")
    if HB > 0:
        acc_b = tl.dot(b_p, x_b, acc_b, input_precision="ieee")
    return acc_a, acc_b


@triton.jit
def weigh(b_m, b_s, scale_log2, MASKED: tl.constexpr):
    """Return the new largest scores [BM], the weights of scores b_s [BM, BN], and by what those before shrink [BM]."""
    m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
    shift = m_new
    if MASKED:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    b_p = tl.exp2(b_s * scale_log2 - shift[:, None])  # [BM, BN]
    return m_new, b_p, tl.exp2(b_m - shift)


@triton.jit
def find_keys(
    i_t, T, S, W, p_first, p_shared, p_own, p_until, p_last, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
    SPANS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Find the two ranges of keys that the queries from i_t on see: where each begins and ends, how many blocks of it
    come before those that all of these queries see whole, and how many of these there are."""
    lo_a, hi_a, all_a, lo_b, hi_b, all_b, skip_a, skip_b = 0, 0, 0, 0, S, S, 0, 0
    if MASK == "runs":
        last = tl.minimum(i_t + BM, T) - 1
        lo_a, hi_a, lo_b = tl.load(p_first + i_t), tl.load(p_shared + i_t), tl.load(p_own + i_t)
        # The keys of a run are visible equally far: to all queries here, if one of them is to the last.
        end_a = tl.load(p_until + tl.maximum(hi_a - 1, lo_a))
        all_a = tl.where(end_a > last, hi_a, lo_a)
        hi_b, to_first = last + 1, i_t + 1
        if SPANS:
            hi_b, to_first = tl.load(p_last + last) + 1, tl.load(p_last + i_t) + 1
        all_b = tl.where(tl.load(p_until + i_t) > last, to_first, lo_b)
        if WINDOW:
            # Of the prefix a query that begins a branch sees the most, or, if none here does, the first.
            near, is_alone = i_t - lo_b + hi_a, tl.load(p_own + tl.minimum(last, end_a - 1)) == lo_b
            lo_a = tl.minimum(tl.maximum(tl.where(is_alone, near, hi_a) - W + 1, lo_a), hi_a)
            lo_b = tl.maximum(i_t - W + 1, lo_b)
            # A query is as many positions from a key as tokens, or fewer.
            skip_a = tl.cdiv(tl.minimum(tl.maximum(near + last - i_t - W + 1 - lo_a, 0), hi_a - lo_a), BN)
            skip_b = tl.cdiv(tl.maximum(last - W + 1 - lo_b, 0), BN)
    elif MASK == "causal":
        hi_b = tl.minimum(tl.maximum(i_t + BM + S - T, 0), S)
        all_b = tl.minimum(tl.maximum(i_t + 1 + S - T, 0), S)
    full_a = tl.maximum(all_a - lo_a - skip_a * BN, 0) // BN
    full_b = tl.maximum(all_b - lo_b - skip_b * BN, 0) // BN
    return lo_a, hi_a, skip_a, full_a, lo_b, hi_b, skip_b, full_b


@triton.jit
def find_rest(j, before, lo, skip, full, BN: tl.constexpr, WINDOW: tl.constexpr):
    """Find the beginning of block j - before of a range, not counting those that are seen whole, which a window has
    blocks before."""
    if WINDOW:
        j -= before
        return lo + tl.where(j < skip, j, j + full) * BN
    else:
        return lo + (full + j - before) * BN


@triton.jit
def sees(o_s, m_s, o_t, o_last, o_near, p_until, p_near, W, RUNS: tl.constexpr, WINDOW: tl.constexpr):
    """Say which queries see which keys, [BM, BN]; o_last [BM] is the last key of each query."""
    m = o_s[None, :] <= o_last[:, None]
    if RUNS:
        # Without a window a span is seen whole or not at all, and o_t takes no registers.
        o_query = o_t if WINDOW else o_last
        m = m & (o_query[:, None] < tl.load(p_until + o_s, mask=m_s, other=0)[None, :])
    if WINDOW:
        m = m & (o_near[:, None] < (tl.load(p_near + o_s, mask=m_s, other=0) + W)[None, :])
    return m


@triton.jit
def forward_step(
    b_m, b_l, acc_a, acc_b, q_a, q_b, p_k, p_v, stride_k, stride_v, i_s, limit, o_t, o_last, o_near, p_until, p_near, W,
    scale_log2,
    UNIT: tl.constexpr, H: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr = False, d_k=None, d_v=None, i_b=0, i_k=0,
):  # fmt: skip
    """Add the keys from i_s on, those before limit if MASKED; if TMA those of row i_b and head i_k, by descriptors."""
    o_s = i_s + tl.arange(0, BN)
    m_s = o_s < limit
    if TMA:  # both at once: so the compiler lets them share a barrier
        k_a, k_b = copy_parts(d_k, i_b, i_s, i_k, HA, HB, BN)
        v_a, v_b = copy_parts(d_v, i_b, i_s, i_k, HA, HB, BN)
    else:
        k_a, k_b = load_parts(point_to_rows(p_k, i_s, stride_k, BN, UNIT), m_s, H, HA, HB, MASKED)
    b_s = dot_parts(q_a, q_b, k_a, k_b, HB)  # [BM, BN]
    if MASKED:
        b_s = tl.where(sees(o_s, m_s, o_t, o_last, o_near, p_until, p_near, W, RUNS, WINDOW), b_s, float("-inf"))
    m_new, b_p, shrink = weigh(b_m, b_s, scale_log2, MASKED)
    acc_a = acc_a * shrink[:, None]
    if HB > 0:
        acc_b = acc_b * shrink[:, None]
    if not TMA:
        v_a, v_b = load_parts(point_to_rows(p_v, i_s, stride_v, BN, UNIT), m_s, H, HA, HB, MASKED)
    acc_a, acc_b = add_parts(acc_a, acc_b, b_p, v_a, v_b, HB)
    return m_new, b_l * shrink + tl.sum(b_p, 1), acc_a, acc_b


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_first, p_shared, p_own, p_until, p_last, p_near, p_sinks, d_ka, d_kb, d_va, d_vb,
    scale_log2, stride_qb, stride_qt, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn,
    T, S, N, G, W, UNIT: tl.constexpr, H: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr,
    MASK: tl.constexpr, SPANS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(T, BM)
    i = tl.program_id(0)
    i_t = (num_blocks - 1 - i % num_blocks) * BM  # those with the most keys first
    i_n, i_b = i // num_blocks % N, (i // num_blocks // N).to(tl.int64)
    i_n, i_k = i_n.to(tl.int64), (i_n // G).to(tl.int64)
    p_k += (i_b * stride_kb + i_k * stride_kn) * UNIT
    p_v += (i_b * stride_vb + i_k * stride_vn) * UNIT
    p_first, p_shared, p_own, p_until = p_first + i_b * T, p_shared + i_b * T, p_own + i_b * T, p_until + i_b * T
    p_last, p_near = p_last + i_b * T, p_near + i_b * T
    o_t = i_t + tl.arange(0, BM)
    o_last = o_t + S - T if MASK != "none" else tl.full([BM], S - 1, tl.int32)
    o_near = o_t
    if SPANS:
        o_last = tl.load(p_last + o_t, mask=o_t < T, other=T)
    if WINDOW:
        o_near = tl.load(p_near + o_t, mask=o_t < T, other=T)
    p_q += (i_b * stride_qb + i_n * stride_qn) * UNIT
    q_a, q_b = load_parts(point_to_rows(p_q, i_t, stride_qt, BM, UNIT), o_t < T, H, HA, HB, True)
    b_m, b_l = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    if SINKS:
        b_m, b_l = tl.zeros([BM], tl.float32) + tl.load(p_sinks + i_n) * LOG2E, b_l + 1.0
    acc_a, acc_b = zero_parts(BM, HA, HB)

    lo_a, hi_a, skip_a, full_a, lo_b, hi_b, skip_b, full_b = find_keys(
        i_t, T, S, W, p_first, p_shared, p_own, p_until, p_last, BM, BN, MASK, SPANS, WINDOW
    )
    rest_a, rest_b = tl.cdiv(hi_a - lo_a, BN) - full_a, tl.cdiv(hi_b - lo_b, BN) - full_b
    for j in range(full_a + full_b):
        i_s = tl.where(j < full_a, lo_a + (skip_a + j) * BN, lo_b + (skip_b + j - full_a) * BN)
        b_m, b_l, acc_a, acc_b = forward_step(
            b_m, b_l, acc_a, acc_b, q_a, q_b, p_k, p_v, stride_ks, stride_vs, i_s, S, o_t, o_last, o_near, p_until,
            p_near, W, scale_log2, UNIT, H, HA, HB, BN, MASK == "runs", WINDOW, False,
            TMA, (d_ka, d_kb), (d_va, d_vb), i_b.to(tl.int32), i_k.to(tl.int32),
        )  # fmt: skip
    for j in range(rest_a + rest_b):
        rest_of_b = find_rest(j, rest_a, lo_b, skip_b, full_b, BN, WINDOW)
        i_s = tl.where(j < rest_a, find_rest(j, 0, lo_a, skip_a, full_a, BN, WINDOW), rest_of_b)
        limit = tl.where(j < rest_a, hi_a, hi_b)
        b_m, b_l, acc_a, acc_b = forward_step(
            b_m, b_l, acc_a, acc_b, q_a, q_b, p_k, p_v, stride_ks, stride_vs, i_s, limit, o_t, o_last, o_near, p_until,
            p_near, W, scale_log2, UNIT, H, HA, HB, BN, MASK == "runs", WINDOW, True,
        )  # fmt: skip

    b_l = tl.where(b_l == 0, 1.0, b_l)
    p_out += ((i_b * T + o_t) * N + i_n) * H
    store_parts(p_out, o_t < T, acc_a / b_l[:, None], acc_b / b_l[:, None], H, HA, HB)
    tl.store(p_lse + (i_b * N + i_n) * T + o_t, (b_m + tl.log2(b_l)) / LOG2E, mask=o_t < T)


# --- host forward --------------------------------------------------------------------------------------------


def attend_forward(
    q: Tensor, k: Tensor, v: Tensor, runs: Runs | None, sinks: Tensor | None, causal: bool, scale: float
):
    """Return out [B, T, N, H] and lse fp32[B, N, T]."""
    B, T, N, H = q.shape
    out = torch.empty(B, T, N, H, device=q.device, dtype=q.dtype)
    lse = torch.empty(B, N, T, device=q.device, dtype=torch.float32)
    unit, strides = divide_strides(q, k, v)
    mask = name_mask(runs, causal)
    BM, BN, options = choose_blocks(BLOCKS["forward, spans or window" if any(mask[1:]) else "forward"], q)
    descriptors = describe_blocks(q, k, v, BN)
    if out.numel():
        forward_kernel[(triton.cdiv(T, BM) * N * B,)](
            q, k, v, out, lse, *point_to_runs(runs, lse), lse if sinks is None else sinks,
            *(descriptors or [None] * 4), scale * LOG2E.value, *strides, T, k.shape[1], N, N // k.shape[2],
            runs.window if runs else 0, unit, *split_head(H), *mask, sinks is not None, BM, BN, bool(descriptors),
            **options,
        )  # fmt: skip
    return out, lse


def check_inputs(q: Tensor, k: Tensor, v: Tensor, scale: float):
    """Raise ValueError for devices, dtypes, head sizes and scales that the kernels cannot compute."""
    if not (q.is_cuda or is_interpreted()):
        raise ValueError(f"attention = 'triton' needs a GPU, but its tensors are on the {q.device.type}: choose sdpa")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: give one of fp32, fp16 and bf16 for all"
        )
    if q.shape[-1] > 256:
        raise ValueError(f"head size {q.shape[-1]} is above 256, the largest that the kernels are made for")
    if scale <= 0:
        raise ValueError(f"scale = {scale} must be above 0")


def check(q: Tensor, k: Tensor, v: Tensor, scale: float):
    """Raise ValueError for inputs that the kernels cannot compute."""
    check_inputs(q, k, v, scale)
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[::3] == k.shape[::3]
    if not fits or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"q, k, v have shapes {shapes}, but must have [B, T, N, H] and twice [B, S, K, H], K a divisor of N"
        )


def check_sinks(q: Tensor, sinks: Tensor | None) -> Tensor | None:
    """Return the sinks in fp32; raise ValueError unless there is one for each head."""
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks of shape {list(sinks.shape)} must be one for each of the {q.shape[2]} query heads")
    return None if sinks is None else sinks.float().contiguous()


def split_head(H: int) -> tuple[int, int, int]:
    """Return H and the parts HA + HB of at least 16 that cover it with the fewest columns; HB is 0 for one part."""
    whole = max(16, triton.next_power_of_2(H))
    rest = max(16, triton.next_power_of_2(H - whole // 2))
    return (H, whole // 2, rest) if whole > 32 and whole // 2 + rest < whole else (H, whole, 0)


def choose_blocks(by_class: dict, q: Tensor) -> tuple[int, int, dict]:
    """Return BM, BN and the launch options by an entry of BLOCKS; when interpreting, those of an H100."""
    gpu = device_class(q)
    by_width = by_class.get("fp32" if q.dtype == torch.float32 and gpu != "hip" else gpu, by_class[80])
    width = sum(split_head(q.shape[3])[1:])
    BM, BN, num_warps, num_stages = next(blocks for most, blocks in by_width.items() if width <= most)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if gpu != "hip":
        # In fp32 the compiler would otherwise spill a few bytes to fit more programs at a time.
        options["maxnreg"] = 255 if q.dtype == torch.float32 else None
    return BM, BN, options


def name_mask(runs: Runs | None, causal: bool) -> tuple[str, bool, bool]:
    """Return MASK, SPANS and WINDOW."""
    if runs is None:
        return "causal" if causal else "none", False, False
    return "runs", runs.last is not None, runs.near is not None


FOR_QUERIES = ("first", "shared", "own", "until", "last", "near")


def point_to_runs(runs: Runs | None, otherwise: Tensor, fields: tuple[str, ...] = FOR_QUERIES) -> list[Tensor]:
    """Return fields of runs, by default those that queries need; another tensor in place of what is not there."""
    found = [None if runs is None else getattr(runs, field) for field in fields]
    return [otherwise if x is None else x for x in found]


def describe_blocks(q: Tensor, k: Tensor, v: Tensor, BN: int) -> list[TensorDescriptor | None]:
    """Return descriptors of BN rows of both parts of k and of v, the second None where there is none; [] for no TMA.

    Only Hopper has it; fp32 is not multiplied by its tensor cores, and heads above 128 would spill. It wants addresses
    aligned to 16 bytes, and strides of 0, as of heads that are expanded, are nothing that CUDA promises to take.
    """
    is_aligned = all(x.data_ptr() % 16 == 0 and not any(n % 8 or n == 0 for n in x.stride()[:3]) for x in (k, v))
    widths = split_head(k.shape[3])[1:]
    if device_class(q) != 90 or q.dtype == torch.float32 or sum(widths) > 128 or not k.numel() or not is_aligned:
        return []

    def describe(x, columns):
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, BN, 1, columns]) if columns else None

    return [describe(x, columns) for x in (k, v) for columns in widths]


def divide_strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """Return a unit of 8 or 1, and the strides of all dimensions but the last, in units."""
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return unit, [stride // unit for stride in strides]


# --- backward kernels ----------------------------------------------------------------------------------------


@triton.jit
def backward_q_step(
    dq_a, dq_b, q_a, q_b, g_a, g_b, b_lse, b_delta, p_k, p_v, stride_k, stride_v, i_s, limit, o_t, o_last, o_near,
    p_until, p_near, W, scale_log2,
    UNIT: tl.constexpr, H: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr, BN: tl.constexpr,
    RUNS: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the keys from i_s on give to dq; g is the gradient of out, b_lse in powers of 2."""
    o_s = i_s + tl.arange(0, BN)
    m_s = o_s < limit
    k_a, k_b = load_parts(point_to_rows(p_k, i_s, stride_k, BN, UNIT), m_s, H, HA, HB, MASKED)
    v_a, v_b = load_parts(point_to_rows(p_v, i_s, stride_v, BN, UNIT), m_s, H, HA, HB, MASKED)
    b_p = tl.exp2(dot_parts(q_a, q_b, k_a, k_b, HB) * scale_log2 - b_lse[:, None])  # [BM, BN]
    if MASKED:
        b_p = tl.where(sees(o_s, m_s, o_t, o_last, o_near, p_until, p_near, W, RUNS, WINDOW), b_p, 0.0)
    b_ds = b_p * (dot_parts(g_a, g_b, v_a, v_b, HB) - b_delta[:, None])
    return add_parts(dq_a, dq_b, b_ds, k_a, k_b, HB)


@triton.jit
def backward_q_kernel(
    p_q, p_k, p_v, p_out, p_grad, p_lse, p_first, p_shared, p_own, p_until, p_last, p_near, p_delta, p_dq,
    scale, scale_log2, stride_qb, stride_qt, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs,
    stride_vn, T, S, N, G, W, UNIT: tl.constexpr, H: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr,
    MASK: tl.constexpr, SPANS: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(T, BM)
    i = tl.program_id(0)
    i_t = (num_blocks - 1 - i % num_blocks) * BM
    i_n, i_b = i // num_blocks % N, (i // num_blocks // N).to(tl.int64)
    i_n, i_k = i_n.to(tl.int64), (i_n // G).to(tl.int64)
    p_k += (i_b * stride_kb + i_k * stride_kn) * UNIT
    p_v += (i_b * stride_vb + i_k * stride_vn) * UNIT
    p_first, p_shared, p_own, p_until = p_first + i_b * T, p_shared + i_b * T, p_own + i_b * T, p_until + i_b * T
    p_last, p_near = p_last + i_b * T, p_near + i_b * T
    o_t = i_t + tl.arange(0, BM)
    m_t = o_t < T
    o_last = o_t + S - T if MASK != "none" else tl.full([BM], S - 1, tl.int32)
    o_near = o_t
    if SPANS:
        o_last = tl.load(p_last + o_t, mask=m_t, other=T)
    if WINDOW:
        o_near = tl.load(p_near + o_t, mask=m_t, other=T)
    o_out = ((i_b * T + o_t) * N + i_n) * H
    p_q += (i_b * stride_qb + i_n * stride_qn) * UNIT
    q_a, q_b = load_parts(point_to_rows(p_q, i_t, stride_qt, BM, UNIT), m_t, H, HA, HB, True)
    g_a, g_b = load_parts(p_grad + o_out, m_t, H, HA, HB, True)
    out_a, out_b = load_parts(p_out + o_out, m_t, H, HA, HB, True)
    b_delta = tl.sum(g_a.to(tl.float32) * out_a.to(tl.float32), 1)
    if HB > 0:
        b_delta += tl.sum(g_b.to(tl.float32) * out_b.to(tl.float32), 1)
    o_stat = (i_b * N + i_n) * T + o_t
    tl.store(p_delta + o_stat, b_delta, mask=m_t)
    b_lse = tl.load(p_lse + o_stat, mask=m_t, other=float("inf")) * LOG2E
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)  # a query that sees no key: p = 0
    dq_a, dq_b = zero_parts(BM, HA, HB)

    lo_a, hi_a, skip_a, full_a, lo_b, hi_b, skip_b, full_b = find_keys(
        i_t, T, S, W, p_first, p_shared, p_own, p_until, p_last, BM, BN, MASK, SPANS, WINDOW
    )
    rest_a, rest_b = tl.cdiv(hi_a - lo_a, BN) - full_a, tl.cdiv(hi_b - lo_b, BN) - full_b
    for j in range(full_a + full_b):
        i_s = tl.where(j < full_a, lo_a + (skip_a + j) * BN, lo_b + (skip_b + j - full_a) * BN)
        dq_a, dq_b = backward_q_step(
            dq_a, dq_b, q_a, q_b, g_a, g_b, b_lse, b_delta, p_k, p_v, stride_ks, stride_vs, i_s, S, o_t, o_last, o_near,
            p_until, p_near, W, scale_log2, UNIT, H, HA, HB, BN, MASK == "runs", WINDOW, False,
        )  # fmt: skip
    for j in range(rest_a + rest_b):
        rest_of_b = find_rest(j, rest_a, lo_b, skip_b, full_b, BN, WINDOW)
        i_s = tl.where(j < rest_a, find_rest(j, 0, lo_a, skip_a, full_a, BN, WINDOW), rest_of_b)
        limit = tl.where(j < rest_a, hi_a, hi_b)
        dq_a, dq_b = backward_q_step(
            dq_a, dq_b, q_a, q_b, g_a, g_b, b_lse, b_delta, p_k, p_v, stride_ks, stride_vs, i_s, limit, o_t, o_last,
            o_near, p_until, p_near, W, scale_log2, UNIT, H, HA, HB, BN, MASK == "runs", WINDOW, True,
        )  # fmt: skip
    store_parts(p_dq + o_out, m_t, dq_a * scale, dq_b * scale, H, HA, HB)


@triton.jit
def backward_kv_step(
    dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, p_q, p_grad, p_lse, p_delta, stride_q, stride_g, i_t, limit, offset,
    o_s, b_until, b_far, p_near, scale_log2,
    UNIT: tl.constexpr, H: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr,
    MASK: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what the queries from i_t on give to dk and dv, those before limit if MASKED."""
    o_t = i_t + tl.arange(0, BM)
    m_t = o_t < limit
    q_a, q_b = load_parts(point_to_rows(p_q, i_t, stride_q, BM, UNIT), m_t, H, HA, HB, MASKED)
    g_a, g_b = load_parts(point_to_rows(p_grad, i_t, stride_g, BM, 1), m_t, H, HA, HB, MASKED)
    if MASKED:
        b_lse = tl.load(p_lse + o_t, mask=m_t, other=float("inf")) * LOG2E
        b_delta = tl.load(p_delta + o_t, mask=m_t, other=0.0)
    else:
        b_lse, b_delta = tl.load(p_lse + o_t) * LOG2E, tl.load(p_delta + o_t)
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    b_p = tl.exp2(dot_parts(k_a, k_b, q_a, q_b, HB) * scale_log2 - b_lse[None, :])  # [BN, BM]
    if MASKED and MASK != "none":
        m = o_s[:, None] <= (o_t + offset)[None, :]
        if MASK == "runs":
            m = m & (o_t[None, :] < b_until[:, None])
        if WINDOW:
            m = m & (tl.load(p_near + o_t, mask=m_t, other=0)[None, :] < b_far[:, None])
        b_p = tl.where(m, b_p, 0.0)
    dv_a, dv_b = add_parts(dv_a, dv_b, b_p, g_a, g_b, HB)
    b_ds = b_p * (dot_parts(v_a, v_b, g_a, g_b, HB) - b_delta[None, :])
    dk_a, dk_b = add_parts(dk_a, dk_b, b_ds, q_a, q_b, HB)
    return dk_a, dk_b, dv_a, dv_b


@triton.jit
def backward_kv_kernel(
    p_q, p_k, p_v, p_grad, p_lse, p_delta, p_until, p_since, p_near, p_dk, p_dv, scale, scale_log2,
    stride_qb, stride_qt, stride_qn, stride_kb, stride_ks, stride_kn, stride_vb, stride_vs, stride_vn, T, S, K, G, W,
    UNIT: tl.constexpr, H: tl.constexpr, HA: tl.constexpr, HB: tl.constexpr,
    MASK: tl.constexpr, SPANS: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    num_blocks = tl.cdiv(S, BN)
    i = tl.program_id(0)
    i_s = i % num_blocks * BN
    i_k, i_b = (i // num_blocks % K).to(tl.int64), (i // num_blocks // K).to(tl.int64)
    o_s = i_s + tl.arange(0, BN)
    m_s = o_s < S
    p_k += (i_b * stride_kb + i_k * stride_kn) * UNIT
    p_v += (i_b * stride_vb + i_k * stride_vn) * UNIT
    k_a, k_b = load_parts(point_to_rows(p_k, i_s, stride_ks, BN, UNIT), m_s, H, HA, HB, True)
    v_a, v_b = load_parts(point_to_rows(p_v, i_s, stride_vs, BN, UNIT), m_s, H, HA, HB, True)
    dk_a, dk_b = zero_parts(BN, HA, HB)
    dv_a, dv_b = zero_parts(BN, HA, HB)

    # Queries from lo to hi see keys of this block, and those from lo_all to hi_all see all of them.
    lo, lo_all, hi, hi_all = 0, 0, T, T
    b_until, o_since, b_far = o_s, o_s, o_s
    if MASK == "causal":
        lo, lo_all = tl.maximum(i_s - S + T, 0), tl.maximum(tl.minimum(i_s + BN, S) - 1 - S + T, 0)
    if MASK == "runs":
        b_until = tl.load(p_until + i_b * T + o_s, mask=m_s, other=0)
        lo, lo_all = i_s, tl.minimum(i_s + BN, S) - 1
        if SPANS:
            lo, lo_all = tl.load(p_since + i_b * T + lo), tl.load(p_since + i_b * T + lo_all)
            o_since = tl.load(p_since + i_b * T + o_s, mask=m_s, other=T)
        hi, hi_all = tl.max(b_until), tl.min(tl.where(m_s, b_until, S))
        if WINDOW:
            p_near += i_b * T
            b_far = tl.load(p_near + o_s, mask=m_s, other=0) + W
            hi_all = tl.minimum(hi_all, i_s + W)  # no query is more positions from a key than tokens
    num = tl.cdiv(tl.maximum(hi - lo, 0), BM)
    num_before = tl.minimum(tl.cdiv(lo_all - lo, BM), num)
    num_full = tl.maximum(hi_all - lo - num_before * BM, 0) // BM
    for i_g in range(G):
        i_n = i_k * G + i_g
        p_qn, p_gn = p_q + (i_b * stride_qb + i_n * stride_qn) * UNIT, p_grad + (i_b * T * K * G + i_n) * H
        p_lse_n, p_delta_n = p_lse + (i_b * K * G + i_n) * T, p_delta + (i_b * K * G + i_n) * T
        if SPANS and (WINDOW or H > 128):  # the bounds of two loops would leave too few registers
            for i_t in range(lo, hi, BM):
                dk_a, dk_b, dv_a, dv_b = backward_kv_step(
                    dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, p_qn, p_gn, p_lse_n, p_delta_n, stride_qt, K * G * H,
                    i_t, hi, S - T, o_since, b_until, b_far,
                    p_near, scale_log2, UNIT, H, HA, HB, BM, MASK, WINDOW, True,
                )  # fmt: skip
        else:
            for j in range(num_full):
                dk_a, dk_b, dv_a, dv_b = backward_kv_step(
                    dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, p_qn, p_gn, p_lse_n, p_delta_n, stride_qt, K * G * H,
                    lo + (num_before + j) * BM, hi, S - T, o_since, b_until, b_far,
                    p_near, scale_log2, UNIT, H, HA, HB, BM, MASK, WINDOW, False,
                )  # fmt: skip
            for j in range(num - num_full):
                i_t = lo + tl.where(j < num_before, j, j + num_full) * BM
                dk_a, dk_b, dv_a, dv_b = backward_kv_step(
                    dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, p_qn, p_gn, p_lse_n, p_delta_n, stride_qt, K * G * H,
                    i_t, hi, S - T, o_since, b_until, b_far,
                    p_near, scale_log2, UNIT, H, HA, HB, BM, MASK, WINDOW, True,
                )  # fmt: skip
    o_out = ((i_b * S + o_s) * K + i_k) * H
    store_parts(p_dk + o_out, m_s, dk_a * scale, dk_b * scale, H, HA, HB)
    store_parts(p_dv + o_out, m_s, dv_a, dv_b, H, HA, HB)


# --- host backward -------------------------------------------------------------------------------------------


def attend_backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, runs, causal, scale):
    """Return dq, dk, dv and delta fp32[B, N, T], given the gradient of out."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    grad, delta = grad.contiguous(), torch.empty_like(lse)
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    mask, scales, window = name_mask(runs, causal), (scale, scale * LOG2E.value), runs.window if runs else 0
    unit, strides = divide_strides(q, k, v)
    BM, BN, options = choose_blocks(BLOCKS["backward_q"], q)
    if dq.numel():
        backward_q_kernel[(triton.cdiv(T, BM) * N * B,)](
            q, k, v, out, grad, lse, *point_to_runs(runs, lse), delta, dq, *scales, *strides, T, S, N, N // K,
            window, unit, *split_head(H), *mask, BM, BN, **options,
        )  # fmt: skip
    BM, BN, options = choose_blocks(BLOCKS["backward_kv, spans and window" if all(mask[1:]) else "backward_kv"], q)
    if dk.numel():
        backward_kv_kernel[(triton.cdiv(S, BN) * K * B,)](
            q, k, v, grad, lse, delta, *point_to_runs(runs, lse, ("until", "since", "near")),
            dk, dv, *scales, *strides, T, S, K, N // K, window, unit, *split_head(H), *mask, BM, BN, **options,
        )  # fmt: skip
    return dq, dk, dv, delta


# --- operators, and their autograd ---------------------------------------------------------------------------


def fake_forward(q, *args):
    B, T, N, _H = q.shape
    return q.new_empty(q.shape), q.new_empty(B, N, T, dtype=torch.float32)


@operator("attention", fake_forward)
def run_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    first: Tensor | None, shared: Tensor | None, own: Tensor | None, until: Tensor | None,
    last: Tensor | None, since: Tensor | None, near: Tensor | None, window: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return attend_forward(
        q, k, v, join_runs(first, shared, own, until, last, since, near, window), sinks, causal, scale
    )


def fake_backward(q, k, v, out, lse, *args):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, lse))


@operator("attention_backward", fake_backward)
def run_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
    first: Tensor | None, shared: Tensor | None, own: Tensor | None, until: Tensor | None,
    last: Tensor | None, since: Tensor | None, near: Tensor | None, window: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    runs = join_runs(first, shared, own, until, last, since, near, window)
    return attend_backward(q, k, v, out, lse, grad, runs, causal, scale)


def join_runs(first, shared, own, until, last, since, near, window) -> Runs | None:
    return None if first is None else Runs(first, shared, own, until, last, since, near, window)


def save(ctx, inputs, output):
    q, k, v, sinks, *runs, window, causal, scale = inputs
    ctx.save_for_backward(q, k, v, sinks, *output, *runs)
    ctx.options = window, causal, scale
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@once_differentiable
def differentiate(ctx, grad, _grad_lse):
    q, k, v, sinks, out, lse, *runs = ctx.saved_tensors
    *gradients, delta = run_backward(q, k, v, out, lse, grad, *runs, *ctx.options)
    dsinks = None if sinks is None else -((sinks[:, None] - lse).exp() * delta).sum((0, 2))
    return *gradients, dsinks, *[None] * 10


run_forward.register_autograd(differentiate, setup_context=save)


# --- what a model calls --------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Runs | None = None,
    causal: bool = False,
    scale: float | None = None,
    sinks: Tensor | None = None,
):
    """Attend from q [B, T, N, H] to k and v [B, S, K, H]; return out [B, T, N, H] and lse fp32[B, N, T].

    Each key/value head serves N / K neighbouring query heads. `runs` (see find_runs) is for packed rows, where T = S;
    without it all keys are visible, or with `causal` those up to the query, the last of which sees the last key. A
    query that sees nothing has out 0 and lse -inf. `sinks` [N] are scores of one more key for each query head, whose
    value is 0; they count in lse. `scale` is H**-0.5 unless given. Gradients flow from out, not from lse. Under
    autocast q, k and v are cast to its dtype; else they must have one. Raises ValueError for shapes and dtypes that do
    not fit, and without a GPU.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in autocast(q, k, v))
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    check(q, k, v, scale)
    sinks = check_sinks(q, sinks)
    if runs is not None and (causal or runs.until.shape != q.shape[:2] or q.shape[1] != k.shape[1]):
        raise ValueError(
            f"runs of shape {list(runs.until.shape)} need as many queries and as many keys, got {q.shape[1]} and "
            f"{k.shape[1]}, and are causal themselves, got causal = {causal}"
        )
    *parts, window = runs or [*[None] * 7, 0]
    parts = [None if x is None else x.contiguous() for x in parts]
    return run_forward(q, k, v, sinks, *parts, window, causal, scale)
