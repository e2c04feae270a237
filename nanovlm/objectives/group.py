"""Answers of the model itself -> rewards -> advantages -> a policy gradient (GRPO and its relatives).

```
rewards r of the G answers to a question            advantage A = (r - mean) / (std + 1e-4)
log-probabilities of their tokens, new and old      ratio w = exp(new - old)
loss of a token   -min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A) + beta KL(model, reference)
```

DeepSeekMath's GRPO (arXiv 2402.03300, eq. 3 and 4), with the names and the defaults of TRL: token means over the whole
step and clip-higher (DAPO, 2503.14476), no division by length and standard deviation (Dr. GRPO, 2503.20783), ratios of
sequences (GSPO, 2507.18071), and RLOO (2402.14740): advantages = leave_one_out, importance_sampling_level = product,
loss_type = grpo.

All log-probabilities are those of the distribution that answers are sampled from: at group.temperature, without the
tokens that sampling never emits. Legend: N trained tokens, G branches.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nanovlm import distributed
from nanovlm.config import GroupConfig, SamplingConfig, TrainConfig, pick
from nanovlm.data.chat import Processor
from nanovlm.data.types import Batch, Document
from nanovlm.infer.sampling import find_never
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.logprobs import Branches, batch_logprobs, find_branches
from nanovlm.objectives.next_token import NextToken, balance
from nanovlm.objectives.own import OwnAnswer, Question, make_document
from nanovlm.objectives.reference import add_reference, make_reference
from nanovlm.objectives.rewards import deviations, open_rewards, reward_all


class Group:
    """Make answers that are rewarded more than others to the same question more likely.

    The held-out loss is that of next_token: how likely the answers of records are.
    """

    learns_from: Literal["own"] = "own"

    def __init__(self, config: TrainConfig, processor: Processor, device: torch.device):
        self.config, self.state, self.device = config.group, {}, device
        self.sampling = SamplingConfig(self.config.max_completion_length, self.config.temperature)
        self.num_answers, self.num_updates = self.config.num_generations, self.config.num_iterations
        self.rewards = open_rewards(self.config, processor, device, self.state)
        self.advantages = pick(ADVANTAGES, self.config.advantages, "group.advantages")
        self.loss_type = pick(LOSS_TYPES, self.config.loss_type, "group.loss_type")
        pick(LEVELS, self.config.importance_sampling_level, "group.importance_sampling_level")
        self.never = tuple(find_never(config.model))
        self.reference = None
        if self.config.beta:
            self.reference = make_reference(config, self.config.reference, processor, device, self.state, self.never)

    def documents(self, groups: list[tuple[Question, list[OwnAnswer]]], extras: Extras) -> list[Document | None]:
        return make_documents(groups, self.advantages(reward_all(self.rewards, groups, extras)), self.config)

    def prepare(self, model: VLM, batches: list[Batch], extras: Extras):
        """Add the reference's log-probabilities, once for all the steps on these batches."""
        if self.reference is not None:
            add_reference(self.reference, model, batches, self.device)

    def count(self, batch: Batch) -> int:
        return self.loss_type.count(find_branches(batch)) if "old_logprobs" in batch.values else len(batch.trained)

    def loss(self, model: VLM, batch: Batch, extras: Extras) -> Tensor:
        if not model.training:
            return NextToken().loss(model, batch, extras)
        reference = None if self.reference is None else batch.value("ref_logprobs")
        logprobs = batch_logprobs(model, batch, extras, self.never, self.config.temperature)
        old, branches = batch.value("old_logprobs"), find_branches(batch)
        losses, clipped = group_losses(logprobs, old, batch.value("weights"), branches, self.config, reference)
        tell_ratios(extras, logprobs, old, clipped)
        if reference is not None:
            extras.add("kl", estimate_kl(reference - logprobs.detach()).sum(), len(old))
        total = self.loss_type.sum(branches, losses, self.config)
        return total + balance(model, batch, extras, self.loss_type.count(branches))


