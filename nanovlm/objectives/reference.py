"""The model that a run's own is compared with, and its log-probabilities, which data/build/reference.py writes down."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from operator import attrgetter

import torch
from torch import Tensor

from nanovlm.config import QuantizationConfig, TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.data.types import Batch
from nanovlm.errors import UserError
from nanovlm.hub.adapters import attach
from nanovlm.hub.read import load
from nanovlm.model.adapters import disabled, is_adapter
from nanovlm.model.quantized import quantize
from nanovlm.model.vlm import VLM
from nanovlm.objectives.logprobs import batch_logprobs


def make_reference(
    config: TrainConfig,
    name: str,
    processor: Processor,
    device: torch.device,
    state: dict[str, Tensor],
    never: tuple[int, ...] = (),
) -> Callable[[VLM, Batch], Tensor]:
    """Return what gives the reference's log-probability of each trained token, fp32[N], of the run's model and a batch.

    `name` is a model, or empty for what the run starts from: the model itself without its adapters, where these are all
    that learns and begin with no change; else a frozen copy, rounded and adapted as the run begins, in fp32 on every
    rank. It is no part of checkpoints, and read again when a run goes on: `state` receives its fingerprint. `never` is
    as in `token_logprobs`.
    """
    adapter, init = config.adapter, config.init
    begins_as_base = adapter.init in ("kaiming", "gaussian") and not init.adapter
    if not name and adapter.rank and not adapter.train and begins_as_base:

        def compute_base(model: VLM, batch: Batch) -> Tensor:
            with evaluating(model), disabled(model):
                return batch_logprobs(model, batch, never=never)

        return compute_base
    if not (name or init.model):
        field = "preference" if "preference" in config.objective else "group"
        raise UserError(
            f"objective = {config.objective} compares the model with a reference, and there is none: start from "
            f"init.model, or name another in {field}.reference"
            + (", or records for log-probabilities that records bring" if config.objective == "preference" else "")
        )
    if not name and adapter.rank and adapter.init == "orthogonal" and not init.adapter:
        raise UserError(
            f"objective = {config.objective} compares the model with what it starts from, which adapter.init = "
            "orthogonal draws at random: choose kaiming or gaussian, or name a reference"
        )
    frozen, theirs = load(name or init.model, device, torch.float32)
    check_fits(name or init.model, theirs, processor)
    state["frozen.reference"] = fingerprint(frozen.state_dict())  # not of what a device makes of it
    if not name and adapter.base:
        quantize(frozen, QuantizationConfig(adapter.base, experts=adapter.base_experts), search=False)
    if not name and init.adapter:
        attach(frozen, init.adapter)
        own = {key: x for key, x in frozen.state_dict().items() if is_adapter(key)}
        state["frozen.init.adapter"] = fingerprint(own)
    frozen.requires_grad_(False)

    def compute(_model: VLM, batch: Batch) -> Tensor:
        with evaluating(frozen):
            return batch_logprobs(frozen, batch, never=never)

    return compute


def add_reference(reference: Callable[[VLM, Batch], Tensor], model: VLM, batches: list[Batch], device: torch.device):
    """Add the reference's log-probabilities of trained tokens to batches on the CPU, as the value ref_logprobs."""
    for batch in batches:
        logprobs = reference(model, batch.to(device)).cpu()
        places = torch.zeros(batch.labels.numel()).index_copy(0, batch.trained, logprobs)
        batch.values["ref_logprobs"] = places.view_as(batch.labels)


def check_fits(name: str, theirs: Processor, ours: Processor):
    """Raise UserError if a model reads other tokens or tiles than those of a run's batches."""
    if theirs.tokenizer.get_vocab() != ours.tokenizer.get_vocab():
        raise UserError(
            f"the reference {name} has another tokenizer than the model, so it cannot read the same batches"
        )
    fields = ["image_token_id", "tile_size", "num_image_tokens", "is_native", "has_grids", "decoder.prefix_attention"]
    if ours.config.has_grids and not ours.config.is_native:
        fields += ["num_image_features", "tiling.max_tiles"]  # from which the image tokens of a grid follow
    for field in fields:
        one, other = (attrgetter(field)(processor.config) for processor in (theirs, ours))
        if one != other:
            raise UserError(f"the reference {name} has {field} = {one}, and the model {other}: they must be equal")


def fingerprint(tensors: dict[str, Tensor]) -> Tensor:
    """Return int64[1] that hardly other tensors have: a hash of the sums over the bits of each.

    Sums of integers are exact on every device.
    """
    ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = torch.stack([x.contiguous().view(ints[x.element_size()]).sum() for x in tensors.values()]).tolist()
    digest = hashlib.blake2b(repr(list(zip(tensors, sums, strict=True))).encode(), digest_size=7).digest()
    return torch.tensor([int.from_bytes(digest)])


@contextlib.contextmanager
def evaluating(model: VLM) -> Iterator[None]:
    """Compute without gradients or noise."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)
