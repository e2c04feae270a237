"""The loss on documents that are held out, for each source, and the curves of a run."""

import contextlib
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nanovlm import distributed
from nanovlm.config import TrainConfig
from nanovlm.data.loader import Loader
from nanovlm.data.types import Batch
from nanovlm.model.vlm import Extras
from nanovlm.train.state import TrainState
from nanovlm.train.step import autocast, fill_up


def read_held_out(loaders: dict[str, Loader], config: TrainConfig) -> dict[str, list[list[Batch]]]:
    """Read the first batches of the held-out split of each source, to keep: `{source: [this rank's share of a step]}`.

    `loaders` read this rank's micro-batches of that split once. All ranks get equally many batches; those that are
    missing are of padding.
    """
    held_out, steps = {}, max(1, config.eval.val_batches // config.optim.micro_batches)
    for name, loader in loaders.items():
        batches = list(itertools.islice(loader, steps))
        loader.close()
        most = max(distributed.gather(len(batches)))
        held_out[name] = [fill_up(step, config) for step in batches + [[]] * (most - len(batches))]
    return held_out


def validate(state: TrainState, held_out: dict[str, list[list[Batch]]]) -> dict[str, float]:
    """Return the mean loss over the held-out units of each source, and of all: `val_loss_SOURCE` and `val_loss`."""
    sums, device = {}, next(state.model.parameters()).device
    with evaluating(state):
        for name, steps in held_out.items():
            loss, units = 0.0, 0
            for batch in itertools.chain(*steps):
                units += state.objective.count(batch)
                loss += float(state.objective.loss(state.replica, batch.to(device), Extras()))
            sums[name] = distributed.add_up_tensor(torch.tensor([loss, units], dtype=torch.float64, device=device))
    if sums:
        sums = {f"val_loss_{name}": x for name, x in sums.items()} | {"val_loss": sum(sums.values())}
    return {name: float(loss / units) for name, (loss, units) in sums.items() if units}


@contextlib.contextmanager
def evaluating(state: TrainState) -> Iterator[None]:
    """Compute as an evaluation does: in the run's precision, without gradients, noise or compiling."""
    state.replica.eval()
    with torch.no_grad(), autocast(state), torch.compiler.set_stance("force_eager"):
        yield
    state.replica.train()


CURVES: dict[str, Callable[[str], bool]] = {
    "loss": lambda name: name == "loss" or name.startswith("val_loss"),
    "accuracy": lambda name: name.startswith("accuracy_"),
    "learning rate": lambda name: name == "lr",
}


def draw_curves(metrics: Path) -> bytes:
    """Draw what a metrics.jsonl says of loss, validation loss, accuracy and learning rate by step, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    names = list(dict.fromkeys(name for line in lines for name in line))
    panels = {title: chosen for title, is_of in CURVES.items() if (chosen := [name for name in names if is_of(name)])}
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 2.6 * len(panels)), sharex=True, layout="constrained")
    for axis, (title, chosen) in zip(axes, panels.items(), strict=True):
        for name in chosen:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            marker = "" if len(points) == len(lines) else "o"
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1, marker=marker, markersize=3)
        if title == "loss":
            axis.set_yscale("log")
        axis.set_ylabel(title)
        if len(chosen) > 1:
            axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    png = io.BytesIO()
    figure.savefig(png, dpi=100)
    plt.close(figure)
    return png.getvalue()
