"""Several sources of raw records as one."""

import bisect
import itertools
import math
from array import array

from nanovlm.data.source_files import check_index


class Mixture:
    """Several sources of known size as one: in turns by their weights, as lessons, or each once, one after the other.

    With weights a fixed schedule of 1000 places repeats, in which each source has its share, evenly spread. As lessons
    each source has `lengths` samples before the next takes over, the last as many as are asked for. Both are endless;
    a source that is over begins again.
    """

    num_slots = 1000

    def __init__(self, sources: list, weights: list[float] | None = None, lengths: list[int] | None = None):
        if not sources or (weights is not None and len(weights) != len(sources)):
            num_weights = "no" if weights is None else len(weights)
            raise ValueError(
                f"a mixture needs sources and a weight for each; there are {len(sources)}, {num_weights} weights"
            )
        self.sources = list(sources)
        self.name = " + ".join(source.name for source in sources)
        self.damaged = [sentence for source in sources for sentence in source.damaged]
        self.starts = [0, *itertools.accumulate(map(len, sources))]
        self.weights, self.lengths = weights, lengths
        self.is_scheduled = weights is not None or lengths is not None
        if lengths is not None:
            self.ends = [*itertools.accumulate(lengths), math.inf]
        if any(hasattr(source, "blocks") for source in sources):
            parts = zip(self.starts, sources, strict=False)
            blocks = (start + i for start, s in parts for i in getattr(s, "blocks", range(len(s) + 1))[:-1])
            self.blocks = array("q", [*blocks, len(self)])
        if weights is not None:
            self.counts = self._count_slots(weights)
            # The j-th place of a source with n places is wanted in the middle of the j-th of n equal parts.
            wanted = [((j + 0.5) / n, k, j) for k, n in enumerate(self.counts) for j in range(n)]
            # of each place: source, how many places before it in the schedule are of this source
            self.schedule = [(k, j) for _middle, k, j in sorted(wanted)]

    def _count_slots(self, weights):
        """Round the shares to whole places that sum to num_slots, by the largest remainders."""
        for source, weight in zip(self.sources, weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"the weight of {source.name} is {weight}; it must be positive")
        shares = [weight / sum(weights) * self.num_slots for weight in weights]
        counts = [math.floor(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda k: counts[k] - shares[k])
        for k in by_remainder[: self.num_slots - sum(counts)]:
            counts[k] += 1
        for source, weight, count in zip(self.sources, weights, counts, strict=True):
            if count == 0:
                raise ValueError(f"the weight of {source.name} is {weight}, too little of {sum(weights)}: "
                                 f"it must be at least 1/{self.num_slots} of the sum")  # fmt: skip
        return counts

    def __len__(self):
        return self.starts[-1]

    def locate(self, position: int, rank: int = 0, num_ranks: int = 1) -> tuple[int, int]:
        """Return which source a rank's position-th sample is of, and how many of it all ranks read before this one.

        By weights each rank has the schedule to itself, so that all see the same shares; lessons end for all at once.
        """
        if self.lengths is not None:
            place = position * num_ranks + rank
            number = bisect.bisect_right(self.ends, place)
            return number, place - (self.ends[number - 1] if number else 0)
        cycle, slot = divmod(position, self.num_slots)
        number, before = self.schedule[slot]
        return number, (cycle * self.counts[number] + before) * num_ranks + rank

    def raw(self, index: int) -> dict:
        """Return a record by its index when the sources stand one after the other."""
        check_index(self, index)
        source, place = self.find(index)
        return source.raw(place)

    def find(self, index: int) -> tuple:
        """Return the source in which an index of the whole falls, and the index there."""
        number = bisect.bisect_right(self.starts, index) - 1
        return self.sources[number], index - self.starts[number]
