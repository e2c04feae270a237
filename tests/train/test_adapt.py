"""Runs that learn adapters: what they start from, what moves, what they leave behind, and that they survive a kill."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import nanovlm
import train
from nanovlm.config import (
    AdapterConfig,
    InitConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    ParamRule,
    QuantizationConfig,
    TrainConfig,
)
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.model.adapters import adapted_layers, adapter_tensors, disabled, is_adapter, merged_tensors
from nanovlm.model.quantized import is_quantized, quantize
from nanovlm.model.vlm import VLM
from nanovlm.objectives import NextToken
from nanovlm.train import adapt, init, parallel
from nanovlm.train.optim import assign_rules, make_optimizers
from tests.conftest import TINY, make_batch, make_document
from tests.test_train import SMALL, comparable, metrics
from tests.train.test_init import make_hub, stage

ROOT = Path(__file__).parent.parent.parent
MOE = MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=16, num_shared_experts=1, experts="loop")
MIXTURE = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=MOE))
ADAPTERS = {
    "LoRA": AdapterConfig(rank=4),
    "DoRA": AdapterConfig(rank=4, use_dora=True, init="orthogonal", dropout=0.2, train=(r"^projector\.",)),
    "QLoRA": AdapterConfig(rank=4, use_dora=True, base="nf4", init="gaussian"),
    "int4": AdapterConfig(rank=4, base="int4"),
    "int8": AdapterConfig(rank=4, base="int8"),
}
pytestmark = pytest.mark.usefixtures("one_thread")


PROJECTIONS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


class Casts(TorchDispatchMode):
    """Notes the shapes of matrices that are cast to bf16."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            if isinstance(args[0], torch.nn.Parameter):
                self.shapes.add(args[0].shape)
        return func(*args, **kwargs or {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    """Models that have learned, plain, a mixture and quantised, and the model that runs of SMALL's size start from."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = VLM(TINY)
    save_model(folder / "plain", model, processor)
    save_model(folder / "mixture", VLM(MIXTURE), processor)
    save_model(folder / "stored in nf4", quantize(model, QuantizationConfig("nf4")), processor)
    return folder


def begin(folder, adapter, name="plain", precision="fp32", **changes):
    """Return the filled model of a new run, what training calls of it, and the run's config."""
    theirs = nanovlm.load(folder / name)[0].config
    config = TrainConfig(model=theirs, init=InitConfig(model=str(folder / name)), adapter=adapter, **changes).validate()
    torch.manual_seed(config.seed)
    _processor, fill = init.prepare(config, ())
    model = adapt.build(config)
    assign_rules(model, config.optim, adapter)
    return model, parallel.parallelize(model, config.parallel, torch.device("cpu"), precision, fill), config


# --- what a run starts from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ADAPTERS, "of a mixture", "stored in nf4"])
def test_a_run_starts_from_the_base_and_computes_what_it_does(folder, processor, name):
    """To the bit, rounded if it is to be, with nothing left uninitialised; and only adapters learn."""
    kind = {"of a mixture": "mixture", "stored in nf4": name}.get(name, "plain")
    adapter = ADAPTERS.get(name, ADAPTERS["LoRA"])
    model, base = begin(folder, adapter, kind)[0], nanovlm.load(folder / kind)[0]
    if adapter.base:
        quantize(base, QuantizationConfig(adapter.base), search=False)
    state = model.state_dict()
    assert all(x.isfinite().all() for x in state.values())
    for key, x in base.state_dict().items():
        assert torch.equal(state[key], x), key
    assert {key for key in state if not is_adapter(key)} == base.state_dict().keys()
    learning = {key for key, p in model.named_parameters() if p.requires_grad}
    assert (
        learning == {key for key in state if is_adapter(key) or (adapter.train and key.startswith("projector."))}
        and len(learning) >= 14
    )
    batch = make_batch([make_document(processor, 0, ("what?", "a cat"))])
    with torch.no_grad():
        found, expected = model.eval().logits(batch), base.logits(batch)
    assert (found - expected).norm() <= (0.3 if adapter.init == "orthogonal" else 1e-5) * expected.norm()


def test_a_run_of_parts_has_a_random_projector_beside_a_rounded_decoder(tmp_path):
    """From an encoder and a language model of the hub, whose vocabulary grows; nothing is left uninitialised."""
    hub = make_hub(tmp_path)
    config = stage(1, hub, tmp_path, adapter=ADAPTERS["QLoRA"], optim=OptimConfig())
    with pytest.raises(UserError, match=r"projector.proj.weight begins with random values .*: add \^projector to adap"):
        init.prepare(config, ())
    adapter = dataclasses.replace(config.adapter, train=("^projector",))
    config = dataclasses.replace(config, adapter=adapter)
    _processor, fill = init.prepare(config, ())
    model = adapt.build(config)
    parallel.parallelize(model, config.parallel, torch.device("cpu"), "fp32", fill)
    state, theirs = model.state_dict(), nanovlm.load(hub / "lm")[0]
    assert all(x.isfinite().all() for x in state.values()) and state["projector.proj.weight"].std() > 0.01
    codes = quantize(theirs, QuantizationConfig("nf4"), search=False).state_dict()
    rounded = [name for name in codes if is_quantized(name)]
    assert len(rounded) == 2 * 7 * 4 and all(torch.equal(state[name], codes[name]) for name in rounded)
    assert init.start(config, ())[0].state_dict().keys() == state.keys()


def test_values_depend_on_the_seed_alone(folder):
    first, again, other = (adapter_tensors(begin(folder, ADAPTERS["DoRA"], seed=seed)[0]) for seed in (0, 0, 1))
    assert all(torch.equal(x, again[key]) for key, x in first.items())
    assert not any(torch.equal(x, other[key]) for key, x in first.items() if key.endswith("lora_A"))


@pytest.mark.parametrize("kind", ["plain", "mixture"])
def test_the_optimizers_have_what_learns_and_nothing_else(folder, kind):
    """Rules choose among the optimizers, but muon has no magnitudes."""
    adapter = AdapterConfig(rank=4, use_dora=True, train=("^projector",))
    optim = OptimConfig(rules=(ParamRule("norm|embed|bias"), ParamRule("", optimizer="muon", weight_decay=0.1)))
    model, _replica, config = begin(folder, adapter, kind, optim=optim)
    optimizers = make_optimizers(model, config.optim, "fp32", adapter)
    of = {
        p: kind for kind, optimizer in optimizers.items() for group in optimizer.param_groups for p in group["params"]
    }
    for name, p in model.named_parameters():
        expected = "adamw" if name.endswith("magnitude") else "muon"
        decay = [
            g["weight_decay"] for o in optimizers.values() for g in o.param_groups if any(p is x for x in g["params"])
        ]
        assert decay == ([0.0 if name.endswith("magnitude") else 0.1] if p in of else [])
        assert of.get(p) == (expected if is_adapter(name) or name.startswith("projector.") else None), name
        assert p.requires_grad == (p in of)


def test_pissa_takes_its_values_out_of_the_base(folder, processor):
    model, base = begin(folder, AdapterConfig(rank=4, init="pissa"))[0], nanovlm.load(folder / "plain")[0]
    layers = adapted_layers(model)
    assert len(layers) == 14
    for path, layer in layers:
        before = base.get_submodule(path).weight
        values = torch.linalg.svdvals(before)
        assert torch.allclose(torch.linalg.svdvals(layer.weight)[: len(values) - 4], values[4:], atol=1e-5), path
        assert (layer.adapters["default"].effective(layer.weight) - before).norm() <= 1e-5 * before.norm()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(adapter=AdapterConfig(rank=4)), "adapter.rank = 4 adapts a model that has learned: name one by init"),
        (dict(adapter=AdapterConfig(rank=-1)), "adapter.rank = -1 must be at least 0"),
        (dict(adapter=AdapterConfig(base="nf4")), "adapter.base = 'nf4' needs adapters: give adapter.rank"),
        (dict(adapter=AdapterConfig(train=("a",))), r"adapter.train = \('a',\) needs adapters"),
        (dict(adapter=AdapterConfig(use_dora=True)), "adapter.use_dora = True needs adapters: give adapter.rank"),
        (dict(adapter=AdapterConfig(target="q_proj")), "adapter.target = 'q_proj' needs adapters"),
        (dict(adapter=AdapterConfig(rank=4, dropout=1.0)), "adapter.dropout = 1.0 must be at least 0 and below 1"),
        (dict(adapter=AdapterConfig(rank=4, alpha=0.0)), "adapter.alpha = 0.0 must be positive"),
        (dict(adapter=AdapterConfig(rank=3, init="orthogonal")), "needs an even adapter.rank, not 3"),
        (dict(adapter=AdapterConfig(rank=4, target="(")), r"adapter.target: '\(' is no regular expression"),
        (
            dict(model=dataclasses.replace(TINY, quantization=QuantizationConfig())),
            "must be None, as codes do not learn: give adapter.rank",
        ),
    ],
)
def test_mistakes_in_a_config_are_named(config, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **config).validate()


