"""Adapters: those of peft, off to the bit, merged and back, for each token its own, and never skipped."""

import copy
import dataclasses
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nanovlm
from nanovlm.config import AdapterConfig, DecoderConfig, MoEConfig, QuantizationConfig, VLMConfig
from nanovlm.data.types import Batch
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.kernels.quantized_weight import dequantize_ref
from nanovlm.model.adapted import ADAPTED, AdaptedLinear, Adapter, Adapters
from nanovlm.model.adapters import (
    activate,
    adapt,
    adapted_layers,
    adapter_tensors,
    count,
    disabled,
    for_tokens,
    learns,
    load_adapter,
    merge,
    merged_tensors,
    stack_adapters,
    unmerge,
)
from nanovlm.model.build import meta_model
from nanovlm.model.compiled import CompiledSteps
from nanovlm.model.inference import prepare
from nanovlm.model.moe import EXPERTS
from nanovlm.model.quantized import QuantizedLinear, quantize
from nanovlm.model.vlm import VLM
from nanovlm.train.adapt import INITS, draw_adapter
from tests.conftest import TINY, make_batch, make_document
from tests.train.test_init import make_hub

KINDS = {
    "LoRA": AdapterConfig(rank=4, alpha=8),
    "rsLoRA": AdapterConfig(rank=4, alpha=8, use_rslora=True),
    "DoRA": AdapterConfig(rank=4, alpha=8, use_dora=True),
}
MOE = MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=16, num_shared_experts=1, experts="loop")
MIXTURE = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=MOE))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def batch(processor):
    return make_batch([make_document(processor, 0, ("what?", "a cat"), ("and?", "no"))])


