"""pixel_values -> patch features: a SigLIP-style vision transformer.

Patch embedding, learned positions, pre-norm blocks with full attention, tanh-GELU, final norm
(Zhai et al. 2023, arXiv 2303.15343). Legend: I tiles, P patches a tile, D hidden, C channels.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nanovlm.config import VisionConfig, pick
from nanovlm.model.attention import ATTENTION


def normalize(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels to float32 in [-1, 1] (mean and standard deviation 0.5, as in SigLIP)."""
    return pixels.float().div_(127.5).sub_(1)


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embedding = PatchEmbedding(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float[I, C, H, W] -> [I, P, D], patches row by row."""
        x_IPD = self.patch_embedding(pixel_values) + self.position_embedding.weight
        for layer in self.layers:
            x_IPD = layer(x_IPD)
        return self.post_layernorm(x_IPD)


class PatchEmbedding(nn.Conv2d):
    """A convolution with non-overlapping windows, computed as a matrix product.

    The backward pass takes 1 ms, that of torch's convolution 12: 26 images of 9 patches, two CPU threads, 2026-11-22.
    """

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float[I, C, H, W] -> [I, P, D]; pixels beyond the last whole patch are unused."""
        p = self.kernel_size[0]
        height, width = (side // p * p for side in pixel_values.shape[2:])
        whole = pixel_values[:, :, :height, :width]
        patches_IPF = rearrange(whole, "I C (y h) (x w) -> I (y x) (C h w)", h=p, w=p)
        return F.linear(patches_IPF, self.weight.flatten(1), self.bias)


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
        self.attend = pick(ATTENTION, config.attention, "vision.attention")
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x_IPD: Tensor) -> Tensor:
        q, k, v = (f(x_IPD) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (rearrange(x, "I P (N H) -> I P N H", N=self.num_heads) for x in (q, k, v))
        return self.out_proj(rearrange(self.attend(q, k, v, None), "I P N H -> I P (N H)"))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_IPD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_IPD), approximate="tanh"))


def whitening_filters(num_filters: int, patch_size: int) -> Tensor:
    """Return initial patch embedding weights, fp32[D, 3, p, p], whose outputs are uncorrelated, of equal variance.

    Neighbouring pixels are alike, so a random map of a patch shows little but its mean color. These filters undo that
    for images with correlation 0.95 from pixel to pixel and 0.8 from color to color, and variance 0.2; a noise floor of
    1 % keeps noisy directions small. The directions of largest variance, at most D, are mixed by a random orthogonal
    matrix (Coates & Ng 2012, "Learning feature representations with k-means").
    """
    steps = torch.arange(patch_size, dtype=torch.float64)
    variances_along, along = torch.linalg.eigh(0.95 ** (steps[:, None] - steps).abs())
    along = along * along[0].sign()  # fix the sign, which eigh leaves open
    # Eigenvectors of the color covariance (0.8, and 1 on the diagonal), by hand as two of its eigenvalues are equal.
    colors = F.normalize(torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]], dtype=torch.float64)).T
    variances_of_colors = torch.tensor([2.6, 0.2, 0.2], dtype=torch.float64)
    variances = torch.kron(variances_of_colors, torch.kron(variances_along, variances_along))
    n = min(num_filters, len(variances))
    first = variances.sort(descending=True, stable=True).indices[:n]
    directions = torch.kron(colors, torch.kron(along, along))[:, first]
    whiten = (directions / (0.2 * (variances[first] + 0.01)).sqrt()).float()
    turn = nn.init.orthogonal_(torch.empty(num_filters, n)) * (num_filters / n) ** 0.5
    return (turn @ whiten.T).view(num_filters, 3, patch_size, patch_size)
