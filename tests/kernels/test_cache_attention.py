"""Attention over a cache in blocks against an fp64 reference: lengths, heads, layouts, and what must never be read."""

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.model.cache_codes import Codes, encode
from tests.kernels.oracle import check, reserve, surround

pytest.importorskip("triton")
from nanovlm.kernels import cache_attention as kernels
from nanovlm.kernels.cache_attention import attend_blocks, attend_blocks_ref

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GARBAGE = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32)


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def count_up(first, T):
    """last int64[B, T] of rows whose first new token sees the positions up to `first`."""
    return torch.tensor(first)[:, None] + torch.arange(T)


def make_inputs(last, N, K, H, dtype=torch.float32, device="cpu", block_size=16, num_shared=0, spare=3, first=None):
    """q, keys, values, table and last. The blocks of the cache are in no order, and each row's first `num_shared` whole
    ones are those of row 0. Slots that no query sees are NaN, and the table has garbage where a row needs no block.
    """
    begins = [0] * len(last) if first is None else first.amin(1).tolist()
    (B, T), total, generator = last.shape, 2, torch.Generator().manual_seed(5)
    lengths = (last.amax(1) + 1).tolist() if T else [0] * B
    most_shared = [0] + [min(num_shared, lengths[0] // block_size, n // block_size) for n in lengths[1:]]
    total += sum((n + block_size - 1) // block_size for n in lengths)
    free = torch.randperm(total, generator=generator).int()
    num_columns = (max(lengths) + block_size - 1) // block_size + spare
    table = GARBAGE[torch.arange(B * num_columns) % 3].view(B, num_columns)
    seen = torch.zeros(total * block_size, dtype=torch.bool)
    for row, begin, length, shared in zip(table, begins, lengths, most_shared, strict=True):
        num = (length + block_size - 1) // block_size
        row[:shared] = table[0, :shared]
        row[shared:num], free = free[: num - shared], free[num - shared :]
        seen[find_slots(row, length, block_size)[begin:]] = True
    for row, begin in zip(table, begins, strict=True):
        row[: begin // block_size] = GARBAGE[0]
    q = draw(B, T, N, H, dtype=dtype, device=device)
    keys, values = (
        draw(len(seen), K, H, dtype=dtype, device=device, seed=i).masked_fill(
            ~seen.to(device)[:, None, None], torch.nan
        )
        for i in (1, 2)
    )
    return q, keys, values, table.to(device), last.to(device)


def find_slots(row, length, block_size):
    return torch.tensor(
        [int(row[p // block_size]) * block_size + p % block_size for p in range(length)], dtype=torch.long
    )


def check_all(q, keys, values, table, last, **options):
    """Check against the reference, and return the result."""

    def reference(dtype):
        return attend_blocks_ref(*(x.to(dtype) for x in (q, keys, values)), table, last, **options)

    ours = attend_blocks(q, keys, values, table, last, **options)
    assert ours.dtype == q.dtype and not ours.isnan().any()
    check(ours, reference(q.dtype), lambda: reference(torch.float64))
    return ours


# --- lengths, heads and numbers of queries -------------------------------------------------------------------


def test_the_reference_is_attention_to_gathered_slots():
    q, keys, values, table, last = make_inputs(count_up([20, 3], 5), 4, 2, 8, torch.float64)
    ours = attend_blocks_ref(q, keys, values, table, last)
    for b, t in itertools.product(range(2), range(5)):
        slots = find_slots(table[b], int(last[b, t]) + 1, 16)
        k, v = (x[slots].repeat_interleave(2, 1).transpose(0, 1)[None] for x in (keys, values))
        expected = F.scaled_dot_product_attention(q[b, t, :, None][None], k, v)[0, :, 0]
        torch.testing.assert_close(ours[b, t], expected)


CASES = {  # T, last of the first query of each row, (N, K, H)
    "one position": (1, [0], (1, 1, 16)),
    "short rows": (1, [0, 14, 15, 16, 62, 64], (4, 2, 64)),
    "an empty row": (1, [-1, 3, -1], (3, 1, 72)),
    "parts": (1, [399, 128, 127, 0, -1, 256], (8, 1, 32)),
    "heads of 256": (1, [63, 128], (2, 2, 256)),
    "one step ends between two queries": (2, [62, 63, 30], (2, 1, 16)),
    "two drafted": (3, [-2, 120, 297], (8, 2, 96)),
    "four drafted": (5, [60, 0], (6, 2, 128)),
    "seven drafted": (8, [129], (9, 3, 64)),
    "prefill": (65, [0, 4], (2, 1, 80)),
    "prefill in parts": (17, [130, 15], (4, 2, 16)),
    "no queries": (0, [0], (2, 1, 16)),
    "no rows": (1, [], (2, 1, 16)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rows_together_and_alone(case, dtype, device):
    """A row alone has the same bits, with a table of just its blocks or one of many more."""
    T, first, heads = CASES[case]
    if not first:
        q, keys, values, table, last = make_inputs(count_up([3], T), *heads, dtype, device)
        assert attend_blocks(q[:0], keys, values, table[:0], last[:0]).shape == q[:0].shape
        return
    q, keys, values, table, last = make_inputs(count_up(first, T).clamp(min=-1), *heads, dtype, device)
    ours = check_all(q, keys, values, table, last)
    wider = GARBAGE.to(device)[torch.arange(30, device=device) % 3].expand(len(q), -1)
    wider = torch.cat([table, wider], 1)
    for b, row in enumerate(torch.arange(len(q)).split(1)):
        num = 0 if not T else (int(last[b].max()) + 16) // 16
        for tables in (table[:, :num], wider):
            assert torch.equal(attend_blocks(q[row], keys, values, tables[row], last[row]), ours[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 4, 17])
def test_rows_that_share_blocks(T, dtype, device):
    """As if each had copies of its own, to the bit."""
    q, keys, values, table, last = make_inputs(count_up([70, 100, 64, 20], T), 4, 2, 32, dtype, device, num_shared=4)
    assert (table[:2, :4] == table[0, :4]).all() and table[0, 4] != table[1, 4] and table[3, 0] == table[0, 0]
    ours = check_all(q, keys, values, table, last)
    copies, own = [], torch.empty_like(table)
    for row, new in zip(table, own, strict=True):
        needed = (row >= 0) & (row < 2**20)
        new.copy_(torch.where(needed, needed.cumsum(0) - 1 + sum(map(len, copies)), row))
        copies.append(row[needed])
    slots = (torch.cat(copies).long()[:, None] * 16 + torch.arange(16, device=device)).flatten()
    assert torch.equal(attend_blocks(q, keys[slots], values[slots], own, last), ours)


def test_queries_may_see_any_number_of_positions(device):
    """In no order, and none: those of padding."""
    last = torch.tensor([[40, -1, 3, 17, -1, 0], [-1] * 6, [5, 4, 3, 2, 1, 129]])
    ours = check_all(*make_inputs(last, 6, 2, 24, device=device))
    assert (ours[(last == -1).to(device)] == 0).all()


WINDOWS = {  # T, the first query of each row, window, (N, K, H)
    "one position": (1, [0, 14, 62, 399, 63], 20, (4, 2, 16)),
    "wider than a row": (1, [3, 63, 100], 100, (2, 1, 64)),
    "parts": (1, [399, 128, 5], 200, (8, 1, 32)),
    "drafted": (5, [60, 300, 0], 40, (6, 2, 72)),
    "prefill": (65, [200, 20], 150, (2, 1, 80)),
    "itself": (3, [70], 1, (2, 2, 16)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case, dtype, device):
    """With sinks, too; slots before a row's window are not read, and a row alone has the same bits."""
    T, positions, window, heads = WINDOWS[case]
    last = count_up(positions, T)
    first = (last - window + 1).clamp(min=0)
    q, keys, values, table, last = make_inputs(last, *heads, dtype, device, first=first)
    first, sinks = first.to(device), draw(heads[0], dtype=dtype, device=device, seed=9)
    ours = check_all(q, keys, values, table, last, first=first, sinks=sinks)
    for row in torch.arange(len(q)).split(1):
        alone = attend_blocks(q[row], keys, values, table[row], last[row], first=first[row], sinks=sinks)
        assert torch.equal(alone, ours[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_count_once(dtype, device):
    """In rows of several parts, of one, and of nothing but the sink; with one of a row and one of another part."""
    inputs = make_inputs(count_up([399, 128, 127, -1], 1), 8, 2, 40, dtype, device)
    ours = check_all(*inputs, sinks=draw(8, dtype=dtype, device=device, seed=9))
    assert not ours[3].any() and not torch.equal(ours, attend_blocks(*inputs))


CODES = {  # bits, T, last of the first query of each row, (N, K, H)
    "8 bits": (8, 1, [399, 20, -1], (4, 2, 64)),
    "4 bits": (4, 1, [14, 130], (3, 1, 72)),
    "4 bits, prefill": (4, 33, [0, 100], (4, 2, 32)),
    "8 bits, heads of no power of two": (8, 9, [60], (2, 1, 20)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CODES)
def test_codes(case, dtype, device):
    """As the numbers that they stand for; the codes of slots that no query sees stand for NaN."""
    num_bits, T, positions, heads = CODES[case]
    q, keys, values, table, last = make_inputs(count_up(positions, T).clamp(min=-1), *heads, dtype, device)
    slots = [Codes(*encode(x.nan_to_num(), num_bits), num_bits, dtype) for x in (keys, values)]
    for x, coded in zip((keys, values), slots, strict=True):
        coded.scales[x.isnan().any(-1)] = torch.nan

    def reference(dtype):
        k, v = (coded._replace(dtype=dtype).read(0, len(keys)) for coded in slots)
        return attend_blocks_ref(q.to(dtype), k, v, table, last)

    codes, scales = zip(*(coded[:2] for coded in slots), strict=True)
    ours = attend_blocks(q, *codes, table, last, scales=scales)
    check(ours, reference(dtype), lambda: reference(torch.float64))
    wider = [torch.cat([x, x], 2)[..., : x.shape[2]] for x in codes]
    assert torch.equal(attend_blocks(q, *wider, table, last, scales=scales), ours)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_rows(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, T = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 1, 2, 7, 20]))
    K, G, H = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 8)), 2 * data.draw(st.integers(1, 64))
    last = torch.tensor([[data.draw(st.integers(-1, 199)) for _ in range(T)] for _ in range(B)])
    block_size, dtype = data.draw(st.sampled_from([1, 8, 16, 32, 256])), data.draw(st.sampled_from(DTYPES))
    options, first = {"block_size": block_size, "scale": 0.3}, None
    if data.draw(st.booleans()):  # also behind the last one
        first = torch.tensor([[data.draw(st.integers(0, 199)) for _ in range(T)] for _ in range(B)])
        options["first"] = first.to(device)
    q, keys, values, table, last = make_inputs(
        last, K * G, K, H, dtype, device, block_size, data.draw(st.integers(0, 3)), first=first
    )
    check_all(q, surround(keys), surround(values), surround(table), last, **options)


# --- parts of a row ------------------------------------------------------------------------------------------


def test_more_parts_than_are_merged_at_a_time(device):
    """40 parts of 128 positions, of which 32 are merged at once; the largest scores are in those after them."""
    q, keys, values, table, last = make_inputs(count_up([5119, 4500], 1), 2, 1, 16, device=device)
    keys[find_slots(table[0].cpu(), 5120, 16)[4096:]] *= 2
    assert kernels.count_parts(q, 1, 5120, 1) == (264, 40) or device == "cuda"
    check_all(q, keys, values, table, last)


def test_parts_fill_the_gpu_and_no_more(device):
    """As many programs for a row as there are processors, two times at most, or parts of 128 positions."""
    q = torch.empty(1, 1, 8, 64, dtype=torch.float16, device=device)
    for (S, K), processors in itertools.product([(256, 1), (4096, 8), (2**17, 8), (2**17, 1), (0, 1)], [108, 132]):
        with mock.patch.object(kernels, "num_processors", lambda q, n=processors: n):
            most, num = kernels.count_parts(q, K, S, num_blocks=1)
            assert kernels.count_parts(q, K, S, num_blocks=1000) == (1, 1)
        assert most == 2 * processors // K and num == min(most, max(1, S // 128))


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_fewer_parts_than_would_fit(most, device):
    """On GPUs with few processors parts are longer than 128 positions, and each row has its own."""
    inputs = make_inputs(count_up([600, 401, 260, 100], 1), 3, 1, 16, device=device)
    with mock.patch.object(kernels, "num_processors", lambda q: (most + 1) // 2 if most > 1 else 0):
        assert kernels.count_parts(inputs[0], 1, 640, 1)[0] in (most, most + 1)
        ours = check_all(*inputs)
        q, keys, values, table, last = inputs
        for b in range(4):
            row = slice(b, b + 1)
            assert torch.equal(attend_blocks(q[row], keys, values, table[row], last[row]), ours[row])


@pytest.mark.gpu
def test_a_graph_is_replayed_with_longer_rows():
    q, keys, values, table, last = make_inputs(count_up([600, 401], 1), 8, 2, 64, torch.bfloat16, "cuda")
    attend_blocks(q, keys, values, table, last)
    now, graph = torch.zeros_like(last), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend_blocks(q, keys, values, table, now)
    for positions in (last, last - 300, torch.full_like(last, -1)):
        now.copy_(positions)
        graph.replay()
        assert torch.equal(captured, attend_blocks(q, keys, values, table, positions))


# --- layouts of the inputs -----------------------------------------------------------------------------------

VIEWS = {
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "head size first": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "within a larger tensor": surround,
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_views_give_the_same(view, dtype, device):
    """Each input alone: strides of rows and heads of its own, and tables cut from wider ones."""
    inputs = make_inputs(count_up([70, 20], 3), 4, 2, 24, dtype, device)
    expected = check_all(*inputs)
    for i in range(5):
        changed = list(inputs)
        changed[i] = VIEWS[view](changed[i])
        assert torch.equal(attend_blocks(*changed), expected), i


def test_expanded_heads(device):
    q, keys, values, table, last = make_inputs(count_up([70, 20], 1), 4, 1, 24, device=device)
    check_all(q, keys.expand(-1, 2, -1), values.expand(-1, 2, -1), table, last)


def test_offsets_beyond_32_bits(device):
    """Slots 2^30 elements apart; and slots whose number is beyond 2^31, of which all are one."""
    if device == "cuda":
        pytest.skip("needs 12 GB of addresses, which only the CPU has without memory")
    q, keys, values, table, last = make_inputs(count_up([0, 3], 1), 1, 1, 16, torch.float16, block_size=1, spare=0)
    expected = attend_blocks(q, keys, values, table, last, block_size=1)
    far = reserve((len(keys) * 2**30 + 3 * 32,), torch.float16)
    apart = [far[32 * i :].as_strided(x.shape, (2**30, 16, 1)).copy_(x) for i, x in enumerate((keys, values))]
    assert torch.equal(attend_blocks(q, *apart, table, last, block_size=1), expected)
    one = draw(1, 1, 16, dtype=torch.float16)
    out = attend_blocks(q, *[one.expand(2**31 + 64, 1, 16)] * 2, torch.full((2, 1), 2**27 + 2, dtype=torch.int32), last)
    torch.testing.assert_close(out, one.expand(2, 1, 1, 16))


# --- mistakes ------------------------------------------------------------------------------------------------


def test_mistakes_are_named(device):
    q, keys, values, table, last = make_inputs(count_up([3, 5], 2), 4, 2, 16, device=device)
    for change, message in (
        ({0: q.half()}, r"q, k, v have dtypes torch.float16, torch.float32, torch.float32: give one of"),
        ({1: keys[:3]}, r"q, keys, values have shapes \[2, 2, 4, 16\], \[3, 2, 16\], \[64, 2, 16\]"),
        ({0: q[0]}, r"q, keys, values have shapes \[2, 4, 16\]"),
        ({0: q[:, :, :3]}, r"K a divisor of N"),
        ({1: keys[:, :0], 2: values[:, :0]}, r"\[64, 0, 16\], but must have"),
        ({3: table[:1]}, r"table is torch.int32\[1, 4\], but must be int32\[B, num_blocks\], with B = 2 rows"),
        ({3: table.long()}, r"table is torch.int64\[2, 4\]"),
        ({3: table[0]}, r"table is torch.int32\[4\]"),
        ({4: last[:, 0]}, r"last is torch.int64\[2\], but must be int64\[2, 2\]"),
        ({4: last.int()}, r"last is torch.int32\[2, 2\], but must be int64"),
        ({5: 0}, r"block_size = 0 must be a power of two"),
        ({5: 24}, r"block_size = 24 must be a power of two"),
        ({6: 0.0}, r"scale = 0.0 must be above 0"),
    ):
        arguments = dict(enumerate((q, keys, values, table, last, 16, 0.25))) | change
        with pytest.raises(ValueError, match=message):
            attend_blocks(*arguments.values())
    for options, message in (
        ({"first": last[:1]}, r"first is torch.int64\[1, 2\], but must be int64\[2, 2\] as last is"),
        ({"first": last.int()}, r"first is torch.int32\[2, 2\]"),
        ({"scales": (keys, keys)}, r"scales are torch.float32\[64, 2, 16\], but must be bf16\[num_slots, K, 2\]"),
        ({"sinks": last[0]}, r"sinks of shape \[2\] must be one for each of the 4 query heads"),
    ):
        with pytest.raises(ValueError, match=message):
            attend_blocks(q, keys, values, table, last, **options)
