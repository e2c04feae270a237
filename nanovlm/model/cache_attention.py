"""Attention of new tokens over a cache in blocks: the backends.

A backend is a pair of functions: `prepare(rows, keys, window)` makes, once for each pass and group, the plan that
`attend(q [R, t, N, H], keys [S, K, H], values, plan) -> [R, t, N, H]` follows in each layer. The new tokens are in the
cache already; each sees the positions of its row up to its own, or to the end of its span. With a window other than 0
it sees none before the last so many up to its own. Keys and values may be Codes (cache_codes.py): where they would be
read, they are dequantised, by triton in the kernel.

On a CPU keys are not copied where it can be avoided. What all queries of some rows see, the blocks that they share or a
long past of one row, is read where it lies; only the rest of the rows is gathered, and the two results are merged:

```
row 1   [ shared blocks ......................... | own ... new ]
row 2   [ shared blocks (the same) .............. | own .. new  ]
          one product with the queries of both      gathered, with a mask
```

Legend: R rows, t new tokens of each, N query heads, K key/value heads, H head size, S slots.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nanovlm.model.attention import attend_plain, load_kernels
from nanovlm.model.cache_codes import Codes

BLOCK = 16  # slots
# What one more call costs, in numbers that could be gathered meanwhile: about 30 microseconds.
CALL = 60_000
MOST_RUNS = 4  # pieces that a past may lie in to be read where it is


class Span(NamedTuple):
    """Some new tokens of a row: its blocks, the position of the first of them, and how many there are.

    `lasts` are the last positions that they see, where that is not their own: the ends of spans, which are not cut.
    """

    blocks: Sequence[int]
    start: int
    num_new: int
    lasts: Sequence[int] | None = None


def find_lasts(rows: Sequence[Span]) -> Tensor:
    """Return the last position that each new token sees, int64[R, t]."""
    return torch.tensor([row.lasts or list(range(row.start, row.start + row.num_new)) for row in rows])


class Group(NamedTuple):
    """Rows with equally many new tokens: the first of them in the pass, their number in each row, a plan a window."""

    start: int
    num_new: int
    plans: dict[int, Any]


# --- sdpa -----------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Slots from `first` to `last` that all queries of the rows [rows.start, rows.stop) of the group see."""

    rows: slice
    first: int
    last: int


class Plan(NamedTuple):
    # Read where they lie. A row of the group is in at most one; where the group is one row, it is in all of them.
    parts: list[Part]
    # Blocks int64[R * n] to gather, and a mask fp32[R, 1, t, n * BLOCK]: 0 where a query sees a slot, else -inf.
    blocks: Tensor | None
    mask: Tensor | None
    # Where several new tokens of the group's one row lie, first and last, each of which sees those before it.
    new: tuple[int, int] | None = None


def prepare_sdpa(rows: Sequence[Span], keys: Tensor | Codes, window: int = 0) -> Plan:
    if any(row.start + row.num_new > window for row in rows) and window:
        return prepare_gathered(rows, keys, window)
    if keys.device.type != "cpu":
        return gather_rows(rows, [0] * len(rows), keys.device)
    if len(rows) == 1 and rows[0].lasts is None:
        return read_one_row(rows[0], keys) or gather_rows(rows, [0], keys.device)
    parts, lengths = [], []
    for _, same in itertools.groupby(rows, key=lambda row: row.blocks[0]):
        cluster = list(same)
        (first, last), length = common_run(cluster), 0
        if len(cluster) * (last - first) * keys.shape[1] * keys.shape[2] * 2 > CALL:
            length = last - first
            parts.append(Part(slice(len(lengths), len(lengths) + len(cluster)), first, last))
        lengths += [length] * len(cluster)
    return gather_rows(rows, lengths, keys.device)._replace(parts=parts)


