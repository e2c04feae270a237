"""Patch features -> image tokens of the decoder's width.

```
linear      pixel shuffle, one linear map                                         Idefics3, arXiv 2408.12637
mlp         pixel shuffle, two linear maps with a GELU between                    LLaVA-1.5, arXiv 2310.03744
merger      the same with a norm; of several blocks of the encoder                Qwen2.5-VL, arXiv 2502.13923
pool        the mean of neighbouring patches, RMS norm, one linear map            Gemma-3, arXiv 2503.19786
resampler   learned latents attend to the features and to themselves              Flamingo, arXiv 2204.14198
qformer     learned queries attend to themselves, then to the features            BLIP-2, arXiv 2301.12597
merge       the most alike features become one, a linear map                      ToMe, arXiv 2210.09461
```

The first three make P / scale_factor**2 tokens of the P patches of a tile, the others `num_tokens`. A projector is a
module made from (config, width of the encoder, width of the decoder) with two methods:

    num_tokens(num_patches) -> int          how many tokens it makes of a tile; checked against the config
    forward(float[I, P, vision D]) -> float[I, tokens, decoder D]

Its `nn.Linear`, `nn.LayerNorm`, `nn.Conv2d` and `nn.Embedding` get their first weights from vlm.py; other parameters
and persistent buffers from a method `initial_weights` of the module that has them (vlm.py: Drawn).
Legend: I tiles, P patches, Q latents or queries, D width.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from nanovlm.config import ProjectorConfig, pick
from nanovlm.errors import UserError
from nanovlm.model.attention import attend_sdpa
from nanovlm.model.decoder import RMSNorm
from nanovlm.model.vision import NORMS


def pixel_shuffle(x: Tensor, scale: int) -> Tensor:
    """[I, P, D] of a square grid of patches -> [I, P / scale**2, D * scale**2].

    Each square of scale x scale patches becomes one token, in the order of Idefics3 (rows of the square first), so that
    its projector weights fit:

    ```
    a b c d        [a b e f]  [c d g h]
    e f g h   ->   [i j m n]  [k l o p]       scale 2: 16 patches, 4 tokens of 4 times the width
    i j k l
    m n o p
    ```
    """
    rows = math.isqrt(x.shape[1]) // scale
    return rearrange(x, "I (y a x b) D -> I (y x) (a b D)", y=rows, x=rows, a=scale, b=scale)


class LinearProjector(nn.Module):
    """One linear map, without bias in Idefics3, with one in PaliGemma."""

    def __init__(self, config: ProjectorConfig, vision_size: int, decoder_size: int):
        super().__init__()
        self.scale_factor = config.scale_factor
        self.proj = nn.Linear(vision_size * config.scale_factor**2, decoder_size, bias=config.bias)

    def num_tokens(self, num_patches: int) -> int:
        return num_patches // self.scale_factor**2

    def forward(self, x_IPD: Tensor) -> Tensor:
        return self.proj(pixel_shuffle(x_IPD, self.scale_factor))


class MLPProjector(nn.Module):
    """LLaVA's two layers; with scale_factor 1 each patch becomes a token."""

    def __init__(self, config: ProjectorConfig, vision_size: int, decoder_size: int):
        super().__init__()
        self.scale_factor = config.scale_factor
        size = vision_size * config.scale_factor**2
        self.norm = pick(NORMS, config.norm, "projector.norm")(size, config.norm_eps)
        self.fc1 = nn.Linear(size, decoder_size)
        self.fc2 = nn.Linear(decoder_size, decoder_size)
        self.newline = nn.Parameter(torch.empty(decoder_size)) if config.has_newline else None

    def num_tokens(self, num_patches: int) -> int:
        return num_patches // self.scale_factor**2

    def forward(self, x_IPD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(pixel_shuffle(x_IPD, self.scale_factor)))))

    def initial_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.newline is not None:
            yield self.newline, torch.empty(self.newline.shape).normal_(std=len(self.newline) ** -0.5)


class MergerProjector(nn.Module):
    """Qwen's merger of the last block's features, and one more for each block of `deepstack_layers`.

    What these make is appended to the image tokens, which are then as many times as wide (DeepStack, arXiv 2406.04334).
    """

    def __init__(self, config: ProjectorConfig, vision_size: int, decoder_size: int):
        super().__init__()
        self.vision_size, self.scale_factor = vision_size, config.scale_factor
        self.main = Merger(config, vision_size, decoder_size, norm_is_first=True)
        self.deepstack = nn.ModuleList(
            Merger(config, vision_size, decoder_size, norm_is_first=False) for _ in config.deepstack_layers
        )

    def num_tokens(self, num_patches: int) -> int:
        return num_patches // self.scale_factor**2

    def forward(self, x_IPD: Tensor) -> Tensor:
        levels = x_IPD.split(self.vision_size, dim=-1)
        merged = [merge(x) for merge, x in zip((self.main, *self.deepstack), levels, strict=True)]
        return torch.cat(merged, dim=-1) if len(merged) > 1 else merged[0]


