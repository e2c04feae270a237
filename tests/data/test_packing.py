"""Packing keeps documents whole, once each, and apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.data.packing import make_row, pack
from nanovlm.data.types import IGNORE, Document


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_document_once_and_no_row_too_full(data):
    row_length = data.draw(st.integers(1, 60))
    lengths = data.draw(st.lists(st.integers(1, row_length), max_size=60))
    rows = pack(lengths, row_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert sum(lengths[i] for i in row) <= row_length
    assert rows == pack(lengths, row_length)


def test_rows_are_full():
    lengths = torch.randint(10, 100, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack(lengths, 256)
    assert sum(lengths) / (len(rows) * 256) > 0.98


def test_too_long_is_named():
    with pytest.raises(ValueError, match="document 1 has 9 tokens, more than row_length = 8"):
        pack([8, 9], 8)


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
