"""The mixture of experts on the scenes: against the dense model of equal active parameters, and balanced in four ways.

    python benchmarks/scenes_moe.py compare runs/moe               scenes and scenes_moe, five seeds each
    python benchmarks/scenes_moe.py balance runs/moe               scenes_moe with every way of balancing

On one thread; runs that are there are continued or reused. What a step takes is not read from them but measured at the
end, in short runs of both presets by turns. Writes
benchmarks/results/scenes_moe_compare.json and docs/routing.png (which expert serves what), or
benchmarks/results/scenes_moe_balance.json and docs/moe_load.png (the largest load over the mean one, by step).
"""

import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.scenes import TASKS
from nanovlm import cli
from nanovlm.errors import UserError
from nanovlm.files import read_json, write_file
from nanovlm.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2, 3, 4)
NUM_TIMED, TIMED_STEPS = 5, 80
BALANCE = ("none", "loss", "global_loss", "bias")


@dataclass(frozen=True)
class BenchmarkConfig:
    # What to measure.
    what: Annotated[Literal["compare", "balance"], tyro.conf.Positional]
    # Where the runs are.
    runs: Annotated[Path, tyro.conf.Positional]
    # Optimizer steps of every run.
    steps: int = PRESETS["scenes"]().optim.steps


def main(config: BenchmarkConfig):
    jobs = {
        "compare": [(preset, seed, "loss") for seed in SEEDS for preset in ("scenes", "scenes_moe")],
        "balance": [("scenes_moe", 0, balance) for balance in BALANCE],
    }[config.what]
    for job in tqdm(jobs, unit="run"):
        run(config, *job)
    results = {"compare": compare, "balance": balance}[config.what](config)
    text = json.dumps({"steps": config.steps, **results}, indent=2) + "\n"
    write_file(ROOT / "benchmarks" / "results" / f"scenes_moe_{config.what}.json", text)
    print(text)


def folder(config, preset, seed, balance) -> Path:
    name = f"{preset}_{seed}" if preset == "scenes" else f"{preset}_{balance}_{seed}"
    return config.runs.resolve() / f"{name}_{config.steps}"


def run(config: BenchmarkConfig, preset: str, seed: int, balance: str):
    """Train one run in a process of its own. Raises ValueError with its last words when it fails."""
    run_dir = folder(config, preset, seed, balance)
    command = [sys.executable, str(ROOT / "train.py"), preset, "--run-dir", str(run_dir), "--seed", str(seed)]
    command += ["--optim.steps", str(config.steps), "--threads", "1"]
    if preset == "scenes_moe":
        command += ["--model.decoder.moe.balance", balance]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"{run_dir} failed: {ended.stderr[-1000:]}")


def compare(config: BenchmarkConfig) -> dict:
    """Return accuracy in percent over the seeds and seconds a step; copy the picture of the first seed's routing."""
    results = {"seeds": list(SEEDS), "accuracy": {}}
    for preset in ("scenes", "scenes_moe"):
        scores = [read_json(folder(config, preset, seed, "loss") / "eval.json") for seed in SEEDS]
        results["accuracy"][preset] = {
            split: spread([100 * score["tasks"][task]["mean"] for score in scores]) for split, task in TASKS.items()
        }
        results["environment"] = scores[0]["environment"]
    seconds = {"scenes": [], "scenes_moe": []}
    for _ in tqdm(range(NUM_TIMED), unit="pair"):
        for preset, values in seconds.items():
            values.append(step_seconds(preset))
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    results["seconds_a_step"] = {name: spread(values) for name, values in (seconds | {"ratio": ratios}).items()}
    shutil.copy(folder(config, "scenes_moe", SEEDS[0], "loss") / "routing.png", ROOT / "docs" / "routing.png")
    return results


def step_seconds(preset: str) -> float:
    """Return the median seconds of a step in a short run on one thread, the first steps left out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), preset, "--run-dir", folder, "--threads", "1"]
        command += ["--optim.steps", str(TIMED_STEPS), "--eval.tasks"]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    elapsed = [json.loads(line)["elapsed_s"] for line in lines][20:]
    return statistics.median(after - before for before, after in itertools.pairwise(elapsed))


def balance(config: BenchmarkConfig) -> dict:
    """Return how even the load was at the beginning and at the end, and draw it."""
    results = {}
    for name in BALANCE:
        run_dir = folder(config, "scenes_moe", 0, name)
        loads, score = read_loads(run_dir), read_json(run_dir / "eval.json")
        results[name] = {
            "max_load_of_each_layer_first_10_steps": [round(statistics.mean(layer[:10]), 3) for layer in loads],
            "max_load_of_each_layer_last_50_steps": [round(statistics.mean(layer[-50:]), 3) for layer in loads],
            "test_mean": round(100 * score["tasks"]["scenes"]["mean"], 2),
        }
    draw_loads(config)
    return {"balance": results, "environment": score["environment"]}


def spread(values: list[float]) -> dict:
    return {
        "mean": round(statistics.mean(values), 3),
        "standard_deviation": round(statistics.stdev(values), 3),
        "values": [round(value, 3) for value in values],
    }


def read_loads(run_dir: Path) -> list[list[float]]:
    """Return for each layer the largest load over the mean one, step by step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [list(layer) for layer in zip(*(line["max_load"] for line in lines), strict=True)]


def draw_loads(config: BenchmarkConfig):
    figure, axes = plt.subplots(1, len(BALANCE), figsize=(13, 3.2), sharey=True)
    for axis, balance in zip(axes, BALANCE, strict=True):
        for number, layer in enumerate(read_loads(folder(config, "scenes_moe", 0, balance))):
            smooth = [statistics.mean(layer[max(0, i - 20) : i + 1]) for i in range(len(layer))]
            axis.plot(smooth, label=f"layer {number}")
        axis.axhline(1.5, color="grey", linewidth=0.8, linestyle="--")
        axis.set_title(f"balance = {balance}", fontsize=10)
        axis.set_xlabel("step")
    axes[0].set_ylabel("largest load / mean load")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "moe_load.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(BenchmarkConfig, description=__doc__)))
