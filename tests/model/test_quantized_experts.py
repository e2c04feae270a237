"""Experts of a mixture in 8 and 4 bits: as if they were written out, in a folder, and under adapters."""

import copy
import dataclasses

import pytest
import torch

import nanovlm
from nanovlm.config import AdapterConfig, InitConfig, MoEConfig, ParallelConfig, QuantizationConfig, TrainConfig
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.kernels.quantized_weight import dequantize_ref
from nanovlm.model import quantized_experts
from nanovlm.model.adapters import adapt, disabled, merge
from nanovlm.model.inference import prepare
from nanovlm.model.moe import EXPERTS, MoE
from nanovlm.model.quantized import QuantizedLinear, quantize, quantize_weight
from nanovlm.model.quantized_experts import QUANTIZED_EXPERTS, STACKS, QuantizedStack
from nanovlm.model.vlm import VLM
from nanovlm.train import adapt as train_adapt
from nanovlm.train.parallel import recompute
from tests.conftest import TINY

FORMATS = ("int8", "int4", "nf4")
MIXTURE = dataclasses.replace(
    TINY,
    decoder=dataclasses.replace(
        TINY.decoder, moe=MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=24, num_shared_experts=1)
    ),
)


def stacks(E, W, D, format):
    """Random matrices, and the same in codes, each expert's by itself."""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(E, *shape, generator=generator) / 6 for shape in ((W, D), (W, D), (D, W))]
    coded = [QuantizedStack([quantize_weight(w, format, 32, search=False) for w in stack]) for stack in whole]
    return whole, coded


def random_mixture():
    torch.manual_seed(0)
    return VLM(MIXTURE).eval()


def written_out(model):
    """A copy whose experts are plain again, with the values that their codes stand for."""
    model = copy.deepcopy(model)
    for mixture in [module for module in model.modules() if isinstance(module, MoE)]:
        for name in STACKS:
            stack = getattr(mixture, name)
            delattr(mixture, name)
            weight = torch.stack([dequantize_ref(stack[e]) for e in range(len(stack))])
            setattr(mixture, name, torch.nn.Parameter(weight))
        mixture.run_experts = EXPERTS["loop"]
    return model


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_equals_the_loop_over_what_is_dequantised(format, backend):
    """Outputs and gradients; one expert has no token."""
    R, k, E, D, W = 17, 2, 4, 72, 40
    whole, coded = stacks(E, W, D, format)
    torch.manual_seed(1)
    choice = torch.rand(R, E - 1).argsort(-1)[:, :k]
    inputs = [torch.randn(R, D), torch.rand(R, k)]
    results = []
    for run, experts in (
        (QUANTIZED_EXPERTS[backend], coded),
        (EXPERTS["loop"], [stack.dequantize() for stack in coded]),
        (EXPERTS["loop"], whole),
    ):
        x, weights = (t.clone().requires_grad_() for t in inputs)
        y = run(x, choice, weights, *experts)
        results.append((y, *torch.autograd.grad((y * torch.linspace(-1, 1, D)).sum(), (x, weights))))
    for ours, expected, before in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_and_its_folder(format, processor, tmp_path):
    """Codes are those of each matrix alone; they stay when a model is cast, and when it is loaded again."""
    plain = random_mixture()
    model = quantize(random_mixture(), QuantizationConfig(format, 32, experts=True), search=False)
    for name in STACKS:
        stack = getattr(model.decoder.layers[1].mlp, name)
        for e, matrix in enumerate(getattr(plain.decoder.layers[1].mlp, name)):
            for ours, expected in zip(
                stack[e][3:7], quantize_weight(matrix, format, 32, search=False)[3:7], strict=True
            ):
                assert (ours is expected is None) or torch.equal(ours, expected)
    batch = processor.batch([processor.prompt([{"role": "user", "content": "why?"}], [])])
    with torch.no_grad():
        torch.testing.assert_close(model.logits(batch), written_out(model).logits(batch), rtol=1e-4, atol=1e-5)
        codes = {name: x for name, x in model.state_dict().items() if ".mlp.gate_proj." in name}
        model.bfloat16()
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in codes.items())
        assert torch.isfinite(model.logits(batch)).all()
    save_model(tmp_path / "model", model, processor)
    loaded, _ = nanovlm.load(tmp_path / "model")
    for name, x in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x), name
    with torch.no_grad():
        assert torch.equal(loaded.logits(batch), model.logits(batch))
    assert loaded.count_parameters() == model.count_parameters() and loaded.count_parameters()[0] > 0


