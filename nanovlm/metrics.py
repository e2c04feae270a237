"""Routings -> numbers: how evenly a mixture of experts is used, and by what."""

import torch
from torch import Tensor

from nanovlm.losses import expert_load
from nanovlm.model.moe import Routing


class RoutingStats:
    """Counts of L mixtures of E experts, added up over batches.

    `load` fp32[L, E] counts the tokens of each expert, `image_load` those that stand for images.
    """

    def __init__(self):
        self.load = self.image_load = self.confidence = self.dropped = 0
        self.num_tokens = self.num_images = 0

    @torch.no_grad()
    def update(self, routings: list[Routing], is_token: Tensor, is_image: Tensor):
        """Add the routings of a batch; is_token and is_image bool[B, T], the first False on padding."""
        is_token, is_image = is_token.flatten(), (is_image & is_token).flatten()
        num_experts = routings[0].logits.shape[-1]
        self.load = self.load + torch.stack([expert_load(r.choice, is_token, num_experts) for r in routings])
        self.image_load = self.image_load + torch.stack(
            [expert_load(r.choice, is_image, num_experts) for r in routings]
        )
        best = torch.stack([(r.shares.amax(-1) * is_token).sum() for r in routings])
        self.confidence = self.confidence + best
        self.dropped = self.dropped + torch.stack([((r.weights == 0) & is_token[:, None]).sum() for r in routings])
        self.num_tokens = self.num_tokens + is_token.sum()
        self.num_images = self.num_images + is_image.sum()

    def summary(self) -> dict:
        """Return plain numbers.

        - expert_load [L][E]: share of the routed tokens, 1 / E when even
        - max_load [L]: the largest load over the mean one, 1 when even
        - load_entropy [L]: entropy of the load over its largest possible, 1 when even
        - router_confidence [L]: mean share that the router gives a token's first expert
        - dropped_tokens: tokens times experts that found no room
        - image_share [L][E]: of the tokens that an expert receives, those that stand for images
        """
        share = self.load / self.load.sum(-1, keepdim=True)
        entropy = -(share * share.clamp(min=1e-20).log()).sum(-1) / torch.tensor(float(share.shape[-1])).log()
        numbers = {
            "expert_load": share,
            "max_load": share.amax(-1) * share.shape[-1],
            "load_entropy": entropy,
            "router_confidence": self.confidence / self.num_tokens,
            "dropped_tokens": self.dropped.sum(),
            "image_share": self.image_load / self.load.clamp(min=1),
        }
        return {name: _round(tensor.tolist()) for name, tensor in numbers.items()}


def _round(value):
    return [_round(x) for x in value] if isinstance(value, list) else round(value, 4)
