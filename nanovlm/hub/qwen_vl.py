"""Checkpoints of Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE -> model and processor, for text and still pictures.

The encoder reads each picture at its own size and 2 x 2 patches become an image token (arXiv 2502.13923, 2511.21631):

```
              blocks of the encoder                     positions in the decoder    beside the image tokens
Qwen2.5-VL    RMS norm, SwiGLU, squares of 112 pixels   M-RoPE, one after another   nothing
Qwen3-VL      layer norm, GELU, a learned table, too    M-RoPE, interleaved         earlier features (DeepStack)
```

Qwen3-VL-MoE is a Qwen3-VL whose decoder is a mixture. Their patches are of two frames of a video, and a still picture
is shown twice: ours have the sum of both frames' weights. Videos are not read.
"""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import torch

from nanovlm.config import ProjectorConfig, TilingConfig, VisionConfig, VLMConfig, from_dict
from nanovlm.data.chat import Processor
from nanovlm.data.tokenizer import read_tokenizer
from nanovlm.errors import UserError
from nanovlm.files import read_json
from nanovlm.hub.configs import (
    FIXED_PIXELS,
    check_fixed,
    read_decoder,
    read_image_settings,
    read_parts,
    read_special_tokens,
    read_template,
)
from nanovlm.hub.decoders import QWEN_MOE_NAMES
from nanovlm.hub.download import find_weights
from nanovlm.hub.families import HEAD
from nanovlm.hub.stored import Stored
from nanovlm.hub.weights import Converted, check_tied_head, destinations
from nanovlm.sharded import Places
from nanovlm.tensor_files import copy_tensors, file_dtype, open_tensors

