"""What a run learns: (model, batch) -> sum of losses over trained tokens.

`train.py` divides by the number of trained tokens of the whole step, over all its micro-batches.
"""

from torch import Tensor

from nanovlm.data.types import Batch
from nanovlm.losses import next_token_loss
from nanovlm.model.vlm import VLM


def next_token(model: VLM, batch: Batch) -> Tensor:
    """Predict every trained token from the tokens before it."""
    return next_token_loss(model(batch), batch.labels, model.decoder.head_weight)


OBJECTIVES = {"next_token": next_token}
