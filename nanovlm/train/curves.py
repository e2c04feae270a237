"""metrics.jsonl -> a picture of the curves of a run."""

import io
import json
from collections.abc import Callable
from pathlib import Path

# title of a panel -> which numbers it shows
CURVES: dict[str, Callable[[str], bool]] = {
    "loss": lambda name: name == "loss" or name.startswith(("loss_of_", "val_loss")),
    "reward": lambda name: name == "reward" or name.startswith("rewards_"),
    "accuracy": lambda name: name.startswith("accuracy_"),
    "samples": lambda name: name.startswith("documents_of_"),
    "learning rate": lambda name: name == "lr",
}


def draw_curves(metrics: Path) -> bytes:
    """Draw loss, validation loss, rewards, accuracy, samples of each source and learning rate; return a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    names = list(dict.fromkeys(name for line in lines for name in line))
    panels = {title: chosen for title, is_of in CURVES.items() if (chosen := [name for name in names if is_of(name)])}
    if len(panels.get("samples", ())) < 2:  # of a single source they say nothing
        panels.pop("samples", None)
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 2.6 * len(panels)), sharex=True, layout="constrained")
    for axis, (title, chosen) in zip(axes, panels.items(), strict=True):
        for name in chosen:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            marker = "" if len(points) == len(lines) else "o"
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1, marker=marker, markersize=3)
        if title == "loss" and all(line["loss"] > 0 for line in lines if line.get("loss") is not None):
            axis.set_yscale("log")  # that of a policy is often negative
        axis.set_ylabel(title)
        if len(chosen) > 1:
            axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    png = io.BytesIO()
    figure.savefig(png, dpi=100)
    plt.close(figure)
    return png.getvalue()
