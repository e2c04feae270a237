"""A model that is prepared for inference is the same model: its outputs, its state, its training."""

import copy
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nanovlm
from nanovlm import cli
from nanovlm.config import MoEConfig, QuantizationConfig
from nanovlm.hub.model_folder import save_model
from nanovlm.kernels.quantized_weight import dequantize_ref
from nanovlm.model.inference import prepare
from nanovlm.model.joined import Joined
from nanovlm.model.packed import PACK, PRODUCTS, PackedWeight
from nanovlm.model.quantized import QuantizedLinear, quantize, quantize_weight
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, make_batch, make_document

FORMATS = sorted(PACK)
DECODERS = {
    "plain": {},
    "biases": dict(qkv_bias=True, o_bias=True),
    "norms of heads": dict(qk_norm="head"),
    "norms of all heads": dict(qk_norm="all"),
    "head of its own": dict(tie_word_embeddings=False),
    "mixture": dict(moe=MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=16, num_shared_experts=1)),
}


def random_model(name="plain", seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = VLM(dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, **DECODERS[name]))).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.to(dtype)


def batch_of(processor, seed=0):
    return make_batch([make_document(processor, seed, ("what?", "a cat"), ("and?", "no"))])


@torch.no_grad()
def logits(model, batch):
    return model.logits(batch)


def count_products(monkeypatch):
    """Return a list that grows with the product of joined layers."""
    called, forward = [], Joined.forward
    monkeypatch.setattr(Joined, "forward", lambda self, x: called.append(len(self.layers)) or forward(self, x))
    return called


def assert_same_state(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


# ---- the same outputs ----


@pytest.mark.parametrize("name", DECODERS)
def test_outputs_in_fp32(processor, monkeypatch, name):
    """And to the bit with and without gradients, as long as nothing is prepared."""
    model, batch = random_model(name), batch_of(processor)
    expected = logits(model, batch)
    assert torch.equal(expected, model.logits(batch).detach())
    called = count_products(monkeypatch)
    found = logits(prepare(model), batch)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert called == [3, 2] * 2  # q, k, v and gate, up of two layers


@pytest.mark.parametrize("name", DECODERS)
def test_outputs_in_bf16(processor, name):
    """As near to fp32 as before."""
    exact, model, batch = random_model(name), random_model(name, dtype=torch.bfloat16), batch_of(processor)
    exact.load_state_dict(model.state_dict())
    expected = logits(exact, batch)
    before = (logits(model, batch) - expected).square().mean().sqrt()
    after = (logits(prepare(model), batch) - expected).square().mean().sqrt()
    assert 0 < after <= 1.5 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", DECODERS)
def test_outputs_of_quantised_models(processor, monkeypatch, name, format, dtype):
    """As near to fp32 as with the same weights written out in bf16; what nf4 loses in int8 is little beside its own."""
    config, batch = QuantizationConfig(format, 32), batch_of(processor)
    model, exact = quantize(random_model(name, dtype=dtype), config), quantize(random_model(name), config)
    expected, original = logits(exact, batch), logits(random_model(name), batch)
    eager = logits(quantize(random_model(name, dtype=torch.bfloat16), config), batch)
    called = count_products(monkeypatch)
    found = logits(prepare(model, int8_head=False), batch)
    assert called == [3, 2] * 2
    allowed = 2 * (eager - expected).square().mean().sqrt()
    if format == "nf4":
        allowed += 0.15 * (expected - original).square().mean().sqrt()
    assert (found - expected).square().mean().sqrt() <= allowed


# ---- products of quantised weights ----


def measure(found, expected):
    error = found.double() - expected
    return torch.stack((error.abs().max(), error.square().mean().sqrt()))


def check_products(formats=FORMATS):
    """Compare with fp64: at most twice the error of a bf16 product with the dequantised weights, and a floor."""
    generator = torch.Generator().manual_seed(0)
    for format in formats:
        for group in (32, 64, 128) if format == "int4" else (64,):
            for sizes, K in (((192, 64, 64), 576), ((7, 3), 50), ((100,), 160)):
                weights = [torch.randn(N, K, generator=generator) for N in sizes]
                quantized = [quantize_weight(w, format, group, search=False) for w in weights]
                packed, written = PackedWeight(quantized), torch.cat([dequantize_ref(w) for w in quantized])
                if format == "nf4":  # the copy in int8 is the weight; it is off by half of its steps at most
                    values = packed.codes[:, :K].float() * packed.scales[:, None].float()
                    assert ((values - written).abs() <= 0.502 * packed.scales[:, None].float()).all()
                    written = values
                else:
                    for index, w in enumerate(quantized):
                        assert torch.equal(packed.unpack(index), w.codes)
                for rows in (1, 2, 7, PRODUCTS[format][0], PRODUCTS[format][0] + 1):
                    x = torch.randn(rows, K, generator=generator)
                    exact = x.bfloat16().double() @ written.double().T
                    eager = measure(F.linear(x.bfloat16(), written.bfloat16()), exact)
                    for dtype in (torch.bfloat16, torch.float32):
                        y = packed(x.to(dtype))
                        assert y.dtype == dtype and y.shape == (rows, sum(sizes))
                        floor = torch.finfo(torch.bfloat16).eps * exact.abs().max() * torch.tensor([0.5, 0.05])
                        assert (measure(y, exact) <= 2 * eager + floor).all(), (format, group, sizes, K, rows, dtype)


@pytest.mark.parametrize("format", FORMATS)
def test_products(format):
    check_products([format])


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_products_on_older_processors(capability):
    """Torch packs int4 in another order there."""
    command = "from tests.model.test_inference import check_products; check_products()"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, cwd=cli.PROJECT
    )
    assert done.returncode == 0, done.stderr


