"""What a run learns: (model, batch, extras) -> sum of losses over trained tokens.

`train.py` divides by the number of trained tokens of the whole step, over all its micro-batches. `extras` is a dict
that lives as long as the step, for what the next micro-batch, the optimizer step or the metrics need.
"""

from torch import Tensor

from nanovlm.data.types import IGNORE, Batch
from nanovlm.losses import next_token_loss, router_loss
from nanovlm.model.vlm import VLM


def next_token(model: VLM, batch: Batch, extras: dict | None = None) -> Tensor:
    """Predict every trained token from the tokens before it; with a mixture of experts, keep its load even."""
    extras = {} if extras is None else extras
    loss = next_token_loss(model(batch, extras=extras), batch.labels, model.decoder.head_weight)
    moe = model.config.decoder.moe
    if moe is not None:
        loss = loss + (batch.labels != IGNORE).sum() * router_loss(extras, batch.doc_ids >= 0, moe)
    return loss


OBJECTIVES = {"next_token": next_token}
