"""Attention document by document and under a mask of whole rows are the same function."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.model import attention
from nanovlm.model.attention import add_masks, attend_sdpa, find_documents, make_dense_mask, make_sdpa_mask

# A document: tokens of its prefix, and of each branch.
DOCUMENTS = st.tuples(st.integers(1, 40), st.lists(st.integers(1, 12), max_size=4))


def make_ids(rows: list, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int32[B, T] twice: documents and branches of rows that end in padding."""
    doc_ids, branch_ids = torch.full((len(rows), T), -1, dtype=torch.int32), torch.zeros(len(rows), T).int()
    number = 0
    for row, documents in enumerate(rows):
        at = 0
        for prefix, branches in documents:
            for branch, length in enumerate([prefix, *branches]):
                doc_ids[row, at : at + length] = number
                branch_ids[row, at : at + length] = branch
                at += length
            number += 1
    return doc_ids, branch_ids


def length_of(row: list) -> int:
    return sum(prefix + sum(branches) for prefix, branches in row)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(DOCUMENTS, max_size=4), min_size=1, max_size=3),
    padding=st.integers(0, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (6, 3)]),
    H=st.sampled_from([8, 10, 64, 72]),
    seed=st.integers(0, 2**30),
)
def test_documents_and_the_mask_agree(rows, padding, heads, H, seed):
    """To rounding in fp32, judged by fp64: outputs and the gradients of queries, keys and values."""
    T = max(1, max(map(length_of, rows)) + padding)
    doc_ids, branch_ids = make_ids(rows, T)
    torch.manual_seed(seed)
    real = (doc_ids >= 0)[..., None, None]
    inputs = [torch.randn(len(rows), T, n, H) for n in (heads[0], heads[1], heads[1])]
    upstream = torch.randn(len(rows), T, heads[0], H) * real

    def attend(mask, dtype):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        if dtype == torch.float64:  # attend_sdpa computes in fp32
            q_, k_, v_ = (x.transpose(1, 2).repeat_interleave(heads[0] // x.shape[2], 1) for x in (q, k, v))
            scores = (q_ @ k_.transpose(2, 3)) * H**-0.5
            out = (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v_).transpose(1, 2)
        else:
            out = attend_sdpa(q, k, v, mask)
        gradients = torch.autograd.grad(out, (q, k, v), upstream.to(dtype))
        return [(x * (doc_ids >= 0)[..., None, None]).double() for x in (out, *gradients)]

    mask = make_dense_mask(doc_ids, branch_ids)
    exact = attend(mask, torch.float64)
    pieces = add_masks(find_documents(doc_ids, branch_ids), branch_ids)
    for found in (attend(mask, torch.float32), attend(pieces, torch.float32)):
        for ours, wanted in zip(found, exact, strict=True):
            assert (ours - wanted).abs().max() <= 3e-6 * (1 + wanted.abs().max()) * T**0.5


def test_long_documents_of_bf16_are_attended_in_bf16(monkeypatch):
    """Within twice the error of torch's bf16 attention from fp64; short ones are rounded at the end alone."""
    monkeypatch.setattr(attention, "BF16_LENGTH", 48)
    doc_ids, branch_ids = make_ids([[(40, []), (64, []), (30, [20, 20])]], 180)
    torch.manual_seed(0)
    inputs = [torch.randn(1, 180, n, 16).bfloat16() for n in (4, 2, 2)]
    inputs[2] += 3  # a part that all values share must not be lost in the gradient of a short document
    real = (doc_ids >= 0)[..., None, None]

    def attend(mask, dtype):
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        if isinstance(mask, list):
            out = attend_sdpa(q.float(), k.float(), v, mask)  # queries and keys come from the rotation in fp32
        else:
            out = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
            ).transpose(1, 2)
        gradients = torch.autograd.grad((out * real).sum(), (q, k, v))
        return [x.double() * real for x in (out, *gradients)]

    dense = make_dense_mask(doc_ids, branch_ids)
    exact, eager = attend(dense, torch.float64), attend(dense, torch.bfloat16)
    ours = attend(add_masks(find_documents(doc_ids, branch_ids), branch_ids), torch.bfloat16)
    is_long = (doc_ids == 1)[0]
    for found, peer, wanted in zip(ours, eager, exact, strict=True):
        for part in (is_long, ~is_long):
            assert (found - wanted)[:, part].abs().max() <= 2 * (peer - wanted)[:, part].abs().max()
        is_rounded = (found - wanted).abs() <= 2**-8 * wanted.abs() + 1e-5
        assert is_rounded[:, ~is_long].all() and not is_rounded[:, is_long].all()


def test_long_documents_are_attended_alone_and_short_rows_under_a_mask():
    long = make_ids([[(256, []), (512, []), (200, [30])]], 1024)
    short = make_ids([[(16, [])] * 12] * 12, 192)
    one = make_ids([[(192, [])]] * 12, 192)
    places, masks = zip(*make_sdpa_mask(*long), strict=True)
    assert [place[:3] for place in places] == [(0, 0, 256), (0, 256, 768), (0, 768, 998)]
    assert masks[:2] == (None, None) and masks[2].shape == (1, 1, 230, 230)
    assert isinstance(make_sdpa_mask(*short), torch.Tensor) and isinstance(make_sdpa_mask(*one), torch.Tensor)


def test_padding_alone_has_a_mask():
    for T in (40, 0):
        assert isinstance(make_sdpa_mask(*make_ids([[]], T)), torch.Tensor)


def test_a_document_in_two_places_is_one_document(monkeypatch):
    doc_ids = torch.tensor([[0, 1, 0, -1]], dtype=torch.int32)
    monkeypatch.setattr(attention, "CALL", -(10**9))
    assert find_documents(doc_ids, torch.zeros_like(doc_ids)) == []
    assert torch.equal(make_sdpa_mask(doc_ids, torch.zeros_like(doc_ids)), make_dense_mask(doc_ids, 0 * doc_ids))


@pytest.mark.parametrize("grad", ["expanded", "transposed"])
def test_any_gradient_is_taken(grad):
    doc_ids, branch_ids = make_ids([[(40, []), (24, [3])]], 70)
    q = torch.randn(1, 70, 2, 8, requires_grad=True)
    out = attend_sdpa(q, q.detach(), q.detach(), add_masks(find_documents(doc_ids, branch_ids), branch_ids))
    loss = out.sum() if grad == "expanded" else (out.transpose(1, 3).contiguous() ** 1).sum()
    (found,) = torch.autograd.grad(loss, q)
    dense = attend_sdpa(q, q.detach(), q.detach(), make_dense_mask(doc_ids, branch_ids))
    (expected,) = torch.autograd.grad((dense * (doc_ids >= 0)[..., None, None]).sum(), q)
    assert (found - expected).abs().max() < 1e-5
