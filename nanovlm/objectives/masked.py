"""Pictures -> the sum of the losses of their masked patches: an image encoder learns without a text (MAE).

```
pixel_values --> patches that stay (a quarter) --> encoder --> + mask tokens in place of the others
                                                                       |
              pixels of the masked patches <-- small decoder <---------+
```

The encoder never sees a masked patch; the decoder is thrown away. The loss of a masked patch is the mean square error
of its pixels, which are normalised by the mean and the standard deviation of the patch
(He et al. 2021, arXiv 2111.06377). Legend: I tiles, P patches, V that stay, M masked, D hidden, F pixels of a patch.
"""

import re
from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nanovlm.config import MaskedConfig, TrainConfig, VisionConfig
from nanovlm.data.types import Batch
from nanovlm.errors import UserError
from nanovlm.model.vision import VisionBlock, normalize
from nanovlm.model.vlm import VLM, Extras


class Masked:
    """Predict the pixels of masked patches from those that stay; a unit is a masked patch.

    Nothing but the encoder of the model learns, and the texts of records are not read.
    """

    learns_from: Literal["answers"] = "answers"

    def __init__(self, config: TrainConfig, processor=None, device: torch.device | None = None):
        """Raise UserError for a model of which patches cannot be masked, or more than the encoder would learn."""
        vision = check(config)
        self.num_patches = vision.num_patches
        self.num_masked = config.masked.count(self.num_patches)
        self.decoder = PixelDecoder(vision, config.masked, config.seed).to(device)
        self.state: dict[str, Tensor] = dict(self.decoder.named_parameters())

    def count(self, batch: Batch) -> int:
        return len(batch.pixel_values) * self.num_masked

    def loss(self, model: VLM, batch: Batch, extras: Extras) -> Tensor:
        vision, pixels = model.vision.config, batch.pixel_values
        if not len(pixels):  # every rank runs the encoder, here on a grey tile
            pixels = pixels.new_zeros(1, 3, vision.image_size, vision.image_size)
        generator = None
        if not model.training:  # the same masks whenever a model is looked at
            generator = torch.Generator(pixels.device).manual_seed(0)
        order = torch.rand(len(pixels), self.num_patches, generator=generator, device=pixels.device).argsort(1)
        masked, kept = order.split([self.num_masked, self.num_patches - self.num_masked], 1)
        x = normalize(pixels, vision.mean, vision.std)
        features = run_inside(model, lambda: model.vision.forward_all(x, kept)[:, vision.num_tokens_beside :])
        errors = patch_errors(self.decoder(features, kept, masked), pixels.float() / 255, masked)
        return errors.sum() * (len(batch.pixel_values) > 0)


def check(config: TrainConfig) -> VisionConfig:
    """Return the encoder's config, or raise UserError with the first value that does not fit the objective."""
    vision, freeze = config.model.vision, config.optim.freeze
    if vision is None:
        raise UserError("objective = masked teaches an image encoder, but model.vision = None")
    for name, value, right in (
        ("patches", vision.patches, "patch"),  # convolutions look beyond a patch
        ("second", vision.second, None),
    ):
        if value != right:
            raise UserError(f"model.vision.{name} = {value} must be {right}: objective = masked hides patches")
    if config.model.is_native:
        policy = config.model.tiling.policy
        raise UserError(f"tiling.policy = {policy} has no tiles of one size: objective = masked hides patches of those")
    if vision.num_patches < 2:
        raise UserError("objective = masked needs at least two patches, and model.vision has one")
    for part in ("projector", "decoder", *(["fusion"] if config.model.fusion.type != "sequence" else [])):
        if not any(re.search(pattern, f"{part}.") for pattern in freeze):
            raise UserError(
                f"optim.freeze = {freeze} must have '^(projector|fusion|decoder)': objective = masked teaches the "
                f"image encoder alone, and nothing would reach the {part}"
            )
    return vision


def run_inside(model: nn.Module, function: Callable[[], Tensor]) -> Tensor:
    """Call a function as the forward pass of a model, so that what wraps the model (DDP, FSDP) takes part."""
    module = model.module if isinstance(model, DistributedDataParallel) else model
    module.forward = function
    try:
        return model()
    finally:
        del module.forward


def patch_errors(predicted: Tensor, pixels: Tensor, masked: Tensor) -> Tensor:
    """Return the loss of each masked patch, fp32[I, M].

    `predicted` is [I, M, F], the pixels row by row with their colors together; `pixels` float[I, 3, H, W], to any
    affine scale; `masked` int64[I, M] are indices of patches.
    """
    side = round((predicted.shape[-1] / 3) ** 0.5)
    height, width = (size // side * side for size in pixels.shape[2:])
    x_IPF = rearrange(pixels[:, :, :height, :width], "I C (y h) (x w) -> I (y x) (h w C)", h=side, w=side)
    x_IMF = x_IPF.gather(1, masked[:, :, None].expand(-1, -1, x_IPF.shape[-1]))
    target = (x_IMF - x_IMF.mean(-1, keepdim=True)) / (x_IMF.var(-1, keepdim=True) + 1e-6).sqrt()
    return (predicted.float() - target).square().mean(-1)


class PixelDecoder(nn.Module):
    """Features of the patches that stay -> pixels of the masked ones."""

    def __init__(self, vision: VisionConfig, config: MaskedConfig, seed: int):
        """Draw the weights with a generator of their own, so that those of the model are as in any run."""
        super().__init__()
        size = config.hidden_size
        blocks = VisionConfig(
            hidden_size=size,
            intermediate_size=4 * size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            attention=vision.attention,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(vision.hidden_size, size)
            self.mask_token = nn.Parameter(0.02 * torch.randn(size))
            self.layers = nn.ModuleList(VisionBlock(blocks) for _ in range(config.num_hidden_layers))
            self.norm = nn.LayerNorm(size)
            self.head = nn.Linear(size, 3 * vision.patch_size**2)
        self.positions: Tensor
        self.register_buffer("positions", positions_2d(vision.grid_size, size))

    def forward(self, features: Tensor, kept: Tensor, masked: Tensor) -> Tensor:
        """[I, V, D], int64[I, V] and int64[I, M] -> [I, M, F].

        Where a token is, its position alone says, so the patches need not be put back in order.
        """
        x_IVD = self.embed(features)
        x_IMD = self.mask_token.to(x_IVD.dtype).expand(*masked.shape, -1)
        x_IPD = torch.cat((x_IVD, x_IMD), 1) + self.positions[torch.cat((kept, masked), 1)]
        for layer in self.layers:
            x_IPD = layer(x_IPD)
        return self.head(self.norm(x_IPD[:, kept.shape[1] :]))


def positions_2d(side: int, size: int) -> Tensor:
    """fp32[side * side, size]: sines and cosines of the row in one half, of the column in the other.

    Their frequencies are 10000^(-4i / size), i from 0 (Vaswani et al. 2017, arXiv 1706.03762, for each direction).
    """
    angles = torch.outer(torch.arange(side), 10000.0 ** (-torch.arange(0, size, 4) / size))
    waves = torch.cat((angles.sin(), angles.cos()), 1)  # [side, size / 2]
    return torch.cat((waves.repeat_interleave(side, 0), waves.repeat(side, 1)), 1)
