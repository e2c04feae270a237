"""A model on disk whose weights are not read yet: its config, its processor, and a function that copies the weights.

`fill_vision` and `fill_decoder` copy a part of it into another model.
"""

from collections.abc import Callable, Iterable
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


def fill_vision(places: Places, stored: Stored):
    """Copy the image encoder of a stored model into that of another; what that goes without is left out."""
    _fill(places, stored, "vision.")


@torch.no_grad()
def fill_decoder(places: Places, stored: Stored, ids: Iterable[int]):
    """Copy the decoder of a stored model into that of another, whose vocabulary may be larger.

    `ids` are the tokens of the other. The rows of new tokens, and rows that the file lacks, become the mean of the rows
    that the file's own tokens use, plus noise of 1 % of their standard deviation, so that the old tokens stay about as
    likely as before (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html). Rows of the file that no token used
    or uses stay as they are.
    """
    size, used = stored.config.decoder.vocab_size, stored.processor.token_ids()
    taken = sorted(i for i in set(ids).difference(used) if i < size)
    tables = {
        name: places[name] for name in ("decoder.embed_tokens.weight", "decoder.lm_head.weight") if name in places
    }
    # Whole, for the mean, as a rank may hold only some rows.
    olds = {name: torch.empty(size, *table.shape[1:], dtype=table.dtype) for name, table in tables.items()}
    _fill(places | olds, stored, "decoder.")
    for name, table in tables.items():
        old = olds[name]
        trained = old[used]
        noise = torch.randn(len(taken) + len(table) - size, *table.shape[1:], dtype=table.dtype)
        new = trained.mean(0) + 0.01 * trained.std(0) * noise
        old[taken] = new[: len(taken)]
        table[:size].copy_(old)
        table[size:].copy_(new[len(taken) :])


def _fill(places, stored, prefix):
    """Copy the weights whose names begin with `prefix`; the others are checked and not read."""
    theirs = meta_model(stored.config).state_dict()
    stored.fill(theirs | {name: places[name] for name in theirs if name.startswith(prefix) and name in places})
