"""Weights in few bits: how they are rounded, which layers become them, and that they are saved and loaded."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import generate
import nanovlm
from nanovlm import cli
from nanovlm.config import InitConfig, MoEConfig, QuantizationConfig, TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.hub import export
from nanovlm.hub.model_folder import save_model
from nanovlm.kernels.quantized_weight import NUM_BITS, dequantize_ref, make_tables, unpack
from nanovlm.model import quantized
from nanovlm.model.quantized import QuantizedLinear, quantize, quantize_weight
from nanovlm.model.vlm import VLM
from nanovlm.train import init
from tests.conftest import TINY, make_batch, make_document, noise

FORMATS = sorted(NUM_BITS)
MOE = MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=16, num_shared_experts=1)


def random_model(seed=0, config=TINY):
    torch.manual_seed(seed)
    return VLM(config).eval()


def batch_of(processor):
    return make_batch([make_document(processor, 0, ("what?", "a cat"), ("and?", "no"))])


# ---- rounding ----


def random_weight(*shape, seed=0):
    """A few large weights among many small ones, in rows of different scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) ** 3
    return weight * torch.rand(shape[0], 1, generator=generator)


def test_int8_rounds_to_the_nearest_code():
    weight = random_weight(6, 96)
    w = quantize_weight(weight, "int8", search=False)
    assert torch.equal(w.scales, weight.abs().amax(1, keepdim=True) / 127)
    # Half a step, and half an eps each for the quotient and for the product, which are at most 127 steps.
    assert ((dequantize_ref(w) - weight).abs() <= w.scales * (0.5 + 127 * torch.finfo(torch.float32).eps)).all()
    assert unpack(w).min() >= 1 and unpack(w).max() == 255  # symmetric: -127 to 127 around 128


