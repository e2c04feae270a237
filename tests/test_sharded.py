"""What this rank has of a tensor, filled as if it were whole; tests/train/test_init.py fills models on real ranks."""

import pytest
import torch

from nanovlm.sharded import Rows


@pytest.fixture(params=[(0, 3), (3, 6), (6, 7), (7, 7)], ids=str)
def rows(request):
    """The parts of 7 rows on 4 ranks, of which the last has none."""
    first, end = request.param
    return Rows(torch.zeros(end - first, 2, 3), (7, 2, 3), first)


def test_a_copy_of_the_whole_leaves_this_ranks_rows(rows):
    whole = torch.randn(7, 2, 3)
    rows.copy_(whole)
    assert torch.equal(rows.local, whole[rows.start : rows.start + len(rows.local)])
    assert rows.equal(whole) and not rows.equal(whole[:6])
    assert rows.equal(whole + 1) == (len(rows.local) == 0)


@pytest.mark.parametrize("cut", [slice(0, 4), slice(4, 7), slice(2, 2), slice(None), slice(0, 0)])
def test_some_rows_are_filled_alone(rows, cut):
    whole, expected = torch.randn(7, 2, 3), torch.zeros(7, 2, 3)
    expected[cut] = whole[cut]
    part = rows[cut]
    assert part.shape == whole[cut].shape and part.ndim == 3
    part.copy_(whole[cut])
    assert rows.equal(expected)


def test_rows_one_by_one_or_under_one_more_dimension(rows):
    whole = torch.randn(7, 2, 3)
    for row, values in zip(rows, whole, strict=True):
        assert row.shape == values.shape
        row.copy_(values)
    assert rows.equal(whole)
    more = rows[None]
    assert more.shape == (1, 7, 2, 3)
    more.copy_(whole[None] + 1)
    assert rows.equal(whole + 1)