def random_model(config=TINY, biases=True):
    torch.manual_seed(0)
    decoder = config.decoder if config.decoder.moe else dataclasses.replace(config.decoder, qkv_bias=biases)
    model = VLM(dataclasses.replace(config, decoder=decoder)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def learned(model, config, name="default", seed=1):
    """Give a model an adapter that has learned: no matrix is zero, no magnitude that of the base."""
    adapt(model, config, name)
    torch.manual_seed(seed)
    draw_adapter(model, name)
    with torch.no_grad():
        for key, x in adapter_tensors(model, name).items():
            x.copy_(x * (1 + 0.3 * torch.rand_like(x)) if key.endswith("magnitude") else 0.3 * torch.randn_like(x))
    return model


def logits(model, batch):
    with torch.no_grad():
        return model.logits(batch)


def assert_near(ours, theirs, limit=1e-5):
    assert (ours - theirs).norm() <= limit * theirs.norm()


# --- against peft ----------------------------------------------------------------------------------------------


def as_in_peft(hub, config, **options):
    """Return a model of ours, and the same one in transformers with an adapter of peft whose values ours has."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    names = [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, use_rslora=config.use_rslora, use_dora=config.use_dora,
        lora_dropout=config.dropout, target_modules=names, **options,
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = get_peft_model(LlamaForCausalLM.from_pretrained(hub / "lm", dtype=torch.float32), lora)
    ours = adapt(nanovlm.load(hub / "lm")[0].float(), config)
    return ours, theirs


def their_tensors(theirs):
    """Return their adapter's tensors by our names."""
    found = {}
    for name, x in theirs.named_parameters():
        if "lora_" in name:
            path, _, field = name.removeprefix("base_model.model.model.").partition(".lora_")
            fields = {"A": "lora_A", "B": "lora_B", "m": "magnitude"}
            found[f"decoder.{path}.{fields[field[0]]}"] = x
    return found


def exchange(ours, theirs):
    """Let both have the same adapter, which has learned."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, x in their_tensors(theirs).items():
            x.copy_(x * (1 + 0.3 * torch.rand_like(x)) if name.endswith("magnitude") else 0.3 * torch.randn_like(x))
    load_adapter(ours, their_tensors(theirs))


def text_batch(ids):
    """A batch of one document of text for each row of ids."""
    B, T = ids.shape
    places = torch.arange(T).expand(B, T).contiguous()
    docs = torch.arange(B, dtype=torch.int32)[:, None].expand(B, T).contiguous()
    tiles = torch.zeros(0, 3, 16, 16, dtype=torch.uint8)
    return Batch(ids, torch.full_like(ids, -100), docs, torch.zeros_like(docs), places, tiles, docs[0, :0])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_peft(hub, monkeypatch, kind, dropout):
    """With dropout too, whose masks come from one seed: both drop before A, and, with DoRA, before W too."""
    config = dataclasses.replace(KINDS[kind], dropout=dropout)
    ours, theirs = as_in_peft(hub, config)
    exchange(ours, theirs)
    ours.train()
    theirs.train()
    ids = torch.randint(0, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    # Theirs runs q, k, v, o, gate, up, down in this order too, so equal draws meet.
    torch.manual_seed(5)
    expected = theirs(ids).logits
    torch.manual_seed(5)
    found = ours.logits(text_batch(ids))
    assert_near(found, expected)
    expected.square().mean().backward()
    found.square().mean().backward()
    own = {name.replace(".adapters.default.", "."): p.grad for name, p in ours.named_parameters()}
    for name, x in their_tensors(theirs).items():
        assert_near(own[name], x.grad, 1e-4 if dropout else 1e-5)
        assert x.grad.norm() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_those_of_peft(hub, kind):
    ours, theirs = as_in_peft(hub, KINDS[kind])
    exchange(ours, theirs)
    merged = theirs.merge_and_unload().state_dict()
    for name, x in merge(ours).state_dict().items():
        assert_near(x, merged[name.replace("decoder.", "model.")])


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_first_values_are_those_of_peft(hub, init):
    """To the bit, for one layer from one seed."""
    config = AdapterConfig(rank=4, alpha=8, init=init)
    layer = as_in_peft(hub, config)[1].get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    torch.manual_seed(7)
    if init == "orthogonal":
        layer.orthogonal_init("default")
    else:
        layer.reset_lora_parameters("default", {"kaiming": True}.get(init, init))
    adapter = Adapter((layer.out_features, layer.in_features), config, torch.float32, "cpu")
    torch.manual_seed(7)
    with torch.no_grad():
        INITS[init](adapter, torch.zeros(0))
    assert_near(adapter.lora_A, layer.lora_A["default"].weight, 1e-7)
    assert torch.equal(adapter.lora_B, layer.lora_B["default"].weight)
    assert adapter.lora_A.any() and adapter.lora_B.any() == (init == "orthogonal")


@pytest.mark.parametrize("use_dora", [False, True])
def test_pissa_is_that_of_peft(hub, use_dora):
    config = AdapterConfig(rank=4, alpha=8, init="pissa", use_dora=use_dora)
    ours, peft = as_in_peft(hub, config, init_lora_weights="pissa")
    draw_adapter(ours)
    own, tensors = adapter_tensors(ours), their_tensors(peft)
    assert own.keys() == tensors.keys()
    for name, x in tensors.items():
        if name.endswith("A"):  # singular vectors have either sign
            theirs = tensors[name[:-1] + "B"] @ x
            assert_near(own[name[:-1] + "B"] @ own[name], theirs)
        elif name.endswith("magnitude"):
            assert_near(own[name], x)
    for path, layer in adapted_layers(ours):
        base = peft.get_submodule("base_model.model." + path.replace("decoder.", "model.")).base_layer
        assert_near(layer.weight, base.weight)
    before = nanovlm.load(hub / "lm")[0].state_dict()
    for name, x in merged_tensors(ours).items():  # at the start nothing has changed
        assert_near(x, before[name])


# --- gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind):
    """In fp64, of x and all that learns; DoRA's of A and B are those with constant norms, so these are held still."""
    config = AdapterConfig(rank=2, alpha=3, target="q_proj", use_dora=KINDS[kind].use_dora)
    model = learned(random_model().double(), config)
    layer = model.decoder.layers[0].self_attn.q_proj
    adapter = layer.adapters["default"]
    norms = adapter.norms(layer.weight)
    adapter.norms = lambda weight: norms
    x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)
    inputs = (x, *adapter.parameters(), layer.weight, layer.bias)

    def run(x, *values):
        names = [f"adapters.default.{name}" for name, _ in adapter.named_parameters()] + ["weight", "bias"]
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, inputs)
    changed = layer.weight.detach() + adapter.scale * adapter.lora_B.detach() @ adapter.lora_A.detach()
    assert_near(norms, changed.square().sum(-1).sqrt(), 1e-12)


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_quantised_product_keeps_no_weight(monkeypatch, format, autocast):
    """Of the weight of 96 x 64 nothing that is as large is kept for the backward pass; its gradients are exact."""
    layer = QuantizedLinear(nn.Linear(64, 96), QuantizationConfig(format))
    plain = nn.Linear(64, 96)
    plain.load_state_dict({"weight": layer.dequantize(), "bias": layer.bias.detach()})
    x = torch.randn(2, 5, 64, requires_grad=True)
    kept, written = [], []

    def write(w):
        dense = dequantize_ref(w)
        written.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr("nanovlm.kernels.quantized_weight.dequantize_ref", write)  # in the forward pass
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
    assert len(written) == 1 and written[0]() is None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = plain(z := x.detach().clone().requires_grad_())
    assert torch.equal(y, expected) and max(kept, default=0) < 64 * 96
    for out in (y, expected):
        out.float().square().sum().backward()
    assert torch.equal(x.grad, z.grad) and x.grad.dtype == torch.float32
    assert_near(layer.bias.grad, plain.bias.grad, 1e-2 if autocast else 1e-6)


