"""Hub checkpoint -> model and processor: name tables, configs, download, and the one entry point `load`.

```
owner/name --download--> folder --config.json--> VLMConfig --> model without weights
                           |--*.safetensors, by the name table ------> its weights, tensor by tensor into place
                           |--tokenizer, template, image settings ---> Processor
```

A name table maps prefixes of their tensor names to ours, or to several of ours whose rows follow one another; what
follows a prefix is the same on both sides, and nothing is permuted. The tables and the fields of configs are used in
both directions: `export.py` writes with them.

    python -m nanovlm.hf export runs/demo OUT_DIR --check
"""

import dataclasses
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer

from nanovlm import checkpoint, gguf
from nanovlm.checkpoint import copy_tensors, empty_model, file_dtype, merge_numbers, open_tensors, read_json
from nanovlm.config import (
    DecoderConfig,
    MoEConfig,
    ProjectorConfig,
    RopeScalingConfig,
    TilingConfig,
    VisionConfig,
    VLMConfig,
    from_dict,
    pick,
)
from nanovlm.data.chat import Processor
from nanovlm.data.images import NANOVLM_GLOBAL
from nanovlm.data.tokenizer import COMPLETION_TEMPLATE, read_tokenizer
from nanovlm.model.vlm import VLM

# What is downloaded of a repository.
FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
)
TOKENIZER_FILES = tuple(name for name in FILES if "safetensors" not in name)

# ---- names: their prefix -> ours, {} for a number ----

SIGLIP_NAMES = {
    "embeddings.": "vision.",
    "encoder.layers.": "vision.layers.",
    "post_layernorm.": "vision.post_layernorm.",
}
LLAMA_NAMES = {"model.": "decoder.", "lm_head.": "decoder.lm_head."}
HEAD = "lm_head.weight"
# The mixtures, in addition: an expert's matrix is a slice of ours, so that their names have a number more.
MIXTRAL_NAMES = {
    "model.layers.{}.block_sparse_moe.gate.": "decoder.layers.{}.mlp.router.",
    "model.layers.{}.block_sparse_moe.experts.{}.w1.weight": "decoder.layers.{}.mlp.gate_proj",
    "model.layers.{}.block_sparse_moe.experts.{}.w3.weight": "decoder.layers.{}.mlp.up_proj",
    "model.layers.{}.block_sparse_moe.experts.{}.w2.weight": "decoder.layers.{}.mlp.down_proj",
}
QWEN_MOE_NAMES = {
    "model.layers.{}.mlp.gate.": "decoder.layers.{}.mlp.router.",
    **{
        f"model.layers.{{}}.mlp.experts.{{}}.{x}_proj.weight": f"decoder.layers.{{}}.mlp.{x}_proj"
        for x in ("gate", "up", "down")
    },
}
IDEFICS3_NAMES = {
    **{f"model.vision_model.{theirs}": ours for theirs, ours in SIGLIP_NAMES.items()},
    "model.connector.modality_projection.": "projector.",
}
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

# ---- configs: fields by the same name on both sides, and what a config.json leaves out ----

VISION_FIELDS = (
    "image_size",
    "patch_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "layer_norm_eps",
)
DECODER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
)
ROPE_FIELDS = {  # those of RopeScalingConfig that each type has
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings"),
}
# What our modules compute; a config that says otherwise is refused.
FIXED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "attention_multiplier": 1.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "clip_qkv": None,
}
FIXED_VISION = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
SIGLIP_DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-6,
}
IDEFICS3_VISION_DEFAULTS = SIGLIP_DEFAULTS | {"patch_size": 32, "hidden_size": 1152, "num_attention_heads": 16}
# Grids of up to 128 patches a side at which Idefics3 gives some neighbours the same position, as it rounds fractions.
# fmt: off
IDEFICS3_BAD_GRIDS = (
    19, 25, 29, 31, 38, 40, 41, 43, 47, 49, 50, 54, 55, 58, 59, 61, 62, 67, 68, 71, 72, 73, 74, 76, 77, 80, 82, 83, 84,
    86, 87, 93, 94, 97, 98, 99, 100, 101, 103, 107, 108, 109, 110, 111, 113, 115, 116, 118, 121, 122, 123, 124, 127,
)
# fmt: on


