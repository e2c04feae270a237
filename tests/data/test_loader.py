"""The loader shows every document once, and goes on exactly where it was."""

import pytest
import torch

from nanovlm.config import DataConfig
from nanovlm.data.images import normalize
from nanovlm.data.loader import Loader, collate
from nanovlm.data.packing import make_row
from nanovlm.data.types import Document


def numbered(i):
    """Document i: its length is pseudo-random, all its tokens are i."""
    length = 5 + (i * 7919) % 23
    ids = torch.full((length,), i)
    return Document(
        ids, ids, torch.zeros(length, dtype=torch.int32), torch.full((1, 1, 1, 1), i % 251, dtype=torch.uint8)
    )


def make_loader(length=10**6, buffer_size=20, batch_rows=3, row_length=64, shuffle=True, seed=0):
    config = DataConfig(row_length=row_length, batch_rows=batch_rows, pack_buffer=buffer_size, shuffle=shuffle)
    return Loader(range(length), numbered, config, pad_token_id=-5, seed=seed)


def test_every_document_once():
    loader = make_loader()
    seen = []
    for _ in range(50):
        batch = next(loader)
        assert batch.input_ids.shape == (3, 64)
        for doc in range(int(batch.doc_ids.max()) + 1):
            tokens = batch.input_ids[batch.doc_ids == doc]
            assert len(tokens.unique()) == 1 and len(tokens) == len(numbered(int(tokens[0])))
            assert batch.pixel_values[doc] == normalize(tokens[0] % 251)
            seen.append(int(tokens[0]))
    assert len(set(seen)) == len(seen)
    waiting = [int(document.input_ids[0]) for document in loader.buffer.values()]
    assert len(seen) + len(waiting) == loader.next_index == len({*seen, *waiting})
    assert min(loader.buffer) > loader.next_index - 80  # nothing waits for ever


def test_goes_on_where_it_was():
    loader = make_loader()
    for _ in range(7):
        next(loader)
    state = loader.state_dict()
    expected = [next(loader) for _ in range(5)]
    resumed = make_loader()
    resumed.load_state_dict(state)
    for batch in expected:
        again = next(resumed)
        assert all(torch.equal(x, y) for x, y in zip(vars(batch).values(), vars(again).values(), strict=True))


def contents(loader, num_documents):
    """The first documents that a loader reads, in its order."""
    while loader.next_index < num_documents:
        next(loader)
    return [int(loader._order(i // len(loader.source))[i % len(loader.source)]) for i in range(num_documents)]


def test_every_pass_shows_everything_in_another_order():
    order = contents(make_loader(length=40), 120)
    passes = [order[i : i + 40] for i in (0, 40, 80)]
    assert all(sorted(one) == list(range(40)) for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert contents(make_loader(length=40, seed=1), 40) != passes[0]


def test_a_curriculum_keeps_its_order():
    assert contents(make_loader(length=40, shuffle=False), 120) == 3 * [*range(40)]


def test_it_knows_what_it_has_read():
    for shuffle in (False, True):
        loader = make_loader(length=40, shuffle=shuffle)
        batch = next(loader)
        seen = set(batch.input_ids.unique().tolist()) - {-5}
        waiting = {int(document.input_ids[0]) for document in loader.buffer.values()}
        assert set(loader.places_read()) == seen | waiting and loader.next_index < 40
        contents(loader, 100)
        assert sorted(loader.places_read()) == [*range(40)]


def test_a_large_batch_of_a_small_source():
    batch = next(make_loader(length=4, buffer_size=2, batch_rows=6))
    assert set(batch.input_ids.unique().tolist()) == {0, 1, 2, 3, -5}


def test_too_long_a_sample_is_named():
    with pytest.raises(ValueError, match=r"sample \d+ has \d+ tokens, more than data.row_length = 8"):
        next(make_loader(row_length=8))


def test_documents_are_numbered_through():
    rows = [make_row([numbered(0), numbered(1)], 40, 0), make_row([numbered(2)], 40, 0)]
    doc_ids = collate(rows).doc_ids
    assert doc_ids[0].unique().tolist() == [-1, 0, 1] and doc_ids[1].unique().tolist() == [-1, 2]
