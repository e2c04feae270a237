"""Search over mapped vectors finds what a product in fp64 finds."""

import numpy as np
import pytest
import torch

from nanovlm.search import vectors
from nanovlm.search.vectors import open_vectors, search


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("num", [1, 7, 1024, 2500])
def test_the_largest_products_are_found_in_order(tmp_path, monkeypatch, dtype, num):
    monkeypatch.setattr(vectors, "SCORES", 3 * num)  # three queries at a time
    generator = np.random.default_rng(0)
    stored = generator.standard_normal((num, 24)).astype(dtype)
    np.save(tmp_path / "vectors.npy", stored)
    queries = torch.from_numpy(generator.standard_normal((7, 24)).astype(np.float32))
    scores, rows = search(open_vectors(tmp_path / "vectors.npy"), queries, 10)
    truth = queries.double() @ torch.from_numpy(stored).double().T
    expected = truth.sort(descending=True)
    assert rows.shape == scores.shape == (7, min(10, num))
    assert torch.equal(rows, expected.indices[:, :10])
    torch.testing.assert_close(scores.double(), expected.values[:, :10], atol=1e-5, rtol=1e-5)


def test_a_search_holds_a_block_and_not_the_vectors(tmp_path):
    np.save(tmp_path / "vectors.npy", np.ones((20 * vectors.BLOCK, 64), np.float16))
    mapped = open_vectors(tmp_path / "vectors.npy")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        search(mapped, torch.ones(1, 64), 1)
    taken = [event.self_cpu_memory_usage for event in profile.events()]
    assert max(taken) == 4 * 64 * vectors.BLOCK  # the block; scores take less
