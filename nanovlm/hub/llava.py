"""LLaVA 1.5, LLaVA-OneVision and InternVL3 as transformers writes them -> model and processor.

```
                         LLaVA 1.5 (2310.03744)      LLaVA-OneVision (2408.03326)    InternVL3 (2504.10479)
vision_tower             CLIP                        SigLIP                          InternViT
multi_modal_projector    linear_1, GELU, linear_2    the same                        pixel shuffle, norm, the same
image_newline            none                        ends rows of features           none
language_model           any decoder of decoders.py
tiling.policy            crop                        anyres                          internvl
```

An encoder has the blocks up to vision_feature_layer, mostly without the last norm.
LLaVA 1.5 sees the middle of a picture (tiling.policy = crop), LLaVA-OneVision all of it and tiles of a grid (anyres),
also where there are several pictures; it sees no videos. Nothing is written in this layout.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
from nanovlm.hub.encoders import BICUBIC, CLIP, SIGLIP, Kind, make_config
from nanovlm.hub.families import find_joined_names
from nanovlm.hub.stored import Stored
from nanovlm.hub.weights import check_tied_head, destinations, tensor_names
from nanovlm.tensor_files import copy_tensors, file_dtype

# What config.json must say; left out it is as here.
FIXED_PROJECTOR = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
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
# The same of LLaVA-OneVision: SigLIP's SO400M for pictures of 384 pixels, without its last block.
ONEVISION_TOWER = {
    "model_type": "siglip_vision_model",
    "image_size": 384,
    "patch_size": 14,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
}


INTERN_TOWER = {"model_type": "internvl_vision"}
INTERN = Kind(
    {
        "embeddings.cls_token": "vision.class_embedding",
        "embeddings.position_embeddings": "vision.position_embedding.weight",
        "embeddings.patch_embeddings.projection.": "vision.patch_embedding.",
        "encoder.layer.{}.layernorm_before.": "vision.layers.{}.layer_norm1.",
        "encoder.layer.{}.layernorm_after.": "vision.layers.{}.layer_norm2.",
        "encoder.layer.{}.attention.": "vision.layers.{}.self_attn.",
        "encoder.layer.{}.attention.projection_layer.": "vision.layers.{}.self_attn.out_proj.",
        "encoder.layer.{}.lambda_": "vision.layers.{}.layer_scale",
        "encoder.layer.{}.mlp.": "vision.layers.{}.mlp.",
    },
    {
        **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
        **{"hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": 448, "patch_size": 14},
    },
    {"class_token": True, "layer_scale": True, "mean": CLIP.features["mean"], "std": CLIP.features["std"]},
    {
        **{"attention_bias": True, "use_qk_norm": False, "norm_type": "layer_norm", "use_mask_token": False},
        **{"use_absolute_position_embeddings": True, "use_mean_pooling": True},
    },
    BICUBIC,
)


class Layout(NamedTuple):
    """What they have in common, but not alike."""

    text: str
    tower: dict
    kind: Kind
    # vision_feature_layer where config.json does not say it.
    layer: int
    strategy: str
    image_token: int
    # tie_word_embeddings, likewise.
    is_tied: bool
    projector: ProjectorConfig
    read_tiling: Callable[[dict, int, dict, Path], TilingConfig]


def read_crop(data: dict, side: int, settings: dict, where: Path) -> TilingConfig:
    """Read how LLaVA 1.5 prepares pictures; 3 is bicubic."""
    check_fixed(settings, {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}, where)
    check_fixed(settings, {"do_resize": True, "do_center_crop": True, "resample": 3}, where)
    return TilingConfig("crop")


def read_anyres(data: dict, side: int, settings: dict, where: Path) -> TilingConfig:
    """Read the grids of LLaVA-OneVision, all up to some side, and to how many tiles large pictures are shrunk."""
    check_fixed(settings, {"size": {"height": side, "width": side}, "resample": 3}, where)
    check_fixed(settings, {"do_resize": True, "do_center_crop": None, "do_pad": True}, where)
    grids = data.get("image_grid_pinpoints") or settings.get("image_grid_pinpoints")
    grids = [[side * (i // 6 + 1), side * (i % 6 + 1)] for i in range(36)] if grids is None else grids
    numbers = range(1, math.isqrt(len(grids) if isinstance(grids, list) else 0) + 1)
    for name, found in (("config.json", grids), (where.name, settings.get("image_grid_pinpoints") or grids)):
        if found != [[side * rows, side * columns] for rows in numbers for columns in numbers]:
            raise UserError(
                f"{where.parent / name}: image_grid_pinpoints = {found} is not supported; it must be all grids of "
                f"tiles of {side} pixels up to some number of rows and as many columns, in order"
            )
    most = re.fullmatch(r"anyres_max_(\d+)", str(data.get("vision_aspect_ratio", "anyres_max_9")))
    if most is None:
        raise UserError(
            f"{where.parent / 'config.json'}: vision_aspect_ratio = {data['vision_aspect_ratio']!r} is not supported; "
            "it must be anyres_max_ and a number"
        )
    return TilingConfig("anyres", max_tiles=int(most[1]), longest_edge=side * len(numbers))


def read_internvl(data: dict, side: int, settings: dict, where: Path) -> TilingConfig:
    """Read how InternVL3's processor prepares pictures, which cuts them whatever crop_to_patches says."""
    check_fixed(settings, {"size": {"height": side, "width": side}, "resample": 3, "min_patches": 1}, where)
    return from_dict(TilingConfig, {"policy": "internvl", "max_tiles": settings.get("max_patches", 12)})


