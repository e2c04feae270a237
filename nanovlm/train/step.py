"""One optimizer step: micro-batches -> gradients -> weights, and the counts of a step."""

import torch

from nanovlm import distributed
from nanovlm.config import DualConfig, TrainConfig
from nanovlm.data.loader import join
from nanovlm.data.types import IGNORE, Batch
from nanovlm.model.adapters import is_adapter
from nanovlm.model.vlm import Extras
from nanovlm.train import parallel
from nanovlm.train.counting import RoutingStats, count_flops
from nanovlm.train.optim import learning_rate, set_learning_rate
from nanovlm.train.state import TrainState


def train_step(state: TrainState, batches: list[Batch], num_units: int, config: TrainConfig) -> dict:
    """Run one optimizer step over this rank's micro-batches; return its metrics, some still on the device.

    The loss is the mean over the objective's `num_units` units (trained tokens) of all ranks, however they are divided
    into micro-batches, which are moved to the device one at a time. A step whose loss or gradient is not finite changes
    nothing.
    """
    device = next(state.model.parameters()).device
    lr = learning_rate(state.step, config.optim)
    set_learning_rate(state.optimizers, lr)
    loss, extras, stats = torch.zeros((), device=device), Extras(), RoutingStats()
    extras.sources = state.sources
    if state.objective.learns_from == "captions":  # each is compared with those of all micro-batches
        batches = [join(batches)]
    with autocast(state):  # around all of them, so that a weight is cast once
        for i, batch in enumerate(batches):
            batch = batch.to(device)
            with parallel.gradient_sync(state.replica, is_last=i + 1 == len(batches)):
                loss_sum = state.objective.loss(state.replica, batch, extras) / max(1, num_units)
                with torch.autocast(device.type, enabled=False):
                    (loss_sum * distributed.num_ranks()).backward()  # the ranks' gradients are averaged
            loss += loss_sum.detach()
            if extras.routing:
                stats.update(extras.routing, batch.doc_ids >= 0, find_images(batch, config))
    beside = [x for x in state.objective.state.values() if isinstance(x, torch.nn.Parameter)]
    parallel.finish_gradients(state.model, beside)
    parallel.clear_unused(state.model, sum(len(batch.pixel_values) for batch in batches))
    for name in extras.unreached:
        state.model.get_submodule(name).zero_grad()
    loss = distributed.add_up_tensor(loss)
    grad_norm = parallel.clip_gradients([*state.model.parameters(), *beside], config.optim.max_grad_norm)
    is_bad = ~(loss.isfinite() & grad_norm.isfinite())
    for optimizer in state.optimizers.values():
        optimizer.found_inf = is_bad.float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        optimizer.zero_grad()
    metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "is_bad": is_bad}
    if extras.routing:
        stats.add_up()
        state.model.decoder.update_expert_bias(stats.load * ~is_bad)
        metrics["routing"] = stats
    if isinstance(extras.router_loss, torch.Tensor):
        metrics["router_loss"] = distributed.add_up_tensor(extras.router_loss) / max(1, num_units)
    metrics |= average(state.sampled.means | extras.means, device)
    for name, total in extras.sums.items():
        state.objective.state[name] += distributed.add_up_tensor(total).where(~is_bad, 0)
    state.step += 1
    return {"step": state.step} | metrics


def average(means: dict[str, tuple], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the metrics of an objective over all ranks, each the quotient of two sums: NaN where the second is 0.

    Every call of a loss adds the same names, so that all ranks have them.
    """
    if not means:
        return {}
    each = [x for pair in means.values() for x in pair]
    is_there = [isinstance(x, torch.Tensor) and x.device.type == device.type for x in each]
    # What the host knows is copied at once, as a GPU waits for each copy; all in one order, which is that of all ranks.
    known = [0.0 if there else float(x) for x, there in zip(each, is_there, strict=True)]
    zero = torch.zeros((), device=device)
    found = torch.stack([x.float() if there else zero for x, there in zip(each, is_there, strict=True)])
    sums = found + torch.tensor(known).to(device)
    totals, numbers = distributed.add_up_tensor(sums).view(-1, 2).unbind(1)
    return dict(zip(means, (totals / numbers).unbind(), strict=True))


def autocast(state: TrainState) -> torch.autocast:
    """Compute matrix products in the run's precision."""
    device = next(state.model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=state.precision == "bf16")


def find_images(batch: Batch, config: TrainConfig) -> torch.Tensor:
    """bool[B, T]: the placeholders of images, none in a language model."""
    image_token_id = None if isinstance(config.built, DualConfig) else config.built.image_token_id
    return batch.input_ids == (-1 if image_token_id is None else image_token_id)


def count(batches: list[Batch], state: TrainState, config: TrainConfig) -> dict[str, int]:
    """Count what this rank's batches hold, and what its loader has read since the run began."""
    # Adapters' few operations are not counted; where they alone learn, no whole matrix needs a gradient.
    trains = {
        name: any(p.requires_grad and not is_adapter(key) for key, p in part.named_parameters())
        for name, part in state.model.named_children()
    }
    return {
        "batches": len(batches),
        "units": sum(state.objective.count(batch) for batch in batches),
        "trained_tokens": sum(len(batch.trained) for batch in batches),
        "tokens": sum(int((batch.doc_ids >= 0).sum()) for batch in batches),
        "image_tokens": sum(int(find_images(batch, config).sum()) for batch in batches),
        "places": sum(batch.doc_ids.numel() for batch in batches),
        "flops": sum(count_flops(config.built, batch, trains) for batch in batches),
        **{f"samples {name}": number for name, number in state.loader.counts.items()},
    }


def fill_up(batches: list[Batch], config: TrainConfig) -> list[Batch]:
    """Add batches of padding only, so that all ranks have equally many."""
    size = config.built.tile_size
    ids = torch.full((1, config.data.row_length), config.built.pad_token_id)
    nothing = torch.zeros_like(ids)
    tiles, tile_doc_ids = torch.zeros(0, 3, size, size, dtype=torch.uint8), torch.zeros(0, dtype=torch.int32)
    if config.data.features and config.model.vision is not None:
        tiles = torch.zeros(0, config.model.num_tile_patches, config.model.vision.feature_size)
    padding = Batch(ids, nothing + IGNORE, (nothing - 1).int(), nothing.int(), nothing, tiles, tile_doc_ids)
    return batches + [padding] * (config.optim.micro_batches // distributed.num_ranks() - len(batches))