def test_fp8_is_torch_e4m3():
    """Weight by weight what torch's conversion gives; the largest of a row is kept."""
    weight = random_weight(6, 70)
    w = quantize_weight(weight, "fp8", search=False)
    assert torch.equal(w.scales, weight.abs().amax(1, keepdim=True) / 448)
    expected = (weight / w.scales).to(torch.float8_e4m3fn).float() * w.scales
    assert torch.equal(dequantize_ref(w), expected) and dequantize_ref(w).isfinite().all()
    assert ((expected - weight).abs() <= weight.abs() / 16 + w.scales * 2**-10).all()
    assert torch.allclose(expected.abs().amax(1), weight.abs().amax(1), rtol=1e-6)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_covers_the_range_of_each_group_and_zero(group):
    weight = random_weight(6, 256)
    weight[0] = weight[0].abs() + 0.1
    weight[1] = -weight[1].abs()
    w = quantize_weight(weight, "int4", group, search=False)
    groups = weight.view(6, -1, group)
    span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    scale, zero = (w.scales & -65536).view(torch.float32), w.scales & 15
    assert w.scales.shape == (6, 256 // group)
    assert torch.equal(scale, (span / 15).bfloat16().float())
    # Half a step, another half where both ends of the range and 0 are no whole steps apart.
    assert ((dequantize_ref(w) - weight).view_as(groups).abs() <= 1.05 * scale[..., None]).all()
    assert (zero[0] == 0).all() and (zero[1] == 15).all()


def test_nf4_takes_the_nearest_of_its_16_values():
    """For every block the codes are as good as those of a search over all 16, with the absmax as it is stored."""
    weight = random_weight(40, 512)
    w = quantize_weight(weight, "nf4")
    table, dynamic = make_tables(weight.device)
    absmax = dynamic[w.scales.int()].flatten()
    absmax = (absmax * w.nested_scales.repeat_interleave(256)[: len(absmax)] + w.nested_offset).view(40, 8, 1, 1)
    error = (weight.view(40, 8, 64, 1) - table * absmax).abs()
    chosen = (dequantize_ref(w) - weight).abs().view(40, 8, 64)
    # A weight midway between two values goes to either, as the quotient and the product are rounded.
    assert (chosen - error.amin(-1) <= 2 * torch.finfo(torch.float32).eps * absmax[..., 0]).all()
    assert w.nested_scales.shape == (2,)


@pytest.mark.parametrize("format", FORMATS)
def test_search_lowers_the_error_of_every_group(format):
    """In 8 bits hardly, but in no group is it worse than the whole range."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    near, searched = (
        (dequantize_ref(quantize_weight(weight, format, search=s)) - weight).view(
            64, -1, 64 if format in ("int4", "nf4") else 256
        )
        for s in (False, True)
    )
    near, searched = near.square().sum(-1), searched.square().sum(-1)
    assert searched.sum() < {"int8": 0.99, "int4": 0.93, "nf4": 0.9, "fp8": 1}[format] * near.sum()
    if format != "nf4":  # whose groups share the rounding of their absmax
        assert (searched <= near).all()


@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_extreme(format):
    """Zeros stay zeros, single values are kept, sizes from 1e-30 to 1e30 lose no more than others."""
    assert torch.equal(dequantize_ref(quantize_weight(torch.zeros(3, 70), format)), torch.zeros(3, 70))
    for size in (1e-30, 1.0, 1e30):
        weight = size * random_weight(1, 64)
        error = (dequantize_ref(quantize_weight(weight, format)).double() / weight - 1).mul(weight / size).norm()
        error = error / (weight / size).norm()
        assert error < {"int8": 0.03, "int4": 0.25, "nf4": 0.25, "fp8": 0.04}[format], size
    weight = torch.zeros(1, 70)
    weight[0, 69] = -2
    assert dequantize_ref(quantize_weight(weight, format, search=False))[0, 69] == pytest.approx(-2, rel=0.01)
    for bad in (torch.nan, torch.inf):
        weight[0, 0] = bad
        with pytest.raises(ValueError, match="not finite"):
            quantize_weight(weight, format)


# ---- models ----


def test_the_layers_of_the_decoder_and_no_others():
    config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=MOE))
    model, before = quantize(random_model(config=config), QuantizationConfig("nf4")), random_model(config=config)
    changed = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    expected = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.shared.{x}_proj" for x in ("gate", "up", "down")}
    assert changed == {f"decoder.layers.{i}.{name}" for i in range(2) for name in expected}
    kept = {name: tensor for name, tensor in before.state_dict().items() if name.rpartition(".")[0] not in changed}
    assert len(kept) > 30 and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    assert model.config.quantization == QuantizationConfig("nf4")


def test_other_layers_when_asked_but_never_the_head():
    decoder = dataclasses.replace(TINY.decoder, tie_word_embeddings=False)
    model = quantize(
        random_model(config=dataclasses.replace(TINY, decoder=decoder)), QuantizationConfig("int8", 64, "")
    )
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert left == ["decoder.lm_head"]


@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_a_quantised_model_is_one_with_rounded_weights(processor, format):
    """The same logits, to the bit, as those of linear layers with the written-out weights, and near the model's own."""
    batch, model = batch_of(processor), random_model()
    before = model.logits(batch)
    rounded = random_model()
    quantize(model, QuantizationConfig(format, 32))
    for name, module in rounded.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("decoder."):
            module.weight.copy_(dequantize_ref(quantize_weight(module.weight, format, 32)))
    after = model.logits(batch)
    assert torch.equal(after, rounded.logits(batch))
    error = ((after - before).square().mean() / before.square().mean()).sqrt()
    assert 0 < error < {"int8": 0.05, "int4": 0.3, "nf4": 0.3, "fp8": 0.1}[format]
    assert len(nanovlm.generate(model, batch, max_new_tokens=3)) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_through_the_kernels(processor, device, monkeypatch, format):
    model, batch = quantize(random_model().to(device), QuantizationConfig(format)), batch_of(processor).to(device)
    expected = random_model()
    expected.load_state_dict(quantize(expected, QuantizationConfig(format)).state_dict())
    monkeypatch.setattr(quantized, "dequant_matmul", quantized.load_kernel())
    logits = model.logits(batch)
    monkeypatch.undo()
    expected = expected.logits(batch_of(processor))
    assert (logits.cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gradients_go_through(processor):
    """What lies before a quantised layer learns as before a linear one; the codes have no gradient."""
    model, batch = quantize(random_model(), QuantizationConfig("int4")), batch_of(processor)
    model.logits(batch).square().mean().backward()
    assert model.projector.proj.weight.grad.abs().sum() > 0
    layer = model.decoder.layers[0].mlp.up_proj
    w = quantized.quantize_weight(random_model().decoder.layers[0].mlp.up_proj.weight, "int4")
    x, y = (torch.randn(3, 32, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    layer(x).square().sum().backward()
    F.linear(y, dequantize_ref(w)).square().sum().backward()
    assert torch.equal(x.grad, y.grad) and list(layer.parameters()) == []


def test_a_bias_that_has_a_gradient_is_cast_with_it():
    layer = QuantizedLinear(nn.Linear(32, 5), QuantizationConfig("nf4"))
    scales = layer.nested_scales.clone()
    layer(torch.ones(2, 32)).sum().backward()
    layer.to(torch.float16)
    assert layer.bias.dtype == layer.bias.grad.dtype == torch.float16 and torch.equal(layer.nested_scales, scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_has_all_that_it_needs(tmp_path, processor, format, dtype):
    """Saved, it is smaller; loaded, it has the same bits, in whatever dtype the rest is."""
    model = random_model(3).to(dtype)
    save_model(tmp_path / "before", model, processor)
    quantize(model, QuantizationConfig(format, 32))
    save_model(tmp_path / "model", model, processor)
    loaded, _ = nanovlm.load(tmp_path / "model")
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and loaded.config == model.config
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    batch = batch_of(processor)
    assert torch.equal(model.logits(batch), loaded.logits(batch))
    sizes = [(tmp_path / x / "model.safetensors").stat().st_size for x in ("before", "model")]
    weights = sum(m.shape[0] * m.shape[1] for m in model.modules() if isinstance(m, QuantizedLinear))
    per_weight = {"int8": 1.13, "fp8": 1.13, "int4": 0.63, "nf4": 0.6}[
        format
    ]  # of layers so small that scales are no trifle
    assert sizes[1] < sizes[0] - (dtype.itemsize - per_weight) * weights + 14 * 300  # and names and offsets
    cast, _ = nanovlm.load(tmp_path / "model", dtype=torch.float16)
    for name, tensor in cast.state_dict().items():
        if quantized.is_quantized(name):
            assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name])
        else:
            assert tensor.dtype == torch.float16


def test_a_config_that_does_not_fit_its_file(tmp_path, processor):
    model = quantize(random_model(), QuantizationConfig("int4", 32))
    tensors = model.state_dict()
    model.config = dataclasses.replace(model.config, quantization=QuantizationConfig("int8"))
    save_model(tmp_path / "model", model, processor, tensors)
    with pytest.raises(ValueError, match=r"q_proj.scales has dtype I32; only F32, F16, BF16 are read"):
        nanovlm.load(tmp_path / "model")
    model.config = dataclasses.replace(model.config, quantization=QuantizationConfig("nf4"))
    save_model(tmp_path / "model", model, processor, tensors)
    with pytest.raises(ValueError, match=r"q_proj.scales has dtype I32; only U8.*q_proj.nested_offset is missing"):
        nanovlm.load(tmp_path / "model")
    model.config = dataclasses.replace(model.config, quantization=None)
    save_model(tmp_path / "model", model, processor, tensors)
    with pytest.raises(ValueError, match=r"q_proj.codes is unknown"):
        nanovlm.load(tmp_path / "model")


def test_mistakes_are_one_sentence(processor, tmp_path):
    model = random_model()
    with pytest.raises(ValueError, match=r"layers = 'nothing' is found in the name of no linear layer"):
        quantize(model, QuantizationConfig("int8", layers="nothing"))
    with pytest.raises(ValueError, match=r"layers = '\[' is no regular expression: unterminated"):
        quantize(model, QuantizationConfig("int8", layers="["))
    with torch.no_grad():
        model.decoder.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"decoder.layers.1.mlp.up_proj cannot be quantised: it has weights that are"):
        quantize(model, QuantizationConfig())
    model = quantize(random_model(), QuantizationConfig("nf4"))
    with pytest.raises(ValueError, match="the model is quantised already, to nf4"):
        quantize(model, QuantizationConfig("int8"))
    with pytest.raises(ValueError, match=r"quantization.format = 'nf4' cannot be exported"):
        export.check_exportable(Processor(processor.tokenizer, processor.chat_template, model.config))
    with pytest.raises(ValueError, match=r"model.quantization = .* must be None"):
        TrainConfig(model=model.config).validate()
    save_model(tmp_path / "model", model, processor)
    mixture = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=MoEConfig(3, 2, 64)))
    for wanted in (TINY, mixture):
        with pytest.raises(ValueError, match="model, which is quantised, to nf4"):
            init.start(TrainConfig(model=wanted, init=InitConfig(model=str(tmp_path / "model"))), ())


# ---- command lines ----


def test_command_lines(tmp_path, processor, capsys, monkeypatch):
    """`generate.py --quantize` answers as the folder does that `python -m nanovlm.quant` writes."""
    save_model(tmp_path / "model", random_model(), processor)
    noise(0).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)

    def ask(model, **options):
        generate.main(generate.GenerateConfig(model, (cli.Path("a.png"),), ("what?",), device="cpu", **options))
        return capsys.readouterr().out

    command = ["-m", "nanovlm.quant", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "int8"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cli.PROJECT)
    assert done.returncode == 0 and "MB, before" in done.stdout, done.stderr
    assert ask("out") == ask("model", quantize="int8")
    for format in FORMATS:
        assert ask("model", quantize=format)
    with pytest.raises(ValueError, match="quantised already"):
        ask("out", quantize="int4")
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cli.PROJECT)
    assert done.returncode == 2 and "out exists and is not an empty folder" in done.stderr
