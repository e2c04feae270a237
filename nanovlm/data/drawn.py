"""Records that a pure function draws -> a source of them: all of a split, or only of some kinds."""

from collections.abc import Callable, Collection, Iterator, Sequence

from nanovlm.data.source import IN_ORDER, Order, Ref, deal
from nanovlm.errors import UserError


class Drawn:
    """Record k is `draw(split, k, kinds)`, the same on any machine; `kinds` are of `known`, or none for the usual."""

    damaged, blocks = (), None

    def __init__(
        self,
        name: str,
        draw: Callable[[str, int, Sequence[str]], dict],
        splits: Sequence[str],
        known: Collection[str],
        split: str,
        length: int = 1_000_000,
        kinds: Sequence[str] = (),
        order: Order = IN_ORDER,
    ):
        self.draw, self.split, self.length, self.kinds, self.order = draw, split, length, tuple(kinds), order
        self.name = f"{name}:{','.join(kinds)}" if kinds else name
        if split not in splits:
            raise UserError(f"{self.name} has no split {split!r}; there are {', '.join(splits)}")
        if unknown := [kind for kind in kinds if kind not in known]:
            raise UserError(f"{self.name}: unknown kind {unknown[0]!r}; there are {', '.join(known)}")

    def __len__(self):
        return self.length

    def refs(self, slots: Sequence[int], num_slots: int, start: int | None = None) -> Iterator[Ref]:
        return deal(self, slots, num_slots, start)

    def read(self, key: int) -> dict:
        return self.draw(self.split, key, self.kinds)
