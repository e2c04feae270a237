"""Guessed tokens: answers, greedy or drawn, are those without guesses; drawn guesses keep the distribution."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.config import SamplingConfig
from nanovlm.errors import UserError
from nanovlm.infer import speculate
from nanovlm.infer.sampling import choose
from nanovlm.infer.speculate import (
    LONGEST_PAUSE,
    MOST_FAILURES,
    Guess,
    PromptLookup,
    accept,
    add_draft,
    choose_against,
    find_probabilities,
    join_guesses,
    rewind,
)

# Thousands of operations on a few numbers, which wait for each other where threads are many.
pytestmark = pytest.mark.usefixtures("one_thread")

V = 6
STOP = 5


class SimpleRow:
    def __init__(self, tokens):
        self.tokens = list(tokens)


class Chain:
    """A model of V tokens that sees the last two: logits [V, V, V], some of them -inf."""

    def __init__(self, seed):
        self.logits = 1.5 * torch.randn(V, V, V, generator=torch.Generator().manual_seed(seed))
        self.logits[:, :, 0] = -torch.inf  # as padding

    def __call__(self, tokens):
        return self.logits[tokens[-2], tokens[-1]]


def look_up_without(never, *options):
    lookup = PromptLookup(*options)
    lookup.never = {never}
    return lookup


def see(tokens):
    seen = torch.zeros(V, dtype=torch.bool)
    seen[tokens] = True
    return seen


def decode(model, prompt, config, stops=()):
    """The answer without guesses."""
    tokens, generator = list(prompt), torch.Generator().manual_seed(config.seed)
    while len(tokens) < len(prompt) + config.max_new_tokens and not (tokens[len(prompt) :] and tokens[-1] in stops):
        tokens.append(int(choose(model(tokens)[None], see(tokens)[None], config, [generator])))
    return tokens[len(prompt) :]


def verify(logits, draft, probabilities, config, generator, seen, stops=()):
    """The accepted ones of k drafted tokens and one more, by what an engine calls for a row.

    `logits` [k + 1, V] are those behind the last token and behind each drafted one.
    """
    state, grown, generators = generator.get_state(), add_draft(seen, draft), [generator] * len(logits)
    if probabilities is None:
        chosen = choose(logits, grown, config, generators)
    else:
        chosen = choose_against(logits, grown, config, generators, *join_guesses([Guess(draft, probabilities)], logits))
    tokens = accept(draft, chosen.tolist(), stops)
    if config.temperature > 0:
        rewind(generator, state, len(tokens))
    return tokens


def decode_with(guess, model, prompt, config, stops=(), check=verify):
    """The answer with guesses: `guess(tokens, most)` returns tokens and the probabilities that they were drawn by."""
    tokens, generator = list(prompt), torch.Generator().manual_seed(config.seed)
    most = len(prompt) + config.max_new_tokens
    while len(tokens) < most and not (tokens[len(prompt) :] and tokens[-1] in stops):
        draft, probabilities = guess(tokens, most - len(tokens) - 1)
        logits = torch.stack([model(tokens + draft[:i]) for i in range(len(draft) + 1)])
        tokens += check(logits, draft, probabilities, config, generator, see(tokens), stops)
    return tokens[len(prompt) :]


SAMPLINGS = st.builds(
    SamplingConfig,
    max_new_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 2, 4]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    seed=st.integers(0, 99),
)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(0, 99), SAMPLINGS, st.sampled_from([(), (STOP,), (STOP, 3)]))
def test_no_guess_changes_an_answer(data, seed, config, stops):
    """Random guesses and right ones, of any length; also of drawn answers, which use the same numbers."""
    model, prompt = Chain(seed), [1, 2, 3]
    expected = decode(model, prompt, config, stops)

    def guess(tokens, most):
        num = data.draw(st.integers(0, min(most, 4)))
        right = expected[len(tokens) - len(prompt) :][:num]
        return (right if data.draw(st.booleans()) else data.draw(st.lists(st.integers(1, V - 1), max_size=num))), None

    assert decode_with(guess, model, prompt, config, stops) == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), SAMPLINGS)
def test_look_up_changes_no_answer(seed, config):
    model, prompt = Chain(seed), [1, 2, 3, 1, 2, 4]
    lookup = look_up_without(0, 3, 3, 1)
    row = SimpleRow(prompt)

    def guess(tokens, most):
        row.tokens = tokens
        return lookup.propose([row])[0].cut(most)

    assert decode_with(guess, model, prompt, config) == decode(model, prompt, config)


# --- distributions --------------------------------------------------------------------------------------------

NUM_DRAWS = 2000
PROMPT = [4, 1, 2, 4, 1]
DRAWN = SamplingConfig(max_new_tokens=2, temperature=0.9, top_k=4, repetition_penalty=1.3)


def distribution(model, tokens, config):
    return find_probabilities(model(tokens)[None], see(tokens)[None], config)[0]


def find_exact(model):
    first = distribution(model, PROMPT, DRAWN)
    return torch.stack([first[x] * distribution(model, [*PROMPT, x], DRAWN) for x in range(V)])


def find_p_value(pairs, exact):
    """Pearson's chi-square of pairs of tokens against exact [V, V]; cells in which less than 5 fall are one cell."""
    counts = torch.tensor([len(exact) * x + y for x, y in pairs]).bincount(minlength=exact.numel()).double()
    exact = exact.flatten()
    if counts[exact == 0].sum():
        return 0.0
    expected, rare = exact * len(pairs), exact * len(pairs) < 5
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert len(expected) > 6
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


