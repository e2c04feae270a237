"""The cache in blocks: new tokens of rows attend to their own past, shared or not, however it is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.config import DecoderConfig
from nanovlm.model import cache_attention
from nanovlm.model.cache_attention import BLOCK, CACHE_ATTENTION, Span, attend_gathered, gather, gather_rows
from nanovlm.model.kv_cache import KVCache
from tests.conftest import skip_without_interpreter

NUM_BLOCKS = 40


def attend_fp64(q, keys, values, span):
    """Queries [t, N, H] of one row attend to its slots one by one."""
    slots = [span.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(span.start + span.num_new)]
    group = q.shape[1] // keys.shape[1]
    k, v = (x[slots].double().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("tnh,snh->nts", q.double(), k) * q.shape[-1] ** -0.5
    last = span.start + torch.arange(span.num_new)
    scores = scores.masked_fill(torch.arange(len(slots)) > last[:, None], -torch.inf)
    return torch.einsum("nts,snh->tnh", scores.softmax(-1), v)


@st.composite
def draw_spans(draw):
    """Rows with blocks anywhere, in one piece or not; some begin with the blocks of the row before."""
    numbers = list(range(NUM_BLOCKS))
    if draw(st.booleans()):
        numbers = draw(st.permutations(numbers))
    spans = []
    for _ in range(draw(st.integers(1, 5))):
        start, num_new = draw(st.integers(0, 90)), draw(st.sampled_from([1, 1, 1, 2, 3, 17]))
        num = (start + num_new + BLOCK - 1) // BLOCK
        shared = []
        if spans and draw(st.booleans()):  # only past, whole blocks
            most = min(start, spans[-1].start) // BLOCK
            shared = list(spans[-1].blocks[: draw(st.integers(0, most))])
        if num - len(shared) > len(numbers):
            break
        own, numbers = numbers[: num - len(shared)], numbers[num - len(shared) :]
        spans.append(Span(shared + own, start, num_new))
    return spans


@settings(max_examples=200, deadline=None)
@given(draw_spans(), st.sampled_from([0, 60_000]), st.integers(0, 10**6))
def test_equals_attention_of_each_row_alone(spans, call, seed):
    """Also where every prefix is read where it lies, and where all are gathered; foreign slots hold NaN."""
    before, cache_attention.CALL = cache_attention.CALL, call
    try:
        check(spans, "sdpa", seed)
    finally:
        cache_attention.CALL = before


def check(spans, backend, seed, tolerance=2e-5):
    torch.manual_seed(seed)
    N, K, H = 4, 2, 8
    config = DecoderConfig(
        num_hidden_layers=2, num_attention_heads=N, num_key_value_heads=K, head_dim=H, attention=backend
    )
    cache = KVCache(config, NUM_BLOCKS, "cpu", torch.float32)
    past = {block * BLOCK + i for span in spans for block in span.blocks for i in range(BLOCK)}
    for x in (cache.keys[1], cache.values[1]):
        x.normal_()
        if backend == "triton":
            x[[slot for slot in range(len(x)) if slot not in past]] = float("nan")
    now = cache.begin(spans)
    num = sum(span.num_new for span in spans)
    q, k, v = torch.randn(1, num, N, H), torch.randn(1, num, K, H), torch.randn(1, num, K, H)
    out = now.attend(1, q, k, v)[0]
    assert not cache.keys[0].any()
    offset = 0
    assert sorted(now.order) == list(range(len(spans)))
    for i in now.order:
        span, own = spans[i], slice(offset, offset + spans[i].num_new)
        offset = own.stop
        assert now.position_ids[0, own].tolist() == list(range(span.start, span.start + span.num_new))
        slots = [span.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(span.start, span.start + span.num_new)]
        assert torch.equal(cache.keys[1][slots], k[0, own]) and torch.equal(cache.values[1][slots], v[0, own])
        expected = attend_fp64(q[0, own], cache.keys[1], cache.values[1], span)
        assert (out[own] - expected).abs().max() <= tolerance


@pytest.mark.parametrize("backend", CACHE_ATTENTION)
def test_backends(backend):
    skip_without_interpreter(backend)
    first = [3, 4, 5, 6]
    check([Span([*first, 9], 66, 1), Span([*first, 12, 13], 80, 1), Span([20, 8], 17, 1)], backend, 0)
    check([Span([*first, 9], 64, 3), Span([30], 0, 3), Span([20, 8], 17, 1), Span([11, 2, 25], 16, 32)], backend, 1)
    check([Span([7], 0, 1)], backend, 2)
    check([Span([7, 1], 5, 20)], backend, 3)


@settings(max_examples=50, deadline=None)
@given(draw_spans())
def test_what_a_gpu_computes_without_the_kernels(spans):
    """All rows of a group gathered under one mask."""
    num_new = spans[0].num_new
    rows = [span for span in spans if span.num_new == num_new]
    keys, values = torch.randn(2, NUM_BLOCKS * BLOCK, 2, 8)
    plan = gather_rows(rows, [0] * len(rows), keys.device)
    q = torch.randn(len(rows), num_new, 4, 8)
    k, v = gather(keys, plan.blocks, len(rows)), gather(values, plan.blocks, len(rows))
    out = attend_gathered(q.transpose(1, 2), k, v, plan.mask).transpose(1, 2)
    for row, mine, queries in zip(rows, out, q, strict=True):
        assert (mine - attend_fp64(queries, keys, values, row)).abs().max() <= 2e-5


def test_a_cpu_keeps_fp32():
    cache = KVCache(DecoderConfig(), 2, "cpu", torch.bfloat16)
    assert cache.keys[0].dtype == torch.float32 and cache.bytes_per_token == 4 * 2 * 4 * 2 * 32
    now = cache.begin([Span([1], 0, 2)])
    q, k = torch.randn(1, 2, 4, 32).bfloat16(), torch.randn(1, 2, 2, 32).bfloat16()
    assert now.attend(0, q, k, k).dtype == torch.bfloat16