class Merger(nn.Module):
    """Norm of each patch and pixel shuffle, or the other way round, then two linear maps with a GELU between."""

    def __init__(self, config: ProjectorConfig, vision_size: int, decoder_size: int, norm_is_first: bool):
        super().__init__()
        self.scale_factor, self.norm_is_first = config.scale_factor, norm_is_first
        size = vision_size * config.scale_factor**2
        make_norm = pick(NORMS, config.norm, "projector.norm")
        self.norm = make_norm(vision_size if norm_is_first else size, config.norm_eps)
        self.fc1, self.fc2 = nn.Linear(size, size), nn.Linear(size, decoder_size)

    def forward(self, x_IPD: Tensor) -> Tensor:
        if self.norm_is_first:
            x_IPD = pixel_shuffle(self.norm(x_IPD), self.scale_factor)
        else:
            x_IPD = self.norm(pixel_shuffle(x_IPD, self.scale_factor))
        return self.fc2(F.gelu(self.fc1(x_IPD)))


class PoolProjector(nn.Module):
    """Gemma-3's: the norm's weights begin at 0, to which 1 is added."""

    def __init__(self, config: ProjectorConfig, vision_size: int, decoder_size: int):
        super().__init__()
        self.scale_factor = config.scale_factor
        self.norm = RMSNorm(vision_size, 1e-6, offset=1.0)
        self.proj = nn.Linear(vision_size, decoder_size, bias=False)

    def num_tokens(self, num_patches: int) -> int:
        return num_patches // self.scale_factor**2

    def forward(self, x_IPD: Tensor) -> Tensor:
        rows, scale = math.isqrt(x_IPD.shape[1]) // self.scale_factor, self.scale_factor
        x_IPD = reduce(x_IPD, "I (y a x b) D -> I (y x) D", "mean", y=rows, x=rows, a=scale, b=scale)
        return self.proj(self.norm(x_IPD))


# --- learned latents that look at the features ----------------------------------------------------------------


class LatentAttention(nn.Module):
    """Attention from [I, Q, D] to all of [I, S, D]."""

    def __init__(self, size: int, num_heads: int, bias: bool):
        super().__init__()
        if size % num_heads:
            raise UserError(f"projector.num_attention_heads = {num_heads} must divide vision.hidden_size = {size}")
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size, bias) for _ in range(4))

    def forward(self, x_IQD: Tensor, seen_ISD: Tensor) -> Tensor:
        q, k, v = self.q_proj(x_IQD), self.k_proj(seen_ISD), self.v_proj(seen_ISD)
        q, k, v = (rearrange(x, "I S (N H) -> I S N H", N=self.num_heads) for x in (q, k, v))
        return self.out_proj(attend_sdpa(q, k, v, None).flatten(2))


