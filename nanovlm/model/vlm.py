"""Batch -> hidden states -> logits: the vision-language model.

```
pixel_values --> vision --> projector --> image tokens
                                              | fusion: written over the placeholders' embeddings,
input_ids ----> embed_tokens -----------------+ or looked at between blocks --> decoder --> hidden states --> logits
```
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nanovlm.config import VLMConfig, pick
from nanovlm.data.places import count_places
from nanovlm.data.types import Batch, Grid, count_tiles
from nanovlm.errors import UserError
from nanovlm.model.anyres import join_tiles
from nanovlm.model.attention import Window, make_mask
from nanovlm.model.decoder import Decoder, RMSNorm
from nanovlm.model.fusion import FUSION, Between
from nanovlm.model.moe import MoE, Routing
from nanovlm.model.mrope import place_tokens
from nanovlm.model.projector import PROJECTORS, MLPProjector
from nanovlm.model.vision import PatchEmbedding, VisionEncoder, normalize, whitening_filters


class Extras:
    """What a forward pass returns beside hidden states, and what an objective sums over the micro-batches of a step.

    An objective may set attributes of its own. It is an object because FSDP would hand the model a copy of a dict.
    """

    def __init__(self, routing: Sequence[Routing] = ()):
        # The Routing of every mixture of experts in the last pass, first block first.
        self.routing = routing
        # Over the step: tokens of each expert fp32[L, E], tokens, and the balance losses times trained tokens.
        self.load: Tensor | int = 0
        self.num_tokens: Tensor | int = 0
        self.router_loss: Tensor | int = 0
        # Over the step: metrics of the objective, each the sum of something and the number of what it is summed over.
        self.means: dict[str, tuple[Tensor, Tensor | int]] = {}
        # The names of the sources that are mixed: a loss may tell that of each, whose number is values["source"].
        self.sources: Sequence[str] = ()
        # Parts of the model, by their names, that no loss reaches. Ranks that exchange gradients run them nonetheless,
        # and a step clears their gradients, with which weight decay and momentum would move them.
        self.unreached: tuple[str, ...] = ()
        # Over the step: what is added to the objective's state by its end, the sum of all ranks; nothing in a bad step.
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor, number: Tensor | int):
        """Add to a metric of the step: the sum of all totals is divided by that of all numbers.

        A loss adds the same names in the same order whatever the batch, as ranks sum them up.
        """
        before, num_before = self.means.get(name, (0, 0))
        self.means[name] = before + total.detach(), num_before + number


class VLM(nn.Module):
    def __init__(self, config: VLMConfig):
        """Build the model of a validated config; the weights are random (see initial_weights)."""
        super().__init__()
        self.config = config.validate()
        if config.vision is not None:
            self.vision = VisionEncoder(config.vision)
            make_projector = pick(PROJECTORS, config.projector.type, "projector.type")
            self.projector = make_projector(config.projector, config.vision.feature_size, config.decoder.hidden_size)
            makes, patches = self.projector.num_tokens(config.num_tile_patches), config.num_tile_patches
            if makes != config.num_image_features or makes < 1:
                right = f"give it {makes}" if makes else "say how many it is to make"
                raise UserError(
                    f"projector.num_tokens = {config.projector.num_tokens} does not fit projector.type = "
                    f"{config.projector.type!r}, which makes {makes} tokens of the {patches} patches of a tile: {right}"
                )
        self.decoder = Decoder(config.decoder)
        if config.has_score_head:
            self.score = nn.Linear(config.decoder.hidden_size, 1, bias=False)
        if config.vision is not None:
            self.fusion = pick(FUSION, config.fusion.type, "fusion.type")(config)
        # Run the encoder on batches without images too; parallel.py sets this.
        self.always_sees = False
        # What its adapted layers share, an Adapters of adapters.py, which imports this file.
        self.adapters: Any = None
        with torch.no_grad():
            for tensor, values in initial_weights(self):
                tensor.copy_(values)

    def forward(self, batch: Batch, extras: Extras | None = None) -> Tensor:
        """Return normed hidden states [B, T, D]; `extras` receives the routing of every mixture of experts."""
        masks = self.make_masks(batch)
        x_BTD, between = self.fuse(batch)
        is_token = batch.doc_ids >= 0
        hidden, routing = self.decoder(x_BTD, self.place(batch), masks, None, is_token, between=between)
        if extras is not None:
            extras.routing = routing
        return hidden

    def make_masks(self, batch: Batch) -> dict:
        """Return the mask of each of the decoder's windows, by its size."""
        d = self.config.decoder
        spans = None if d.prefix_attention == "causal" else batch.span_ids  # a teacher's student may have some
        masks = {}
        for size in set(d.windows):
            window = Window(size, batch.position_ids) if size else None
            masks[size] = make_mask(batch.doc_ids, batch.branch_ids, d.attention, spans, window)
        return masks

    def place(self, batch: Batch) -> Tensor:
        """Return the positions of tokens, int64[B, T], or with M-RoPE int64[3, B, T]."""
        if not self.config.decoder.rope_sections or not batch.grids:
            return batch.position_ids
        is_image = batch.input_ids == self.config.image_token_id
        places = torch.nonzero_static(is_image.flatten(), size=len(batch.pixel_values))[:, 0]
        return place_tokens(batch.position_ids, batch.doc_ids, batch.branch_ids, places, batch.grids)

    def embed(self, batch: Batch) -> Tensor:
        """Return token embeddings [B, T, D]; in a sequence image features replace the placeholders, in order."""
        return self.fuse(batch)[0]

    def fuse(self, batch: Batch) -> tuple[Tensor, Between | None]:
        """Return token embeddings [B, T, D] and what runs before each block of the decoder, as fusion makes them.

        On the CPU, raises UserError if the numbers of placeholders and image features differ, or if tiles belong to
        other documents than their placeholders. On a GPU this check would have to wait for the device.
        """
        x_BTD = self.decoder.embed_tokens(batch.input_ids)
        if self.config.vision is None:
            return x_BTD, None
        is_image = batch.input_ids == self.config.image_token_id
        num_places, counts = len(batch.pixel_values) * self.config.num_image_tokens, []
        if self.config.has_grids:
            if [0, *count_tiles(batch.grids)][-1] != len(batch.pixel_values):
                raise UserError(f"grids = {batch.grids} are not those of {len(batch.pixel_values)} tiles")
            counts = count_places(self.config, batch.grids)
            num_places = sum(counts)
        if not is_image.is_cuda and not torch.compiler.is_compiling():
            if int(is_image.sum()) != num_places:
                of = "" if counts else f" ({len(batch.pixel_values)} tiles of {self.config.num_image_tokens})"
                raise UserError(
                    f"{int(is_image.sum())} image placeholders in input_ids, but {num_places} image features{of}"
                )
            shown_in = batch.tile_doc_ids.repeat_interleave(self.config.num_image_tokens)
            if counts and not self.config.is_native:
                lasts = torch.tensor(count_tiles(batch.grids)) - 1
                shown_in = batch.tile_doc_ids[lasts].repeat_interleave(torch.tensor(counts))
            if not torch.equal(shown_in, batch.doc_ids[is_image]):
                raise UserError("the tiles of the batch are not in the order of the documents that show them")
        pixel_values, grids = batch.pixel_values, batch.grids
        if num_places == 0:
            if not self.always_sees:
                return x_BTD, None
            shape = pixel_values.shape[1:] if pixel_values.ndim == 3 else (3, *[self.config.tile_size] * 2)
            pixel_values = pixel_values.new_zeros(1, *shape)
            grids = [(1, 1)] if self.config.is_native else []
            if self.config.tiling.policy == "anyres":
                pixel_values, grids = pixel_values.expand(2, *shape), [(1, 1, 1, 1)]
        # Their number is known here, so neither the forward nor the backward pass waits for a GPU.
        places = torch.nonzero_static(is_image.flatten(), size=num_places)[:, 0]
        return self.fusion(x_BTD, self.encode(pixel_values, grids), batch, places)

    def encode(self, pixel_values: Tensor, grids: Sequence[Grid] = ()) -> Tensor:
        """Tiles uint8 or already normalised floats [I, C, H, W] -> image features [I, P, D], P tokens a tile.

        `grids` are those of the pictures, where the encoder reads them whole, or the tiles are put together: then the
        K image tokens of all pictures are [K, 1, D].
        """
        features = self.projector(self.see(pixel_values, grids))
        if self.config.tiling.policy == "anyres":
            assert isinstance(self.projector, MLPProjector) and self.projector.newline is not None  # as validate says
            return join_tiles(features, grids, self.projector.newline, self.config) if grids else features
        return features

    def see(self, pixel_values: Tensor, grids: Sequence[Grid] = ()) -> Tensor:
        """Return what the encoder makes of tiles, [I, P, F], before the projector; stored features are this already."""
        if pixel_values.ndim == 3:  # data/features.py
            return pixel_values.float()
        if pixel_values.dtype == torch.uint8:
            pixel_values = normalize(pixel_values, self.vision.config.mean, self.vision.config.std)
        if self.config.tiling.policy == "anyres":
            return self.vision(pixel_values)
        return self.vision(pixel_values, grids, self.config.projector.deepstack_layers)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V]."""
        return self.decoder.head(hidden)

    def logits(self, batch: Batch) -> Tensor:
        """Return logits [B, T, V] at every position."""
        return self.head(self(batch))

    def count_parameters(self) -> tuple[int, int]:
        """Return the number of parameters, and of those that one token uses: k of a mixture's E experts."""
        total = active = sum(p.numel() for p in self.parameters())
        for module in self.modules():
            if isinstance(module, MoE):
                stacks = (module.gate_proj, module.up_proj, module.down_proj)
                experts = sum(w.numel() for w in stacks if isinstance(w, Tensor))  # codes are no parameters
                active -= experts - experts * module.config.num_experts_per_tok // module.config.num_experts
        return total, active