class Outputs(TorchDispatchMode):
    """Notes how large results are, and where they are."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.sizes |= {(out.numel(), out.data_ptr())} if isinstance(out, torch.Tensor) else set()
        return out


@pytest.mark.parametrize("bias", [True, False])
def test_dora_keeps_one_result_and_makes_no_other_weight(bias):
    """One tensor as large as the output is kept for the backward pass, and none as large as the weight is made."""
    layer = AdaptedLinear(64, 96, bias=bias).requires_grad_(False)
    layer.switch, layer.adapters = Adapters(), nn.ModuleDict()
    layer.switch.active = ("own",)
    layer.adapters["own"] = adapter = Adapter((96, 64), KINDS["DoRA"], torch.float32, "cpu")
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), Outputs() as made:
        layer(torch.randn(2, 5, 64, requires_grad=True))
    assert len({x.data_ptr() for x in kept if x.numel() == 2 * 5 * 96}) == 1
    assert {where for size, where in made.sizes if size == 64 * 96} == {layer.weight.data_ptr()}


def test_adapters_of_a_model_in_bf16_are_not_rounded(batch):
    """Merged, they are rounded once, as weights."""
    model = learned(random_model().to(torch.bfloat16), KINDS["DoRA"])
    wide = learned(random_model(), KINDS["DoRA"])
    wide.load_state_dict({key: x.float() for key, x in model.state_dict().items()})
    assert {x.dtype for x in adapter_tensors(model).values()} == {torch.float32}
    assert_near(logits(model, batch).float(), logits(wide, batch), 0.05)
    expected = merged_tensors(wide)
    for key, x in merge(model).state_dict().items():
        assert torch.equal(x, expected[key].bfloat16()), key


# --- on, off, merged, for each token -----------------------------------------------------------------------------

MODELS = {
    "plain": (TINY, None),
    "mixture": (MIXTURE, None),
    "int8": (TINY, "int8"),
    "int4": (TINY, "int4"),
    "nf4": (TINY, "nf4"),
}


def make(name):
    config, format = MODELS[name]
    model = random_model(config)
    return quantize(model, QuantizationConfig(format)) if format else model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_disabled_is_the_base_to_the_bit(batch, name, kind):
    model = make(name)
    expected = logits(model, batch)
    learned(model, KINDS[kind])
    found = logits(model, batch)
    assert (found - expected).norm() > 0.01 * expected.norm()
    with disabled(model):
        assert torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(model, batch), found)
    activate(model)
    assert torch.equal(logits(model, batch), expected)
    with disabled(random_model()):  # has none
        pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "mixture"])
def test_merged_it_is_plain_and_computes_the_same_and_comes_back_to_the_bit(batch, name, kind):
    model = make(name)
    base = copy.deepcopy(model.state_dict())
    found, state = logits(learned(model, KINDS[kind]), batch), copy.deepcopy(model.state_dict())
    assert state.keys() > base.keys() and all(torch.equal(x, state[key]) for key, x in base.items())
    stack_adapters(model)
    merge(merge(model))
    assert_near(logits(model, batch), found)
    assert not any("stacked" in vars(module) for module in model.modules())
    assert model.state_dict().keys() == base.keys() and not adapted_layers(model)
    assert not any(type(module) in ADAPTED.values() for module in model.modules())
    prepare(model)
    assert model.decoder.layers[0].self_attn.joined is not None
    assert_near(logits(model, batch), found)
    unmerge(model)
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())
    assert_near(logits(model, batch), found)
    with disabled(model):
        assert_near(logits(model, batch), logits(make(name), batch))


@pytest.mark.parametrize("name", MODELS)
def test_each_token_uses_its_own_adapter(processor, name):
    """Documents of one row with the first, the second, none and the third; of other ranks, with and without DoRA."""
    attention = r"^decoder.*(q|v|o)_proj$"
    model, kinds = make(name), [KINDS["LoRA"], KINDS["DoRA"], AdapterConfig(rank=2, target=attention, use_rslora=True)]
    for i, config in enumerate(kinds):
        learned(model, config, f"a{i}", seed=i)
    documents = [make_document(processor, i, (f"what is {i}?", "a cat")) for i in range(5)]
    batch = make_batch(documents, rows=2)
    chosen = torch.tensor([0, 1, -1, 2, 1, -1])  # of each document, by its number; the last is that of padding
    index = chosen[batch.doc_ids.long()]
    with for_tokens(model, index):
        found = logits(model, batch)
    for i in (-1, 0, 1, 2):
        activate(model, *([f"a{i}"] if i >= 0 else []))
        assert_near(found[index == i], logits(model, batch)[index == i])


def test_several_adapters_add_up(batch):
    """Two of LoRA are the one of twice the rank that has the matrices of both."""
    two = learned(learned(random_model(), KINDS["LoRA"], "a"), KINDS["LoRA"], "b", seed=2)
    activate(two, "a", "b")
    both = adapt(random_model(), dataclasses.replace(KINDS["LoRA"], rank=8, alpha=16))
    a, b = adapter_tensors(two, "a"), adapter_tensors(two, "b")
    load_adapter(both, {name: torch.cat((a[name], b[name]), 0 if name.endswith("A") else 1) for name in a})
    found = logits(two, batch)
    assert_near(found, logits(both, batch))
    assert_near(logits(merge(two), batch), found)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_experts_learn_as_those_that_are_changed(batch, backend, kind):
    """The gradients of A, B and m through each backend are those of the written-out weights of every expert."""
    moe = dataclasses.replace(MOE, experts=backend)
    decoder = dataclasses.replace(TINY.decoder, moe=moe)
    config = dataclasses.replace(KINDS[kind], target=r"mlp\.(gate|up|down)_proj$")
    model = learned(random_model(dataclasses.replace(TINY, decoder=decoder)), config)
    mixture = model.decoder.layers[0].mlp
    x = torch.randn(2, 7, 32)
    mixture(x)[0].square().sum().backward()
    choice = mixture.route(x.flatten(0, 1))
    weights = {}
    for stack in ("gate_proj", "up_proj", "down_proj"):
        adapter, base = mixture.adapters["default"][stack], getattr(mixture, stack).detach()
        a, b = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
        changed = [base[e] + 2 * b[e] @ a[e] for e in range(3)]
        if kind == "DoRA":
            m = adapter.magnitude.detach()
            changed = [m[e][:, None] * w / w.detach().norm(dim=1, keepdim=True) for e, w in enumerate(changed)]
        weights[stack] = (adapter, a, b, torch.stack(changed))
    y = EXPERTS["loop"](x.flatten(0, 1), choice.choice, choice.weights, *(w[3] for w in weights.values()))
    (y + mixture.shared(x.flatten(0, 1)).detach()).square().sum().backward()
    for adapter, a, b, _ in weights.values():
        assert_near(adapter.lora_A.grad, a.grad)
        assert_near(adapter.lora_B.grad, b.grad)


# --- a model and its adapters ------------------------------------------------------------------------------------


def test_the_number_of_parameters_of_a_published_model():
    """Qwen3-VL-2B's decoder on its seven projections, rank 8 with DoRA: counted on the meta device."""
    decoder = DecoderConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    model = meta_model(VLMConfig(vision=None, image_token_id=None, decoder=decoder))
    total, config = count(model)[1], AdapterConfig(rank=8, use_dora=True)
    adapt(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns(name, config))
    assert count(model) == (9_289_728, total + 9_289_728)
    quantized = quantize(meta_model(model.config), QuantizationConfig("nf4"), search=False)
    assert count(quantized)[1] == total