def draw_pairs(guess, model, check=verify):
    configs = [dataclasses.replace(DRAWN, seed=seed) for seed in range(NUM_DRAWS)]
    return [tuple(decode_with(guess, model, PROMPT, config, check=check)[:2]) for config in configs]


def draw_guess(draft, num=2):
    """Guess what another model draws, by its probabilities."""
    generator = torch.Generator().manual_seed(12345)

    def guess(tokens, most):
        found, probabilities = [], []
        for _ in range(num):
            probabilities.append(distribution(draft, tokens + found, DRAWN))
            found.append(int(torch.multinomial(probabilities[-1], 1, generator=generator)))
        return found, torch.stack(probabilities)

    return guess


def accept_always(logits, draft, *_):
    return [*draft, 1]


def draw_from_all(logits, draft, probabilities, config, generator, seen, stops):
    """On rejection draw from the model's distribution, not from what is left of it: a known mistake."""
    tokens = verify(logits, draft, probabilities, config, generator, seen, stops)
    if len(tokens) <= len(draft):
        tokens[-1:] = choose(logits[len(tokens) - 1][None], see_more(seen, tokens[:-1]), config, [generator]).tolist()
    return tokens


def see_more(seen, tokens):
    seen = seen.clone()
    seen[tokens] = True
    return seen[None]


@pytest.mark.parametrize(("check", "is_right"), [(verify, True), (accept_always, False), (draw_from_all, False)])
def test_drawn_guesses_keep_the_distribution(check, is_right):
    """Two mistakes show that it would be seen if they did not."""
    model, draft = Chain(0), Chain(1)
    assert (find_p_value(draw_pairs(draw_guess(draft), model, check), find_exact(model)) > 1e-6) == is_right


def test_looked_up_guesses_keep_the_distribution():
    model = Chain(0)

    def guess(tokens, most):
        return look_up_without(0, 2).propose([SimpleRow(tokens)])[0]

    assert guess(PROMPT, 2).tokens == [2, 4]
    assert find_p_value(draw_pairs(guess, model), find_exact(model)) > 1e-6


def test_guesses_drawn_by_the_model_itself_are_all_accepted():
    """And a seed decides, as the model's own draws decide where nothing was guessed."""
    model, guess = Chain(3), draw_guess(Chain(3), 3)
    for seed in range(50):
        draft, probabilities = guess(PROMPT, 3)
        logits = torch.stack([model(PROMPT + draft[:i]) for i in range(4)])
        config = dataclasses.replace(DRAWN, seed=seed)
        tokens = verify(logits, draft, probabilities, config, torch.Generator().manual_seed(seed), see(PROMPT))
        assert tokens[:3] == draft and len(tokens) == 4
        assert torch.isfinite(logits[3][tokens[3]])


