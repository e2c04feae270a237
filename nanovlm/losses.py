"""Hidden states and labels -> loss."""

import torch.nn.functional as F
from torch import Tensor

from nanovlm.data.types import IGNORE


def next_token_loss(hidden: Tensor, labels: Tensor, head_weight: Tensor) -> Tensor:
    """Return the sum of cross-entropies over trained positions, in nats, fp32 scalar.

    `hidden` [B, T, D], `labels` int64[B, T] already shifted, `head_weight` [V, D]. Logits exist only at trained
    positions. With none the sum is 0 and so are all gradients.
    """
    is_trained = labels != IGNORE
    logits = F.linear(hidden[is_trained], head_weight)
    return F.cross_entropy(logits.float(), labels[is_trained], reduction="sum")