def read_one_row(row: Span, keys: Tensor | Codes) -> Plan | None:
    """Plan to gather nothing; None where the row lies in too many pieces."""
    is_one = row.num_new == 1
    past = find_runs(row.blocks, row.start + is_one)
    own = find_runs(row.blocks[row.start // BLOCK :], row.start % BLOCK + row.num_new)
    if len(past) > MOST_RUNS or not (is_one or len(own) == 1):
        return None
    first = row.blocks[row.start // BLOCK] * BLOCK + row.start % BLOCK
    parts = [Part(slice(0, 1), *run) for run in past]
    return Plan(parts, None, None, None if is_one else (first, first + row.num_new))


def find_runs(blocks: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Return the pieces of neighbouring slots, first and last, in which the first `length` positions lie."""
    runs = []
    for i, block in enumerate(blocks[: (length + BLOCK - 1) // BLOCK]):
        first, last = block * BLOCK, block * BLOCK + min(BLOCK, length - i * BLOCK)
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], last)
        else:
            runs.append((first, last))
    return runs


def common_run(rows: Sequence[Span]) -> tuple[int, int]:
    """Return the neighbouring slots, first and last, of the past blocks with which all rows begin."""
    most = min(row.start for row in rows) // BLOCK
    blocks, num = rows[0].blocks, 1
    while num < most and blocks[num] == blocks[0] + num and all(row.blocks[num] == blocks[num] for row in rows):
        num += 1
    return blocks[0] * BLOCK, (blocks[0] + min(num, most)) * BLOCK


def prepare_gathered(rows: Sequence[Span], keys: Tensor | Codes, window: int = 0) -> Plan:
    """Plan to gather all that a row sees, with a window no blocks before it."""
    return gather_rows(rows, find_skipped(rows, window), keys.device, window)


def find_skipped(rows: Sequence[Span], window: int) -> list[int]:
    """Return how many positions of each row lie in blocks that no new token's window reaches."""
    return [max(row.start + 1 - window, 0) // BLOCK * BLOCK if window else 0 for row in rows]


def gather_rows(rows: Sequence[Span], skipped: Sequence[int], device: torch.device, window: int = 0) -> Plan:
    """Plan to gather the slots of each row, but for its first `skipped` positions, which are whole blocks."""
    num_new = rows[0].num_new
    starts = [row.start - skip for row, skip in zip(rows, skipped, strict=True)]
    num, blocks = (max(starts) + num_new + BLOCK - 1) // BLOCK, []
    for row, skip in zip(rows, skipped, strict=True):
        own = row.blocks[skip // BLOCK : skip // BLOCK + num]
        blocks += [*own, *[own[0]] * (num - len(own))]
    last = find_lasts(rows) - torch.tensor(skipped)[:, None]
    slots = torch.arange(num * BLOCK)
    hidden = slots > last[:, :, None]
    if window:
        own = torch.tensor(starts)[:, None] + torch.arange(num_new)
        hidden |= slots <= own[:, :, None] - window
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None]
    return Plan([], torch.tensor(blocks).to(device, non_blocking=True), mask.to(device, non_blocking=True))


def attend_sdpa(q: Tensor, keys: Tensor | Codes, values: Tensor | Codes, plan: Plan) -> Tensor:
    """torch's scaled_dot_product_attention; on a CPU what it runs there, which also returns the sums to merge by."""
    q = q.transpose(1, 2)
    if plan.blocks is None:
        return attend_one_row(q, keys, values, plan).transpose(1, 2)
    k, v = gather(keys, plan.blocks, len(q)), gather(values, plan.blocks, len(q))
    if keys.device.type != "cpu":
        return attend_gathered(q, k, v, plan.mask).transpose(1, 2)
    out, lse = run(q, k, v, plan.mask)
    for rows, first, last in plan.parts:
        num = rows.stop - rows.start
        queries = rearrange(q[rows], "R N t H -> 1 N (R t) H")
        shared, shared_lse = run(queries, view(keys, first, last), view(values, first, last))
        shared = rearrange(shared, "1 N (R t) H -> R N t H", R=num)
        shared_lse = rearrange(shared_lse, "1 N (R t) -> R N t", R=num)
        out[rows], lse[rows] = merge(out[rows], lse[rows], shared, shared_lse)
    return out.transpose(1, 2)


def attend_gathered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend from q [R, N, t, H] to k and v [R, K, S, H] on a GPU."""
    assert mask is not None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), enable_gqa=q.shape[1] != k.shape[1])


def attend_one_row(q: Tensor, keys: Tensor | Codes, values: Tensor | Codes, plan: Plan) -> Tensor:
    """Attend from the queries [1, N, t, H] of one row to slots where they lie."""
    found = [run(q, view(keys, first, last), view(values, first, last)) for _, first, last in plan.parts]
    if plan.new is not None:
        found.append(run(q, view(keys, *plan.new), view(values, *plan.new), is_causal=True))
    out, lse = found[0]
    for other in found[1:]:
        out, lse = merge(out, lse, *other)
    return out


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> tuple[Tensor, Tensor]:
    """Return out [R, N, t, H] and the logarithms of the sums fp32[R, N, t]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=mask)


def view(x: Tensor | Codes, first: int, last: int) -> Tensor:
    """[S, K, H], contiguous -> [1, K, last - first, H]."""
    if isinstance(x, Codes):
        return x.read(first, last).transpose(0, 1)[None]
    _, K, H = x.shape
    return x.as_strided((1, K, last - first, H), (x.numel(), H, K * H, 1), first * K * H)


def gather(x: Tensor | Codes, blocks: Tensor, num_rows: int) -> Tensor:
    """[S, K, H] -> [R, K, n * BLOCK, H]: the blocks int64[R * n] of each row."""
    if isinstance(x, Codes):
        return x.read_blocks(blocks, BLOCK).view(num_rows, -1, *x.shape[1:]).transpose(1, 2)
    found = x.view(-1, BLOCK * x.shape[1] * x.shape[2]).index_select(0, blocks)
    return found.view(num_rows, -1, *x.shape[1:]).transpose(1, 2)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Put the results of two sets of keys together: weights are in proportion to exp(lse)."""
    return torch.lerp(out, other, (other_lse - lse).sigmoid()[..., None]), torch.logaddexp(lse, other_lse)


# --- plain ----------------------------------------------------------------------------------------------------


def attend_plain_gathered(
    q: Tensor, keys: Tensor, values: Tensor, plan: Plan, softcap: float = 0.0, sinks: Tensor | None = None
) -> Tensor:
    assert plan.blocks is not None and plan.mask is not None
    k, v = (gather(x, plan.blocks, len(q)).transpose(1, 2) for x in (keys, values))
    return attend_plain(q, k, v, plan.mask == 0, softcap, sinks)


# --- triton ---------------------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """int32[R, blocks] and int64[R, t]: the blocks of each row, and the last position that each query sees.

    With a window no blocks before it, and the first position that each query sees, too; both are counted from there.
    """

    blocks: Tensor
    last: Tensor
    first: Tensor | None = None


def prepare_triton(rows: Sequence[Span], keys: Tensor | Codes, window: int = 0) -> Tables:
    load_kernels()  # or say what is missing
    skipped = find_skipped(rows, window)
    starts = [row.start - skip for row, skip in zip(rows, skipped, strict=True)]
    num = (max(starts) + rows[0].num_new + BLOCK - 1) // BLOCK
    own = [row.blocks[skip // BLOCK :] for row, skip in zip(rows, skipped, strict=True)]
    tables = [torch.tensor([[*blocks, *[-1] * num][:num] for blocks in own], dtype=torch.int32)]
    tables.append(find_lasts(rows) - torch.tensor(skipped)[:, None])
    if window:
        positions = torch.tensor(starts)[:, None] + torch.arange(rows[0].num_new)
        tables.append((positions - window + 1).clamp(min=0))
    return Tables(*(x.to(keys.device, non_blocking=True) for x in tables))


def attend_triton(
    q: Tensor, keys: Tensor | Codes, values: Tensor | Codes, plan: Tables, softcap=0.0, sinks: Tensor | None = None
) -> Tensor:
    from nanovlm.kernels.cache_attention import attend_blocks  # no other backend needs Triton

    assert not softcap  # which the config refuses
    scales = None
    if isinstance(keys, Codes) and isinstance(values, Codes):
        scales, keys, values = (keys.scales, values.scales), keys.codes, values.codes
    assert isinstance(keys, Tensor) and isinstance(values, Tensor)
    return attend_blocks(q, keys, values, plan.blocks, plan.last, BLOCK, first=plan.first, sinks=sinks, scales=scales)


CACHE_ATTENTION = {
    "sdpa": (prepare_sdpa, attend_sdpa),
    "flex": (prepare_sdpa, attend_sdpa),  # compiled for documents alone
    "triton": (prepare_triton, attend_triton),
    "plain": (prepare_gathered, attend_plain_gathered),
}
