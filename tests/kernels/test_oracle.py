"""The rule by which kernels are judged rejects what is wrong."""

import pytest
import torch

from tests.kernels.oracle import check, check_gradients, surround


def results(error):
    """Ours off by `error` times what bf16 is off by, which is what eager is off by; and the exact values."""
    exact = torch.linspace(1, 2, 1000, dtype=torch.float64) ** 0.5
    eager = exact.bfloat16()
    return (exact + error * (eager.double() - exact)).float().bfloat16(), eager, exact


def test_errors_may_be_twice_those_of_eager():
    ours, eager, exact = results(1)
    errors = check(ours, eager, exact)
    assert errors["max"] == errors["eager_max"] > errors["rms"] == errors["eager_rms"] > 0
    with pytest.raises(AssertionError, match="the max error"):
        check(results(8)[0], eager, exact)
    worse = exact.bfloat16()
    worse[7] *= 1 + 2**-5  # one value wrong is too much
    with pytest.raises(AssertionError, match="gradient: the max error"):
        check(worse, eager, exact, name="gradient")
    shifted = (exact + 0.011).bfloat16()  # so is a little, everywhere
    with pytest.raises(AssertionError, match="the rms error"):
        check(shifted, eager, exact)
    check(torch.zeros(3), torch.zeros(3), torch.zeros(3).double())
    ones = torch.ones(10)
    ours = ones.clone()
    ours[0] += 2**-23  # the last bit, where eager is exact
    check(ours, ones, ones.double())
    ours[0] += 2**-23
    with pytest.raises(AssertionError, match="the max error"):
        check(ours, ones, ones.double())


def test_nan_and_infinity_must_be_where_they_belong():
    exact = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]).double()
    check(exact.float(), exact.float(), exact)
    for wrong in (
        [torch.nan, torch.nan, torch.inf, -torch.inf],
        [1, 0, torch.inf, -torch.inf],
        [1, torch.nan, -torch.inf, -torch.inf],
        [1, torch.nan, torch.inf, 0],
    ):
        with pytest.raises(AssertionError):
            check(torch.tensor(wrong).float(), exact.float(), exact)


def test_what_cannot_be_compared_is_refused():
    x = torch.ones(3)
    for arguments in (
        (x, x, x),
        (x.half(), x, x.double()),
        (x, x, torch.ones(4).double()),
        (x, x * torch.nan, x.double()),
    ):
        with pytest.raises(AssertionError):
            check(*arguments)


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
