"""Attention within documents: the mask and the backends.

Legend of shapes: B rows, T query tokens, S key tokens, N query heads, K key/value heads, H head size.
A backend is `attend(q: [B, T, N, H], k: [B, S, K, H], v: [B, S, K, H], mask: bool[B, 1, T, S] | None)
-> [B, T, N, H]` in the dtype of v; each key/value head serves N / K neighbouring query heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def make_mask(doc_ids: Tensor, branch_ids: Tensor) -> Tensor:
    """Say which keys a query sees: its own document's, not later ones, of the prefix or of its own branch.

    Takes int32[B, T] twice, returns bool[B, 1, T, T]. Padding (doc_id -1) sees only padding, so no row is
    empty; nothing reads what comes out there.
    """
    T = doc_ids.shape[1]
    same_document = doc_ids[:, :, None] == doc_ids[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=doc_ids.device).tril()
    key_branch = branch_ids[:, None, :]
    visible_branch = (key_branch == 0) | (key_branch == branch_ids[:, :, None])
    return (same_document & causal & visible_branch)[:, None]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's scaled_dot_product_attention, which groups heads without copying keys."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped, dtype = q.shape[1] != k.shape[1], v.dtype
    if q.device.type == "cpu":
        # bf16 attention on the CPU took 2 to 4 times as long as fp32 (128 and 256 tokens, torch 2.13, 2026-11-22).
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    else:
        out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2).to(dtype)


ATTENTION = {"sdpa": attend_sdpa}
