"""Image encoders of the hub -> ours, alone or out of a larger model: SigLIP, SigLIP 2 NaFlex, CLIP and DINOv2.

```
config.json, preprocessor_config.json --read_encoder--> VisionConfig, with mean and std of the pixels
*.safetensors --------------------------load_encoder--> the encoder of a model, by the name table of its kind
```

SigLIP2 of fixed resolution says that it is a SigLIP; that of native resolution, NaFlex, is a siglip2. An encoder here
may have fewer blocks than the files, and no norm after them: LLaVA's features of CLIP are those before its last block,
without the norm (arXiv 2310.03744).
"""

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

from nanovlm.config import VisionConfig, from_dict, pick
from nanovlm.errors import UserError
from nanovlm.files import read_json
from nanovlm.hub.configs import check_fixed, read_image_settings
from nanovlm.hub.download import find_weights
from nanovlm.hub.families import SIGLIP_DEFAULTS, SIGLIP_NAMES, VISION_FIELDS
from nanovlm.hub.weights import destinations, tensor_names
from nanovlm.model.vision import VisionEncoder
from nanovlm.sharded import Places
from nanovlm.tensor_files import copy_tensors, merge_numbers

DINOV2_NAMES = {
    "embeddings.cls_token": "vision.class_embedding",
    "embeddings.register_tokens": "vision.registers",
    "embeddings.position_embeddings": "vision.position_embedding.weight",
    "embeddings.patch_embeddings.projection.": "vision.patch_embedding.",
    "encoder.layer.{}.norm1.": "vision.layers.{}.layer_norm1.",
    "encoder.layer.{}.norm2.": "vision.layers.{}.layer_norm2.",
    "encoder.layer.{}.attention.attention.query.": "vision.layers.{}.self_attn.q_proj.",
    "encoder.layer.{}.attention.attention.key.": "vision.layers.{}.self_attn.k_proj.",
    "encoder.layer.{}.attention.attention.value.": "vision.layers.{}.self_attn.v_proj.",
    "encoder.layer.{}.attention.output.dense.": "vision.layers.{}.self_attn.out_proj.",
    "encoder.layer.{}.layer_scale1.lambda1": "vision.layers.{}.layer_scale1",
    "encoder.layer.{}.layer_scale2.lambda1": "vision.layers.{}.layer_scale2",
    "encoder.layer.{}.mlp.": "vision.layers.{}.mlp.",
    "layernorm.": "vision.post_layernorm.",
}
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}
# What is in the files beside an encoder; `root` is the beginning of the encoder's names.
UNUSED = (
    r"text_model\.|(text|visual)_projection\.|logit_(scale|bias)$|classifier\.|{root}head\.|"
    r"{root}embeddings\.(position_ids|mask_token)$"
)


class Kind(NamedTuple):
    """A kind of image encoder: its name table, what its configs leave out, and what of ours it has beside that."""

    names: Mapping[str, str | tuple[str, ...]]
    defaults: dict
    # Fields of VisionConfig.
    features: dict
    # What their config must say.
    fixed: dict
    # How torch's interpolation stretches their positions for pictures of another size, as transformers does.
    stretch: dict