def test_mistakes_that_the_model_shows_are_named(folder):
    for adapter, name, changes, message in (
        (AdapterConfig(rank=4, train=("^projektor",)), "plain", {}, "pattern '.projektor' that holds for no parameter"),
        (
            AdapterConfig(rank=4, base="nf4", train=(r"layers\.1\.mlp\.up",)),
            "plain",
            {},
            "names decoder.layers.1.mlp.up_proj.weight, which has codes, which do not learn",
        ),
        (
            AdapterConfig(rank=4, train=("up_proj",)),
            "plain",
            {},
            "decoder.layers.0.mlp.up_proj.weight, which has an ad",
        ),
        (
            AdapterConfig(rank=4, train=("up_proj",)),
            "mixture",
            {},
            "up_proj' that names decoder.*, which has an adapter",
        ),
        (AdapterConfig(rank=4, base="int8"), "stored in nf4", {}, "adapter.base = int8 rounds a model that is not"),
        (AdapterConfig(), "stored in nf4", {}, "must be None, as codes do not learn"),
        (ADAPTERS["LoRA"], "mixture", {"parallel": ParallelConfig(expert_ranks=2)}, "must be 1 where experts have"),
    ):
        with pytest.raises(UserError, match=message):
            begin(folder, adapter, name, **changes)