def initial_weights(model: VLM) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of a model and its initial values, drawn whole, one at a time, in a fixed order.

    All are normal with mean 0 and these standard deviations:
    - matrices: 1 / sqrt(inputs), so that a layer keeps the scale of its input; those that write to a residual stream
      (out_proj, fc2, o_proj, down_proj) are divided by sqrt(2 * layers), so that the stream keeps its scale
    - the patch embedding: whitening filters (vision.py); convolutions: 1 / sqrt(inputs)
    - experts: as the matrices of a dense layer
    - token embeddings: 1, the scale of the image tokens; 1 / sqrt(hidden size) if they are also the tied head
    - an untied head: 0.1 / sqrt(hidden size), so that training begins at uniform logits
    - vision positions: 0.5, half the scale of the patches; class token and registers: 1, as the patches; a projector's
      latents or queries: 1, the scale of features
    Biases, the gates of cross-attention and the score head are 0, norm weights and layer scales 1.
    """
    decoder = model.config.decoder
    encoders = {name: module for name, module in model.named_modules() if isinstance(module, VisionEncoder)}
    depth = {name: len(encoder.layers) for name, encoder in encoders.items()} | {"decoder": decoder.num_hidden_layers}
    depth |= {"projector": model.config.projector.num_layers, "fusion": decoder.num_hidden_layers}
    yield from layer_weights(model, depth)
    std = decoder.hidden_size**-0.5 if decoder.tie_word_embeddings else 1 / decoder.embedding_scale
    yield normal(model.decoder.embed_tokens.weight, std)
    for encoder in encoders.values():
        yield from encoder_weights(encoder)


@runtime_checkable
class Drawn(Protocol):
    """A module with parameters or buffers of its own, beside those of the layers of torch that it consists of."""

    def initial_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each of them and its initial values."""
        ...


