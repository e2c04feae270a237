"""Hub checkpoint -> model and processor: name tables, configs, download, and the one entry point `load`.

```
owner/name --download--> folder --config.json--> VLMConfig --> model without weights
                           |--*.safetensors, by the name table ------> its weights, tensor by tensor into place
                           |--tokenizer, template, image settings ---> Processor
```

A name table maps prefixes of their tensor names to ours; what follows a prefix is the same on both sides, and nothing
is permuted. The tables and the fields of configs are used in both directions: `export.py` writes with them.

    python -m nanovlm.hf export runs/demo OUT_DIR --check
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from nanovlm import checkpoint
from nanovlm.checkpoint import copy_tensors, empty_model, file_dtype, merge_numbers, open_tensors, read_json
from nanovlm.config import (
    DecoderConfig,
    ProjectorConfig,
    RopeScalingConfig,
    TilingConfig,
    VisionConfig,
    VLMConfig,
    pick,
)
from nanovlm.data.chat import Processor
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

# ---- names: their prefix -> ours, {} for a number ----

SIGLIP_NAMES = {
    "embeddings.": "vision.",
    "encoder.layers.": "vision.layers.",
    "post_layernorm.": "vision.post_layernorm.",
}
LLAMA_NAMES = {"model.": "decoder.", "lm_head.": "decoder.lm_head."}
IDEFICS3_NAMES = {
    **{f"model.vision_model.{theirs}": ours for theirs, ours in SIGLIP_NAMES.items()},
    "model.connector.modality_projection.": "projector.",
    "model.text_model.": "decoder.",
    "lm_head.": "decoder.lm_head.",
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
# Grids of patches at which Idefics3 gives some neighbours the same position, as it rounds fractions of the side.
IDEFICS3_BAD_GRIDS = (19, 25, 29, 31, 38, 40, 41, 43, 47, 49, 50, 54, 55, 58, 59, 61, 62)


class Family(NamedTuple):
    """A kind of language model: its class, the values that its config.json may leave out, and what it has."""

    architecture: str
    defaults: dict
    qkv_bias: bool = False
    qk_norm: bool = False


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
DECODERS = {
    "llama": Family("LlamaForCausalLM", LLAMA_DEFAULTS),
    "smollm3": Family("SmolLM3ForCausalLM", SMOLLM3_DEFAULTS),
    "qwen2": Family("Qwen2ForCausalLM", QWEN_DEFAULTS, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", QWEN_DEFAULTS | {"head_dim": 128}, qk_norm=True),
}
IDEFICS3_TYPES = ("idefics3", "smolvlm")  # one architecture under two names
SIGLIP_TYPES = ("siglip", "siglip_vision_model")


# ---- load ----


def load(
    name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[VLM, Processor]:
    """Read a model and its processor; the model is in evaluation mode.

    `name` is a model folder of ours, a folder in a layout of the hub, or a repository there, `owner/name` or
    `owner/name@revision`. The weights have the dtype of their file unless another is given. Raises ValueError that
    names the file, field or tensor that is missing, unknown, or beyond our modules.
    """
    folder = find(name)
    if not (folder / "config.json").is_file() or "model_type" not in read_json(folder / "config.json"):
        return checkpoint.load(folder, device, dtype)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    config = read_config(folder, tokenizer)
    processor = Processor(tokenizer, read_template(folder), config)
    return load_model(folder, config, device, dtype), processor


def load_model(
    folder: Path, config: VLMConfig, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> VLM:
    """Read the weights of a folder in a layout of the hub into a new model of `config`."""
    files = find_weights(folder)
    model = empty_model(config, device, dtype or file_dtype(files))
    names = LLAMA_NAMES if config.vision is None else IDEFICS3_NAMES
    head = "lm_head.weight" if config.decoder.tie_word_embeddings else None
    copy_tensors(destinations(model, names), files, lambda name: name == head or name.endswith("rotary_emb.inv_freq"))
    if head:
        _check_tied_head(model, files, head)
    return model.eval()


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
    config = read_decoder(read_json(folder / "config.json"), folder / "config.json")
    wanted = destinations(model, LLAMA_NAMES)
    extended = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in wanted]
    tables = {name: wanted[name][0] for name in extended}
    for name, table in tables.items():
        wanted[name] = [table[: config.vocab_size]]
    head = "lm_head.weight" if config.tie_word_embeddings else None
    copy_tensors(wanted, files, lambda name: name == head or name.endswith("rotary_emb.inv_freq"))
    for table in tables.values():
        old, new = table[: config.vocab_size], table[config.vocab_size :]
        new.copy_(old.mean(0) + 0.01 * old.std(0) * torch.randn_like(new))


def destinations(model: VLM, names: dict[str, str]) -> dict[str, list[torch.Tensor]]:
    """Say for each of their tensor names which tensors of the model its rows are: import fills them, export reads.

    Parts of the model that the table does not know are left out.
    """
    found = {}  # the longest of our prefixes that fits decides
    for name, tensor in model.state_dict().items():
        fitting = [(theirs, ours) for theirs, ours in names.items() if name.startswith(ours)]
        if fitting:
            theirs, ours = max(fitting, key=lambda pair: len(pair[1]))
            found.setdefault(theirs + name.removeprefix(ours), []).append(tensor)
    return found


def find(name: str | Path) -> Path:
    """Return a folder: the one of this name, or the downloaded files of a repository `owner/name[@revision]`."""
    checkpoint.restore(Path(name).resolve())
    if Path(name).is_dir():
        return Path(name)
    repository, _, revision = str(name).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"there is no model folder {name}, and no repository on the hub can have that name")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=FILES))
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
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"there is no folder {name}, and the hub cannot be reached for a repository of that name: check the "
            f"network, or give a folder that holds its files ({error})"
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


def _check_tied_head(model, files, head):
    """Raise ValueError where a file has a head of its own though the config says that it is tied."""
    for path in files:
        with open_tensors(path) as file:
            if head in file.keys() and not torch.equal(
                file.get_tensor(head).to(model.decoder.embed_tokens.weight), model.decoder.embed_tokens.weight
            ):
                raise ValueError(f"{path} has a {head} of its own, but the config says tie_word_embeddings = true")


# ---- configs ----


def read_config(folder: Path, tokenizer: Tokenizer | None = None) -> VLMConfig:
    """Read the config of a language model or of a whole VLM. Special tokens are those of the tokenizer's files.

    Raises ValueError that names the file and the field.
    """
    path = folder / "config.json"
    data = read_json(path)
    kind = data.get("model_type")
    if kind in IDEFICS3_TYPES:
        text = {"tie_word_embeddings": False} | data.get("text_config", {})
        text |= {"tie_word_embeddings": data.get("tie_word_embeddings", False)}
        parts = {
            "vision": read_vision(data.get("vision_config", {}), IDEFICS3_VISION_DEFAULTS, path),
            "projector": ProjectorConfig(scale_factor=data.get("scale_factor", 2)),
            "tiling": TilingConfig(policy="idefics3"),
            "image_token_id": data.get("image_token_id", 128257),
        }
        if parts["vision"].grid_size in IDEFICS3_BAD_GRIDS:
            raise ValueError(
                f"{path}: {parts['vision'].grid_size} patches a side are refused, as Idefics3 gives some of "
                "their neighbours one position"
            )
        parts["tiling"] = read_tiling(folder, parts["vision"])
    elif kind in DECODERS:
        text, parts = data, {"vision": None, "image_token_id": None}
    else:
        known = ", ".join((*IDEFICS3_TYPES, *DECODERS))
        raise ValueError(f"{path}: model_type = {kind!r} is not a model that we have; there are {known}")
    tokens = read_special_tokens(folder, text, tokenizer)
    try:
        return VLMConfig(decoder=read_decoder(text, path), **parts, **tokens).validate()
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def read_vision(data: dict, defaults: dict, path: Path) -> VisionConfig:
    """Read the config of a SigLIP encoder, as Idefics3 has it too."""
    _check_fixed(data, FIXED_VISION, path)
    data = defaults | data
    return VisionConfig(**{field: data[field] for field in VISION_FIELDS})


def read_decoder(data: dict, path: Path) -> DecoderConfig:
    """Read the config of a language model."""
    family = pick(DECODERS, data.get("model_type", "llama"), f"{path}: model_type")
    _check_fixed(data, FIXED, path)
    if any(kind != "full_attention" for kind in data.get("layer_types") or ()):
        raise ValueError(f"{path}: layer_types has other layers than full_attention, which we do not have")
    data = family.defaults | {key: value for key, value in data.items() if value is not None}
    data.setdefault("head_dim", data["hidden_size"] // data["num_attention_heads"])
    data.setdefault("num_key_value_heads", data["num_attention_heads"])
    layers = range(data["num_hidden_layers"])
    interval = data.get("no_rope_layer_interval")
    has_rope = data.get("no_rope_layers", [not interval or (i + 1) % interval for i in layers])
    theta, scaling = read_rope(data, path)
    return DecoderConfig(
        **{field: data[field] for field in DECODER_FIELDS},
        qkv_bias=family.qkv_bias or data.get("attention_bias", False),
        o_bias=data.get("attention_bias", False),
        qk_norm=family.qk_norm,
        rope_theta=float(theta),
        rope_scaling=scaling,
        layers_without_rope=tuple(i for i in layers if not has_rope[i]),
    )


def read_rope(data: dict, path: Path) -> tuple[float, RopeScalingConfig]:
    """Read the base and the scaling of rotary positions, as older and newer configs write them."""
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    theta = rope.get("rope_theta", data["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default")).replace("default", "none")
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
    return theta, RopeScalingConfig(
        type=kind, **{field: value if field.startswith("original") else float(value) for field, value in values.items()}
    )


def read_tiling(folder: Path, vision: VisionConfig) -> TilingConfig:
    """Read the image settings of Idefics3; without the file, those of a model that cuts nothing."""
    settings = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            data = read_json(folder / name)
            settings = data.get("image_processor", data if name.startswith("pre") else settings)
            path = folder / name
    if not settings:
        return TilingConfig(policy="idefics3", longest_edge=vision.image_size)
    side = vision.image_size
    expected = {
        "max_image_size": {"longest_edge": side},
        "do_image_splitting": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 1,
    }
    for field, value in expected.items():
        if settings.get(field, value) != value:
            raise ValueError(f"{path}: {field} = {settings[field]} is not supported; it must be {value}")
    return TilingConfig(policy="idefics3", longest_edge=settings.get("size", {}).get("longest_edge", 4 * side))


def read_special_tokens(folder: Path, data: dict, tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Return the ids of padding, end of turn and begin, from the tokenizer's settings, else from the config.

    The end of turn is the token of those at which generation stops that the chat template writes. Without a padding
    token it pads too.
    """
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}

    def from_tokenizer(name):
        token = settings.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        return None if token is None or tokenizer is None else tokenizer.token_to_id(token)

    def from_config(name):
        ids = [source.get(f"{name}_token_id") for source in (generation, data)]
        return [i for entry in ids if entry is not None for i in (entry if isinstance(entry, list) else [entry])]

    ends = [i for i in (from_tokenizer("eos"), *from_config("eos")) if i is not None]
    if tokenizer is not None:
        ends += [i for i in (tokenizer.token_to_id("<end_of_utterance>"),) if i is not None]
        template = read_template(folder)
        ends = [i for i in ends if (tokenizer.id_to_token(i) or "\0") in template] or ends
    if not ends:
        raise ValueError(f"{folder}: neither the tokenizer nor the config says which token ends a turn (eos_token)")
    pads = [i for i in (from_tokenizer("pad"), *from_config("pad")) if i is not None]
    begins = [i for i in (from_tokenizer("bos"), *from_config("bos")) if i is not None]
    return {"pad_token_id": (pads or ends)[0], "eos_token_id": ends[0], "bos_token_id": (begins or [None])[0]}


def read_template(folder: Path) -> str:
    """Return the chat template, wherever it is; a base model gets one that goes on with the text."""
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix == ".jinja":
            return path.read_text(encoding="utf-8")
        template = read_json(path).get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template:
            return template
    return COMPLETION_TEMPLATE


def _check_fixed(data, fixed, path):
    for field, value in fixed.items():
        if data.get(field) not in (None, value):
            raise ValueError(f"{path}: {field} = {data[field]!r} is not supported; it must be {value!r}")


if __name__ == "__main__":
    from nanovlm import cli, export

    cli.run(export.main)
