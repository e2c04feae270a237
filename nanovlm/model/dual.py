"""Pictures and texts -> embeddings of one space: an image tower and a text tower, trained by contrast.

```
pixel_values --> vision --> patches --> image_pooling --> image_projection --> embedding of each picture [I, E]
input_ids ----> text ----> tokens ---> text pooling ----> text_projection ---> embedding of each text    [J, E]
```

Both are normalised; their products, times exp(logit_scale), plus logit_bias, are the logits of pairs.
CLIP (Radford et al. 2021, arXiv 2103.00020) has a causal text tower and a class token, SigLIP (Zhai et al. 2023,
arXiv 2303.15343) pools by attention and pads its texts. A text is a document of a packed row, and its tokens see no
other's. Legend: I pictures, P patches, J texts, B rows, T tokens a row, D hidden, E width of the embeddings.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanovlm.config import DecoderConfig, DualConfig, TextConfig, VisionConfig, pick
from nanovlm.data.types import Batch
from nanovlm.model.attention import make_mask
from nanovlm.model.decoder import rope_table
from nanovlm.model.vision import VisionAttention, VisionBlock, VisionEncoder, VisionMLP, normalize
from nanovlm.model.vlm import encoder_weights, layer_weights, normal


class Dual(nn.Module):
    def __init__(self, config: DualConfig):
        """Build the model of a validated config; the weights are random (see initial_weights)."""
        super().__init__()
        self.config = config.validate()
        v, t, size = config.vision, config.text, config.projection_size
        self.vision = VisionEncoder(v)
        self.image_pooling = pick(IMAGE_POOLING, config.image_pooling, "dual.image_pooling")(v)
        self.image_projection = make_projection(config.image_projection, v.hidden_size, size)
        self.text = TextTower(t)
        self.pool_text = pick(TEXT_POOLING, t.pooling, "dual.text.pooling")
        self.text_projection = make_projection(config.text_projection, t.hidden_size, size)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.initial_scale)]))
        self.logit_bias = None if config.initial_bias is None else nn.Parameter(torch.tensor([config.initial_bias]))
        self.adapters: Any = None  # a dual model has none, as train/ asks
        with torch.no_grad():
            for tensor, values in initial_weights(self):
                tensor.copy_(values)

    def forward(
        self, batch: Batch, num_parts: int = 1, beside: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the embeddings of the batch's pictures and of its texts, fp32[I, E] and fp32[J, E].

        With several parts the activations of one alone are in memory: the backward pass computes each again, with the
        random numbers of the first time (gradient caching, Gao et al. 2021, arXiv 2101.06983). What `beside` makes of
        the features of the patches [n, P, D] of pictures and of their indices int64[n] comes third, [I, ...].
        """
        pixel_values = batch.pixel_values
        if not len(pixel_values):  # ranks that exchange gradients must use the same parameters
            pixel_values = pixel_values.new_zeros(1, 3, *[self.config.tile_size] * 2)
        see, embed_texts = functools.partial(self._see, beside), self._embed_rows
        if num_parts > 1:
            see, embed_texts = (functools.partial(recompute, f) for f in (see, embed_texts))
        rows = (x.chunk(num_parts) for x in (batch.input_ids, batch.doc_ids, batch.branch_ids, batch.position_ids))
        index = torch.arange(len(pixel_values), device=pixel_values.device)
        pictures = zip(*(x.chunk(num_parts) for x in (pixel_values, index)), strict=True)
        seen = zip(*[see(*part) for part in pictures], strict=True)
        images, *others = (torch.cat(parts)[: len(batch.pixel_values)] for parts in seen)
        texts = torch.cat([embed_texts(*part) for part in zip(*rows, strict=True)])
        return images, texts, *others

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """Pictures, uint8 or already normalised floats [I, C, H, W] -> fp32[I, E] of length 1."""
        return self._see(None, pixel_values)[0]

    def _see(self, beside, pixel_values: Tensor, index: Tensor | None = None) -> tuple[Tensor, ...]:
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize(pixel_values, self.config.vision.mean, self.config.vision.std)
        x_IPD = self.vision.forward_all(pixel_values)
        images = F.normalize(self.image_projection(self.image_pooling(x_IPD)).float(), dim=-1)
        return (images, beside(x_IPD[:, self.config.vision.num_tokens_beside :], index)) if beside else (images,)

    def embed_texts(self, batch: Batch) -> Tensor:
        """The documents of a batch, in its order -> fp32[J, E] of length 1."""
        return self._embed_rows(batch.input_ids, batch.doc_ids, batch.branch_ids, batch.position_ids)

    def _embed_rows(self, *rows: Tensor) -> Tensor:
        x_JD = self.pool_text(*self.text(*rows))
        return F.normalize(self.text_projection(x_JD).float(), dim=-1)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Embeddings fp32[I, E] and fp32[J, E] -> fp32[I, J]: of softmax in CLIP, of sigmoid in SigLIP."""
        logits = self.logit_scale.float().exp() * images @ texts.T
        return logits if self.logit_bias is None else logits + self.logit_bias.float()

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of parameters, twice, as all of them are used for every pair."""
        total = sum(p.numel() for p in self.parameters())
        return total, total


