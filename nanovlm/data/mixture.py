"""Several sources of raw records as one: one after the other, mixed by weights, or as lessons."""

import bisect
import itertools
import math
from array import array
from collections.abc import Iterator, Sequence

from nanovlm.data.source import IN_ORDER, Order, Ref, Source, deal
from nanovlm.errors import UserError


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
            source, index = self.find(ref.key)
            yield ref._replace(source=source.name, where=f"sample {index}")

    def read(self, key: int) -> dict:
        source, index = self.find(key)
        return source.read(index)

    def find(self, index: int) -> tuple:
        """Return the source in which an index of the whole falls, and the index there."""
        number = bisect.bisect_right(self.starts, index) - 1
        return self.sources[number], index - self.starts[number]


class Mixture:
    """Several sources, mixed or as lessons, endless: a source that is exhausted starts again.

    With weights, a fixed schedule of 1000 rounds repeats, in which each source has its share, evenly spread; so every
    slot sees the same shares. As lessons, each source gives as many records as `lengths` says, rounded up to whole
    rounds, before the next one takes over. An epoch ends when it has ended for every source.
    """

    num_rounds = 1000

    def __init__(self, sources: Sequence[Source], weights: list[float] | None = None, lengths: list[int] | None = None):
        self.sources, self.weights, self.lengths = list(sources), weights, lengths
        if not sources or (weights is not None and len(weights) != len(sources)):
            num_weights = "no" if weights is None else len(weights)
            raise UserError(
                f"a mixture needs sources and a weight for each; there are {len(sources)}, {num_weights} weights"
            )
        if (weights is None) == (lengths is None):
            raise UserError("a mixture needs either weights or the lengths of its lessons")
        self.name = " + ".join(source.name for source in sources)
        self.damaged = [sentence for source in sources for sentence in source.damaged]
        if weights is not None:
            self.counts = self._count_rounds(weights)
            # The ideal place for the j-th of a source's n rounds is the middle of the j-th of n equal parts.
            wanted = [((j + 0.5) / n, k) for k, n in enumerate(self.counts) for j in range(n)]
            self.schedule = [k for _middle, k in sorted(wanted)]

    def refs(self, slots: Sequence[int], num_slots: int, start: dict | None = None) -> Iterator[Ref]:
        start = start or {"number": 0, "parts": [None] * len(self.sources), "epochs": [0] * len(self.sources)}
        after, epochs = list(start["parts"]), list(start["epochs"])
        parts = [source.refs(slots, num_slots, after[k]) for k, source in enumerate(self.sources)]
        for number in itertools.count(start["number"]):
            k = self._choose(number, num_slots)
            for ref in itertools.islice(parts[k], len(slots)):
                after[k], epochs[k] = ref.after, ref.epoch
                now = {"number": number + 1, "parts": list(after), "epochs": list(epochs)}
                yield ref._replace(number=number, epoch=min(epochs), key=(k, ref.key), after=now)

    def read(self, key: tuple) -> dict:
        k, of_part = key
        return self.sources[k].read(of_part)

    def _choose(self, number: int, num_slots: int) -> int:
        """Return the index of the source that a round reads."""
        if self.lengths is None:
            return self.schedule[number % self.num_rounds]
        ends = itertools.accumulate(math.ceil(length / num_slots) for length in self.lengths)
        return next((k for k, end in enumerate(ends) if number < end), len(self.lengths))

    def _count_rounds(self, weights):
        """Round the shares to whole rounds that sum to num_rounds, by the largest remainders."""
        for source, weight in zip(self.sources, weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"the weight of {source.name} is {weight}; it must be positive")
        shares = [weight / sum(weights) * self.num_rounds for weight in weights]
        counts = [math.floor(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k])
        for k in by_remainder[: self.num_rounds - sum(counts)]:
            counts[k] += 1
        for source, weight, count in zip(self.sources, weights, counts, strict=True):
            if count == 0:
                raise UserError(f"the weight of {source.name} is {weight}, too little of {sum(weights)}: "
                                 f"it must be at least 1/{self.num_rounds} of the sum")  # fmt: skip
        return counts
