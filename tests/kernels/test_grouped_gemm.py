"""The experts' kernels against the loop in fp64: outputs and all gradients, over routings, shapes and layouts."""

from functools import partial

import numpy as np
import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.kernels import grouped_gemm
from nanovlm.kernels.grouped_gemm import grouped_experts, grouped_experts_ref, plan_rows, tile_sizes
from tests.kernels.oracle import check_gradients, reserve, surround

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def random_choice(R, k, E, generator):
    return torch.rand(R, E, generator=generator).argsort(-1)[:, :k]


def make_inputs(choice, E, D, W, dtype, device, seed=0):
    """choice on the device, the other arguments by name, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    R, k = choice.shape
    shapes = dict(x=(R, D), weights=(R, k), gate=(E, W, D), up=(E, W, D), down=(E, D, W))
    scales = dict(x=1, weights=1, gate=2 * D**-0.5, up=D**-0.5, down=W**-0.5)
    draw = lambda name: scales[name] * torch.randn(shapes[name], generator=generator)  # noqa: E731
    inputs = {name: draw(name).to(device, dtype) for name in shapes}
    return choice.to(device), inputs, torch.randn(R, D, generator=generator).to(device, dtype)


def assert_equals_the_loop(choice, E, D, W, dtype, device, seed=0):
    choice, inputs, dout = make_inputs(choice, E, D, W, dtype, device, seed)
    ours, loop = (partial(function, choice=choice) for function in (grouped_experts, grouped_experts_ref))
    check_gradients(ours, loop, loop, inputs, dout)


# R, k, E, D, W. Neither D nor W is a multiple of a block but where it says so.
SHAPES = {
    "17 tokens": (17, 2, 3, 17, 65),
    "no tokens": (0, 2, 3, 40, 24),
    "one token, most experts without": (1, 2, 6, 40, 24),
    "15 tokens": (15, 2, 3, 33, 17),
    "63 tokens": (63, 2, 4, 72, 40),
    "65 tokens, whole blocks": (65, 2, 3, 64, 32),
    "129 tokens": (129, 2, 3, 40, 24),
    "k = 1": (33, 1, 3, 24, 40),
    "k = E": (17, 3, 3, 40, 24),
    "one expert": (65, 1, 1, 24, 40),
    "more experts than rows": (3, 2, 33, 16, 16),
}


@pytest.mark.parametrize("shape", SHAPES)
@DTYPES
def test_equals_the_loop(shape, dtype, device):
    R, k, E, D, W = SHAPES[shape]
    assert_equals_the_loop(random_choice(R, k, E, torch.Generator().manual_seed(0)), E, D, W, dtype, device)


@DTYPES
def test_all_tokens_on_one_expert(dtype, device):
    """Five tiles of it, and three experts whose gradients are zeros."""
    assert_equals_the_loop(torch.full((65, 1), 1), 4, 40, 24, dtype, device)


@pytest.mark.parametrize(("R", "E"), [(150, 1), (40, 1), (9, 2)], ids=["128 rows", "64 rows", "16 rows"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_tiles_of_large_shapes(R, E, dtype, device):
    D, W = 264, 256
    sizes = tile_sizes(torch.empty(R, D, dtype=dtype), R, E, W)
    assert sizes["gate_up"]["BK"] > 32 and sizes["gate_up"]["BM"] == {150: 128, 40: 64, 9: 16}[R]
    assert_equals_the_loop(random_choice(R, 1, E, torch.Generator().manual_seed(0)), E, D, W, dtype, device)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_routing(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    E = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, E))
    rows = data.draw(st.lists(st.permutations(range(E)), max_size=40))
    choice = torch.tensor([row[:k] for row in rows], dtype=torch.int64).view(-1, k)
    D, W = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    assert_equals_the_loop(choice, E, D, W, dtype, device, seed=data.draw(st.integers(0, 9)))


def run(choice, inputs, dout):
    """Output and gradients, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = grouped_experts(leaves["x"], choice, *list(leaves.values())[1:])
    return {"out": out, **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))}


def assert_equal(a, b):
    for name in a:
        assert torch.equal(a[name], b[name]), name