def test_a_run_in_bf16_holds_frozen_matrices_in_it(folder, processor):
    """As it multiplies them, so gradients are the same to the bit; and nothing but adapters is cast in a step."""
    adapter, batch = (
        AdapterConfig(rank=4, train=("^projector",)),
        make_batch([make_document(processor, 0, ("what?", "a"))]),
    )
    wide, narrow = (begin(folder, adapter, precision=precision)[0] for precision in ("fp32", "bf16"))
    names = {name for name, p in narrow.named_parameters() if p.dtype == torch.bfloat16}
    frozen = {f"decoder.layers.{i}.{name}.weight" for i in range(2) for name in PROJECTIONS}
    assert frozen < names and not any("norm" in n or "embed" in n or "bias" in n or is_adapter(n) for n in names)
    expected = gradients(wide, batch, "bf16")
    with Casts() as casts:
        found = gradients(narrow, batch, "bf16")
    assert found.keys() == expected.keys() and all(torch.equal(x, found[key]) for key, x in expected.items())
    assert not casts.shapes & {p.shape for name, p in narrow.named_parameters() if name in frozen}


def test_what_a_run_in_bf16_leaves_is_in_fp32(folder, processor, tmp_path):
    model = begin(folder, AdapterConfig(rank=4, init="orthogonal"), precision="bf16")[0]
    adapt.save(tmp_path, "", model, processor, model.state_dict())
    saved = nanovlm.load(tmp_path / "model")[0].state_dict()
    key = "decoder.layers.0.mlp.up_proj"
    own = model.get_submodule(key)
    changed = own.adapters["default"].effective(own.weight.float())
    assert torch.allclose(saved[f"{key}.weight"], changed, rtol=0, atol=1e-6)
    assert {x.dtype for x in saved.values()} == {torch.float32}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_ranks_drop_other_inputs(monkeypatch, dropout):
    config, drawn = dataclasses.replace(SMALL, adapter=AdapterConfig(rank=2, dropout=dropout)), []
    for rank in (0, 1, 2):
        torch.manual_seed(config.seed)
        monkeypatch.setattr("nanovlm.distributed.rank", lambda rank=rank: rank)
        adapt.part_ranks(config)
        drawn.append(float(torch.rand(())))
    torch.manual_seed(config.seed)
    assert drawn[0] == float(torch.rand(())) and len(set(drawn)) == (3 if dropout else 1)


# --- a step ------------------------------------------------------------------------------------------------------


def gradients(model, batch, precision="fp32"):
    torch.manual_seed(0)  # of dropout
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = NextToken().loss(model, batch)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
@pytest.mark.parametrize("name", ["DoRA", "QLoRA", "of a mixture"])
def test_what_is_computed_again_is_the_same(folder, processor, name, checkpointing):
    """Dropout too: gradients are those of a pass that keeps everything, to the bit."""
    kind, adapter = ("mixture", ADAPTERS["LoRA"]) if name == "of a mixture" else ("plain", ADAPTERS[name])
    batch = make_batch([make_document(processor, 0, ("what?", "a cat"), ("and?", "no"))])
    expected = gradients(begin(folder, adapter, kind)[0], batch)
    found = gradients(begin(folder, adapter, kind, parallel=ParallelConfig(checkpointing=checkpointing))[0], batch)
    assert found.keys() == expected.keys() and all(torch.equal(x, found[key]) for key, x in expected.items())
    assert any(x.any() for x in expected.values()) and all(
        "lora" in key or "magn" in key or "proj." in key for key in found
    )


