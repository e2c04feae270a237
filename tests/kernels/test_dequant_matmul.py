"""x @ dequant(W): the layout and the formats, and the kernels against torch in fp64 by the rule of oracle.py."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.kernels import dequant_matmul as kernels
from nanovlm.kernels.dequant_matmul import LOOKUPS, dequant_matmul, dequantize, split_k
from nanovlm.kernels.quantized_weight import (
    NF4,
    NUM_BITS,
    QuantizedWeight,
    dequant_matmul_ref,
    dequantize_ref,
    make_tables,
    pack,
    run_length,
    unpack,
)
from nanovlm.model.quantized import quantize_weight
from tests.conftest import HAS_GPU
from tests.kernels.oracle import check, check_gradients, poison, reserve, surround

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = sorted(NUM_BITS)


def random_weight(device, format, N=33, K=300, group=64, seed=0, search=False):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)
    return quantize_weight(weight.to(device), format, group, search)


def random_x(device, dtype, *shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def exact(x, w, bias=None):
    return F.linear(x.double(), dequantize_ref(w).double(), None if bias is None else bias.double())


def check_product(x, w, bias=None):
    return check(dequant_matmul(x, w, bias), dequant_matmul_ref(x, w, bias), lambda: exact(x, w, bias))


# ---- the formats ----


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("K", [32, 64, 96, 128, 256])
def test_layout(bits, K):
    """As the docstring of the file draws it: code i of word j is weight i * RUN + j of the tile."""
    codes = torch.randint(0, 2**bits, (3, K), generator=torch.Generator().manual_seed(K), dtype=torch.int32)
    words, run, planes = pack(codes, bits), run_length(K, bits), 32 // bits
    assert words.shape == (3, K // planes) and K % (run * planes) == 0 and run >= 4
    for row, k in ((0, 0), (1, 5), (2, K - 1), (0, K // 2 + 3)):
        tile, place = divmod(k, planes * run)
        i, j = divmod(place, run)
        assert words[row, tile * run + j].item() >> (i * bits) & (2**bits - 1) == codes[row, k]
    w = QuantizedWeight("int8" if bits == 8 else "nf4", (3, K), 64, words, torch.empty(0))
    assert torch.equal(unpack(w), codes)


def test_runs_are_the_longest_that_divide_a_row():
    assert [run_length(K, 4) for K in (32, 64, 96, 128, 576, 1536, 4096)] == [4, 8, 4, 16, 8, 32, 32]
    assert [run_length(K, 8) for K in (32, 64, 96, 128, 576, 4096)] == [8, 16, 8, 32, 16, 32]


def test_the_reference_is_the_formula():
    """Weight by weight in Python, from the definitions at the top of the file; K = 70 is 96 codes a row."""
    codes = torch.randint(0, 16, (2, 96), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    scale, zero = torch.tensor([[0.5, 2.0, -3.0], [1.0, 0.25, 8.0]]), torch.tensor([[0, 15, 7], [3, 4, 5]])
    w = QuantizedWeight("int4", (2, 70), 32, pack(codes, 4), scale.view(torch.int32) | zero.int())
    expected = [[(codes[n, k] - zero[n, k // 32]) * scale[n, k // 32] for k in range(70)] for n in range(2)]
    assert dequantize_ref(w).tolist() == torch.tensor(expected).tolist()

    w = QuantizedWeight("int8", (2, 70), 96, pack(codes * 17, 8), torch.tensor([[0.5], [3.0]]))
    expected = [[(codes[n, k] * 17 - 128) * w.scales[n, 0] for k in range(70)] for n in range(2)]
    assert dequantize_ref(w).tolist() == torch.tensor(expected).tolist()

    # 3 rows of 96 groups of 64: 288 absmax, 256 with the first scale and 32 with the second.
    codes = torch.randint(0, 16, (3, 6144), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    absmax = torch.randint(0, 256, (3, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    nested, offset = torch.tensor([0.25, 4.0]), torch.tensor(1.5)
    w = QuantizedWeight("nf4", (3, 6144), 64, pack(codes, 4), absmax, nested, offset)
    table, dynamic = make_tables(codes.device)
    values = dequantize_ref(w)
    for n, k in ((0, 0), (0, 6143), (1, 64), (2, 4095), (2, 4096), (2, 6143)):
        group = n * 96 + k // 64
        scale = dynamic[absmax[n, k // 64].item()] * nested[group // 256] + offset
        assert values[n, k] == table[codes[n, k].item()] * scale


def test_nf4_is_the_published_format():
    """Tables, codes, scales and weights are those that bitsandbytes 0.50.2 makes of this matrix, to the last bit.

    They were written down from `quantize_4bit(W, blocksize=64, compress_statistics=True, quant_type="nf4")`. The means
    of its absmax are exact in fp32 in any order.
    """
    table, dynamic = make_tables("cpu")
    digest = hashlib.sha256(dynamic.numpy().tobytes()).hexdigest()
    assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert table[[0, 1, 7, 8, 15]].tolist() == [-1, -0.6961928009986877, 0, 0.07958029955625534, 1]
    k = torch.arange(512)
    W = ((k * 37 % 101 - 50) / 64 * 2.0 ** -(k // 64)).view(4, 128)
    w = quantize_weight(W, "nf4", search=False)
    pairs = unpack(w).flatten()[:32].view(-1, 2)  # the first in the higher bits of a byte
    published = [4, 193, 110, 41, 243, 176, 93, 23, 226, 159, 60, 5, 209, 142, 42, 244]
    assert (pairs[:, 0] * 16 + pairs[:, 1]).tolist() == published
    assert w.scales.flatten().tolist() == [255, 207, 143, 59, 53, 50, 49, 48]
    assert w.nested_scales.tolist() == [0.586700439453125] and w.nested_offset.item() == 0.194549560546875
    digest = hashlib.sha256(dequantize_ref(w).numpy().tobytes()).hexdigest()
    assert digest == "474e14d2091198e957449ffbf1aa43c0df3d97f74d93781f57891e6319dd6b73"


# ---- the kernels ----


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [0, 1, 2, 15, 17, 65])
def test_products(device, format, dtype, M):
    """N odd and beyond a block of 64, K no multiple of a group, a tile or a load."""
    w = random_weight(device, format, N=67 if M < 17 else 33)
    check_product(random_x(device, dtype, M, 300), w, random_x(device, dtype, w.shape[0], seed=2))


@pytest.mark.parametrize("K", [1, 40, 64, 130, 512])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("M", [1, 3])
def test_groups(device, K, group, M):
    """Every length of a run, groups that end within a tile and tiles that end within a group; scales of 28 bits."""
    w = random_weight(device, "int4", N=67, K=K, group=group)
    w = w._replace(scales=w.scales | 0x6A50)
    check_product(random_x(device, torch.float32, M, K), w)


@pytest.mark.parametrize(("format", "group"), [("int8", 64), ("nf4", 64), ("int4", 32), ("int4", 64), ("int4", 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [1, 3, 65])
@pytest.mark.parametrize("K", [1020, 2048])
def test_sixteen_bits_in_whole_tiles(device, format, group, dtype, M, K):
    """Rows of 32 words that share groups, whose scales multiply sums; x may end before the words do."""
    w = random_weight(device, format, N=67, K=K, group=group)
    check_product(random_x(device, dtype, M, K), w)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("K", [2048, 2080])
def test_many_steps_along_k_are_split_and_repeat(device, format, M, K):
    """Several steps, the last whole or not, and at M = 3 several programs, whose sums are added in one order."""
    w = random_weight(device, format, N=35, K=K)
    x = random_x(device, torch.float32, M, K)
    assert split_k(1, K // 128) > 1
    check_product(x, w)
    assert torch.equal(dequant_matmul(x, w), dequant_matmul(x, w))


@pytest.mark.skipif(HAS_GPU, reason="asks the interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_byte_permutes_look_up_what_nf4_codes_stand_for(dtype):
    """To the nearest number of 16 bits, for all codes in all eight places of a word."""
    import triton.language as tl

    from tests.kernels.interpreter import TensorHandle, run_assembly

    codes = (torch.arange(16)[:, None] + torch.arange(8)) % 16
    words = pack(codes.repeat_interleave(4, 1), 4)[:, :1]  # of four alike
    handle = TensorHandle(words.numpy(), tl.int32)
    call = run_assembly(None, LOOKUPS[dtype], "=r,=r,=r,=r,r", [handle], None, True, 1)
    pairs = [torch.from_numpy(call.get_result(i).data.copy()) for i in range(4)]
    found = torch.cat([half.to(torch.int16) for pair in pairs for half in (pair, pair >> 16)], dim=1).view(dtype)
    assert torch.equal(found, torch.tensor(NF4, dtype=torch.float64).to(dtype)[codes])


def test_split_k():
    """Enough programs, no more, and never fewer than 4 steps for one of them."""
    assert [split_k(64, 128), split_k(263, 128), split_k(264, 128)] == [8, 2, 1]
    assert [split_k(1, 7), split_k(1, 8), split_k(1, 1)] == [1, 2, 1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_m_writes_the_weight_out(device, format, dtype):
    x, w = random_x(device, dtype, kernels.MAX_FUSED_ROWS + 1, 70), random_weight(device, format, N=5, K=70)
    check_product(x, w)
    assert torch.equal(dequantize(w, dtype), dequantize_ref(w).to(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("K", [40, 128, 600])
def test_weights_are_written_out_to_the_last_bit(device, format, K):
    w = random_weight(device, format, N=11, K=K)
    assert torch.equal(dequantize(w, torch.float32), dequantize_ref(w))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("M", [1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernel_adds_nothing_to_the_error_of_quantisation(device, format, M, dtype):
    """The distance to the product with the weight as it was is that of the written-out weight, to half a percent."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3)).to(device)
    w, x = quantize_weight(weight, format), random_x(device, dtype, M, 512)
    truth = x.double() @ weight.double().T
    ours, theirs = ((y - truth).square().mean().sqrt() for y in (dequant_matmul(x, w).double(), exact(x, w)))
    assert 0.995 < ours / theirs < 1.005


