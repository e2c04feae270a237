"""Runs that learn from pairs: they learn, are looked at, and go on bit for bit when killed, on one rank and on two."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch

import nanovlm
import train
from nanovlm.config import (
    AdapterConfig,
    DataConfig,
    EvalConfig,
    InitConfig,
    OptimConfig,
    PreferenceConfig,
    TrainConfig,
)
from nanovlm.data.scenes import Scenes
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from tests.conftest import TINY
from tests.test_distributed import ROOT, finish, torchrun
from tests.test_train import KILL_AT_STEP, KILL_IN_SAVE, comparable, metrics
from tests.train.killing import read_deaths

COLORS = ("red", "blue", "green", "yellow")


def make_config(folder, **changes):
    config = TrainConfig(
        model=TINY,
        run_dir=str(folder / "run"),
        init=InitConfig(model=str(folder.parent / "start")),
        data=DataConfig(
            sources=(str(folder.parent / "pairs.jsonl"),), row_length=128, batch_rows=1, pack_buffer=4, val_fraction=0.3
        ),
        optim=OptimConfig(lr=3e-3, steps=6, warmup_steps=1, micro_batches=2),
        eval=EvalConfig(every=3, limit=2, controls=False, show_every=0),
        objective="preference",
        preference=PreferenceConfig(losses=("mpo",), beta=0.5),
        checkpoint_every=2,
        threads=1,
        precision="fp32",
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    """A model to start from and twenty pairs, each with a picture of its own, beside a folder for each run."""
    folder = tmp_path_factory.mktemp("pairs")
    save_model(folder / "start", VLM(TINY), processor)
    lines = []
    for number in range(20):
        Scenes("train").read(number)["images"][0].resize((16, 16)).save(folder / f"{number}.png")
        right, wrong = COLORS[number % 4], COLORS[(number + 1) % 4]
        pair = {"prompt": "what color is it?", "chosen": f"a {right} one", "rejected": wrong}
        lines.append(json.dumps({"image": f"{number}.png"} | pair) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


def run_whole(folder, name, **changes):
    (folder / name).mkdir()
    results = train.main(make_config(folder / name, **changes))
    return results, metrics(folder / name / "run")


@pytest.fixture(scope="module")
def unbroken(folder):
    return run_whole(folder, "unbroken")


def test_a_run_learns_pairs_and_is_asked_about_what_is_held_out(unbroken):
    """The validation loss is that of pairs, and held-out prompts are asked with the chosen answer as what is right."""
    _results, lines = unbroken
    assert lines[0]["kl"] == 0 and lines[0]["margin"] == 0 and lines[0]["loss_dpo"] == pytest.approx(0.693147)
    assert lines[0]["loss"] == pytest.approx(
        0.8 * lines[0]["loss_dpo"] + 0.2 * lines[0]["loss_bco"] + lines[0]["loss_sft"], rel=1e-5
    )
    assert lines[-1]["kl"] > 0 and lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert all("accuracy_held_out" in line and line["val_loss"] > 0 for line in lines if line["step"] % 3 == 0)
    assert "rewards_chosen" in lines[0] and "logps_rejected" in lines[0] and "length_chosen" in lines[0]


@pytest.mark.parametrize("hook", [KILL_AT_STEP.format(3), KILL_IN_SAVE.format(3, 2)], ids=["in a step", "in a save"])
def test_a_killed_run_goes_on_bit_for_bit(folder, unbroken, hook, request):
    mine = folder / request.node.callspec.id.replace(" ", "_")
    mine.mkdir()
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import train
from tests.objectives.test_pair_runs import make_config
def die(): os.kill(os.getpid(), signal.SIGKILL)
{hook}
train.main(make_config(Path({str(mine)!r})))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert len(metrics(mine / "run")) < 6
    train.main(make_config(mine))
    assert comparable(metrics(mine / "run")) == comparable(unbroken[1])


RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.train.killing import die_by_plan
die_by_plan({plan}, {folder!r})
import train
from nanovlm import cli
from nanovlm.config import ParallelConfig
from tests.objectives.test_pair_runs import make_config
cli.run(lambda: train.main(make_config(Path({folder!r}), parallel=ParallelConfig(strategy={strategy!r}))))
cli.end(0)
"""


def run_ranks(folder, strategy, plan=()):
    """Let two ranks run, which end by a plan and are started again."""
    mine = folder / f"{strategy}_{len(plan)}"
    mine.mkdir()
    (mine / "run.py").write_text(RANKS.format(root=str(ROOT), folder=str(mine), strategy=strategy, plan=plan))
    finish(torchrun(mine / "run.py", restarts=len(plan)))
    return mine


# Checkpoints are of steps 0, 2, 4 and 6.
@pytest.mark.parametrize(
    ("strategy", "plan", "begun"),
    [("ddp", [(1, "step", 3)], [0, 2]), ("fsdp", [(0, "save", 2), (1, "step", 3)], [0, 0, 2])],
    ids=["ddp", "fsdp"],
)
def test_two_ranks_learn_what_one_does_and_survive_kills(folder, unbroken, strategy, plan, begun):
    lines = metrics(run_ranks(folder, strategy) / "run")
    for one, two in zip(unbroken[1], lines, strict=True):
        for name in (
            "loss",
            "loss_bco",
            "margin",
            "kl",
            "length_chosen",
            *(["val_loss"] if one["step"] % 3 == 0 else []),
        ):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name
    killed = run_ranks(folder, strategy, plan)
    assert read_deaths(killed) == (begun, [f"{moment} {step}" for _rank, moment, step in plan])
    assert comparable(metrics(killed / "run")) == comparable(lines)


def test_adapters_learn_pairs_without_a_second_model(folder, monkeypatch):
    monkeypatch.setattr("nanovlm.objectives.reference.load", lambda *args: pytest.fail("reads a frozen copy"))
    _results, lines = run_whole(folder, "adapters", adapter=AdapterConfig(rank=4))
    assert lines[0]["kl"] == 0 and lines[0]["margin"] == 0 and lines[0]["loss_dpo"] == pytest.approx(0.693147)
    assert lines[-1]["kl"] > 0 and lines[-1]["loss_dpo"] < 0.69


def test_records_that_are_no_pairs_are_told(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "what?", "answer": "red"}\n' * 30)
    config = make_config(folder / "none", run_dir=str(tmp_path / "run"))
    data = dataclasses.replace(config.data, sources=(str(tmp_path / "a.jsonl"),), val_fraction=0.0)
    with pytest.raises(UserError, match="the record is no pair, which the objective learns from"):
        train.main(dataclasses.replace(config, data=data, eval=EvalConfig()))


def test_a_run_whose_reference_has_changed_does_not_go_on(folder, unbroken, processor):
    """It is read again by its name, and its weights are those that the run began with, or the run is not continued."""
    shutil.copytree(folder / "unbroken", folder / "changed")
    (folder / "changed" / "run" / "eval.json").unlink()
    (folder / "start").rename(folder / "kept")
    torch.manual_seed(1)
    save_model(folder / "start", VLM(TINY), processor)
    with pytest.raises(UserError, match=r"reference of this run has other weights than when .*step_00000006 was"):
        train.main(make_config(folder / "changed"))
    shutil.rmtree(folder / "start")
    (folder / "kept").rename(folder / "start")
    train.main(make_config(folder / "changed"))


def test_a_run_of_pairs_can_be_loaded(folder, unbroken):
    nanovlm.load(folder / "unbroken" / "run" / "model")