@pytest.mark.parametrize("name", ["DoRA", "QLoRA"])
def test_compiled_blocks_compute_the_same(folder, processor, name):
    """With and without adapters on, as torch.compile traces the blocks, here without writing C++."""
    adapter = dataclasses.replace(ADAPTERS[name], dropout=0.0)
    batch = make_batch([make_document(processor, 0, ("what?", "a cat"), ("and?", "no"))])
    expected, model = gradients(begin(folder, adapter)[0], batch), begin(folder, adapter)[0]
    graphs = []
    for block in model.decoder.layers:
        block.compile(
            backend=aot_autograd(
                fw_compiler=lambda graph, _inputs: graphs.append(graph) or make_boxed_func(graph.forward)
            )
        )
    found = gradients(model, batch)
    assert len(graphs) >= 1
    for key, x in expected.items():
        assert (found[key] - x).norm() <= 1e-6 * x.norm(), key
    with torch.no_grad(), disabled(model):
        base = model.logits(batch)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), disabled(model):
        assert (model.logits(batch) - base).norm() <= 1e-6 * base.norm()
    torch.compiler.reset()


# --- whole runs --------------------------------------------------------------------------------------------------

RULES = (ParamRule("norm|bias|embed|magnitude"), ParamRule("", weight_decay=0.01))
OPTIM = OptimConfig(lr=5e-3, steps=8, warmup_steps=2, rules=RULES)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A run's model that others adapt."""
    folder = tmp_path_factory.mktemp("start")
    optim = dataclasses.replace(SMALL.optim, steps=2)
    train.main(
        dataclasses.replace(SMALL, run_dir=str(folder), optim=optim, eval=dataclasses.replace(SMALL.eval, show=""))
    )
    return folder / "model"


def run_config(start, run_dir, adapter, **changes):
    """Adapt the model of `start`; changes are those of TrainConfig."""
    model = nanovlm.load(start)[0].config
    options = dict(run_dir=str(run_dir), model=model, init=InitConfig(model=str(start)), adapter=adapter, optim=OPTIM)
    none = dataclasses.replace(SMALL.eval, show="", show_every=0)
    return dataclasses.replace(SMALL, precision="fp32", eval=none, **options | changes)