def test_experts_stay_as_they_are_unless_asked_for():
    model = quantize(random_mixture(), QuantizationConfig("int8"))
    assert isinstance(model.decoder.layers[0].mlp.gate_proj, torch.nn.Parameter)
    alone = quantize(random_mixture(), QuantizationConfig("int8", layers=r"\.mlp\.(gate|up|down)_proj$", experts=True))
    assert isinstance(alone.decoder.layers[0].mlp.gate_proj, QuantizedStack)
    assert not any(isinstance(module, QuantizedLinear) for module in alone.modules())
    with pytest.raises(UserError, match="the model is quantised already, to int8"):
        quantize(alone, QuantizationConfig("int8"))
    with pytest.raises(UserError, match="is found in the name of no linear layer"):
        quantize(random_mixture(), QuantizationConfig("int8", layers=r"\.mlp\.gate_proj$", experts=True))
    broken = random_mixture()
    with torch.no_grad():
        broken.decoder.layers[1].mlp.up_proj[2, 0, 0] = torch.inf
    with pytest.raises(UserError, match=r"experts of decoder.layers.1.mlp cannot be quantised: it has weights that"):
        quantize(broken, QuantizationConfig("int8", experts=True))


# --- adapters (QLoRA) ------------------------------------------------------------------------------------------


def test_adapters_learn_beside_codes(processor):
    """As beside the same weights written out; the base is left alone by gradients and by disabling."""
    base = quantize(random_mixture(), QuantizationConfig("nf4", layers=r"_proj$", experts=True), search=False)
    batch = processor.batch([processor.prompt([{"role": "user", "content": "why?"}], [])])
    config, found = AdapterConfig(rank=2, target=r"\.mlp\.(gate|down)_proj$"), []
    expected = base.logits(batch)
    for model in (copy.deepcopy(base), written_out(base)):
        adapt(model, config)
        generator = torch.Generator().manual_seed(4)
        own = {name: p for name, p in model.named_parameters() if ".adapters." in name}
        with torch.no_grad():
            for parameter in own.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        logits = model.logits(batch)
        gradients = torch.autograd.grad(logits.square().sum(), list(own.values()))
        with disabled(model):
            torch.testing.assert_close(model.logits(batch), expected, rtol=1e-4, atol=1e-5)
        found.append((logits, *gradients))
    assert len(found[0]) == 1 + 2 * 2 * len(base.decoder.layers)
    for ours, written in zip(*found, strict=True):
        torch.testing.assert_close(ours, written, rtol=1e-4, atol=1e-4 * written.abs().max().item())
    assert not torch.allclose(found[0][0], expected, atol=1e-2)


def test_what_adapters_cannot_do_with_codes():
    model = quantize(random_mixture(), QuantizationConfig("int8", experts=True))
    with pytest.raises(UserError, match=r"pissa changes the base, but .*mlp is quantised"):
        adapt(model, AdapterConfig(rank=1, init="pissa", target=r"\.mlp\.up_proj$"))
    adapt(model, AdapterConfig(rank=1, target=r"\.mlp\.up_proj$"))
    with pytest.raises(UserError, match="is quantised: merged, it would be rounded again"):
        merge(model)