LAYOUTS = {
    "rows apart and misaligned": surround,
    "columns apart": lambda x: x.mT.contiguous().mT,
    "one row for all": lambda x: x[:1].expand_as(x),
    "one number for all": lambda x: x.flatten()[:1].view([1] * x.dim()).expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout, device):
    choice = random_choice(17, 2, 3, torch.Generator().manual_seed(0))
    choice, inputs, dout = make_inputs(choice, 3, 40, 24, torch.bfloat16, device)
    inputs = {name: LAYOUTS[layout](x) for name, x in inputs.items()}
    dout = LAYOUTS[layout](dout)
    copies = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
    assert_equal(
        run(LAYOUTS[layout](choice), inputs, dout), run(LAYOUTS[layout](choice).clone(), copies, dout.contiguous())
    )


def test_equal_inputs_give_equal_bits(device):
    choice, inputs, dout = make_inputs(random_choice(33, 2, 3, torch.Generator()), 3, 40, 24, torch.bfloat16, device)
    assert_equal(run(choice, inputs, dout), run(choice, inputs, dout))


def test_a_bad_token_and_a_bad_idle_expert_stay_alone(device):
    """NaN in a token reaches its own rows and its experts' gradients; NaN in an expert without tokens nothing."""
    choice = torch.tensor([[0, 1]] * 20 + [[2, 3]] + [[0, 1]] * 20)
    choice, inputs, dout = make_inputs(choice, 5, 40, 24, torch.bfloat16, device)
    clean = run(choice, inputs, dout)
    inputs["x"][20] = torch.nan
    for name in ("gate", "up", "down"):
        inputs[name][4] = torch.nan
    ours = run(choice, inputs, dout)
    for name in ours:
        kept = [*range(20), *range(21, 41)] if len(ours[name]) == 41 else [0, 1, 4]
        assert torch.equal(ours[name][kept], clean[name][kept]), name
        assert ours[name][20 if len(ours[name]) == 41 else 2].isnan().any(), name


@pytest.mark.parametrize("wanted", ["x", "weights", "gate", "up", "down"])
def test_frozen_inputs_get_no_gradient(wanted, device, monkeypatch):
    """What is computed for one input alone is what is computed with all the others; only its own kernels run."""
    choice, inputs, dout = make_inputs(random_choice(17, 2, 3, torch.Generator()), 3, 40, 24, torch.float16, device)
    expected = run(choice, inputs, dout)[wanted]
    launches = []
    for name in ("matrix_grad", "launch_combine"):
        monkeypatch.setattr(grouped_gemm, name, recording(getattr(grouped_gemm, name), launches))
    inputs[wanted].requires_grad_()
    grouped_experts(inputs["x"], choice, *list(inputs.values())[1:]).backward(dout)
    assert torch.equal(inputs[wanted].grad, expected)
    assert all(x.grad is None for name, x in inputs.items() if name != wanted)
    also = {"x": ["launch_combine"], "weights": []}.get(wanted, ["matrix_grad"])
    assert launches == ["launch_combine", *also]


def recording(function, launches):
    def record(*args):
        launches.append(function.__name__)
        return function(*args)

    return record


def test_nothing_is_kept_without_gradients(device, monkeypatch):
    choice, inputs, _ = make_inputs(random_choice(17, 2, 3, torch.Generator()), 3, 40, 24, torch.float16, device)
    kept = []
    forward = grouped_gemm.forward
    monkeypatch.setattr(grouped_gemm, "forward", lambda *args: kept.append(forward(*args)) or kept[-1])
    without = grouped_experts(inputs["x"], choice, *list(inputs.values())[1:])
    inputs["up"].requires_grad_()
    with torch.no_grad():
        grouped_experts(inputs["x"], choice, *list(inputs.values())[1:])
    with_gradients = grouped_experts(inputs["x"], choice, *list(inputs.values())[1:])
    assert [g is not None for _, g, _ in kept] == [u is not None for _, _, u in kept] == [False, False, True]
    assert torch.equal(without, with_gradients) and without.grad_fn is None


