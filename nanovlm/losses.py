"""Hidden states and labels -> loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm.config import MoEConfig
from nanovlm.data.types import IGNORE


def next_token_loss(hidden: Tensor, labels: Tensor, head_weight: Tensor) -> Tensor:
    """Return the sum of cross-entropies over trained positions, in nats, fp32 scalar.

    `hidden` [B, T, D], `labels` int64[B, T] already shifted, `head_weight` [V, D]. Logits exist only at trained
    positions. With none the sum is 0 and so are all gradients.
    """
    is_trained = labels != IGNORE
    logits = F.linear(hidden[is_trained], head_weight)
    return F.cross_entropy(logits.float(), labels[is_trained], reduction="sum")


def load_balancing_loss(shares: Tensor, is_token: Tensor, load: Tensor, num_tokens: Tensor) -> Tensor:
    """E * sum over experts of f P: least, k, when all are equal (Fedus et al. 2021, arXiv 2101.03961, eq. 4).

    f is the load [E] over num_tokens, a constant; P the mean over tokens of the router's shares fp32[R, E]. With the
    load of a whole step in place of one micro-batch, experts may specialise in a batch (arXiv 2501.11873).
    """
    mean_shares = (shares * is_token[:, None]).sum(0) / is_token.sum().clamp(min=1)
    return len(load) * (load / num_tokens.clamp(min=1) * mean_shares).sum()


def router_z_loss(logits: Tensor, is_token: Tensor) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of router logits fp32[R, E] (Zoph et al. 2022, arXiv 2202.08906)."""
    return (logits.logsumexp(-1).square() * is_token).sum() / is_token.sum().clamp(min=1)


def router_loss(extras: dict, is_token: Tensor, config: MoEConfig) -> Tensor:
    """Mean over layers of the balance loss and z-loss with their weights; `is_token` bool[B, T] is False on padding.

    `extras` holds "routing" of this micro-batch. "load" [L, E] and "num_tokens" grow in it over the micro-batches of a
    step.
    """
    is_token = is_token.flatten()
    loads = torch.stack([r.load for r in extras["routing"]])
    extras["load"] = extras.get("load", 0) + loads
    extras["num_tokens"] = extras.get("num_tokens", 0) + is_token.sum()
    if config.balance == "global_loss":
        loads, num_tokens = extras["load"], extras["num_tokens"]
    else:
        num_tokens = is_token.sum()
    total = torch.zeros((), device=is_token.device)
    for routing, load in zip(extras["routing"], loads, strict=True):
        if config.balance in ("loss", "global_loss"):
            total = total + config.balance_weight * load_balancing_loss(routing.shares, is_token, load, num_tokens)
        if config.z_weight:
            total = total + config.z_weight * router_z_loss(routing.logits, is_token)
    return total / len(loads)
