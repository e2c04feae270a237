"""Drafts in the engine: what is guessed changes no answer, and everything that was taken is given back."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from nanovlm.config import SamplingConfig
from nanovlm.errors import UserError
from nanovlm.infer import engine as engine_module
from nanovlm.infer.draft_model import DraftModel, check_vocabulary
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request, Token
from nanovlm.infer.sampling import find_never, find_stops
from nanovlm.infer.speculate import Guess, PromptLookup
from nanovlm.model.vlm import VLM
from tests.conftest import TINY
from tests.infer.test_engine import ASKED, MODELS, ask, count, finish, make_model, written_out
from tests.infer.test_speculate import SimpleRow, find_p_value

pytestmark = pytest.mark.usefixtures("one_thread")

NUM = 14
GREEDY = SamplingConfig(max_new_tokens=NUM)


def make_draft_model(kind):
    """Another random model: with images, of a smaller vocabulary without images, with tiles of another size."""
    decoder = dataclasses.replace(TINY.decoder, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = {
        "sees": dataclasses.replace(TINY, decoder=decoder),
        "text": dataclasses.replace(
            TINY, vision=None, image_token_id=None, decoder=dataclasses.replace(decoder, vocab_size=400)
        ),
        "other tiles": dataclasses.replace(
            TINY,
            vision=dataclasses.replace(TINY.vision, image_size=32),
            decoder=dataclasses.replace(decoder, vocab_size=600),
        ),
    }[kind]
    torch.manual_seed(7)
    return VLM(config).eval()


DRAFT_MODELS = {kind: make_draft_model(kind) for kind in ("sees", "text", "other tiles")}
DRAFTS = ("lookup", "itself", *DRAFT_MODELS)


def make_draft(kind, model, num_tokens=3):
    if kind == "lookup":
        return PromptLookup(num_tokens, 3, 1)
    return DraftModel(model if kind == "itself" else DRAFT_MODELS[kind], num_tokens, chunk=20)


@pytest.fixture
def prompts(processor):
    texts = [*ASKED, "what color is the circle? " * 3]
    return [ask(processor, text, *range(10 * i, 10 * i + i % 3)) for i, text in enumerate(texts)]


def check_draft(draft):
    """No row is left, and no block in use."""
    assert not draft.rows
    if isinstance(draft, DraftModel):
        assert draft.blocks.num_free == len(draft.blocks.all)
        assert all(block.num_users == 0 and block.writer is None for block in draft.blocks.all)


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_no_draft_changes_a_greedy_answer(name, kind, processor, prompts):
    model = MODELS[name]
    draft = make_draft(kind, model)
    engine = Engine(model, num_rows=3, chunk=30, read_every=3, draft=draft)
    numbers = [engine.submit(Request(prompt, GREEDY, num_answers=1 + i % 2)) for i, prompt in enumerate(prompts)]
    answers, ends = finish(engine)
    for number, prompt in zip(numbers, prompts, strict=True):
        expected, _ = written_out(model, processor, prompt, NUM)
        assert answers[number, 0] == expected and answers.get((number, 1), expected) == expected
    check_draft(draft)
    drafted, accepted = (
        sum(getattr(end.usage, field) for end in ends.values()) for field in ("drafted_tokens", "accepted_tokens")
    )
    assert drafted > 0
    if kind == "lookup":
        assert 0 < accepted < drafted


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_draft_changes_any_answer_that_does_not_draw_its_guesses(processor, prompts, data):
    """Sampled answers and penalties too, beside each other; cancelled neighbours, small caches and chunks."""
    model = MODELS[data.draw(st.sampled_from(sorted(MODELS)))]
    kind = data.draw(st.sampled_from(DRAFTS))
    num_rows, chunk = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    requests = []
    for _ in range(data.draw(st.integers(1, 6))):
        sampling = SamplingConfig(
            max_new_tokens=data.draw(st.integers(1, NUM)),
            temperature=data.draw(st.sampled_from([0.0, 0.5])) if kind == "lookup" else 0.0,
            top_k=data.draw(st.sampled_from([0, 3])),
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
            seed=data.draw(st.integers(0, 3)),
        )
        num = data.draw(st.sampled_from([1, 1, 2]))
        requests.append(Request(data.draw(st.sampled_from(prompts)), sampling, num_answers=num, num_logprobs=2))
    cancelled = data.draw(st.sets(st.integers(0, len(requests) - 1), max_size=1))
    found = []
    for draft in (None, make_draft(kind, model, data.draw(st.integers(1, 5)))):
        engine = Engine(model, num_rows=num_rows, chunk=chunk, cache_tokens=160, draft=draft)
        numbers = [engine.submit(request) for request in requests]
        events = [*engine.step(), *engine.step()]
        for i in cancelled:
            events += engine.cancel(numbers[i])
        while not engine.is_idle:
            events += engine.step()
        tokens = [event for event in events if isinstance(event, Token) and event.request not in cancelled]
        found.append({(token.request, token.answer): [] for token in tokens})
        for token in tokens:
            found[-1][token.request, token.answer].append(token)
    check_draft(draft)
    before, after = found
    assert {key: [token.id for token in row] for key, row in before.items()} == {
        key: [token.id for token in row] for key, row in after.items()
    }
    for key, row in before.items():
        assert [token.logprob for token in after[key]] == pytest.approx([token.logprob for token in row], abs=1e-4)


# --- drawn answers --------------------------------------------------------------------------------------------


def make_small(seed, vocab_size=12):
    """A model of so few tokens that all pairs of them can be counted."""
    torch.manual_seed(seed)
    decoder = dataclasses.replace(TINY.decoder, vocab_size=vocab_size)
    model = VLM(dataclasses.replace(TINY, vision=None, image_token_id=None, decoder=decoder)).eval()
    with torch.no_grad():
        model.decoder.embed_tokens.weight.mul_(2)
    return model


@torch.no_grad()
def find_exact(model, processor, prompt, config):
    """The probabilities [V, V] of two tokens; all of a stop's are at [stop, 0]."""
    V = model.config.decoder.vocab_size
    exact = torch.zeros(V, V, dtype=torch.float64)

    def find(ids):
        fields = dict(input_ids=ids, labels=ids, branch_ids=torch.zeros_like(ids).int())
        logits = model.logits(processor.batch([dataclasses.replace(prompt, **fields)]))[0, -1]
        logits[find_never(model.config)] = -torch.inf
        return (logits.double() / config.temperature).softmax(-1)

    for token, p in enumerate(find(prompt.input_ids)):
        if token in find_stops(model.config):
            exact[token, 0] = p
        else:
            exact[token] = p * find(torch.cat([prompt.input_ids, torch.tensor([token])]))
    return exact