LAYOUTS = {
    "a view within NaN": surround,
    "transposed": lambda x: x.T.contiguous().T,
    "every other column": lambda x: torch.stack((x, poison(torch.empty_like(x))), -1).flatten(1)[:, ::2],
    "not aligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "one row for all": lambda x: x[:1].expand(x.shape),
    "one value for all": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M", [1, 5])
def test_layouts_of_x(device, layout, M):
    x = LAYOUTS[layout](random_x(device, torch.float16, M, 70))
    w = random_weight(device, "int4", N=41, K=70)
    check_product(x, w)
    check_product(x.unflatten(0, (1, M)), w)
    check_product(x[0], w, random_x(device, torch.float16, 1).expand(41))


def test_rows_of_x_may_begin_beyond_2_to_the_31(device):
    """Rows 2^30 elements apart, of which the fourth begins beyond 2^31."""
    if device == "cuda":
        pytest.skip("needs 8 GB of addresses, which only the CPU has without memory")
    x, w = random_x(device, torch.float16, 4, 70), random_weight(device, "int4", N=5, K=70)
    apart = reserve((3 * 2**30 + 70,), torch.float16).as_strided((4, 70), (2**30, 1)).copy_(x)
    assert torch.equal(dequant_matmul(apart, w), dequant_matmul(x, w))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("M", [1, 5])
def test_weights_that_are_not_aligned(device, format, M):
    """Each tensor lies one element into its memory, between poison."""

    def shift(t):
        return poison(torch.empty(t.numel() + 2, dtype=t.dtype, device=device))[1:-1].view(t.shape).copy_(t)

    w = random_weight(device, format, N=41, K=160)
    w = w._replace(**{k: shift(t) for k, t in w._asdict().items() if isinstance(t, torch.Tensor)})
    check_product(random_x(device, torch.float32, M, 160), w)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_with_nan_and_infinity_are_no_concern_of_others(device, format):
    x, w = random_x(device, torch.float32, 3, 70), random_weight(device, format, N=5, K=70)
    good = dequant_matmul(x, w)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    y = dequant_matmul(x, w)
    assert torch.equal(y[0], good[0]) and not y[1:].isfinite().any()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    device = "cuda" if HAS_GPU else "cpu"
    pytest.importorskip("triton")
    format, dtype = data.draw(st.sampled_from(FORMATS)), data.draw(st.sampled_from(DTYPES))
    # Of few outputs eager torch may by chance have all exact, which is no measure.
    M, N, K = (data.draw(st.integers(*range_)) for range_ in ((1, 20), (40, 80), (1, 400)))
    w = random_weight(device, format, N, K, data.draw(st.sampled_from([32, 64, 128])), data.draw(st.integers(0, 9)))
    bias = random_x(device, dtype, N, seed=2) if data.draw(st.booleans()) else None
    check_product(random_x(device, dtype, M, K), w, bias)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("M", [1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_x_and_bias(device, format, M, dtype):
    w = random_weight(device, format, N=41, K=70)
    check_gradients(
        lambda x, bias: dequant_matmul(x, w, bias),
        lambda x, bias: dequant_matmul_ref(x, w, bias),
        lambda x, bias: exact(x, w, bias),
        {"x": random_x(device, dtype, M, 70), "bias": random_x(device, dtype, 41)},
        random_x(device, dtype, M, 41, seed=5),
    )


def test_mistakes_are_one_sentence(device, monkeypatch):
    w = random_weight(device, "int8", N=5, K=70)
    with pytest.raises(ValueError, match="x has 71 columns, but the quantised weight 70"):
        dequant_matmul(torch.zeros(1, 71, device=device), w)
    with pytest.raises(ValueError, match=r"x.dtype = torch.float64 must be float32, float16 or bfloat16"):
        dequant_matmul(torch.zeros(1, 70, device=device, dtype=torch.float64), w)
    for bias in (torch.zeros(4, device=device), torch.zeros(5, device=device, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"bias torch.float\d\d\[\d\] must be torch.float32\[5\]"):
            dequant_matmul(torch.zeros(1, 70, device=device), w, bias)
    monkeypatch.setattr(kernels.triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="x is on the CPU"):
        dequant_matmul(torch.zeros(1, 70), w)
