"""Requests, however many -> their events and answers: an engine is given each request when it can begin with it.

A prompt holds the pixels of its images. As `requests` may be a generator, a thousand prompts need not be in memory at
once: one is made when a row is free.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import chain
from typing import NamedTuple

from nanovlm.infer.engine import Engine
from nanovlm.infer.request import End, Event, Request, Token


class Answer(NamedTuple):
    """An answer that has ended: its request's index, its own among the request's answers, its tokens and its end."""

    request: int
    answer: int
    ids: list[int]
    end: End


def ask(engine: Engine, requests: Iterable[Request]) -> Generator[list[tuple[int, Event]]]:
    """Yield what became of the requests in each step, maybe nothing; each event comes with its request's index.

    The engine must be idle. What has not ended is cancelled where the caller stops or a request is refused.
    """
    left, index_of, num_open = iter(requests), {}, 0
    try:
        while True:
            while num_open < engine.num_rows and (request := next(left, None)) is not None:
                index_of[engine.submit(request)] = len(index_of)
                num_open += request.num_answers
            if not num_open:
                return
            events = engine.step()
            num_open -= sum(not isinstance(event, Token) for event in events)
            yield [(index_of[event.request], event) for event in events]
    finally:
        if num_open:
            for number in index_of:
                engine.cancel(number)


def answer_all(engine: Engine, requests: Iterable[Request]) -> Iterator[Answer]:
    """Yield the answers to the requests as they end."""
    ids: dict[tuple[int, int], list[int]] = {}
    with closing(ask(engine, requests)) as steps:
        for index, event in chain.from_iterable(steps):
            tokens = ids.setdefault((index, event.answer), [])
            if isinstance(event, Token):
                tokens.append(event.id)
            else:
                yield Answer(index, event.answer, ids.pop((index, event.answer)), event)
