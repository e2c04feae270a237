"""Our model in vLLM: prompts with pictures -> tokens of one long row -> our modules, over vLLM's paged cache.

```
picture --Pictures--> tiles, and the tokens of its layout
tiles --embed_multimodal: encoder, projector--> image tokens, kept by vLLM
tokens of all requests [T] --decoder, whose cache.attend is vLLM's Attention--> hidden states [T, D] --> logits
```

It is written for the interface of vLLM 0.32 (docs.vllm.ai, "Registering a Model" and "Multi-Modal Support"). A model is
whole on every device; more devices serve more requests (--data-parallel-size).
"""

# pyright: reportMissingImports=false, reportIncompatibleMethodOverride=false
import functools
import itertools
from collections.abc import Iterable, Mapping

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from nanovlm.data.chat import Processor
from nanovlm.data.images import TILING, find_grids, make_tiles, to_rgb
from nanovlm.data.places import count_places
from nanovlm.errors import UserError
from nanovlm.hub.vllm_export import read_vllm_config
from nanovlm.model.vlm import VLM


class NanoVLMForCausalLM(nn.Module):
    """A language model, mixtures of experts of any kind included."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        parallel = vllm_config.parallel_config
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(parallel, name) > 1:
                raise UserError(f"{name} = {getattr(parallel, name)} is not supported: use data_parallel_size")
        self.config = read_vllm_config(vllm_config.model_config.hf_config.nanovlm)
        self.model = VLM(self.config).eval()
        d = self.config.decoder
        self.attention = nn.ModuleList(
            Attention(
                d.num_attention_heads,
                d.head_dim,
                d.head_dim**-0.5,
                num_kv_heads=d.num_key_value_heads,
                cache_config=vllm_config.cache_config,
                per_layer_sliding_window=window or None,
                prefix=f"{prefix}.attention.{index}".removeprefix("."),
            )
            for index, window in enumerate(d.windows)
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.decoder.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Tokens int64[T] or embeddings [T, D] of all requests, end to end -> normed hidden states [T, D]."""
        if inputs_embeds is None:
            assert input_ids is not None  # vLLM gives either
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model.decoder(inputs_embeds[None], positions[None], None, self)[0][0]

    def attend(self, index: int, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        """Attend in block `index`, as a CachePass of kv_cache.py does: which tokens are whose, vLLM knows."""
        q, k, v = (x[0].to(v_BTKH.dtype).flatten(1) for x in (q_BTNH, k_BTKH, v_BTKH))
        return self.attention[index](q, k, v).view_as(q_BTNH)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.model.head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy all weights; return their names in this module. Raises UserError for missing and unknown names."""
        places, found = self.model.state_dict(), set()
        for name, tensor in weights:
            if name not in places:
                raise UserError(f"{name} is no weight of this model")
            places[name].copy_(tensor)
            found.add(name)
        if missing := sorted(places.keys() - found):
            raise UserError(f"weights are missing: {', '.join(missing)}")
        return {f"model.{name}" for name in found}


class Info(BaseProcessingInfo):
    @functools.cached_property
    def processor(self) -> Processor:
        theirs = self.get_tokenizer()
        tokenizer = Tokenizer.from_str(theirs.backend_tokenizer.to_str())  # one that no other thread sets limits of
        return Processor(tokenizer, theirs.chat_template, read_vllm_config(self.get_hf_config().nanovlm))

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        # What is written before each of several pictures would depend on the others.
        return {"image": 1 if TILING[self.processor.config.tiling.policy].number else None}


class LargestPictures(BaseDummyInputsBuilder[Info]):
    """Pictures that become most tokens, with which vLLM measures how much room it needs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        processor = self.info.processor
        image_token = processor.tokenizer.id_to_token(processor.config.image_token_id)
        return image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options) -> dict:
        processor = self.info.processor
        sides = [number * processor.config.tile_size for number in (1, 2, 3, 4, 6, 8, 12, 16)]
        width, height = max(itertools.product(sides, sides), key=lambda size: processor.num_image_tokens(*size))
        number = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=width, height=height, num_images=number)}


class Pictures(BaseMultiModalProcessor[Info]):
    """Pictures -> uint8 tiles, and where the image token of a prompt is, the tokens of their layout."""

    def _apply_hf_processor_main(self, mm_items, hf_kwargs) -> BatchFeature:
        images = [to_rgb(image) for image in mm_items["image"].get_all()] if mm_items.get("image") else []
        if not images:
            return BatchFeature()
        config = self.info.processor.config
        tiles = [make_tiles(image, config) for image in images]
        grids = find_grids(images, config) or [(0,)] * len(images)
        return BatchFeature(
            {
                "pixel_values": torch.cat(tiles),
                "num_tiles": torch.tensor([len(own) for own in tiles]),
                "grids": torch.tensor(grids, dtype=torch.int64),
            }
        )

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        num_tiles = hf_inputs.get("num_tiles", torch.empty(0, dtype=torch.int64))
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", num_tiles),
            "num_tiles": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "grids": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> list[PromptReplacement]:
        processor = self.info.processor
        image = processor.config.image_token_id

        def show(index: int) -> PromptUpdateDetails:
            ids = processor.image_tokens(*to_rgb(mm_items["image"].get(index)).size)
            return PromptUpdateDetails.select_token_id(ids, image)

        return [PromptReplacement("image", [image], show)]


@MULTIMODAL_REGISTRY.register_processor(Pictures, info=Info, dummy_inputs=LargestPictures)
class NanoVLMForConditionalGeneration(NanoVLMForCausalLM, SupportsMultiModal):
    """A model that sees: any encoder, projector and way to cut pictures, image tokens in the sequence."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return None  # the chat template writes a picture as it does for us

    def get_language_model(self) -> nn.Module:
        return self

    def embed_multimodal(self, **kwargs) -> tuple[Tensor, ...]:
        """Tiles uint8[I, C, S, S] of some pictures, how many each has, and their grids -> the image tokens of each."""
        grids = [tuple(grid) for grid in kwargs["grids"].tolist()] if self.config.has_grids else []
        counts = [num * self.config.num_image_tokens for num in kwargs["num_tiles"].flatten().tolist()]
        if grids:
            counts = count_places(self.config, grids)
        return self.model.encode(kwargs["pixel_values"], grids).flatten(0, 1).split(counts)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None) -> Tensor:
        x_TD = super().embed_input_ids(input_ids)
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            x_TD[is_multimodal] = torch.cat(list(multimodal_embeddings)).to(x_TD.dtype)
        return x_TD
