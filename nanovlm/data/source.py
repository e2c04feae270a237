"""The interface of a source of raw records (see records.py), and how records are dealt to the slots of a run.

A slot is one micro-batch of every step. Records come in rounds, one for each slot:

```
              slot 0    slot 1    slot 2         two ranks, num_slots = 3:
round 0       record 0  record 1  record 2         rank 0 asks for the slots (0, 2), rank 1 for (1,)
round 1       record 3  record 4  record 5
```

So what a slot gets does not depend on the ranks, and each record of a pass goes to one slot only.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from nanovlm.errors import UserError


class Damaged(UserError):
    """Raised by `read` for a loss of nobody knows how many records, where one that cannot be read is one."""


class Ref(NamedTuple):
    """A reference to a record that is dealt to a slot but not read yet."""

    slot: int
    # Index of the record in its slot, from 0: the round.
    number: int
    # Number of complete passes over the data before this record.
    epoch: int
    # The argument of `read`.
    key: Any
    # Name of its source, and its place there.
    source: str
    where: str
    # `start` for the round after this one, JSON-serialisable; valid once this round is complete.
    after: Any
    # Of several sources that are read as one the index of that which it is from.
    part: int = 0


class Source(Protocol):
    """Where raw records come from: files, streams or mixtures. Keeps no file open, because workers are forked."""

    name: str

    @property
    def damaged(self) -> Sequence[str]:
        """One sentence for each loss of data that was found when the source was opened."""
        ...

    def refs(self, slots: Sequence[int], num_slots: int, start: Any = None) -> Iterator[Ref]:
        """Deal records to `slots`, some of the `num_slots` slots, round by round and pass after pass, endlessly.

        `start` is None, or `after` of the last round that is already done.
        """
        ...

    def read(self, key: Any) -> dict:
        """Return the raw record of a ref. Raises UserError that says what is wrong with it."""
        ...


@dataclass(frozen=True)
class Order:
    """The order in which a source of known size is read: its own, or a new shuffled one for every pass."""

    seed: int = 0
    shuffle: bool = False
    # Index of the source in a mixture, so that no two sources are shuffled alike.
    part: int | None = None

    def __call__(self, epoch: int, length: int, blocks: Sequence[int] | None = None) -> Sequence[int] | np.ndarray:
        """Return the indices of a pass; those between two entries of `blocks`, read as one block, stay together."""
        if not self.shuffle:
            return range(length)
        rng = np.random.default_rng((self.seed, epoch) if self.part is None else (self.seed, epoch, self.part))
        if blocks is None:
            return rng.permutation(length)
        indices = [rng.permutation(np.arange(start, end)) for start, end in itertools.pairwise(blocks)]
        return np.concatenate([indices[i] for i in rng.permutation(len(indices))])


IN_ORDER = Order()


def first_pass(source: Source) -> Iterator[Ref]:
    """Yield the refs of a source's first pass: each record once."""
    return itertools.takewhile(lambda ref: ref.epoch == 0, source.refs([0], 1))


def deal(source, slots: Sequence[int], num_slots: int, start: int | None = None) -> Iterator[Ref]:
    """Deal the records of a source that has a length, an `order` and optionally `blocks`; the keys are indices."""
    length, blocks = len(source), getattr(source, "blocks", None)
    epoch, order = None, ()
    for number in itertools.count(start or 0):
        for slot in slots:
            now, place = divmod(number * num_slots + slot, length)
            if now != epoch:
                epoch, order = now, source.order(now, length, blocks)
            index = int(order[place])
            yield Ref(slot, number, now, index, source.name, f"sample {index}", number + 1)
