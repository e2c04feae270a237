"""Publish a run of the scenes preset: its scores, its contact sheet and its curve into the docs.

    make demo test && .venv/bin/python benchmarks/scenes.py runs/demo

Writes benchmarks/results/scenes.json (eval.json of the run), docs/samples.png, docs/curve.png and the table between
the marks in README.md.
"""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nanovlm import checkpoint, cli
from nanovlm.data.scenes import LESSONS

MARKS = "<!-- scenes: written by benchmarks/scenes.py -->", "<!-- scenes end -->"
KINDS = ("color", "shape", "count", "position", "relation", "existence", "digits")
# What the preset is to reach on two CPU cores: percent of exact answers (captions apart), seconds.
GOALS = {
    "mean at least": 90,
    "every kind of the test split at least": 75,
    "compositional mean at least": 75,
    "grey at most": 40,
    "seconds at most": 300,
}


@dataclass(frozen=True)
class PublishConfig:
    # Folder of a finished run.
    run_dir: Annotated[Path, tyro.conf.Positional]


def main(config: PublishConfig):
    """Copy the results of a run to where the README shows them."""
    results = checkpoint.read_json(config.run_dir / "eval.json")
    if "test" not in results:
        raise ValueError(f"{config.run_dir} was not evaluated: train it with --eval-scenes 512")
    readme = cli.PROJECT / "README.md"
    before, _old, after = re.split("|".join(map(re.escape, MARKS)), readme.read_text())
    checkpoint.write_file(readme, "".join([before, MARKS[0], "\n", format_results(results), MARKS[1], after]))
    shutil.copy(config.run_dir / "eval.json", cli.PROJECT / "benchmarks" / "results" / "scenes.json")
    shutil.copy(config.run_dir / "samples.png", cli.PROJECT / "docs" / "samples.png")
    draw_curve(config.run_dir / "metrics.jsonl", cli.PROJECT / "docs" / "curve.png")
    print(format_results(results))


def format_results(results: dict) -> str:
    """Lay out eval.json as Markdown, in percent, with the goals."""
    e, test, comp = results["environment"], results["test"], results["compositional"]
    measured = [
        100 * test["mean"],
        min(100 * kind["accuracy"] for kind in test["kinds"].values()),
        100 * comp["mean"],
        100 * test["blank_mean"],
        results["train_seconds"],
    ]
    goals = "; ".join(
        f"{name} {goal}: {value:.1f} ({'met' if (value <= goal if 'at most' in name else value >= goal) else 'missed'})"
        for (name, goal), value in zip(GOALS.items(), measured, strict=True)
    )
    lines = [
        f"`make demo` on {e['device']}, {e['threads']} threads, {e['precision']}, {e['date']}, "
        f"commit {e['commit']}: trained in {results['train_seconds']:.0f} s.",
        f"Goals, and what was measured: {goals}.",
        "",
        f"| scenes | mean | grey | shuffled | majority | {' | '.join(KINDS)} | caption |",
        "|---" * (6 + len(KINDS)) + "|",
    ]
    for split in ("test", "compositional"):
        r = results[split]
        means = [f"{100 * r[name]:.1f}" for name in ("blank_mean", "shuffled_mean", "majority_mean")]
        kinds = [f"{100 * r['kinds'][kind]['accuracy']:.0f}" for kind in KINDS]
        cells = [split, f"**{100 * r['mean']:.1f}**", *means, *kinds, f"{100 * r['caption_exact']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_curve(metrics: Path, png: Path):
    """Draw the loss over the seconds, and over it where the lessons of the curriculum end."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    seconds, losses = [line["elapsed_s"] for line in lines], [line["loss"] for line in lines]
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.semilogy(seconds, losses, linewidth=1)
    for end, kinds in LESSONS:
        over = next((line["elapsed_s"] for line in lines if line["samples"] >= end), seconds[-1])
        axes.axvline(over, color="0.6", linewidth=0.8)
        axes.annotate(
            ", ".join(kinds), (over, max(losses)), (-4, 0), textcoords="offset points", ha="right", va="top", fontsize=8
        )
    axes.set(xlabel="seconds", ylabel="loss per trained token")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(PublishConfig, description=__doc__)))
