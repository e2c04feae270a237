"""LLaVA 1.5 in the layout of llava-hf -> model and processor (Liu et al. 2023, arXiv 2310.03744).

```
vision_tower              CLIP, without the blocks behind vision_feature_layer     vision
multi_modal_projector     linear_1, GELU, linear_2                                 projector (type mlp, scale_factor 1)
language_model            any decoder of families.py                               decoder
```

Of a picture its middle is seen (tiling.policy = crop). Nothing is written in this layout.
"""

import dataclasses
import re
from pathlib import Path

from tokenizers import Tokenizer

from nanovlm.config import ProjectorConfig, TilingConfig, VisionConfig, VLMConfig, from_dict
from nanovlm.data.chat import Processor
from nanovlm.data.tokenizer import read_tokenizer
from nanovlm.errors import UserError
from nanovlm.files import read_json
from nanovlm.hub.configs import (
    begin_of,
    check_fixed,
    read_decoder,
    read_image_settings,
    read_special_tokens,
    read_template,
)
from nanovlm.hub.download import find_weights
from nanovlm.hub.encoders import CLIP, make_config
from nanovlm.hub.families import find_names
from nanovlm.hub.stored import Stored
from nanovlm.hub.weights import check_tied_head, destinations, tensor_names
from nanovlm.tensor_files import copy_tensors, file_dtype

# What config.json must say; left out it is as here.
FIXED_LLAVA = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_select_strategy": "default",
}
# How pictures are prepared; 3 is bicubic.
FIXED_IMAGES = {"do_resize": True, "do_center_crop": True, "resample": 3}
# The encoder of a config.json that says nothing about it: CLIP's ViT-L/14 for pictures of 336 pixels.
TOWER = {
    "model_type": "clip_vision_model",
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}


def open_llava(folder: Path) -> Stored:
    """Read all but the weights. Raises UserError that names the file and the field that is not supported."""
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    config = read_llava(folder, tokenizer)
    template, begin = read_template(folder, tokenizer), begin_of(tokenizer)
    if not template.startswith(begin) and "bos_token" not in template:  # else their processor puts it there
        template = begin + template
    processor = Processor(tokenizer, template, config)
    files = find_weights(folder)
    family = (read_json(folder / "config.json").get("text_config") or {}).get("model_type", "llama")
    names, root, head = find_llava_names(family, {key for path in files for key in tensor_names(path)})
    assert config.vision is not None
    kept = config.vision.num_hidden_layers

    def is_ignored(name: str) -> bool:
        if name.endswith("rotary_emb.inv_freq") or (name == head and config.decoder.tie_word_embeddings):
            return True
        part = name.removeprefix(root) if name.startswith(root) else ""
        block = re.match(r"encoder\.layers\.(\d+)\.", part)
        return part.startswith(("post_layernorm.", "embeddings.position_ids")) or bool(block and int(block[1]) >= kept)

    def fill(places):
        copy_tensors(destinations(places, names), files, is_ignored)
        embedding = places["decoder.embed_tokens.weight"]
        if config.decoder.tie_word_embeddings and not embedding.is_meta:
            check_tied_head(embedding, files, head)

    return Stored(config, processor, file_dtype(files, is_ignored), fill)


def find_llava_names(family: str, keys: set[str]) -> tuple[dict, str, str]:
    """Return the name table for files with these tensors, the beginning of the encoder's names, and the head's name.

    In older files the language model is whole; since transformers 5 its head is outside of it.
    """
    is_old = any(key.startswith("language_model.model.") for key in keys)
    body, head = ("language_model.model.", "language_model.") if is_old else ("model.language_model.", "")
    names = {}
    for theirs, ours in find_names(family, has_vision=False).items():
        names[body + theirs.removeprefix("model.") if theirs.startswith("model.") else head + theirs] = ours
    tower = next((key for key in keys if "embeddings.patch_embedding." in key), "model.vision_tower.embeddings.")
    root = tower[: tower.index("embeddings.")]
    names |= {root + theirs: ours for theirs, ours in CLIP.names.items()}
    projector = root.partition("vision_tower.")[0] + "multi_modal_projector."
    names |= {f"{projector}linear_{i}.": f"projector.fc{i}." for i in (1, 2)}
    return names, root, f"{head}lm_head.weight"


def read_llava(folder: Path, tokenizer: Tokenizer) -> VLMConfig:
    """Read the config; special tokens are as in read_special_tokens."""
    path = folder / "config.json"
    data = read_json(path)
    check_fixed(data, FIXED_LLAVA, path)
    text = data.get("text_config") or {}
    if not isinstance(text, dict):
        raise UserError(f"{path}: text_config must be a JSON object")
    text = {"model_type": "llama"} | text
    if data.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = True
    fields = {"image_token_id": data.get("image_token_index", data.get("image_token_id", 32000))}
    try:
        vision = read_tower(data, path)
        settings, where = read_image_settings(folder)
        side = vision.image_size
        check_fixed(settings, {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}, where)
        check_fixed(settings, FIXED_IMAGES, where)
        return dataclasses.replace(
            from_dict(VLMConfig, fields | read_special_tokens(folder, data | text, tokenizer)),
            vision=vision,
            projector=ProjectorConfig("mlp", scale_factor=1),
            tiling=TilingConfig("crop"),
            decoder=read_decoder(text, path),
        ).validate()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def read_tower(data: dict, path: Path) -> VisionConfig:
    """Read the encoder, up to the block whose output the projector sees: -2 is that of the last but one."""
    tower = data.get("vision_config") or TOWER
    if not isinstance(tower, dict) or tower.get("model_type") != TOWER["model_type"]:
        raise UserError(f"{path}: vision_config must be that of a {TOWER['model_type']}")
    vision, layer = make_config(tower, CLIP, path), data.get("vision_feature_layer", -2)
    most = vision.num_hidden_layers
    if type(layer) is not int or not 1 <= (kept := layer if layer >= 0 else most + 1 + layer) <= most:
        raise UserError(
            f"{path}: vision_feature_layer = {layer!r} must be one of the {most} blocks of the encoder, from 1, or "
            "from -1 backwards"
        )
    return dataclasses.replace(vision, num_hidden_layers=kept, post_layernorm=False)
