"""Attention within documents: the masks and the backends.

Legend of shapes: B rows, T query tokens, S key tokens, N query heads, K key/value heads, H head size.
A backend is `attend(q: [B, T, N, H], k: [B, S, K, H], v: [B, S, K, H], mask) -> [B, T, N, H]` in the dtype of v; each
key/value head serves N / K neighbouring query heads. A mask is made once per forward pass and passed to every block:
None (all keys are visible), or the result of `make_mask`, in the backend's own form. Over a cache: cache_attention.py.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention

from nanovlm.errors import UserError


class Window(NamedTuple):
    """A sliding window: a query sees no key before the last `size` positions, of which its own is one."""

    size: int
    position_ids: Tensor  # int64[B, T]


def make_mask(
    doc_ids: Tensor,
    branch_ids: Tensor,
    backend: str = "sdpa",
    span_ids: Tensor | None = None,
    window: Window | None = None,
):
    """Return which keys a query sees: those up to its own position in its document's prefix and its own branch.

    And with `span_ids` those of its own span, if that is not 0; a span is on the prefix or on one branch. Of all these
    only those that its window leaves, if there is one. Takes int32[B, T] each, returns bool[B, 1, T, T] or the
    backend's form. Padding (doc_id -1) sees only padding, so no row of the mask is empty; its outputs are never used.
    """
    more = [span_ids, window] if window is not None else [] if span_ids is None else [span_ids]
    return MASKS.get(backend, make_dense_mask)(doc_ids, branch_ids, *more)


# --- sdpa: bool[B, 1, T, S], or on a CPU the documents of the batch --------------------------------------------

# What the calls for one document cost, in pairs of tokens under a mask, for each thread, as a short document keeps one
# busy. Measured 1,200 to 4,200 (AMD EPYC with AVX512, with AVX2 and without, one thread, torch 2.13, fp32, 2026-11-29),
# and 7,000 on an older one; rather more than in the mean, so that few are slower for it.
CALL = 6_000
KEYS = 512  # without a mask torch skips keys that no query sees, in blocks of so many
# So many queries attend in bf16 on a CPU where values are bf16, fewer in fp32. With AVX512_BF16 bf16 took 1.9 of the
# time of fp32, forward and backward, at 128 tokens, 1.1 at 256, 0.87 at 512, and 0.72 from 1,024 on (AMD EPYC, torch
# 2.13, heads of 64, 2026-11-29).
BF16_LENGTH = 512


class Place(NamedTuple):
    """Where a document is in a batch."""

    row: int
    start: int
    end: int
    has_branches: bool  # or spans, or more tokens than a window: it needs a mask

    def cost(self) -> float:
        """Return the time of attention over the document, in pairs of tokens under a mask."""
        length = self.end - self.start
        pairs = length * (length if self.has_branches else min(length, (length + KEYS) / 2))
        return CALL * torch.get_num_threads() + pairs


# A document, and what is added to its scores: None, where each token sees those before it.
Piece = tuple[Place, Tensor | None]


def make_sdpa_mask(
    doc_ids: Tensor, branch_ids: Tensor, span_ids: Tensor | None = None, window: Window | None = None
) -> Tensor | list[Piece]:
    """Return the documents, or a mask where it takes less time or there are none."""
    B, T = doc_ids.shape
    if doc_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        places = find_documents(doc_ids, branch_ids if span_ids is None else branch_ids.maximum(span_ids))
        if window is not None:
            places = [x._replace(has_branches=x.has_branches or x.end - x.start > window.size) for x in places]
        if places and sum(place.cost() for place in places) < B * T * T:
            return add_masks(places, branch_ids, span_ids, window)
    return make_dense_mask(doc_ids, branch_ids, span_ids, window)


def find_documents(doc_ids: Tensor, branch_ids: Tensor) -> list[Place]:
    """Return where the documents are, without padding; nothing where one is in several places."""
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    starts, ids, T = begins.nonzero().tolist(), doc_ids[begins].tolist(), doc_ids.shape[1]
    ends = [start or T for _row, start in starts[1:]] + [T] * bool(starts)
    branched = set(doc_ids[branch_ids > 0].tolist())
    places = {
        number: Place(row, start, end, number in branched)
        for (row, start), end, number in zip(starts, ends, ids, strict=True)
        if number >= 0
    }
    return list(places.values()) if len(places) == sum(number >= 0 for number in ids) else []


def add_masks(
    places: list[Place], branch_ids: Tensor, span_ids: Tensor | None = None, window: Window | None = None
) -> list[Piece]:
    """Give each document with branches its mask, float32[1, 1, L, L]: 0 where a query sees a key, else -inf."""
    pieces = []
    for place in places:
        mask = None
        if place.has_branches:
            here = slice(place.row, place.row + 1), slice(place.start, place.end)
            branches, spans = branch_ids[here], None if span_ids is None else span_ids[here]
            near = None if window is None else window._replace(position_ids=window.position_ids[here])
            visible = make_dense_mask(torch.zeros_like(branches), branches, spans, near)
            mask = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
        pieces.append((place, mask))
    return pieces


def make_dense_mask(
    doc_ids: Tensor, branch_ids: Tensor, span_ids: Tensor | None = None, window: Window | None = None
) -> Tensor:
    T = doc_ids.shape[1]
    same_document = doc_ids[:, :, None] == doc_ids[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=doc_ids.device).tril()
    if span_ids is not None:
        causal = causal | ((span_ids[:, :, None] == span_ids[:, None, :]) & (span_ids[:, :, None] > 0))
    if window is not None:
        causal = causal & (window.position_ids[:, None, :] > window.position_ids[:, :, None] - window.size)
    key_branch = branch_ids[:, None, :]
    visible_branch = (key_branch == 0) | (key_branch == branch_ids[:, :, None])
    return (same_document & causal & visible_branch)[:, None]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | list[Piece] | None) -> Tensor:
    """torch's scaled_dot_product_attention, which groups heads without copying keys."""
    if isinstance(mask, list):
        return attend_documents(q, k, v, mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped, dtype = q.shape[1] != k.shape[1], v.dtype
    if q.device.type == "cpu":
        # Under a mask of whole rows always fp32: what a document gets does not depend on those beside it.
        precision = choose_precision(q.shape[2], dtype) if mask is None else torch.float32
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.to(precision), k.to(precision), v.to(precision)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    else:
        out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2).to(dtype)