class Family(NamedTuple):
    """A kind of language model: its class, the values that its config.json may leave out, and what it has."""

    architecture: str
    defaults: dict
    qkv_bias: bool = False
    qk_norm: str = "none"
    # Of a mixture: names of its tensors, and its fields for fields of MoEConfig.
    names: dict | None = None
    moe: dict | None = None


LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
QWEN_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
SMOLLM3_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2000000.0,
    "tie_word_embeddings": True,
    "no_rope_layer_interval": 4,
}
MIXTRAL_DEFAULTS = LLAMA_DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
}
QWEN3_MOE_DEFAULTS = QWEN_DEFAULTS | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}
OLMOE_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.01,
}
# Their fields of a mixture -> those of MoEConfig.
MIXTRAL_FIELDS = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "intermediate_size": "intermediate_size",
    "router_aux_loss_coef": "balance_weight",
    "router_jitter_noise": "jitter",
}
QWEN3_MOE_FIELDS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "intermediate_size",
    "router_aux_loss_coef": "balance_weight",
    "norm_topk_prob": "norm_topk_prob",
}
OLMOE_FIELDS = {theirs.removeprefix("moe_"): ours for theirs, ours in QWEN3_MOE_FIELDS.items()}
DECODERS = {
    "llama": Family("LlamaForCausalLM", LLAMA_DEFAULTS),
    "smollm3": Family("SmolLM3ForCausalLM", SMOLLM3_DEFAULTS),
    "qwen2": Family("Qwen2ForCausalLM", QWEN_DEFAULTS, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", QWEN_DEFAULTS | {"head_dim": 128}, qk_norm="head"),
    "mixtral": Family("MixtralForCausalLM", MIXTRAL_DEFAULTS, False, "none", MIXTRAL_NAMES, MIXTRAL_FIELDS),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", QWEN3_MOE_DEFAULTS, qk_norm="head", names=QWEN_MOE_NAMES, moe=QWEN3_MOE_FIELDS
    ),
    "olmoe": Family("OlmoeForCausalLM", OLMOE_DEFAULTS, False, "all", QWEN_MOE_NAMES, OLMOE_FIELDS),
}
IDEFICS3_TYPES = ("idefics3", "smolvlm")  # one architecture under two names
SIGLIP_TYPES = ("siglip", "siglip_vision_model")


# ---- load ----


