"""SwiGLU with a backward pass of its own is the plain expression, and keeps less."""

import pytest
import torch
import torch.nn.functional as F

from nanovlm.model.moe import MLP, swiglu


def plain(gate, up):
    return F.silu(gate) * up


def run(function, dtype):
    """Return the output, both gradients, and how many numbers were kept for them."""
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 50, 64, dtype=dtype, requires_grad=True) for _ in range(2))
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(gate, up)
    grads = torch.autograd.grad(out, (gate, up), torch.randn_like(out))
    return [out, *grads], sum(kept.values()) / gate.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_bits_are_those_of_the_plain_expression_and_less_is_kept(dtype):
    ours, kept = run(swiglu, dtype)
    theirs, kept_by_autograd = run(plain, dtype)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert kept == 2 and kept_by_autograd == 3


def test_it_is_compiled_as_one_graph():
    mlp, x = MLP(16, 32), torch.randn(5, 16)
    expected = torch.autograd.grad(mlp(x).sum(), list(mlp.parameters()))
    found = torch.autograd.grad(
        torch.compile(mlp, fullgraph=True, backend="aot_eager")(x).sum(), list(mlp.parameters())
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
