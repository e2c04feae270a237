"""Pairs written with the log-probabilities of a model are what a run computes beside it."""

import json
import subprocess
import sys

import pytest
import torch

from nanovlm.config import DataConfig
from nanovlm.data.process import make_process
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from nanovlm.objectives.logprobs import batch_logprobs, find_branches
from nanovlm.objectives.precompute import PrecomputeConfig, write_pairs
from tests.conftest import TINY, make_batch, noise
from tests.test_distributed import ROOT

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
    config = PrecomputeConfig(str(tmp_path / "model"), str(tmp_path / "pairs.jsonl"), out, num_rows=2, device="cpu")
    assert write_pairs(config) == (3, 1)
    assert "left out 1 records, such as " in (said := capsys.readouterr().out) and "the record is no pair" in said
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
    config = PrecomputeConfig(str(tmp_path / "model"), str(tmp_path / "long.jsonl"), tmp_path / "o.jsonl", device="cpu")
    assert write_pairs(config) == (1, 1)
    assert f"more than the model's {TINY.decoder.max_position_embeddings} positions" in capsys.readouterr().out


def test_a_killed_command_leaves_no_file_that_looks_whole(model, tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from nanovlm.objectives import precompute
write = precompute.rewrite
def rewrite(raw, options):
    if raw.get("images"): os.kill(os.getpid(), signal.SIGKILL)
    return write(raw, options)
precompute.rewrite = rewrite
names = [{str(tmp_path)!r} + "/" + name for name in ("model", "pairs.jsonl", "out.jsonl")]
precompute.write_pairs(precompute.PrecomputeConfig(*names[:2], Path(names[2]), num_rows=1))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("source", "out", "sentence"),
    [
        ("pairs.jsonl", "model", "must be the name of a new .jsonl file"),
        ("pairs.jsonl", "pairs.jsonl", "must be the name of a new .jsonl file"),
        ("none.jsonl", "out.jsonl", r"no record of .* is a pair that can be read: .*sample 0: the record is no pair"),
    ],
)
def test_what_cannot_be_written_is_told(model, tmp_path, source, out, sentence):
    (tmp_path / "none.jsonl").write_text('{"question": "what?", "answer": "red"}\n')
    with pytest.raises(UserError, match=sentence):
        write_pairs(PrecomputeConfig(str(tmp_path / "model"), str(tmp_path / source), tmp_path / out, device="cpu"))
    assert not (tmp_path / "out.jsonl").exists() and not list(tmp_path.glob(".*.tmp"))
