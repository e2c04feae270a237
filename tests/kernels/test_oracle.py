"""The rule by which kernels are judged rejects what is wrong, and nothing else on any processor."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.oracle import check_gradients, judge, round_often, surround


def results(error):
    """Ours off by `error` times what bf16 is off by, which is what eager is off by; and the exact values."""
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64) ** 0.5
    eager = exact.bfloat16()
    return (exact + error * (eager.double() - exact)).float().bfloat16(), eager, exact


def test_errors_may_be_twice_those_of_eager():
    ours, eager, exact = results(1)
    errors = judge(ours, eager, exact)
    assert errors["max"] == errors["eager_max"] > errors["rms"] == errors["eager_rms"] > 0
    with pytest.raises(AssertionError, match="the max error"):
        judge(results(8)[0], eager, exact)
    worse = exact.bfloat16()
    worse[7] *= 1 + 2**-5  # one value wrong is too much
    with pytest.raises(AssertionError, match="gradient: the max error"):
        judge(worse, eager, exact, name="gradient")
    shifted = (exact + 0.011).bfloat16()  # so is a little, everywhere
    with pytest.raises(AssertionError, match="the rms error"):
        judge(shifted, eager, exact)
    judge(torch.zeros(3), torch.zeros(3), torch.zeros(3).double())
    ones = torch.ones(10)
    ours = ones.clone()
    ours[0] += 2**-23  # the last bit, where eager is exact
    judge(ours, ones, ones.double())
    ours[0] += 2**-23
    with pytest.raises(AssertionError, match="the max error"):
        judge(ours, ones, ones.double())


def test_a_measure_that_is_not_finite_is_none():
    ones = torch.ones(3)
    judge(ones, ones, ones.double(), [ones.double()])
    for bad in (torch.inf, torch.nan):
        with pytest.raises(AssertionError, match="the max error"):
            judge(5 * ones, ones, ones.double(), [bad * ones.double()])


def test_nan_and_infinity_must_be_where_they_belong():
    exact = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]).double()
    judge(exact.float(), exact.float(), exact)
    for wrong in (
        [torch.nan, torch.nan, torch.inf, -torch.inf],
        [1, 0, torch.inf, -torch.inf],
        [1, torch.nan, -torch.inf, -torch.inf],
        [1, torch.nan, torch.inf, 0],
    ):
        with pytest.raises(AssertionError):
            judge(torch.tensor(wrong).float(), exact.float(), exact)


def test_what_cannot_be_compared_is_refused():
    x = torch.ones(3)
    for arguments in (
        (x, x, x),
        (x.half(), x, x.double()),
        (x, x, torch.ones(4).double()),
        (x, x * torch.nan, x.double()),
    ):
        with pytest.raises(AssertionError):
            judge(*arguments)


def test_gradients_are_checked_by_name():
    def right(x, y):
        return (x * y).sum(0)

    def wrong(x, y):
        return (x * y.detach() + 0 * y).sum(0)

    inputs = {"x": torch.randn(5, 3), "y": torch.randn(5, 3)}
    assert list(check_gradients(right, right, right, inputs, torch.ones(3))) == ["output", "x", "y"]
    with pytest.raises(AssertionError, match="y: the max error"):
        check_gradients(wrong, right, right, inputs, torch.ones(3))


def test_memory_that_nobody_wrote_is_poison():
    x = torch.ones(3)
    for empty in (
        torch.empty(3),
        torch.empty_like(x),
        x.new_empty(3),
        torch.empty_strided((3,), (1,)),
        torch.empty(3).half(),
    ):
        assert empty.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all() and torch.empty(2, dtype=torch.bool).all()
    x = torch.randn(3, 5)
    view = surround(x)
    assert torch.equal(view, x) and not view.is_contiguous()
    assert view.as_strided((3, 7), view.stride(), view.storage_offset() - 1).isnan().sum() == 6


# --- in any order, on any processor --------------------------------------------------------------------------

EPSILON = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16)}


def attend(q, k, v):
    """Attention of every query to all keys, [T, H], [S, H], [S, H], written with products alone."""
    return (q @ k.T * q.shape[1] ** -0.5).softmax(-1) @ v


def entropy(hidden, weight, sure=0.0):
    """The losses of the label 0, hidden [N, D], weight [V, D]; small ones, that are small differences, where sure."""
    logits = (hidden @ weight.T) + sure * F.one_hot(torch.tensor(0), len(weight))
    return F.cross_entropy(logits, torch.zeros(len(hidden), dtype=torch.long), reduction="none")


def make_cases():
    """Functions with their inputs: one query as in decoding, many, a long sum, and a scalar."""

    def draw(*shape):
        """Numbers of 8 bits from -2 to 2, the same in all dtypes and on all processors, as normal ones are not."""
        return torch.randint(-128, 129, shape, generator=torch.Generator().manual_seed(sum(shape))) / 64

    return {
        "one query": (attend, {"q": draw(1, 16), "k": draw(129, 16), "v": draw(129, 16)}),
        "many queries": (attend, {"q": draw(65, 72), "k": draw(63, 72), "v": draw(63, 72)}),
        "long sums": (F.linear, {"input": draw(3, 3000), "weight": draw(5, 3000)}),
        "losses": (entropy, {"hidden": draw(17, 24), "weight": draw(1000, 24)}),
        "a small loss": (partial(entropy, sure=12.0), {"hidden": draw(1, 8), "weight": draw(1000, 8)}),
    }


def run_cases(dtype, seed=None):
    """Outputs and gradients of all cases by name; with a seed, every sum of them is taken in another order."""
    results = {}
    for name, (function, inputs) in make_cases().items():
        leaves = {key: x.to(dtype).requires_grad_() for key, x in inputs.items()}
        permuted = dict(leaves)
        if seed is not None:  # the size that is summed over is the last of the first two, and of attention the keys too
            generator = torch.Generator().manual_seed(seed)
            first, second, *_ = leaves
            order = torch.randperm(leaves[first].shape[-1], generator=generator)
            permuted |= {key: permuted[key][:, order] for key in (first, second)}
            if "v" in leaves:
                order = torch.randperm(len(leaves["v"]), generator=generator)
                permuted |= {key: permuted[key][order] for key in "kv"}
        output = function(**permuted)
        gradient = torch.arange(output.numel()).remainder(7).sub(2).view_as(output).to(output.dtype)
        gradients = torch.autograd.grad(output, list(leaves.values()), gradient)
        results[name] = {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}
    return results


def judge_all(results, dtype):
    """Judge them where eager is as lucky as can be: the exact results, rounded."""
    exact, rounded = run_cases(torch.float64), round_often(lambda: run_cases(torch.float64), dtype)
    for name, tensors in results.items():
        for key, x in tensors.items():
            others = [one[name][key] for one in rounded]
            judge(x, exact[name][key].to(x.dtype), exact[name][key], others, f"{key} of {name}")


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_other_orders_pass(dtype, seed):
    judge_all(run_cases(dtype, seed), dtype)


# What changes how torch, oneDNN and MKL add: fewer instructions, as on an older processor, and other threads.
PROCESSORS = {
    "plain": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "two threads": {"OMP_NUM_THREADS": "2", "MKL_CBWR": "COMPATIBLE"},
}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_other_processors_pass(processor, tmp_path):
    script = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.kernels.test_oracle import EPSILON, run_cases
torch.save({{dtype: run_cases(dtype) for dtype in EPSILON}}, {str(tmp_path / "results")!r})
"""
    environment = os.environ | PROCESSORS[processor]
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for dtype, results in torch.load(tmp_path / "results", weights_only=True).items():
        judge_all(results, dtype)


