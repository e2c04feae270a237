"""The search for weights ranks mixtures as the truth does, and asks train.py for just the runs that it says."""

import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from nanovlm.command_line import parse_train
from nanovlm.data import mix

SLOPES = np.array([[-1.0, 0.4, 0.1], [0.3, -0.5, 0.0], [0.2, 0.1, -0.8]])  # of source i on the log loss of source j


def true_losses(weights):
    return np.exp(np.array([0.5, 0.2, 0.9]) + np.asarray(weights) @ SLOPES)


def test_mixtures_are_shares_and_differ():
    for num_sources in (2, 3, 4, 8):
        found = mix.choose_mixtures(num_sources, 8)
        assert len(found) == 8 and len(set(found.values())) == 8 and found["equal"] == (1 / num_sources,) * num_sources
        for weights in found.values():
            assert len(weights) == num_sources and sum(weights) == pytest.approx(1) and min(weights) >= 0.001
    assert mix.choose_mixtures(8, 8)["smolvlm"] == pytest.approx([x / 101 for x in (25, 18, 17, 13, 11, 8, 8, 1)])
    assert set(mix.choose_mixtures(3, 5)) == {"equal", "mostly_1", "mostly_2", "mostly_3", "drawn_1"}
    assert [name.rstrip("_123456789") for name in mix.choose_mixtures(3, 3)] == ["equal", "drawn", "drawn"]


@pytest.mark.parametrize("goals", [(), (1, 0, 0), (1, 2, 5)])
def test_a_ranking_is_that_of_the_truth(goals):
    """Of losses that are lines in the weights, noise and all: the ranks, the prediction and the proposal."""
    mixtures = mix.choose_mixtures(3, 8)
    weights = np.array(list(mixtures.values()))
    goal = np.array(goals or (1, 1, 1)) / sum(goals or (1, 1, 1))
    exact = np.log(true_losses(weights)) @ goal
    noise = np.array([-0.01, 0.01])[None, :, None]
    found = mix.rank(mixtures, np.exp(np.log(true_losses(weights))[:, None] + noise), goals)
    names = list(mixtures)
    assert [row["name"] for row in found["ranking"]] == [names[i] for i in np.argsort(exact)]
    assert [row["score"] for row in found["ranking"]] == pytest.approx(sorted(exact), abs=1e-4)
    assert [row["fitted"] for row in found["ranking"]] == pytest.approx(sorted(exact), abs=0.01)
    assert found["between_seeds"] == pytest.approx(0.02 / np.sqrt(2), abs=1e-4) and found["rank_correlation"] > 0.9
    proposed = np.array(found["proposed"])
    assert proposed.sum() == pytest.approx(1, abs=1e-3)
    assert (proposed >= weights.min(0) - 1e-3).all() and (proposed <= weights.max(0) + 1e-3).all()
    assert np.log(true_losses(proposed)) @ goal <= exact.min() + 1e-3
    assert found["proposed_score"] == pytest.approx(np.log(true_losses(proposed)) @ goal, abs=0.02)


def test_a_ranking_of_noise_says_so():
    rng = np.random.default_rng(1)
    found = [
        mix.rank(mix.choose_mixtures(3, 8), np.exp(rng.normal(size=(8, 2, 3))))["rank_correlation"] for _ in range(20)
    ]
    assert abs(np.mean(found)) < 0.4 and min(found) < 0


def test_mixtures_that_differ_less_than_seeds_are_named():
    mixtures = mix.choose_mixtures(2, 3)
    losses = np.exp(np.array([[[0.0, 0.0], [0.4, 0.4]], [[0.1, 0.1], [0.5, 0.5]], [[0.7, 0.7], [1.1, 1.1]]]))
    said = mix.format_ranking(mix.rank(mixtures, losses), ("a", "b"))
    first, second, _third = mixtures
    assert (
        "between seeds it varies by 0.2828" in said and f"not told apart from {first} by these seeds: {second};" in said
    )


