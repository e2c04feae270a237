"""Events of a request -> texts that grow.

```
Token --> TextStream --> pending text --> what the client's handler takes next
```

A reply takes in events when they come, whether its client reads or not: what a slow client has not read yet is one text
an answer, which no answer makes longer than its max_new_tokens allow.
"""

import asyncio
from typing import NamedTuple

from nanovlm.data.chat import Processor
from nanovlm.errors import UserError
from nanovlm.infer.api import ApiError, Ask
from nanovlm.infer.request import End, Event, Token, Usage
from nanovlm.infer.text import TextStream
from nanovlm.infer.worker import Worker


class Answer:
    """One answer of a reply."""

    def __init__(self, processor: Processor, ask: Ask):
        self.text = TextStream(processor, ask.stop)
        # Not taken yet: text, and tokens if they are told, with the places in the text at which they begin.
        self.pending: str = ""
        self.tokens: list[tuple[Token, int]] = []
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.is_told = False  # the finish_reason, to the client
        self.usage = Usage()


class Reply:
    """The answers to one request: the worker's listener on one side, read by the handler of the client on the other."""

    def __init__(self, processor: Processor, ask: Ask, num_prompt: int, worker: Worker):
        """`num_prompt` is how many tokens the prompt has, which ends would tell too late where the client has gone."""
        self.ask, self.num_prompt, self.worker = ask, num_prompt, worker
        self.answers = [Answer(processor, ask) for _ in range(ask.num_answers)]
        self.is_accepted = False
        self.error: ApiError | None = None
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return all(answer.finish_reason for answer in self.answers)

    async def wait(self):
        """Wait until something has come. Raises ApiError where the request has failed."""
        await self._changed.wait()
        self._changed.clear()
        if self.error:
            raise self.error

    # --- the worker's listener --------------------------------------------------------------------------------

    def accept(self):
        self.is_accepted = True
        self._changed.set()

    def receive(self, event: Event):
        answer = self.answers[event.answer]
        if isinstance(event, Token):
            if answer.text.stopped is None:
                self._add(answer, event)
        elif isinstance(event, End):
            self._end(answer, event)
        self._changed.set()

    def fail(self, error: Exception):
        if isinstance(error, UserError):
            self.error = ApiError(400, str(error))
        else:
            self.error = ApiError(500, "the server has failed; its log says why")
        self._changed.set()

    def _add(self, answer: Answer, token: Token):
        answer.num_tokens += 1
        if self.ask.num_logprobs is not None or self.ask.tells_tokens:
            answer.tokens.append((token, answer.text.length))
        answer.pending += answer.text.add(token.id)
        if answer.text.stopped is not None:
            self.worker.cancel(self, token.answer, "stop")

    def _end(self, answer: Answer, end: End):
        answer.usage = end.usage
        if end.reason in ("stop", "length"):
            answer.pending += answer.text.end()
            answer.finish_reason = end.reason if answer.text.stopped is None else "stop"
            return
        answer.finish_reason = end.reason
        if self.error is None:
            status, message = {
                "timeout": (504, end.message or "the request took too long"),
                "cancelled": (503, "the server is shutting down"),
            }.get(end.reason, (500, end.message or "the request has failed"))
            self.error = ApiError(status, message)
            self.worker.cancel(self)  # the others, too

    # --- the client's handler ---------------------------------------------------------------------------------

    def take(self) -> list["Piece"]:
        """Return what has come since the last call, one piece for each answer that has something new."""
        pieces = []
        for index, answer in enumerate(self.answers):
            is_end = answer.finish_reason is not None and not answer.is_told
            if answer.pending or answer.tokens or is_end:
                pieces.append(Piece(index, answer.pending, answer.tokens, answer.finish_reason))
                answer.pending, answer.tokens, answer.is_told = "", [], answer.is_told or is_end
        return pieces

    def usage(self) -> dict:
        """Return the counts of the request: its prompt once, and the tokens of all answers."""
        usages = [answer.usage for answer in self.answers]
        prompt, new = self.num_prompt, sum(answer.num_tokens for answer in self.answers)
        # Of several answers, the first to compute the prompt has found least of it.
        details = {"cached_tokens": min(usage.cached_tokens for usage in usages)}
        counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        return counts | {"prompt_tokens_details": details}


class Piece(NamedTuple):
    """What is new of an answer: text, and tokens with their places; `finish_reason` is there with the last one."""

    index: int
    text: str
    tokens: list[tuple[Token, int]]
    finish_reason: str | None
