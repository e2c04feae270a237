"""Batch of pairs -> sum of their losses. A pair is a document with two branches, a chosen and a rejected answer.

With l the log-probability of an answer (a sum over its tokens), r that under the reference, n its number of tokens, and
h = (l_c - r_c) - (l_r - r_r), the losses of a pair are

    dpo      -log sigmoid(beta h), with label smoothing e (1 - e) times that and e times that of -h    arXiv 2305.18290
    ipo      ((l_c - r_c) / n_c - (l_r - r_r) / n_r - 1 / (2 beta))^2                                  arXiv 2310.12036
    simpo    -log sigmoid(beta (l_c / n_c - l_r / n_r) - gamma)                                        arXiv 2405.14734
    bco      -log sigmoid(x_c - delta) - log sigmoid(-(x_r - delta)), x = beta (l - r)                 arXiv 2404.04656
    sft      -l_c / n_c

delta is the mean of all x of the steps before. MPO (arXiv 2411.10442) is 0.8 dpo + 0.2 bco + 1.0 sft.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovlm.config import PreferenceConfig, TrainConfig, pick
from nanovlm.data.chat import Processor
from nanovlm.data.types import Batch
from nanovlm.errors import UserError
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.logprobs import batch_logprobs, find_branches
from nanovlm.objectives.next_token import balance
from nanovlm.objectives.reference import make_reference


class Pairs(NamedTuple):
    """What is known of P pairs, chosen in the first column and rejected in the second."""

    # fp32[P, 2]: sums over the tokens of an answer, by the model and by the reference, 0 where there is none.
    logprobs: Tensor
    references: Tensor
    # int64[P, 2]: trained tokens.
    lengths: Tensor
    # fp32 scalar: bco's delta.
    shift: Tensor

    @property
    def ratios(self) -> Tensor:
        """fp32[P, 2]: log-probabilities above those of the reference."""
        return self.logprobs - self.references


class Preference:
    """Prefer the chosen answer of each pair to the rejected one; a unit is a pair."""

    learns_from: Literal["pairs"] = "pairs"

    def __init__(self, config: TrainConfig, processor: Processor, device: torch.device):
        self.config, self.weights = config.preference, config.preference.weights
        self.losses = {name: pick(LOSSES, name, "preference.losses") for name in self.weights}
        self.has_reference = any(loss.needs_reference for loss in self.losses.values())
        self.reads_reference = self.has_reference and self.config.reference == "records"
        # Of the rewards of all steps so far: their sum and their number.
        self.state = {"rewards": torch.zeros(2, dtype=torch.float64, device=device)} if "bco" in self.losses else {}
        self.reference = None
        if self.has_reference and not self.reads_reference:
            self.reference = make_reference(config, self.config.reference, processor, device, self.state)

    def count(self, batch: Batch) -> int:
        """Count pairs. Raises UserError if a record brings no log-probabilities and they are needed."""
        if self.reads_reference and batch.value("ref_logprobs").isnan().any():
            raise UserError(
                "preference.reference = records, but a record brings no ref_chosen_logps and ref_rejected_logps: "
                "python -m nanovlm.data.build reference writes them"
            )
        return len(find_branches(batch).lengths) // 2

    def loss(self, model: VLM, batch: Batch, extras: Extras) -> Tensor:
        """Return the sum of the losses of all pairs, and add metrics of the answers to `extras`.

        Rewards are beta times the log-probability above the reference's, of the mean token where there is none.
        """
        by_reference = None if self.reference is None else self.reference(model, batch)
        logprobs, branches = batch_logprobs(model, batch, extras), find_branches(batch)
        references = batch.value("ref_logprobs") if self.reads_reference else by_reference
        if references is None:
            references = torch.zeros_like(logprobs)
        sums, lengths = branches.sum(logprobs).view(-1, 2), branches.lengths.view(-1, 2)
        pairs = Pairs(sums, branches.sum(references).view(-1, 2), lengths, self.shift(logprobs))
        total, num_pairs = sums.new_zeros(()), len(sums)
        for name, loss in self.losses.items():
            each = loss.of(pairs, self.config)
            total = total + self.weights[name] * each.sum()
            extras.add(f"loss_{name}", each.sum(), num_pairs)
        rewards = self.config.beta * (pairs.ratios if self.has_reference else sums / lengths).detach()
        if "bco" in self.losses:
            added = torch.stack((rewards.sum(), rewards.new_tensor(rewards.numel()))).double()
            extras.sums["rewards"] = extras.sums.get("rewards", 0) + added
        chosen, rejected = rewards.unbind(1)
        extras.add("preference_accuracy", (chosen > rejected).sum(), num_pairs)
        extras.add("margin", (chosen - rejected).sum(), num_pairs)
        for column, side in enumerate(("chosen", "rejected")):
            extras.add(f"rewards_{side}", rewards[:, column].sum(), num_pairs)
            extras.add(f"logps_{side}", sums[:, column].sum(), num_pairs)
            extras.add(f"length_{side}", lengths[:, column].sum(), num_pairs)
        if by_reference is not None:
            # k3 (joschu.net/blog/kl-approx.html), of the tokens of the data in place of the model's own.
            difference = by_reference - logprobs.detach()
            extras.add("kl", (difference.exp() - 1 - difference).sum(), len(logprobs))
        return total + balance(model, batch, extras, num_pairs)

    def shift(self, like: Tensor) -> Tensor:
        """Return bco's delta, in the dtype of `like`."""
        if "bco" not in self.losses:
            return like.new_zeros(())
        total, number = self.state["rewards"].to(like.dtype)
        return total / number.clamp(min=1)


class Loss(NamedTuple):
    """A loss of pairs; `of` returns fp32[P]."""

    of: Callable[[Pairs, PreferenceConfig], Tensor]
    needs_reference: bool = True


def dpo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    chosen, rejected = pairs.ratios.unbind(1)
    return smooth(config.beta * (chosen - rejected), config.label_smoothing)


def ipo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    chosen, rejected = (pairs.ratios / pairs.lengths).unbind(1)
    return (chosen - rejected - 1 / (2 * config.beta)).square()


def simpo(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    chosen, rejected = (pairs.logprobs / pairs.lengths).unbind(1)
    return smooth(config.beta * (chosen - rejected) - config.gamma, config.label_smoothing)


def bco(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    chosen, rejected = (config.beta * pairs.ratios - pairs.shift).unbind(1)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sft(pairs: Pairs, config: PreferenceConfig) -> Tensor:
    return -pairs.logprobs[:, 0] / pairs.lengths[:, 0]


def smooth(x: Tensor, smoothing: float) -> Tensor:
    """Return -log sigmoid(x), of -x for a share of the pairs (Mitchell 2023, ericmitchell.ai/cdpo.pdf)."""
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


LOSSES = {
    "dpo": Loss(dpo),
    "ipo": Loss(ipo),
    "simpo": Loss(simpo, needs_reference=False),
    "bco": Loss(bco),
    "sft": Loss(sft, needs_reference=False),
}
