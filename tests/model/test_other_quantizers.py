"""Other people's quantisers beside ours: nf4 of bitsandbytes bit for bit, and torchao on our decoder.

pip install --no-deps --target other bitsandbytes==0.50.2 torchao==0.18.0
PYTHONPATH=other python -m pytest tests/model/test_other_quantizers.py
"""

import copy
import dataclasses
import importlib.util

import pytest
import torch

import nanovlm
from nanovlm.config import QuantizationConfig
from nanovlm.kernels.quantized_weight import dequantize_ref, make_tables, unpack
from nanovlm.model.quantized import quantize, quantize_weight
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, make_batch, make_document


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs the package {package}")


def matrices():
    """Normal weights; heavy tails of every size; whole groups of zeros; and more groups than share a scale."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(48, 320, generator=generator)
    yield "normal", normal / 50
    yield "heavy tails", normal**5
    yield "zeros", normal * (torch.arange(320) >= 128)
    yield "large", torch.randn(128, 1024, generator=generator)


@needs("bitsandbytes")
@pytest.mark.parametrize("weight", [weight for _, weight in matrices()], ids=[name for name, _ in matrices()])
def test_nf4_has_the_bits_of_bitsandbytes(weight):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = quantize_weight(weight, "nf4", search=False)
    pairs = unpack(ours).view(-1, 2)  # the first in the higher bits of a byte
    assert torch.equal(pairs[:, :1] * 16 + pairs[:, 1:], codes.int())
    assert torch.equal(ours.nested_offset, state.offset) and torch.equal(ours.nested_scales, state.state2.absmax)
    # Its nearest of the 256 values of an absmax is exact to 2**-15 only, on a CPU: close to halfway it takes either.
    table, indices = make_tables("cpu")[1], (ours.scales.flatten(), state.absmax)
    exact = (weight.view(-1, 64).abs().amax(-1) - state.offset) / state.state2.absmax.repeat_interleave(256)[
        : len(state.absmax)
    ]
    our_error, their_error = ((table[index.int()] - exact).abs() for index in indices)
    assert ((our_error - their_error).abs() <= 2**-14).all()
    assert (indices[0] != indices[1]).float().mean() < 0.01
    same = (indices[0] == indices[1]).repeat_interleave(64).view_as(weight)
    assert torch.equal(dequantize_ref(ours)[same], dequantize_4bit(codes, state)[same])


@pytest.fixture
def models(processor):
    """Our model in fp32, a batch, and its logits."""
    torch.manual_seed(0)
    decoder = dataclasses.replace(TINY.decoder, hidden_size=64, intermediate_size=128, head_dim=16)
    model = VLM(dataclasses.replace(TINY, decoder=decoder)).eval()
    batch = make_batch([make_document(processor, 0, ("what color?", "red"))])
    return model, batch, model.logits(batch).detach()


@needs("torchao")
@pytest.mark.parametrize(("bits", "format"), [(8, "int8"), (4, "int4")])
@torch.no_grad()
def test_torchao_quantises_our_decoder(models, processor, bits, format):
    """Its error is as large as ours is without a search, and answers go on."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    model, batch, logits = models
    config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(64))
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(theirs.decoder.layers, config)
    assert type(theirs.decoder.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    quantize(ours, QuantizationConfig(format=format, group_size=64), search=False)
    their_error, our_error = ((m.logits(batch) - logits).square().mean().sqrt() for m in (theirs, ours))
    print(f"{format}: {their_error:.1e}, ours {our_error:.1e}")
    assert 0.3 * our_error < their_error < 3 * our_error
    assert len(nanovlm.generate(theirs, batch, max_new_tokens=4)[0]) > 0
