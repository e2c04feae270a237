"""What a run learns: (model, batch, extras) -> sum of losses over trained tokens.

`train.py` divides by the number of trained tokens of the whole step, over all its micro-batches. `extras` lives as
long as the step, for what the next micro-batch, the optimizer step or the metrics need.
"""

from torch import Tensor

from nanovlm.data.types import Batch
from nanovlm.losses import next_token_loss, router_loss
from nanovlm.model.vlm import VLM, Extras


def next_token(model: VLM, batch: Batch, extras: Extras | None = None) -> Tensor:
    """Predict every trained token from the tokens before it; with a mixture of experts, keep its load even."""
    extras = extras or Extras()
    hidden = model(batch, extras=extras).flatten(0, 1)[batch.trained]
    labels, backend = batch.labels.flatten()[batch.trained], model.config.decoder.cross_entropy
    loss = next_token_loss(hidden, labels, model.decoder.head_weight, backend=backend)
    moe = model.config.decoder.moe
    if moe is not None:
        balance = len(batch.trained) * router_loss(extras, batch.doc_ids >= 0, moe)
        extras.router_loss = extras.router_loss + balance.detach()
        loss = loss + balance
    return loss


OBJECTIVES = {"next_token": next_token}