# --- the plan ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_tiles_hold_every_row_of_an_expert_once(data):
    E = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, E))
    rows = data.draw(st.lists(st.permutations(range(E)), max_size=30))
    choice = torch.tensor([row[:k] for row in rows], dtype=torch.int64).view(-1, k)
    BM = data.draw(st.sampled_from([1, 2, 3, 16]))
    plan = plan_rows(choice, E, {"gate_up": dict(BM=BM)})
    flat, seen = choice.flatten(), []
    for e, first, end in plan.tiles.tolist():
        assert end - first <= BM and 0 <= e < E
        assert all(flat[p] == e for p in plan.order[first : max(first, end)])
        seen += range(first, end)
    assert sorted(seen) == list(range(flat.numel()))
    counts = plan.bounds.diff()
    assert counts.tolist() == flat.bincount(minlength=E).tolist() and plan.bounds[0] == 0
    for e, first in enumerate(plan.bounds[:-1]):
        assert plan.order[first : first + counts[e]].tolist() == (flat == e).nonzero().flatten().tolist()


# --- offsets beyond 32 bits ----------------------------------------------------------------------------------

FAR = 2**27  # rows of 16 numbers, beyond which an offset takes more than 31 bits


def far_memory(device, rows, columns=16, dtype=torch.float16):
    """Memory; on the CPU it is not touched, and so not there, but where a kernel reads and writes."""
    if device == "cuda":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    return reserve((rows, columns), dtype)


@pytest.fixture
def at_program(monkeypatch, device):
    """A function that makes the one program of a launch believe that it is another one."""
    if device == "cuda":
        pytest.skip("only interpreted programs can be told which ones they are")
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def set_program(*ids):
        program_id = lambda self, axis: TensorHandle(np.array([ids[axis]], np.int32), tl.int32)  # noqa: E731
        monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", program_id)

    return set_program


