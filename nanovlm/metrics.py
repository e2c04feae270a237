"""Routings -> numbers: how evenly a mixture of experts is used, and by what."""

import math

import torch
from torch import Tensor

from nanovlm.model.moe import Routing, expert_load


class RoutingStats:
    """Counts of L mixtures of E experts, added up over batches; they stay on the device until `summary`.

    `load` fp32[L, E] counts the tokens that chose each expert, `image_load` those that stand for images.
    """

    def __init__(self):
        self.load = self.image_load = self.confidence = self.dropped = self.num_tokens = 0

    @torch.no_grad()
    def update(self, routings: list[Routing], is_token: Tensor, is_image: Tensor):
        """Add the routings of a batch; is_token and is_image bool[B, T], the first False on padding."""
        is_token, is_image = is_token.flatten(), (is_image & is_token).flatten()
        self.load = self.load + torch.stack([r.load for r in routings])
        self.image_load = self.image_load + torch.stack(
            [expert_load(r.choice, is_image, len(r.load)) for r in routings]
        )
        best = torch.stack([(r.shares.amax(-1) * is_token).sum() for r in routings])
        self.confidence = self.confidence + best
        self.dropped = self.dropped + torch.stack([(~r.is_kept).sum() for r in routings])
        self.num_tokens = self.num_tokens + is_token.sum()

    def summary(self) -> dict:
        """Return plain numbers.

        - expert_load [L][E]: share of the routed tokens, 1 / E when even
        - max_load [L]: the largest load over the mean one, 1 when even
        - load_entropy [L]: entropy of the load over its largest possible, 1 when even
        - router_confidence [L]: mean share that the router gives a token's likeliest expert
        - dropped_tokens: tokens times experts that found no room
        - image_share [L][E]: of the tokens that an expert receives, those that stand for images
        """
        share = self.load / self.load.sum(-1, keepdim=True)
        num_experts = share.shape[-1]
        entropy = -(share * share.clamp(min=1e-20).log()).sum(-1)
        numbers = {
            "expert_load": share,
            "max_load": share.amax(-1) * num_experts,
            "load_entropy": entropy / math.log(num_experts) if num_experts > 1 else torch.ones_like(entropy),
            "router_confidence": self.confidence / self.num_tokens,
            "dropped_tokens": self.dropped.sum(),
            "image_share": self.image_load / self.load.clamp(min=1),
        }
        return {name: _round(tensor.tolist()) for name, tensor in numbers.items()}


def _round(value):
    return [_round(x) for x in value] if isinstance(value, list) else round(value, 4)