def test_rows_do_not_depend_on_their_neighbours():
    """Within the operators for few rows, to the bit."""
    for format in FORMATS:
        packed = PackedWeight([quantize_weight(torch.randn(96, 128), format, search=False)])
        x = torch.randn(PRODUCTS[format][0], 128, dtype=torch.bfloat16)
        assert torch.equal(packed(x), torch.cat([packed(row[None]) for row in x]))


# ---- the same state ----


@pytest.mark.parametrize("format", [None, *FORMATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_and_folder(processor, tmp_path, dtype, format):
    """Names, dtypes and values, in memory and in a file; codes are not held twice."""
    model, expected = random_model("biases", dtype=dtype), random_model("biases", dtype=dtype)
    for each in (model, expected) if format else ():
        quantize(each, QuantizationConfig(format, 32))
    assert_same_state(prepare(model), expected)
    save_model(tmp_path / "model", model, processor)
    loaded, _ = nanovlm.load(tmp_path / "model")
    assert_same_state(loaded, expected)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert all((layer.codes is None) == (format != "nf4") for layer in layers)


def test_memory_is_shared():
    model = prepare(random_model("biases"))
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for joined, layers in (
            (attention.joined, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (mlp.joined, (mlp.gate_proj, mlp.up_proj)),
        ):
            assert {part.weight.untyped_storage().data_ptr() for part in layers} == {
                joined.weight.untyped_storage().data_ptr()
            }
            assert joined.weight.shape[0] == sum(len(part.weight) for part in layers)
    assert len(list(model.parameters())) == len(list(random_model("biases").parameters()))


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_twice_is_once(format):
    model = random_model()
    if format:
        quantize(model, QuantizationConfig(format))
    prepare(model)
    before = [(m.joined, getattr(m.joined, "weight", None)) for m in model.modules() if hasattr(m, "joined")]
    places = [parameter.data_ptr() for parameter in model.parameters()]
    with torch.inference_mode():
        prepare(model)
    after = [(m.joined, getattr(m.joined, "weight", None)) for m in model.modules() if hasattr(m, "joined")]
    assert all(a is b and c is d for (a, c), (b, d) in zip(before, after, strict=True))
    assert places == [parameter.data_ptr() for parameter in model.parameters()]


# ---- what comes after ----


def test_training_goes_on(processor):
    """Gradients are those of the model as it was, and what is learnt is in the joined products."""
    model, plain, batch = prepare(random_model("biases")), random_model("biases"), batch_of(processor)
    for each in (model, plain):
        optimizer = torch.optim.SGD(each.parameters(), 0.1)
        each.logits(batch).square().mean().backward()
        assert all(parameter.grad is not None for parameter in each.parameters())
        optimizer.step()
    expected = logits(plain, batch)
    assert (logits(model, batch) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_go_through_a_quantised_model(processor, format):
    model, plain = (quantize(random_model(), QuantizationConfig(format)) for _ in range(2))
    for each in (prepare(model), plain):
        each.logits(batch_of(processor)).square().mean().backward()
    ours, theirs = (each.projector.proj.weight.grad for each in (model, plain))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_other_weights_replace_those_that_were_joined(processor, format):
    """Loaded, cast, copied, quantised: never does a product go on with what was there before."""
    batch = batch_of(processor)
    model, other = random_model(), random_model(seed=1)
    for each in (model, other) if format else ():
        quantize(each, QuantizationConfig(format))
    prepare(model)
    twin = copy.deepcopy(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model, batch), logits(other, batch))
    assert_same_state(model, other)
    prepare(model)
    assert (logits(model, batch) - logits(other, batch)).abs().max() <= 0.05 * logits(other, batch).abs().max()
    assert_same_state(model, other)
    logits(prepare(twin), batch)
    twin.to(torch.float64)
    first = random_model() if format is None else quantize(random_model(), QuantizationConfig(format))
    expected = logits(first.to(torch.float64), batch)
    assert (logits(twin, batch) - expected).abs().max() <= 1e-5 * expected.abs().max()
    if format is None:
        quantized = quantize(prepare(random_model()), QuantizationConfig("int8"))
        expected = logits(quantize(random_model(), QuantizationConfig("int8")), batch)
        assert (logits(quantized, batch) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_a_copy_is_a_model_of_its_own(processor, format):
    """Which can be changed, and prepared anew."""
    batch, model = batch_of(processor), random_model()
    if format:
        quantize(model, QuantizationConfig(format))
    expected = logits(prepare(model), batch)
    twin = copy.deepcopy(model)
    assert_same_state(twin, model)
    assert (logits(prepare(twin), batch) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with torch.no_grad():
        for layer in twin.decoder.layers:
            layer.input_layernorm.weight.zero_()
            for each in (layer.self_attn.v_proj, layer.mlp.up_proj) if format is None else ():
                each.weight.zero_()
    assert torch.equal(logits(model, batch), expected)
    if format is None:
        hidden = twin.decoder.norm(twin.embed(batch))
        assert torch.equal(logits(twin, batch), twin.head(hidden).detach())


# ---- the head ----


def test_head_in_int8(processor):
    """Quantised models have it unless told otherwise; it is off by half a step a weight, and never trained."""
    batch = batch_of(processor)
    assert prepare(random_model()).decoder.joined_head is None
    for name, format in (("plain", "int4"), ("plain", "int8"), ("head of its own", "nf4")):
        model = prepare(quantize(random_model(name), QuantizationConfig(format)))
        with torch.no_grad():
            hidden = model(batch)
            found, exact = model.head(hidden), F.linear(hidden, model.decoder.head_weight)
        model.head(hidden).sum()
        weight = model.decoder.head_weight
        bound = hidden.abs().sum(-1, keepdim=True) * weight.abs().amax(-1) / 127 * 0.51 + 0.02 * exact.abs().max()
        assert ((found - exact).abs() <= bound).all() and not torch.equal(found, exact)
        assert torch.equal(model.head(hidden), exact)  # with gradients
        with torch.no_grad():
            prepare(model, int8_head=False)
            assert torch.equal(model.head(hidden), exact)
