"""Requests with adapters of their own, in one pass: the answers of each adapter alone, and of the merged model."""

import copy
import dataclasses

import pytest
import torch

from nanovlm import serve
from nanovlm.config import AdapterConfig, MoEConfig, QuantizationConfig, SamplingConfig
from nanovlm.errors import UserError
from nanovlm.hub.adapters import attach_all, save_adapter
from nanovlm.hub.model_folder import save_model
from nanovlm.infer.adapters import settle
from nanovlm.infer.draft_model import DraftModel
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request
from nanovlm.infer.speculate import PromptLookup
from nanovlm.model.adapted import Adapter
from nanovlm.model.adapters import activate, adapt, adapter_tensors, merge, remove
from nanovlm.model.inference import prepare
from nanovlm.model.quantized import quantize
from nanovlm.model.vlm import VLM
from nanovlm.train.adapt import draw_adapter
from tests.conftest import TINY
from tests.infer.serving import started
from tests.infer.test_engine import ask, finish, written_out

GREEDY = SamplingConfig(max_new_tokens=8)
CONFIGS = {
    "lora": AdapterConfig(rank=4),
    "dora": AdapterConfig(rank=2, use_dora=True, use_rslora=True),
    "few": AdapterConfig(rank=8, target=r"decoder.layers\.1\.self_attn\.(q|v)_proj"),
}
MOE = MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=16, num_shared_experts=1, experts="loop")
pytestmark = pytest.mark.usefixtures("one_thread")


def add(model, name, config, seed):
    """Give a model an adapter that has learned."""
    adapt(model, config, name)
    torch.manual_seed(seed)
    draw_adapter(model, name)
    with torch.no_grad():
        for key, x in adapter_tensors(model, name).items():
            x.copy_(x * (1 + 0.3 * torch.rand_like(x)) if key.endswith("magnitude") else 0.4 * torch.randn_like(x))


def make_model(kind="dense"):
    torch.manual_seed(0)
    config = TINY
    if kind == "mixture":
        config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=MOE))
    model = VLM(config).eval()
    if kind in ("nf4", "int8"):
        quantize(model, QuantizationConfig(kind))
    for seed, (name, adapter) in enumerate(CONFIGS.items()):
        add(model, name, adapter, seed)
    activate(model)
    return model


@pytest.fixture
def prompts(processor):
    return [
        ask(processor, "what color is the circle?", 1),
        ask(processor, "why?"),
        ask(processor, "where is the red star relative to the blue cross?", 1, 2),
    ]


def answer(engine, prompts, names):
    numbers = [engine.submit(Request(p, GREEDY, adapter=name)) for name in names for p in prompts]
    answers, ends = finish(engine)
    assert {end.reason for end in ends.values()} <= {"stop", "length"}
    return {name: [answers[n, 0] for n in numbers[i * len(prompts) :][: len(prompts)]] for i, name in enumerate(names)}


NAMES = [None, *CONFIGS]


@pytest.mark.parametrize("kind", ["dense", "mixture", "nf4", "int8"])
def test_answers_are_those_of_each_adapter_alone(processor, prompts, kind):
    """Without a cache, by passes in which one adapter is active; and merged."""
    model = make_model(kind)
    expected = {}
    for name in NAMES:
        activate(model, *([name] if name else []))
        expected[name] = [written_out(model, processor, prompt, 8)[0] for prompt in prompts]
        if kind in ("dense", "mixture") and name:
            merged = merge(copy.deepcopy(model))
            assert [written_out(merged, processor, prompt, 8)[0] for prompt in prompts] == expected[name]
    activate(model)
    together = answer(Engine(model, num_rows=5, chunk=20), prompts, NAMES)
    assert together == expected
    assert len({str(own) for own in together.values()}) == len(NAMES)  # each is another model
    prepare(model)  # which has a head in int8 where weights are quantised
    alone = {name: answer(Engine(model, read_every=3), prompts, [name])[name] for name in NAMES}
    assert alone == expected or kind in ("nf4", "int8")
    assert answer(Engine(model, num_rows=5), prompts, NAMES[::-1]) == alone