@pytest.mark.parametrize("name", MODELS)
def test_prepared_for_inference_no_adapter_is_skipped(batch, name):
    """Neither one that was there before, nor one that came after; and products that are joined stay for others."""
    model = make(name)
    first = dataclasses.replace(KINDS["DoRA"], target=r"layers\.0.*(q|gate|down)_proj$")
    expected = logits(learned(model, first), batch)
    limit = 1e-5 if MODELS[name][1] is None else 0.05  # packed products are in bf16
    prepare(model, int8_head=False)
    assert model.decoder.layers[0].self_attn.joined is None and model.decoder.layers[1].self_attn.joined is not None
    assert_near(logits(model, batch), expected, limit)
    steps = CompiledSteps(model.decoder)
    assert steps.is_current()
    learned(model, KINDS["LoRA"], "second")
    assert not steps.is_current()
    exact = make(name)
    learned(exact, KINDS["LoRA"], "second")
    assert_near(logits(model, batch), logits(exact, batch), limit)
    with pytest.raises(UserError, match="with adapters, which may change, cannot be compiled: merge it"):
        prepare(model, compiles=True)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_one_tensor(tmp_path, processor, batch, tied):
    """Through adapt, merge and a folder; nothing else than the targets changes."""
    decoder = dataclasses.replace(TINY.decoder, tie_word_embeddings=tied)
    model = learned(random_model(dataclasses.replace(TINY, decoder=decoder)), KINDS["DoRA"])
    for _ in range(2):
        weight, table = model.decoder.head_weight, model.decoder.embed_tokens.weight
        assert (weight is table) == tied and ("decoder.lm_head.weight" in model.state_dict()) != tied
        found = logits(model, batch)
        merge(model)
    save_model(tmp_path / "model", model, processor)
    again = nanovlm.load(tmp_path / "model")[0]
    assert (again.decoder.head_weight is again.decoder.embed_tokens.weight) == tied
    assert_near(logits(again, batch), found)


