"""The interpreter computes what torch computes, and catches the bugs that a GPU would hide."""

import operator

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a GPU is at hand: nothing is interpreted")
if triton.knobs.runtime.interpret:
    from tests.kernels.interpreter import KernelFault, narrow, to_tf32, widen

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Arithmetic ----------------------------------------------------------------------------------------------------------


@triton.jit
def binary_kernel(p_x, p_y, p_out, OP: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    x, y = tl.load(p_x + o), tl.load(p_y + o)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "minimum":
        z = tl.minimum(x, y)
    elif OP == "where":
        z = tl.where(x < y, -x, tl.abs(y))
    elif OP == "scalar":
        z = x * 3 + 0.1
    elif OP == "compare":
        z = ((x <= y) & (x != 0)).to(x.dtype)
    tl.store(p_out + o, z)


BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "maximum": torch.fmax,
    "minimum": torch.fmin,
    "where": lambda x, y: torch.where(x < y, -x, y.abs()),
    "scalar": lambda x, y: x * 3 + 0.1,
    "compare": lambda x, y: ((x <= y) & (x != 0)).to(x.dtype),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", BINARY)
def test_arithmetic_equals_torch_bit_for_bit(op, dtype):
    x, y = randn(256, dtype=dtype), 2 * randn(256, dtype=dtype, seed=1)
    x[:8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3e38, 1e-40, torch.nan, 1.0])
    y[:8] = torch.tensor([1.0, 0.0, 1.0, torch.inf, 3e38, 2e-40, 1.0, torch.nan])
    out = torch.empty_like(x)
    binary_kernel[(1,)](x, y, out, op, 256)
    torch.testing.assert_close(out, BINARY[op](x, y), rtol=0, atol=0, equal_nan=True)


@triton.jit
def cast_kernel(p_x, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, tl.load(p_x + o).to(p_out.dtype.element_ty))


def test_casts_to_bf16_round_as_torch_does():
    x = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).int().view(torch.float32)
    x[:6] = torch.tensor([1.00390625, 1.01171875, 3.4e38, torch.inf, torch.nan, -0.0])  # halves go to even
    out = torch.empty(4096, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, 4096)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert (out[:2].float() == torch.tensor([1.0, 1.015625])).all()
    for source, target in (
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.int32, torch.bfloat16),
        (torch.bfloat16, torch.int32),
    ):
        x = (20 * randn(256)).to(source)
        out = torch.empty(256, dtype=target)
        cast_kernel[(1,)](x, out, 256)
        assert torch.equal(out, x.to(target)), (source, target)
    x = randn(64).numpy()
    assert (narrow(widen(narrow(x))) == narrow(x)).all()


@triton.jit
def dot_kernel(p_a, p_b, p_out, N: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, N)
    o_2d = o[:, None] * N + o[None, :]
    tl.store(p_out + o_2d, tl.dot(tl.load(p_a + o_2d), tl.load(p_b + o_2d), input_precision=PRECISION))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dot_has_fp32_accuracy(dtype):
    a, b, out = randn(64, 64, dtype=dtype), randn(64, 64, dtype=dtype, seed=1), torch.empty(64, 64)
    dot_kernel[(1,)](a, b, out, 64, "ieee")
    exact = a.double() @ b.double()
    # 64 roundings, of at most half an eps of a sum so far, add up at random.
    assert (out - exact).norm() / exact.norm() < 64**0.5 / 2 * torch.finfo(torch.float32).eps


def test_fp32_dots_are_tf32_unless_they_ask_for_more():
    a, b, out = randn(64, 64), randn(64, 64, seed=1), torch.empty(64, 64)
    dot_kernel[(1,)](a, b, out, 64, None)
    exact = a.double() @ b.double()
    assert 1e-4 < (out - exact).norm() / exact.norm() < 1e-3
    assert to_tf32(torch.tensor([1 + 2**-10 + 2**-11]).numpy()).item() == 1 + 2**-10