def normal(tensor: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """Return a tensor and normal values for it."""
    return tensor, torch.empty(tensor.shape, dtype=tensor.dtype).normal_(std=std)


def layer_weights(model: nn.Module, depth: dict[str, int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the initial weights of linear layers, mixtures and norms; `depth` is how many blocks each part has."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std = 1 / math.sqrt(module.in_features)
            if name.endswith("lm_head"):
                std *= 0.1
            elif name == "score":
                std = 0.0
            elif ".layers." in name and name.endswith(("out_proj", "fc2", "o_proj", "down_proj")):
                std /= math.sqrt(2 * depth[name.split(".layers.")[0]])
            yield normal(module.weight, std)
        elif isinstance(module, MoE):
            D, W = module.gate_proj.shape[2], module.gate_proj.shape[1]
            if isinstance(module.gate_proj, Tensor):
                yield normal(module.gate_proj, D**-0.5)
                yield normal(module.up_proj, D**-0.5)
                yield normal(module.down_proj, (W * 2 * depth["decoder"]) ** -0.5)
            if module.config.has_bias:
                yield from ((bias, torch.zeros(bias.shape)) for bias in (module.gate_bias, module.up_bias))
                yield module.down_bias, torch.zeros(module.down_bias.shape)
            if module.config.balance == "bias":
                yield module.selection_bias, torch.zeros(module.selection_bias.shape)
        elif isinstance(module, Drawn):
            yield from module.initial_weights()
        elif isinstance(module, RMSNorm):
            yield module.weight, torch.full(module.weight.shape, 1 - module.offset)
        elif isinstance(module, nn.LayerNorm):
            yield module.weight, torch.ones(module.weight.shape)
        elif isinstance(module, nn.Conv2d) and not isinstance(module, PatchEmbedding):
            yield normal(module.weight, module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding) and name.startswith("projector."):
            yield normal(module.weight, 1.0)
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d) and module.bias is not None:
            yield module.bias, torch.zeros(module.bias.shape)


def encoder_weights(encoder: VisionEncoder) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the initial positions, class token, registers and patch embedding of an image encoder."""
    if encoder.position_embedding is not None:
        yield normal(encoder.position_embedding.weight, 0.5)
    for beside in (encoder.class_embedding, encoder.registers):
        if beside is not None:
            yield normal(beside, 1.0)
    patches = encoder.patch_embedding
    if isinstance(patches, PatchEmbedding) and not patches.weight.is_meta:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # matrix factors depend on the threads, and a seed must give the same weights
        filters = whitening_filters(patches.out_channels, patches.kernel_size[0])
        torch.set_num_threads(threads)
        yield patches.weight, filters


def skip_constructors(model: nn.Module):
    """Draw and discard the random numbers that constructors of torch's layers draw on any device but meta.

    `initial_weights` draws its numbers after these, so a seed gives the same weights whether the model was built on the
    meta device or not.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            torch.empty(module.weight.shape).normal_()
        elif isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                torch.empty(parameter.shape).uniform_()
