"""pixel_values -> patch features: a SigLIP-style vision transformer.

Patch embedding, learned positions, pre-norm blocks with full attention, tanh-GELU, final norm
(Zhai et al. 2023, arXiv 2303.15343). Legend: I tiles, P patches a tile, D hidden, C channels.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.config import VisionConfig, pick
from nanovlm.model.attention import ATTENTION


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embedding = pick(PATCH_EMBEDDING, config.patch_embedding, "vision.patch_embedding")(config)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float[I, C, H, W] -> [I, P, D], patches row by row."""
        x_IPD = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        x_IPD = x_IPD + self.position_embedding.weight
        for layer in self.layers:
            x_IPD = layer(x_IPD)
        return self.post_layernorm(x_IPD)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x_IPD: Tensor) -> Tensor:
        x_IPD = x_IPD + self.self_attn(self.layer_norm1(x_IPD))
        return x_IPD + self.mlp(self.layer_norm2(x_IPD))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x_IPD: Tensor) -> Tensor:
        q, k, v = (f(x_IPD).unflatten(-1, (self.num_heads, -1)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(ATTENTION["sdpa"](q, k, v, None).flatten(-2))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_IPD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_IPD), approximate="tanh"))


def linear_patches(config: VisionConfig) -> nn.Module:
    """One linear map of each patch, as in SigLIP."""
    return nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)


def whitening_filters(num_filters: int, patch_size: int) -> Tensor:
    """First weights for `linear_patches`: fp32[D, 3, p, p] whose outputs vary evenly and independently.

    Pixels are alike: a random map of a patch shows its mean color and hardly anything else. These filters undo that for
    images in which the correlation is 0.95 from pixel to pixel and 0.8 from color to color, with a variance of 0.2; a
    noise floor of 1 % keeps what is mostly noise small. They are turned at random, and are as many as there are, the
    ones of the largest variance first (Coates & Ng 2012, "Learning feature representations with k-means").
    """
    steps = torch.arange(patch_size, dtype=torch.float32)
    along = 0.95 ** (steps[:, None] - steps).abs()
    colors = torch.full((3, 3), 0.8) + 0.2 * torch.eye(3)
    variances, directions = torch.linalg.eigh(torch.kron(colors, torch.kron(along, along)))
    n = min(num_filters, len(variances))
    whiten = directions[:, -n:] / (0.2 * (variances[-n:] + 0.01)).sqrt()
    turn = nn.init.orthogonal_(torch.empty(num_filters, n)) * (num_filters / n) ** 0.5
    return (turn @ whiten.T).view(num_filters, 3, patch_size, patch_size)


class ConvPatches(nn.Module):
    """3x3 convolutions: of stride 2 with doubling channels down to the grid, two more on it, then a 1x1.

    Learns faster from little data than one linear map of raw pixels (Xiao et al. 2021, arXiv 2106.14881). Group norm
    and not batch norm, which would let the documents of a batch see each other.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        D, steps = config.hidden_size, config.patch_size.bit_length() - 1
        widths = [3] + [max(1, D >> (steps - i)) for i in range(1, steps + 1)] + [D, D]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2 if i < steps else 1, padding=1, bias=False)
            for i, (before, after) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(8, width), width) for width in widths[1:])
        self.proj = nn.Conv2d(D, D, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float[I, C, H, W] -> [I, D, grid, grid]."""
        x = pixel_values
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.proj(x)


PATCH_EMBEDDING = {"linear": linear_patches, "conv": ConvPatches}
