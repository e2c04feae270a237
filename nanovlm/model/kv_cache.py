"""Keys and values of past tokens: one pool of slots for all rows, in blocks, and the attention over it.

A row's token at position p lies in slot `blocks[p // BLOCK] * BLOCK + p % BLOCK`, so rows that begin with the same
tokens can name the same blocks. A forward pass runs over some new tokens of each of some rows, laid end to end:

```
rows      a: 3 new tokens   b: 1   c: 1         pass   [ b | c | a a a ]      groups  b c (one token each), a (three)
```

Rows with equally many new tokens form a group, which attends at once. Legend: T new tokens of the pass, R rows of a
group, t new tokens of each, N query heads, K key/value heads, H head size, S slots.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from nanovlm.config import DecoderConfig, pick
from nanovlm.model.cache_attention import BLOCK, CACHE_ATTENTION, Group, Span
from nanovlm.model.cache_codes import CACHE_FORMATS, write


class KVCache:
    """Slots [S, K, H] for each layer, allocated once, in one of CACHE_FORMATS (cache_codes.py).

    On a CPU numbers are always fp32, as torch attends in bf16 8 times slower: one query and 1,024 keys, 9 heads of 64
    take 812 microseconds in bf16, 98 in fp32 (AMD EPYC, torch 2.13, one thread, 2026-11-29).
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        device: torch.device | str,
        dtype: torch.dtype,
        format: str = "float",
    ):
        device = torch.device(device)
        self.dtype = cache_dtype(device, dtype)
        shape = (num_blocks * BLOCK, config.num_key_value_heads, config.head_dim)
        allocate, count_bytes = pick(CACHE_FORMATS, format, "cache_format")
        self.keys = [allocate(shape, device, self.dtype) for _ in range(config.num_hidden_layers)]
        self.values = [allocate(shape, device, self.dtype) for _ in range(config.num_hidden_layers)]
        self.prepare, self.attend = pick(CACHE_ATTENTION, config.attention, "decoder.attention")
        a_head = count_bytes(config.head_dim, self.dtype)
        self.bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * a_head
        self.windows = config.windows

    def begin(self, spans: Sequence[Span]) -> "CachePass":
        """Prepare a forward pass over the new tokens of these rows."""
        return CachePass(self, spans)


def cache_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the cache of a model whose weights are of this one."""
    return torch.float32 if device.type == "cpu" else dtype


class CachePass:
    """A forward pass over a cache: where its tokens are written, and what they see.

    `order` are indices of the spans in the order in which their tokens follow each other in the pass; `position_ids`
    int64[1, T] are the tokens' positions, and `num_new` is the most of a row.
    """

    def __init__(self, cache: KVCache, spans: Sequence[Span]):
        self.cache, device = cache, cache.keys[0].device
        # Equally many new tokens side by side, and among them rows that may share their first blocks.
        self.order = sorted(range(len(spans)), key=lambda i: (spans[i].num_new, spans[i].blocks[0]))
        ordered = [spans[i] for i in self.order]
        positions, slots, self.groups, start = [], [], [], 0
        for num_new, same in itertools.groupby(ordered, key=lambda span: span.num_new):
            rows = list(same)
            for blocks, first, *_ in rows:
                new = range(first, first + num_new)
                positions += new
                slots += [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in new]
            plans = {window: cache.prepare(rows, cache.keys[0], window) for window in set(cache.windows)}
            self.groups.append(Group(start, num_new, plans))
            start += num_new * len(rows)
        self.num_new = self.groups[-1].num_new
        both = torch.tensor([positions, slots]).to(device, non_blocking=True)
        self.position_ids, self.slots = both[:1], both[1]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *extra) -> Tensor:
        """Write k and v [1, T, K, H] into a layer; return what q [1, T, N, H] attends to, [1, T, N, H] like v.

        `extra` are what attend_plain takes behind the mask.
        """
        dtype = self.cache.dtype
        out = self.attend_rows(layer, q[0].to(dtype), k[0].to(dtype), v[0].to(dtype), *extra)
        return out[None].to(v.dtype)

    def attend_rows(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *extra) -> Tensor:
        """The same for q [T, N, H], k and v [T, K, H] in the dtype of the cache."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        write(keys, self.slots, k)
        write(values, self.slots, v)
        outs = []
        for group, after in itertools.zip_longest(self.groups, self.groups[1:]):
            end = None if after is None else after.start
            own = q if len(self.groups) == 1 else q[group.start : end]
            rows = own[:, None] if group.num_new == 1 else own.unflatten(0, (-1, group.num_new))
            plan = group.plans[self.cache.windows[layer]]
            outs.append(self.cache.attend(rows, keys, values, plan, *extra).flatten(0, 1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)
