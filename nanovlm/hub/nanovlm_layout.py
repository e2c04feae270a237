"""A checkpoint of github.com/huggingface/nanoVLM -> model and processor."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer

from nanovlm.config import VLMConfig, from_dict
from nanovlm.data.chat import Processor
from nanovlm.data.tilings import NANOVLM_GLOBAL
from nanovlm.data.tokenizer import read_tokenizer
from nanovlm.errors import UserError
from nanovlm.files import read_json
from nanovlm.hub.configs import check_fixed, read_special_tokens, read_template
from nanovlm.hub.download import TOKENIZER_FILES, find, find_weights
from nanovlm.hub.stored import Stored
from nanovlm.hub.weights import check_tied_head, destinations, tensor_names
from nanovlm.sharded import local_part
from nanovlm.tensor_files import copy_tensors, file_dtype

NANOVLM_NAMES = {
    "vision_encoder.patch_embedding.conv.": "vision.patch_embedding.",
    "vision_encoder.patch_embedding.position_embedding": "vision.position_embedding.weight",
    "vision_encoder.blocks.{}.ln1.": "vision.layers.{}.layer_norm1.",
    "vision_encoder.blocks.{}.ln2.": "vision.layers.{}.layer_norm2.",
    "vision_encoder.blocks.{}.attn.qkv_proj.": tuple(f"vision.layers.{{}}.self_attn.{x}_proj." for x in "qkv"),
    "vision_encoder.blocks.{}.attn.out_proj.": "vision.layers.{}.self_attn.out_proj.",
    "vision_encoder.blocks.{}.mlp.": "vision.layers.{}.mlp.",
    "vision_encoder.layer_norm.": "vision.post_layernorm.",
    "MP.": "projector.",
    "decoder.token_embedding.": "decoder.embed_tokens.",
    "decoder.blocks.{}.norm1.": "decoder.layers.{}.input_layernorm.",
    "decoder.blocks.{}.norm2.": "decoder.layers.{}.post_attention_layernorm.",
    "decoder.blocks.{}.attn.": "decoder.layers.{}.self_attn.",
    "decoder.blocks.{}.attn.out_proj.": "decoder.layers.{}.self_attn.o_proj.",
    "decoder.blocks.{}.mlp.": "decoder.layers.{}.mlp.",
    "decoder.norm.": "decoder.norm.",
    "decoder.head.": "decoder.lm_head.",
}

# Their fields -> ours. nanoVLM writes all fields into config.json, so a missing one is an error.
NANOVLM_VISION = {
    "vit_img_size": "image_size",
    "vit_patch_size": "patch_size",
    "vit_hidden_dim": "hidden_size",
    "vit_inter_dim": "intermediate_size",
    "vit_n_blocks": "num_hidden_layers",
    "vit_n_heads": "num_attention_heads",
    "vit_ln_eps": "layer_norm_eps",
}
NANOVLM_DECODER = {
    "lm_vocab_size": "vocab_size",
    "lm_hidden_dim": "hidden_size",
    "lm_inter_dim": "intermediate_size",
    "lm_n_blocks": "num_hidden_layers",
    "lm_n_heads": "num_attention_heads",
    "lm_n_kv_heads": "num_key_value_heads",
    "lm_re_base": "rope_theta",
    "lm_rms_eps": "rms_norm_eps",
    "lm_max_position_embeddings": "max_position_embeddings",
    "lm_tie_weights": "tie_word_embeddings",
}
FIXED_NANOVLM = {"vit_cls_flag": False, "lm_attn_scaling": 1.0, "lm_use_tokens": False, "lm_attention_bias": False}
# Fields that are read below, and others, such as those of training, that change no answer.
NANOVLM_OTHER = set(
    "mp_image_token_length max_img_size resize_to_max_side_len vlm_extra_tokens lm_chat_template lm_base_vocab_size "
    "extra_token_amount vit_model_type lm_model_type vit_dropout lm_dropout lm_max_length lm_eos_token_id "
    "vlm_load_backbone_weights vlm_checkpoint_path hf_repo_name".split()
)
# The first nanoVLM had no chat template: an image, then one question. IMAGE is replaced by the image token.
NANOVLM_TEMPLATE = """\
{%- for message in messages -%}
{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
{%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
{{ 'IMAGE' * (parts | selectattr('type', 'equalto', 'image') | list | length) }}
{{- 'Question: ' + text + ' Answer:' if message.role == 'user' else text + eos_token }}
{%- endfor -%}"""


def open_nanovlm(folder: Path) -> Stored:
    """Read all but the weights of a github.com/huggingface/nanoVLM checkpoint; answers should equal nanoVLM's.

    Tokens are equal, and so are pixels but for rounding in the view of a whole image (images.draw_nanovlm).
    Its encoder reads pixels x from 0 to 1, ours 2x - 1: as W x + b = W/2 (2x - 1) + b + sum(W)/2, the patch embedding
    absorbs the difference, summed in fp32. Beyond lm_max_position_embeddings, its positions are stretched; ours end.
    """
    config, tokenizer, template = read_nanovlm(folder)
    files = find_weights(folder)
    names = {name for path in files for name in tensor_names(path)}
    processor = Processor(tokenizer, template, config)

    @torch.no_grad()
    def fill(places):
        wanted = destinations(places, NANOVLM_NAMES)
        positions = "vision_encoder.patch_embedding.position_embedding"
        wanted[positions] = [wanted[positions][0][None]]
        embedding, head = "decoder.token_embedding.weight", "decoder.head.weight"
        if config.decoder.tie_word_embeddings and embedding not in names:  # a file has one of a tied tensor's two names
            wanted[head] = wanted.pop(embedding)
        ignored = {head, "decoder.rotary_embd.inv_freq"} - wanted.keys()
        copy_tensors(wanted, files, ignored.__contains__)
        if places["decoder.embed_tokens.weight"].is_meta:
            return
        if head in ignored:
            check_tied_head(config.decoder, places, files, head)
        weight, bias = (local_part(places[f"vision.patch_embedding.{name}"]) for name in ("weight", "bias"))
        bias.copy_(bias.float() + weight.float().sum((1, 2, 3)) / 2)  # each rank has the same rows of both
        weight.div_(2)

    return Stored(config, processor, file_dtype(files), fill)


def read_nanovlm(folder: Path) -> tuple[VLMConfig, Tokenizer, str]:
    """Read config, tokenizer and chat template; the tokenizer is in the folder or repository that lm_tokenizer names.

    There are three kinds of checkpoints: one square image before the text, one square image within it, and tiles.
    """
    path = folder / "config.json"
    data = read_json(path)
    check_fixed(data, FIXED_NANOVLM, path)
    required = {*NANOVLM_VISION, *NANOVLM_DECODER, "mp_pixel_shuffle_factor", "lm_tokenizer"}
    if missing := sorted(required - data.keys()):
        raise UserError(f"{path} has no {', '.join(missing)}")
    if unknown := sorted(data.keys() - required - FIXED_NANOVLM.keys() - NANOVLM_OTHER):
        raise UserError(f"{path}: {', '.join(unknown)} of another nanoVLM are not supported")
    extra = data.get("vlm_extra_tokens") or {}
    if not isinstance(extra, dict) or not all(isinstance(token, str) for token in extra.values()):
        raise UserError(f"{path}: vlm_extra_tokens must be an object of texts, not {extra!r}")
    for key, token in extra.items():
        is_place = re.fullmatch(r"r\d+c\d+", key) and token == re.sub(r"r(\d+)c(\d+)", r"<row_\1_col_\2>", key)
        if not is_place and key != "image_token" and (key, token) != ("global_image_token", NANOVLM_GLOBAL):
            raise UserError(f"{path}: vlm_extra_tokens has {key} = {token!r}, which is not supported")
    if extra and "image_token" not in extra:
        raise UserError(f"{path}: vlm_extra_tokens has no image_token")
    tiling = {"policy": "square"}
    if "r1c1" in extra:
        tiling = {
            "policy": "nanovlm",
            "longest_edge": data.get("max_img_size"),
            "enlarge": data.get("resize_to_max_side_len", False),
            "has_global": "global_image_token" in extra,
        }
    elif data.get("max_img_size", data["vit_img_size"]) != data["vit_img_size"]:
        raise UserError(
            f"{path}: max_img_size = {data['max_img_size']} is not vit_img_size = {data['vit_img_size']}, but "
            "vlm_extra_tokens has no r1c1 for tiles"
        )
    try:
        source = find(data["lm_tokenizer"], TOKENIZER_FILES)
    except ValueError as error:
        raise UserError(f"{path}: the tokenizer, lm_tokenizer, is not in the checkpoint: {error}") from error
    tokenizer = read_tokenizer(source / "tokenizer.json")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in extra.values()])
    tokens = read_special_tokens(source, {}, tokenizer)
    tokens["pad_token_id"] = tokens["eos_token_id"]
    template = data.get("lm_chat_template") or read_template(source)
    if extra:
        image = tokenizer.token_to_id(extra["image_token"])
    else:
        # The last special token becomes the image token: no text uses it, and image features replace its embedding.
        added = tokenizer.get_added_tokens_decoder()
        special = [(i, token.content) for i, token in added.items() if token.special]
        image, content = max(special, default=(tokens["eos_token_id"], ""))
        template = NANOVLM_TEMPLATE.replace("IMAGE", content)
    parts = {
        "vision": {ours: data[theirs] for theirs, ours in NANOVLM_VISION.items()},
        "projector": {"scale_factor": data["mp_pixel_shuffle_factor"]},
        "tiling": tiling,
        "decoder": {ours: data[theirs] for theirs, ours in NANOVLM_DECODER.items()},
        "image_token_id": image,
    }
    try:
        config = from_dict(VLMConfig, parts | tokens)
        head_dim = config.decoder.hidden_size // max(1, config.decoder.num_attention_heads)
        config = replace(config, decoder=replace(config.decoder, head_dim=head_dim)).validate()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if (length := data.get("mp_image_token_length", config.num_image_tokens)) != config.num_image_tokens:
        raise UserError(f"{path}: mp_image_token_length = {length}, but a tile has {config.num_image_tokens} tokens")
    return config, tokenizer, template