def choose_precision(length: int, dtype: torch.dtype) -> torch.dtype:
    """Return the precision in which so many queries attend on a CPU to values of this dtype."""
    return torch.bfloat16 if dtype == torch.bfloat16 and length >= BF16_LENGTH else torch.float32


@torch.compiler.disable()
def attend_documents(q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece]) -> Tensor:
    """Attend within each document alone, in fp32, or in bf16 where it is long; the output is 0 for padding."""
    with torch.autocast("cpu", enabled=False):
        return AttendDocuments.apply(q, k, v, pieces)


class AttendDocuments(torch.autograd.Function):
    """What scaled_dot_product_attention runs on a CPU, on views of the documents: nothing is padded."""

    @staticmethod
    def forward(ctx, q, k, v, pieces):
        out, outs, logsumexps = q.new_zeros(q.shape, dtype=v.dtype), [], []
        for place, mask in pieces:
            found, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(_cut(x, place, v.dtype) for x in (q, k, v)), 0.0, mask is None, attn_mask=mask
            )
            _view(out, place).copy_(found)
            outs.append(found)
            logsumexps.append(logsumexp)
        ctx.save_for_backward(q, k, v, *outs, *logsumexps)
        ctx.pieces = pieces
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, *saved = ctx.saved_tensors
        grad_out, num = grad_out.contiguous(), len(ctx.pieces)
        gradients = [torch.zeros_like(x) for x in (q, k, v)]
        for (place, mask), out, logsumexp in zip(ctx.pieces, saved[:num], saved[num:], strict=True):
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(_cut(x, place, v.dtype) for x in (grad_out, q, k, v)),
                *(out, logsumexp, 0.0, mask is None),
                attn_mask=mask,
            )
            for gradient, part in zip(gradients, found, strict=True):
                _view(gradient, place).copy_(part)
        return *gradients, None


def _cut(x: Tensor, place: Place, dtype: torch.dtype) -> Tensor:
    """[B, T, N, H] -> [1, N, L, H], in the precision of the document for values of this dtype."""
    length = 0 if place.has_branches else place.end - place.start  # its mask is fp32
    return _view(x, place).to(choose_precision(length, dtype))