@triton.jit
def reduce_kernel(p_x, p_sum, p_max, p_cumsum, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(p_x + o_m[:, None] * N + o_n[None, :])
    tl.store(p_sum + o_m, tl.sum(x, 1))
    tl.store(p_max + o_n, tl.max(x, 0))
    tl.store(p_cumsum + o_m[:, None] * N + o_n[None, :], tl.cumsum(x, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions_equal_torch(dtype):
    x = randn(4, 32, dtype=dtype)
    total, largest, cumulative = torch.empty(4, dtype=dtype), torch.empty(32, dtype=dtype), torch.empty_like(x)
    reduce_kernel[(1,)](x, total, largest, cumulative, 4, 32)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(total, x.double().sum(1).to(dtype), rtol=2 * epsilon, atol=4 * epsilon)
    torch.testing.assert_close(cumulative, x.double().cumsum(1).to(dtype), rtol=2 * epsilon, atol=32 * epsilon)
    assert torch.equal(largest, x.amax(0))


# Language ------------------------------------------------------------------------------------------------------------


@triton.jit
def device_function(x):
    return x + 1


@triton.jit
def count_kernel(p_n, p_out):
    total = 0
    for i in range(tl.load(p_n)):
        total = device_function(total) + 0 * i
    for _ in tl.range(0, tl.load(p_n), 2):
        total = device_function(total)
    tl.store(p_out, total)


def test_ranges_may_end_where_a_tensor_says():
    out = torch.empty(1, dtype=torch.int32)
    count_kernel[(1,)](torch.tensor([5], dtype=torch.int32), out)
    assert out.item() == 8


@triton.autotune([triton.Config({"BLOCK": block}, num_warps=4) for block in (16, 32)], key=["n"])
@triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0})
@triton.jit
def tuned_kernel(p_out, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o, BLOCK + EVEN, mask=o < n)


def test_autotuning_takes_the_first_config():
    out = torch.empty(40)
    tuned_kernel[lambda meta: (triton.cdiv(40, meta["BLOCK"]),)](out, 40)
    assert (out == 16).all() and len(tuned_kernel.configs) == 2


# Bugs ----------------------------------------------------------------------------------------------------------------


@triton.jit
def copy_kernel(p_x, p_out, n_in, n_out, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    o = i * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o, mask=o < n_in, other=0.0)
    tl.store(p_out + i * stride + tl.arange(0, BLOCK), x, mask=o < n_out)


def test_out_of_bounds():
    x, out = torch.zeros(40), torch.empty(40)
    copy_kernel[(3,)](x, out, 40, 40, 16, 16)
    assert (out == 0).all()
    with pytest.raises(KernelFault, match=r"program \(2, 0, 0\): load of 1 of 9 lanes, the first at element 40 of p_x"):
        copy_kernel[(3,)](x, out, 41, 40, 16, 16)
    with pytest.raises(KernelFault, match=r"store of 1 of 9 lanes, the first at element 40 of p_out, which has 40"):
        copy_kernel[(3,)](x, out, 40, 41, 16, 16)
    with pytest.raises(KernelFault, match=r"out of bounds: .* element -16 of p_out"):
        copy_kernel[(2,)](x, out, 40, 40, -16, 16)
    rows = torch.zeros(4, 10)  # a part of a larger tensor ends where it ends
    with pytest.raises(KernelFault, match="element 10 of p_x, which has 10"):
        copy_kernel[(1,)](rows[1], out, 16, 16, 16, 16)
    with pytest.raises(KernelFault, match="p_out, p_x, which has 12"):  # two parts that overlap are one
        copy_kernel[(1,)](rows.view(-1)[4:12], rows.view(-1)[:8], 16, 4, 16, 16)


@triton.jit
def shift_kernel(p_x, p_out, SHIFT: tl.constexpr):
    i = tl.program_id(0)
    tl.store(p_out + i, tl.load(p_x + i + SHIFT))


@triton.jit
def total_kernel(p_x, p_out, ATOMIC: tl.constexpr):
    x = tl.load(p_x + tl.program_id(0))
    if ATOMIC:
        tl.atomic_add(p_out, x)
    else:
        tl.store(p_out, tl.load(p_out) + x)


def test_races():
    out = torch.zeros(33)
    with pytest.raises(KernelFault, match=r"race: programs \(0, 0, 0\), \(1, 0, 0\) write to element 15 of p_out"):
        copy_kernel[(2,)](torch.zeros(32), out, 32, 32, 15, 16)
    x = torch.arange(8.0)
    shift_kernel[(8,)](x, x, 0)  # each program has its own element
    for shift in (1, 6):  # the foreign write comes before the read, or after it
        x = torch.arange(16.0)
        with pytest.raises(KernelFault, match="write to and read element"):
            shift_kernel[(7,)](x, x[4:12], shift)
    total = torch.zeros(1)
    total_kernel[(4,)](torch.ones(4), total, True)
    assert total == 4
    with pytest.raises(KernelFault, match="race"):
        total_kernel[(4,)](torch.ones(4), total, False)


@triton.jit
def duplicate_kernel(p_out, DIVISOR: tl.constexpr):
    o = tl.arange(0, 16)
    tl.store(p_out + o // DIVISOR, o.to(tl.float32))


def test_two_lanes_with_one_address():
    duplicate_kernel[(1,)](torch.empty(16), 1)
    with pytest.raises(KernelFault, match="two lanes of one store"):
        duplicate_kernel[(1,)](torch.empty(16), 2)


@triton.jit
def offset_kernel(p_out, stride, WIDE: tl.constexpr):
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    tl.store(p_out + i * stride % 7, 1.0)


def test_int32_overflow():
    offset_kernel[(4,)](torch.empty(7), 2**30, True)
    with pytest.raises(KernelFault, match="int32 overflow: a multiply gives 2147483648"):
        offset_kernel[(4,)](torch.empty(7), 2**30, False)


@triton.jit
def descriptor_kernel(d_x, p_out, i_first, BLOCK: tl.constexpr, H: tl.constexpr):
    i = tl.program_id(0)
    x = tl.reshape(d_x.load([i, i_first, 0]), [BLOCK, H])
    o = tl.arange(0, BLOCK)[:, None] * H + tl.arange(0, H)[None, :]
    tl.store(p_out + i * BLOCK * H + o, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_descriptors(dtype):
    """Blocks of [2, 20, 12] with gaps between rows; what is beyond is zero, and never read."""
    x, out = randn(2, 20, 24, dtype=dtype), torch.empty(2, 16, 16, dtype=dtype)
    part = x[:, :, :12]

    def run(x, first, **options):
        described = {"shape": [2, 20, 12], "strides": [480, 24, 1], "block_shape": [1, 16, 16]} | options
        descriptor_kernel[(2,)](TensorDescriptor(x, **described), out, first, 16, 16)

    for first in (0, 4, 11, 32):
        run(part, first)
        expected = torch.zeros(2, 16, 16, dtype=dtype)
        expected[:, : max(20 - first, 0), :12] = part[:, first : first + 16]
        assert torch.equal(out, expected)
    with pytest.raises(KernelFault, match=r"program \(1, 0, 0\): load of 12 of 192 .* element 960 of d_x"):
        run(part, 5, shape=[2, 21, 12])
    with pytest.raises(KernelFault, match=r"element 948 of d_x, which has 948"):
        run(part, 4, shape=[2, 20, 13])
    with pytest.raises(KernelFault, match=r"race: .* write to and read element"):  # block 1 begins within block 0
        descriptor_kernel[(2,)](TensorDescriptor(out, [2, 16, 16], [128, 16, 1], [1, 16, 16]), out, 0, 16, 16)
    with pytest.raises(KernelFault, match=r"strides \[0, 24\], which must be above 0"):
        run(part, 0, strides=[0, 24, 1])
    with pytest.raises(KernelFault, match=r"block of \[1, 512, 16\] has a side above 256"):
        run(part, 0, block_shape=[1, 512, 16])


@triton.jit
def careless_kernel(p_x, p_out, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.device_assert(n > 0)
    tl.store(p_out, tl.sum(tl.load(p_x + o, mask=o < n)))


def test_masked_lanes_without_a_value_are_poison():
    for dtype in DTYPES:
        out = torch.zeros(1, dtype=dtype)
        careless_kernel[(1,)](torch.ones(16, dtype=dtype), out, 16, 16)
        assert out == 16
        careless_kernel[(1,)](torch.ones(16, dtype=dtype), out, 15, 16)
        assert out.isnan()
    with pytest.raises(AssertionError):
        careless_kernel[(1,)](torch.ones(16), out, 0, 16)