@pytest.mark.parametrize("is_drawn", [False, True])
def test_a_generator_goes_on_behind_the_returned_tokens(is_drawn):
    model, draft = Chain(4), []
    while len(draft) < 4:
        draft.append(int(distribution(model, PROMPT + draft, DRAWN).argmax()))
    logits = torch.stack([model(PROMPT + draft[:i]) for i in range(5)])
    probabilities = torch.eye(V)[draft] if is_drawn else None
    lengths = set()
    for seed in range(40):
        generator, other = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        tokens = verify(logits, draft, probabilities, DRAWN, generator, see(PROMPT))
        numbers = [torch.rand(1, dtype=torch.float64, generator=other) for _ in range(len(tokens) + 1)]
        assert torch.rand(1, dtype=torch.float64, generator=generator) == numbers[-1]
        lengths.add(len(tokens))
    assert len(lengths) > 2


def test_what_is_accepted():
    assert accept([], [7]) == [7]
    assert accept([1, 2, 3], [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert accept([1, 2, 3], [1, 9, 3, 4]) == [1, 9]
    assert accept([1, 2, 3], [8, 2, 3, 4]) == [8]
    assert accept([1, 2, 3], [1, 2, 3, 4], stops=[2]) == [1, 2]  # an end inside the accepted part
    assert accept([1, 2, 3], [1, 9, 3, 4], stops=[9]) == [1, 9]


# --- look-up --------------------------------------------------------------------------------------------------


def look_up(tokens, most, longest, shortest, never):
    """The guess, written out: the latest earlier occurrence of the longest n-gram, read on with what is guessed."""
    for n in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for start in reversed(range(len(tokens) - n)):
            if tokens[start : start + n] == tokens[-n:]:
                grown = list(tokens)
                for i in range(most):
                    if grown[start + n + i] in never:
                        break
                    grown.append(grown[start + n + i])
                return grown[len(tokens) :]
    return []


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), max_size=6),
    st.integers(1, 5),
    st.tuples(st.integers(1, 3), st.integers(0, 2)),
)
def test_look_up_finds_the_latest_occurrence_of_the_longest_n_gram(prompt, pieces, num_tokens, lengths):
    """Also after the row has grown by several tokens; padding, here 0, is never guessed."""
    shortest, longest = lengths[0], sum(lengths)
    lookup, row = look_up_without(0, num_tokens, longest, shortest), SimpleRow(prompt)
    for piece in [[], *pieces]:
        row.tokens += piece
        expected = look_up(row.tokens, num_tokens, longest, shortest, [0])
        index = lookup.rows.get(row)
        if index is not None:
            index.pace = speculate.Pace()
        assert lookup.propose([row])[0].tokens == expected


def test_a_row_that_repeats_itself_is_guessed_in_full():
    assert PromptLookup(6).propose([SimpleRow([9, 1, 2, 1, 2, 1])])[0].tokens == [2, 1, 2, 1, 2, 1]


def test_rows_are_told_apart_and_forgotten():
    lookup, rows = PromptLookup(1), [SimpleRow([1, 2, x, 1, 2]) for x in (3, 4)]
    assert [guess.tokens for guess in lookup.propose(rows)] == [[3], [4]]
    lookup.forget(rows[0])
    assert list(lookup.rows) == rows[1:]


def test_a_row_whose_guesses_fail_is_guessed_for_less_often():
    lookup, row, asked = PromptLookup(2, 1, 1), SimpleRow([1, 2, 1]), []
    for _ in range(400):
        guess = lookup.propose([row])[0].tokens
        asked.append(bool(guess))
        row.tokens += [3, 1] if guess == [2, 1] else [2, 1]  # never what was guessed
    assert all(asked[:MOST_FAILURES]) and 400 / LONGEST_PAUSE * 1.5 < sum(asked) < 40
    while not (guess := lookup.propose([row])[0].tokens):
        row.tokens += [2, 1]
    row.tokens += guess  # one is right: the row is guessed for as before
    assert lookup.propose([row])[0].tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_tokens=0), "num_tokens = 0 must be at least 1"),
        (dict(shortest=0), "shortest = 0 must be at least 1"),
        (dict(longest=1), "longest = 1 must be at least shortest = 2"),
    ],
)
def test_wrong_options_of_look_up_are_named(options, message):
    with pytest.raises(UserError, match=message):
        PromptLookup(**options)