def test_a_run_rounds_experts_as_they_come():
    """Whole stacks, as our own folders have them, and one expert after the other, as files of the hub do."""
    adapter = AdapterConfig(rank=2, base="nf4", base_experts=True)
    config = TrainConfig(model=MIXTURE, init=InitConfig(model="somewhere"), adapter=adapter)
    plain = random_mixture()
    expected = quantize(random_mixture(), QuantizationConfig("nf4", experts=True), search=False).state_dict()
    for by_expert in (False, True):
        model = train_adapt.build(config).to_empty(device="cpu")
        places = train_adapt.base_places(model, adapter)
        for name, tensor in plain.state_dict().items():
            if by_expert and tensor.ndim == 3:
                for place, matrix in zip(places[name], tensor, strict=True):
                    place.copy_(matrix)
            else:
                places[name].copy_(tensor)
        ours = model.state_dict()
        assert all(torch.equal(ours[name], x) for name, x in expected.items())
    parallel = ParallelConfig(expert_ranks=3)
    with pytest.raises(UserError, match="expert_ranks = 3 must be 1 where experts are quantised"):
        train_adapt.build(dataclasses.replace(config, parallel=parallel))


# --- inference on a CPU, and experts with biases ------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_products_of_codes_for_inference(format, processor, monkeypatch):
    """As near to fp32 as written out in bf16; a state dict keeps its bits, and casting undoes all."""
    batch = processor.batch([processor.prompt([{"role": "user", "content": "why?"}], [])])
    config, called = QuantizationConfig(format, 32, experts=True), []
    model = quantize(random_mixture(), config)
    expected, original = model.logits(batch), random_mixture().logits(batch)
    eager = quantize(random_mixture().bfloat16(), config).logits(batch).float()
    before, stack = copy.deepcopy(model.state_dict()), model.decoder.layers[0].mlp.up_proj
    matrices = stack.dequantize()
    call = quantized_experts.multiply_packed
    monkeypatch.setattr(quantized_experts, "multiply_packed", lambda *args: called.append(1) or call(*args))
    found = prepare(model, int8_head=False).logits(batch)
    assert len(called) == 2 and not torch.equal(found, expected)
    allowed = 2 * (eager - expected).square().mean().sqrt()
    if format == "nf4":  # which is rounded once more
        allowed += 0.15 * (expected - original).square().mean().sqrt()
    assert (found - expected).square().mean().sqrt() <= allowed
    assert (stack.codes is None) == (format != "nf4")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(stack.dequantize(), matrices)
    model.float()
    assert stack.packed is None and torch.equal(stack.codes, before["decoder.layers.0.mlp.up_proj.codes"])
    prepare(model, int8_head=False).load_state_dict(before)
    with torch.enable_grad():  # whose products are those of before
        torch.testing.assert_close(model.logits(batch).detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_experts_with_biases(format, processor):
    """Of gpt-oss: outputs and gradients are those of the matrices written out, in a copy and prepared, too."""
    moe = dataclasses.replace(MIXTURE.decoder.moe, has_bias=True, experts="loop", num_shared_experts=0)
    torch.manual_seed(0)
    plain = VLM(dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=moe))).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    batch = processor.batch([processor.prompt([{"role": "user", "content": "why?"}], [])])
    model = quantize(copy.deepcopy(plain), QuantizationConfig(format, 32, experts=True), search=False)
    written, found = copy.deepcopy(model), []
    for mixture in [module for module in written.modules() if isinstance(module, MoE)]:
        for name in STACKS:
            weight = getattr(mixture, name).dequantize()
            delattr(mixture, name)
            setattr(mixture, name, torch.nn.Parameter(weight))
    duplicate = copy.deepcopy(model)
    for one in (model, duplicate, prepare(copy.deepcopy(model), int8_head=False), written, plain):
        table = one.decoder.embed_tokens.weight
        logits = one.logits(batch)
        found.append((logits.detach(), *torch.autograd.grad(logits.square().mean(), table)))
    *ours, expected, before = found
    for one in ours:
        for x, y, z in zip(one, expected, before, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())
            assert (x - z).abs().max() > 1e-3 * z.abs().max()
    model.decoder.layers[0].mlp.up_bias.data += 1  # which a copy does not see
    assert torch.equal(duplicate.logits(batch), found[1][0]) and not torch.equal(model.logits(batch), found[0][0])


