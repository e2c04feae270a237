"""Embeddings -> hidden states: a Llama-style decoder.

RMSNorm and rotary positions in fp32, grouped-query attention within documents, SwiGLU. Legend: B rows,
T tokens, D hidden, N query heads, K key/value heads, H head size, F feed-forward width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.config import DecoderConfig, RopeScalingConfig, pick
from nanovlm.model.attention import ATTENTION
from nanovlm.model.compiled import CompiledSteps
from nanovlm.model.joined import Joined, project
from nanovlm.model.kv_cache import CachePass
from nanovlm.model.moe import MLP, MoE, Routing


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.embed_tokens.scale = config.embedding_scale
        self.layers = nn.ModuleList(DecoderBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config.hidden_size, config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # Both set by inference.prepare: the head in int8, and what runs decode steps compiled.
        self.joined_head: Joined | None = None
        self.compiled: CompiledSteps | None = None

    @property
    def head_layer(self) -> nn.Embedding | nn.Linear:
        """The output head, or the embedding table where the two are tied."""
        return self.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    @property
    def head_weight(self) -> Tensor:
        """[V, D], of the output head or the embedding table where the two are tied."""
        return self.head_layer.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V]."""
        joined = self.joined_head
        if joined is None or torch.is_grad_enabled() or not joined.is_current([self.head_layer]):
            return F.linear(hidden, self.head_weight)
        return joined(hidden)[0]

    def forward(
        self,
        x_BTD: Tensor,
        position_ids: Tensor,
        mask,
        cache: CachePass | None = None,
        is_token: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        between: Callable[[int, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """Embeddings [B, T, D] -> normed hidden states [B, T, D], and the routing of every mixture.

        `mask` is as in attention.py, by window where the blocks have several, and not looked at with a cache.
        `is_token` bool[B, T] is False on padding; `rope` is the rows of `rope_table` for position_ids, if they are
        there already. `between(index, x)` runs before each block.
        """
        rope = rope_table(position_ids, self.config) if rope is None else rope
        if (
            cache is not None
            and between is None
            and self.compiled is not None
            and self.compiled.takes(cache, x_BTD.shape[1])
        ):
            return self.compiled(self, x_BTD, rope, cache), []
        return self.run_blocks(x_BTD, rope, mask, cache, is_token, between)

    def run_blocks(self, x_BTD, rope, mask, cache, is_token, between=None) -> tuple[Tensor, list[Routing]]:
        routings = []
        for index, layer in enumerate(self.layers):
            if between is not None:
                x_BTD = between(index, x_BTD)
            own = mask[self.config.windows[index]] if isinstance(mask, dict) else mask
            x_BTD, routing = layer(x_BTD, rope, own, cache, is_token)
            routings += [] if routing is None else [routing]
        hidden_BTD = self.norm(x_BTD)
        return hidden_BTD if self.config.logit_scale == 1 else hidden_BTD * self.config.logit_scale, routings

    def update_expert_bias(self, load: Tensor):
        """After a step, update the balance biases from the tokens of each expert fp32[L, E] if the config has them."""
        if self.config.moe is not None and self.config.moe.balance == "bias":
            mixtures = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]
            for mixture, counts in zip(mixtures, load, strict=True):
                mixture.update_bias(counts)


class TokenEmbedding(nn.Embedding):
    """Ids [B, T] -> embeddings [B, T, D], times `scale`."""

    scale = 1.0

    def forward(self, ids: Tensor) -> Tensor:
        x_BTD = super().forward(ids)
        # In bf16 the factor is rounded, too, as Gemma was trained.
        return x_BTD if self.scale == 1 else x_BTD * torch.tensor(self.scale, dtype=x_BTD.dtype)


class DecoderBlock(nn.Module):
    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        D, self.residual_scale = config.hidden_size, config.residual_scale
        self.input_layernorm = make_norm(D, config)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = make_norm(D, config)
        self.attn_out_norm = make_norm(D, config) if config.sandwich_norms else nn.Identity()
        self.mlp_out_norm = make_norm(D, config) if config.sandwich_norms else nn.Identity()
        if config.moe is not None and index in config.mixtures:
            self.mlp = MoE(config.moe, config.hidden_size)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x_BTD, rope, mask, cache, is_token) -> tuple[Tensor, Routing | None]:
        y_BTD = self.self_attn(self.input_layernorm(x_BTD), rope, mask, cache)
        x_BTD = torch.add(x_BTD, self.attn_out_norm(y_BTD), alpha=self.residual_scale)
        y_BTD = self.post_attention_layernorm(x_BTD)
        y_BTD, routing = self.mlp(y_BTD, is_token) if isinstance(self.mlp, MoE) else (self.mlp(y_BTD), None)
        return torch.add(x_BTD, self.mlp_out_norm(y_BTD), alpha=self.residual_scale), routing


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        D, H = config.hidden_size, config.head_dim
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.index, self.head_dim, self.has_rope = index, H, index not in config.layers_without_rope
        self.attend = pick(ATTENTION, config.attention, "decoder.attention")
        self.has_own_rope = bool(config.window_rope_theta and config.windows[index])
        self.query_scale = config.attention_scale * H**0.5 or 1.0  # before backends divide by sqrt(H)
        self.softcap = config.attention_softcap
        self.sinks = nn.Parameter(torch.zeros(N)) if config.attention_sinks else None
        self.q_proj = nn.Linear(D, N * H, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, K * H, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, K * H, bias=config.qkv_bias)
        self.o_proj = nn.Linear(N * H, D, bias=config.o_bias)
        self.joined: Joined | None = None  # q, k and v in one product, set by inference.prepare
        self.qk_norm = config.qk_norm
        if config.qk_norm != "none":
            heads = (1, 1) if config.qk_norm == "head" else (N, K)
            self.q_norm, self.k_norm = (make_norm(n * H, config) for n in heads)

    def forward(self, x_BTD, rope, mask, cache):
        q, k, v = project(x_BTD, self.joined, self.q_proj, self.k_proj, self.v_proj)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTNH, k_BTKH, v_BTKH = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.qk_norm == "head":
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if self.has_rope:
            if rope[0].shape[2] > 1:
                own = slice(1, None) if self.has_own_rope else slice(1)
                rope = rope[0][:, :, own], rope[1][:, :, own]
            q_BTNH, k_BTKH = rotate_both(q_BTNH, k_BTKH, rope)
        if self.query_scale != 1:
            q_BTNH = q_BTNH * self.query_scale
        extra = (self.softcap, self.sinks) if self.softcap or self.sinks is not None else ()
        if cache is None:
            out_BTNH = self.attend(q_BTNH, k_BTKH, v_BTKH, mask, *extra)
        else:
            out_BTNH = cache.attend(self.index, q_BTNH, k_BTKH, v_BTKH, *extra)
        return self.o_proj(out_BTNH.flatten(2))

    def initial_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the sinks, if there are any, and their initial values (see vlm.py)."""
        if self.sinks is not None:
            yield self.sinks, torch.zeros(self.sinks.shape)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), the division in fp32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1 - offset))
        self.eps, self.offset = eps, offset
        self.is_fused = False  # whether to round but once, set by inference.prepare

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        if self.offset:
            normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)
            return (normed * (self.offset + self.weight.float())).to(x.dtype)
        if self.is_fused and not torch.is_grad_enabled():
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * (x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def make_norm(size: int, config: DecoderConfig) -> RMSNorm:
    return RMSNorm(size, config.rms_norm_eps, config.norm_offset)


def rope_table(position_ids: Tensor, config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine fp32[B, T, 1, H] of position * theta**(-2i / H) (Su et al. 2021, arXiv 2104.09864).

    Positions are int64[B, T], or int64[3, B, T] in time, row and column (mrope.py), each of which turns its own of the
    frequencies. Both halves of H hold the same angles; the sine is negative in the first half, as `rotate` needs it.
    Where blocks with a window have frequencies of their own, these are second: fp32[B, T, 2, H].
    """
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=torch.float32) / config.head_dim
    stretch = pick(ROPE_SCALING, config.rope_scaling.type, "decoder.rope_scaling.type")
    frequencies, amplitude = stretch(1 / config.rope_theta**exponents, config)
    positions = position_ids[..., None]
    if position_ids.ndim == 3:
        positions = position_ids[torch.tensor(find_axes(config)).to(position_ids.device)].movedim(0, -1)
    angles = positions[:, :, None].float() * frequencies
    cos, sin = amplitude * angles.cos(), amplitude * angles.sin()
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    if config.window_rope_theta:
        other = replace(config, rope_theta=config.window_rope_theta, window_rope_theta=0.0, rope_scaling=PLAIN_ROPE)
        own_cos, own_sin = rope_table(position_ids, other)
        cos, sin = torch.cat((cos, own_cos), dim=2), torch.cat((sin, own_sin), dim=2)
    return cos, sin


