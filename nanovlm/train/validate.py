"""The loss on held-out documents, for each source."""

import contextlib
import itertools
from collections.abc import Iterator

import torch

from nanovlm import distributed
from nanovlm.config import TrainConfig
from nanovlm.data.loader import Loader
from nanovlm.data.types import Batch
from nanovlm.model.vlm import Extras
from nanovlm.train.state import TrainState
from nanovlm.train.step import autocast, fill_up


def read_held_out(loaders: dict[str, Loader], config: TrainConfig) -> dict[str, list[list[Batch]]]:
    """Read and keep the first batches of the held-out split of each source: `{source: [this rank's share of a step]}`.

    `loaders` read this rank's micro-batches of that split once. All ranks get equally many batches; missing
    ones are padding.
    """
    held_out, steps = {}, max(1, config.eval.val_batches // config.optim.micro_batches)
    for name, loader in loaders.items():
        batches = list(itertools.islice(loader, steps))
        loader.close()
        most = max(distributed.gather(len(batches)))
        if not most:
            fraction = f"data.val_fraction = {config.data.val_fraction}"
            print(f"note: {fraction} holds out no record of {name}, so there is no validation loss for it")
        held_out[name] = [fill_up(step, config) for step in batches + [[]] * (most - len(batches))]
    return held_out


def validate(state: TrainState, held_out: dict[str, list[list[Batch]]]) -> dict[str, float]:
    """Return the mean loss over the held-out units, `val_loss`, and of each of several sources, `val_loss_SOURCE`."""
    sums, device = {}, next(state.model.parameters()).device
    with evaluating(state):
        for name, steps in held_out.items():
            loss_and_units = torch.zeros(2, device=device)
            for batch in itertools.chain(*steps):
                loss_and_units[0] += state.objective.loss(state.replica, batch.to(device), Extras())
                loss_and_units[1] += state.objective.count(batch)
            sums[name] = distributed.add_up_tensor(loss_and_units)
    named = {f"val_loss_{name}": x for name, x in sums.items()} if len(sums) > 1 else {}
    named["val_loss"] = sum(sums.values(), torch.zeros(2, device=device))
    return {name: float(loss / units) for name, (loss, units) in named.items() if units}


@contextlib.contextmanager
def evaluating(state: TrainState) -> Iterator[None]:
    """Compute as an evaluation does: in the run's precision, without gradients, noise or compiling."""
    state.replica.eval()
    with torch.no_grad(), autocast(state), torch.compiler.set_stance("force_eager"):
        yield
    state.replica.train()
