"""What a source of raw records is (records.py says what those are), and how records are dealt to the slots of a run.

A slot is one micro-batch of every step. Records come in rounds, one for each slot:

```
              slot 0    slot 1    slot 2         two ranks, num_slots = 3:
round 0       record 0  record 1  record 2         rank 0 asks for the slots (0, 2), rank 1 for (1,)
round 1       record 3  record 4  record 5
```

So what a slot gets does not depend on the ranks, and a rank reads no record twice.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np


class Ref(NamedTuple):
    """A record that was dealt to a slot and is not read yet."""

    slot: int
    # It is the number-th record of its slot, from 0: the round.
    number: int
    # Passes over the data that were complete before it.
    epoch: int
    # What `read` takes.
    key: Any
    # Name of the source that it is of, and its place there.
    source: str
    where: str
    # `start` of the round after this one, as JSON can hold it; valid when the round is complete.
    after: Any


class Source(Protocol):
    """Where raw records come from: files, streams and mixtures alike. It keeps no open file, as processes fork."""

    name: str
    # One sentence for each loss that was found when the source was opened.
    damaged: Sequence[str]

    def refs(self, slots: Sequence[int], num_slots: int, start: Any = None) -> Iterator[Ref]:
        """Deal records to these of `num_slots` slots, round by round, pass after pass without end.

        `start` is None, or `after` of the last round that is not wanted again.
        """

    def read(self, key: Any) -> dict:
        """Return the raw record of a ref. Raises ValueError that names what is wrong with it."""


@dataclass(frozen=True)
class Order:
    """In which order a source of known size is read: its own, or another one for every pass."""

    seed: int = 0
    shuffle: bool = False
    # Number of the source in a mixture, so that two of them do not go alike.
    part: int | None = None

    def __call__(self, epoch: int, length: int, blocks: Sequence[int] | None = None) -> Sequence[int]:
        """Return the indices of a pass; those between two entries of `blocks`, read at once, stay together."""
        if not self.shuffle:
            return range(length)
        rng = np.random.default_rng((self.seed, epoch) if self.part is None else (self.seed, epoch, self.part))
        if blocks is None:
            return rng.permutation(length)
        indices = [rng.permutation(np.arange(start, end)) for start, end in itertools.pairwise(blocks)]
        return np.concatenate([indices[i] for i in rng.permutation(len(indices))])


IN_ORDER = Order()


def first_pass(source: Source) -> Iterator[Ref]:
    """Yield the records of a source once each."""
    return itertools.takewhile(lambda ref: ref.epoch == 0, source.refs([0], 1))


def deal(source, slots: Sequence[int], num_slots: int, start: int | None = None) -> Iterator[Ref]:
    """Deal the records of a source that has a length, an `order` and maybe `blocks`; the keys are indices."""
    length, blocks = len(source), getattr(source, "blocks", None)
    epoch, order = None, ()
    for number in itertools.count(start or 0):
        for slot in slots:
            now, place = divmod(number * num_slots + slot, length)
            if now != epoch:
                epoch, order = now, source.order(now, length, blocks)
            index = int(order[place])
            yield Ref(slot, number, epoch, index, source.name, f"sample {index}", number + 1)