def find_axes(config: DecoderConfig) -> list[int]:
    """Return which of time, row and column turns each frequency."""
    sections = config.rope_sections
    if config.rope_interleaved:
        return [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(config.head_dim // 2)]
    return [axis for axis, size in enumerate(sections) for _ in range(size)]


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x[i], x[i + H / 2]) of [B, T, heads, H] by its angle; returns fp32."""
    cos, signed_sin = rope
    x = x.float()
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * signed_sin


def rotate_both(q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rotate q [B, T, N, H] and k [B, T, K, H], together where no copy of them has to be kept for gradients."""
    if torch.is_grad_enabled():
        return rotate(q, rope), rotate(k, rope)
    q, k = rotate(torch.cat((q, k), dim=2), rope).split([q.shape[2], k.shape[2]], dim=2)
    return q, k


# A scaling takes frequencies fp32[H / 2] and returns the scaled ones, and a factor for cosine and sine.


def scale_none(frequencies: Tensor, config: DecoderConfig) -> tuple[Tensor, float]:
    return frequencies, 1.0


def scale_linear(frequencies: Tensor, config: DecoderConfig) -> tuple[Tensor, float]:
    """Move all positions closer together (Chen et al. 2023, arXiv 2306.15595)."""
    return frequencies / config.rope_scaling.factor, 1.0


def scale_llama3(frequencies: Tensor, config: DecoderConfig) -> tuple[Tensor, float]:
    """Slow low frequencies down, keep high ones, and interpolate between the two (Llama 3.1, arXiv 2407.21783)."""
    c = config.rope_scaling
    turns = c.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)).clamp(0, 1)
    return frequencies * kept + frequencies / c.factor * (1 - kept), 1.0


def scale_yarn(frequencies: Tensor, config: DecoderConfig) -> tuple[Tensor, float]:
    """Like llama3, but interpolate along the frequency's index, and sharpen attention (arXiv 2309.00071)."""
    c, H, theta = config.rope_scaling, config.head_dim, config.rope_theta

    def index(turns):
        """Return the index of the frequency that makes this many turns in the original context."""
        return H * math.log(c.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(c.beta_fast), index(c.beta_slow)
    if c.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, H - 1)
    ramp = torch.arange(len(frequencies), device=frequencies.device, dtype=torch.float32)
    slowed = ((ramp - low) / max(high - low, 0.001)).clamp(0, 1)
    amplitude = 0.1 * math.log(c.factor) + 1 if c.attention_factor is None else c.attention_factor
    return frequencies / c.factor * slowed + frequencies * (1 - slowed), amplitude


PLAIN_ROPE = RopeScalingConfig()
ROPE_SCALING = {"none": scale_none, "linear": scale_linear, "llama3": scale_llama3, "yarn": scale_yarn}
