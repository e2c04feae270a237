"""Compiled decode steps: the answers of the steps as they are written, and never those of another decoder."""

import copy
import itertools

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from nanovlm.config import QuantizationConfig, SamplingConfig
from nanovlm.errors import UserError
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request, Token
from nanovlm.model.compiled import MOST_ROWS, CompiledSteps
from nanovlm.model.inference import prepare
from nanovlm.model.quantized import quantize
from tests.conftest import noise
from tests.model.test_inference import random_model

IS_OLD = torch.backends.cpu.get_cpu_capability() == "DEFAULT"
new_enough = pytest.mark.skipif(IS_OLD, reason="torch cannot compile for a CPU without AVX2")
LENGTHS = (9, 3, 6, 2, 7)  # of the answers, so that all of 1 to 5 rows are answering at some time


@pytest.fixture(autouse=True)
def forget_graphs():
    yield
    torch.compiler.reset()


def answer(model, processor, lengths=LENGTHS):
    """Answers and the log-probabilities of their tokens, [request][token]."""
    engine = Engine(model, num_rows=MOST_ROWS + 4)
    engine.stops = []
    for i, num in enumerate(lengths):
        prompt = processor.prompt([{"role": "user", "content": f"what is {i}?"}], [noise(i)] * (i % 2))
        engine.submit(Request(prompt, SamplingConfig(max_new_tokens=num), num_logprobs=0))
    answers, logprobs = [[] for _ in lengths], [[] for _ in lengths]
    while not engine.is_idle:
        for event in engine.step():
            if isinstance(event, Token):
                answers[event.request].append(event.id)
                logprobs[event.request].append(event.logprob)
    return answers, torch.tensor([*itertools.chain(*logprobs)])


def count_steps(monkeypatch):
    """Return a list that grows with the rows of each compiled step."""
    taken, forward = [], CompiledSteps.forward

    def count(self, decoder, x_BTD, *args):
        taken.append(x_BTD.shape[1])
        return forward(self, decoder, x_BTD, *args)

    monkeypatch.setattr(CompiledSteps, "forward", count)
    return taken


@new_enough
@pytest.mark.parametrize("name", ["plain", "biases", "norms of heads", "norms of all heads"])
def test_equal_to_the_steps_as_written(processor, monkeypatch, name):
    """In fp32, for all numbers of rows, by two graphs."""
    model = prepare(random_model(name))
    expected, expected_logprobs = answer(model, processor)
    before, taken = counters["stats"]["unique_graphs"], count_steps(monkeypatch)
    prepare(model, compiles=True)
    found, logprobs = answer(model, processor)
    assert found == expected and set(taken) == {1, 2, 3, 4, 5}
    assert (logprobs - expected_logprobs).abs().max() <= 1e-5
    assert counters["stats"]["unique_graphs"] - before == 2


@new_enough
@pytest.mark.parametrize("format", ["none", "int8", "int4"])
def test_in_bf16_as_near_to_fp32(processor, monkeypatch, format):
    """Log-probabilities of the same tokens, whichever of them are likeliest."""
    monkeypatch.setattr("nanovlm.infer.engine.choose", lambda logits, *_: torch.arange(len(logits)) * 7 % 400)

    def build(dtype):
        model = random_model(dtype=dtype)
        return model if format == "none" else quantize(model, QuantizationConfig(format, 32))

    exact, model = build(torch.float32), build(torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    tokens, expected = answer(exact, processor)
    same, eager = answer(prepare(model), processor)
    taken = count_steps(monkeypatch)
    again, found = answer(prepare(model, compiles=True), processor)
    assert same == again == tokens and taken
    assert 0 < (found - expected).square().mean().sqrt() <= 1.5 * (eager - expected).square().mean().sqrt()


@new_enough
def test_many_rows_and_prompts_are_not_compiled(processor, monkeypatch):
    model, lengths = prepare(random_model()), (2,) * (MOST_ROWS + 1)
    expected = answer(model, processor, lengths)[0]
    prepare(model, compiles=True)
    taken = count_steps(monkeypatch)
    assert answer(model, processor, lengths)[0] == expected and not taken


CHANGES = {
    "replaced": lambda model: setattr(model.decoder.layers[1], "mlp", random_model(seed=2).decoder.layers[1].mlp),
    "quantised": lambda model: quantize(model, QuantizationConfig("int8", 32)),
    "cast": lambda model: model.double().float(),
    "loaded": lambda model: model.load_state_dict(random_model(seed=2).state_dict()),
}


@new_enough
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_decoder_is_not_the_compiled_one(processor, monkeypatch, change):
    model, expected = prepare(random_model(), compiles=True), random_model()
    taken = count_steps(monkeypatch)
    before = answer(model, processor)[1]
    assert taken
    taken.clear()
    change(model)
    change(expected)
    expected = answer(expected, processor)[1]
    assert (answer(model, processor)[1] - expected).abs().max() <= 1e-5 and not taken
    assert change is CHANGES["cast"] or (before - expected).abs().max() > 1e-4
    prepare(model, compiles=True)
    answer(model, processor)
    assert taken
    assert prepare(model, compiles=True).decoder.compiled is model.decoder.compiled


@new_enough
def test_each_decoder_has_graphs_of_its_own(processor, monkeypatch):
    """Also one with fewer layers, as a draft has."""
    model, small = random_model(), random_model(seed=1)
    del small.decoder.layers[1:]
    expected = [answer(x, processor)[0] for x in (model, small)]
    for x in (model, small):
        prepare(x, compiles=True)
    taken = count_steps(monkeypatch)
    assert [answer(x, processor)[0] for x in (model, small)] == expected and taken
    twin = copy.deepcopy(model)
    assert twin.decoder.compiled is None and answer(twin, processor)[0] == expected[0]


def test_what_cannot_be_compiled_says_so(monkeypatch):
    with pytest.raises(UserError, match="mixture of experts"):
        prepare(random_model("mixture"), compiles=True)
    if IS_OLD:
        with pytest.raises(UserError, match="without AVX2"):
            prepare(random_model(), compiles=True)
        return
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
            prepare(random_model(), compiles=True)
