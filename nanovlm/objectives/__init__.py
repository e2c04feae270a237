"""What a run learns. To add an objective, write a file of its own and an entry of OBJECTIVES."""

from typing import Protocol

from torch import Tensor

from nanovlm.data.types import Batch
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives.next_token import NextToken


class Objective(Protocol):
    """What a run learns. Made once per run, without arguments; may hold what it needs, such as a teacher.

    The loss of a step is the sum over its micro-batches and ranks, divided by the units in all of them, so that it does
    not depend on how documents fall into micro-batches.
    """

    def count(self, batch: Batch) -> int:
        """Return the units of a batch that the loss is divided by: trained tokens, or pairs, or groups."""
        ...

    def loss(self, model: VLM, batch: Batch, extras: Extras) -> Tensor:
        """Return the sum of the losses of these units; `extras` lives as long as the step."""
        ...


OBJECTIVES: dict[str, type[Objective]] = {"next_token": NextToken}