def _view(x: Tensor, place: Place) -> Tensor:
    return x[place.row : place.row + 1, place.start : place.end].transpose(1, 2)


# --- flex: a BlockMask, for comparison -----------------------------------------------------------------------


def make_flex_mask(
    doc_ids: Tensor, branch_ids: Tensor, span_ids: Tensor | None = None, window: Window | None = None
) -> BlockMask:
    def visible(b, _n, t, s):
        branch, comes_before = branch_ids[b, s], s <= t
        if span_ids is not None:
            comes_before = comes_before | ((span_ids[b, t] == span_ids[b, s]) & (span_ids[b, t] > 0))
        if window is not None:
            comes_before = comes_before & (window.position_ids[b, s] > window.position_ids[b, t] - window.size)
        return (doc_ids[b, t] == doc_ids[b, s]) & comes_before & ((branch == 0) | (branch == branch_ids[b, t]))

    B, T = doc_ids.shape
    return create_block_mask(visible, B, None, T, T, device=doc_ids.device)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> Tensor:
    """torch's flex_attention, compiled on a GPU; on the CPU it has no gradients, so training there uses sdpa."""
    if not q.is_cuda and torch.is_grad_enabled():
        dense = None
        if mask is not None:
            dense = create_mask(mask.mask_mod, len(q), 1, q.shape[1], k.shape[1], device=q.device)
        return attend_sdpa(q, k, v, dense)
    attend = compile_flex() if q.is_cuda else flex_attention
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


@functools.cache
def compile_flex():
    return torch.compile(flex_attention)


# --- plain: scores written out, with a softcap, which no other backend computes --------------------------------


def attend_plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    """Attend in fp32, the scores of all queries and keys at once in memory.

    A score s becomes softcap * tanh(s / softcap), where softcap is not 0 (Gemma-2, arXiv 2408.00118). `sinks` [N] are
    scores of one more key for each head, whose value is 0 (gpt-oss, arXiv 2508.10925).
    """
    dtype, K = v.dtype, k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        q_BTKGH = q.float().unflatten(2, (K, -1)) * q.shape[-1] ** -0.5
        scores_BKGTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGH, k.float())
        if softcap:
            scores_BKGTS = softcap * (scores_BKGTS / softcap).tanh()
        if mask is not None:
            scores_BKGTS = scores_BKGTS.masked_fill(~mask[:, None], -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(1, K, -1, 1, 1).expand(*scores_BKGTS.shape[:-1], 1)
            weights_BKGTS = torch.cat((scores_BKGTS, sink), dim=-1).softmax(-1)[..., :-1]
        else:
            weights_BKGTS = scores_BKGTS.softmax(-1)
        return torch.einsum("bkgts,bskh->btkgh", weights_BKGTS, v.float()).flatten(2, 3).to(dtype)


# --- triton: the runs of the documents -----------------------------------------------------------------------


def make_triton_mask(doc_ids: Tensor, branch_ids: Tensor, span_ids: Tensor | None = None, window: Window | None = None):
    """Positions count the tokens of a document up to a branch, and on from there: the runs know as much."""
    return load_kernels().find_runs(doc_ids, branch_ids, span_ids, 0 if window is None else window.size)


def attend_triton(q: Tensor, k: Tensor, v: Tensor, mask, softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
    """Our kernels: differentiable within documents and with all keys visible."""
    assert not softcap  # which the config refuses
    return load_kernels().attention(q.to(v.dtype), k.to(v.dtype), v, mask, sinks=sinks)[0]


def load_kernels():
    """Import the kernels on demand, as no other backend needs Triton."""
    try:
        from nanovlm.kernels import attention
    except ModuleNotFoundError as error:
        missing = f"attention = 'triton' needs the package {error.name}, which is not installed: choose sdpa"
        raise UserError(missing) from error
    return attention


ATTENTION = {"sdpa": attend_sdpa, "flex": attend_flex, "triton": attend_triton, "plain": attend_plain}

# Makers of masks, for backends whose masks are not bool[B, 1, T, T].
MASKS = {"sdpa": make_sdpa_mask, "flex": make_flex_mask, "triton": make_triton_mask}