def load(
    name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[VLM, Processor]:
    """Read a model and its processor; the model is in evaluation mode.

    `name` is a model folder of ours, a folder in a layout of the hub, or a repository there, `owner/name` or
    `owner/name@revision`; also a .gguf file, or `smollm2` (see gguf.py). The weights have the dtype of their file
    unless another is given. Raises ValueError that names the file, field or tensor that is missing, unknown, or
    beyond our modules.
    """
    if str(name) == "smollm2" or str(name).endswith(".gguf"):
        return gguf.load(name, device, dtype)
    folder = find(name)
    data = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "vit_hidden_dim" in data:
        return load_nanovlm(folder, device, dtype)
    if "model_type" not in data:
        return checkpoint.load(folder, device, dtype)
    _check_kind(data, folder / "config.json")
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    config = read_config(folder, tokenizer)
    processor = Processor(tokenizer, read_template(folder, tokenizer), config)
    return load_model(folder, config, device, dtype), processor


def find_names(family: str, has_vision: bool) -> dict[str, str | tuple[str, ...]]:
    """Return the name table of a language model of DECODERS, or of an Idefics3 around one."""
    names = LLAMA_NAMES | (DECODERS[family].names or {})
    if not has_vision:
        return names
    return IDEFICS3_NAMES | {re.sub(r"^model\.", "model.text_model.", theirs): ours for theirs, ours in names.items()}


def load_model(
    folder: Path, config: VLMConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> VLM:
    """Read the weights of a folder in a layout of the hub into a new model of `config`."""
    files = find_weights(folder)
    data = read_json(folder / "config.json")
    family = (data if config.vision is None else data.get("text_config") or {}).get("model_type", "llama")
    names = find_names(family, config.vision is not None)
    is_ignored = _ignore(config.decoder)
    model = empty_model(config, device, dtype or file_dtype(files, is_ignored))
    copy_tensors(destinations(model, names), files, is_ignored)
    if config.decoder.tie_word_embeddings:
        _check_tied_head(model.decoder.embed_tokens.weight, files, HEAD)
    return model.eval()


def _ignore(config):
    """Which tensors of a language model's file are not read: the head where it is tied, and rotary frequencies."""
    return lambda name: (config.tie_word_embeddings and name == HEAD) or name.endswith("rotary_emb.inv_freq")


def read_siglip(folder: Path) -> VisionConfig:
    """Read the config of a SigLIP encoder, alone or with its text tower."""
    path = folder / "config.json"
    data = read_json(path)
    if data.get("model_type") not in SIGLIP_TYPES:
        kind = data.get("model_type")
        raise ValueError(f"{path}: model_type = {kind!r} is no image encoder that we have; there is siglip")
    return read_vision(data.get("vision_config", data), SIGLIP_DEFAULTS, path)


def load_vision(model: VLM, folder: Path):
    """Read a SigLIP encoder, alone or with its text tower, into the encoder of a model."""
    files = find_weights(folder)
    keys = {name for path in files for name in _names(path)}
    root = "vision_model." if any(name.startswith("vision_model.") for name in keys) else ""
    wanted = destinations(model, {root + theirs: ours for theirs, ours in SIGLIP_NAMES.items()})
    unused = re.compile(rf"text_model\.|logit_(scale|bias)|{re.escape(root)}head\.")
    copy_tensors(wanted, files, unused.match)
    if left := [name for name in keys if unused.match(name)]:
        print(f"not used of {folder}: {', '.join(merge_numbers(left))}", file=sys.stderr)


def load_decoder(model: VLM, folder: Path):
    """Read a language model into the decoder of a model, whose vocabulary may be larger than the file's.

    The rows of new tokens become the mean of the old ones, with a hundredth of their spread as noise: so the old
    tokens stay as likely as they were (Hewitt 2021, nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    files = find_weights(folder)
    data = read_json(folder / "config.json")
    config = read_decoder(data, folder / "config.json")
    wanted = destinations(model, find_names(data.get("model_type", "llama"), has_vision=False))
    tables = {name: wanted[name][0] for name in ("model.embed_tokens.weight", HEAD) if name in wanted}
    for name, table in tables.items():
        wanted[name] = [table[: config.vocab_size]]
    copy_tensors(wanted, files, _ignore(config))
    if config.tie_word_embeddings:
        _check_tied_head(wanted["model.embed_tokens.weight"][0], files, HEAD)
    for table in tables.values():
        old, new = table[: config.vocab_size], table[config.vocab_size :]
        new.copy_(old.mean(0) + 0.01 * old.std(0) * torch.randn_like(new))


def destinations(model: VLM, names: dict[str, str | tuple[str, ...]]) -> dict[str, list[torch.Tensor]]:
    """Say for each of their tensor names which tensors of the model its rows are: import fills them, export reads.

    Parts of the model that the table does not know are left out.
    """
    prefixes = [
        (re.compile(re.escape(prefix).replace(r"\{\}", r"(\d+)")), theirs, part)
        for theirs, ours in names.items()
        for part, prefix in enumerate([ours] if isinstance(ours, str) else ours)
    ]
    found = {}
    for name, tensor in model.state_dict().items():
        fitting = [(match, theirs, part) for prefix, theirs, part in prefixes if (match := prefix.match(name))]
        if fitting:
            match, theirs, part = max(fitting, key=lambda fit: fit[0].end())  # the longest of our prefixes decides
            is_stacked = theirs.count("{}") > len(match.groups())  # one more number: the expert's
            for *number, slice in [(e, x) for e, x in enumerate(tensor)] if is_stacked else [(tensor,)]:
                full = theirs.format(*match.groups(), *number) + name[match.end() :]
                found.setdefault(full, {})[part] = slice
    return {name: [parts[part] for part in sorted(parts)] for name, parts in found.items()}


def find(name: str | Path, files: tuple[str, ...] = FILES) -> Path:
    """Return a folder: the one of this name, or the downloaded files of a repository `owner/name[@revision]`."""
    checkpoint.restore(Path(name).resolve())
    if Path(name).is_dir():
        return Path(name)
    repository, _, revision = str(name).partition("@")
    nowhere = f"there is no model folder {name}, and no repository on the hub can have that name"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(nowhere)
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{repository} is gated: accept its terms on the hub, then log in with hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no folder and no public repository {repository}; for a private one log in with hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repository} has no revision {revision}") from error
    except errors.HFValidationError as error:
        raise ValueError(nowhere) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"there is no folder {name}, and the hub cannot be reached for a repository of that name: check the "
            f"network, or give a folder that holds its files ({reason})"
        ) from error


def find_weights(folder: Path) -> list[Path]:
    """List the safetensors files of a folder. Raises ValueError that names what is missing."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise ValueError(
            f"{folder} has no model.safetensors and no model.safetensors.index.json"
            + (f"; {', '.join(others)} could run any code when read: convert it to safetensors" if others else "")
        )
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} has no weight_map from tensors to files") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    return [folder / name for name in names]