# Their fields of an encoder -> ours.
FIELDS = {
    "patch_size": "patch_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# What Qwen2VLImageProcessor does where a file says nothing, and the rest of what it can be told.
IMAGES = {
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "size": {"shortest_edge": 56**2, "longest_edge": 28**2 * 1280},
}
FIXED_IMAGES = FIXED_PIXELS | {"resample": 3, "temporal_patch_size": 2}


class Kind(NamedTuple):
    """One of the three: the family of its decoder, what its configs leave out, and names of the tensors."""

    decoder: str
    text: dict
    vision: dict
    is_fixed: dict
    # What ours is told beside the fields of the file.
    features: dict
    norm: str
    names: dict[str, str | tuple[str, ...]]
    # Of what precedes `patch_embed`.
    root: str


def make_names(text: str, root: str, mlp: dict[str, str]) -> dict[str, str | tuple[str, ...]]:
    """Return the names that both kinds have, those of the decoder behind `text`, those of the encoder behind `root`."""
    return {
        text: "decoder.",
        "lm_head.": "decoder.lm_head.",
        f"{root}patch_embed.proj.": "vision.patch_embedding.",
        f"{root}blocks.{{}}.norm1.": "vision.layers.{}.layer_norm1.",
        f"{root}blocks.{{}}.norm2.": "vision.layers.{}.layer_norm2.",
        f"{root}blocks.{{}}.attn.qkv.": tuple(f"vision.layers.{{}}.self_attn.{x}_proj." for x in "qkv"),
        f"{root}blocks.{{}}.attn.proj.": "vision.layers.{}.self_attn.out_proj.",
        **{f"{root}blocks.{{}}.mlp.{theirs}": f"vision.layers.{{}}.mlp.{ours}" for theirs, ours in mlp.items()},
    }


KINDS = {
    "qwen2_5_vl": Kind(
        "qwen2",
        {"vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80}
        | {"num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        {"patch_size": 14, "hidden_size": 3584, "intermediate_size": 3420, "depth": 32, "num_heads": 16}
        | {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
        {"hidden_act": "silu"},
        {"positions": "rotary", "norm": "rms", "hidden_act": "silu", "gated_mlp": True, "patch_bias": False},
        "rms",
        make_names("model.", "visual.", {"": ""})
        | {
            "visual.merger.ln_q.": "projector.main.norm.",
            "visual.merger.mlp.0.": "projector.main.fc1.",
            "visual.merger.mlp.2.": "projector.main.fc2.",
        },
        "visual.",
    ),
    "qwen3_vl": Kind(
        "qwen3",
        {"hidden_size": 4096, "rope_theta": 5e5, "max_position_embeddings": 128000},
        {"patch_size": 16, "hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16}
        | {"num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"positions": "both", "stretch": "corners"},
        "layer",
        make_names("model.language_model.", "model.visual.", {"linear_": ""})
        | {
            "model.visual.pos_embed.": "vision.position_embedding.",
            "model.visual.merger.linear_": "projector.main.",
            "model.visual.merger.norm.": "projector.main.norm.",
            "model.visual.deepstack_merger_list.{}.linear_": "projector.deepstack.{}.",
            "model.visual.deepstack_merger_list.{}.norm.": "projector.deepstack.{}.norm.",
        },
        "model.visual.",
    ),
}

ROUTER = "model.layers.{}.mlp.gate."
KINDS["qwen3_vl_moe"] = KINDS["qwen3_vl"]._replace(
    decoder="qwen3_moe",
    text={"intermediate_size": 5632, "num_key_value_heads": 16, "num_attention_heads": 16, "rope_theta": 5e5}
    | {"max_position_embeddings": 128000, "moe_intermediate_size": 1408, "num_experts": 60, "num_experts_per_tok": 4},
    names=KINDS["qwen3_vl"].names | {ROUTER.replace("model.", "model.language_model.", 1): QWEN_MOE_NAMES[ROUTER]},
)


def open_qwen(folder: Path) -> Stored:
    """Read all but the weights of one of KINDS."""
    path = folder / "config.json"
    data = read_json(path)
    kind, tokenizer = KINDS[data["model_type"]], read_tokenizer(folder / "tokenizer.json")
    config = read_config(folder, data)
    text = data.get("text_config") or data
    try:
        config = dataclasses.replace(config, **read_special_tokens(folder, text, tokenizer)).validate()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    processor, files = Processor(tokenizer, read_template(folder, tokenizer), config), find_weights(folder)
    is_tied = config.decoder.tie_word_embeddings

    def is_ignored(name):
        return is_tied and name == HEAD

    @torch.no_grad()
    def fill(places: Places):
        wanted = destinations(places, kind.names)
        patches = f"{kind.root}patch_embed.proj.weight"
        (own,) = wanted[patches]
        frames = torch.empty(
            *own.shape[:2], 2, *own.shape[2:], dtype=own.dtype, device="meta" if own.is_meta else own.device
        )
        wanted[patches] = [frames]
        if config.decoder.moe is not None:
            wanted = split_experts(places, wanted, config.decoder.mixtures, files)
        copy_tensors(wanted, files, is_ignored)
        if not own.is_meta:
            own.copy_(frames.float().sum(2))
        check_tied_head(config.decoder, places, files, HEAD)

    return Stored(config, processor, file_dtype(files, is_ignored), fill)


def split_experts(places: Places, wanted: dict, mixtures: tuple[int, ...], files: list[Path]) -> dict:
    """Return the destinations of Qwen3-VL-MoE, where gate and up are one tensor of each mixture.

    Their matrices are published as [E, inputs, outputs], and saved by transformers 5 as [E, outputs, inputs].
    """
    ours, experts = ("gate_proj", "up_proj", "down_proj"), "model.language_model.layers.{}.mlp.experts."
    E, W, D = places[f"decoder.layers.{mixtures[0]}.mlp.gate_proj"].shape
    names = [experts.format(mixtures[0]) + name for name in ("gate_up_proj", "down_proj")]
    is_flipped = find_shapes(files, names) != [[E, 2 * W, D], [E, D, W]]

    def turn(x: torch.Tensor) -> torch.Tensor:
        return x.mT if is_flipped else x

    for i in mixtures:
        gate, up, down = (places[f"decoder.layers.{i}.mlp.{name}"] for name in ours)
        for name in ours:
            del wanted[f"model.language_model.layers.{i}.mlp.{name}"]
        joined, last = ((E, D, 2 * W), (E, W, D)) if is_flipped else ((E, 2 * W, D), (E, D, W))
        wanted[experts.format(i) + "gate_up_proj"] = [Converted([gate, up], joined, lambda x: turn(x).chunk(2, dim=1))]
        wanted[experts.format(i) + "down_proj"] = [Converted([down], last, lambda x: [turn(x)])]
    return wanted


def find_shapes(files: list[Path], names: list[str]) -> list[list[int]]:
    """Return the shapes of tensors, those that are in one of the files."""
    found = {}
    for path in files:
        with open_tensors(path) as file:
            found |= {name: file.get_slice(name).get_shape() for name in names if name in file.keys()}
    return [found[name] for name in names if name in found]


def read_config(folder: Path, data: dict) -> VLMConfig:
    """Read the config without the special tokens, but for the image token."""
    path, kind = folder / "config.json", KINDS[data["model_type"]]
    text, seen = read_parts(data, path, data)
    check_fixed(seen, kind.is_fixed | {"in_channels": 3, "in_chans": 3, "temporal_patch_size": 2}, path)
    seen = kind.vision | {"spatial_merge_size": 2} | seen
    for name in ("patch_size", "spatial_merge_size", "num_position_embeddings"):
        if type(seen.get(name, 1)) is not int:
            raise UserError(f"{path}: {name} = {seen[name]!r} must be a number")
    rope, sections, is_interleaved = read_sections(text, path)
    if is_interleaved != (kind.decoder != "qwen2"):
        raise UserError(
            f"{path}: mrope_interleaved = {is_interleaved} is not supported; it must be {not is_interleaved}"
        )
    tied = text.get("tie_word_embeddings") or data.get("tie_word_embeddings") or False
    given = kind.text | text
    if kind.decoder == "qwen3_moe":
        tied = data.get("tie_word_embeddings", False)  # its text_config may say true where nothing is tied
        given |= {"norm_topk_prob": True, "num_experts": text.get("num_local_experts", given["num_experts"])}
    fixed = {"model_type": kind.decoder, "rope_parameters": rope, "rope_scaling": None, "tie_word_embeddings": tied}
    decoder = read_decoder(given | fixed, path)
    decoder = dataclasses.replace(decoder, rope_sections=sections, rope_interleaved=is_interleaved)
    settings, images = read_image_settings(folder)
    settings = IMAGES | settings
    expected = FIXED_IMAGES | {"patch_size": seen["patch_size"], "merge_size": seen["spatial_merge_size"]}
    check_fixed(settings, expected, images)
    vision = {ours: seen[theirs] for theirs, ours in FIELDS.items()} | kind.features
    vision |= {"mean": settings["image_mean"], "std": settings["image_std"], "post_layernorm": False}
    vision |= {"image_size": seen["patch_size"] * seen["spatial_merge_size"]}
    projector = {"type": "merger", "scale_factor": seen["spatial_merge_size"], "norm": kind.norm}
    if kind.decoder == "qwen2":
        vision |= {"window_size": seen["window_size"], "full_attention_layers": seen["fullatt_block_indexes"]}
    else:
        side = math.isqrt(max(number := seen["num_position_embeddings"], 0))
        if side**2 != number:
            raise UserError(f"{path}: num_position_embeddings = {number} must be the square of a number")
        vision |= {"image_size": side * seen["patch_size"]}
        projector |= {"deepstack_layers": seen["deepstack_visual_indexes"]}
    size = settings["size"] or {}
    if not isinstance(size, dict):
        raise UserError(f"{images}: size = {size} must have shortest_edge and longest_edge")
    least = settings.get("min_pixels") or size.get("shortest_edge") or IMAGES["size"]["shortest_edge"]
    most = settings.get("max_pixels") or size.get("longest_edge") or IMAGES["size"]["longest_edge"]
    if seen.get("out_hidden_size", decoder.hidden_size) != decoder.hidden_size:
        raise UserError(
            f"{path}: out_hidden_size = {seen['out_hidden_size']} must be the hidden_size = {decoder.hidden_size} of "
            "the language model"
        )
    try:
        return VLMConfig(
            from_dict(VisionConfig, vision),
            from_dict(ProjectorConfig, projector),
            tiling=from_dict(TilingConfig, {"policy": "qwen", "min_pixels": least, "max_pixels": most}),
            decoder=decoder,
            image_token_id=data.get("image_token_id", 151655),
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def read_sections(text: dict, path: Path) -> tuple[dict, tuple[int, ...], bool]:
    """Read M-RoPE's fields out of those of rotary positions; return the rest, the sections, and if they take turns."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters and rope_scaling must be JSON objects, got {rope!r}")
    rope = dict(rope)
    sections, is_interleaved = rope.pop("mrope_section", None), rope.pop("mrope_interleaved", False)
    if not isinstance(sections, list) or not all(type(size) is int for size in sections):
        raise UserError(f"{path}: mrope_section = {sections!r} must be a list of three numbers")
    for name in ("type", "rope_type"):
        if rope.get(name) == "mrope":
            rope[name] = "default"
    return rope, tuple(sections), is_interleaved
