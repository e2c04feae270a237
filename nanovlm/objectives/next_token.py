"""Batch -> sum of the losses of its trained tokens, each predicted from the tokens before it."""

from typing import Literal

from torch import Tensor

from nanovlm.data.types import Batch
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.losses import next_token_losses, router_loss


class NextToken:
    """Predict every trained token from the tokens before it; with a mixture of experts, keep its load even."""

    learns_from: Literal["answers"] = "answers"

    def __init__(self, config=None, processor=None, device=None):
        self.state = {}

    def count(self, batch: Batch) -> int:
        return len(batch.trained)

    def loss(self, model: VLM, batch: Batch, extras: Extras | None = None) -> Tensor:
        extras = extras or Extras()
        hidden = model(batch, extras=extras).flatten(0, 1)[batch.trained]
        labels, backend = batch.labels.flatten()[batch.trained], model.config.decoder.cross_entropy
        loss, losses = next_token_losses(hidden, labels, model.decoder.head_weight, backend=backend)
        of = batch.value("source") if extras.sources else None
        for number, name in enumerate(extras.sources):
            is_own = of == number
            extras.add(f"loss_of_{name}", losses.where(is_own, 0).sum(), is_own.sum())
        return loss + balance(model, batch, extras, len(batch.trained))


def balance(model: VLM, batch: Batch, extras: Extras, num_units: int) -> Tensor | int:
    """Return the losses that keep the load of experts even, for the units of a batch that was just seen in training."""
    moe = model.config.decoder.moe
    if moe is None or not model.training:
        return 0
    loss = num_units * router_loss(extras, batch.doc_ids >= 0, moe)
    extras.router_loss = extras.router_loss + loss.detach()
    return loss
