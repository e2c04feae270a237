"""Many requests to one engine: made when they are needed, answered as each alone, none left behind."""

import contextlib
import itertools

import pytest
import torch

from nanovlm.config import SamplingConfig
from nanovlm.errors import UserError
from nanovlm.infer.answers import generate
from nanovlm.infer.asking import answer_all, ask
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request, Token
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise

NUM_ROWS = 3


@pytest.fixture
def engine():
    torch.manual_seed(0)
    return Engine(VLM(TINY), num_rows=NUM_ROWS)


def make_request(processor, i, **options):
    prompt = processor.prompt([{"role": "user", "content": "what? " * (i % 4 + 1)}], [noise(i // 2)])
    return Request(prompt, SamplingConfig(max_new_tokens=1 + 5 * i % 7, temperature=0.7, seed=i), **options)


def test_each_answer_is_that_of_its_request_alone(engine, processor):
    requests = [make_request(processor, i) for i in range(10)]
    answers = list(answer_all(engine, iter(requests)))
    assert sorted(done.request for done in answers) == list(range(10)) and {done.answer for done in answers} == {0}
    assert [done.request for done in answers] != list(range(10))  # as they end
    for done in answers:
        request = requests[done.request]
        assert [done.ids] == generate(engine.model, processor.batch([request.prompt]), request.sampling)
        assert done.end.reason in ("stop", "length") and done.end.usage.new_tokens == len(done.ids)
    assert engine.is_idle


def test_a_request_is_made_when_a_row_is_free(engine, processor):
    """So prompts and their pixels do not wait in memory."""
    made, ended, most = 0, 0, 0

    def requests():
        nonlocal made, most
        for i in range(12):
            made += 1
            most = max(most, made - ended)
            yield make_request(processor, i, num_answers=1 + i % 2)

    for _ in answer_all(engine, requests()):
        ended += 1
    assert (made, ended) == (12, 18) and most <= NUM_ROWS
    assert list(answer_all(engine, [])) == []


def test_several_answers_to_a_request_are_kept_apart(engine, processor):
    request = make_request(processor, 6, num_answers=4)
    answers = {done.answer: done.ids for done in answer_all(engine, [request])}
    assert sorted(answers) == [0, 1, 2, 3]
    for i, ids in answers.items():
        alone = SamplingConfig(max_new_tokens=3, temperature=0.7, seed=6 + i)
        assert [ids] == generate(engine.model, processor.batch([request.prompt]), alone)


def test_events_come_as_they_happen(engine, processor):
    steps = list(ask(engine, (make_request(processor, i) for i in range(5))))
    events = list(itertools.chain.from_iterable(steps))
    for i in range(5):
        own = [event for index, event in events if index == i]
        assert own and all(isinstance(event, Token) for event in own[:-1]) and not isinstance(own[-1], Token)


def test_a_caller_can_stop_while_a_prompt_is_computed(engine, processor):
    """Also a step that gives no token is told."""
    engine.chunk = 4
    steps = list(ask(engine, [make_request(processor, 3)]))
    assert steps[:2] == [[], []] and all(steps[-2:])


def test_nothing_is_left_behind(engine, processor):
    """Where the caller stops, or a request is refused; the engine goes on with the next ones."""
    with contextlib.closing(ask(engine, (make_request(processor, i) for i in range(9)))) as steps:
        assert list(itertools.islice(steps, 2)) and not engine.is_idle
    assert engine.is_idle and engine.blocks.num_free == len(engine.blocks.all)
    bad = Request(make_request(processor, 0).prompt, SamplingConfig(max_new_tokens=10**6))
    with pytest.raises(UserError, match="are more than the model's 8192 positions"):
        list(answer_all(engine, [make_request(processor, 2), bad]))
    assert engine.is_idle and len(list(answer_all(engine, [make_request(processor, 1)]))) == 1
