"""Batch of pairs -> sum of -log sigmoid(r_chosen - r_rejected): a reward model (Bradley & Terry; arXiv 2203.02155).

The reward r of an answer is what the score head makes of the hidden state at its end token.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from nanovlm.data.types import Batch
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.logprobs import find_branches
from nanovlm.objectives.next_token import balance


class Reward:
    """Give the chosen answer of each pair a higher reward than the rejected one; a unit is a pair."""

    learns_from: Literal["pairs"] = "pairs"

    def __init__(self, config=None, processor=None, device=None):
        self.state = {}

    def count(self, batch: Batch) -> int:
        return len(find_branches(batch).lengths) // 2

    def loss(self, model: VLM, batch: Batch, extras: Extras) -> Tensor:
        chosen, rejected = score_branches(model, batch, extras).view(-1, 2).unbind(1)
        num_pairs = len(chosen)
        extras.add("preference_accuracy", (chosen > rejected).sum(), num_pairs)
        extras.add("margin", (chosen - rejected).sum(), num_pairs)
        extras.add("rewards_chosen", chosen.sum(), num_pairs)
        extras.add("rewards_rejected", rejected.sum(), num_pairs)
        loss = -F.logsigmoid(chosen - rejected).sum()
        if not model.config.decoder.tie_word_embeddings and model.training:
            loss = loss + 0 * model.decoder.head_weight.sum()  # ranks expect a gradient of whatever learns
            extras.unreached = ("decoder.lm_head",)
        return loss + balance(model, batch, extras, num_pairs)


def score_branches(model: VLM, batch: Batch, extras: Extras | None = None) -> Tensor:
    """Return the reward of each branch that has trained tokens, fp32[G] in the order of `find_branches`.

    It is read at the token that the last trained position predicts, the end of the answer, or at that position where
    the branch ends with it.
    """
    hidden, branches = model(batch, extras=extras).flatten(0, 1), find_branches(batch)
    last = batch.trained[branches.lengths.cumsum(0) - 1]
    documents, numbers, after = (
        batch.doc_ids.flatten(),
        batch.branch_ids.flatten(),
        (last + 1).clamp(max=len(hidden) - 1),
    )
    is_same = (documents[after] == documents[last]) & (numbers[after] == numbers[last])
    x_GD = hidden[after.where(is_same, last)]
    return (x_GD.float() * model.score.weight.float()).sum(-1)  # in fp32 under autocast too
