"""config.json and the files beside it, in a folder in a hub layout -> our configs."""

import dataclasses
from pathlib import Path

from tokenizers import Tokenizer

from nanovlm.config import ProjectorConfig, TilingConfig, VisionConfig, VLMConfig
from nanovlm.data.tokenizer import CONTINUATION_TEMPLATE
from nanovlm.errors import UserError
from nanovlm.files import read_json
from nanovlm.hub.decoder_configs import build, check_fixed, read_decoder
from nanovlm.hub.decoders import DECODERS, REFUSED
from nanovlm.hub.families import (
    FIXED_VISION,
    IDEFICS3_BAD_GRIDS,
    IDEFICS3_TYPES,
    IDEFICS3_VISION_DEFAULTS,
    OTHER_TYPES,
    VISION_FIELDS,
)
from nanovlm.hub.published import read_quantization

# What is done with pixels, beside the sizes and the colors of each model; 1 / 255 is the step of a byte.
FIXED_PIXELS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}


def read_config(folder: Path, tokenizer: Tokenizer | None = None) -> VLMConfig:
    """Read the config of a language model or of a whole VLM. Special tokens are as in read_special_tokens.

    Without a tokenizer the config serves only to load weights: a VLM's image settings may be missing.
    Raises UserError that names the file and the field.
    """
    path = folder / "config.json"
    data = read_json(path)
    check_kind(data, path)
    if data["model_type"] in IDEFICS3_TYPES:
        text, vision = read_parts(data, path, {"rms_norm_eps": 1e-5})
        text = {"model_type": "llama"} | text | {"tie_word_embeddings": data.get("tie_word_embeddings", False)}
        vision = read_vision(vision, IDEFICS3_VISION_DEFAULTS, path)
        if vision.patch_size > 0 and vision.grid_size in IDEFICS3_BAD_GRIDS:
            raise UserError(
                f"{path}: {vision.grid_size} patches a side are refused, as Idefics3 gives some of their neighbours "
                "one position"
            )
        parts = {
            "vision": vision,
            "projector": build(ProjectorConfig, {"scale_factor": data.get("scale_factor", 2)}, path),
            "tiling": read_tiling(folder, vision, is_needed=tokenizer is not None),
        }
        image = data.get("image_token_id", 128257)
    else:
        text = {key: value for key, value in data.items() if key != "quantization_config"}
        parts, image = {"vision": None}, None
    quantization = read_quantization(data, path)
    decoder = read_decoder(text, path)
    tokens = build(VLMConfig, {"image_token_id": image} | read_special_tokens(folder, text, tokenizer), path)
    try:
        return dataclasses.replace(tokens, decoder=decoder, quantization=quantization, **parts).validate()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def read_parts(data: dict, path: Path, text: dict | None = None) -> tuple[dict, dict]:
    """Return the configs of language model and encoder; `text` stands for the first where there is none."""
    text, vision = data.get("text_config") or text or {}, data.get("vision_config") or {}
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise UserError(f"{path}: text_config and vision_config must be JSON objects")
    return text, vision


def read_vision(data: dict, defaults: dict, path: Path) -> VisionConfig:
    """Read the config of a SigLIP encoder, which Idefics3 also uses."""
    check_fixed(data, FIXED_VISION, path)
    data = defaults | data
    return build(VisionConfig, {field: data[field] for field in VISION_FIELDS}, path)


def read_tiling(folder: Path, vision: VisionConfig, is_needed: bool) -> TilingConfig:
    """Read Idefics3's image settings; if there are none and none are needed, return ones that cut no image."""
    settings, path = read_image_settings(folder)
    if not settings and is_needed:
        raise UserError(f"{folder} has no preprocessor_config.json, nor image settings in a processor_config.json")
    if not settings:
        return TilingConfig(policy="idefics3", longest_edge=vision.image_size)
    settings = {"size": {"longest_edge": 4 * 364}, "max_image_size": {"longest_edge": 364}} | settings
    expected = {
        "max_image_size": {"longest_edge": vision.image_size},
        "do_image_splitting": True,
        **FIXED_PIXELS,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 1,
    }
    for field, value in expected.items():
        if settings.get(field, value) != value:
            raise UserError(f"{path}: {field} = {settings[field]} is not supported; it must be {value}")
    size = settings["size"]
    if not isinstance(size, dict) or size.keys() != {"longest_edge"}:
        raise UserError(f"{path}: size = {size} is not supported; it must have longest_edge and nothing else")
    return build(TilingConfig, {"policy": "idefics3"} | size, path)


