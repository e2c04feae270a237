"""How well the scenes preset learns: many runs of it, one run held against them, and the tables that the README shows.

    python benchmarks/scenes.py seeds               24 runs: ten seeds on one and two threads, and four made harder
    python benchmarks/scenes.py compare runs/demo   how a run stands to them; exits with 1 where it answers worse
    python benchmarks/scenes.py publish runs/demo   its pictures and scores into the docs
    python benchmarks/scenes.py curves              docs/kinds.png: what the runs have learned after so many steps

`seeds` goes on where it was stopped: a run with a line in benchmarks/results/scenes_seeds.jsonl is not made again as
long as the recipe stays. The runs go one after the other, as each is timed. Its table is in README.md. `publish` writes
benchmarks/results/scenes.json (eval.json of the run), docs/samples.png, docs/curve.png and a table in README.md.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import pages
from nanovlm import cli
from nanovlm.config import TrainConfig, differences
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import open_source
from nanovlm.environment import git_commit
from nanovlm.errors import UserError
from nanovlm.files import read_json
from nanovlm.presets import PRESETS

RESULTS = cli.PROJECT / "benchmarks" / "results" / "scenes_seeds.jsonl"
README = cli.PROJECT / "README.md"
KINDS = ("color", "shape", "count", "position", "relation", "existence", "digits")
# What every run is to reach on two CPU cores: percent of exact answers (captions apart), seconds.
BAR = {"mean": 90, "worst": 75, "compositional": 75, "seconds": 300}
# The splits of the tables, and the tasks that ask them.
TASKS = {"test": "scenes", "compositional": "scenes:compositional"}
NAMES = {"mean": "test mean", "worst": "test, worst kind", "compositional": "compositional mean", "seconds": "seconds"}

# Instructions that torch, oneDNN and MKL may use; none for all that the processor has.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}


@dataclass(frozen=True)
class Job:
    """One run of the preset: what may change a rounding, and must not change what is learned."""

    seed: int
    threads: int
    precision: str = "auto"
    instructions: str = ""

    @property
    def settings(self) -> dict[str, str]:
        return {"": {}, "avx2": AVX2, "plain": PLAIN}[self.instructions]


JOBS = [
    *(Job(seed, threads) for threads, seed in itertools.product((2, 1), range(10))),
    Job(0, 2, "fp32"),
    Job(1, 2, "fp32", "avx2"),
    Job(2, 2, "auto", "avx2"),
    Job(3, 2, "auto", "plain"),
]

LOOKS = ["--eval.every", "100", "--eval.tasks", "scenes", "--eval.limit", "64", "--eval.no-controls"]


@dataclass(frozen=True)
class ScenesConfig:
    # What to do.
    what: Annotated[Literal["seeds", "compare", "publish", "curves"], tyro.conf.Positional]
    # Folder of a finished run; of seeds, the folder that the runs go to.
    run_dir: Annotated[Path, tyro.conf.Positional] = Path("runs/seeds")
    # seeds: make at most so many runs, and leave the others for another time; 0 for all.
    num: int = 0


def main(config: ScenesConfig) -> int:
    """Return the exit status."""
    if config.what == "seeds":
        return run_seeds(config)
    if config.what == "curves":
        draw_kinds(read_lines(), cli.PROJECT / "docs" / "kinds.png")
        return 0
    results = read_json(config.run_dir / "eval.json")
    if not set(TASKS.values()) <= results.get("tasks", {}).keys():
        raise UserError(f"{config.run_dir} was not evaluated: train it with --eval.tasks {' '.join(TASKS.values())}")
    if config.what == "compare":
        return compare(figures(results), read_lines())
    publish(config.run_dir, results)
    return 0


def figures(results: dict) -> dict:
    """Take what the bar is about from an eval.json, in percent and seconds."""
    kinds = {kind: 100 * score["accuracy"] for kind, score in results["tasks"]["scenes"]["kinds"].items()}
    worst = min(kinds, key=kinds.get)
    return {
        "mean": 100 * results["tasks"]["scenes"]["mean"],
        "worst": kinds[worst],
        "worst_kind": worst,
        "compositional": 100 * results["tasks"]["scenes:compositional"]["mean"],
        "seconds": results["train_seconds"],
    }


def misses(line: dict) -> list[str]:
    """Name the figures of a run that miss the bar."""
    return [name for name, bar in BAR.items() if (line[name] > bar if name == "seconds" else line[name] < bar)]


# --- many runs -----------------------------------------------------------------------------------------------


def recipe() -> str:
    """Name the recipe by a hash of what the preset sets, and of some scenes and their questions."""
    config = PRESETS["scenes"]()
    sources = [open_source(name) for name in config.data.sources] + [Scenes("test"), Scenes("compositional")]
    scenes = [source.read(i) for source in sources for i in range(3)]
    drawn = [(scene["images"][0].tobytes().hex(), scene["texts"]) for scene in scenes]
    asked = dataclasses.replace(TrainConfig(), eval=config.eval)  # which changes nothing that is learned
    return hashlib.sha256(json.dumps([differences(asked, config), drawn]).encode()).hexdigest()[:12]


def read_lines() -> list[dict]:
    """Return the lines of the file that are of today's recipe."""
    today = recipe()
    return [line for line in pages.read_lines(RESULTS) if line["recipe"] == today]