def _names(path):
    with open_tensors(path) as file:
        return list(file.keys())


def _check_tied_head(embedding, files, head):
    """Raise ValueError where a file has a head of its own though the config says that it is tied."""
    for path in files:
        with open_tensors(path) as file:
            if head in file.keys() and not torch.equal(file.get_tensor(head).to(embedding), embedding):
                raise ValueError(f"{path} has a {head} of its own, but the config says tie_word_embeddings = true")


# ---- configs ----


def read_config(folder: Path, tokenizer: Tokenizer | None = None) -> VLMConfig:
    """Read the config of a language model or of a whole VLM. Special tokens are those of the tokenizer's files.

    Without a tokenizer it is for weights alone: a VLM's image settings may be missing.
    Raises ValueError that names the file and the field.
    """
    path = folder / "config.json"
    data = read_json(path)
    _check_kind(data, path)
    if data["model_type"] in IDEFICS3_TYPES:
        text, vision = data.get("text_config") or {"rms_norm_eps": 1e-5}, data.get("vision_config") or {}
        if not isinstance(text, dict) or not isinstance(vision, dict):
            raise ValueError(f"{path}: text_config and vision_config must be JSON objects")
        text = {"model_type": "llama"} | text | {"tie_word_embeddings": data.get("tie_word_embeddings", False)}
        vision = read_vision(vision, IDEFICS3_VISION_DEFAULTS, path)
        if vision.patch_size > 0 and vision.grid_size in IDEFICS3_BAD_GRIDS:
            raise ValueError(
                f"{path}: {vision.grid_size} patches a side are refused, as Idefics3 gives some of their neighbours "
                "one position"
            )
        parts = {
            "vision": vision,
            "projector": _build(ProjectorConfig, {"scale_factor": data.get("scale_factor", 2)}, path),
            "tiling": read_tiling(folder, vision, is_needed=tokenizer is not None),
        }
        image = data.get("image_token_id", 128257)
    else:
        text, parts, image = data, {"vision": None}, None
    decoder = read_decoder(text, path)
    tokens = _build(VLMConfig, {"image_token_id": image} | read_special_tokens(folder, text, tokenizer), path)
    try:
        return dataclasses.replace(tokens, decoder=decoder, **parts).validate()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_vision(data: dict, defaults: dict, path: Path) -> VisionConfig:
    """Read the config of a SigLIP encoder, as Idefics3 has it too."""
    _check_fixed(data, FIXED_VISION, path)
    data = defaults | data
    return _build(VisionConfig, {field: data[field] for field in VISION_FIELDS}, path)


