"""The benchmark of many runs: what counts as met, what is run again, and how a run is held against the others."""

import dataclasses
import json

import pytest

pytest.importorskip("tyro")  # a machine that is lent for minutes may lack it
from benchmarks import scenes as benchmark
from benchmarks.scenes import JOBS, Job, ScenesConfig, compare, figures, format_runs, misses

GOOD = {"mean": 95.0, "worst": 80.0, "worst_kind": "relation", "compositional": 84.0, "seconds": 200.0}


def results(**kinds):
    kinds = {"color": 1.0, "position": 0.8} | kinds
    score = {kind: {"accuracy": value} for kind, value in kinds.items()}
    mean = sum(kinds.values()) / len(kinds)
    tasks = {"scenes": {"mean": mean, "kinds": score}, "scenes:compositional": {"mean": 0.76543}}
    return {"tasks": tasks, "train_seconds": 123.4}


def test_figures_of_a_run():
    assert figures(results(relation=0.75)) == {
        "mean": pytest.approx(85.0),
        "worst": 75.0,
        "worst_kind": "relation",
        "compositional": pytest.approx(76.543),
        "seconds": 123.4,
    }


def test_the_bar():
    assert misses(GOOD) == []
    on_it = {"mean": 90, "worst": 75, "compositional": 75, "seconds": 300}
    assert misses(on_it) == []
    for name, value in (("mean", 89.9), ("worst", 74.9), ("compositional", 74.9), ("seconds", 300.1)):
        assert misses(on_it | {name: value}) == [name]


def test_a_run_is_held_against_the_others(capsys):
    others = [GOOD, GOOD | {"mean": 97.0}]
    assert compare(GOOD, others) == 0
    out = capsys.readouterr().out
    assert "the 2 runs in benchmarks/results/scenes_seeds.jsonl" in out
    assert "test mean" in out and "95.0   bar at least 90: met; they have 95.0 to 97.0" in out
    assert compare(GOOD | {"worst": 60.0}, others) == 1
    assert "60.0   bar at least 75: MISSED; they have 80.0 to 80.0" in capsys.readouterr().out
    assert compare(GOOD | {"seconds": 900.0}, []) == 0  # a slow machine is no fault of the run
    assert "900.0   bar at most 300: slower\n" in capsys.readouterr().out


def test_jobs_are_all_different_and_cover_what_may_change_a_rounding():
    assert len(set(JOBS)) == 24
    assert {(job.seed, job.threads) for job in JOBS[:20]} == {(s, t) for s in range(10) for t in (1, 2)}
    assert {job.precision for job in JOBS[20:]} == {"auto", "fp32"}
    assert {job.instructions for job in JOBS[20:]} == {"", "avx2", "plain"}


def test_what_has_a_line_is_not_run_again(tmp_path, monkeypatch):
    jobs = [Job(0, 2), Job(1, 2), Job(0, 1), Job(1, 1), Job(2, 1)]
    made, written = [], []

    def run(job, folder):
        made.append(job)
        if job == Job(2, 1) and len(made) == 5:
            raise ValueError("it failed")
        mean = 80.0 if job == Job(1, 2) else 95.0
        return GOOD | {"mean": mean, "recipe": benchmark.recipe(), "job": dataclasses.asdict(job)}

    monkeypatch.setattr(benchmark, "JOBS", jobs)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(benchmark, "run", run)
    monkeypatch.setattr(benchmark.pages, "put", lambda page, name, by, text: written.append(text))
    config = ScenesConfig("seeds")
    assert benchmark.main(dataclasses.replace(config, num=1)) == 1 and made == jobs[:1]
    with pytest.raises(ValueError, match="it failed"):
        benchmark.main(config)
    assert sorted(made[1:], key=jobs.index) == jobs[1:]
    made.clear()
    assert benchmark.main(config) == 1  # one run misses the bar
    assert made == jobs[4:]
    assert len(written) == 5 and written[-1] == format_runs(benchmark.read_lines())
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [Job(**line["job"]) for line in lines] == jobs
    # Another recipe has no runs yet.
    monkeypatch.setattr(benchmark, "recipe", lambda: "another")
    assert benchmark.read_lines() == []


def test_the_table_has_mean_deviation_and_worst():
    def line(job, mean):
        return GOOD | {"mean": mean, "job": dataclasses.asdict(job)}

    table = format_runs([line(JOBS[0], 91.0), line(JOBS[1], 95.0), line(JOBS[20], 99.0)])
    assert "| two threads, 10 seeds | 2 of 10 | 93.0 ± 2.8, worst 91.0 | 80.0 ± 0.0, worst 80.0 |" in table
    assert "| fp32 or fewer instructions, 4 seeds | 1 of 4 | 99.0 | 80.0 |" in table
    assert "| one thread, 10 seeds | 0 of 10 | not measured yet |" in table