@pytest.mark.parametrize("name", ["DoRA", "QLoRA"])
def test_a_run_learns_and_leaves_a_model(start, tmp_path, capsys, name):
    """Merged, or the rounded base and its adapter: either computes what the run did at its end."""
    adapter = ADAPTERS[name]
    config = run_config(start, tmp_path, adapter)
    train.main(config)
    out = capsys.readouterr().out
    assert "parameters learn (" in out
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[-1] < losses[0] - 0.02
    model, _processor = adapt.load(tmp_path, config, torch.device("cpu"))
    before, after = load_file(start / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    own = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model"
    assert (f"{prefix}.connector.modality_projection.proj.weight" in own) == (name == "DoRA")
    assert (
        len(own) == 7 * 3 + (name == "DoRA")
        and own[f"{prefix}.text_model.layers.0.self_attn.k_proj.lora_B.weight"].any()
    )
    if name == "DoRA":
        assert before.keys() == after.keys() and not adapted_layers(model)
        moved = {key for key, x in before.items() if not torch.equal(x, after[key])}
        assert moved == {key for key in before if ("decoder.layers" in key and "_proj" in key) or "projector" in key}
        assert "needs the adapter" not in out
    else:
        plain = quantize(nanovlm.load(start)[0], QuantizationConfig("nf4"), search=False).state_dict()
        assert plain.keys() == after.keys() and all(torch.equal(x, after[key]) for key, x in plain.items())
        assert "needs the adapter in" in out and len(adapted_layers(model)) == 7
        named = nanovlm.load(tmp_path / "adapter")[0].state_dict()  # with the model that the run rounded
        assert named.keys() == model.state_dict().keys()
        assert all(torch.equal(x, named[key]) for key, x in model.state_dict().items())
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4


KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from pathlib import Path
from tests.train.test_adapt import ADAPTERS, run_config
def die(): os.kill(os.getpid(), signal.SIGKILL)
{hook}
train.main(run_config(Path({start!r}), {run_dir!r}, ADAPTERS[{name!r}]))
"""
IN_STEP = """
step = train.train_step
def train_step(state, *args):
    if state.step == 5: die()
    return step(state, *args)
train.train_step = train_step
"""
IN_SAVE = """
from nanovlm.train import checkpoint
start, calls = checkpoint.dcp.async_save, []
def async_save(*args, **kwargs):
    calls.append(start(*args, **kwargs))
    if len(calls) == 3: die()
    return calls[-1]
checkpoint.dcp.async_save = async_save
"""


@pytest.mark.parametrize(("name", "hook"), [("DoRA", IN_STEP), ("QLoRA", IN_SAVE)])
def test_a_killed_run_goes_on_bit_for_bit(start, tmp_path, name, hook):
    """Dropout, projector and all; the model that it started from may be gone by then."""
    train.main(run_config(start, tmp_path / "unbroken", ADAPTERS[name]))
    folder = tmp_path / "start"
    folder.mkdir()
    for file in start.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    script = KILL.format(root=str(ROOT), hook=hook, start=str(folder), run_dir=str(tmp_path / "run"), name=name)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    config = run_config(folder, tmp_path / "run", ADAPTERS[name])
    (folder / "model.safetensors").unlink()
    train.main(config)
    assert comparable(metrics(tmp_path / "run")) == comparable(metrics(tmp_path / "unbroken"))
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        theirs, ours = load_file(tmp_path / "unbroken" / file), load_file(tmp_path / "run" / file)
        assert theirs.keys() == ours.keys() and all(torch.equal(x, ours[key]) for key, x in theirs.items())


def test_a_run_goes_on_from_an_adapter(start, tmp_path):
    """Of an earlier run: rank, kind and layers are those of its files, and it begins where that one ended."""
    first = ADAPTERS["DoRA"]
    train.main(run_config(start, tmp_path / "first", first))
    goes_on = InitConfig(model=str(start), adapter=str(tmp_path / "first" / "adapter"))
    config = run_config(start, tmp_path / "second", AdapterConfig(dropout=0.1), init=goes_on)
    taken = adapt.take_adapter(config)
    named = {"rank": 4, "alpha": 16.0, "use_rslora": False, "use_dora": True, "dropout": 0.1}
    assert {field: getattr(taken.adapter, field) for field in named} == named
    assert adapt.build(taken).state_dict().keys() == adapt.build(run_config(start, tmp_path, first)).state_dict().keys()
    assert taken.adapter.train == (r"^projector\.proj\.weight$",)
    named = AdapterConfig(rank=4, train=(r"^projector\.", r"^projector\.proj\.weight$"))
    again = adapt.take_adapter(dataclasses.replace(config, adapter=named)).adapter
    assert again == dataclasses.replace(taken.adapter, dropout=0.0, train=named.train)
    model, _ = init.start(taken, ())
    expected = load_file(tmp_path / "first" / "model" / "model.safetensors")
    merged = merged_tensors(model)
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(x, expected[key], rtol=0, atol=1e-6) for key, x in merged.items())
    train.main(config)
    again = load_file(tmp_path / "second" / "adapter" / "adapter_model.safetensors")
    assert again.keys() == load_file(tmp_path / "first" / "adapter" / "adapter_model.safetensors").keys()
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("first", "second")]
    assert sum(losses[1]) < sum(losses[0])
    saved = json.loads((tmp_path / "second" / "config.json").read_text())
    assert saved["adapter"]["rank"] == 4 and saved["init"]["adapter"] == goes_on.adapter
    gone = tmp_path / "first" / "adapter"
    (tmp_path / "second" / "eval.json").unlink()
    gone.rename(tmp_path / "elsewhere")
    train.main(config)  # goes on after its last step
    (tmp_path / "elsewhere").rename(gone)
    for changes, match in (
        (dict(adapter=AdapterConfig(rank=8)), r"adapter.rank = 8 cannot change the 4 of .*adapter: leave it out$"),
        (dict(init=InitConfig(adapter=goes_on.adapter)), "belongs to a model: name it by init.model"),
        (dict(adapter=AdapterConfig(init="pissa")), "adapter.init = pissa changes the model"),
        (
            dict(adapter=AdapterConfig(alpha=64.0)),
            r"adapter.alpha = 64.0 cannot change the 16.0 of .*adapter: leave it",
        ),
        (dict(init=InitConfig(model=str(start), adapter=str(start))), "holds no adapter"),
    ):
        with pytest.raises(UserError, match=match):
            train.main(dataclasses.replace(config, run_dir=str(tmp_path / "third"), **changes))
