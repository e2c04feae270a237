"""Whole runs of PPO: rewards go up, the value head survives kills bit for bit and is not published."""

import dataclasses
import itertools

import pytest
import torch

import nanovlm
from nanovlm.config import GroupConfig
from nanovlm.objectives.rewards import REWARDS
from nanovlm.tensor_files import read_tensors
from tests.test_distributed import finish, start
from tests.test_train import SMALL, comparable, metrics, run, run_and_kill
from tests.train import test_rollout_runs
from tests.train.test_rollout_runs import KILL_AT_STEP, KILL_IN_ROLLOUT

pytestmark = pytest.mark.usefixtures("one_thread")
GROUP = dataclasses.replace(test_rollout_runs.GROUP, num_generations=1)
CHANGES = test_rollout_runs.CHANGES | {"objective": "ppo", "group": GROUP}
AS_PPO = """
from tests.train.test_ppo_runs import CHANGES
run_one = run
def run(d): run_one(d, **CHANGES)
"""


def value_head(run_dir, step):
    return read_tensors(run_dir / "checkpoints" / f"step_{step:08d}" / "rng.safetensors")["objective.value_head"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder, **CHANGES)
    return folder


def test_a_run_tells_of_its_values(unbroken):
    """The first step of two on the same answers moves no ratio and no value; the head learns, and is not published."""
    lines = metrics(unbroken)
    assert [line["step"] for line in lines if "explained_variance" in line] == [1, 3, 5]
    assert lines[0]["explained_variance"] == 0  # of values that are 0
    assert all(line["clip_fraction"] == line["value_clip_fraction"] == 0 for line in lines[::2])
    assert all(after["value_loss"] != before["value_loss"] for before, after in itertools.pairwise(lines))
    assert value_head(unbroken, 6).any() and not torch.equal(value_head(unbroken, 6), value_head(unbroken, 3))
    model, _ = nanovlm.load(unbroken / "model")
    assert not any("value" in name or "score" in name for name in model.state_dict())


# Checkpoints are of steps 0, 3 and 6: that of 3 is between two steps on the same answers.
@pytest.mark.parametrize(
    "hook",
    [
        pytest.param(KILL_IN_ROLLOUT.format(rollout=3, late=2), id="in a rollout"),
        pytest.param(KILL_AT_STEP.format(4), id="in a step on answers that were saved"),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, unbroken, hook):
    run_and_kill(tmp_path, hook + AS_PPO)
    run(tmp_path, **CHANGES)
    assert comparable(metrics(tmp_path)) == comparable(metrics(unbroken))
    assert torch.equal(value_head(tmp_path, 6), value_head(unbroken, 6))


RANKS = """__import__("tests.train.test_ppo_runs").train.test_ppo_runs.CHANGES | {"parallel": ParallelConfig()}"""


def test_two_ranks_whiten_together_and_learn_one_value_head(tmp_path):
    """Their first step is that of one rank with both micro-batches, and with it the second, on the same answers."""
    finish(start(tmp_path, tmp_path / "two", changes=RANKS))
    run(tmp_path / "one", **CHANGES | {"precision": "fp32"})
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in two] == list(range(1, 7))
    names = ("value_loss", "entropy", "loss", "grad_norm", "sampler_kl")
    for step, told in enumerate((("reward", "explained_variance", *names), names)):
        for name in told:
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-3, abs=1e-5), (step, name)


def test_rewards_go_up(tmp_path, monkeypatch):
    """From random weights, for a reward of the test's own: the share of vowels. It went from 0.21 to 0.44 and more."""
    monkeypatch.setitem(
        REWARDS, "vowels", lambda question, answer: sum(c in "aeiou" for c in answer) / (len(answer) or 1)
    )
    group = GroupConfig(num_generations=8, max_completion_length=4, num_questions=8, rewards=("vowels=1",))
    optim = dataclasses.replace(SMALL.optim, steps=40, lr=1e-2)
    run(tmp_path, **CHANGES | {"group": group, "optim": optim, "precision": "fp32", "checkpoint_every": 100})
    rewards = [line["reward"] for line in metrics(tmp_path)]
    assert sum(rewards[-8:]) > 1.5 * sum(rewards[:8]), rewards
