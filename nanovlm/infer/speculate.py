"""Guesses of a row's next tokens -> the tokens that the model chooses, several a pass: speculative decoding.

```
tokens so far  a b c      guessed  d e f      one pass over  c  d  e  f
                          the model chooses behind each      d  e  x  .      accepted: d, e; and x, its own choice
```

Guesses are looked up in the row's own tokens (PromptLookup), or come from a smaller model (draft_model.py). What the
model chooses behind a right guess is what it would have chosen without guesses, with the same number drawn by the row's
generator. So such guesses change no token of an answer, greedy or sampled; they only save passes. As beside other rows
(engine.py), sums are rounded in another order: in bf16 that alone can change a token where two are nearly as likely.

Guesses that were drawn themselves, as the draft model's are for a sampled answer, come with the probabilities that they
were drawn by. Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318)
accepts more of them: 0.69 at temperature 1 with an int4 copy as the draft, where the row's own numbers would accept
0.30 and greedy guesses 0.26 (SmolLM2-135M, 350 positions, 2026-11-29). It keeps the distribution of the answers, though
not the answer of a seed.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nanovlm.config import SamplingConfig
from nanovlm.errors import UserError
from nanovlm.infer.sampling import choose, filter_logits, find_never, find_stops, penalize
from nanovlm.model.vlm import VLM


class Guess(NamedTuple):
    """Tokens that may follow those of a row; `probabilities` [k, V] if they were drawn, and by these."""

    tokens: list[int]
    probabilities: Tensor | None = None

    def cut(self, most: int) -> "Guess":
        """Return at most so many of the tokens."""
        return Guess(self.tokens[:most], None if self.probabilities is None else self.probabilities[:most])


class Guessed(Protocol):
    """What look-up sees of a row: its tokens so far, prompt first."""

    tokens: list[int]


class Draft(Protocol):
    """Guesses for the rows of one engine."""

    def prepare(self, model: VLM, num_rows: int, num_blocks: int):
        """Prepare for an engine of this model, with so many rows and blocks of its cache."""
        ...

    def propose(self, rows: Sequence[Any]) -> Sequence[Guess | None]:
        """Return for each of these rows (row.Row), which are answering, what may follow, maybe nothing.

        None has the row wait for the next step. The engine cuts a guess that is longer than the answer may become.
        """
        ...

    def forget(self, row: Any):
        """The row has ended."""
        ...


# --- checking -------------------------------------------------------------------------------------------------


def add_draft(seen: Tensor, draft: Sequence[int]) -> Tensor:
    """Return bool[k + 1, V]: `seen` bool[V], to which each position adds the drafted tokens before it."""
    grown = seen.expand(len(draft) + 1, -1).clone()
    if draft:
        pairs = [(later, token) for i, token in enumerate(draft) for later in range(i + 1, len(draft) + 1)]
        positions, tokens = torch.tensor(pairs).T.to(seen.device, non_blocking=True)
        grown[positions, tokens] = True
    return grown


def join_guesses(guesses: Sequence[Guess], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return what was drafted for each position, int64[R], and by which probabilities, like logits [R, V].

    The position behind a guess has token 0 and probabilities 0.
    """
    ids = torch.tensor([token for guess in guesses for token in (*guess.tokens, 0)])
    none = torch.zeros_like(logits[:1])
    parts = [part for guess in guesses for part in (guess.probabilities, none) if part is not None]
    return ids.to(logits.device, non_blocking=True), torch.cat([part.to(none.dtype) for part in parts])


