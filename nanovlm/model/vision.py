"""pixel_values -> patch features: a vision transformer, as SigLIP's, CLIP's and DINOv2's.

```
pixel_values --> patch_embedding --> + positions --> blocks --> post_layernorm --> features of the patches
                       class token, registers --^                                  (class token: forward_all)
```

As the defaults have it, SigLIP's: patches by a linear map, learned positions, pre-norm blocks with full attention,
tanh-GELU, final norm (Zhai et al. 2023, arXiv 2303.15343). CLIP has a class token, a norm before the blocks and
quick-GELU (Radford et al. 2021, arXiv 2103.00020), DINOv2 a class token, layer scale and registers (Oquab et al. 2023,
arXiv 2304.07193; Darcet et al. 2023, arXiv 2309.16588). Legend: I tiles, P patches a tile, D hidden, C channels.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nanovlm.config import VisionConfig, pick
from nanovlm.model.attention import ATTENTION
from nanovlm.model.convolution import ConvolutionStem
from nanovlm.model.decoder import RMSNorm, rotate_both
from nanovlm.model.native import (
    Grid,
    Group,
    attend_groups,
    cut_windows,
    group_pictures,
    place_patches,
    sort_tiles,
    stretch_positions,
)

Rope = tuple[Tensor, Tensor]


def normalize(pixels: Tensor, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3) -> Tensor:
    """Convert uint8[..., C, H, W] to float32, (pixels / 255 - mean) / std; as SigLIP does, to [-1, 1]."""
    x = pixels.float()
    if len(set(mean)) == len(set(std)) == 1:
        return x.div_(255 * std[0]).sub_(mean[0] / std[0])
    for channel, m, s in zip(x.unbind(-3), mean, std, strict=True):  # a tensor of three numbers would wait for a GPU
        channel.div_(255 * s).sub_(m / s)
    return x


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.patch_embedding = pick(PATCHES, config.patches, "vision.patches")(config)
        self.class_embedding = nn.Parameter(torch.empty(D)) if config.class_token else None
        self.registers = nn.Parameter(torch.empty(config.num_registers, D)) if config.num_registers else None
        self.position_embedding = None
        if config.positions != "rotary":
            self.position_embedding = nn.Embedding(config.class_token + config.num_patches, D)
        self.pre_layernorm = nn.LayerNorm(D, config.layer_norm_eps) if config.pre_layernorm else None
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(D, config.layer_norm_eps) if config.post_layernorm else None
        self.second = VisionEncoder(config.second) if config.second else None

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid] = (), deepstack: Sequence[int] = ()) -> Tensor:
        """Normalised float[I, C, H, W] -> [I, P, features], patches row by row; beside D those of a second encoder.

        With `grids` the tiles of each picture, in rows and columns, are read as one (native.py); beside its features
        are then those behind the blocks of `deepstack`.
        """
        if grids:
            return self.see_pictures(pixel_values, grids, deepstack)
        x_IPD = self.forward_all(pixel_values)[:, self.config.num_tokens_beside :]
        if self.second is None:
            return x_IPD
        return torch.cat((x_IPD, self.second(convert_pixels(pixel_values, self.config, self.second.config))), dim=-1)

    def forward_all(self, pixel_values: Tensor, kept: Tensor | None = None) -> Tensor:
        """Normalised float[I, C, H, W] -> [I, class token, registers and P, D], without the second encoder.

        With `kept` int64[I, V], indices of patches, the encoder sees these alone, in this order: V in place of P.
        """
        config, x_IPD = self.config, self.patch_embedding(pixel_values)
        if self.class_embedding is not None:
            x_IPD = torch.cat((self.class_embedding.expand(x_IPD.shape[0], 1, -1), x_IPD), dim=1)
        rope = None
        if self.position_embedding is not None:
            x_IPD = x_IPD + self.position_embedding.weight
        if config.positions != "learned":
            side = torch.arange(config.grid_size, device=x_IPD.device)
            places = torch.cartesian_prod(side, side)
            # Unturned, as at row and column 0, are class token and registers.
            rope = rope_table(F.pad(places, (0, 0, config.num_tokens_beside, 0)), config)
        if self.registers is not None:
            first, patches = x_IPD[:, : config.class_token], x_IPD[:, config.class_token :]
            x_IPD = torch.cat((first, self.registers.expand(x_IPD.shape[0], -1, -1), patches), dim=1)
        if self.pre_layernorm is not None:
            x_IPD = self.pre_layernorm(x_IPD)
        if kept is not None:
            x_IPD, rope = select(x_IPD, rope, kept, config.num_tokens_beside)
        for layer in self.layers:
            x_IPD = layer(x_IPD, rope)
        return x_IPD if self.post_layernorm is None else self.post_layernorm(x_IPD)

    def see_pictures(self, pixel_values: Tensor, grids: Sequence[Grid], deepstack: Sequence[int] = ()) -> Tensor:
        """Tiles [I, C, H, W] of pictures that have so many rows and columns of them -> [I, P, D]."""
        config, x_IPD = self.config, self.patch_embedding(pixel_values)
        P, rope, levels = x_IPD.shape[1], None, []
        grids, *orders = sort_tiles(grids)
        groups = windows = group_pictures(grids, P)
        there, back = (torch.tensor(order).to(x_IPD.device, non_blocking=True) for order in orders)
        x_IPD = x_IPD.index_select(0, there)
        if self.position_embedding is not None:
            x_IPD = x_IPD + stretch_positions(self.position_embedding.weight, grids, P, config.stretch)
        if config.positions != "learned":
            rope = rope_table(place_patches(grids, P).to(x_IPD.device, non_blocking=True), config)
        if config.window_size:
            order, windows = cut_windows(grids, P, config.window_size // (config.patch_size * math.isqrt(P)))
            inner = torch.tensor(order).to(x_IPD.device, non_blocking=True)
            x_IPD, back = x_IPD.index_select(0, inner), inner.argsort().index_select(0, back)
            rope = rope and tuple(x.unflatten(1, (-1, P)).index_select(1, inner).flatten(1, 2) for x in rope)
        x_1TD = x_IPD.flatten(0, 1)[None]
        if self.pre_layernorm is not None:
            x_1TD = self.pre_layernorm(x_1TD)
        for index, layer in enumerate(self.layers):
            x_1TD = layer(x_1TD, rope, None, groups if index in config.full_attention_layers else windows)
            levels += [x_1TD] if index in deepstack else []
        if self.post_layernorm is not None:
            x_1TD = self.post_layernorm(x_1TD)
        x_1TD = torch.cat((x_1TD, *levels), dim=-1) if levels else x_1TD
        return x_1TD[0].unflatten(0, (-1, P)).index_select(0, back)


def select(x_IPD: Tensor, rope: Rope | None, kept: Tensor, num_beside: int) -> tuple[Tensor, Rope | None]:
    """Return the tokens beside the patches, then the patches `kept` int64[I, V], with their rows of the rope table."""
    beside = torch.arange(num_beside, device=kept.device).expand(len(kept), -1)
    index = torch.cat((beside, kept + num_beside), dim=1)
    x_IVD = x_IPD.gather(1, index[:, :, None].expand(-1, -1, x_IPD.shape[-1]))
    return x_IVD, None if rope is None else (rope[0][0, index], rope[1][0, index])


def rope_table(places: Tensor, config: VisionConfig) -> Rope:
    """Cosine and signed sine fp32[1, P, 1, H] of int64[P, 2] rows and columns, as decoder.rotate reads them.

    The first half of the H / 2 pairs turns with the row, the other with the column, each by place * theta**(-4i / H),
    so that scores depend on the offsets between patches only (Wang et al. 2024, arXiv 2409.12191).
    """
    head = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, head // 2, 2, device=places.device, dtype=torch.float32) / (head // 2)
    angles = (places[:, :, None] / config.rope_theta**exponents).flatten(1)[None, :, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def convert_pixels(pixel_values: Tensor, ours: VisionConfig, theirs: VisionConfig) -> Tensor:
    """Turn pixels that are normalised for one encoder into those for another, whose patches show the same.

    float[I, C, H, W] -> float[I, C, height, width] of their whole patches.
    """
    shown, side = ours.grid_size * ours.patch_size, theirs.grid_size * theirs.patch_size
    x = pixel_values[:, :, :shown, :shown]
    if side != shown:
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True)
    if (ours.mean, ours.std) == (theirs.mean, theirs.std):
        return x
    channels = zip(x.unbind(1), ours.mean, ours.std, theirs.mean, theirs.std, strict=True)
    return torch.stack([c * (s / their_s) + (m - their_m) / their_s for c, m, s, their_m, their_s in channels], dim=1)


class PatchEmbedding(nn.Conv2d):
    """A convolution with non-overlapping windows, computed as a matrix product.

    The backward pass takes 1 ms, that of torch's convolution 12: 26 images of 9 patches, two CPU threads, 2026-11-22.
    """

    def __init__(self, config: VisionConfig):
        p = config.patch_size
        super().__init__(3, config.hidden_size, p, stride=p, bias=config.patch_bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float[I, C, H, W] -> [I, P, D]; pixels beyond the last whole patch are unused."""
        p, pixel_values = self.kernel_size[0], pixel_values.to(self.weight.dtype)
        height, width = (side // p * p for side in pixel_values.shape[2:])
        whole = pixel_values[:, :, :height, :width]
        patches_IPF = rearrange(whole, "I C (y h) (x w) -> I (y x) (C h w)", h=p, w=p)
        return F.linear(patches_IPF, self.weight.flatten(1), self.bias)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        make_norm = pick(NORMS, config.norm, "vision.norm")
        self.layer_norm1 = make_norm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = make_norm(config.hidden_size, config.layer_norm_eps)
        self.mlp = GatedMLP(config) if config.gated_mlp else VisionMLP(config)
        scales = [nn.Parameter(torch.ones(config.hidden_size)) if config.layer_scale else None for _ in range(2)]
        self.layer_scale1, self.layer_scale2 = scales

    def initial_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        for scale in (self.layer_scale1, self.layer_scale2):
            if scale is not None:
                yield scale, torch.ones(scale.shape)

    def forward(self, x_IPD: Tensor, rope: Rope | None = None, mask=None, groups: Sequence[Group] = ()) -> Tensor:
        """[I, P, D] -> [I, P, D]; `mask` is as in attention.py, `groups` as in attend_groups."""
        y_IPD = self.self_attn(self.layer_norm1(x_IPD), rope, mask, groups)
        x_IPD = x_IPD + (y_IPD if self.layer_scale1 is None else self.layer_scale1 * y_IPD)
        y_IPD = self.mlp(self.layer_norm2(x_IPD))
        return x_IPD + (y_IPD if self.layer_scale2 is None else self.layer_scale2 * y_IPD)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attend = pick(ATTENTION, config.attention, "vision.attention")
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x_IPD: Tensor, rope: Rope | None = None, mask=None, groups: Sequence[Group] = ()) -> Tensor:
        q, k, v = (f(x_IPD) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (rearrange(x, "I P (N H) -> I P N H", N=self.num_heads) for x in (q, k, v))
        if rope is not None:
            q, k = rotate_both(q, k, rope)
        x = attend_groups(self.attend, q, k, v, groups) if groups else self.attend(q, k, v, mask)
        return self.out_proj(rearrange(x, "I P N H -> I P (N H)"))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.act = pick(ACTIVATIONS, config.hidden_act, "vision.hidden_act")
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_IPD: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x_IPD)))


class GatedMLP(nn.Module):
    """As the decoder's, with biases."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.act = pick(ACTIVATIONS, config.hidden_act, "vision.hidden_act")
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_IPD: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x_IPD)) * self.up_proj(x_IPD))


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), CLIP's approximation (Hendrycks & Gimpel 2016, arXiv 1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


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


# VisionConfig -> module that makes patches float[I, P, D] of pixels float[I, C, H, W]; it takes pixels of any dtype.
PATCHES = {"patch": PatchEmbedding, "convolution": ConvolutionStem}
ACTIVATIONS = {
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}
# (size, epsilon) -> module; a projector, but no block, may have none.
NORMS = {"layer": nn.LayerNorm, "rms": RMSNorm, "none": lambda size, eps: nn.Identity()}
