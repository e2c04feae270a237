"""Models quantised by what their layers read: less error than by rounding, and the same model before it."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

import nanovlm
from nanovlm import cli
from nanovlm.config import FusionConfig, MoEConfig, QuantizationConfig
from nanovlm.data.chat import Processor
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.kernels.quantized_weight import dequantize_ref, unpack
from nanovlm.model.inference import prepare
from nanovlm.model.quantized import QuantizedLinear, quantize, quantize_weight
from nanovlm.model.vlm import VLM
from nanovlm.quant import __main__ as command
from nanovlm.quant import calibrate
from nanovlm.quant.calibrate import METHODS
from nanovlm.quant.scales import Seen, Stage, find_awq_scales, find_smooth_scales, fold, list_stages, share_heads
from tests.conftest import TINY, make_batch, make_document

INT4 = QuantizationConfig("int4", 32)
MOE = MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=32, num_shared_experts=1)
GEMMA = dict(
    **{"norm_offset": 1.0, "sandwich_norms": True, "qk_norm": "head", "hidden_act": "gelu_tanh"},
    **{"sliding_window": 7, "full_attention_layers": (1,), "window_rope_theta": 100.0},
)
CONFIGS = {
    "dense": TINY,
    "biases": dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, qkv_bias=True, qk_norm="head")),
    "mixture": dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=MOE)),
    "fusion": dataclasses.replace(TINY, fusion=FusionConfig("cross_attention")),
    "gemma": dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, **GEMMA)),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def random_model(config=TINY, seed=0):
    """A random model some of whose inputs are much larger than others, as in trained ones."""
    torch.manual_seed(seed)
    model = VLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("layernorm.weight"):
                tensor[[3, 17, 18]] = 5.0
            if name.endswith("up_proj.weight"):
                tensor[:3] *= 5.0
            if name.endswith("bias"):
                tensor.normal_()
            if name.endswith("_gate"):  # of fusion, which begins at 0
                tensor.fill_(0.7)
    return model


def batches(processor, num=6, config=TINY):
    """Pictures and text, with padding, a second document in each row."""
    processor = Processor(processor.tokenizer, processor.chat_template, config)
    return [
        make_batch([make_document(processor, 9 * i, turn) for turn in (("what?", f"a cat {i}"), (f"{i}?", "no"))], 80)
        for i in range(num)
    ]


def layer_errors(model, before, data):
    """Squared errors of the outputs of each block's stages for what they read in the quantised model."""
    errors = []
    kept = [calibrate.read(model, batch) for batch in data]
    for index, (block, as_it_was) in enumerate(zip(model.decoder.layers, before.decoder.layers, strict=True)):
        kept = [inputs._replace(x=calibrate.before(inputs, index)) for inputs in kept]
        stages = list_stages(as_it_was)
        seen = calibrate.observe(as_it_was, stages, kept)
        names = {linear: name for name, linear in as_it_was.named_modules()}
        for stage, sums in zip(stages, seen, strict=True):
            for linear in stage.readers:
                e = block.get_submodule(names[linear]).dequantize() - linear.weight
                errors.append(float((e @ sums.gram * e).sum()))
        kept = [inputs._replace(x=calibrate.run(block, inputs)) for inputs in kept]
    return torch.tensor(errors)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_gptq_leaves_less_error_in_every_layer(processor, name):
    model, data = random_model(CONFIGS[name]), batches(processor, config=CONFIGS[name])
    by_rounding = quantize(copy.deepcopy(model), INT4)
    by_gptq = calibrate.calibrate(copy.deepcopy(model), INT4, "gptq", data)
    errors = [layer_errors(other, model, data) for other in (by_gptq, by_rounding)]
    assert (errors[0] < errors[1]).all(), errors
    assert errors[0].sum() < 0.6 * errors[1].sum()
    assert by_gptq.config.quantization == INT4
    assert sum(isinstance(module, QuantizedLinear) for module in by_gptq.modules()) == len(errors[0])
    again = calibrate.calibrate(copy.deepcopy(model), INT4, "gptq", data)
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, by_gptq.state_dict()[key]), key


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_blocks_read_what_they_read_in_the_model(processor, name):
    """Windows, positions and fusion included: the last block gives what the norm before the head reads."""
    model, (batch,) = random_model(CONFIGS[name]), batches(processor, 1, CONFIGS[name])
    inputs = calibrate.read(model, batch)
    for index, block in enumerate(model.decoder.layers):
        inputs = inputs._replace(x=calibrate.before(inputs, index))
        inputs = inputs._replace(x=calibrate.run(block, inputs))
    expected = model(batch)
    assert (model.decoder.norm(inputs.x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("find", [None, find_awq_scales, find_smooth_scales])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_folded_scales_change_nothing_before_rounding(processor, name, find):
    """Of a method or random: the query heads that share a value share theirs, and biases are divided, too."""
    model, data = random_model(CONFIGS[name]), batches(processor, config=CONFIGS[name])
    before = [model.logits(batch) for batch in data]
    weights = {key: tensor.clone() for key, tensor in model.named_parameters()}
    kept = [calibrate.read(model, batch) for batch in data]
    for index, block in enumerate(model.decoder.layers):
        kept = [inputs._replace(x=calibrate.before(inputs, index)) for inputs in kept]
        stages = list_stages(block)
        for stage, sums in zip(stages, calibrate.observe(block, stages, kept), strict=True):
            if stage.before is None:
                continue
            if find is None:
                scales = share_heads(stage, torch.randn(stage.readers[0].in_features).exp())
            else:
                scales = find(stage, [linear.weight for linear in stage.readers], sums, INT4)
            fold(stage, scales)
        kept = [inputs._replace(x=calibrate.run(block, inputs)) for inputs in kept]
    changed = {key for key, tensor in model.named_parameters() if not torch.equal(tensor, weights[key])}
    assert changed if find is find_awq_scales else len(changed) == 2 * {"biases": 10, "mixture": 7}.get(name, 9)
    for batch, expected in zip(data, before, strict=True):
        assert (model.logits(batch) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("find", [find_awq_scales])
def test_scales_leave_less_error_where_some_inputs_are_large(find):
    """Of the outputs on the calibration data, against rounding the weights as they are."""
    reader, before = nn.Linear(128, 64, bias=False), nn.Linear(5, 128)
    sizes = torch.ones(128)
    sizes[::32] = 50.0  # in each group one, whose weight is seldom the largest
    x = torch.randn(500, 128) * sizes
    seen = Seen(128, torch.device("cpu"))
    seen.add(x)
    w = reader.weight.detach().clone()
    found = find(Stage((reader,), before), [w], seen, INT4)
    errors = [
        (x @ (dequantize_ref(quantize_weight(w * s, "int4", 32)) / s - w).t()).square().sum() for s in (found, found**0)
    ]
    assert found[::32].min() > 2 * found.median() and errors[0] < 0.5 * errors[1]


def test_clips_look_at_what_groups_add_to_the_output():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) ** 3
    x = torch.randn(300, 128, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 5, 128)
    errors = []
    for gram in (x.t() @ x, None):
        e = (dequantize_ref(quantize_weight(weight, "int4", 32, gram=gram)) - weight).view(16, 4, 32)
        errors.append(torch.stack([(e[:, i] @ x[:, 32 * i :][:, :32].t()).square().sum(1) for i in range(4)]))
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all() and errors[0].sum() < 0.97 * errors[1].sum()


def test_padding_is_not_read(processor):
    """The sums of a row do not change with its padding."""
    model = random_model()
    document = make_document(processor, 0, ("what?", "a cat"))
    found = []
    for length in (len(document), len(document) + 30):
        kept = [calibrate.read(model, make_batch([document], length))]
        block = model.decoder.layers[0]
        with torch.no_grad():
            found.append(calibrate.observe(block, list_stages(block), kept))
    for a, b in zip(*found, strict=True):
        assert a.num == b.num == len(document)
        assert (a.gram - b.gram).abs().max() <= 1e-5 * a.gram.max()


def test_mistakes_are_one_sentence(processor, tmp_path):
    model = random_model()
    with pytest.raises(
        UserError, match=r"layers = '' names vision\S*, but method gptq calibrates the decoder's blocks"
    ):
        calibrate.calibrate(model, QuantizationConfig(layers=""), "gptq", [])

    def run(**options):
        command.QuantizeConfig(str(tmp_path / "model"), tmp_path / "out", **options).validate()

    with pytest.raises(UserError, match="--method gptq makes int4, not --format nf4"):
        run(quantization=QuantizationConfig("nf4"), method="gptq", calibration=("scenes",))
    with pytest.raises(UserError, match="--method awq needs --calibration"):
        run(method="awq")
    with pytest.raises(UserError, match="--calibration is for --method"):
        run(calibration=("scenes",))
    with pytest.raises(UserError, match="activations = 'int8' is for format int8, not for 'int4'"):
        quantize(model, QuantizationConfig("int4", activations="int8"))
    save_model(tmp_path / "model", model, processor)
    config = command.QuantizeConfig(str(tmp_path / "model"), tmp_path / "out", method="awq", calibration=("scenes",))
    with pytest.raises(UserError, match="--seq-len 99999 is more than the model's"):
        command.main(dataclasses.replace(config, seq_len=99999))
    with pytest.raises(UserError, match=r"100 of 100 samples are unusable \(100 too long\).*more than --seq-len = 8"):
        command.main(dataclasses.replace(config, seq_len=8))  # of a million scenes
    (tmp_path / "other.jsonl").write_text('{"foo": "bar"}\n')
    with pytest.raises(UserError, match=r"name its columns, as in --fields "):
        command.main(dataclasses.replace(config, calibration=(str(tmp_path / "other.jsonl"),)))


@torch.no_grad()
def test_int8_inputs_are_those_of_integer_products(processor):
    """Each token has the scale of its largest number; the product is that of integers times scales."""
    linear = nn.Linear(64, 48)
    layer = QuantizedLinear(linear, QuantizationConfig("int8", activations="int8"))
    x = torch.randn(2, 5, 64) * torch.tensor([1e-4, 1, 300, 1, 0])[None, :, None]
    scale = torch.where(x.abs().amax(-1, keepdim=True) > 0, x.abs().amax(-1, keepdim=True) / 127, 1)
    codes, w = (x / scale).round().long(), layer.weight()
    expected = (codes @ (unpack(w) - 128).long().t()).double() * scale * w.scales.t() + linear.bias
    assert (layer(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (layer(x) - linear(x)).norm() < 0.02 * linear(x).norm()
    model, batch = random_model(), batches(processor, 1)[0]
    quantize(model, QuantizationConfig("int8", activations="int8"))
    before = model.logits(batch)
    assert torch.equal(prepare(model, int8_head=False).logits(batch), before)  # not packed, which would not round


def test_gradients_go_through_rounded_inputs():
    layer = QuantizedLinear(nn.Linear(32, 8, bias=False), QuantizationConfig("int8", activations="int8"))
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, -1))


@torch.no_grad()
def test_smooth_scales_leave_less_error_of_rounded_inputs():
    """With outliers in some inputs, as in trained models: both sides are rounded to int8."""
    config = QuantizationConfig("int8", activations="int8")
    reader, before = nn.Linear(128, 64, bias=False), nn.Linear(5, 128)
    sizes = torch.ones(128)
    sizes[::32] = 100.0
    x, seen = torch.randn(500, 128) * sizes, Seen(128, torch.device("cpu"))
    seen.add(x)
    found = find_smooth_scales(Stage((reader,), before), [reader.weight], seen, config)
    expected, errors = reader(x), []
    for scales in (found, torch.ones(128)):
        scaled = nn.Linear(128, 64, bias=False)
        scaled.weight.copy_(reader.weight * scales)
        errors.append((QuantizedLinear(scaled, config)(x / scales) - expected).square().sum())
    assert errors[0] < 0.3 * errors[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_command(processor, tmp_path, method):
    """It reads pictures and text as training does; what it writes loads."""
    save_model(tmp_path / "model", random_model(), processor)
    format = command.FORMATS[method][0]
    command_line = ["-m", "nanovlm.quant", str(tmp_path / "model"), str(tmp_path / "out"), "--format", format]
    options = ["--method", method, "--calibration", "scenes", "--num-samples", "3", "--seq-len", "128"]
    done = subprocess.run([sys.executable, *command_line, *options], capture_output=True, text=True, cwd=cli.PROJECT)
    assert done.returncode == 0 and "MB, before" in done.stdout, done.stderr
    assert "calibrating with" in done.stdout
    loaded, _ = nanovlm.load(tmp_path / "out")
    activations = "int8" if method == "smooth" else "none"
    assert loaded.config.quantization == QuantizationConfig(format, activations=activations)