@pytest.mark.parametrize("coded", [False, True], ids=["floats", "codes"])
def test_adapters_of_experts_with_biases(coded, processor):
    """A run builds on the meta device and fills what it built: as the matrices with what the adapters add."""
    moe = dataclasses.replace(MIXTURE.decoder.moe, has_bias=True, experts="loop", num_shared_experts=0)
    config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=moe))
    adapter = AdapterConfig(rank=2, target=r"\.mlp\.(gate|down)_proj$", base="nf4" if coded else "", base_experts=coded)
    run = TrainConfig(model=config, init=InitConfig(model="somewhere"), adapter=adapter)
    torch.manual_seed(0)
    plain, model = VLM(config).eval(), train_adapt.build(run).to_empty(device="cpu").eval()
    places = train_adapt.base_places(model, adapter)
    with torch.no_grad():
        for name, x in plain.state_dict().items():
            places[name].copy_(x.normal_() if name.endswith("bias") and ".mlp." in name else x)
        for name, x in model.named_parameters():
            if ".adapters." in name:
                x.normal_().mul_(0.3)
        expected = copy.deepcopy(plain)
        for name, layer in expected.named_modules():
            if coded and isinstance(layer, torch.nn.Linear) and isinstance(model.get_submodule(name), QuantizedLinear):
                layer.weight.copy_(model.get_submodule(name).dequantize())
        for mixture, adapted in zip(
            *([m for m in one.modules() if isinstance(m, MoE)] for one in (expected, model)), strict=True
        ):
            for stack in STACKS:
                if coded:
                    getattr(mixture, stack).copy_(getattr(adapted, stack).dequantize())
        base = copy.deepcopy(expected)
        for name, adapted in [(name, m) for name, m in model.named_modules() if isinstance(m, MoE)]:
            for stack in ("gate_proj", "down_proj"):
                own = adapted.adapters["default"][stack]
                getattr(expected.get_submodule(name), stack).add_(own.scale * own.lora_B @ own.lora_A)
    batch, embedding = processor.batch([processor.prompt([{"role": "user", "content": "why?"}], [])]), "embed_tokens"
    logits, gradients = [], []
    for one in (model, expected):
        logits.append(one.logits(batch))
        gradients.append(torch.autograd.grad(logits[-1].square().mean(), getattr(one.decoder, embedding).weight)[0])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * gradients[1].abs().max().item())
    with disabled(model), torch.no_grad():
        torch.testing.assert_close(model.logits(batch), base.logits(batch), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base.logits(batch), logits[1], atol=1e-3)


def test_what_adapters_of_coded_experts_keep():
    """The matrices that are written out do not stay until the backward pass."""
    model = quantize(random_mixture(), QuantizationConfig("nf4", experts=True), search=False)
    adapt(model, AdapterConfig(rank=1, target=r"\.mlp\.(gate|up|down)_proj$"))
    mixture, kept = model.decoder.layers[0].mlp, []
    with torch.no_grad():
        for parameter in mixture.adapters.parameters():
            parameter.normal_()
    x = torch.randn(1, 9, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = mixture(x)[0]
    matrix = mixture.gate_proj.shape[1] * mixture.gate_proj.shape[2]
    assert not any(t.untyped_storage().nbytes() >= 3 * matrix * 4 for t in kept)
    learned = [x, *mixture.adapters.parameters()]
    expected = torch.autograd.grad(y.square().sum(), learned)
    assert all(gradient.any() for gradient in expected)
    for which in ("full", "selective"):  # as a run may have its blocks computed again
        again = recompute(lambda x: mixture(x)[0], which)(x)
        assert torch.equal(again, y)
        assert all(map(torch.equal, torch.autograd.grad(again.square().sum(), learned), expected))
