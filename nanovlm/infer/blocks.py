"""Who uses which block of the cache: reference counts, prefixes by their contents, the least recently used goes first.

```
free, without contents ---take---> being filled ---fill---> filled, found by its key ---release---> kept, no user
        ^                            (by its writer)             ^                                   |      |
        |                                                        +------------- shared ------------ +      |
        +------------------------------------- evicted, the least recently used ---------------------------+
```

A key says what a block and all before it hold: token ids and the digests of the pictures that they show (`block_key`).
A block that is being filled can be found already: whoever shares it waits until it is filled, and fills it itself if
its writer is gone.
"""

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from nanovlm.data.types import Grid


class Block:
    """BLOCK slots of the cache."""

    __slots__ = ("is_filled", "key", "num_users", "number", "writer")

    def __init__(self, number: int):
        self.number, self.num_users = number, 0
        # What it and the blocks before it hold; b"" where nobody may find it.
        self.key = b""
        self.is_filled = False
        # Who fills it, until it is filled.
        self.writer: object = None


class Blocks:
    """All blocks of a cache. Without `keeps_prefixes` nothing is found that no row uses any more."""

    def __init__(self, num_blocks: int, keeps_prefixes: bool = True):
        self.all = [Block(number) for number in range(num_blocks)]
        self.keeps_prefixes = keeps_prefixes
        self.found: dict[bytes, Block] = {}
        self.empty = list(range(num_blocks))  # a heap: the lowest first, so that rows lie in one piece
        self.kept: OrderedDict[int, Block] = OrderedDict()  # without users, the least recently used first

    @property
    def num_free(self) -> int:
        """Count the blocks that a row could get: the empty ones, and those that are only kept."""
        return len(self.empty) + len(self.kept)

    def take(self, keys: Sequence[bytes], num_blocks: int) -> list[Block] | None:
        """Return the blocks of a row, None if too few are free. The first are shared as far as `keys` are found.

        The others have no contents; as many as there are keys can be found by them from now on.
        """
        shared = []
        for key in keys:
            if (block := self.found.get(key)) is None:
                break
            shared.append(block)
        num_new = num_blocks - len(shared)
        if num_new > self.num_free - sum(block.num_users == 0 for block in shared):
            return None
        for block in shared:
            self.kept.pop(block.number, None)
            block.num_users += 1
        new = self._empty(num_new)
        for block in new:
            block.num_users, block.is_filled, block.writer = 1, False, None
        for block, key in zip(new, keys[len(shared) :], strict=False):
            self.name(block, key)
        return shared + new

    def name(self, block: Block, key: bytes):
        """Let a block be found by what it holds, unless another one that holds the same is."""
        if not block.key and key not in self.found:
            block.key = key
            self.found[key] = block

    def release(self, blocks: Sequence[Block], user: object):
        """A row needs its blocks no longer."""
        for block in reversed(blocks):  # the last ones are evicted first: without those before they are never found
            block.num_users -= 1
            if block.writer is user:
                block.writer = None
            if block.num_users == 0:
                if block.is_filled and block.key and self.keeps_prefixes:
                    self.kept[block.number] = block
                else:
                    self._forget(block)
                    heapq.heappush(self.empty, block.number)

    def _empty(self, num: int) -> list[Block]:
        """Take so many out of the empty ones, then out of those that are kept, in ascending order."""
        numbers = [heapq.heappop(self.empty) for _ in range(min(num, len(self.empty)))]
        while len(numbers) < num:
            number, block = self.kept.popitem(last=False)
            self._forget(block)
            numbers.append(number)
        return [self.all[number] for number in sorted(numbers)]

    def _forget(self, block: Block):
        if block.key:
            del self.found[block.key]
            block.key = b""


def block_key(before: bytes, ids: Sequence[int], digests: Sequence[bytes]) -> bytes:
    """Return the key of a block of BLOCK token ids behind one of the key `before`, b"" for the first.

    `digests` are those of the pictures that its image tokens show. Two blocks have an equal key only if all tokens and
    all pictures up to there are equal.
    """
    return hashlib.sha256(b"".join((before, array("q", ids).tobytes(), *digests))).digest()


def digest_picture(tiles: Tensor, grid: Grid | None) -> bytes:
    """Return a digest of a picture's pixels, their dtype and shape, and how its tiles lie."""
    about = f"{tiles.dtype} {tuple(tiles.shape)} {grid}".encode()
    return hashlib.sha256(about + tiles.contiguous().view(torch.uint8).numpy().tobytes()).digest()
