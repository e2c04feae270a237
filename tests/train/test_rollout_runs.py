"""Whole runs on the model's own answers: they learn, and survive kills bit for bit."""

import dataclasses
import json
import random
import re

import pytest

from nanovlm.config import EvalConfig, GroupConfig, PreferenceConfig
from nanovlm.objectives.rewards import REWARDS
from tests.test_distributed import ROOT, finish, torchrun
from tests.test_train import KILL_IN_SAVE, SMALL, comparable, metrics, run, run_and_kill
from tests.train.killing import read_deaths

# Answers that seldom end by themselves, and two steps on each set of them.
GROUP = GroupConfig(
    num_generations=3, max_completion_length=5, num_questions=4, num_iterations=2, rewards=("length=1", "contains=1")
)
CHANGES = dict(
    objective="group", group=GROUP, eval=EvalConfig(), optim=dataclasses.replace(SMALL.optim, steps=6, micro_batches=2)
)

AS_GROUP = """
from tests.train.test_rollout_runs import CHANGES
run_one = run
def run(d): run_one(d, **CHANGES)
"""
KILL_IN_ROLLOUT = """
from nanovlm.train import rollouts
from nanovlm.infer.engine import Engine
step, calls = Engine.step, []
def step_or_die(self):
    calls.append(self)
    if len(set(map(id, calls))) == {rollout} and len(calls) > {late}: die()
    return step(self)
Engine.step = step_or_die
"""
KILL_AT_STEP = """
step = train.train_step
def train_step(state, *args):
    numbers = step(state, *args)
    if state.step == {}: die()  # before it is told or saved
    return numbers
train.train_step = train_step
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder, **CHANGES)
    return metrics(folder)


def test_a_run_tells_of_its_answers(unbroken):
    """Every other step samples, and then nothing is clipped and both sides agree."""
    assert [line["step"] for line in unbroken if "reward" in line] == [1, 3, 5]
    told = unbroken[0]
    assert told["reward"] == pytest.approx(told["reward_length"] + told["reward_contains"])
    assert all(line["clip_fraction"] == 0 and line["sampler_kl"] < 1e-3 for line in unbroken[::2])
    assert any(line["sampler_gap"] > 10 * unbroken[0]["sampler_gap"] for line in unbroken[1::2])


def test_several_steps_on_the_same_answers_make_a_pass_longer(tmp_path, capsys):
    """The rate falls as for all of them."""
    records = [{"question": "what is it?", "answer": "red"}] * 40
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = dataclasses.replace(SMALL.data, sources=(str(tmp_path / "few.jsonl"),), num_epochs=1, lessons=())
    data = dataclasses.replace(data, row_length=64, pack_buffer=40)
    run(tmp_path / "run", **CHANGES | {"data": data, "optim": dataclasses.replace(SMALL.optim, steps=99)})
    told = re.search(r"num_epochs = 1 gives about (\d+) steps", capsys.readouterr().out)
    assert int(told[1]) / 2 < metrics(tmp_path / "run")[-1]["step"] < int(told[1]) * 2


# Checkpoints are of steps 0, 3 and 6: that of 3 is between two steps on the same answers.
@pytest.mark.parametrize(
    "hook",
    [
        pytest.param(KILL_IN_ROLLOUT.format(rollout=3, late=2), id="in a rollout"),
        pytest.param(KILL_AT_STEP.format(4), id="in a step on answers that were saved"),
        pytest.param(KILL_IN_SAVE.format(2, random.uniform(0, 10)), id="in the middle of a save"),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, unbroken, hook):
    print(hook)
    run_and_kill(tmp_path, hook + AS_GROUP)
    run(tmp_path, **CHANGES)
    assert comparable(metrics(tmp_path)) == comparable(unbroken)


# Checkpoints are of steps 0, 3 and 6 here too.
RANKS = """
import sys
sys.path.insert(0, {root!r})
from tests.train.killing import die_by_plan
die_by_plan({plan}, {folder!r})
from nanovlm import cli
from tests.test_train import run
from tests.train.test_rollout_runs import CHANGES
cli.run(lambda: run({run_dir!r}, **CHANGES | {{"precision": "fp32"}}))
cli.end(0)
"""


def test_two_ranks_sample_their_own_questions_and_survive_kills(tmp_path):
    plan = [(1, "save", 3), (1, "rollout", 4), (0, "step", 4)]
    for name, deaths in (("unbroken", []), ("killed", plan)):
        (tmp_path / f"{name}.py").write_text(
            RANKS.format(root=str(ROOT), plan=deaths, folder=str(tmp_path), run_dir=str(tmp_path / name))
        )
        finish(torchrun(tmp_path / f"{name}.py", restarts=len(deaths)))
    assert read_deaths(tmp_path) == ([0, 0, 3, 3], ["save 3", "rollout 4", "step 4"])
    unbroken = metrics(tmp_path / "unbroken")
    assert comparable(metrics(tmp_path / "killed")) == comparable(unbroken)
    assert [line["step"] for line in unbroken] == list(range(1, 7))
    # The first step is that of one rank with both micro-batches: the same questions, seeds and answers.
    optim = dataclasses.replace(CHANGES["optim"], steps=1)
    run(tmp_path / "one", **CHANGES | {"optim": optim, "precision": "fp32"})
    [one] = metrics(tmp_path / "one")
    for name in ("reward", "answer_length", "trained_tokens", "entropy", "loss", "grad_norm"):
        assert unbroken[0][name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("seed", [0, 1])
def test_rewards_go_up(tmp_path, monkeypatch, seed):
    """From random weights, for a reward of the test's own: the share of vowels. It went from 0.21 to 0.52 and more."""
    monkeypatch.setitem(
        REWARDS, "vowels", lambda question, answer: sum(c in "aeiou" for c in answer) / (len(answer) or 1)
    )
    group = GroupConfig(num_generations=8, max_completion_length=4, num_questions=8, rewards=("vowels=1",))
    optim = dataclasses.replace(SMALL.optim, steps=40, lr=1e-2)
    changes = {"group": group, "optim": optim, "seed": seed, "precision": "fp32", "checkpoint_every": 100}
    run(tmp_path, **CHANGES | changes)
    rewards = [line["reward"] for line in metrics(tmp_path)]
    assert sum(rewards[-8:]) > 1.6 * sum(rewards[:8]), rewards


def test_own_answers_become_pairs(tmp_path):
    """Online preferences: a judge, which is how long an answer is, and a loss without a reference."""
    preference = PreferenceConfig(losses=("simpo",), beta=2.0)
    run(tmp_path, **CHANGES | {"objective": "online_preference", "preference": preference})
    lines = metrics(tmp_path)
    assert len(lines) == 6 and all(0 < line["loss"] < 5 and "margin" in line for line in lines)
    assert lines[1]["margin"] > lines[0]["margin"]  # the second step on the same pairs
    assert "reward" in lines[0] and "reward" not in lines[1]
