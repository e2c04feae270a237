"""A run that mixes shards with drawn scenes goes on as if it had not been stopped, and tells of each source."""

import dataclasses

import pytest

import train
from nanovlm.config import EvalConfig
from nanovlm.data import shards
from tests.test_train import SMALL, metrics


def test_a_run_over_shards_goes_on_bit_for_bit(tmp_path, monkeypatch):
    shards.main(["write", "scenes", str(tmp_path / "shards"), "--num", "60", "--max-samples", "9"])
    names = (str(tmp_path / "shards"), "scenes")
    data = dataclasses.replace(SMALL.data, sources=names, lessons=(), weights=(1, 1), shard_window=3, shuffle=True)
    optim, step = dataclasses.replace(SMALL.optim, steps=3), train.train_step

    def run(folder):
        config = dataclasses.replace(SMALL, run_dir=str(tmp_path / folder), data=data, optim=optim, eval=EvalConfig())
        train.main(dataclasses.replace(config, checkpoint_every=2))
        seconds = ("_s", "_per_second")
        return [
            {name: x for name, x in line.items() if not name.endswith(seconds)} for line in metrics(tmp_path / folder)
        ]

    def stop(state, *args):
        if state.step == 2:
            raise RuntimeError("stopped")
        return step(state, *args)

    monkeypatch.setattr(train, "draw_curves", lambda _path: b"")  # a third of the time of so short a run
    monkeypatch.setattr(train, "train_step", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        run("cut")
    monkeypatch.setattr(train, "train_step", step)
    whole = run("whole")
    assert run("cut") == whole and len(whole) == 3
    for line in whole:
        losses = [line[f"loss_of_{name}"] for name in names]
        assert min(losses) <= line["loss"] <= max(losses)
        assert sum(line[f"documents_of_{name}"] for name in names) == line["documents"]