def test_a_copy_of_a_model_has_its_own_switch(batch):
    model = learned(random_model(), KINDS["LoRA"])
    twin = copy.deepcopy(model)
    expected = logits(twin, batch)
    with disabled(model):
        assert torch.equal(logits(twin, batch), expected) and not torch.equal(logits(model, batch), expected)


def test_in_bf16_and_moved(batch):
    """A cast model computes as near to fp32 as one without adapters does."""
    for format in (None, "nf4"):
        model = random_model() if format is None else quantize(random_model(), QuantizationConfig(format))
        expected = logits(learned(model, KINDS["DoRA"]), batch)
        found = logits(model.to(torch.bfloat16), batch)
        assert found.dtype == torch.bfloat16
        assert_near(found.float(), expected, 0.05)


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (AdapterConfig(rank=2, target="(q_proj|lm_head)"), "plain", "names decoder.lm_head, which cannot"),
        (
            AdapterConfig(rank=2, target=r"^decoder\..*(q_proj|lm_head)$"),
            "plain",
            "names decoder.lm_head, which cannot",
        ),
        (AdapterConfig(rank=128, init="pissa"), "plain", "rank = 128 singular values, and decoder.*q_proj has 32: low"),
        (
            AdapterConfig(rank=17, init="pissa", target="up_proj"),
            "mixture",
            "= 17 singular values, and decoder.* has 16: low",
        ),
        (AdapterConfig(rank=2, target="embed_tokens"), "plain", "names decoder.embed_tokens, which cannot"),
        (AdapterConfig(rank=2, target="router"), "mixture", r"names decoder.layers.0.mlp.router, which cannot"),
        (AdapterConfig(rank=2, target="w1"), "plain", "'w1' is found in the name of no linear layer"),
        (AdapterConfig(rank=2, dropout=0.1), "mixture", "dropout = 0.1 cannot be applied to decoder.layers.0.mlp"),
        (AdapterConfig(rank=2, init="pissa"), "nf4", "pissa changes the base, but decoder.layers.0.self_attn.q_proj"),
    ],
)
def test_what_cannot_have_an_adapter_is_named(config, name, message):
    config_of_model, format = MODELS[name]
    decoder = dataclasses.replace(config_of_model.decoder, tie_word_embeddings=False)
    model = random_model(dataclasses.replace(config_of_model, decoder=decoder))
    model = quantize(model, QuantizationConfig(format)) if format else model
    before = dict(model.named_modules())
    with pytest.raises(UserError, match=message):
        adapt(model, config)
    assert dict(model.named_modules()) == before and model.adapters is None
    adapt(model, AdapterConfig(rank=2, target=r"^(decoder|vision)\."))  # all in them that can
    paths = {path for path, _ in adapted_layers(model)}
    assert "vision.layers.0.mlp.fc1" in paths and "decoder.lm_head" not in paths and "decoder" not in paths
    assert not any(path.endswith("router") for path in paths)


