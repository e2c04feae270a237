"""The experts' kernels on weights of few bits, against the loop over what they stand for in fp64."""

from functools import partial

import pytest
import torch

from tests.kernels.oracle import check_gradients

pytest.importorskip("triton")
from nanovlm.kernels import quantized_experts as kernels
from nanovlm.kernels.quantized_experts import quantized_experts, quantized_experts_ref
from nanovlm.model.quantized import quantize_weight
from nanovlm.model.quantized_experts import QuantizedStack

FORMATS = ("int8", "int4", "nf4")


def make_inputs(R, k, E, D, W, format, dtype, device, group=32):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    choice = torch.rand(R, E, generator=generator).argsort(-1)[:, :k].to(device)
    inputs = {"x": draw(R, D).to(device, dtype), "weights": draw(R, k).to(device, dtype)}
    stacks = [
        QuantizedStack([quantize_weight(draw(N, K) * K**-0.5, format, group, search=False) for _ in range(E)])
        .to(device)
        .whole()
        for N, K in ((W, D), (W, D), (D, W))
    ]
    return choice, inputs, stacks, draw(R, D).to(device, dtype)


def assert_equals_the_loop(R, k, E, D, W, format, dtype, device, group=32):
    choice, inputs, stacks, dout = make_inputs(R, k, E, D, W, format, dtype, device, group)

    def run(function, x, weights):
        return function(x, choice, weights, *stacks)

    ours, loop = partial(run, quantized_experts), partial(run, quantized_experts_ref)
    check_gradients(ours, loop, loop, inputs, dout)


CASES = {  # R, k, E, D, W
    "one token, most experts without": (1, 2, 6, 64, 32, "nf4"),
    "17 tokens": (17, 2, 3, 40, 33, "int8"),
    "tiles of 32 rows": (33, 1, 1, 40, 24, "int4"),
    "no tokens": (0, 2, 3, 40, 24, "nf4"),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(case, device):
    assert_equals_the_loop(*CASES[case], torch.float32, device)


@pytest.mark.parametrize("format", FORMATS)
def test_in_16_bits(format, device):
    """A row of several tiles of words, the last of which is not full."""
    dtype = torch.float16 if format == "int4" else torch.bfloat16
    assert_equals_the_loop(9, 2, 2, 136, 40, format, dtype, device, group=64)


def test_many_rows_are_multiplied_by_what_is_written_out(device, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_FUSED_ROWS", 3)
    monkeypatch.setattr(kernels, "fused_forward", None)
    assert_equals_the_loop(17, 2, 3, 40, 24, "int4", torch.bfloat16, device)


@pytest.mark.parametrize("most_fused", [0, 64])
def test_no_more_is_kept_than_the_backward_pass_reads(most_fused, device, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_FUSED_ROWS", most_fused)
    choice, inputs, stacks, _ = make_inputs(3, 2, 2, 40, 24, "int8", torch.float32, device)
    x, weights = (t.requires_grad_() for t in inputs.values())
    y, kept = quantized_experts(x, choice, weights, *stacks), [x, choice, weights]
    saved = y.grad_fn.saved_tensors
    assert [t.shape for t in saved] == [*(t.shape for t in kept), (6, 24), (6, 24)]


def test_mistakes_are_named(device):
    choice, inputs, (gate, up, down), _ = make_inputs(3, 2, 2, 40, 24, "int8", torch.float32, device)
    x, weights = inputs.values()
    with pytest.raises(ValueError, match=r"x \[3, 39\] and stacks \[2, 24, 40\], \[2, 24, 40\], \[2, 40, 24\] must be"):
        quantized_experts(x[:, 1:], choice, weights, gate, up, down)
    with pytest.raises(ValueError, match=r"choice \[3, 2\] and weights \[3, 1\] must be \[3, k\]"):
        quantized_experts(x, choice, weights[:, :1], gate, up, down)
    with pytest.raises(ValueError, match=r"x is torch.float64; the experts' kernels take"):
        quantized_experts(x.double(), choice, weights, gate, up, down)
    with pytest.raises(ValueError, match=r"gate, up and down are int8, int4 and int8: they must be alike"):
        quantized_experts(x, choice, weights, gate, up._replace(format="int4"), down)
