"""A model on disk whose weights are not read yet: its config, its processor, and a function that copies the weights."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from nanovlm.config import VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.model.build import meta_model
from nanovlm.model.vlm import VLM
from nanovlm.sharded import Places


class Stored(NamedTuple):
    config: VLMConfig
    processor: Processor
    # A dtype that holds the weights exactly.
    dtype: torch.dtype
    # Copies the weights tensor by tensor into memory that is already allocated, by the names in our state dict
    # (sharded.py). Raises UserError that names tensors that are missing, unknown or of the wrong shape; on the meta
    # device that is all it does.
    fill: Callable[[Places], None]


def read_model(stored: Stored, device: str | torch.device, dtype: torch.dtype | None) -> tuple[VLM, Processor]:
    """Read the weights into a new model in evaluation mode, in `stored.dtype` unless another is given."""
    model = meta_model(stored.config).to(dtype or stored.dtype)
    stored.fill(model.state_dict())  # before memory is taken for whatever a config claims
    model.to_empty(device=device)
    stored.fill(model.state_dict())
    return model.eval(), stored.processor
