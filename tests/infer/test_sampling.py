"""How a token is chosen."""

import dataclasses
import itertools
import math
import re
import sys

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
from nanovlm.infer.sampling import choose, filter_logits, penalize


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


EXTREMES = {
    "max_new_tokens": (1, 10**30),
    "temperature": (0, 5e-324, 1e-46, 1e39, sys.float_info.max),
    "top_k": (0, 1, 2**63, 10**30),
    "top_p": (5e-324, 1e-46, math.nextafter(1, 0), 1),
    "min_p": (0, 5e-324, 1e-46, 1),
    "repetition_penalty": (0.01, 1, 100),
    "seed": (-(2**62), 2**62),
}


def test_all_that_is_allowed_chooses_a_token():
    """Whatever numbers meet, and never a token that was left out beforehand, also where its penalty is asked for."""
    assert EXTREMES.keys() == {field.name for field in dataclasses.fields(SamplingConfig)}
    torch.manual_seed(0)
    logits = torch.randn(3, 9) * torch.tensor([[0], [1], [1e4]])
    logits[:, 3] = -torch.inf
    for values in itertools.product(*EXTREMES.values()):
        config = SamplingConfig(**dict(zip(EXTREMES, values, strict=True))).validate()
        generators = [torch.Generator().manual_seed(config.seed) for _ in logits]
        chosen = choose(logits, torch.ones_like(logits, dtype=torch.bool), config, generators)
        assert ((chosen >= 0) & (chosen < 9) & (chosen != 3)).all(), config


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
        ("repetition_penalty", 0),
        ("repetition_penalty", 5e-324),
        ("repetition_penalty", 1e300),
        ("repetition_penalty", float("inf")),
        ("repetition_penalty", float("nan")),
        ("seed", 2**63),
    ],
)
def test_wrong_values_are_named(field, value):
    with pytest.raises(ValueError, match=re.escape(f"{field} = {value} must be")):
        SamplingConfig(**{field: value}).validate()
