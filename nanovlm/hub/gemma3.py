"""Gemma-3 with pictures -> model and processor (arXiv 2503.19786).

```
vision_tower              SigLIP                                                    vision
multi_modal_projector     the mean of neighbouring patches, a norm, a linear map    projector (type pool)
language_model            gemma3_text of decoders.py                                decoder
```

Every picture is stretched to one tile (tiling.policy = gemma), whose image tokens see each other. Nothing is written in
this layout. Models of text alone are read as any other language model.
"""

import dataclasses
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer

from nanovlm.config import ProjectorConfig, TilingConfig, VLMConfig, from_dict
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
    read_vision,
)
from nanovlm.hub.download import find_weights
from nanovlm.hub.families import SIGLIP_DEFAULTS, SIGLIP_NAMES, find_joined_names
from nanovlm.hub.stored import Stored
from nanovlm.hub.weights import check_tied_head, destinations, tensor_names
from nanovlm.sharded import Places
from nanovlm.tensor_files import copy_tensors, file_dtype

# How pictures are prepared; 2 is bilinear.
FIXED_IMAGES = FIXED_PIXELS | {"resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_pan_and_scan": False}
BEGIN = "<start_of_image>"  # what templates write for a picture
PROJECTION = "mm_input_projection_weight"  # [in, out]


def open_gemma3(folder: Path) -> Stored:
    """Read all but the weights. Raises UserError that names the file and the field that is not supported."""
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    config = read_gemma3(folder, tokenizer)
    template, image = read_template(folder, tokenizer), tokenizer.id_to_token(config.image_token_id or 0)
    processor = Processor(tokenizer, template.replace(BEGIN, image or BEGIN), config)
    files = find_weights(folder)
    keys = {key for path in files for key in tensor_names(path)}
    names, before, root, head = find_joined_names("gemma3_text", SIGLIP_NAMES, keys)
    projector = f"{before}multi_modal_projector."
    names |= {projector + PROJECTION: "projector.proj.weight", f"{projector}mm_soft_emb_norm.": "projector.norm."}
    is_tied = config.decoder.tie_word_embeddings

    def is_ignored(name: str) -> bool:
        return (is_tied and name == head) or name.startswith((f"{root}head.", f"{root}embeddings.position_ids"))

    def fill(places: Places):
        wanted = destinations(places, names)
        [(name, [own])] = [(name, own) for name, own in wanted.items() if name.endswith(PROJECTION)]
        device = "meta" if own.is_meta else own.device
        wanted[name] = [flipped := torch.empty(own.shape[1], own.shape[0], dtype=own.dtype, device=device)]
        copy_tensors(wanted, files, is_ignored)
        if not own.is_meta:
            own.copy_(flipped.T)
        check_tied_head(config.decoder, places, files, head)

    return Stored(config, processor, file_dtype(files, is_ignored), fill)


def read_gemma3(folder: Path, tokenizer: Tokenizer) -> VLMConfig:
    """Read the config; special tokens are as in read_special_tokens."""
    path = folder / "config.json"
    data = read_json(path)
    text, seen = read_parts(data, path)
    check_fixed(text, {"model_type": "gemma3_text"}, path)
    check_fixed(seen, {"model_type": "siglip_vision_model", "layer_norm_eps": 1e-6}, path)
    text = {"model_type": "gemma3_text"} | text
    if data.get("tie_word_embeddings") is False:
        text["tie_word_embeddings"] = False
    vision = read_vision(seen, SIGLIP_DEFAULTS, path)
    settings, where = read_image_settings(folder)
    check_fixed(settings, FIXED_IMAGES | {"size": {"height": vision.image_size, "width": vision.image_size}}, where)
    number = data.get("mm_tokens_per_image", 256)
    side = math.isqrt(number) if type(number) is int and number > 0 else 0
    if side**2 != number or vision.grid_size % side:
        raise UserError(
            f"{path}: mm_tokens_per_image = {number!r} must be the square of a number that divides the "
            f"{vision.grid_size} patches along one side of a picture"
        )
    tokens = {"image_token_id": data.get("image_token_index", data.get("image_token_id", 262144))}
    try:
        return dataclasses.replace(
            from_dict(VLMConfig, tokens | read_special_tokens(folder, data | text, tokenizer)),
            vision=vision,
            projector=ProjectorConfig("pool", scale_factor=vision.grid_size // side),
            tiling=TilingConfig("gemma"),
            decoder=dataclasses.replace(read_decoder(text, path), prefix_attention="images"),
        ).validate()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