class Repeat(PromptLookup):
    """Guesses that the last token is repeated."""

    def _propose(self, row):
        return [row.tokens[-1]]


@pytest.mark.parametrize("kind", ["model", "lookup"])
def test_drawn_answers_keep_their_distribution(kind, processor):
    """Three drawn tokens, of which the first has no guess; the second and third are counted."""
    model = make_small(1)
    draft = Repeat() if kind == "lookup" else DraftModel(make_small(2), 2)
    ids = torch.tensor([5, 7, 3, 5])
    prompt = dataclasses.replace(
        processor.prompt([{"role": "user", "content": "x"}]), input_ids=ids, labels=ids, branch_ids=0 * ids.int()
    )
    config = SamplingConfig(max_new_tokens=4, temperature=1.5)
    engine = Engine(model, num_rows=64, draft=draft)
    engine.submit(Request(prompt, config, num_answers=2500))
    answers, ends = finish(engine)
    check_draft(draft)
    assert 0.05 < sum(end.usage.accepted_tokens for end in ends.values()) / 2500 < 2
    first = max(range(12), key=lambda token: sum(row[:1] == [token] for row in answers.values()))
    pairs = [[*row[1:3], model.config.eos_token_id, 0][:2] for row in answers.values() if row[:1] == [first]]
    grown = torch.cat([ids, torch.tensor([first])])
    exact = find_exact(model, processor, dataclasses.replace(prompt, input_ids=grown, labels=grown), config)
    pairs = [(x, 0 if x == model.config.eos_token_id else y) for x, y in pairs]
    assert len(pairs) > 300
    assert find_p_value(pairs, exact) > 1e-6
    uniform = torch.full_like(exact, 1 / 144)
    assert find_p_value(pairs, uniform) < 1e-6


