"""Answers of the model itself -> rewards -> advantages over what was expected -> a policy gradient (PPO, 1707.06347).

```
reward of a token    r = beta (reference - sampling), of its log-probabilities; at its end plus the answer's reward
value of a token     V, what these are expected to sum up to from it on: a linear head on the hidden state before it
advantage            A_t = r_t + gamma V_t+1 - V_t + gamma lam A_t+1, whitened over the step        (GAE, 1506.02438)
return               R = A + V, before A is whitened
loss of a token      -min(w A, clip(w) A), as that of a group, + vf_coef max((V - R)^2, (V' - R)^2) / 2
                     V' = V, but at most cliprange_value away from that of the sampling
```

How answers are sampled, rewarded and kept near the sampling and the reference is said by group, so that the two can be
compared; a token has a baseline of its own where a group has one for each answer. Names and defaults are those of TRL.
The value head is no part of the model: it is in checkpoints, and what is published is the policy.
Legend: N trained tokens, G branches.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from nanovlm import distributed
from nanovlm.config import TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.data.types import Batch, Document
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.group import Group, estimate_kl, group_losses, make_documents, tell_ratios
from nanovlm.objectives.logprobs import find_branches, token_logprobs
from nanovlm.objectives.next_token import NextToken, balance
from nanovlm.objectives.own import OwnAnswer, Question
from nanovlm.objectives.rewards import reward_all


class PPO:
    """Make tokens after which answers earn more than was expected more likely, and learn what to expect.

    The held-out loss is that of next_token: how likely the answers of records are.
    """

    learns_from: Literal["own"] = "own"

    def __init__(self, config: TrainConfig, processor: Processor, device: torch.device):
        self.config, self.group = config.ppo, Group(config, processor, device)
        self.sampling, self.num_answers = self.group.sampling, self.group.num_answers
        self.num_updates = self.group.num_updates
        self.value_head = nn.Parameter(torch.zeros(config.model.decoder.hidden_size, device=device))
        self.state: dict[str, Tensor] = {"value_head": self.value_head, **self.group.state}

    def documents(self, groups: list[tuple[Question, list[OwnAnswer]]], extras: Extras) -> list[Document | None]:
        """Return the answers, whose `weights` are their rewards."""
        return make_documents(groups, reward_all(self.group.rewards, groups, extras), self.group.config)

    def prepare(self, model: VLM, batches: list[Batch], extras: Extras):
        """Add the `values` that the policy of the sampling expects and the `returns`; `weights` become advantages."""
        appraised = [self.appraise(model, batch) for batch in batches]
        _, returns, advantages, gaps = torch.cat((torch.zeros(4, 0), *appraised), dim=1)
        all_returns, all_advantages = torch.cat(distributed.gather(torch.stack((returns, advantages))), dim=1)
        errors = (advantages - all_advantages.mean()).square().sum()  # as an advantage is return - value
        spread = (returns - all_returns.mean()).square().sum()
        extras.add("explained_variance", spread - errors, spread)
        if self.group.reference is not None:
            extras.add("kl", estimate_kl(gaps).sum(), len(gaps))
        for batch, (v, r, a, _) in zip(batches, appraised, strict=True):
            for name, numbers in (("values", v), ("returns", r), ("weights", whiten(a, all_advantages))):
                places = torch.zeros(batch.labels.numel())
                batch.values[name] = places.index_copy(0, batch.trained, numbers).view_as(batch.labels)

    def appraise(self, model: VLM, batch: Batch) -> Tensor:
        """Return values, returns, advantages and reference - sampling of log-probabilities, fp32[4, N] on the CPU."""
        here, old = batch.to(self.value_head.device), batch.value("old_logprobs")
        values = self.estimate_values(model(here).flatten(0, 1)[here.trained]).cpu()
        gaps = torch.zeros_like(old)
        if self.group.reference is not None:
            gaps = self.group.reference(model, here).cpu() - old
        rewards, ends = self.group.config.beta * gaps, find_branches(batch).lengths.cumsum(0) - 1
        rewards[ends] += batch.value("weights")[ends]
        advantages = estimate_advantages(rewards, values, ends, self.config.gamma, self.config.lam)
        return torch.stack((values, advantages + values, advantages, gaps))

    def estimate_values(self, hidden: Tensor) -> Tensor:
        """Hidden states [N, D] -> values fp32[N], under autocast too."""
        return (hidden.float() * self.value_head).sum(-1)

    def count(self, batch: Batch) -> int:
        return self.group.count(batch)

    def loss(self, model: VLM, batch: Batch, extras: Extras) -> Tensor:
        if not model.training:
            return NextToken().loss(model, batch, extras)
        group, old, branches = self.group, batch.value("old_logprobs"), find_branches(batch)
        hidden, labels = model(batch, extras=extras).flatten(0, 1)[batch.trained], batch.labels.flatten()[batch.trained]
        head = model.decoder.head_weight
        logprobs = token_logprobs(hidden / group.config.temperature, labels, head, group.never)
        losses, clipped = group_losses(logprobs, old, batch.value("weights"), branches, group.config)
        errors, unfollowed = value_losses(
            self.estimate_values(hidden), batch.value("values"), batch.value("returns"), self.config.cliprange_value
        )
        tell_ratios(extras, logprobs, old, clipped)
        extras.add("value_loss", errors.sum(), len(old))
        extras.add("value_clip_fraction", unfollowed.sum(), len(old))
        total = group.loss_type.sum(branches, losses + self.config.vf_coef * errors, group.config)
        return total + balance(model, batch, extras, group.loss_type.count(branches))


def estimate_advantages(rewards: Tensor, values: Tensor, ends: Tensor, gamma: float, lam: float) -> Tensor:
    """Return the advantage of each token by the generalised estimate (arXiv 1506.02438, eq. 16), [N].

    `rewards` and `values` are [N], `ends` int64[G] the last token of each answer, after which nothing is expected.
    """
    r, v, last = rewards.tolist(), values.tolist(), set(ends.tolist())
    found, advantage, following = [0.0] * len(r), 0.0, 0.0
    for t in reversed(range(len(r))):
        if t in last:
            advantage = following = 0.0
        advantage = r[t] + gamma * following - v[t] + gamma * lam * advantage
        found[t], following = advantage, v[t]
    return rewards.new_tensor(found)


def whiten(x: Tensor, everywhere: Tensor) -> Tensor:
    """Shift and scale [N] to mean 0 and variance 1 of all ranks' numbers; a single one has no variance, and stays."""
    if len(everywhere) < 2:
        return x
    return (x - everywhere.mean()) * (everywhere.var() + 1e-8).rsqrt()


def value_losses(values: Tensor, old: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Return half the square error of each value, and whether it is that of the clipped value, [N] each.

    All arguments are [N]; `old` are the values when the answers were sampled.
    """
    errors = (values - returns).square()
    bounded = (values.clamp(old - cliprange, old + cliprange) - returns).square()
    return 0.5 * torch.maximum(errors, bounded), bounded > errors