def shorten(x, num_bits):
    """Round to fewer bits (Dekker 1971, "A floating-point technique for extending the available precision")."""
    large = x * (2**num_bits + 1)
    return x + (large - (large - x) - x).detach()


def off(x):
    return x * (1 + LAST_BITS[x.dtype] * EPSILON[x.dtype])


# As in tf32, which a GPU may take for fp32, and in fp8 in place of bf16.
LOST_BITS = {torch.float32: 13, torch.bfloat16: 4}
LAST_BITS = {torch.float32: 40, torch.bfloat16: 4}  # by which a result is off; a sum in fp32 may be off by several
WRONG = {
    "a key is missing": lambda q, k, v: attend(q, k[1:], v[1:]),
    "another scale": lambda q, k, v: attend(off(q), k, v),
    "products of fewer bits": lambda q, k, v: attend(shorten(q, LOST_BITS[q.dtype]), shorten(k, LOST_BITS[q.dtype]), v),
    "a gradient stops": lambda q, k, v: attend(q, k.detach() + 0 * k, v),
    "the last column is that before": lambda q, k, v: attend(q, k, torch.cat([v[:, :-1], v[:, -2:-1]], 1)),
    "weights do not add up to 1": lambda q, k, v: off(attend(q, k, v)),
}


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("case", ["one query", "many queries"])
def test_what_is_wrong_fails(case, wrong, dtype):
    function, inputs = make_cases()[case]
    inputs = {key: (1.1 * x.float()).to(dtype) for key, x in inputs.items()}  # with all bits of the dtype
    gradient = torch.ones_like(function(**inputs))
    check_gradients(function, function, function, inputs, gradient)
    with pytest.raises(AssertionError, match="error"):
        check_gradients(WRONG[wrong], function, function, inputs, gradient)
