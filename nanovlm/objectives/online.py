"""Answers of the model itself -> rewards -> pairs -> the losses of preferences (online DPO, arXiv 2402.04792)."""

from typing import Literal

import torch
from torch import Tensor

from nanovlm.config import SamplingConfig, TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.data.types import Batch, Document
from nanovlm.errors import UserError
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.next_token import NextToken
from nanovlm.objectives.own import OwnAnswer, Question, make_document
from nanovlm.objectives.preference import Preference
from nanovlm.objectives.reference import add_reference
from nanovlm.objectives.rewards import open_rewards, reward_all


class OnlinePreference:
    """Prefer the best of the model's answers to a question to the worst; group says how, preference with which losses.

    The held-out loss is that of next_token: how likely the answers of records are.
    """

    learns_from: Literal["own"] = "own"

    def __init__(self, config: TrainConfig, processor: Processor, device: torch.device):
        if config.preference.reference == "records":
            raise UserError(
                "preference.reference = records must be a model: records know nothing of the model's answers"
            )
        self.preference = Preference(config, processor, device)
        self.state, self.device = self.preference.state, device
        self.reference = self.preference.reference
        if self.reference is not None:
            self.preference.reference = lambda _model, batch: batch.value("ref_logprobs")
        self.sampling = SamplingConfig(config.group.max_completion_length, config.group.temperature)
        self.num_answers, self.num_updates = config.group.num_generations, config.group.num_iterations
        self.rewards = open_rewards(config.group, processor, device, self.state)

    def documents(self, groups: list[tuple[Question, list[OwnAnswer]]], extras: Extras) -> list[Document | None]:
        documents, rewards = [], reward_all(self.rewards, groups, extras)
        for (question, answers), of_group in zip(groups, rewards, strict=True):
            pair = [answers[of_group.argmax()], answers[of_group.argmin()]]
            documents.append(make_document(question, pair) if of_group.max() > of_group.min() else None)
        return documents

    def prepare(self, model: VLM, batches: list[Batch], extras: Extras):
        """Add the reference's log-probabilities, once for all the steps on these batches."""
        if self.reference is not None:
            add_reference(self.reference, model, batches, self.device)

    def count(self, batch: Batch) -> int:
        return self.preference.count(batch) if "old_logprobs" in batch.values else len(batch.trained)

    def loss(self, model: VLM, batch: Batch, extras: Extras) -> Tensor:
        return (self.preference if model.training else NextToken()).loss(model, batch, extras)
