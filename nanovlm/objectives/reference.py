"""The model that a run's own is compared with, and its log-probabilities; precompute.py writes them into the data."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanovlm.config import QuantizationConfig, TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.data.types import Batch
from nanovlm.errors import UserError
from nanovlm.hub.adapters import attach
from nanovlm.hub.read import load
from nanovlm.model.adapters import disabled
from nanovlm.model.quantized import quantize
from nanovlm.model.vlm import VLM
from nanovlm.objectives.logprobs import batch_logprobs


def make_reference(
    config: TrainConfig, name: str, processor: Processor, device: torch.device, never: tuple[int, ...] = ()
) -> Callable[[VLM, Batch], Tensor]:
    """Return what gives the reference's log-probability of each trained token, fp32[N], of the run's model and a batch.

    `name` is a model, or empty for what the run starts from: the model itself without its adapters, where these are all
    that learns and begin with no change; else a frozen copy, rounded and adapted as the run begins, in fp32 on every
    rank. It is no part of checkpoints, and read again when a run goes on. `never` is as in `token_logprobs`.
    """
    adapter, init = config.adapter, config.init
    begins_as_base = adapter.init in ("kaiming", "gaussian") and not init.adapter
    if not name and adapter.rank and not adapter.train and begins_as_base:

        def compute_base(model: VLM, batch: Batch) -> Tensor:
            with evaluating(model), disabled(model):
                return batch_logprobs(model, batch, never=never)

        return compute_base
    if not (name or init.model):
        field = "preference" if "preference" in config.objective else "group"
        raise UserError(
            f"objective = {config.objective} compares the model with a reference, and there is none: start from "
            f"init.model, or name another in {field}.reference"
            + (", or records for log-probabilities that records bring" if config.objective == "preference" else "")
        )
    if not name and adapter.rank and adapter.init == "orthogonal" and not init.adapter:
        raise UserError(
            f"objective = {config.objective} compares the model with what it starts from, which adapter.init = "
            "orthogonal draws at random: choose kaiming or gaussian, or name a reference"
        )
    frozen, theirs = load(name or init.model, device, torch.float32)
    check_fits(name or init.model, theirs, processor)
    if not name and adapter.base:
        quantize(frozen, QuantizationConfig(adapter.base), search=False)
    if not name and init.adapter:
        attach(frozen, init.adapter)
    frozen.requires_grad_(False)

    def compute(_model: VLM, batch: Batch) -> Tensor:
        with evaluating(frozen):
            return batch_logprobs(frozen, batch, never=never)

    return compute


def check_fits(name: str, theirs: Processor, ours: Processor):
    """Raise UserError if a model reads other tokens or tiles than those of a run's batches."""
    if theirs.tokenizer.get_vocab() != ours.tokenizer.get_vocab():
        raise UserError(
            f"the reference {name} has another tokenizer than the model, so it cannot read the same batches"
        )
    for field in ("image_token_id", "tile_size", "num_image_tokens"):
        if (one := getattr(theirs.config, field)) != (other := getattr(ours.config, field)):
            raise UserError(f"the reference {name} has {field} = {one}, and the model {other}: they must be equal")


@contextlib.contextmanager
def evaluating(model: VLM) -> Iterator[None]:
    """Compute without gradients or noise."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)