def choose_against(
    logits: Tensor,
    seen: Tensor | None,
    config: SamplingConfig,
    generators: list[torch.Generator],
    draft: Tensor,
    probabilities: Tensor,
) -> Tensor:
    """Choose as `choose` does, but the token drafted for a position as often as the distribution p allows.

    `draft` int64[R] was drawn by `probabilities` q [R, V], all 0 where nothing was drafted. A draft x is kept with
    probability min(1, p(x) / q(x)); else a token is drawn from the positive part of p - q, which x is not in. One
    number is drawn a position: given that x is rejected, how far the number is beyond p(x) / q(x) is uniform again.
    """
    if config.temperature == 0:
        return choose(logits, seen, config, generators)
    p, q = find_probabilities(logits, seen, config), probabilities.double()
    drawn = torch.stack([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    drawn, one = drawn.to(p.device, non_blocking=True), draft[:, None]
    bound = torch.where(q.gather(-1, one) > 0, p.gather(-1, one) / q.gather(-1, one), 0).clamp(max=1)
    sums = (p - q).clamp(min=0).cumsum(-1)
    share = ((drawn - bound) / (1 - bound).clamp(min=1e-300)).clamp(0, 1 - 2**-53)
    other = torch.searchsorted(sums, share * sums[:, -1:], right=True).clamp(max=sums.shape[1] - 1)
    # Where p and q differ by roundings alone, nothing is left to draw from.
    return torch.where((drawn < bound) | (sums[:, -1:] == 0), one, other)[:, 0]


def find_probabilities(logits: Tensor, seen: Tensor | None, config: SamplingConfig) -> Tensor:
    """Return the probabilities fp64[R, V] by which `choose` draws."""
    if config.repetition_penalty != 1 and seen is not None:
        logits = penalize(logits, seen, config.repetition_penalty)
    return filter_logits(logits, config).double().softmax(-1)


def accept(draft: Sequence[int], chosen: Sequence[int], stops: Collection[int] = ()) -> list[int]:
    """Return the chosen tokens up to the first that was not drafted or is one of `stops`, that one included."""
    for i, token in enumerate(chosen):
        if i == len(draft) or token != draft[i] or token in stops:
            return list(chosen[: i + 1])
    raise AssertionError(f"{len(chosen)} choices for {len(draft)} drafted tokens")


def rewind(generator: torch.Generator, state: Tensor, num: int):
    """Put a generator where it would be if it had drawn for `num` tokens since it was in `state`."""
    generator.set_state(state)
    torch.rand(num, dtype=torch.float64, generator=generator)


# --- guessing from the row's own tokens -----------------------------------------------------------------------


class PromptLookup:
    """Guesses what followed when the last tokens of a row occurred before, in its prompt or its answer.

    It looks for the last `longest` tokens, then for fewer down to the last `shortest`, and takes the latest occurrence.
    It guesses at most `num_tokens`, and none behind the end of an answer; image and padding tokens are never guessed.
    Where what followed reaches the end of the row, the guess goes on with its own beginning, so that a row that repeats
    itself is guessed in full.

    A row whose guesses fail is guessed for less often: after MOST_FAILURES guesses in a row of which no token was
    accepted there is none for PAUSE tokens, and for twice as many, up to LONGEST_PAUSE, each time the next one fails.

    SmolLM2-135M on a CPU, 160 greedy tokens (2026-11-29): 2.7 tokens a pass where it repeats a file, 1.1 in a story,
    1.2 in a numbered list, of which 30 of 248 guesses are accepted. A pass with four guesses costs 1.2 times one
    without in bf16, 1.5 in int8, 2.1 in fp32, so in fp32 the list takes longer with guesses than without.
    """

    def __init__(self, num_tokens: int = 4, longest: int = 3, shortest: int = 2):
        for name, value, least in (("num_tokens", num_tokens, 1), ("shortest", shortest, 1), ("longest", longest, 1)):
            if value < least:
                raise UserError(f"{name} = {value} must be at least {least}")
        if longest < shortest:
            raise UserError(f"longest = {longest} must be at least shortest = {shortest}")
        self.num_tokens, self.longest, self.shortest = num_tokens, longest, shortest
        self.never: frozenset[int] = frozenset()
        self.rows: dict[Guessed, Index] = {}

    def prepare(self, model: VLM, num_rows: int, num_blocks: int):
        # The model chooses an end itself in the same pass.
        self.never = frozenset((*find_never(model.config), *find_stops(model.config)))

    def propose(self, rows: Sequence[Guessed]) -> list[Guess]:
        return [Guess(self._propose(row)) for row in rows]

    def forget(self, row: Guessed):
        self.rows.pop(row, None)

    def _propose(self, row: Guessed) -> list[int]:
        index = self.rows.get(row)
        if index is None:
            index = self.rows[row] = Index(self.longest, self.shortest)
        index.grow(row.tokens)
        if not index.pace.may_guess(row.tokens):
            return []
        tokens, guess = row.tokens, []
        start = index.find(tokens)
        if start is None:
            return []
        for source in range(start, start + self.num_tokens):
            token = tokens[source] if source < len(tokens) else guess[source - len(tokens)]
            if token in self.never:
                break
            guess.append(token)
        index.pace.note(tokens, guess)
        return guess


class Index:
    """Where each n-gram of a row that is followed by something occurred last; grows with the row."""

    def __init__(self, longest: int, shortest: int):
        self.places: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(longest, shortest - 1, -1)}
        self.num_tokens, self.pace = 0, Pace()

    def grow(self, tokens: list[int]):
        """Note the n-grams that end before the last token."""
        for n, places in self.places.items():
            for end in range(max(self.num_tokens, n), len(tokens)):
                places[tuple(tokens[end - n : end])] = end
        self.num_tokens = len(tokens)

    def find(self, tokens: list[int]) -> int | None:
        """Return the position behind the latest earlier occurrence of the longest n-gram at the end, None without."""
        for n, places in self.places.items():
            if (found := places.get(tuple(tokens[-n:]))) is not None:
                return found
        return None


MOST_FAILURES, PAUSE, LONGEST_PAUSE = 2, 4, 64


class Pace:
    """Whether it pays to guess for a row: what became of its last guesses."""

    def __init__(self):
        self.guess: list[int] = []
        self.num_failures = self.length = self.next = 0
        self.pause = PAUSE

    def note(self, tokens: list[int], guess: list[int]):
        """A guess is made behind these tokens."""
        self.guess, self.length = guess, len(tokens)

    def may_guess(self, tokens: list[int]) -> bool:
        if self.guess and len(tokens) > self.length:
            if tokens[self.length] == self.guess[0]:
                self.num_failures, self.pause = 0, PAUSE
            else:
                self.num_failures += 1
            self.guess = []
            if self.num_failures >= MOST_FAILURES:
                self.next, self.pause = len(tokens) + self.pause, min(2 * self.pause, LONGEST_PAUSE)
        return len(tokens) >= self.next
