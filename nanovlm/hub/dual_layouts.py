"""Dual models in hub layouts: SigLIP, SigLIP2 whose pictures have one size (it says that it is a SigLIP), and CLIP.

```
config.json, preprocessor_config.json, tokenizer_config.json --open_hub--> DualConfig, DualProcessor
*.safetensors, by a name table ------------------------------fill--------> our weights
                                     <---------------------export_dual---  all of these files
```
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers

from nanovlm.config import DualConfig, VisionConfig, differences, from_dict, pick
from nanovlm.data.dual import DualProcessor
from nanovlm.data.tokenizer import read_tokenizer
from nanovlm.errors import UserError
from nanovlm.files import new_folder, read_json
from nanovlm.hub.configs import check_fixed, read_image_settings
from nanovlm.hub.download import find_weights
from nanovlm.hub.encoders import ACTIVATIONS, CLIP, KINDS, SIGLIP, read_encoder
from nanovlm.hub.families import VISION_FIELDS
from nanovlm.hub.weights import destinations
from nanovlm.model.dual import Dual
from nanovlm.sharded import Places
from nanovlm.tensor_files import copy_tensors, file_dtype


class StoredDual(NamedTuple):
    """A dual model on disk whose weights are not read yet (see stored.py)."""

    config: DualConfig
    processor: DualProcessor
    dtype: torch.dtype
    fill: Callable[[Places], None]


TOWERS = {
    "text_model.embeddings.": "text.",
    "text_model.encoder.layers.": "text.layers.",
    "text_model.final_layer_norm.": "text.final_layer_norm.",
    "logit_": "logit_",
}
SIGLIP_NAMES = TOWERS | {
    **{f"vision_model.{theirs}": ours for theirs, ours in SIGLIP.names.items()},
    "vision_model.head.": "image_pooling.",
    "vision_model.head.attention.in_proj_": tuple(f"image_pooling.attention.{x}_proj." for x in "qkv"),
    "text_model.head.": "text_projection.",
}
CLIP_NAMES = TOWERS | {
    **{f"vision_model.{theirs}": ours for theirs, ours in CLIP.names.items()},
    "visual_projection.": "image_projection.",
    "text_projection.": "text_projection.",
}
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "layer_norm_eps",
)


class Layout(NamedTuple):
    """How a family of dual models is laid out on the hub."""

    architecture: str
    image_processor: str
    # Their prefixes -> ours (weights.destinations).
    names: dict[str, str | tuple[str, ...]]
    # What the text_config of a config.json leaves out, and what of ours such a text tower always has.
    text: dict
    fixed_text: dict
    # What of DualConfig such a model always has.
    fixed: dict
    # Whether logit_scale has no dimension in the files.
    has_scalars: bool


LAYOUTS = {
    "siglip": Layout(
        "SiglipModel",
        "SiglipImageProcessor",
        SIGLIP_NAMES,
        {
            **{name: value for name, value in SIGLIP.defaults.items() if name in (*TEXT_FIELDS, "hidden_act")},
            **{"vocab_size": 32000, "max_position_embeddings": 64, "pad_token_id": 1},
        },
        {"positions": "learned", "is_padded": True, "is_causal": False, "pooling": "last"},
        {"image_pooling": "attention", "image_projection": "none", "text_projection": "affine"},
        has_scalars=False,
    ),
    "clip": Layout(
        "CLIPModel",
        "CLIPImageProcessor",
        CLIP_NAMES,
        {
            **{"vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12},
            **{"num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu"},
            **{"layer_norm_eps": 1e-5, "pad_token_id": 1},
        },
        {"positions": "learned", "is_padded": False, "is_causal": True, "pooling": "last"},
        {"image_pooling": "class", "image_projection": "linear", "text_projection": "linear", "initial_bias": None},
        has_scalars=True,
    ),
}
FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
# Tokenizers that pad on the left unless their settings say otherwise, and those that write texts in lower case.
PAD_LEFT, LOWER_CASE = ("GemmaTokenizer", "GemmaTokenizerFast", "Siglip2Tokenizer"), ("Siglip2Tokenizer",)


def open_hub(folder: Path, data: dict) -> StoredDual:
    """Read all but the weights of a folder in a hub layout, whose config.json is `data`."""
    path = folder / "config.json"
    layout = pick(LAYOUTS, str(data["model_type"]), f"{path}: model_type")
    text = data.get("text_config") or {}
    if not isinstance(text, dict) or not isinstance(data.get("vision_config") or {}, dict):
        raise UserError(f"{path}: text_config and vision_config must be JSON objects")
    text, vision = layout.text | text, read_encoder(folder)
    check_fixed(data.get("vision_config") or {}, {"vision_use_head": True}, path)
    tokenizer, pad_token_id = read_text_settings(folder, text)
    size = data.get("projection_dim", 512) if layout.has_scalars else text.get("projection_size")
    act = pick(ACTIVATIONS, str(text["hidden_act"]), f"{path}: hidden_act")
    fields = {
        "vision": dataclasses.asdict(vision),
        "text": {name: text[name] for name in TEXT_FIELDS} | layout.fixed_text | {"hidden_act": act},
        "projection_size": size or text["hidden_size"],
        "pad_token_id": pad_token_id,
    }
    try:
        config = from_dict(DualConfig, fields | layout.fixed | read_resizing(folder, vision.image_size)).validate()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    files = find_weights(folder)

    def fill(places: Places):
        wanted = destinations(places, layout.names)
        scale = wanted["logit_scale"][0]
        number = torch.empty((), device="meta" if scale.is_meta else "cpu")
        if layout.has_scalars:
            wanted["logit_scale"] = [number]
        copy_tensors(wanted, files, is_ignored)
        if layout.has_scalars and not scale.is_meta:
            scale.copy_(number[None])

    return StoredDual(config, DualProcessor(tokenizer, config), file_dtype(files, is_ignored), fill)


def is_ignored(name: str) -> bool:
    """Tell whether a tensor is nothing that was learned; older versions of transformers wrote some."""
    return name.endswith("embeddings.position_ids")


def read_text_settings(folder: Path, text: dict) -> tuple[Tokenizer, int]:
    """Return the tokenizer, which pads on the side that its settings say, and the id of padding."""
    tokenizer, path = read_tokenizer(folder / "tokenizer.json"), folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    pad, kind = settings.get("pad_token"), settings.get("tokenizer_class")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    pad_token_id = tokenizer.token_to_id(pad) if isinstance(pad, str) else None
    pad_token_id = text.get("pad_token_id") if pad_token_id is None else pad_token_id
    if kind in LOWER_CASE:
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    side = settings.get("padding_side", "left" if kind in PAD_LEFT else "right")
    if side not in ("left", "right") or not isinstance(pad_token_id, int):
        raise UserError(f"{path}: padding_side = {side!r} and pad_token = {pad!r} do not say how texts are padded")
    tokenizer.enable_padding(direction=side)
    return tokenizer, pad_token_id


def read_resizing(folder: Path, side: int) -> dict:
    """Return the fields of DualConfig that say how a picture becomes a square of `side` pixels.

    Raises UserError for what our processor does not do.
    """
    settings, path = read_image_settings(folder)
    if not settings:
        raise UserError(f"{folder} has no preprocessor_config.json, nor image settings in a processor_config.json")
    is_cropped, square = settings.get("do_center_crop", False), {"height": side, "width": side}
    expected = {"size": {"shortest_edge": side} if is_cropped else square, "crop_size": square, "do_resize": True}
    for field, value in expected.items():
        found = value if settings.get(field) is None else settings[field]
        if found not in (value, side):  # a mere number in older files
            raise UserError(f"{path}: {field} = {found} is not supported; it must be {value}")
    if (resample := settings.get("resample", 3)) not in FILTERS:
        raise UserError(f"{path}: resample = {resample} is not supported; it must be 2 (bilinear) or 3 (bicubic)")
    return {"resize": "crop" if is_cropped else "stretch", "resample": FILTERS[resample]}


def export_dual(model: Dual, processor: DualProcessor, out: str | Path):
    """Write a dual model to the folder `out` in the hub layout that has its features.

    Raises UserError that names a feature that none has, or a folder that is not empty.
    """
    out, family = Path(out), find_layout(model.config)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: name a new folder")
    layout = LAYOUTS[family]
    tensors = destinations(model.state_dict(), layout.names)
    if layout.has_scalars:
        tensors["logit_scale"] = [model.logit_scale.detach()[0]]
    whole = {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in tensors.items()}
    with new_folder(out) as temporary:
        for name, content in make_files(model, processor, family).items():
            (temporary / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        processor.tokenizer.save(str(temporary / "tokenizer.json"))
        save_file(
            {name: x.contiguous() for name, x in whole.items()}, temporary / "model.safetensors", {"format": "pt"}
        )


def find_layout(config: DualConfig) -> str:
    """Return the key of LAYOUTS that has all features of a dual model."""
    why = []
    for family, layout in LAYOUTS.items():
        free = {f: getattr(config.vision, f) for f in (*VISION_FIELDS, "attention", "hidden_act", "mean", "std")}
        vision = VisionConfig(**KINDS[family].features | free)
        text = dataclasses.replace(config.text, **layout.fixed_text)
        changes = differences(dataclasses.replace(config, vision=vision, text=text, **layout.fixed), config, "dual.")
        if config.initial_bias is None and not layout.has_scalars:
            changes.append("dual.initial_bias: a number against None")
        if not changes:
            return family
        why.append(f"{family} has {changes[0]}")
    raise UserError(f"no layout of the hub has this dual model: {'; '.join(why)}")


def make_files(model: Dual, processor: DualProcessor, family: str) -> dict[str, dict]:
    """Return all files but weights and tokenizer, by name."""
    config, tokenizer, layout = model.config, processor.tokenizer, LAYOUTS[family]
    v, text = config.vision, config.text
    pad = tokenizer.id_to_token(config.pad_token_id)
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.no_padding()
    end = next(iter(plain.encode("").ids[-1:]), None)  # what the tokenizer writes after every text
    if family == "clip" and (end is None or end == 2):
        raise UserError(
            f"a CLIP's texts end with a token, and token {end} cannot be it: transformers looks for another"
        )
    acts = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    square = {"height": config.tile_size, "width": config.tile_size}
    dtype = str(model.logit_scale.dtype).removeprefix("torch.")
    return {
        "config.json": {
            "architectures": [layout.architecture],
            "model_type": family,
            "vision_config": {
                "model_type": f"{family}_vision_model",
                **{name: getattr(v, name) for name in VISION_FIELDS},
                "hidden_act": acts[v.hidden_act],
            },
            "text_config": {
                "model_type": f"{family}_text_model",
                **{name: getattr(text, name) for name in TEXT_FIELDS},
                "hidden_act": acts[text.hidden_act],
                "projection_size": config.projection_size,
                "pad_token_id": config.pad_token_id,
                "bos_token_id": None,
                "eos_token_id": end,
            },
            "projection_dim": config.projection_size,
            "dtype": dtype,
            "torch_dtype": dtype,
        },
        "preprocessor_config.json": {
            "image_processor_type": layout.image_processor,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": config.tile_size} if config.resize == "crop" else square,
            "do_center_crop": config.resize == "crop",
            "crop_size": square,
            "resample": next(number for number, name in FILTERS.items() if name == config.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(v.mean),
            "image_std": list(v.std),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": pad,
            "eos_token": None if end is None else tokenizer.id_to_token(end),
            "padding_side": (tokenizer.padding or {}).get("direction", "right"),
            "model_max_length": text.max_position_embeddings,
            # What is padded is attended to.
            "model_input_names": ["input_ids"] + ["attention_mask"] * (not text.is_padded),
        },
    }