LAYOUTS = {
    "llava": Layout("llama", TOWER, CLIP, -2, "default", 32000, False, ProjectorConfig("mlp", 1), read_crop),
    "llava_onevision": Layout(
        *("qwen2", ONEVISION_TOWER, SIGLIP, -1, "full", 151646, False),
        ProjectorConfig("mlp", 1, has_newline=True),
        read_anyres,
    ),
    "internvl": Layout(
        *("qwen2", INTERN_TOWER, INTERN, -1, "default", 151667, True),
        ProjectorConfig("mlp", 2, norm="layer", norm_eps=1e-5),
        read_internvl,
    ),
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
    data = read_json(folder / "config.json")
    family = (data.get("text_config") or {}).get("model_type", LAYOUTS[data["model_type"]].text)
    kind = LAYOUTS[data["model_type"]].kind
    keys = {key for path in files for key in tensor_names(path)}
    names, before, root, head = find_joined_names(family, kind.names, keys)
    names |= {f"{before}multi_modal_projector.linear_{i}.": f"projector.fc{i}." for i in (1, 2)}
    names |= {f"{before}multi_modal_projector.layer_norm.": "projector.norm."}
    names |= {f"{before}image_newline": "projector.newline"}
    assert config.vision is not None
    kept = config.vision.num_hidden_layers

    def is_ignored(name: str) -> bool:
        if name.endswith("rotary_emb.inv_freq") or (name == head and config.decoder.tie_word_embeddings):
            return True
        part = name.removeprefix(root) if name.startswith(root) else ""
        block = re.match(r"encoder\.layers?\.(\d+)\.", part)
        return part.startswith(("post_layernorm.", "head.", "embeddings.position_ids")) or bool(
            block and int(block[1]) >= kept
        )

    def fill(places):
        wanted = destinations(places, names)
        for token in ("cls_token", "position_embeddings"):  # [1, ..., D] in the files of InternVL3
            if (name := f"{root}embeddings.{token}") in wanted:
                place = wanted[name][0][None]
                wanted[name] = [place[None] if token == "cls_token" else place]
        copy_tensors(wanted, files, is_ignored)
        check_tied_head(config.decoder, places, files, head)

    return Stored(config, processor, file_dtype(files, is_ignored), fill)


def read_llava(folder: Path, tokenizer: Tokenizer) -> VLMConfig:
    """Read the config; special tokens are as in read_special_tokens."""
    path = folder / "config.json"
    data = read_json(path)
    layout = LAYOUTS[data["model_type"]]
    check_fixed(data, FIXED_PROJECTOR | {"vision_feature_select_strategy": layout.strategy}, path)
    text = data.get("text_config") or {}
    if not isinstance(text, dict):
        raise UserError(f"{path}: text_config must be a JSON object")
    text = {"model_type": layout.text} | text
    is_tied = data.get("tie_word_embeddings")
    if is_tied or "tie_word_embeddings" not in text:
        text["tie_word_embeddings"] = layout.is_tied if is_tied is None else is_tied
    fields = {"image_token_id": data.get("image_token_index", data.get("image_token_id", layout.image_token))}
    try:
        vision = read_tower(data, layout, path)
        settings, where = read_image_settings(folder)
        projector, ratio = layout.projector, data.get("downsample_ratio", 1 / layout.projector.scale_factor)
        if not isinstance(ratio, float | int) or not 0 < ratio <= 1:
            raise UserError(f"{path}: downsample_ratio = {ratio!r} must be a number above 0, at most 1")
        projector = dataclasses.replace(projector, scale_factor=round(1 / ratio))
        config = dataclasses.replace(
            from_dict(VLMConfig, fields | read_special_tokens(folder, data | text, tokenizer)),
            vision=vision,
            projector=projector,
            tiling=layout.read_tiling(data, vision.image_size, settings, where),
            decoder=read_decoder(text, path),
        ).validate()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    length = data.get("image_seq_length", config.num_image_features)
    if length != config.num_image_features and layout.kind is INTERN:
        raise UserError(f"{path}: image_seq_length = {length}, but a tile has {config.num_image_features} tokens")
    return config


def read_tower(data: dict, layout: Layout, path: Path) -> VisionConfig:
    """Read the encoder, up to the block whose output the projector sees: -2 is that of the last but one."""
    tower = data.get("vision_config") or layout.tower
    if not isinstance(tower, dict) or tower.get("model_type") != layout.tower["model_type"]:
        raise UserError(f"{path}: vision_config must be that of a {layout.tower['model_type']}")
    tower = tower | {name: find_side(tower[name], name, path) for name in ("image_size", "patch_size") if name in tower}
    vision, layer = make_config(tower, layout.kind, path), data.get("vision_feature_layer", layout.layer)
    most = vision.num_hidden_layers
    if type(layer) is not int or not 1 <= (kept := layer if layer >= 0 else most + 1 + layer) <= most:
        raise UserError(
            f"{path}: vision_feature_layer = {layer!r} must be one of the {most} blocks of the encoder, from 1, or "
            "from -1 backwards"
        )
    return dataclasses.replace(vision, num_hidden_layers=kept, post_layernorm=False)


def find_side(size: object, name: str, path: Path) -> object:
    """Return the side of a square that is written as a number, or as height and width."""
    if isinstance(size, list):
        if len(size) != 2 or size[0] != size[1]:
            raise UserError(f"{path}: {name} = {size} is not supported; both sides must be equal")
        return size[0]
    return size
