"""Batches and routings -> numbers: the FLOPs of a step, and how evenly and by which tokens experts are used."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanovlm import distributed
from nanovlm.config import DualConfig, ProjectorConfig, VisionConfig, VLMConfig
from nanovlm.data.types import Batch
from nanovlm.model.convolution import count_multiplications
from nanovlm.model.fusion import find_visible
from nanovlm.model.moe import Routing, expert_load
from nanovlm.model.projector import PROJECTORS


class RoutingStats:
    """Counts for L mixtures of E experts, summed over batches; they stay on the device until `summary`.

    `load` fp32[L, E] counts the tokens that chose each expert, `image_load` the image tokens among them.
    """

    def __init__(self):
        self.load = self.image_load = self.confidence = self.dropped = self.num_tokens = torch.tensor(0)

    @torch.no_grad()
    def update(self, routings: Sequence[Routing], is_token: Tensor, is_image: Tensor):
        """Add the routings of a batch; is_token and is_image bool[B, T], the first False on padding."""
        is_token, is_image = is_token.flatten(), (is_image & is_token).flatten()
        self.load = self.load + torch.stack([r.load for r in routings])
        self.image_load = self.image_load + torch.stack(
            [expert_load(r.choice, is_image, len(r.load)) for r in routings]
        )
        best = torch.stack([(r.shares.amax(-1) * is_token).sum() for r in routings])
        self.confidence = self.confidence + best
        self.dropped = self.dropped + torch.stack([(~r.is_kept).sum() for r in routings])
        self.num_tokens = self.num_tokens + is_token.sum()

    def add_up(self):
        """Make these the counts of all ranks."""
        for name, value in vars(self).items():
            setattr(self, name, distributed.add_up_tensor(value))

    def summary(self) -> dict:
        """Return plain numbers.

        - expert_load [L][E]: share of the routed tokens, 1 / E when even
        - max_load [L]: the largest load over the mean one, 1 when even
        - load_entropy [L]: entropy of the load over its largest possible, 1 when even
        - router_confidence [L]: mean of the largest share that the router gives each token
        - dropped_tokens: pairs of a token and an expert that had no room for it
        - image_share [L][E]: share of image tokens among the tokens of an expert
        """
        share = self.load / self.load.sum(-1, keepdim=True)
        num_experts = share.shape[-1]
        entropy = -(share * share.clamp(min=1e-20).log()).sum(-1)
        numbers = {
            "expert_load": share,
            "max_load": share.amax(-1) * num_experts,
            "load_entropy": entropy / math.log(num_experts) if num_experts > 1 else torch.ones_like(entropy),
            "router_confidence": self.confidence / self.num_tokens,
            "dropped_tokens": self.dropped.sum(),
            "image_share": self.image_load / self.load.clamp(min=1),
        }
        return {name: _round(tensor.tolist()) for name, tensor in numbers.items()}


def _round(value):
    if isinstance(value, list):
        return [_round(x) for x in value]
    return round(value, 4) if math.isfinite(value) else None  # JSON has no NaN


# Peak FLOP/s of dense bf16 matrix products, by part of the device's name (vendors' data sheets).
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOP/s of a device, or None if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def count_flops(config: VLMConfig | DualConfig, batch: Batch, trains: dict[str, bool]) -> int:
    """Count the operations of a forward and backward pass: two for each multiplication of matrix products.

    Only needed work counts: no padding, in attention only visible pairs, logits of trained tokens only, and in the
    backward pass only gradients that the parts that train need (`trains`, for vision, projector and decoder).
    Recomputation to save memory does not count.
    """
    if isinstance(config, DualConfig):
        return count_dual_flops(config, batch, trains)
    d, v = config.decoder, config.vision
    num_tokens, num_tiles = int((batch.doc_ids >= 0).sum()), len(batch.pixel_values)
    sees, projects, decodes = (trains.get(name, False) for name in ("vision", "projector", "decoder"))
    vision = patches = projector = 0
    grids = batch.grids if config.is_native else []
    pictures = [rows * columns * config.num_tile_patches for rows, columns, *_ in grids]
    for encoder in (v, v.second) if v is not None and batch.pixel_values.ndim == 4 else ():  # else features are stored
        if encoder is not None:
            counted = [count_encoder(encoder, P) for P in pictures] or [count_encoder(encoder)] * num_tiles
            patches += sum(first for first, _rest in counted)
            vision += sum(rest for _first, rest in counted)
    if v is not None:
        P = config.num_tile_patches
        projector = num_tiles * count_projector(config.projector, P, v.feature_size, d.hidden_size, sees, projects)
    D, N, K, H = d.hidden_size, d.num_attention_heads, d.num_key_value_heads, d.head_dim
    feed_forward = (d.num_hidden_layers - len(d.mixtures)) * 3 * D * d.intermediate_size
    if d.moe is not None:
        width = (d.moe.num_experts_per_tok + d.moe.num_shared_experts) * d.moe.intermediate_size
        feed_forward += len(d.mixtures) * (D * d.moe.num_experts + 3 * D * width)
    linear = num_tokens * (d.num_hidden_layers * (2 * D * N * H + 2 * D * K * H) + feed_forward)
    pairs = {window: count_pairs(batch, window) for window in set(d.windows)}
    attention = 2 * N * H * sum(pairs[window] for window in d.windows)
    linear += len(batch.trained) * D * d.vocab_size
    # Forward; plus the gradient of a product's input if something before it trains, always so in the decoder, as it
    # starts from embeddings or images; plus the gradient of its weights if they train.
    total = patches * (1 + sees) + vision * (1 + 2 * sees)
    total += linear * (2 + decodes) + attention * 3
    if v is not None and config.fusion.type == "cross_attention":
        total += count_fusion(config, batch, trains)
    return 2 * total + projector


def count_fusion(config: VLMConfig, batch: Batch, trains: dict[str, bool]) -> int:
    """Count the multiplications of gated cross-attention: the tokens that see pictures, and the features of tiles.

    That the blocks before the first of its layers need no gradients where the decoder is frozen is left out.
    """
    d, P, learns = config.decoder, config.num_image_features, trains.get("fusion", False)
    if not len(batch.pixel_values):
        return 0
    places = (batch.input_ids == config.image_token_id).flatten().nonzero()[:, 0]
    visible = find_visible(batch, places, config.fusion.only_latest)
    D, N, K, H = d.hidden_size, d.num_attention_heads, d.num_key_value_heads, d.head_dim
    linear = int(visible.any(-1).sum()) * (2 * D * N * H + 3 * D * d.intermediate_size)
    keys_values = len(batch.pixel_values) * P * 2 * D * K * H
    pairs = 2 * N * H * P * int(visible.sum())
    has_before = trains.get("vision", False) or trains.get("projector", False)
    num_layers = d.num_hidden_layers // config.fusion.every
    return num_layers * (linear * (2 + learns) + keys_values * (1 + has_before + learns) + pairs * 3)


@functools.cache
def count_projector(
    config: ProjectorConfig, num_patches: int, vision_size: int, decoder_size: int, sees: bool, projects: bool
) -> int:
    """Count the operations of a pass of a projector over one tile, as torch does, on tensors without values.

    `sees` and `projects` are whether the encoder and the projector learn.
    """
    no_kernel = sdpa_kernel(SDPBackend.MATH)  # torch does not count those of a CPU
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, no_kernel, torch.enable_grad():
        projector = PROJECTORS[config.type](config, vision_size, decoder_size).requires_grad_(projects)
        width = vision_size * (1 + len(config.deepstack_layers))
        features = torch.empty(1, num_patches, width, requires_grad=sees)
        out = projector(features)
        if sees or projects:
            out.backward(torch.empty_like(out))
    return counter.get_total_flops()


def count_dual_flops(config: DualConfig, batch: Batch, trains: dict[str, bool]) -> int:
    """Count those of a dual model as `count_flops` does: those of its blocks, patches and pooling by attention.

    What is done once for a picture or a text is left out, and so are the products of embeddings and a captioning loss.
    """
    v, t = config.vision, config.text
    lengths = torch.unique(batch.doc_ids[batch.doc_ids >= 0], return_counts=True)[1]
    num_tokens, num_tiles = int(lengths.sum()), len(batch.pixel_values)
    pairs = int((lengths * (lengths + 1) // 2 if t.is_causal else lengths * lengths).sum())
    patches, vision = (num_tiles * number for number in count_encoder(v))
    num_features = num_tiles * (v.num_patches + v.num_tokens_beside)
    pooling = num_features * 2 * v.hidden_size**2 if config.image_pooling == "attention" else 0
    D, F = t.hidden_size, t.intermediate_size
    text = t.num_hidden_layers * (num_tokens * (4 * D * D + 2 * D * F) + 2 * pairs * D)
    sees, pools, reads = (trains.get(name, False) for name in ("vision", "image_pooling", "text"))
    return 2 * (patches * (1 + sees) + vision * (1 + 2 * sees) + pooling * (1 + sees + pools) + text * (1 + 2 * reads))


def count_encoder(config: VisionConfig, num_patches: int | None = None) -> tuple[int, int]:
    """Count the multiplications that read pixels, of which there is no gradient, and all others.

    They are those of one tile, or of a native picture of `num_patches`.
    """
    D, F, P = config.hidden_size, config.intermediate_size, num_patches or config.num_patches
    T = config.num_tokens_beside + P
    blocks = config.num_hidden_layers * T * (4 * D * D + (2 + config.gated_mlp) * D * F)
    num_whole = len(config.full_attention_layers) if config.window_size else config.num_hidden_layers
    window = (config.window_size // config.patch_size) ** 2
    blocks += 2 * T * D * (num_whole * T + (config.num_hidden_layers - num_whole) * min(T, window))
    if config.patches == "convolution":
        first, rest = count_multiplications(config)
        return first, rest + blocks
    return P * 3 * config.patch_size**2 * D, blocks


def count_pairs(batch: Batch, window: int = 0) -> int:
    """Count the pairs of a query and a key that it sees, itself included: `make_mask` without padding."""
    is_token = batch.doc_ids >= 0
    parts = torch.stack([batch.doc_ids[is_token], batch.branch_ids[is_token]])
    (docs, branches), lengths = torch.unique_consecutive(parts, dim=1, return_counts=True)
    prefix = torch.zeros(int(docs.max()) + 1 if len(docs) else 0, dtype=torch.int64)
    prefix[docs[branches == 0].long()] = lengths[branches == 0]
    seen_before = torch.where(branches > 0, prefix[docs.long()], 0)
    behind = 0
    if batch.span_ids is not None:
        docs_and_spans = torch.stack([batch.doc_ids, batch.span_ids])[:, is_token & (batch.span_ids > 0)]
        sizes = torch.unique_consecutive(docs_and_spans, dim=1, return_counts=True)[1]
        behind = int((sizes * (sizes - 1) // 2).sum())
    if window:
        return int((batch.position_ids[is_token] + 1).clamp(max=window).sum()) + behind
    return int((lengths * (lengths + 1) // 2 + lengths * seen_before).sum()) + behind