class Resampler(nn.Module):
    """Flamingo's Perceiver resampler, with GELU: keys and values are of the features and of the latents themselves."""

    def __init__(self, config: ProjectorConfig, vision_size: int, decoder_size: int):
        super().__init__()
        self.latents = nn.Embedding(config.num_tokens, vision_size)
        self.layers = nn.ModuleList(ResamplerBlock(config, vision_size) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(vision_size)
        self.proj = nn.Linear(vision_size, decoder_size, bias=False)

    def num_tokens(self, num_patches: int) -> int:
        return self.latents.num_embeddings

    def forward(self, x_IPD: Tensor) -> Tensor:
        latents_IQD = self.latents.weight.expand(x_IPD.shape[0], -1, -1)
        for layer in self.layers:
            latents_IQD = layer(latents_IQD, x_IPD)
        return self.proj(self.norm(latents_IQD))


class ResamplerBlock(nn.Module):
    def __init__(self, config: ProjectorConfig, size: int):
        super().__init__()
        self.features_norm, self.latents_norm, self.mlp_norm = (nn.LayerNorm(size) for _ in range(3))
        self.attn = LatentAttention(size, config.num_attention_heads, bias=False)
        self.fc1, self.fc2 = nn.Linear(size, 4 * size, bias=False), nn.Linear(4 * size, size, bias=False)

    def forward(self, latents_IQD: Tensor, x_IPD: Tensor) -> Tensor:
        y_IQD = self.latents_norm(latents_IQD)
        latents_IQD = latents_IQD + self.attn(y_IQD, torch.cat((self.features_norm(x_IPD), y_IQD), dim=1))
        return latents_IQD + self.fc2(F.gelu(self.fc1(self.mlp_norm(latents_IQD))))


class QFormer(nn.Module):
    """BLIP-2's querying transformer of the encoder's width, without its text; norms follow the sums, as in BERT."""

    def __init__(self, config: ProjectorConfig, vision_size: int, decoder_size: int):
        super().__init__()
        self.queries = nn.Embedding(config.num_tokens, vision_size)
        self.norm = nn.LayerNorm(vision_size)
        self.layers = nn.ModuleList(QFormerBlock(config, vision_size) for _ in range(config.num_layers))
        self.proj = nn.Linear(vision_size, decoder_size)

    def num_tokens(self, num_patches: int) -> int:
        return self.queries.num_embeddings

    def forward(self, x_IPD: Tensor) -> Tensor:
        q_IQD = self.norm(self.queries.weight).expand(x_IPD.shape[0], -1, -1)
        for layer in self.layers:
            q_IQD = layer(q_IQD, x_IPD)
        return self.proj(q_IQD)


class QFormerBlock(nn.Module):
    def __init__(self, config: ProjectorConfig, size: int):
        super().__init__()
        self.self_attn, self.cross_attn = (LatentAttention(size, config.num_attention_heads, bias=True) for _ in "12")
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(size) for _ in range(3))
        self.fc1, self.fc2 = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, q_IQD: Tensor, x_IPD: Tensor) -> Tensor:
        q_IQD = self.self_norm(q_IQD + self.self_attn(q_IQD, q_IQD))
        q_IQD = self.cross_norm(q_IQD + self.cross_attn(q_IQD, x_IPD))
        return self.mlp_norm(q_IQD + self.fc2(F.gelu(self.fc1(q_IQD))))


# --- merging of features that are alike -----------------------------------------------------------------------


class MergeProjector(nn.Module):
    """Token merging down to a fixed number, then one linear map without bias."""

    def __init__(self, config: ProjectorConfig, vision_size: int, decoder_size: int):
        super().__init__()
        self.num_kept = config.num_tokens
        self.proj = nn.Linear(vision_size, decoder_size, bias=False)

    def num_tokens(self, num_patches: int) -> int:
        return min(self.num_kept, num_patches)

    def forward(self, x_IPD: Tensor) -> Tensor:
        return self.proj(merge_tokens(x_IPD, self.num_kept)[0])


def merge_tokens(x: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """[I, P, D] -> [I, num_tokens, D], and fp32[I, num_tokens]: how many patches each is the mean of.

    Bipartite soft matching (arXiv 2210.09461), repeated as a pass removes at most half: each token at an even place
    looks for the most similar one (cosine) at an odd place, and those with the greatest similarity become part of
    theirs, which stays where it was as the mean of its patches. Ties go to the earlier token.
    """
    x_IPD, size_IP = x.float(), torch.ones(x.shape[:2], device=x.device)
    # A mean in bf16, or a match that depends on its rounding, would not be that of a run in fp32.
    with torch.autocast(x.device.type, enabled=False):
        while (P := x_IPD.shape[1]) > num_tokens:
            num_merged = min(P - num_tokens, P // 2)
            unit_IPD = F.normalize(x_IPD, dim=-1)
            similarity, partner = (unit_IPD[:, ::2] @ unit_IPD[:, 1::2].mT).max(-1)
            merged = similarity.argsort(dim=-1, descending=True, stable=True)[:, :num_merged]
            # The token that each is part of from now on, itself included, and those that stay, in order.
            owner_IP = torch.arange(P, device=x.device).repeat(x.shape[0], 1)
            owner_IP = owner_IP.scatter(1, 2 * merged, 2 * partner.gather(1, merged) + 1)
            is_gone = torch.zeros_like(owner_IP).scatter(1, 2 * merged, 1)
            stays_IQ = is_gone.argsort(dim=-1, stable=True)[:, : P - num_merged]
            # As a product with a matrix, which adds in the same order on a GPU too.
            weights_IQP = (owner_IP[:, None] == stays_IQ[..., None]) * size_IP[:, None]
            size_IP = weights_IQP.sum(-1)
            x_IPD = weights_IQP @ x_IPD / size_IP[..., None]
    return x_IPD.to(x.dtype), size_IP


PROJECTORS = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "merger": MergerProjector,
    "resampler": Resampler,
    "qformer": QFormer,
    "merge": MergeProjector,
    "pool": PoolProjector,
}
