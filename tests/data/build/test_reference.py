"""Pairs written with the log-probabilities of a model are what a run computes beside it."""

import json

import pytest
import torch

from nanovlm.config import DataConfig
from nanovlm.data.build.reference import ReferenceConfig
from nanovlm.data.build.reference import main as write_pairs
from nanovlm.data.process import make_process
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from nanovlm.objectives.logprobs import batch_logprobs, find_branches
from tests.conftest import TINY, make_batch, noise

PAIRS = [
    {"image": "a.png", "question": "<image>what is it?", "chosen": "red", "rejected": "a blue one", "idx": 7},
    {"image": "a.png", "question": "no pair", "answer": "red"},
    {"prompt": [{"role": "user", "content": "1 + 1?"}], "chosen": "2", "rejected": "three", "system": "be brief"},
    {"images": ["a.png", "b.png"], "question": "same: <image>, <image>?", "chosen": "no", "rejected": "yes"},
]


@pytest.fixture
def model(tmp_path, processor):
    torch.manual_seed(0)
    model = VLM(TINY).eval()
    save_model(tmp_path / "model", model, processor)
    for name in "ab":
        noise(ord(name), 20).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return model


def test_pairs_are_written_with_their_log_probabilities(model, tmp_path, processor, capsys):
    """With their pictures, so that they read from another folder as before."""
    out = tmp_path / "elsewhere" / "out.jsonl"
    out.parent.mkdir()
    options = dict(num_rows=2, device="cpu", max_bad_fraction=0.5)
    write_pairs(ReferenceConfig(str(tmp_path / "model"), str(tmp_path / "pairs.jsonl"), out, **options))
    said = capsys.readouterr().out
    assert "out.jsonl: 3 of 4 records" in said and "sample 1: the record is no pair" in said
    process = make_process(processor, DataConfig(), learns_from="pairs")
    before, after = (open_source(str(path)) for path in (tmp_path / "pairs.jsonl", out))
    expected, found = [process(before.read(i)) for i in (0, 2, 3)], [process(after.read(i)) for i in range(3)]
    for one, two in zip(expected, found, strict=True):
        assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.labels, two.labels)
        assert torch.equal(one.branch_ids, two.branch_ids) and torch.equal(one.tiles, two.tiles)
    batch = make_batch(found)
    sums = find_branches(batch).sum(batch.value("ref_logprobs"))
    torch.testing.assert_close(sums, find_branches(batch).sum(batch_logprobs(model, batch)), rtol=1e-5, atol=1e-5)


def test_what_the_model_cannot_read_is_left_out(model, tmp_path, capsys):
    """A model computes something beyond its last position, but not what it has learned."""
    long = {"prompt": "what " * TINY.decoder.max_position_embeddings, "chosen": "a", "rejected": "b"}
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in (PAIRS[2], long)))
    names = str(tmp_path / "model"), str(tmp_path / "long.jsonl"), tmp_path / "o.jsonl"
    write_pairs(ReferenceConfig(*names, device="cpu", max_bad_fraction=0.5))
    assert f"more than the model's {TINY.decoder.max_position_embeddings} positions" in capsys.readouterr().out


def test_a_source_without_pairs_is_told(model, tmp_path, capsys):
    (tmp_path / "none.jsonl").write_text('{"question": "what?", "answer": "red"}\n')
    with pytest.raises(UserError, match=r"1 of 1 records are unusable"):
        write_pairs(
            ReferenceConfig(str(tmp_path / "model"), str(tmp_path / "none.jsonl"), tmp_path / "o.jsonl", device="cpu")
        )
    assert "sample 0: the record is no pair, which the objective learns from" in capsys.readouterr().out