def test_other_mistakes_are_named(batch):
    model = learned(random_model(), KINDS["LoRA"])
    for run, message in (
        (lambda: adapt(model, KINDS["LoRA"]), "adapted already, by one called default"),
        (lambda: adapt(model, KINDS["LoRA"], "a.b"), "cannot be called 'a.b'"),
        (
            lambda: adapt(merge(learned(random_model(), KINDS["LoRA"])), KINDS["LoRA"], "b"),
            "merged: unmerge it first",
        ),
        *(
            (lambda word=word: adapt(model, KINDS["LoRA"], word), f"cannot be called {word}, a word of torch's own")
            for word in ("type", "train", "keys", "training")
        ),
        (lambda: activate(model, "german"), "there is no adapter german; there are default"),
        (lambda: load_adapter(model, {}), "is missing"),
        (lambda: load_adapter(model, adapter_tensors(model) | {"x": torch.zeros(1)}), "x is unknown"),
        (lambda: merge(learned(make("nf4"), KINDS["LoRA"])), "is quantised: merged, it would be rounded again"),
    ):
        with pytest.raises(UserError, match=message):
            run()
    assert list(model.adapters.configs) == ["default"] and len(adapted_layers(model)) == 14
    wrong = {name: x[..., :1] for name, x in adapter_tensors(model).items()}
    with pytest.raises(UserError, match=r"has shape \[\d+, 1\], not"):
        load_adapter(model, wrong)
    seeing = learned(random_model(), AdapterConfig(rank=2, target=r"^vision.*fc1"))
    with pytest.raises(UserError, match=r"vision.layers.0.mlp.fc1 has an adapter and sees no tokens"):
        with for_tokens(seeing, torch.zeros(1, 1)):
            pass
