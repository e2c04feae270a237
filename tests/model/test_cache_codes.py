"""Keys and values in few bits: what a round trip may cost, and attention as if they were written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.config import DecoderConfig
from nanovlm.errors import UserError
from nanovlm.model import cache_attention
from nanovlm.model.cache_attention import BLOCK, Span
from nanovlm.model.cache_codes import CACHE_FORMATS, Codes, encode, write
from nanovlm.model.compiled import PASS
from nanovlm.model.kv_cache import KVCache
from tests.conftest import skip_without_interpreter
from tests.model.test_kv_cache import NUM_BLOCKS, attend_fp64, draw_spans

CODED = {"int8": 255, "int4": 15}
N, K, H = 4, 2, 8


def make_cache(format, dtype=torch.float32, layers=2, attention="sdpa"):
    config = DecoderConfig(
        num_hidden_layers=layers, num_attention_heads=N, num_key_value_heads=K, head_dim=H, attention=attention
    )
    return KVCache(config, NUM_BLOCKS, "cpu", dtype, format)


def decode(codes: Codes):
    """The formula, number by number, fp64[S, K, H]."""
    numbers = codes.codes.long()
    if codes.num_bits == 4:
        numbers = torch.stack([numbers[..., h % (H // 2)] // 16 ** (h // (H // 2)) % 16 for h in range(H)], -1)
    scale, offset = codes.scales.double().unbind(-1)
    return numbers * scale[..., None] + offset[..., None]


NUMBERS = st.floats(-1e4, 1e4, width=32) | st.floats(-(2**-20), 2**-20, width=32) | st.sampled_from([0.0, -1.0, 1.0])


@pytest.mark.parametrize("format", CODED)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(NUMBERS, min_size=H, max_size=H), min_size=K, max_size=K))
def test_a_round_trip_costs_half_a_step(format, numbers):
    """Of the head's own range, 0 included; zeros stay zeros where nothing else is there."""
    x, slots = torch.tensor(numbers)[None], make_cache(format, layers=1).keys[0]
    write(slots, torch.tensor([3]), x)
    found = slots.read(3, 4)
    torch.testing.assert_close(found.double(), decode(slots)[3:4], rtol=1e-6, atol=1e-30)
    r = (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)).double()
    assert ((found - x).abs() <= r / (2 * CODED[format]) * (1 + 2**-7) ** 2 * (1 + 1e-5) + 1e-37).all()
    assert not slots.read(0, 3).any() and not slots.read(4, NUM_BLOCKS * BLOCK).any()


@pytest.mark.parametrize("format", CODED)
def test_a_token_has_the_bits_that_it_has_alone(format):
    """Whatever is written beside it, and in whichever order."""
    x = torch.randn(50, K, H, generator=torch.Generator().manual_seed(0))
    bits = {"int8": 8, "int4": 4}[format]
    together = encode(x, bits)
    for i in range(50):
        for all_of_them, one in zip(together, encode(x[i : i + 1], bits), strict=True):
            assert torch.equal(all_of_them[i : i + 1], one)


@pytest.mark.parametrize("format", CODED)
@settings(max_examples=40, deadline=None)
@given(draw_spans(), st.sampled_from([0, 60_000]), st.integers(0, 10**6))
def test_equals_attention_to_what_is_dequantised(format, spans, call, seed):
    """Read where it lies or gathered, in fp32; and a row has the same bits whatever its neighbours hold."""
    before, cache_attention.CALL = cache_attention.CALL, call
    try:
        torch.manual_seed(seed)
        num, cache = sum(span.num_new for span in spans), make_cache(format)
        for slots in (cache.keys[1], cache.values[1]):
            write(slots, torch.arange(NUM_BLOCKS * BLOCK), torch.randn(slots.shape))
        now = cache.begin(spans)
        q, k, v = torch.randn(1, num, N, H), torch.randn(1, num, K, H), torch.randn(1, num, K, H)
        out, offset = now.attend(1, q, k, v)[0], 0
        assert not cache.keys[0].codes.any()
        keys, values = decode(cache.keys[1]), decode(cache.values[1])
        for i in now.order:
            own = slice(offset, offset + spans[i].num_new)
            offset = own.stop
            assert (out[own] - attend_fp64(q[0, own], keys, values, spans[i])).abs().max() <= 2e-5
        mine = set(spans[now.order[0]].blocks)
        for slots in (cache.keys[1], cache.values[1]):
            for block in set(range(NUM_BLOCKS)) - mine:
                slots.codes[block * BLOCK : (block + 1) * BLOCK].random_(0, 256)
        own = slice(0, spans[now.order[0]].num_new)
        others = [x.clone() for x in (k, v)]
        for x in others:
            x[:, own.stop :].normal_()
        assert torch.equal(now.attend(1, q, *others)[0, own], out[own])
    finally:
        cache_attention.CALL = before


@pytest.mark.parametrize("format", CODED)
def test_the_kernels_read_the_codes_themselves(format, monkeypatch):
    """Nothing is dequantised outside of them."""
    skip_without_interpreter("triton")
    spans = [Span([3, 4, 9], 36, 1), Span([20, 8], 17, 1), Span([11, 2], 5, 20)]
    outs = []
    for backend in ("sdpa", "triton"):
        torch.manual_seed(0)
        cache = make_cache(format, attention=backend)
        for slots in (cache.keys[1], cache.values[1]):
            write(slots, torch.arange(NUM_BLOCKS * BLOCK), torch.randn(slots.shape))
        q, k, v = torch.randn(1, 22, N, H), torch.randn(1, 22, K, H), torch.randn(1, 22, K, H)
        outs.append(cache.begin(spans).attend(1, q, k, v))
        monkeypatch.setattr(Codes, "_decode", None)
    torch.testing.assert_close(*outs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("format", CACHE_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_that_are_there(format, dtype):
    cache = make_cache(format, dtype)
    tensors = [x for slots in cache.keys + cache.values for x in (slots[:2] if isinstance(slots, Codes) else [slots])]
    assert sum(x.nbytes for x in tensors) == NUM_BLOCKS * BLOCK * cache.bytes_per_token
    q, k = torch.randn(1, 2, N, H).to(dtype), torch.randn(1, 2, K, H).to(dtype)
    assert cache.begin([Span([1], 0, 2)]).attend(0, q, k, k).dtype == dtype


def test_a_compiled_step_attends_to_codes():
    """Through the operator that its graph calls, to the bit."""
    torch.manual_seed(0)
    caches = [make_cache("int8"), make_cache("int8")]
    q, k, v = torch.randn(1, 2, N, H), torch.randn(1, 2, K, H), torch.randn(1, 2, K, H)
    one, other = (cache.begin([Span([1], 0, 2)]) for cache in caches)
    token = PASS.set(other)
    out = torch.ops.nanovlm.attend_cache(1, q[0], k[0], v[0])
    PASS.reset(token)
    assert torch.equal(out, one.attend(1, q, k, v)[0]) and out.any()
    assert torch.equal(caches[0].values[1].codes, caches[1].values[1].codes)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="cache_format = 'int2' is unknown; there are float, int8, int4"):
        KVCache(DecoderConfig(), 1, "cpu", torch.float32, "int2")