BICUBIC = {"mode": "bicubic"}
SIGLIP = Kind(SIGLIP_NAMES, SIGLIP_DEFAULTS | {"hidden_act": "gelu_pytorch_tanh"}, {}, {}, BICUBIC)
# Its table of positions is that of a square picture of so many patches.
SIGLIP2 = SIGLIP._replace(
    defaults=SIGLIP.defaults | {"num_patches": 256}, stretch={"mode": "bilinear", "antialias": True}
)
CLIP = Kind(
    SIGLIP_NAMES | {"pre_layrnorm.": "vision.pre_layernorm."},
    SIGLIP_DEFAULTS | {"patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    {
        "patch_bias": False,
        "class_token": True,
        "pre_layernorm": True,
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    },
    {},
    BICUBIC,
)
DINOV2 = Kind(
    DINOV2_NAMES,
    SIGLIP_DEFAULTS | {"patch_size": 14, "hidden_act": "gelu", "mlp_ratio": 4},
    {"class_token": True, "layer_scale": True, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    {"use_swiglu_ffn": False, "qkv_bias": True},
    BICUBIC,
)
DINOV2_REGISTERS = DINOV2._replace(
    defaults=DINOV2.defaults | {"patch_size": 16, "num_register_tokens": 4},
    stretch=BICUBIC | {"antialias": True},
)
# By model_type; of a pair of towers the image tower is read.
KINDS = {
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "siglip2": SIGLIP2,
    "siglip2_vision_model": SIGLIP2,
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_REGISTERS,
}


def read_encoder(folder: Path) -> VisionConfig:
    """Read the config of an image encoder. Raises UserError that names the file and a field that is not supported."""
    data, kind, path = read_kind(folder)
    return make_config(data.get("vision_config", data), kind, path)


def make_config(data: dict, kind: Kind, path: Path) -> VisionConfig:
    """Make our config of that of an encoder of some kind, in the file `path`."""
    if not isinstance(data, dict):
        raise UserError(f"{path}: vision_config must be a JSON object")
    check_fixed(data, kind.fixed | {"num_channels": 3}, path)
    data = kind.defaults | data
    if "mlp_ratio" in data:
        data["intermediate_size"] = int(data["hidden_size"] * data["mlp_ratio"])
    if "num_patches" in kind.defaults:
        num, patch = data["num_patches"], data["patch_size"]
        if not (isinstance(num, int) and isinstance(patch, int) and num > 0 and math.isqrt(num) ** 2 == num):
            raise UserError(f"{path}: num_patches = {num!r} must be the square of a number")
        data["image_size"] = math.isqrt(num) * patch
    act = pick(ACTIVATIONS, str(data["hidden_act"]), f"{path}: hidden_act")
    fields = {field: data[field] for field in VISION_FIELDS} | kind.features | {"hidden_act": act}
    if "num_register_tokens" in data:
        fields["num_registers"] = data["num_register_tokens"]
    try:
        return from_dict(VisionConfig, fields | read_normalization(path.parent)).validate()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def stretch_table(table: torch.Tensor, config: VisionConfig, grid_size: int, how: dict) -> torch.Tensor:
    """Positions [class token and P, D] of an encoder -> those of a grid of so many patches a side.

    That of the class token, which has no place, is kept; `how` is the stretch of a Kind.
    """
    first, patches = table[: config.class_token], table[config.class_token :]
    x_1DGG = rearrange(patches.float(), "(y x) D -> 1 D y x", y=config.grid_size)
    x_1DGG = F.interpolate(x_1DGG, (grid_size, grid_size), **how)
    return torch.cat((first, rearrange(x_1DGG, "1 D y x -> (y x) D").to(table.dtype)))


def read_kind(folder: Path) -> tuple[dict, Kind, Path]:
    """Return the config.json of an encoder, its kind, and the file. Raises UserError for one that is not in KINDS."""
    path = folder / "config.json"
    data = read_json(path)
    if (name := data.get("model_type")) not in KINDS:
        raise UserError(f"{path}: model_type = {name!r} is no image encoder that we have; there are {', '.join(KINDS)}")
    return data, KINDS[name], path


def read_normalization(folder: Path) -> dict:
    """Return mean and std of the image settings beside an encoder; nothing where there are no settings."""
    settings, path = read_image_settings(folder)
    check_fixed(settings, {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}, path)
    theirs = {"mean": settings.get("image_mean"), "std": settings.get("image_std")}
    return {field: value for field, value in theirs.items() if value is not None}


def load_encoder(places: Places, folder: Path):
    """Read an image encoder, alone or out of a larger model, into the encoder of a model (see stored.py).

    What is in the files and not in it is told; blocks and a last norm that the model goes without are left out.
    """
    files, kind = find_weights(folder), read_kind(folder)[1]
    keys = {name for path in files for name in tensor_names(path)}
    patches = next((name for name in keys if "embeddings.patch_embedding" in name), "embeddings.")
    root = patches[: patches.index("embeddings.")]
    names = {root + theirs: ours for theirs, ours in kind.names.items()}
    wanted = destinations(places, names)
    for token in ("cls_token", "register_tokens", "position_embeddings"):  # [1, ..., D] in the files of DINOv2
        if (name := f"{root}embeddings.{token}") in wanted:
            place = wanted[name][0][None]
            wanted[name] = [place[None] if token == "cls_token" else place]
    if "num_patches" in kind.defaults:  # a linear map of patches whose colors lie side by side
        [weight] = wanted[name := f"{root}embeddings.patch_embedding.weight"]
        flat = torch.empty(len(weight), weight.shape[1:].numel(), dtype=weight.dtype, device=weight.device)
        wanted[name] = [flat]
    with torch.device("meta"):
        whole = VisionEncoder(read_encoder(folder)).state_dict()
    left_out = {
        f"vision.{name}": tensor
        for name, tensor in whole.items()
        if f"vision.{name}" not in places and name.startswith(("layers.", "post_layernorm."))
    }
    unused = re.compile(UNUSED.format(root=re.escape(root)))
    skipped = {name for name in keys if unused.match(name)} | (destinations(left_out, names).keys() & keys)
    copy_tensors(wanted, files, skipped.__contains__)
    if "num_patches" in kind.defaults and not weight.is_meta:
        weight.copy_(rearrange(flat, "D (h w C) -> D C h w", C=3, h=weight.shape[2]))
    if skipped:
        print(f"not used of {folder}: {', '.join(merge_numbers(skipped))}", file=sys.stderr)
