"""Several sources of raw records as one: one after the other, mixed by weights, or as lessons."""

import bisect
import itertools
import math
from array import array
from collections.abc import Iterator, Sequence, Sized
from typing import NamedTuple

from nanovlm.data.source import IN_ORDER, Order, Ref, Source, deal
from nanovlm.errors import UserError

NUM_CHANGES = 50  # of the weights along a stage in which they are gradual


def parts_of(source: Source) -> list[Source]:
    """Return the sources that a source is made of; a simple source is its own only part."""
    return source.sources if isinstance(source, Concatenation | Mixture) else [source]


class Concatenation:
    """Sources of known size one after the other, each record once a pass; `blocks` are those of the sources."""

    def __init__(self, sources: list, order: Order = IN_ORDER):
        self.sources, self.order = list(sources), order
        self.name = " + ".join(source.name for source in sources)
        self.damaged = [sentence for source in sources for sentence in source.damaged]
        self.starts = [0, *itertools.accumulate(map(len, sources))]
        self.blocks = None
        if any(source.blocks is not None for source in sources):
            parts = zip(self.starts, sources, strict=False)
            starts = (start + i for start, s in parts for i in (s.blocks or range(len(s) + 1))[:-1])
            self.blocks = array("q", [*starts, len(self)])

    def __len__(self):
        return self.starts[-1]

    def refs(self, slots: Sequence[int], num_slots: int, start: int | None = None) -> Iterator[Ref]:
        for ref in deal(self, slots, num_slots, start):
            part, index = self.find(ref.key)
            yield ref._replace(source=self.sources[part].name, where=f"sample {index}", part=part)

    def read(self, key: int) -> dict:
        part, index = self.find(key)
        return self.sources[part].read(index)

    def find(self, index: int) -> tuple[int, int]:
        """Return the number of the source in which an index of the whole falls, and the index there."""
        part = bisect.bisect_right(self.starts, index) - 1
        return part, index - self.starts[part]


class Stage(NamedTuple):
    """A part of a run with weights of its own: of round `begin` and those after it, up to the next stage's."""

    begin: int
    weights: tuple[float, ...]
    # Rounds along which the weights become those of the next stage; 0 for at once, at its end.
    length: int = 0
    next_weights: tuple[float, ...] = ()

    def weights_at(self, number: int) -> tuple[float, ...]:
        """Return the weights of a round, which change in NUM_CHANGES equal steps."""
        if not self.length:
            return self.weights
        t = (number - self.begin) * NUM_CHANGES // self.length / NUM_CHANGES
        return tuple((1 - t) * a + t * b for a, b in zip(self.weights, self.next_weights, strict=True))


