"""The model that a run's own is compared with, and its log-probabilities; precompute.py writes them into the data."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nanovlm.config import TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.data.types import Batch
from nanovlm.errors import UserError
from nanovlm.hub.read import load
from nanovlm.model.adapters import disabled
from nanovlm.model.vlm import VLM
from nanovlm.objectives.logprobs import batch_logprobs


def make_reference(
    config: TrainConfig, name: str, processor: Processor, device: torch.device, never: tuple[int, ...] = ()
) -> Callable[[VLM, Batch], Tensor]:
    """Return what gives the reference's log-probability of each trained token, fp32[N], of the run's model and a batch.

    `name` is a model, or empty for what the run starts from: the model itself without its adapters, where these are all
    that learns and the base is as it was read (pissa changes it); else a frozen copy, in fp32 as the run's own weights,
    on every rank. It is no part of checkpoints, and read again when a run goes on. `never` is as in `token_logprobs`.
    """
    if not name and config.adapter.rank and not config.adapter.train and config.adapter.init != "pissa":

        def compute_base(model: VLM, batch: Batch) -> Tensor:
            with evaluating(model), disabled(model):
                return batch_logprobs(model, batch, never=never)

        return compute_base
    if not (name := name or config.init.model):
        raise UserError(
            f"objective = {config.objective} compares the model with a reference, and there is none: start from "
            "init.model, name another in preference.reference, or records for log-probabilities that records bring"
        )
    frozen, theirs = load(name, device, torch.float32)
    check_fits(name, theirs, processor)
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
