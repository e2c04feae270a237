"""Codes chosen by GPTQ: those of the paper's steps taken one by one in fp64, and less error than rounding."""

import pytest
import torch

from nanovlm.kernels.quantized_weight import dequantize_ref, unpack
from nanovlm.model.quantized import quantize_weight
from nanovlm.quant import gptq


def correlated_inputs(num, K, seed=0):
    """Inputs that depend on each other, some much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K)
    return torch.randn(num, K, generator=generator) @ mix * torch.rand(K, generator=generator).exp() ** 3


def textbook(weight, gram, scale, zero, damping):
    """Round the column of the largest gram that is left and share its error by a fresh inverse of what is left."""
    w, h = weight.double().clone(), gram.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    codes, left = torch.zeros_like(w), list(range(len(h)))
    while left:
        j = max(left, key=lambda i: (gram[i, i].item(), -i))
        codes[:, j] = ((w[:, j] / scale[:, j]).round() + zero[:, j]).clamp(0, 15)
        error = w[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]
        inverse, at = h[left][:, left].inverse(), left.index(j)
        w[:, left] -= error[:, None] * inverse[at] / inverse[at, at]
        left.remove(j)
    return codes


@pytest.mark.parametrize("K, group", [(64, 32), (150, 64)], ids=str)
def test_codes_are_those_of_the_textbook(K, group, monkeypatch):
    """Over several blocks of columns, in the order of act-order, with the groups of the weight as it was."""
    monkeypatch.setattr(gptq, "BLOCK", 48)
    weight = torch.randn(20, K, generator=torch.Generator().manual_seed(1))
    x = correlated_inputs(300, K)
    gram, grid = x.t() @ x, quantize_weight(weight, "int4", group)
    found = gptq.round_in_order(weight, gram, grid)
    scale, zero = (grid.scales & -16).view(torch.float32).double(), (grid.scales & 15).double()
    scale, zero = (x.repeat_interleave(group, dim=1)[:, :K] for x in (scale, zero))
    expected = textbook(weight, gram, scale, zero, 0.01)
    # A weight midway between two codes goes to either, and its column changes those behind it.
    assert (unpack(found)[:, :K] == expected).float().mean() > 0.995
    assert torch.equal(found.scales, grid.scales) and found.codes.shape == grid.codes.shape
    outputs = (x @ (dequantize_ref(w) - weight).t() for w in (grid, found))
    rounding, ours = (error.square().sum() for error in outputs)
    assert ours < 0.5 * rounding
    theirs = (x.double() @ ((expected - zero) * scale - weight).t()).square().sum()
    assert ours == pytest.approx(theirs.item(), rel=0.01)


def test_inputs_that_are_never_there():
    """Weights of inputs that were 0 in all records are rounded as they are; without any record all are."""
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(2))
    x = correlated_inputs(200, 96)
    x[:, 10:20] = 0
    grid = quantize_weight(weight, "int4", 32)
    codes = unpack(gptq.round_in_order(weight, x.t() @ x, grid))
    assert torch.equal(codes[:, 10:20], unpack(grid)[:, 10:20]) and not torch.equal(codes, unpack(grid))
    assert torch.equal(gptq.round_in_order(weight, torch.zeros(96, 96), grid).codes, grid.codes)