def far_rows(device):
    """order and tiles of three rows of expert FAR / 16, beginning at row FAR, of the tokens 2, 0 and 1, with k = 1."""
    torch.manual_seed(0)
    order = far_memory(device, FAR + 3, 1, torch.int32).flatten()
    order[FAR:] = torch.tensor([2, 0, 1])
    return order, torch.tensor([[FAR // 16, FAR, FAR + 3]], dtype=torch.int32, device=device)


SIZES = dict(D=16, W=16, BM=16, BN=16, BK=16)


def test_far_rows_and_experts_forward(device):
    order, tiles = far_rows(device)
    x = far_memory(device, FAR + 1).as_strided((3, 16), (8 * FAR, 1)).copy_(torch.randn(3, 16))
    gate, g, u, a = far_memory(device, FAR + 16), *(far_memory(device, FAR + 3) for _ in range(3))
    gate[FAR:] = torch.randn(16, 16)
    grouped_gemm.gate_up_kernel[(1,)](x, order, tiles, gate, gate, g, u, a, x.stride(0), 1, k=1, KEEP=True, **SIZES)
    expected = x[order[FAR:].long()].double() @ gate[FAR:].double().T
    torch.testing.assert_close(g[FAR:], expected.half())
    torch.testing.assert_close(u[FAR:], expected.half())
    torch.testing.assert_close(a[FAR:], (expected.sigmoid() * expected**2).half())


def test_far_rows_and_experts_scattered(device):
    order, tiles = far_rows(device)
    order[FAR:] += FAR
    a, down, out = far_memory(device, FAR + 3), far_memory(device, FAR + 16), far_memory(device, FAR + 3)
    a[FAR:], down[FAR:] = torch.randn(3, 16), torch.randn(16, 16)
    grouped_gemm.scatter_kernel[(1,)](a, a, order, tiles, down, down, out, 1, 1, 16, TWO=True, **SIZES)
    expected = 2 * (a[FAR:].double() @ down[FAR:].double().T)[[1, 2, 0]]
    torch.testing.assert_close(out[FAR:], expected.half())


def test_far_tokens_combined(device, at_program):
    torch.manual_seed(0)
    y, out, weights = far_memory(device, 2 * FAR + 32), far_memory(device, FAR + 16), far_memory(device, FAR + 16, 2)
    y[2 * FAR :], weights[FAR:] = torch.randn(32, 16), torch.randn(16, 2)
    at_program(FAR // 16, 0)
    grouped_gemm.combine_kernel[(1,)](y, weights, out, FAR + 16, k=2, D=16, WEIGHTED=True, BM=16, BN=16)
    expected = (y[2 * FAR :].view(16, 2, 16).double() * weights[FAR:, :, None].double()).sum(1)
    torch.testing.assert_close(out[FAR:], expected.half())


def test_far_rows_and_experts_backward(device):
    order, tiles = far_rows(device)
    dout = far_memory(device, FAR + 1).as_strided((3, 16), (8 * FAR, 1)).copy_(torch.randn(3, 16))
    down, weights, dweights = far_memory(device, FAR + 16), torch.ones(3, device=device), torch.empty(3, device=device)
    g, u, dg, du, wa = (far_memory(device, FAR + 3) for _ in range(5))
    down[FAR:], g[FAR:], u[FAR:] = torch.randn(16, 16), torch.randn(3, 16), torch.randn(3, 16)
    grouped_gemm.through_down_kernel[(1,)](
        dout, order, tiles, down, weights, g, u, dg, du, wa, dweights, dout.stride(0), 1, 3, k=1, **SIZES
    )
    da = dout[order[FAR:].long()].double() @ down[FAR:].double()
    silu = torch.nn.functional.silu(g[FAR:].double())
    torch.testing.assert_close(du[FAR:], (da * silu).half())
    torch.testing.assert_close(wa[FAR:], (u[FAR:] * silu).half())
    torch.testing.assert_close(
        dweights[order[FAR:].long()].double(), (da * u[FAR:] * silu).sum(1), rtol=1e-4, atol=1e-4
    )


def test_far_rows_and_experts_of_matrix_gradients(device, at_program):
    order, _ = far_rows(device)
    x = far_memory(device, FAR + 1).as_strided((3, 16), (8 * FAR, 1)).copy_(torch.randn(3, 16))
    rows, out, bounds = (
        far_memory(device, FAR + 3),
        far_memory(device, FAR + 16),
        far_memory(device, FAR // 16 + 2, 1, torch.int32).flatten(),
    )
    rows[FAR:] = torch.randn(3, 16)
    bounds[-2:] = torch.tensor([FAR, FAR + 3])
    at_program(FAR // 16)
    grouped_gemm.matrix_grad_kernel[(1,)](rows, x, order, bounds, out, x.stride(0), 16, 1, k=1, **SIZES)
    expected = rows[FAR:].double().T @ x[order[FAR:].long()].double()
    torch.testing.assert_close(out[FAR:], expected.half())


# --- mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.ones(3, 9)), r"x has shape \(3, 9\), but gate and choice want \(3, 8\)"),
        (dict(weights=torch.ones(3, 1)), r"weights has shape \(3, 1\), but gate and choice want \(3, 2\)"),
        (dict(down=torch.ones(4, 16, 8)), r"down has shape \(4, 16, 8\), but gate and choice want \(4, 8, 16\)"),
        (
            dict(x=torch.ones(3, 8).double()),
            "x is torch.float64; the experts' kernels take float32, float16",
        ),
        (dict(choice=torch.zeros(3, dtype=torch.int64)), r"choice \(3,\) must be \[E, W, D\] and \[R, k\]"),
        (dict(up=torch.ones(4, 16, 8).half()), "up is torch.float16, but x is torch.float32"),
    ],
)
def test_mistakes_are_named(changes, message, device):
    inputs = {name: x.to(device) for name, x in (small_inputs() | changes).items()}
    with pytest.raises(ValueError, match=message):
        grouped_experts(**inputs)


def test_tensors_on_the_cpu_are_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="run on a GPU, but x is on cpu; 'grouped' experts run anywhere"):
        grouped_experts(**small_inputs())


def small_inputs():
    return dict(
        x=torch.ones(3, 8),
        choice=torch.zeros(3, 2, dtype=torch.int64),
        weights=torch.ones(3, 2),
        gate=torch.ones(4, 16, 8),
        up=torch.ones(4, 16, 8),
        down=torch.ones(4, 8, 16),
    )
