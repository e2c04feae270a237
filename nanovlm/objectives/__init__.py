"""What a run learns. To add an objective, write a file of its own and an entry of OBJECTIVES."""

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from nanovlm.config import SamplingConfig, TrainConfig, pick
from nanovlm.data.chat import Processor
from nanovlm.data.types import Batch, Document
from nanovlm.errors import UserError
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.contrastive import Contrastive
from nanovlm.objectives.distill import Distill
from nanovlm.objectives.group import Group
from nanovlm.objectives.masked import Masked
from nanovlm.objectives.next_token import NextToken
from nanovlm.objectives.online import OnlinePreference
from nanovlm.objectives.own import OwnAnswer, Question
from nanovlm.objectives.ppo import PPO
from nanovlm.objectives.preference import Preference
from nanovlm.objectives.reward import Reward


class Objective(Protocol):
    """What a run learns. Made once a run, on every rank; may hold what it needs, such as a teacher.

    The loss of a step is the sum over its micro-batches and ranks, divided by the units in all of them, so that it does
    not depend on how documents fall into micro-batches.
    """

    # What it learns from: the answers of records; these and what records bring of a teacher; pairs, records of a chosen
    # and a rejected answer; captions, records of a picture and a text, all those of a step together; or own, answers of
    # the model itself, which train/rollouts.py samples: then it is a LearnsFromOwn.
    @property
    def learns_from(self) -> Literal["answers", "teacher", "pairs", "captions", "own"]: ...

    # Tensors that change during the run, equal on all ranks; checkpoints keep them. Those that are parameters learn
    # beside the model, at optim.lr, and are no part of what is saved of it; a step adds extras.sums to the others.
    # Beside them frozen.NAME, the fingerprint of a model that is read by name: the same one when a run goes on.
    state: dict[str, Tensor]

    def count(self, batch: Batch) -> int:
        """Return the units of a batch that the loss is divided by: trained tokens, or pairs, or groups."""
        ...

    def loss(self, model: VLM, batch: Batch, extras: Extras) -> Tensor:
        """Return the sum of the losses of these units; `extras` lives as long as the step."""
        ...


class LearnsFromOwn(Objective, Protocol):
    """An objective that says how answers are sampled, and what is learned from them."""

    sampling: SamplingConfig
    # Answers to each question, and optimizer steps on one set of them.
    num_answers: int
    num_updates: int

    def documents(self, groups: list[tuple[Question, list[OwnAnswer]]], extras: Extras) -> list[Document | None]:
        """Return what is learned from the answers to each question, or None; `extras` receives metrics.

        All ranks call this at the same time, with or without questions.
        """
        ...

    def prepare(self, model: VLM, batches: list[Batch], extras: Extras):
        """Add what the model itself must say to this rank's batches of these documents, before a step on them.

        All ranks call this at the same time, with or without batches, without gradients or noise.
        """
        ...


OBJECTIVES: dict[str, Callable[[TrainConfig, Processor, torch.device], Objective]] = {
    "next_token": NextToken,
    "preference": Preference,
    "reward": Reward,
    "distill": Distill,
    "group": Group,
    "ppo": PPO,
    "online_preference": OnlinePreference,
    "contrastive": Contrastive,
    "masked": Masked,
}

# Names under which one may look for an objective, and what chooses it here.
METHODS = {
    "sft": "next_token",
    "clip": "contrastive --contrastive.loss softmax",
    "siglip": "contrastive",
    "mae": "masked",
    "dpo": "preference",
    **{name: f"preference --preference.losses {name}" for name in ("ipo", "simpo", "bco", "mpo")},
    "reward_model": "reward",
    "online_dpo": "online_preference",
    "dapo": "group",
    "grpo": "group --group.loss-type grpo",
    "dr_grpo": "group --group.loss-type dr_grpo --group.advantages mean",
    "gspo": "group --group.importance-sampling-level sequence --group.loss-type grpo",
    "rloo": "group --group.advantages leave_one_out --group.importance-sampling-level product --group.loss-type grpo",
}


def find_objective(name: str) -> Callable[[TrainConfig, Processor, torch.device], Objective]:
    """Return an entry of OBJECTIVES. Raises UserError that says which there are, or by which one a method is chosen."""
    if name in METHODS and name not in OBJECTIVES:
        raise UserError(f"objective = {name!r} is unknown; that method is --objective {METHODS[name]}")
    return pick(OBJECTIVES, name, "objective")