def run_seeds(config: ScenesConfig) -> int:
    """Make the runs that have no line yet; print the table. Return 1 where a run misses the bar or is not there."""
    commit = git_commit()  # before this writes anything
    done = [Job(**line["job"]) for line in read_lines()]
    jobs = [job for job in JOBS if job not in done][: config.num or None]
    with tqdm(total=len(jobs), unit="run") as progress:
        for job in jobs:
            line = run(job, config.run_dir) | {"commit": commit}
            with open(RESULTS, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            pages.put(README, "runs", "scenes.py", format_runs(read_lines()))
            progress.update()
            progress.write(json.dumps(line))
    lines = read_lines()
    print(format_runs(lines))
    return int(len(lines) < len(JOBS) or any(misses(line) for line in lines))


def run(job: Job, folder: Path) -> dict:
    """Train in a process of its own, or go on where it was stopped; return its line, or raise UserError.

    What training leaves of two cores reads the data. Now and then it is asked about a few scenes, and at its end, by
    the same command without these looks, about all that the preset names.
    """
    name = "_".join(str(x) for x in dataclasses.astuple(job) if x != "")
    run_dir = folder / f"{recipe()}_{name}"
    command = [sys.executable, str(cli.PROJECT / "train.py"), "scenes", "--run-dir", str(run_dir)]
    command += ["--seed", str(job.seed), "--threads", str(job.threads), "--precision", job.precision]
    command += ["--data.num-workers", str(2 - job.threads)]
    for options in (LOOKS, []):
        (run_dir / "eval.json").unlink(missing_ok=True)  # with it the run counts as finished
        ended = subprocess.run(command + options, env=os.environ | job.settings, capture_output=True, text=True)
        if ended.returncode:
            raise UserError(f"{run_dir} failed: {ended.stderr[-1000:]}")
    results = read_json(run_dir / "eval.json")
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["accuracies_scenes"] for line in metrics if "accuracies_scenes" in line}
    about = {"recipe": recipe(), "job": dataclasses.asdict(job), "steps": len(metrics), "curve": curve}
    return figures(results) | about | results["environment"]


def format_runs(lines: list[dict]) -> str:
    """Lay out mean, deviation and worst of the runs of ten seeds, and of the harder ones, as Markdown."""
    groups = {
        "two threads, 10 seeds": JOBS[:10],
        "one thread, 10 seeds": JOBS[10:20],
        "fp32 or fewer instructions, 4 seeds": JOBS[20:],
    }
    text = ["| runs of `scenes` | done | " + " | ".join(NAMES.values()) + " |", "|---" * (2 + len(NAMES)) + "|"]
    for name, jobs in groups.items():
        group, cells = [line for line in lines if Job(**line["job"]) in jobs], []
        for figure in NAMES:
            values = [line[figure] for line in group]
            if values:
                worst = max(values) if figure == "seconds" else min(values)
                spread = f" ± {statistics.stdev(values):.1f}, worst {worst:.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
        text.append(
            f"| {name} | {len(group)} of {len(jobs)} | {' | '.join(cells or ['not measured yet'] * len(NAMES))} |"
        )
    return "\n".join(text)


# --- one run -------------------------------------------------------------------------------------------------