def test_no_block_is_shared_between_adapters_but_pictures_are(processor, prompts):
    model = make_model()
    engine = Engine(model)
    fresh = {name: answer(Engine(model), prompts, [name])[name] for name in NAMES}
    for name in NAMES:  # one after the other, so that all blocks of the others are there to be found
        assert answer(engine, prompts, [name])[name] == fresh[name]
    assert engine.features.num_encoded == 2
    number = engine.submit(Request(prompts[2], GREEDY, adapter="dora"))
    _, ends = finish(engine)
    assert ends[number, 0].usage.cached_tokens > 0  # its own are found


def test_an_adapter_of_the_same_name_is_another(processor, prompts):
    """Its predecessor's blocks are not its own; adapters come and go while an engine runs."""
    model = make_model()
    engine = Engine(model)
    before = answer(engine, prompts, ["lora"])["lora"]
    remove(model, "lora")
    with pytest.raises(UserError, match="there is no adapter lora: there are dora, few"):
        engine.submit(Request(prompts[0], GREEDY, adapter="lora"))
    add(model, "lora", CONFIGS["lora"], seed=7)
    activate(model)
    after = answer(engine, prompts, ["lora", "few"])
    assert after == {name: answer(Engine(model), prompts, [name])[name] for name in ("lora", "few")}
    assert after["lora"] != before
    add(model, "new", CONFIGS["dora"], seed=9)
    activate(model)
    assert answer(engine, prompts, ["new"]) == answer(Engine(model), prompts, ["new"]) != {"new": after["lora"]}
    remove(model, "new")
    for name in CONFIGS:
        remove(model, name)
    assert answer(engine, prompts, [None]) == answer(Engine(model), prompts, [None])


def test_what_is_active_answers_where_no_name_is_given(processor, prompts):
    model = make_model()
    engine = Engine(model)
    expected = {name: answer(engine, prompts, [name])[name] for name in NAMES}
    activate(model, "lora")
    assert answer(engine, prompts, [None, "dora"]) == {None: expected["lora"], "dora": expected["dora"]}
    assert answer(engine, prompts, [None]) == {None: expected["lora"]}
    activate(model, "lora", "few")
    both = answer(engine, prompts, [None])[None]
    assert both == [written_out(model, processor, prompt, 8)[0] for prompt in prompts] != expected["lora"]
    with pytest.raises(UserError, match="cannot choose adapter dora while lora and few are active together"):
        engine.submit(Request(prompts[0], GREEDY, adapter="dora"))


def test_the_norms_of_what_is_active_are_computed_once(processor, prompts, monkeypatch):
    """By an engine, not for every token, and anew by the next engine, as adapters may have learned."""
    model, norms, computed = make_model(), Adapter.norms, []
    activate(model, "dora")
    monkeypatch.setattr(Adapter, "norms", lambda *args: computed.append(args[0]) or norms(*args))
    first = answer(Engine(model), prompts, [None])
    assert len(computed) == len(set(computed)) == 14
    with torch.no_grad():
        for x in adapter_tensors(model, "dora").values():
            x.copy_(x.flip(0))
    second = answer(Engine(model), prompts, [None])[None]
    assert second == [written_out(model, processor, prompt, 8)[0] for prompt in prompts] != first[None]


def test_pictures_of_an_adapted_encoder_are_its_own(processor, prompts):
    model = make_model()
    for name in CONFIGS:
        remove(model, name)
    engine = Engine(model)
    plain = answer(engine, prompts, [None])
    add(model, "eyes", AdapterConfig(rank=4, target=r"vision\..*(fc1|q_proj)"), 3)
    changed = answer(engine, prompts, [None])
    assert changed == answer(Engine(model), prompts, [None]) != plain
    activate(model)
    assert answer(engine, prompts, [None]) == plain
    with pytest.raises(
        UserError, match=r"adapter .* changes vision\..*, which sees no tokens, so no request can choose"
    ):
        engine.submit(Request(prompts[0], GREEDY, adapter="eyes"))


def test_guesses_change_no_answer(processor, prompts):
    model = make_model()
    expected = answer(Engine(model), prompts, NAMES)
    base = VLM(TINY).eval()
    base.load_state_dict({key: x for key, x in model.state_dict().items() if ".adapters." not in key})
    for draft in (PromptLookup(3), DraftModel(base, 3)):
        assert answer(Engine(model, draft=draft), prompts, NAMES) == expected


