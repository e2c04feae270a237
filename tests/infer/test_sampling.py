"""Generation: the cache, batches, the end of a turn, and how a token is chosen."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanovlm.config import SamplingConfig
from nanovlm.infer.sampling import (
    choose,
    decode_one_token,
    filter_logits,
    generate,
    penalize,
    prefill,
    stream,
)
from nanovlm.model.kv_cache import KVCache
from tests.conftest import noise

GREEDY = SamplingConfig(max_new_tokens=12)


@pytest.fixture
def prompts(processor):
    asked = ["what color is the circle?", "why?", "where is the red star relative to the blue cross?", "describe it."]
    return [
        processor.prompt([{"role": "user", "content": text}], [noise(10 * i + j) for j in range(i)])
        for i, text in enumerate(asked)
    ]


@torch.no_grad()
def test_cached_equals_uncached(model, processor, prompts):
    """Decode with the cache, and the same tokens again as one long row: equal logits at every step."""
    for prompt in prompts:
        batch = processor.batch([prompt])
        cache = KVCache(model.config.decoder, 1, len(prompt) + 12)
        logits = [prefill(model, batch, cache)]
        tokens = []
        for _ in range(10):
            tokens.append(int(logits[-1].argmax()))
            logits.append(decode_one_token(model, torch.tensor(tokens[-1:]), cache))
        grown = torch.cat([prompt.input_ids, torch.tensor(tokens)])
        document = dataclasses.replace(prompt, input_ids=grown, labels=grown, branch_ids=torch.zeros_like(grown.int()))
        whole = processor.batch([document])
        uncached = model.logits(whole)[0, len(prompt) - 1 :]
        assert (torch.cat(logits) - uncached).abs().max() <= 1e-5 * uncached.abs().max()
        assert torch.cat(logits).argmax(-1).tolist() == uncached.argmax(-1).tolist()


def test_batched_equals_one_by_one(model, processor, prompts):
    together = generate(model, processor.batch(prompts), GREEDY)
    assert together == [generate(model, processor.batch([prompt]), GREEDY)[0] for prompt in prompts]
    assert len({tuple(row) for row in together}) > 1
    assert together == generate(model, processor.batch(prompts), GREEDY)
    reversed_rows = generate(model, processor.batch(prompts[::-1]), GREEDY)
    assert together == reversed_rows[::-1]


def test_stops_at_the_end_of_turn(model, processor, prompts, monkeypatch):
    """Rows end at different steps; an ended row yields padding and the loop stops with the last one."""
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    script = iter([[7, 8, eos, 9], [eos, 8, 7, 9], [5, 6, 7, eos], [5, eos, 7, 9], [5, 5, 5, 5]])
    monkeypatch.setattr("nanovlm.infer.sampling.choose", lambda logits, *_: torch.tensor(next(script)))
    steps = [tokens.tolist() for tokens in stream(model, processor.batch(prompts), GREEDY)]
    assert steps == [[7, 8, eos, 9], [eos, 8, pad, 9], [pad, 6, pad, eos], [pad, eos, pad, pad]]
    script = iter([[7, eos, 5, 5], [5, 7, eos, eos], [eos, 7, 7, 7]])
    assert generate(model, processor.batch(prompts), GREEDY) == [[7, 5], [], [5], [5]]


def test_stops_at_other_stop_tokens(model, processor, prompts, monkeypatch):
    model.config = dataclasses.replace(model.config, stop_token_ids=(9, 11))
    eos = model.config.eos_token_id
    script = iter([[7, 8, eos, 9], [11, 8, 7, 9], [5, 9, 7, 5]])
    monkeypatch.setattr("nanovlm.infer.sampling.choose", lambda logits, *_: torch.tensor(next(script)))
    assert generate(model, processor.batch(prompts), GREEDY) == [[7], [8, 8], [], []]


def test_never_more_than_max_new_tokens_and_no_forward_too_many(model, processor, prompts, monkeypatch):
    calls = []
    monkeypatch.setattr("nanovlm.infer.sampling.decode_one_token", lambda *a: calls.append(1) or decode_one_token(*a))
    rows = generate(model, processor.batch(prompts[:1]), SamplingConfig(max_new_tokens=3))
    assert len(rows[0]) == 3 and len(calls) == 2


def test_padding_and_placeholders_are_never_generated(model, processor, prompts, monkeypatch):
    seen = []
    monkeypatch.setattr("nanovlm.infer.sampling.choose", lambda logits, *a: seen.append(logits) or choose(logits, *a))
    generate(model, processor.batch(prompts), GREEDY)
    for logits in seen:
        assert (logits[:, [model.config.pad_token_id, model.config.image_token_id]] == -torch.inf).all()


def test_seed_decides(model, processor, prompts):
    def run(seed):
        return generate(model, processor.batch(prompts), SamplingConfig(max_new_tokens=8, temperature=1.5, seed=seed))

    assert run(1) == run(1) != run(2)


def test_a_drawn_answer_does_not_depend_on_its_neighbours(model, processor, prompts):
    config = SamplingConfig(max_new_tokens=8, temperature=1.5, seed=3)
    together = generate(model, processor.batch(prompts), config)
    assert together == [generate(model, processor.batch([prompt]), config)[0] for prompt in prompts]


def test_what_was_seen_does_not_depend_on_padding(model, processor, prompts, monkeypatch):
    """Also where padding is a token that stands in every prompt, as it does where it is the end of a turn."""
    first = int(prompts[0].input_ids[0])
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, pad_token_id=first))
    processor, found = copy.copy(processor), []
    processor.config = model.config
    monkeypatch.setattr(
        "nanovlm.infer.sampling.choose", lambda logits, seen, *a: found.append(seen.clone()) or choose(logits, seen, *a)
    )
    generate(model, processor.batch(prompts), GREEDY)
    for row, prompt in zip(found[0], prompts, strict=True):
        assert row.nonzero()[:, 0].tolist() == prompt.input_ids.unique().tolist()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0.2, 3),
    st.integers(0, 20),
    st.floats(0.05, 0.999) | st.just(1.0),  # between them, which sum is rounded how decides
    st.floats(0, 1),
    st.floats(0.5, 2),
)
def test_filters_equal_transformers(seed, temperature, top_k, top_p, min_p, penalty):
    torch.manual_seed(seed)
    logits, history = 3 * torch.randn(3, 17), torch.randint(0, 17, (3, 6))
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    theirs += [TopKLogitsWarper(top_k)] if top_k else []
    theirs += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs += [MinPLogitsWarper(min_p)] if min_p else []
    expected = theirs(history, logits.clone()).softmax(-1)
    config = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    ).validate()
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, history, True)
    found = filter_logits(penalize(logits, seen, penalty), config).softmax(-1)
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found, expected, atol=1e-6)
    chosen = choose(logits, seen, config, [torch.Generator().manual_seed(seed + i) for i in range(3)])
    assert (expected.gather(1, chosen[:, None]) > 0).all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.7, 2), (0.49, 1), (0.51, 2), (0.96, 4), (0.01, 1)])
def test_top_p_keeps_the_token_that_crosses(top_p, kept):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    config = SamplingConfig(temperature=1, top_p=top_p)
    assert int(filter_logits(logits, config).isfinite().sum()) == kept


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3)])
def test_a_sum_that_is_top_p_is_enough(top_p, kept):
    """Quarters, which every processor computes exactly."""
    config = SamplingConfig(temperature=1, top_p=top_p)
    assert int(filter_logits(torch.zeros(1, 4), config).isfinite().sum()) == kept


def test_the_smallest_temperature_is_greedy():
    logits = torch.tensor([[1.0, 80.0, -3.0]])
    config = SamplingConfig(temperature=1e-300)
    assert choose(logits, torch.zeros_like(logits, dtype=torch.bool), config, [torch.Generator()]).tolist() == [1]


def test_temperature_comes_before_top_p():
    logits = torch.tensor([[4.0, 2.0, 1.0, 0.0]])
    hot = SamplingConfig(temperature=10, top_p=0.6)
    assert int(filter_logits(logits, hot).isfinite().sum()) == 3


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(5000, 3)
    chosen = choose(
        logits,
        torch.zeros_like(logits, dtype=torch.bool),
        SamplingConfig(temperature=1),
        [torch.Generator().manual_seed(i) for i in range(5000)],
    )
    assert (chosen.bincount() / 5000 - torch.tensor([0.6, 0.3, 0.1])).abs().max() < 0.02


def test_a_row_with_two_documents_is_no_prompt(model, processor, prompts):
    batch = processor.batch(prompts[:1])
    batch.doc_ids[0, -2:] = 1
    with pytest.raises(ValueError, match="must hold one document without branches"):
        generate(model, batch, GREEDY)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("inf")),
        ("temperature", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2),
        ("max_new_tokens", 0),
    ],
)
def test_wrong_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value} must be"):
        SamplingConfig(**{field: value}).validate()