def compare(line: dict, lines: list[dict]) -> int:
    """Print how a run stands to the bar and to the runs of the file; return 1 where its answers miss the bar."""
    print(f"\nhow this run stands to the {len(lines)} runs in {RESULTS.relative_to(cli.PROJECT)}:")
    for figure, name in NAMES.items():
        values = [other[figure] for other in lines]
        seen = f"; they have {min(values):.1f} to {max(values):.1f}" if values else ""
        bar = f"{'at most' if figure == 'seconds' else 'at least'} {BAR[figure]}"
        missed = "slower" if figure == "seconds" else "MISSED"
        met = missed if figure in misses(line) else "met"
        print(f"  {name:<20} {line[figure]:6.1f}   bar {bar}: {met}{seen}")
    return int(bool(set(misses(line)) - {"seconds"}))


def publish(run_dir: Path, results: dict):
    """Copy the results of a run to where the README shows them."""
    pages.put(README, "scenes", "scenes.py", format_results(results))
    shutil.copy(run_dir / "eval.json", cli.PROJECT / "benchmarks" / "results" / "scenes.json")
    shutil.copy(run_dir / "samples.png", cli.PROJECT / "docs" / "samples.png")
    draw_curve(run_dir / "metrics.jsonl", cli.PROJECT / "docs" / "curve.png")
    print(format_results(results))


def draw_kinds(lines: list[dict], png: Path):
    """Draw the accuracy of each kind of question over the steps: every run, and the mean of the runs."""
    curves = [line["curve"] for line in lines if "curve" in line]
    if not curves:
        raise UserError(f"{RESULTS} has no run with a curve: make some with `python benchmarks/scenes.py seeds`")
    steps = [*map(int, curves[0])]
    figure, panels = plt.subplots(1, len(KINDS), figsize=(12, 2.4), sharey=True, layout="constrained")
    for kind, axes in zip(KINDS, panels, strict=True):
        shares = [[100 * curve[str(step)][kind] for step in steps] for curve in curves]
        axes.plot(steps, list(zip(*shares, strict=True)), color="0.75", linewidth=0.8)
        axes.plot(steps, [statistics.mean(column) for column in zip(*shares, strict=True)], linewidth=2)
        axes.set(title=kind, xlabel="step", ylim=(0, 102), xlim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"% correct ({len(curves)} runs)")
    figure.savefig(png, dpi=100)
    plt.close(figure)


def format_results(results: dict) -> str:
    """Lay out eval.json as Markdown, in percent."""
    e = results["environment"]
    lines = [
        f"One run by kind of question ({e['device']}, {e['instructions']}, {e['threads']} threads, {e['precision']}, "
        f"commit {e['commit'][:7]}, {e['date']}):",
        "",
        f"| scenes | mean | blank | shuffled | majority | {' | '.join(KINDS)} | caption |",
        "|---" * (6 + len(KINDS)) + "|",
    ]
    for split, task in TASKS.items():
        r = results["tasks"][task]
        means = [f"{100 * r[name]:.1f}" for name in ("blank_mean", "shuffled_mean", "majority_mean")]
        kinds = [f"{100 * r['kinds'][kind]['accuracy']:.0f}" for kind in KINDS]
        cells = [split, f"**{100 * r['mean']:.1f}**", *means, *kinds, f"{100 * r['caption_exact']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curve(metrics: Path, png: Path):
    """Draw the loss over the seconds, and over it where the lessons of the curriculum end."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds, losses = [line["elapsed_s"] for line in lines], [line["loss"] for line in lines]
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.semilogy(seconds, losses, linewidth=1)
    data = PRESETS["scenes"]().data
    for end, source in zip([*itertools.accumulate(data.lessons), float("inf")], data.sources, strict=True):
        over = next((line["elapsed_s"] for line in lines if line["samples"] >= end), seconds[-1])
        axes.axvline(over, color="0.6", linewidth=0.8)
        axes.annotate(
            "everything" if source == "scenes" else source.removeprefix("scenes:").replace(",", "\n"),
            (over, max(losses)),
            (-4, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
        )
    axes.set(xlabel="seconds", ylabel="loss per trained token")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(lambda: sys.exit(main(tyro.cli(ScenesConfig, description=__doc__))))