def read_image_settings(folder: Path) -> tuple[dict, Path]:
    """Return how images are prepared for an encoder, and the file that says it; nothing where none does."""
    settings, path = {}, folder
    for name in ("preprocessor_config.json", "processor_config.json"):  # the second form is newer and takes precedence
        data = read_json(folder / name) if (folder / name).is_file() else {}
        if found := data if name.startswith("pre") else data.get("image_processor"):
            settings, path = found, folder / name
    if not isinstance(settings, dict):
        raise UserError(f"{path}: image_processor must be a JSON object, got {settings!r}")
    return settings, path


def read_special_tokens(
    folder: Path, data: dict, tokenizer: Tokenizer | None
) -> dict[str, int | tuple[int, ...] | None]:
    """Return the ids of padding, end of turn, stops and begin, from the tokenizer's settings, else from the configs.

    The end of turn is the first end token that the chat template writes, or the first of all if it writes none.
    It also serves as padding if there is no padding token.
    """
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}

    def from_tokenizer(name):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise UserError(f"{folder / 'tokenizer_config.json'}: {name}_token = {token!r} must be a text")
        return None if token is None or tokenizer is None else tokenizer.token_to_id(token)

    def from_config(name):
        ids = [source.get(f"{name}_token_id") for source in (generation, data)]
        ids = [i for entry in ids if entry is not None for i in (entry if isinstance(entry, list) else [entry])]
        if wrong := [i for i in ids if type(i) is not int]:
            raise UserError(f"{folder}: {name}_token_id = {wrong[0]!r} must be a number")
        return [i for i in ids if i >= 0]  # some configs say -1 for none

    ends = [i for i in (from_tokenizer("eos"), *from_config("eos")) if i is not None]
    if tokenizer is not None:
        ends += [i for i in (tokenizer.token_to_id("<end_of_utterance>"),) if i is not None]
        template = read_template(folder)
        ends = [i for i in ends if (tokenizer.id_to_token(i) or "\0") in template] or ends
    if not ends:
        raise UserError(f"{folder}: neither the tokenizer nor the config says which token ends a turn (eos_token)")
    pads = [i for i in (from_tokenizer("pad"), *from_config("pad")) if i is not None]
    begins = [i for i in (from_tokenizer("bos"), *from_config("bos")) if i is not None]
    stops = generation.get("eos_token_id", data.get("eos_token_id"))
    stops = [i for i in (stops if isinstance(stops, list) else []) if i != ends[0]]
    return {
        "pad_token_id": (pads or ends)[0],
        "eos_token_id": ends[0],
        "stop_token_ids": tuple(dict.fromkeys(stops)),
        "bos_token_id": (begins or [None])[0],
    }


def read_template(folder: Path, tokenizer: Tokenizer | None = None) -> str:
    """Return the chat template from whichever file has it.

    A base model gets one that continues the text, after the tokens that its tokenizer puts before every text.
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
            raise UserError(f"{path}: chat_template = {template!r} must be a text")
        if template:
            return template
    return (begin_of(tokenizer) if tokenizer else "") + CONTINUATION_TEMPLATE


def begin_of(tokenizer: Tokenizer) -> str:
    """Return the tokens that a tokenizer puts before every text, such as <s>."""
    encoding = tokenizer.encode("a")
    return "".join(encoding.tokens[: encoding.special_tokens_mask.index(0)])


def check_kind(data, path):
    known = [*IDEFICS3_TYPES, *OTHER_TYPES, *DECODERS]
    if (kind := data.get("model_type")) in [*REFUSED]:  # it may be of any type
        raise UserError(f"{path}: model_type = {kind!r} is not read: {REFUSED[kind]}")
    if kind not in known:
        raise UserError(f"{path}: model_type = {kind!r} is not a model that we have; there are {', '.join(known)}")
