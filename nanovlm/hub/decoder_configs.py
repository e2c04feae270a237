"""The config.json of a language model, or its part of that of a whole VLM -> DecoderConfig."""

import dataclasses
import math
from pathlib import Path

from nanovlm.config import DecoderConfig, MoEConfig, RopeScalingConfig, from_dict, pick
from nanovlm.config.model import MOST
from nanovlm.errors import UserError
from nanovlm.hub.decoders import DECODERS, FULL, GPT_OSS_ROPE, SLIDING, Family
from nanovlm.hub.families import DECODER_FIELDS, FIXED, FIXED_LAYERS, ROPE_FIELDS


def read_decoder(data: dict, path: Path) -> DecoderConfig:
    """Read the config of a language model."""
    family = pick(DECODERS, str(data.get("model_type")), f"{path}: model_type")
    has_dense = data.get("model_type") == "qwen3_moe"
    fixed = FIXED if has_dense else FIXED | FIXED_LAYERS
    fixed = {field: value for field, value in fixed.items() if field not in family.defaults} | (family.fixed or {})
    check_fixed(data, fixed, path)
    if "num_experts" in family.defaults and "num_local_experts" in data:  # two names for one field
        data = {"num_experts": data["num_local_experts"]} | data
    # Null means that other fields determine the value, or that there is no window.
    derived = ("head_dim", "num_key_value_heads", "sliding_window")
    data = family.defaults | {key: value for key, value in data.items() if value is not None or key in derived}
    data, special = SPECIAL.get(data["model_type"], read_nothing)(data, path)
    fields = {field: data[field] for field in DECODER_FIELDS if data.get(field) is not None}
    config = build(DecoderConfig, fields | {"o_bias": data.get("attention_bias", False)}, path)
    theta, scaling = read_rope(data, path)
    special = read_windows(data, family, config.num_hidden_layers, path) | special
    if not special.get("sliding_window"):
        special.pop("window_rope_theta", None)
    moe = None
    if family.moe:
        find_layers = MIXTURES.get(data["model_type"])
        layers = find_layers(data, config.num_hidden_layers, path) if find_layers else ()
        own = {ours: data[theirs] for theirs, ours in family.moe.items()}
        moe = build(MoEConfig, own | (family.moe_features or {}) | {"layers": layers}, path)
    return dataclasses.replace(
        config,
        head_dim=fields.get("head_dim", config.hidden_size // max(1, config.num_attention_heads)),
        num_key_value_heads=fields.get("num_key_value_heads", config.num_attention_heads),
        qkv_bias=family.qkv_bias or config.o_bias,
        qk_norm=family.qk_norm,
        moe=moe,
        rope_theta=theta,
        rope_scaling=scaling,
        layers_without_rope=read_layers_without_rope(data, config.num_hidden_layers, path),
        **(family.features or {}),
        **special,
    )


def read_windows(data: dict, family: Family, num_layers: int, path: Path) -> dict:
    """Read the sliding window, and which blocks have none; a window that hides nothing is none."""
    window, longest = data.get("sliding_window"), data["max_position_embeddings"]
    if num_layers > MOST["num_hidden_layers"]:
        return {}  # which is refused later
    kinds = data.get("layer_types") or [family.layer_types[i % len(family.layer_types)] for i in range(num_layers)]
    known = [FULL, SLIDING] if SLIDING in family.layer_types else [FULL]
    if not isinstance(kinds, list) or len(kinds) < num_layers or not all(kind in known for kind in kinds):
        raise UserError(
            f"{path}: layer_types = {kinds!r} must say {' or '.join(known)} for each of {num_layers} layers"
        )
    full = tuple(i for i in range(num_layers) if kinds[i] == FULL)
    if len(full) == num_layers or window is None:
        return {}
    if type(window) is not int or window < 1:
        raise UserError(f"{path}: sliding_window = {window!r} must be null or a number from 1 on")
    hides_nothing = window >= longest and not full
    return {} if hides_nothing else {"sliding_window": window, "full_attention_layers": full}


def read_nothing(data: dict, path: Path) -> tuple[dict, dict]:
    return data, {}


def read_gemma(data: dict, path: Path) -> tuple[dict, dict]:
    """Read the first Gemma's scale of embeddings; what its configs call gelu is the tanh form."""
    if data["hidden_act"] not in ("gelu", "gelu_pytorch_tanh"):
        raise UserError(f"{path}: hidden_act = {data['hidden_act']!r} is not supported; it must be gelu_pytorch_tanh")
    return data, {"embedding_scale": read_factor(data, "hidden_size", path) ** 0.5}


def read_gemma3(data: dict, path: Path) -> tuple[dict, dict]:
    """Read what Gemma-3 alone has; return what is left to read, and fields of DecoderConfig."""
    rope, pattern = data.get("rope_parameters") or {}, data["sliding_window_pattern"]
    local = data["rope_local_base_freq"]
    if isinstance(rope, dict) and {FULL, SLIDING} & rope.keys():
        near = rope.get(SLIDING) or {}
        if not isinstance(near, dict) or near.get("rope_type", "default") != "default":
            raise UserError(f"{path}: {SLIDING} = {near!r} of rope_parameters must have rope_type 'default'")
        local = near.get("rope_theta", local)
        data = data | {"rope_parameters": rope.get(FULL)}
    if data.get("layer_types") is None:
        if type(pattern) is not int or pattern < 1:
            raise UserError(f"{path}: sliding_window_pattern = {pattern!r} must be a number from 1 on")
        num_layers = data["num_hidden_layers"] if type(data["num_hidden_layers"]) is int else 0
        kinds = [SLIDING if (i + 1) % pattern else FULL for i in range(min(num_layers, MOST["num_hidden_layers"]))]
        data = data | {"layer_types": kinds}
    return data, {
        "window_rope_theta": build(DecoderConfig, {"window_rope_theta": local}, path).window_rope_theta,
        "attention_scale": read_factor(data, "query_pre_attn_scalar", path) ** -0.5,
        "embedding_scale": read_factor(data, "hidden_size", path) ** 0.5,
    }


def read_gpt_oss(data: dict, path: Path) -> tuple[dict, dict]:
    """Read the rotary positions of a config that says nothing about them."""
    return data if data.get("rope_scaling") else {"rope_parameters": GPT_OSS_ROPE} | data, {}


def read_dots1(data: dict, path: Path) -> tuple[dict, dict]:
    """Read from which layer on there is a window, where the config does not name the layers."""
    first, num_layers = data["max_window_layers"], data["num_hidden_layers"]
    if data.get("layer_types") is None and type(first) is int and type(num_layers) is int:
        kinds = [SLIDING if i >= first else FULL for i in range(min(num_layers, MOST["num_hidden_layers"]))]
        data = data | {"layer_types": kinds}
    return data, {}


def read_granite(data: dict, path: Path) -> tuple[dict, dict]:
    """Read Granite's multipliers; the last one divides the logits."""
    return data, {
        "embedding_scale": read_factor(data, "embedding_multiplier", path),
        "residual_scale": read_factor(data, "residual_multiplier", path),
        "attention_scale": read_factor(data, "attention_multiplier", path),
        "logit_scale": 1 / read_factor(data, "logits_scaling", path),
    }


def read_factor(data: dict, name: str, path: Path) -> float:
    value = data[name]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise UserError(f"{path}: {name} = {value!r} must be a number above 0")
    return float(value)


def read_layers_without_rope(data: dict, num_layers: int, path: Path) -> tuple[int, ...]:
    """Read which layers of SmolLM3 have no rotary positions: those whose entry in no_rope_layers is 0."""
    if not (interval := data.get("no_rope_layer_interval")):
        return ()
    has_rope = data.get("no_rope_layers", [(i + 1) % interval for i in range(num_layers)])
    if not isinstance(has_rope, list) or len(has_rope) < num_layers:
        raise UserError(f"{path}: no_rope_layers = {has_rope!r} must have an entry for each of {num_layers} layers")
    return tuple(i for i in range(num_layers) if not has_rope[i])


def read_mixtures(data: dict, num_layers: int, path: Path) -> tuple[int, ...]:
    """Read which layers of Qwen3-MoE are mixtures: each decoder_sparse_step-th but for mlp_only_layers; () for all."""
    step, dense = data.get("decoder_sparse_step", 1), data.get("mlp_only_layers") or []
    if type(step) is not int or step < 1 or not isinstance(dense, list):
        raise UserError(
            f"{path}: decoder_sparse_step = {step!r} must be a number from 1 on, mlp_only_layers = {dense!r} a list"
        )
    layers = tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    if not layers:
        raise UserError(
            f"{path}: decoder_sparse_step = {step} and mlp_only_layers = {dense} leave none of {num_layers} layers to "
            "be a mixture"
        )
    return () if len(layers) == num_layers else layers


def read_dense_first(data: dict, num_layers: int, path: Path) -> tuple[int, ...]:
    """Read which layers are mixtures: all but the first first_k_dense_replace; () for all."""
    dense = data["first_k_dense_replace"]
    if type(dense) is not int or not 0 <= dense < num_layers:
        raise UserError(f"{path}: first_k_dense_replace = {dense!r} must leave some of {num_layers} layers")
    return tuple(range(dense, num_layers)) if dense else ()


def read_rope(data: dict, path: Path) -> tuple[float, RopeScalingConfig]:
    """Read the base and the scaling of rotary positions, in the form of older or newer configs."""
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters and rope_scaling must be JSON objects, got {rope!r}")
    theta = {"rope_theta": rope.get("rope_theta", data["rope_theta"])}
    kind = str(rope.get("rope_type", rope.get("type", "default"))).replace("default", "none")
    if kind == "dynamic":  # changes nothing up to max_position_embeddings, and no document of ours is longer
        original, longest = rope.get("original_max_position_embeddings"), data["max_position_embeddings"]
        if original is not None and (type(original) is not int or original < longest):
            raise UserError(
                f"{path}: original_max_position_embeddings = {original!r} of rope_type 'dynamic' must not be below "
                f"max_position_embeddings = {longest}: above it a document would change with the length of its "
                "neighbours"
            )
        kind, rope = "none", {}
    if kind not in ROPE_FIELDS:
        known = ", ".join(key for key in ROPE_FIELDS if key != "none")
        raise UserError(f"{path}: rope_type = {kind!r} is not supported; there are {known}")
    known = {"rope_theta", "rope_type", "type", *ROPE_FIELDS[kind]}
    harmless = {"partial_rotary_factor": 1.0} | ({"mscale": 1.0} if kind == "none" else {})
    for field, value in rope.items():
        if field not in known and value is not None and value != harmless.get(field):
            raise UserError(f"{path}: {field} = {value!r} of rope_type {kind!r} is not supported")
    values = {field: rope[field] for field in ROPE_FIELDS[kind] if rope.get(field) is not None}
    if "original_max_position_embeddings" in ROPE_FIELDS[kind]:
        values.setdefault("original_max_position_embeddings", data["max_position_embeddings"])
    if kind != "none" and "factor" not in values:
        raise UserError(f"{path}: rope_type {kind!r} has no factor")
    scaling = build(RopeScalingConfig, {"type": kind} | values, path)
    return build(DecoderConfig, theta, path).rope_theta, scaling


def build(cls, data, path):
    """Build one of our configs. Raises UserError that names the file and a field whose value has the wrong type."""
    try:
        return from_dict(cls, data)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def check_fixed(data, fixed, path):
    for field, value in fixed.items():
        if data.get(field) not in (None, value):
            raise UserError(f"{path}: {field} = {data[field]!r} is not supported; it must be {value!r}")


# By model_type: what one family alone has, and which layers of its mixtures are dense.
SPECIAL = {
    "gemma": read_gemma,
    "gemma3_text": read_gemma3,
    "gpt_oss": read_gpt_oss,
    "granite": read_granite,
    "dots1": read_dots1,
}
MIXTURES = {"qwen3_moe": read_mixtures, "dots1": read_dense_first}