@pytest.mark.parametrize("kind", DRAFTS)
def test_a_drawn_answer_depends_on_its_seed_alone(kind, prompts):
    """With a draft model it is not the one without; with look-up it is."""
    model = MODELS["dense"]

    def draw(draft, seed, *others):
        engine = Engine(model, num_rows=4, chunk=25, draft=draft)
        for i, other in enumerate(others):
            engine.submit(Request(other, SamplingConfig(max_new_tokens=5 + 20 * i, temperature=0.7, seed=99)))
        config = SamplingConfig(max_new_tokens=NUM, temperature=0.5, seed=seed, repetition_penalty=1.2)
        number = engine.submit(Request(prompts[2], config, num_answers=2))
        answers, _ = finish(engine)
        return answers[number, 0], answers[number, 1]

    first, second = draw(make_draft(kind, model), 1)
    assert first != second
    assert draw(make_draft(kind, model), 1, *prompts) == (first, second)
    assert draw(make_draft(kind, model), 2, prompts[0])[0] == second
    if kind == "lookup":
        assert draw(None, 1) == (first, second)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_guesses_of_the_model_itself_are_all_accepted(name, temperature, prompts):
    """With images in pieces, a penalty, and an end: the draft computes what the engine computes."""
    model = MODELS[name]
    config = SamplingConfig(max_new_tokens=NUM, temperature=temperature, repetition_penalty=1.3, seed=3)
    plain = Engine(model)
    for prompt in prompts:
        plain.submit(Request(prompt, config))
    answers, _ = finish(plain)
    model = VLM(dataclasses.replace(model.config, stop_token_ids=tuple(row[5] for row in answers.values()))).eval()
    model.load_state_dict(MODELS[name].state_dict())
    engine = Engine(model, num_rows=3, chunk=30, draft=DraftModel(model, 4, chunk=6))
    for prompt in prompts:
        engine.submit(Request(prompt, config))
    answers, ends = finish(engine)
    for usage in (end.usage for end in ends.values() if end.usage.new_tokens > 1):
        assert usage.accepted_tokens == usage.drafted_tokens
        assert usage.drafted_tokens or temperature == 0  # a greedy answer does not wait for its prompt in the draft
    assert any(end.usage.drafted_tokens for end in ends.values())
    assert sum(end.reason == "stop" for end in ends.values()) > 1


# --- what it costs, and what goes wrong -----------------------------------------------------------------------


def test_a_right_draft_saves_passes(processor, prompts, monkeypatch):
    model = make_model("dense")
    draft = DraftModel(make_model("dense"), 4)
    engine = Engine(model, draft=draft)
    expected, _ = written_out(model, processor, prompts[0], 12)
    seen, guessed = count(monkeypatch, engine), count(monkeypatch, Engine(draft.model))
    number = engine.submit(Request(prompts[0], SamplingConfig(max_new_tokens=12)))
    answers, ends = finish(engine)
    assert answers[number, 0] == expected
    # One token with the prompt, five with four guesses, five more, and the last one alone.
    assert seen["passes"] == [len(prompts[0]), 5, 5, 1]
    assert (ends[number, 0].usage.drafted_tokens, ends[number, 0].usage.accepted_tokens) == (8, 8)
    # The draft computes the prompt once, then what it has not seen of the answer.
    assert guessed["passes"][0] == len(prompts[0]) and guessed["passes"][-4:] == [2, 1, 1, 1]


def test_answers_to_one_prompt_share_it_in_the_draft(processor, monkeypatch):
    prompt = ask(processor, ASKED[2], 1, 2)
    draft = DraftModel(make_draft_model("sees"), 2)
    engine = Engine(make_model("dense"), draft=draft)
    seen = count(monkeypatch, Engine(draft.model))
    for _ in range(2):
        engine.submit(Request(prompt, SamplingConfig(max_new_tokens=3), num_answers=8))
    finish(engine)
    own = len(prompt) - (len(prompt) - 1) // 16 * 16
    assert seen["tiles"] == 2
    # Of each answer the first token, behind which there is room for one guess.
    assert seen["tokens"] == len(prompt) + 15 * own + 16


