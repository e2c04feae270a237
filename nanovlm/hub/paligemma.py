"""PaliGemma -> model and processor (arXiv 2407.07726).

```
vision_tower              SigLIP                                    vision
multi_modal_projector     a linear map of each patch, with a bias   projector (type linear)
language_model            gemma of decoders.py                      decoder
```

Every picture is stretched to one tile (tiling.policy = paligemma), and the tokens of the prompt see each other
(decoder.prefix_attention = whole_prompt). A prompt is its pictures, bos, its text and a line break: there is no other
chat template. Nothing is written in this layout. PaliGemma 2 has Gemma-2's capped logits, which we do not have.
"""

import dataclasses
from pathlib import Path

from tokenizers import Tokenizer

from nanovlm.config import ProjectorConfig, TilingConfig, VLMConfig, from_dict
from nanovlm.data.chat import Processor
from nanovlm.data.tokenizer import CONTINUATION_TEMPLATE, read_tokenizer
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

# How pictures are prepared; 3 is bicubic.
FIXED_IMAGES = FIXED_PIXELS | {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
# What configs leave out.
VISION = {"patch_size": 14, "hidden_size": 1152, "intermediate_size": 4096, "num_hidden_layers": 27}
TEXT = {"model_type": "gemma", "vocab_size": 257152, "hidden_size": 2048, "intermediate_size": 16384} | {
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
}
# bos behind the last picture, as PaliGemmaProcessor puts it.
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.content is string -%}
{{ bos_token if loop.first }}{{ message.content }}
{%- else -%}
{%- set parts = message.content -%}
{%- set state = namespace(left=parts | selectattr('type', 'equalto', 'image') | list | length, first=loop.first) -%}
{{ bos_token if state.first and not state.left }}
{%- for part in parts -%}
{%- if part.type == 'image' -%}
{%- set state.left = state.left - 1 -%}
{{ '<image>' }}{{ bos_token if state.first and not state.left }}
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ eos_token if message.role == 'assistant' else '\n' }}
{%- endfor -%}"""


def open_paligemma(folder: Path) -> Stored:
    """Read all but the weights. Raises UserError that names the file and the field that is not supported."""
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    config = read_paligemma(folder, tokenizer)
    if read_template(folder) != CONTINUATION_TEMPLATE:
        raise UserError(f"{folder} has a chat template, which PaliGemma has not: remove it")
    image = tokenizer.id_to_token(config.image_token_id or 0) or "<image>"
    processor = Processor(tokenizer, TEMPLATE.replace("<image>", image), config)
    files = find_weights(folder)
    keys = {key for path in files for key in tensor_names(path)}
    names, before, root, head = find_joined_names("gemma", SIGLIP_NAMES, keys)
    names |= {f"{before}multi_modal_projector.linear.": "projector.proj."}
    is_tied = config.decoder.tie_word_embeddings

    def is_ignored(name: str) -> bool:
        return (is_tied and name == head) or name.startswith((f"{root}head.", f"{root}embeddings.position_ids"))

    def fill(places: Places):
        copy_tensors(destinations(places, names), files, is_ignored)
        check_tied_head(config.decoder, places, files, head)

    return Stored(config, processor, file_dtype(files, is_ignored), fill)


def read_paligemma(folder: Path, tokenizer: Tokenizer) -> VLMConfig:
    """Read the config; special tokens are as in read_special_tokens."""
    path = folder / "config.json"
    data = read_json(path)
    text, seen = read_parts(data, path)
    check_fixed(text, {"model_type": "gemma", "use_bidirectional_attention": True}, path)
    check_fixed(seen, {"model_type": "siglip_vision_model"}, path)
    text = TEXT | text | {"use_bidirectional_attention": None}
    text["tie_word_embeddings"] = data.get("tie_word_embeddings", True)
    vision = read_vision(seen, SIGLIP_DEFAULTS | VISION | {"num_attention_heads": 16}, path)
    settings, where = read_image_settings(folder)
    side = vision.image_size
    check_fixed(settings, FIXED_IMAGES | {"size": {"height": side, "width": side}}, where)
    check_fixed(settings, {"image_seq_length": vision.num_patches}, where)
    tokens = {"image_token_id": data.get("image_token_index", data.get("image_token_id", 256000))}
    try:
        return dataclasses.replace(
            from_dict(VLMConfig, tokens | read_special_tokens(folder, data | text, tokenizer)),
            vision=vision,
            projector=ProjectorConfig("linear", scale_factor=1, bias=True),
            tiling=TilingConfig("paligemma"),
            decoder=dataclasses.replace(read_decoder(text, path), prefix_attention="whole_prompt"),
        ).validate()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
