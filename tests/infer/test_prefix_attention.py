"""The engine where tokens of a prompt see each other in both directions: answers equal those without a cache."""

import dataclasses

import pytest
import torch

import nanovlm
from nanovlm.config import SamplingConfig
from nanovlm.errors import UserError
from nanovlm.infer import draft_model
from nanovlm.infer import engine as engine_module
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request
from nanovlm.model.inference import prepare
from nanovlm.model.vlm import VLM
from tests.infer.test_engine import ASKED, GREEDY, ask, finish
from tests.infer.test_fusion import check_answers
from tests.model.test_prefix_attention import KINDS, make_config, processors  # noqa: F401


def make_model(kind, **decoder):
    config = make_config(kind)
    torch.manual_seed(0)
    return VLM(dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **decoder))).eval()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def prompts(processors, kind):  # noqa: F811
    """Of which two begin with the same picture and words, and part in the second block."""
    asked = enumerate(zip([*ASKED[:3], f"{ASKED[2]} or not?"], (0, 1, 2, 2), strict=True))
    return [ask(processors[kind], text, *range(num)) for _, (text, num) in asked]


@pytest.mark.parametrize("chunk", [5, 512])
def test_equals_passes_without_a_cache(processors, kind, prompts, chunk, monkeypatch):  # noqa: F811
    """No chunk, and no limit of tiles, cuts a span; the second time what is cached is found."""
    monkeypatch.setattr(engine_module, "MOST_TILES", 1)
    model = make_model(kind)
    engine = Engine(model, num_rows=3, chunk=chunk)
    check_answers(model, processors[kind], prompts, engine)
    engine.submit(Request(prompts[2], GREEDY))
    _, ends = finish(engine)
    (end,) = ends.values()
    assert end.usage.cached_tokens >= 16
    check_answers(model, processors[kind], prompts[2:], engine)


@pytest.mark.parametrize("attention", ["triton", "flex"])
def test_other_backends_and_a_prepared_model(processors, attention):  # noqa: F811
    model = make_model("prompt", attention=attention, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    pytest.importorskip("triton")
    prompts = [ask(processors["prompt"], text, 3) for text in ASKED[:2]]
    check_answers(model, processors["prompt"], prompts, Engine(prepare(model), chunk=7))


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_draft_sees_the_spans_that_the_model_sees(kind, prompts, temperature, monkeypatch):
    """So all guesses of the model itself are accepted, however small its chunks; a causal draft sees none."""
    monkeypatch.setattr(draft_model, "MOST_TILES", 1)
    model, sampling = make_model(kind), SamplingConfig(max_new_tokens=12, temperature=temperature, seed=3)

    def guess(small):
        draft = draft_model.DraftModel(small, 4, chunk=6)
        engine, spans = Engine(model, num_rows=3, draft=draft), []
        begin = draft.cache.begin
        monkeypatch.setattr(draft.cache, "begin", lambda some: spans.extend(some) or begin(some))
        numbers = [engine.submit(Request(prompt, sampling)) for prompt in prompts]
        answers, ends = finish(engine, *numbers)
        assert draft.blocks.num_free == len(draft.blocks.all)
        usages = [ends[number, 0].usage for number in numbers]
        totals = [sum(getattr(usage, f"{name}_tokens") for usage in usages) for name in ("drafted", "accepted")]
        return [answers[number, 0] for number in numbers], *totals, any(span.lasts for span in spans)

    answers, drafted, accepted, sees = guess(model)
    assert drafted == accepted > 0 and sees
    causal = VLM(make_config("causal", model.config))
    causal.load_state_dict(model.state_dict())
    found, _, _, sees = guess(causal.eval())
    assert not sees and (temperature > 0 or found == answers)
    with pytest.raises(UserError, match=f"prefix_attention = {kind}, and the model causal: take a draft"):
        Engine(causal, draft=draft_model.DraftModel(model))


def test_generate_equals_the_engine(processors, kind, prompts):  # noqa: F811
    """As a batch of rows says the spans, too."""
    model = make_model(kind)
    engine = Engine(model)
    numbers = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
    answers, _ = finish(engine, *numbers)
    found = nanovlm.generate(model, processors[kind].batch(prompts), SamplingConfig(max_new_tokens=12))
    assert found == [answers[number, 0] for number in numbers]
    batch = processors[kind].batch(prompts)
    with torch.no_grad():
        gaps = (model.logits(batch) - model.logits(dataclasses.replace(batch, span_ids=None))).abs().amax((1, 2))
    assert gaps[2:].min() > 0.1  # so that it matters