@pytest.mark.parametrize("temperature", [0, 0.5])
def test_a_new_prompt_in_the_draft_delays_the_others_by_a_chunk(temperature, processor, monkeypatch):
    """A greedy answer goes on without guesses meanwhile, a drawn one waits."""
    draft = DraftModel(make_draft_model("sees"), 2, chunk=8)
    engine = Engine(make_model("dense"), draft=draft)
    first = engine.submit(Request(ask(processor, "why?"), SamplingConfig(max_new_tokens=60)))
    while not any(event.request == first for event in engine.step()):
        pass
    seen = count(monkeypatch, Engine(draft.model))
    num_tiles = engine_module.MOST_TILES + 3
    prompt = ask(processor, "why " * 20, *range(num_tiles))
    second = engine.submit(Request(prompt, SamplingConfig(max_new_tokens=40, temperature=temperature)))
    new, steps, most_tiles, drafted = {first: 0, second: 0}, 0, 0, None
    while drafted is None:
        before, tiles, passes = dict(new), seen["tiles"], len(seen["passes"])
        for event in engine.step():
            new[event.request] += 1
        drafted = next((row.num_drafted for row in engine.rows if row.number == second and row.num_drafted), None)
        # The prompt, then the last tokens of both and a guess of each.
        assert new[first] > before[first] and sum(seen["passes"][passes:]) <= 8 + 2 * 3 + 2
        most_tiles, steps = max(most_tiles, seen["tiles"] - tiles), steps + 1
    assert steps >= len(prompt) // 8 and most_tiles <= engine_module.MOST_TILES and seen["tiles"] == num_tiles
    assert (new[second] > 10) == (temperature == 0)


def test_a_draft_encodes_few_tiles_a_step(processor, monkeypatch):
    draft = DraftModel(make_draft_model("sees"), 2)
    engine = Engine(make_model("dense"), draft=draft)
    num = engine_module.MOST_TILES
    engine.submit(Request(ask(processor, "why?", *range(2 * num + 1)), GREEDY))
    seen, tiles = count(monkeypatch, Engine(draft.model)), []
    while seen["tiles"] < 2 * num + 1:
        before = seen["tiles"]
        engine.step()
        tiles += [seen["tiles"] - before] if seen["tiles"] > before else []
    assert tiles == [num, num, 1]


def test_a_draft_that_calls_a_word_its_image_is_not_shown_the_word(processor, prompts):
    """Its own placeholder is a token as any other in the model's vocabulary."""
    model, other = MODELS["dense"], DRAFT_MODELS["other tiles"]
    draft_model = VLM(dataclasses.replace(other.config, image_token_id=int(prompts[0].input_ids[2]))).eval()
    draft = DraftModel(draft_model, 3)
    engine = Engine(model, draft=draft)
    numbers = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
    answers, ends = finish(engine)
    assert [answers[number, 0] for number in numbers] == [
        written_out(model, processor, prompt, NUM)[0] for prompt in prompts
    ]
    assert all(end.usage.drafted_tokens for end in ends.values())
    check_draft(draft)


@pytest.mark.parametrize("where", ["guess", "pass", "check"])
def test_without_memory_guessing_ends_and_no_request_does(where, processor, prompts, monkeypatch):
    model = make_model("dense")
    engine = Engine(model, num_rows=2, draft=make_draft("sees" if where == "guess" else "lookup", model))
    sampling = SamplingConfig(max_new_tokens=NUM, temperature=0 if where == "guess" else 0.5, repetition_penalty=1.2)
    numbers = [engine.submit(Request(prompt, sampling)) for prompt in prompts]
    plain, failed = Engine(model), []
    for prompt in prompts:
        plain.submit(Request(prompt, sampling))
    expected, _ = finish(plain)
    target, name = {
        "guess": (DRAFT_MODELS["sees"].decoder, "forward"),
        "pass": (model.decoder, "forward"),
        "check": (engine_module, "choose"),
    }[where]
    run = getattr(target, name)

    def run_short_of_memory(x, *args, **options):
        result = run(x, *args, **options)  # numbers have been drawn, where this is `choose`
        # A row without a guess, which has drawn before, beside one with a guess.
        guessed = [bool(row.guess.tokens) for row in engine.rows if row.num_new > 2]
        if not failed and (where == "guess" or (any(guessed) and not all(guessed))):
            failed.append(where)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(target, name, run_short_of_memory)
    answers, ends = finish(engine)
    assert failed and engine.draft is None
    assert [answers[number, 0] for number in numbers] == [expected[i, 0] for i in range(len(prompts))]
    assert {end.reason for end in ends.values()} <= {"length", "stop"}