def make_documents(
    groups: list[tuple[Question, list[OwnAnswer]]], weights: Tensor, config: GroupConfig
) -> list[Document | None]:
    """Return a document of the answers to each question, whose `weights` [Q, G] go to all their tokens.

    None where the config leaves out all the answers to a question.
    """
    documents = []
    for (question, answers), of_group in zip(groups, weights.tolist(), strict=True):
        kept = [
            (answer, weight)
            for answer, weight in zip(answers, of_group, strict=True)
            if answer.has_ended or not config.mask_truncated_completions
        ]
        own, weight = [answer for answer, _ in kept], [weight for _, weight in kept]
        documents.append(make_document(question, own, weights=weight) if kept else None)
    return documents


def tell_ratios(extras: Extras, logprobs: Tensor, old: Tensor, clipped: Tensor):
    """Add how a policy and that of the sampling differ, and whose ratios were clipped; all are [N]."""
    num, change = len(old), logprobs.detach() - old
    extras.add("clip_fraction", clipped.sum(), num)
    extras.add("entropy", -old.sum(), num)  # estimated from the sampled tokens
    # Of the sampling and this pass: the divergence, and the mean difference.
    extras.add("sampler_kl", estimate_kl(change).sum(), num)
    extras.add("sampler_gap", change.abs().sum(), num)


def estimate_kl(change: Tensor) -> Tensor:
    """Return the estimate k3 of the divergence, of each token, from log-probabilities less those of the sampling."""
    return change.exp() - 1 - change


def group_losses(
    logprobs: Tensor,
    old: Tensor,
    weights: Tensor,
    branches: Branches,
    config: GroupConfig,
    reference: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each token, and whether its ratio was clipped, [N] each.

    All arguments are [N]: log-probabilities, those of the sampling, advantages, log-probabilities under the reference.
    The divergence from it is the estimate k3 (http://joschu.net/blog/kl-approx.html).
    """
    ratio = LEVELS[config.importance_sampling_level](branches, logprobs - old).exp()
    bounded = ratio.clamp(1 - config.epsilon, 1 + config.epsilon_high)
    losses = -torch.minimum(ratio * weights, bounded * weights)
    clipped = ((ratio < bounded) & (weights < 0)) | ((ratio > bounded) & (weights > 0))
    if reference is not None:
        losses = losses + config.beta * estimate_kl(reference - logprobs)
    return losses, clipped


# --- rewards fp32[Q, G] -> advantages fp32[Q, G] ------------------------------------------------------------------


def compare_in_group(rewards: Tensor) -> Tensor:
    return compare_with_mean(rewards) / (deviations(rewards)[:, None] + 1e-4)


def compare_in_batch(rewards: Tensor) -> Tensor:
    """Divide by the standard deviation of all rewards of the step, those of other ranks too."""
    everywhere = torch.cat([of_rank.flatten() for of_rank in distributed.gather(rewards)])
    return compare_with_mean(rewards) / (everywhere.std() + 1e-4)


def compare_with_mean(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean(1, keepdim=True)


def compare_with_others(rewards: Tensor) -> Tensor:
    return compare_with_mean(rewards) * (rewards.shape[1] / max(1, rewards.shape[1] - 1))


ADVANTAGES = {
    "group": compare_in_group,
    "batch": compare_in_batch,
    "mean": compare_with_mean,
    "leave_one_out": compare_with_others,
}

# --- differences of log-probabilities [N] -> those that are compared, [N] -----------------------------------------

LEVELS: dict[str, Callable[[Branches, Tensor], Tensor]] = {
    "token": lambda branches, change: change,
    "sequence": lambda branches, change: branches.mean(change)[branches.index],
    "product": lambda branches, change: branches.sum(change)[branches.index],
}

# --- losses of tokens [N] -> the sum that the units divide --------------------------------------------------------


class LossType(NamedTuple):
    """How many units a batch has, and the sum of their losses."""

    count: Callable[[Branches], int]
    sum: Callable[[Branches, Tensor, GroupConfig], Tensor]


def count_tokens(branches: Branches) -> int:
    return len(branches.index)


def count_answers(branches: Branches) -> int:
    return len(branches.lengths)


LOSS_TYPES = {
    "dapo": LossType(count_tokens, lambda branches, losses, config: losses.sum()),
    "grpo": LossType(count_answers, lambda branches, losses, config: branches.mean(losses).sum()),
    "dr_grpo": LossType(count_answers, lambda branches, losses, config: losses.sum() / config.max_completion_length),
}