def test_what_cannot_be_asked_is_named(processor, prompts):
    plain = VLM(TINY).eval()
    with pytest.raises(UserError, match="there is no adapter lora: the model has none"):
        Engine(plain).submit(Request(prompts[0], GREEDY, adapter="lora"))
    model = make_model()
    with pytest.raises(UserError, match="there is no adapter other: there are lora, dora, few"):
        Engine(model).submit(Request(prompts[0], GREEDY, adapter="other"))
    with pytest.raises(UserError, match="cannot be compiled: merge it"):
        prepare(model, compiles=True)
    activate(model, "lora")
    with pytest.raises(UserError, match="the model is merged, so a request cannot choose adapter dora: unmerge it"):
        Engine(merge(model)).submit(Request(prompts[0], GREEDY, adapter="dora"))


def test_a_server_has_them_as_models(processor, tmp_path, prompts):
    """Each by its name, in whole answers, in streams, in what led to an answer, and in the list of models."""
    model = make_model()
    base = VLM(TINY)
    base.load_state_dict({key: x for key, x in model.state_dict().items() if ".adapters." not in key})
    save_model(tmp_path / "model", base, processor)
    for name in ("lora", "dora"):
        save_adapter(tmp_path / name, model, name)
    given = [f"{name}={tmp_path / name}" for name in ("lora", "dora")]
    expected = answer(Engine(prepare(model)), [ask(processor, "why?")], [None, "lora", "dora"])
    with started(tmp_path / "model", "--name", "base", "--adapter", *given) as server:
        listed = server.get("/v1/models").json()["data"]
        assert [(one["id"], one.get("parent")) for one in listed] == [
            ("base", None),
            ("lora", "base"),
            ("dora", "base"),
        ]
        assert server.get("/v1/models/dora").json() == listed[2]
        for name in (None, "lora", "dora", "lora"):
            body = {"model": name or "base", "messages": [{"role": "user", "content": "why?"}], "temperature": 0}
            body |= {"max_tokens": 8, "return_token_ids": True, "logprobs": True}
            told = server.post(body=body).json()
            assert told["model"] == (name or "base") and told["choices"][0]["token_ids"] == expected[name][0]
            assert f'"model":"{name or "base"}"' in server.post(body=body | {"stream": True}).text
            asked = {key: body[key] for key in ("model", "messages")} | {"answer_ids": expected[name][0]}
            look = server.post("/v1/look", asked).json()
            logprobs = [one["logprob"] for one in told["choices"][0]["logprobs"]["content"]]
            assert [one["logprob"] for one in look["tokens"]] == pytest.approx(logprobs, abs=1e-3)
        reply = server.post(body=body | {"model": "few"})
        assert reply.status_code == 404 and "this server has 'base', 'lora', 'dora'" in reply.text


def test_a_model_keeps_its_own_adapter_beside_those_that_requests_choose(processor, tmp_path, prompts):
    """As a run leaves it on a quantised base, which cannot be merged."""
    model = make_model("nf4")
    for name in ("lora", "dora"):
        save_adapter(tmp_path / name, model, name)
    activate(model, "lora")
    expected = answer(Engine(model), prompts, [None, "dora"])
    remove(model, "dora"), remove(model, "few")
    settle(model)
    attach_all(model, [f"dora={tmp_path / 'dora'}"])
    assert answer(Engine(model), prompts, [None, "dora"]) == expected and expected[None] != expected["dora"]


def test_a_server_names_what_it_cannot_serve(processor, tmp_path):
    model = make_model()
    save_model(tmp_path / "model", VLM(TINY), processor)
    save_adapter(tmp_path / "lora", model, "lora")
    one, sees = f"lora={tmp_path / 'lora'}", f"sees={tmp_path / 'sees'}"
    add(model := VLM(TINY).eval(), "sees", AdapterConfig(rank=2, target=r"\.fc1$"), 0)
    save_adapter(tmp_path / "sees", model, "sees")
    config = serve.ServeConfig(str(tmp_path / "model"), port=0, adapter=(one,))
    for changes, match in (
        (dict(name="lora"), "the model and an adapter are both called lora: give --name"),
        (dict(compile=True), "cannot be compiled: merge it, or leave --compile out"),
        (dict(adapter=(one, one)), "adapted already, by one called lora"),
        (dict(adapter=(f"x={tmp_path / 'model'}",)), "holds no adapter"),
        (dict(adapter=(one, sees)), r"adapter sees changes vision\..*, which sees no tokens, so no request can choose"),
    ):
        with pytest.raises(UserError, match=match):
            serve.main(dataclasses.replace(config, **changes))