def test_a_draft_with_fewer_positions_leaves_long_answers_alone(processor, prompts):
    model, small = MODELS["dense"], make_draft_model("text")
    small.config = dataclasses.replace(
        small.config, decoder=dataclasses.replace(small.config.decoder, max_position_embeddings=40)
    )
    engine = Engine(model, draft=DraftModel(small, 2))
    numbers = [engine.submit(Request(prompts[0], SamplingConfig(max_new_tokens=most))) for most in (8, 60)]
    _, ends = finish(engine)
    assert [ends[number, 0].usage.drafted_tokens > 0 for number in numbers] == [True, False]


@pytest.mark.parametrize("kind", ["sees", "text"])
def test_a_draft_has_room_for_all_rows_of_a_full_cache(kind, processor):
    prompts = [ask(processor, f"{word} " * 20, i) for i, word in enumerate(("red", "green", "blue"))]
    most = 48 + 1 - max(len(prompt) for prompt in prompts)  # the last token needs no slot
    engine = Engine(MODELS["dense"], num_rows=3, cache_tokens=3 * 48, draft=DraftModel(DRAFT_MODELS[kind], 20))
    numbers = [engine.submit(Request(prompt, SamplingConfig(max_new_tokens=most))) for prompt in prompts]
    while len(engine.rows) < 3:
        engine.step()
    _, ends = finish(engine)
    assert all(ends[number, 0].usage.drafted_tokens > 0 for number in numbers)


def test_an_end_is_taken_out_of_the_middle_of_a_guess(processor, prompts):
    """An answer that was guessed with its end, and more behind it, ends there."""
    model = MODELS["dense"]
    answer, _ = written_out(model, processor, prompts[0], NUM)
    at = next(i for i in range(2, NUM) if answer[i] not in answer[:i])
    model = VLM(dataclasses.replace(model.config, stop_token_ids=(answer[at],)))
    model.load_state_dict(MODELS["dense"].state_dict())

    class Known(PromptLookup):
        def _propose(self, row):
            done = len(row.tokens) - row.num_prompt
            return answer[done : min(done + 6, NUM - 1)]

    engine = Engine(model, draft=Known())
    number = engine.submit(Request(prompts[0], GREEDY))
    answers, ends = finish(engine)
    assert answers[number, 0] == answer[:at] and ends[number, 0].reason == "stop"


def test_look_up_never_guesses_what_no_answer_contains(processor):
    lookup = PromptLookup(3, 1, 1)
    Engine(MODELS["dense"], draft=lookup)

    row = SimpleRow([8, TINY.image_token_id, 9, TINY.pad_token_id, 7, TINY.eos_token_id, 6, 8])
    assert lookup.propose([row]) == [Guess([])]
    for last in (9, 7):
        row.tokens = [*row.tokens, last]
        assert lookup.propose([row]) == [Guess([])]


def test_vocabularies_must_agree():
    def make(*words):
        return Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))

    check_vocabulary(make("<pad>", "a", "b"), make("<pad>", "a", "b", "more"))
    check_vocabulary(make("<pad>", "a", "b", "<image>"), make("<pad>", "a"))
    with pytest.raises(UserError, match="another tokenizer: token 1 is 'b' there and 'a' in the model"):
        check_vocabulary(make("<pad>", "a", "b"), make("<pad>", "b", "a"))


def test_wrong_options_of_a_draft_model_are_named():
    with pytest.raises(UserError, match="num_tokens = 0 must be at least 1"):
        DraftModel(DRAFT_MODELS["sees"], 0)
