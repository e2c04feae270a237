"""What an engine is asked and what it tells: requests, tokens, ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovlm.config import SamplingConfig
from nanovlm.data.types import Document


@dataclass(frozen=True)
class Request:
    """A prompt, and how to answer it."""

    # A document without branches that ends where the answer begins (Processor.prompt).
    prompt: Document
    sampling: SamplingConfig = SamplingConfig()
    # So many answers, each drawn by a generator of its own with the seed sampling.seed + index.
    num_answers: int = 1
    # How many of the likeliest tokens to tell with each token; None tells no log-probabilities.
    num_logprobs: int | None = None
    # Seconds from submission after which it ends; None for no limit.
    timeout: float | None = None
    # Whether to tell with which probability each token was drawn, and the token that ends an answer.
    tells_draws: bool = False
    # The name of one of the model's adapters; None takes those that are active.
    adapter: str | None = None


@dataclass(frozen=True)
class Token:
    """One more token of an answer; the token that ends an answer is none of these."""

    request: int
    # Index among the request's answers.
    answer: int
    id: int
    # Natural log-probability under the model (before temperature and filters); None unless asked for.
    logprob: float | None = None
    # (id, log-probability) of the likeliest tokens, likeliest first.
    likeliest: tuple[tuple[int, float], ...] = ()
    # Natural log-probability with which it was drawn: at the temperature (greedy: at 1), among the tokens that an
    # answer may contain, before other filters and the repetition penalty; None unless asked for.
    drawn: float | None = None


@dataclass(frozen=True)
class End:
    """An answer has ended; no event of it follows.

    `reason` is stop (the model ended it), length (max_new_tokens), cancelled, timeout or error; `message` is a sentence
    for the last two.
    """

    request: int
    answer: int
    reason: str
    message: str = ""
    usage: Usage = field(default_factory=lambda: Usage())
    # The token that ended the answer, where the request asks for draws and the reason is stop.
    last: Token | None = None


@dataclass(frozen=True)
class Usage:
    """What an answer took."""

    prompt_tokens: int = 0
    # Tokens of the prompt whose keys and values were there already.
    cached_tokens: int = 0
    new_tokens: int = 0
    # Seconds from submission until the first token was chosen, be it the one that ends the answer; 0 where none was.
    first_token_s: float = 0.0
    # Seconds from submission until the end.
    total_s: float = 0.0
    # Tokens that were guessed, and those of them that the model would have chosen too.
    drafted_tokens: int = 0
    accepted_tokens: int = 0


Event = Token | End