def initial_weights(model: Dual) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of a model and its initial values, as vlm.initial_weights does.

    Token embeddings and the probe have standard deviation 1, positions 0.5; the scale and the bias are the config's.
    """
    config, text, pooling = model.config, model.text, model.image_pooling
    yield from layer_weights(model, {"vision": len(model.vision.layers), "text": len(text.layers)})
    yield normal(text.token_embedding.weight, 1.0)
    if text.position_embedding is not None:
        yield normal(text.position_embedding.weight, 0.5)
    yield from encoder_weights(model.vision)
    if isinstance(pooling, AttentionPooling):
        yield normal(pooling.probe, 1.0)
    yield model.logit_scale, torch.tensor([math.log(config.initial_scale)])
    if model.logit_bias is not None:
        yield model.logit_bias, torch.tensor([config.initial_bias])


def recompute(embed: Callable[..., Any], *part: Tensor) -> Any:
    return checkpoint(embed, *part, use_reentrant=False)


def make_projection(kind: str, size_in: int, size_out: int) -> nn.Module:
    return nn.Identity() if kind == "none" else nn.Linear(size_in, size_out, bias=kind == "affine")


# --- texts -----------------------------------------------------------------------------------------------------


class TextTower(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = None
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(VisionBlock(as_vision(config)) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(
        self, input_ids: Tensor, doc_ids: Tensor, branch_ids: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows of texts, as those of a Batch -> [B, T, D] and the document of each position, int32[B, T].

        Texts that are padded come out one a row, as they are all of one length and need no mask.
        """
        config, rope, is_token = self.config, None, doc_ids >= 0
        if config.is_padded and is_token.any():
            rows = (input_ids, position_ids, doc_ids)
            input_ids, position_ids, doc_ids = (x[is_token].view(-1, config.max_position_embeddings) for x in rows)
            mask = None
        elif config.is_causal:
            mask = make_mask(doc_ids, branch_ids, config.attention)
        else:
            mask = (doc_ids[:, :, None] == doc_ids[:, None, :])[:, None]
        x_BTD = self.token_embedding(input_ids)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(position_ids)
        else:
            head_dim = config.hidden_size // config.num_attention_heads
            rope = rope_table(position_ids, DecoderConfig(head_dim=head_dim, rope_theta=config.rope_theta))
        for layer in self.layers:
            x_BTD = layer(x_BTD, rope, mask)
        return self.final_layer_norm(x_BTD), doc_ids


def as_vision(config: TextConfig) -> VisionConfig:
    """Return the config of an image encoder whose blocks are those of a text tower."""
    shared = {f.name for f in fields(config)} & {f.name for f in fields(VisionConfig)} - {"positions"}
    return VisionConfig(**{name: value for name, value in asdict(config).items() if name in shared})


def find_ends(doc_ids: Tensor) -> Tensor:
    """int64[J]: the flat index of the last position of each document."""
    is_end = doc_ids >= 0
    is_end[:, :-1] &= doc_ids[:, :-1] != doc_ids[:, 1:]
    return is_end.flatten().nonzero()[:, 0]


def pool_last(x_BTD: Tensor, doc_ids: Tensor) -> Tensor:
    """The last position of each text, its end token or padding."""
    return x_BTD.flatten(0, 1)[find_ends(doc_ids)]


def pool_mean(x_BTD: Tensor, doc_ids: Tensor) -> Tensor:
    """The mean over each text."""
    ids, num_texts = doc_ids.flatten().long(), len(find_ends(doc_ids))
    is_token = ids >= 0
    ids = ids - ids[is_token].min() if num_texts else ids  # of the first of these rows
    sums = x_BTD.new_zeros(num_texts, x_BTD.shape[-1], dtype=torch.float32)
    sums = sums.index_add(0, ids[is_token], x_BTD.flatten(0, 1)[is_token].float())
    return (sums / ids[is_token].bincount(minlength=num_texts)[:, None]).to(x_BTD.dtype)


TEXT_POOLING = {"last": pool_last, "mean": pool_mean}


# --- pictures --------------------------------------------------------------------------------------------------


class AttentionPooling(nn.Module):
    """A learned query attends to the patches; then an MLP with a residual connection (SigLIP's head)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.attention = VisionAttention(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x_IPD: Tensor) -> Tensor:
        """All tokens of the tower [I, P, D] -> [I, D]."""
        attention, heads = self.attention, self.attention.num_heads
        q = attention.q_proj(self.probe.to(x_IPD.dtype)).expand(len(x_IPD), -1, -1)
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, attention.k_proj(x_IPD), attention.v_proj(x_IPD)))
        x_ID = attention.out_proj(attention.attend(q, k, v, None).flatten(2))[:, 0]
        return x_ID + self.mlp(self.layernorm(x_ID))


class ClassPooling(nn.Module):
    """The class token."""

    def __init__(self, config: VisionConfig):
        super().__init__()

    def forward(self, x_IPD: Tensor) -> Tensor:
        return x_IPD[:, 0]


class MeanPooling(nn.Module):
    """The mean over the patches."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_tokens_beside = config.num_tokens_beside

    def forward(self, x_IPD: Tensor) -> Tensor:
        return x_IPD[:, self.num_tokens_beside :].mean(1)


IMAGE_POOLING = {"attention": AttentionPooling, "class": ClassPooling, "mean": MeanPooling}
