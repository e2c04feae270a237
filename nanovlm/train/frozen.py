"""A frozen encoder and its stored features (data.features): are they those that this encoder makes?"""

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nanovlm.data.features import COMMAND, Features
from nanovlm.errors import UserError
from nanovlm.model.vlm import VLM


def check_frozen(model: VLM):
    """Raise UserError where the encoder learns, so that features of it would be wrong after the first step."""
    if learns := [name for name, parameter in model.vision.named_parameters() if parameter.requires_grad]:
        raise UserError(
            f"data.features are those of a frozen encoder, and vision.{learns[0]} learns: freeze it, by --optim.freeze "
            "'^vision', or leave data.features out"
        )


@torch.no_grad()
def hash_encoder(encoder: nn.Module) -> str:
    """Hash the names and the values of an encoder's weights, as fp32; all ranks that share them must take part."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(encoder.state_dict().items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        total.update(f"{name} {list(whole.shape)} ".encode())
        total.update(memoryview(whole.float().cpu().contiguous().numpy()).cast("B"))  # pyright: ignore[reportArgumentType]
    return total.hexdigest()


def check_encoder(model: VLM, features: Features):
    """Raise UserError where the encoder learns, or is another than that which made the features."""
    check_frozen(model)
    if (found := hash_encoder(model.vision)) != features.encoder:
        raise UserError(
            f"data.features = {features.folder} are of an encoder with other weights than the run's "
            f"({features.encoder} against {found}): write them anew, by {COMMAND}"
        )
