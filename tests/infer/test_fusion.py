"""The engine with a decoder that looks at pictures by cross-attention: answers equal those without a cache."""

import dataclasses

import pytest
import torch

import nanovlm
from nanovlm.config import SamplingConfig
from nanovlm.errors import UserError
from nanovlm.infer import engine as engine_module
from nanovlm.infer.engine import Engine
from nanovlm.infer.looking import look
from nanovlm.infer.request import Request, Token
from nanovlm.model.inference import prepare
from tests.infer.test_engine import ASKED, GREEDY, ask, check_blocks, finish, written_out
from tests.model.test_fusion import crossing, make_model  # noqa: F401

NUM_PICTURES = (0, 1, 3, 2)


@pytest.fixture
def prompts(crossing):  # noqa: F811
    asked = enumerate(zip(ASKED, NUM_PICTURES, strict=True))
    return [ask(crossing, text, *range(10 * i, 10 * i + num)) for i, (text, num) in asked]


def check_answers(model, processor, prompts, engine):
    """Tokens, and log-probabilities to rounding."""
    numbers = [engine.submit(Request(prompt, GREEDY, num_logprobs=0)) for prompt in prompts]
    found = {number: [] for number in numbers}
    while not engine.is_idle:
        for event in engine.step():
            found[event.request] += [event] if isinstance(event, Token) else []
    check_blocks(engine)
    for number, prompt in zip(numbers, prompts, strict=True):
        answer, logits = written_out(model, processor, prompt)
        assert [token.id for token in found[number]] == answer
        for token, row in zip(found[number], logits.float().log_softmax(-1), strict=False):
            assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)


def test_equals_passes_without_a_cache(crossing, prompts):  # noqa: F811
    """Prompts are cut in the middle, and the second time found in the cache."""
    model = make_model()
    engine = Engine(model, num_rows=3, chunk=9)
    check_answers(model, crossing, prompts, engine)
    check_answers(model, crossing, prompts[1:3], engine)
    assert engine.features.num_encoded == sum(NUM_PICTURES)


@pytest.mark.parametrize("changes", [dict(only_latest=True), dict(every=2)], ids=str)
@pytest.mark.parametrize("is_prepared", [False, True])
def test_other_settings(crossing, prompts, changes, is_prepared):  # noqa: F811
    model = make_model(**changes)
    check_answers(prepare(model) if is_prepared else model, crossing, prompts, Engine(model, read_every=4))


def test_pictures_that_are_cached_but_not_their_features_are_encoded_again(crossing, monkeypatch):  # noqa: F811
    """More of them than a pass encodes, all before what is new."""
    monkeypatch.setattr(engine_module, "MOST_TILES", 1)
    model = make_model()
    engine = Engine(model, feature_bytes=0)
    prompt = ask(crossing, "what is shown in these? " * 8, 0, 1, 2)
    check_answers(model, crossing, [prompt], engine)
    check_answers(model, crossing, [prompt], engine)
    assert engine.features.num_encoded == 6


def test_a_drawn_answer_and_several_of_them(crossing, prompts):  # noqa: F811
    sampling = SamplingConfig(max_new_tokens=8, temperature=0.8, seed=3)
    model = make_model()
    together = Engine(model, num_rows=5)
    numbers = [together.submit(Request(prompt, sampling, num_answers=2)) for prompt in prompts]
    answers, _ = finish(together, *numbers)
    for number, prompt in zip(numbers, prompts, strict=True):
        alone = Engine(model)
        mine, _ = finish(alone, alone.submit(Request(prompt, sampling, num_answers=2)))
        assert [answers[number, i] for i in (0, 1)] == [mine[0, i] for i in (0, 1)]


def test_another_picture_is_another_answer(crossing):  # noqa: F811
    """Under the same question, of which the prompt's blocks must not be mistaken for each other."""
    model, text = make_model(), "what color is the circle? " * 4
    prompts = [ask(crossing, text, seed) for seed in range(4)]
    found = nanovlm.generate(model, crossing.batch(prompts), GREEDY)
    assert found == [written_out(model, crossing, prompt)[0] for prompt in prompts]
    assert len({tuple(answer) for answer in found}) > 1


def test_what_it_cannot_do_is_refused(crossing, prompts):  # noqa: F811
    model = make_model()
    with pytest.raises(UserError, match=r"fusion\.type = 'cross_attention' cannot be compiled"):
        prepare(model, compiles=True)
    with pytest.raises(UserError, match=r"with fusion\.type = 'cross_attention' there are none"):
        look(model, prompts[1], [7])


def test_a_sequence_is_not_kept_and_features_are(crossing, prompts):  # noqa: F811
    """What is kept of a tile are the keys and values of both layers, in order."""
    model = make_model()
    engine = Engine(model)
    engine.submit(Request(prompts[1], dataclasses.replace(GREEDY, max_new_tokens=3)))
    engine.step()
    (kept,) = engine.rows[0].features.values()
    features = model.encode(prompts[1].tiles)
    expected = [layer(features) for layer in model.fusion.keys_values]
    assert kept.shape == (2, 2, 4, 2, 8)
    for (k, v), both in zip(expected, kept, strict=True):
        torch.testing.assert_close(torch.stack([k[0], v[0]]), both)