def read_decoder(data: dict, path: Path) -> DecoderConfig:
    """Read the config of a language model."""
    family = pick(DECODERS, str(data.get("model_type")), f"{path}: model_type")
    _check_fixed(data, FIXED, path)
    if any(kind != "full_attention" for kind in data.get("layer_types") or ()):
        raise ValueError(f"{path}: layer_types has other layers than full_attention, which we do not have")
    if data.get("model_type") == "mixtral" and data.get("sliding_window") is not None:
        raise ValueError(f"{path}: sliding_window = {data['sliding_window']} is not supported; it must be null")
    if "num_experts" in family.defaults and "num_local_experts" in data:  # two names of one field
        data = {"num_experts": data["num_local_experts"]} | data
    derived = ("head_dim", "num_key_value_heads")  # null stands for the value that follows from others
    data = family.defaults | {key: value for key, value in data.items() if value is not None or key in derived}
    fields = {field: data[field] for field in DECODER_FIELDS if data.get(field) is not None}
    config = _build(DecoderConfig, fields | {"o_bias": data.get("attention_bias", False)}, path)
    theta, scaling = read_rope(data, path)
    return dataclasses.replace(
        config,
        head_dim=fields.get("head_dim", config.hidden_size // max(1, config.num_attention_heads)),
        num_key_value_heads=fields.get("num_key_value_heads", config.num_attention_heads),
        qkv_bias=family.qkv_bias or config.o_bias,
        qk_norm=family.qk_norm,
        moe=_build(MoEConfig, {ours: data[theirs] for theirs, ours in family.moe.items()}, path)
        if family.moe
        else None,
        rope_theta=theta,
        rope_scaling=scaling,
        layers_without_rope=read_layers_without_rope(data, config.num_hidden_layers, path),
    )


def read_layers_without_rope(data: dict, num_layers: int, path: Path) -> tuple[int, ...]:
    """Read which layers of SmolLM3 have no rotary positions: those whose entry in no_rope_layers is 0."""
    if not (interval := data.get("no_rope_layer_interval")):
        return ()
    has_rope = data.get("no_rope_layers", [(i + 1) % interval for i in range(num_layers)])
    if not isinstance(has_rope, list) or len(has_rope) < num_layers:
        raise ValueError(f"{path}: no_rope_layers = {has_rope!r} must have an entry for each of {num_layers} layers")
    return tuple(i for i in range(num_layers) if not has_rope[i])


def read_rope(data: dict, path: Path) -> tuple[float, RopeScalingConfig]:
    """Read the base and the scaling of rotary positions, as older and newer configs write them."""
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_parameters and rope_scaling must be JSON objects, got {rope!r}")
    theta = {"rope_theta": rope.get("rope_theta", data["rope_theta"])}
    kind = str(rope.get("rope_type", rope.get("type", "default"))).replace("default", "none")
    if kind not in ROPE_FIELDS:
        reason = ": it would change a document with the length of its neighbours" if kind == "dynamic" else ""
        known = ", ".join(key for key in ROPE_FIELDS if key != "none")
        raise ValueError(f"{path}: rope_type = {kind!r} is not supported{reason}; there are {known}")
    known = {"rope_theta", "rope_type", "type", *ROPE_FIELDS[kind]}
    harmless = {"partial_rotary_factor": 1.0, "truncate": True} | ({"mscale": 1.0} if kind == "none" else {})
    for field, value in rope.items():
        if field not in known and value is not None and value != harmless.get(field):
            raise ValueError(f"{path}: {field} = {value!r} of rope_type {kind!r} is not supported")
    values = {field: rope[field] for field in ROPE_FIELDS[kind] if rope.get(field) is not None}
    if "original_max_position_embeddings" in ROPE_FIELDS[kind]:
        values.setdefault("original_max_position_embeddings", data["max_position_embeddings"])
    if kind != "none" and "factor" not in values:
        raise ValueError(f"{path}: rope_type {kind!r} has no factor")
    scaling = _build(RopeScalingConfig, {"type": kind} | values, path)
    return _build(DecoderConfig, theta, path).rope_theta, scaling


def read_tiling(folder: Path, vision: VisionConfig, is_needed: bool) -> TilingConfig:
    """Read the image settings of Idefics3; without any, where images are not needed, those that cut nothing."""
    settings = {}
    for name in ("preprocessor_config.json", "processor_config.json"):  # the second form is newer, and goes first
        data = read_json(folder / name) if (folder / name).is_file() else {}
        if found := data if name.startswith("pre") else data.get("image_processor"):
            settings, path = found, folder / name
    if not settings and is_needed:
        raise ValueError(f"{folder} has no preprocessor_config.json, nor image settings in a processor_config.json")
    if not settings:
        return TilingConfig(policy="idefics3", longest_edge=vision.image_size)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: image_processor must be a JSON object, got {settings!r}")
    settings = {"size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}} | settings
    expected = {
        "max_image_size": {"longest_edge": vision.image_size},
        "do_image_splitting": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 1,
    }
    for field, value in expected.items():
        if settings.get(field, value) != value:
            raise ValueError(f"{path}: {field} = {settings[field]} is not supported; it must be {value}")
    size = settings["size"]
    if not isinstance(size, dict) or size.keys() != {"longest_edge"}:
        raise ValueError(f"{path}: size = {size} is not supported; it must have longest_edge and nothing else")
    return _build(TilingConfig, {"policy": "idefics3"} | size, path)


def read_special_tokens(folder: Path, data: dict, tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Return the ids of padding, end of turn and begin, from the tokenizer's settings, else from the config.

    The end of turn is the token of those at which generation stops that the chat template writes. Without a padding
    token it pads too.
    """
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}

    def from_tokenizer(name):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise ValueError(f"{folder / 'tokenizer_config.json'}: {name}_token = {token!r} must be a text")
        return None if token is None or tokenizer is None else tokenizer.token_to_id(token)

    def from_config(name):
        ids = [source.get(f"{name}_token_id") for source in (generation, data)]
        ids = [i for entry in ids if entry is not None for i in (entry if isinstance(entry, list) else [entry])]
        if wrong := [i for i in ids if type(i) is not int]:
            raise ValueError(f"{folder}: {name}_token_id = {wrong[0]!r} must be a number")
        return [i for i in ids if i >= 0]  # some configs say -1 for none

    ends = [i for i in (from_tokenizer("eos"), *from_config("eos")) if i is not None]
    if tokenizer is not None:
        ends += [i for i in (tokenizer.token_to_id("<end_of_utterance>"),) if i is not None]
        template = read_template(folder)
        ends = [i for i in ends if (tokenizer.id_to_token(i) or "\0") in template] or ends
    if not ends:
        raise ValueError(f"{folder}: neither the tokenizer nor the config says which token ends a turn (eos_token)")
    pads = [i for i in (from_tokenizer("pad"), *from_config("pad")) if i is not None]
    begins = [i for i in (from_tokenizer("bos"), *from_config("bos")) if i is not None]
    stops = generation.get("eos_token_id")
    stops = [i for i in (stops if isinstance(stops, list) else []) if i != ends[0]]
    return {
        "pad_token_id": (pads or ends)[0],
        "eos_token_id": ends[0],
        "stop_token_ids": tuple(dict.fromkeys(stops)),
        "bos_token_id": (begins or [None])[0],
    }


def read_template(folder: Path, tokenizer: Tokenizer | None = None) -> str:
    """Return the chat template, wherever it is.

    A base model gets one that goes on with the text, after what its tokenizer puts before every text.
    """
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix == ".jinja":
            return path.read_text(encoding="utf-8")
        template = read_json(path).get("chat_template")
        if isinstance(template, list):
            entries = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
            template = entries[-1].get("template") if entries else None
        if template and not isinstance(template, str):
            raise ValueError(f"{path}: chat_template = {template!r} must be a text")
        if template:
            return template
    encoding = tokenizer and tokenizer.encode("a")
    begin = encoding.tokens[: encoding.special_tokens_mask.index(0)] if encoding else []
    return "".join(begin) + COMPLETION_TEMPLATE


def _build(cls, data, path):
    """Make a config of ours. Raises ValueError that names the file, and a field whose value is of another type."""
    try:
        return from_dict(cls, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# ---- nanoVLM ----

# Their fields -> ours. A config.json has all that its code knew, so what is missing here is an error.
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
# Fields that are read below, and fields of training that change no answer.
NANOVLM_OTHER = set(
    "mp_image_token_length max_img_size resize_to_max_side_len vlm_extra_tokens lm_chat_template lm_base_vocab_size "
    "extra_token_amount vit_model_type lm_model_type vit_dropout lm_dropout lm_max_length lm_eos_token_id "
    "vlm_load_backbone_weights vlm_checkpoint_path hf_repo_name".split()
)
# The first nanoVLM knew no chat: the image, then one question. IMAGE becomes the token that stands for the image.
NANOVLM_TEMPLATE = """\
{%- for message in messages -%}
{%- set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
{%- set text = parts | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
{{ 'IMAGE' * (parts | selectattr('type', 'equalto', 'image') | list | length) }}
{{- 'Question: ' + text + ' Answer:' if message.role == 'user' else text + eos_token }}
{%- endfor -%}"""


def load_nanovlm(
    folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[VLM, Processor]:
    """Read a checkpoint of github.com/huggingface/nanoVLM, so that the answers are those of its generate.py.

    Tokens are equal, and pixels but for the rounding of the view of a whole image (images.draw_nanovlm).
    Its encoder reads pixels x from 0 to 1, ours 2x - 1: as W x + b = W/2 (2x - 1) + b + sum(W)/2, the difference goes
    into the patch embedding, in fp32. Its positions are stretched beyond lm_max_position_embeddings, where ours end.
    """
    config, tokenizer, template = read_nanovlm(folder)
    files = find_weights(folder)
    names = {name for path in files for name in _names(path)}
    processor = Processor(tokenizer, template, config)
    model = empty_model(config, device, dtype or file_dtype(files))
    wanted = destinations(model, NANOVLM_NAMES)
    positions = "vision_encoder.patch_embedding.position_embedding"
    wanted[positions] = [wanted[positions][0][None]]
    embedding, head = "decoder.token_embedding.weight", "decoder.head.weight"
    if config.decoder.tie_word_embeddings and embedding not in names:  # of two names for one tensor, a file has one
        wanted[head] = wanted.pop(embedding)
    ignored = {head, "decoder.rotary_embd.inv_freq"} - wanted.keys()
    copy_tensors(wanted, files, ignored.__contains__)
    if head in ignored:
        _check_tied_head(model.decoder.embed_tokens.weight, files, head)
    patches = model.vision.patch_embedding
    with torch.no_grad():
        patches.bias.copy_(patches.bias.float() + patches.weight.float().sum((1, 2, 3)) / 2)
        patches.weight.div_(2)
    return model.eval(), processor


def read_nanovlm(folder: Path) -> tuple[VLMConfig, Tokenizer, str]:
    """Read config, tokenizer and chat template; the tokenizer is that of a repository, or of a folder of its name.

    There are three kinds of checkpoints: one square image before the text, one square image in it, and tiles.
    """
    path = folder / "config.json"
    data = read_json(path)
    _check_fixed(data, FIXED_NANOVLM, path)
    required = {*NANOVLM_VISION, *NANOVLM_DECODER, "mp_pixel_shuffle_factor", "lm_tokenizer"}
    if missing := sorted(required - data.keys()):
        raise ValueError(f"{path} has no {', '.join(missing)}")
    if unknown := sorted(data.keys() - required - FIXED_NANOVLM.keys() - NANOVLM_OTHER):
        raise ValueError(f"{path}: {', '.join(unknown)} of another nanoVLM are not supported")
    extra = data.get("vlm_extra_tokens") or {}
    for key, token in extra.items():
        is_place = re.fullmatch(r"r\d+c\d+", key) and token == re.sub(r"r(\d+)c(\d+)", r"<row_\1_col_\2>", key)
        if not is_place and key != "image_token" and (key, token) != ("global_image_token", NANOVLM_GLOBAL):
            raise ValueError(f"{path}: vlm_extra_tokens has {key} = {token!r}, which is not supported")
    if extra and "image_token" not in extra:
        raise ValueError(f"{path}: vlm_extra_tokens has no image_token")
    tiling = {"policy": "square"}
    if "r1c1" in extra:
        tiling = {
            "policy": "nanovlm",
            "longest_edge": data.get("max_img_size"),
            "enlarge": data.get("resize_to_max_side_len", False),
            "has_global": "global_image_token" in extra,
        }
    elif data.get("max_img_size", data["vit_img_size"]) != data["vit_img_size"]:
        raise ValueError(
            f"{path}: max_img_size = {data['max_img_size']} is not vit_img_size = {data['vit_img_size']}, but "
            "vlm_extra_tokens has no r1c1 for tiles"
        )
    try:
        source = find(data["lm_tokenizer"], TOKENIZER_FILES)
    except ValueError as error:
        raise ValueError(f"{path}: the tokenizer, lm_tokenizer, is not in the checkpoint: {error}") from error
    tokenizer = read_tokenizer(source / "tokenizer.json")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in extra.values()])
    tokens = read_special_tokens(source, {}, tokenizer)
    tokens["pad_token_id"] = tokens["eos_token_id"]
    template = data.get("lm_chat_template") or read_template(source)
    if extra:
        image = tokenizer.token_to_id(extra["image_token"])
    else:
        # No prompt holds the last special token, and where an image is, its embedding is not used.
        added = tokenizer.get_added_tokens_decoder()
        image = max((i for i, token in added.items() if token.special), default=tokens["eos_token_id"])
        template = NANOVLM_TEMPLATE.replace("IMAGE", tokenizer.id_to_token(image))
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
        raise ValueError(f"{path}: {error}") from error
    if (length := data.get("mp_image_token_length", config.num_image_tokens)) != config.num_image_tokens:
        raise ValueError(f"{path}: mp_image_token_length = {length}, but a tile has {config.num_image_tokens} tokens")
    return config, tokenizer, template


def _check_kind(data, path):
    known = [*IDEFICS3_TYPES, *DECODERS]
    if (kind := data.get("model_type")) not in known:
        raise ValueError(f"{path}: model_type = {kind!r} is not a model that we have; there are {', '.join(known)}")


def _check_fixed(data, fixed, path):
    for field, value in fixed.items():
        if data.get(field) not in (None, value):
            raise ValueError(f"{path}: {field} = {data[field]!r} is not supported; it must be {value!r}")


if __name__ == "__main__":
    from nanovlm import cli, export

    cli.run(export.main)