def test_ranks_correlate_as_scipy_says():
    """Spearman's rho without ties is 1 - 6 sum d^2 / (n (n^2 - 1))."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        a, b = rng.permutation(9), rng.permutation(9)
        assert mix.correlate_ranks(a * 2.5, b**3) == pytest.approx(1 - 6 * ((a - b) ** 2).sum() / (9 * 80))
    assert mix.correlate_ranks(np.ones(3), np.arange(3)) == 0


def test_a_search_trains_each_mixture_once_with_each_seed(tmp_path, monkeypatch, capsys):
    """By the command line of train.py, which is not run here; what is done is not done again."""
    asked = []

    def given(name, words):
        after = words[words.index(f"--{name}") + 1 :]
        return list(itertools.takewhile(lambda word: not word.startswith("--"), after))

    def train(command):
        asked.append(words := command[3:])
        run_dir = Path(*given("run-dir", words))
        run_dir.mkdir(parents=True)
        weights = mix.normalise([float(weight) for weight in given("data.weights", words)])
        losses = true_losses(weights) * (1 + 0.001 * int(*given("seed", words)))
        named = {f"val_loss_{name}": loss for name, loss in zip("abc", losses, strict=True)}
        (run_dir / "eval.json").write_text(json.dumps(named | {"val_loss": 1.0}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(mix.subprocess, "run", train)
    args = [
        "search",
        "small",
        str(tmp_path),
        "--sources",
        "a.jsonl",
        "b/*.parquet",
        "c",
        "--num",
        "3",
        "--seeds",
        "0",
        "3",
    ]
    args += ["--steps", "40", "--options=--optim.lr 0.002 --device cpu"]
    mix.main(args)
    assert len(asked) == 6 and {*given("seed", asked[0]), *given("seed", asked[1])} == {"0", "3"}
    first = parse_train(asked[0]).validate()
    assert first.data.sources == ("a.jsonl", "b/*.parquet", "c") and first.data.val_fraction == 0.05
    assert (first.optim.steps, first.optim.lr, first.device) == (40, 0.002, "cpu")
    said = capsys.readouterr().out
    ranking = json.loads((tmp_path / "ranking.json").read_text())
    assert len(ranking["ranking"]) == 3 and ranking["steps"] == 40
    assert "run 6 of 6: " in said and "weights of a.jsonl, b/*.parquet, c\n" in said and "not told apart" not in said
    assert f"proposed: --data.weights {' '.join(map(str, ranking['proposed']))}" in said
    (tmp_path / "equal-0" / "eval.json").unlink()
    (tmp_path / "equal-0").rmdir()
    mix.main(args)
    assert len(asked) == 7 and given("run-dir", asked[-1]) == [str(tmp_path / "equal-0")]
    assert json.loads((tmp_path / "ranking.json").read_text()) == ranking
    for changed in (["--steps", "80"], ["--sources", "a.jsonl", "b", "c"], ["--val-fraction", "0.1"]):
        with pytest.raises(ValueError, match=rf"are others \({changed[0][2:].replace('-', '_')}: .*another folder"):
            mix.main([*args, *changed])
    mix.main([*args, "--seeds", "0"])  # fewer or more of the same runs
    assert len(asked) == 7


def test_mistakes_of_a_search_are_named(tmp_path, monkeypatch, capsys):
    def search(*args):
        mix.main(["search", "small", str(tmp_path), "--sources", "a", "b", *args])

    for args, sentence in (
        (["--num", "2"], "--num 2 must be at least 3"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--seeds", "1", "1"], r"--seeds \(1, 1\) must be one or several different numbers"),
        (["--val-fraction", "0"], "--val-fraction 0.0 must be above 0 and below 1"),
        (["--goals", "1"], r"--goals \(1.0,\) must be a number of at least 0 for each of the 2 sources"),
        (["--sources", "a"], "--sources has 1 entries: a mixture needs at least 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            search(*args)
    monkeypatch.setattr(mix.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    with pytest.raises(ValueError, match=r"the run in .*equal-0 ended with status 1: what it says is above"):
        search("--sources", "a", "c")
    with pytest.raises(ValueError, match=r"ended with status 1"):  # not of others: no run has begun
        search()
    (tmp_path / "equal-0").mkdir()
    (tmp_path / "equal-0" / "eval.json").write_text('{"val_loss": 1.0}')
    with pytest.raises(ValueError, match=r"eval.json has held-out losses of 0 of the 2 sources, none: hold out more"):
        search()
    (tmp_path / "equal-0" / "eval.json").write_text('{"val_loss_a": 1.0, "val_loss_b": null}')
    with pytest.raises(ValueError, match=r"the held-out loss on b is None in .*eval.json: the run diverged"):
        search()
    with pytest.raises(ValueError, match="there is no command 'find'; there are search, presets"):
        mix.main(["find"])
    capsys.readouterr()
    mix.main(["presets"])
    assert "smoldocling     --data.weights 40 25 20 15" in capsys.readouterr().out
