"""Packing keeps documents whole, once each, and apart."""

import statistics
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.data.packing import _exchange_tiles, document_cost, make_row, pack
from nanovlm.data.packing_baselines import (
    STRATEGIES,
    balanced_knapsack,
    constrained_padding,
    greedy_knapsack,
    in_pools,
    naive_packing,
    naive_padding,
    ours,
)
from nanovlm.data.types import IGNORE, Document


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_document_once_and_no_row_too_full(data):
    row_length, most = data.draw(st.integers(1, 60)), data.draw(st.integers(0, 7))
    lengths = data.draw(st.lists(st.integers(1, row_length), max_size=60))
    tiles = [data.draw(st.integers(0, most)) for _ in lengths]
    for max_tiles in (None, most):
        least = max(-(-sum(lengths) // row_length), -(-sum(tiles) // most) if max_tiles else 0)
        for strategy in (ours, naive_packing, greedy_knapsack, balanced_knapsack):
            rows, widths = strategy(lengths, tiles, row_length, max_tiles)
            assert widths == [row_length] * len(rows)
            assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
            assert len(rows) >= least and all(rows)
            for row in rows:
                assert sum(lengths[i] for i in row) <= row_length
                assert max_tiles is None or sum(tiles[i] for i in row) <= max_tiles
            assert (rows, widths) == strategy(lengths, tiles, row_length, max_tiles)


@pytest.fixture(scope="module")
def ten_thousand():
    """Log-normal lengths (median 400, sigma 0.9, 16 to 2048 tokens) with 1 to 4 tiles."""
    rng = np.random.default_rng(0)
    return rng.lognormal(np.log(400), 0.9, 10_000).clip(16, 2048).astype(int).tolist(), rng.integers(
        1, 5, 10_000
    ).tolist()


def spread(rows, lengths, tiles):
    return statistics.pstdev(sum(document_cost(lengths[i], tiles[i]) for i in row) for row in rows)


@pytest.mark.parametrize(("max_tiles", "most_padding", "share"), [(None, 0.001, 0.5), (18, 0.01, 0.6)])
def test_rows_are_full_and_alike(ten_thousand, max_tiles, most_padding, share):
    """With 18 tiles no packing of these documents could be below 0.504: 364 of them fill a row alone."""
    lengths, tiles = ten_thousand
    rows = pack(lengths, tiles, 2048, max_tiles)
    assert 1 - sum(lengths) / (2048 * len(rows)) <= most_padding
    simple = greedy_knapsack(lengths, tiles, 2048, max_tiles).rows
    assert spread(rows, lengths, tiles) <= share * spread(simple, lengths, tiles)
    assert len(rows) <= len(simple)


def test_twice_as_many_documents_take_hardly_more_than_twice_as_long(ten_thousand):
    """Count steps, not seconds: what Python executes for n and for 4 n documents."""
    lengths, tiles = ten_thousand

    def steps(n):
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            pack(lengths[:n], tiles[:n], 2048, 18)
        finally:
            sys.settrace(before)
        return count

    assert steps(2000) < 6 * steps(500)
    lengths, tiles = [640] * 2000, [10] * 2000  # one tile too many for two in a row
    assert steps(2000) < 6 * steps(500)


def test_documents_of_one_length_change_places_until_rows_are_alike():
    """The row whose long document has many tiles gets the short one without any."""
    rows = _exchange_tiles([[0, 2], [1, 3]], [90, 90, 10, 10], [5, 0, 4, 0], 100)
    assert [[{90: "long", 10: "short"}[(90, 90, 10, 10)[i]] for i in row] for row in rows] == [["long", "short"]] * 2
    assert sorted(sum((5, 0, 4, 0)[i] for i in row) for row in rows) == [4, 5]
    full = [[0, 2], [1, 3]]
    assert _exchange_tiles([[0, 2], [1, 3]], [90, 80, 10, 10], [5, 0, 0, 4], 4) == full  # would be above the limit


def test_a_document_that_fits_no_row_is_named():
    with pytest.raises(ValueError, match="document 1 has 9 tokens, more than row_length = 8"):
        pack([8, 9], [0, 0], 8)
    with pytest.raises(ValueError, match="document 0 has 3 tiles, more than max_tiles = 2"):
        pack([8, 7], [3, 0], 8, 2)
    assert pack([], [], 8) == [] == pack([], [], 8, 2)


def test_strategies_pack_by_their_definitions():
    """A small example, worked out by hand: rows of 10 tokens, at most 3 tiles where there is a limit."""
    lengths, tiles = [3, 9, 4, 5, 2, 6], [1, 0, 2, 1, 2, 1]
    alone = [[0], [1], [2], [3], [4], [5]]
    assert naive_padding(lengths, tiles, 10, batch_rows=4) == (alone, [9, 9, 9, 9, 6, 6])
    assert constrained_padding(lengths, tiles, 10) == ([[0], [2], [3], [4]], [5, 5, 5, 5])
    assert constrained_padding(lengths, tiles, 10, cap=6).rows == [[0], [2], [3], [4], [5]]
    assert naive_packing(lengths, tiles, 10).rows == [[0], [1], [2, 3], [4, 5]]
    assert naive_packing(lengths, tiles, 10, 2).rows == [[0], [1], [2], [3], [4], [5]]
    # Longest first: 9, 6, 5, 4, 3, 2. First fit puts 4 beside 6, then 3 and 2 beside 5.
    assert greedy_knapsack(lengths, tiles, 10).rows == [[1], [5, 2], [3, 0, 4]]
    assert greedy_knapsack(lengths, tiles, 10, 3).rows == [[1], [5, 2], [3, 0], [4]]
    # 29 tokens fill three rows: 9 | 6 | 5, then 4 to the emptiest, 5; 3 to 6; 2 fits nowhere, as all have 9.
    assert balanced_knapsack(lengths, tiles, 10).rows == [[1], [5, 0], [3, 2], [4]]
    # With three more, a row each.
    assert balanced_knapsack(lengths, tiles, 10, delta=3).rows == [[1], [5], [3], [2], [0], [4]]
    assert balanced_knapsack(lengths, tiles, 10, delta=9).rows == [[1], [5], [3], [2], [0], [4]]  # empty ones dropped
    # Of two tiles a row: 4 would make 3 beside 5 or 6, so it comes last to an additional row; 3 to 5; then 2 to none.
    assert balanced_knapsack(lengths, tiles, 10, 2).rows == [[1], [5], [3, 0], [2], [4]]
    shuffled = balanced_knapsack(lengths, tiles, 10, delta=3, seed=0).rows
    assert sorted(shuffled) == sorted([[1], [5], [3], [2], [0], [4]]) and shuffled != [[1], [5], [3], [2], [0], [4]]
    assert in_pools(naive_padding, 4, lengths, tiles, 10) == (alone, [9, 9, 9, 9, 6, 6])
    assert in_pools(greedy_knapsack, 2, lengths, tiles, 10).rows == [[1], [0], [3, 2], [5, 4]]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_balanced_knapsack_is_that_of_its_paper(data):
    """Against its definition, row by row: every document looks at all rows from the emptiest on."""
    lengths = data.draw(st.lists(st.integers(1, 30), max_size=40))
    tiles, delta = [data.draw(st.integers(0, 4)) for _ in lengths], data.draw(st.integers(0, 4))
    for most in (None, 6):
        rows = [[] for _ in range(-(-sum(lengths) // 30) + delta)]

        def load(row):
            return sum(lengths[i] for i in row)

        def holds(row, i, most=most):
            return load(row) + lengths[i] <= 30 and (most is None or sum(tiles[j] for j in [*row, i]) <= most)

        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            row = next((row for row in sorted(rows, key=load) if holds(row, i)), None)
            if row is None:
                rows.append(row := [])
            row.append(i)
        assert balanced_knapsack(lengths, tiles, 30, most, delta).rows == [row for row in rows if row]


def test_every_strategy_loses_none_but_the_one_that_discards(ten_thousand):
    lengths, tiles = (numbers[:500] for numbers in ten_thousand)
    for name, strategy in STRATEGIES.items():
        rows, widths = in_pools(strategy, 50, lengths, tiles, 2048, 18)
        kept = [i for i in range(500) if name != "constrained padding" or lengths[i] <= 1024]
        assert sorted(i for row in rows for i in row) == kept and len(kept) in (500, sum(n <= 1024 for n in lengths))
        assert all(sum(lengths[i] for i in row) <= width for row, width in zip(rows, widths, strict=True))


def document(length, branch_ids=None):
    ids = torch.arange(1, length + 1)
    branch_ids = torch.tensor(branch_ids or [0] * length, dtype=torch.int32)
    return Document(ids, ids + 1, branch_ids, torch.full((1, 3, 2, 2), length, dtype=torch.uint8))


def test_row_layout():
    row = make_row([document(3), document(6, [0, 0, 1, 1, 2, 2])], 11, pad_token_id=0)
    assert row.input_ids.tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 6, 0, 0]
    assert row.labels.tolist() == [2, 3, 4, 2, 3, 4, 5, 6, 7, IGNORE, IGNORE]
    assert row.doc_ids.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, -1, -1]
    assert row.branch_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 0, 0]
    # Positions restart with the document; each branch goes on from the end of the prefix.
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 2, 3, 0, 0]
    assert row.tiles[:, 0, 0, 0].tolist() == [3, 6]