class Mixture:
    """Several sources, mixed or as lessons, endless: a source that is exhausted starts again.

    With weights, a fixed schedule of 1000 rounds repeats, in which each source has its share, evenly spread; so every
    slot sees the same shares. As lessons, each source gives as many records as `lengths` says, rounded up to whole
    rounds, before the next one takes over. An epoch ends for a slot when it has ended there for every source.

    With `stages`, the numbers of records of all stages but the last, `weights` has those of each stage, one stage after
    the other, some of them 0; with `is_gradual` they move along a stage towards those of the next. `most` is the number
    of records after which a source is left out, None for no end: the others share its rounds by their weights, and the
    mixture ends with the last of them.
    """

    num_rounds = 1000

    def __init__(
        self,
        sources: Sequence[Source],
        weights: list[float] | None = None,
        lengths: list[int] | None = None,
        stages: Sequence[int] = (),
        is_gradual: bool = False,
        most: Sequence[int | None] = (),
    ):
        self.sources, self.weights, self.lengths = list(sources), weights, lengths
        self.stages, self.is_gradual, self.most = stages, is_gradual, list(most) or [None] * len(self.sources)
        if not sources or (weights is not None and len(weights) != len(sources) * (len(stages) + 1)):
            num_weights = "no" if weights is None else len(weights)
            raise UserError(
                f"a mixture needs sources and a weight for each; there are {len(sources)}, {num_weights} weights"
                + (f" for {len(stages) + 1} stages" if stages else "")
            )
        if (weights is None) == (lengths is None):
            raise UserError("a mixture needs either weights or the lengths of its lessons")
        self.name = " + ".join(source.name for source in sources)
        self.damaged = [sentence for source in sources for sentence in source.damaged]
        self.schedules: dict[tuple[float, ...], list[int]] = {}
        if weights is not None:
            for stage in self._stages(1):
                self._check(stage.weights)
            self.counts = self._count_rounds(tuple(weights[: len(sources)]))

    def refs(self, slots: Sequence[int], num_slots: int, start: dict | None = None) -> Iterator[Ref]:
        start = start or {"number": 0, "parts": [None] * len(self.sources), "epochs": [0] * len(self.sources)}
        after = list(start["parts"])
        # How many rounds each source was read for; of what older runs saved, those with a length tell it.
        rounds = list(start.get("rounds", [part if isinstance(part, int) else 0 for part in after]))
        epochs = self._find_epochs(slots, num_slots, rounds, start["epochs"])
        is_over = [self._is_over(k, rounds[k], num_slots) for k in range(len(rounds))]
        parts = [source.refs(slots, num_slots, after[k]) for k, source in enumerate(self.sources)]
        stages = self._stages(num_slots) if self.lengths is None else []
        for number in itertools.count(start["number"]):
            if all(is_over):
                return
            k = self._choose(number, num_slots, stages, is_over)
            rounds[k] += 1
            is_over[k] = self._is_over(k, rounds[k], num_slots)
            for ref in itertools.islice(parts[k], len(slots)):
                own = epochs[str(ref.slot)]
                after[k], own = ref.after, (*own[:k], ref.epoch, *own[k + 1 :])
                epochs[str(ref.slot)] = own
                now = {"number": number + 1, "parts": list(after), "epochs": dict(epochs), "rounds": list(rounds)}
                going_on = [epoch for epoch, ends in zip(own, is_over, strict=True) if not ends]
                epoch = min(going_on, default=max(own))
                yield ref._replace(number=number, epoch=epoch, key=(k, ref.key), after=now, part=k)

    def read(self, key: tuple) -> dict:
        k, of_part = key
        return self.sources[k].read(of_part)

    def _find_epochs(self, slots: Sequence[int], num_slots: int, rounds: list[int], saved) -> dict[str, tuple]:
        """Return the pass of each source in which the last record of each slot was, before a round.

        It follows from the rounds where a source has a length. That of a stream is `saved`, of each slot of a rank, or
        of a rank (by older runs); a slot that was on another rank takes the earliest.
        """
        saved = saved if isinstance(saved, dict) else {"": saved}
        found = {}
        for slot in slots:
            told = saved.get(str(slot)) or [min(of_slot) for of_slot in zip(*saved.values(), strict=True)]
            found[str(slot)] = tuple(
                max(0, (rounds[k] - 1) * num_slots + slot) // len(source) if isinstance(source, Sized) else told[k]
                for k, source in enumerate(self.sources)
            )
        return found

    def _is_over(self, k: int, rounds: int, num_slots: int) -> bool:
        most = self.most[k]
        return most is not None and rounds * num_slots >= most

    def _choose(self, number: int, num_slots: int, stages: list[Stage], is_over: list[bool]) -> int:
        """Return the index of the source that a round reads."""
        if self.lengths is not None:
            ends = itertools.accumulate(math.ceil(length / num_slots) for length in self.lengths)
            return next((k for k, end in enumerate(ends) if number < end), len(self.lengths))
        now = bisect.bisect_right([stage.begin for stage in stages], number) - 1
        for stage in stages[now:]:
            weights = stage.weights_at(number) if stage is stages[now] else stage.weights
            left = tuple(0.0 if ends else weight for weight, ends in zip(weights, is_over, strict=True))
            if any(left):
                return self._find_schedule(left)[number % self.num_rounds]
        return is_over.index(False)  # which the stages that are left do not read: better than an end of the run

    def _stages(self, num_slots: int) -> list[Stage]:
        """Return the stages of a mixture by weights, each of whole rounds."""
        weights, num = self.weights or [], len(self.sources)
        each = [tuple(weights[i : i + num]) for i in range(0, len(weights), num)]
        lengths = [math.ceil(length / num_slots) for length in self.stages]
        begins = [0, *itertools.accumulate(lengths)]
        if not self.is_gradual:
            return [Stage(begin, own) for begin, own in zip(begins, each, strict=True)]
        return [*map(Stage, begins, each, lengths, each[1:]), Stage(begins[-1], each[-1])]

    def _find_schedule(self, weights: tuple[float, ...]) -> list[int]:
        """Return which source each of num_rounds rounds reads."""
        if weights not in self.schedules:
            # The ideal place for the j-th of a source's n rounds is the middle of the j-th of n equal parts.
            counts = self._count_rounds(weights)
            wanted = [((j + 0.5) / n, k) for k, n in enumerate(counts) for j in range(n)]
            self.schedules[weights] = [k for _middle, k in sorted(wanted)]
        return self.schedules[weights]

    def _check(self, weights: tuple[float, ...]):
        """Raise UserError for weights of a stage that are none, or so small that they would be none."""
        for source, weight in zip(self.sources, weights, strict=True):
            if not (math.isfinite(weight) and (weight > 0 or (self.stages and weight == 0))):
                raise UserError(f"the weight of {source.name} is {weight}; it must be positive")
        if not any(weights):
            raise UserError(f"the weights of a stage are all 0: {', '.join(map(str, weights))}")
        for source, weight, count in zip(self.sources, weights, self._count_rounds(weights), strict=True):
            if count == 0 and weight:
                raise UserError(f"the weight of {source.name} is {weight}, too little of {sum(weights)}: "
                                 f"it must be at least 1/{self.num_rounds} of the sum")  # fmt: skip

    def _count_rounds(self, weights: tuple[float, ...]) -> list[int]:
        """Round the shares to whole rounds that sum to num_rounds, by the largest remainders."""
        shares = [weight / sum(weights) * self.num_rounds for weight in weights]
        counts = [math.floor(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k])
        for k in by_remainder[: self.num_rounds - sum(counts)]:
            counts[k] += 1
        return counts


def by_temperature(weights: Sequence[float], temperature: float) -> list[float]:
    """Return weights that favour small sources: their power 1 / temperature (mT5, arXiv 2010.11934, has 1 / 0.3).

    They sum to 1, so that no power is too large for a number. What are no weights of a mixture come back as they are.
    """
    largest = max(weights)
    if largest <= 0 or min(weights) < 0:
        return list(weights)
    powers = [(weight / largest) ** (1 / temperature) for weight in weights]
    return [power / sum(powers) for power in powers]
