"""Hub layouts: name tables and the fields of configs, for import and export alike.

A name table maps prefixes of their tensor names to ours, or to several of ours whose rows are concatenated; the rest of
a name is the same on both sides, and nothing is permuted. `{}` stands for a number.
"""

import re
from collections.abc import Mapping

from nanovlm.config import DecoderConfig, VisionConfig, VLMConfig, differences
from nanovlm.data.tilings import FAKE
from nanovlm.errors import UserError
from nanovlm.hub.decoders import DECODERS

SIGLIP_NAMES = {
    "embeddings.": "vision.",
    "encoder.layers.": "vision.layers.",
    "post_layernorm.": "vision.post_layernorm.",
}
LLAMA_NAMES = {"model.": "decoder.", "lm_head.": "decoder.lm_head."}
HEAD = "lm_head.weight"
IDEFICS3_NAMES = {
    **{f"model.vision_model.{theirs}": ours for theirs, ours in SIGLIP_NAMES.items()},
    "model.connector.modality_projection.": "projector.",
}

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
ROPE_FIELDS = {  # the fields of RopeScalingConfig that each type uses
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "original_max_position_embeddings", "truncate"),
}
# What our modules compute; a config with other values is rejected.
FIXED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "attention_multiplier": 1.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "clip_qkv": None,
}
# Which blocks of a mixture are dense, which Qwen3-MoE alone says.
FIXED_LAYERS = {"decoder_sparse_step": 1, "mlp_only_layers": []}
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
# Grid sizes up to 128 patches a side at which Idefics3's rounding gives some neighbours the same position.
# fmt: off
IDEFICS3_BAD_GRIDS = (
    19, 25, 29, 31, 38, 40, 41, 43, 47, 49, 50, 54, 55, 58, 59, 61, 62, 67, 68, 71, 72, 73, 74, 76, 77, 80, 82, 83, 84,
    86, 87, 93, 94, 97, 98, 99, 100, 101, 103, 107, 108, 109, 110, 111, 113, 115, 116, 118, 121, 122, 123, 124, 127,
)
# fmt: on


# Fields of DecoderConfig in which what is written has the defaults.
NOT_WRITTEN = (
    "rope_sections",
    *("hidden_act", "sliding_window", "attention_scale", "attention_softcap", "attention_sinks", "norm_offset"),
    *("sandwich_norms", "embedding_scale", "residual_scale", "logit_scale"),
)
IDEFICS3_TYPES = ("idefics3", "smolvlm")  # one architecture under two names
# Vision-language models that are read by files of their own (read.py).
OTHER_TYPES = (
    *("llava", "gemma3", "paligemma", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
)


def find_names(family: str, has_vision: bool) -> dict[str, str | tuple[str, ...]]:
    """Return the name table of a language model in DECODERS, or of an Idefics3 that contains one."""
    names = LLAMA_NAMES | (DECODERS[family].names or {})
    if not has_vision:
        return names
    return IDEFICS3_NAMES | {re.sub(r"^model\.", "model.text_model.", theirs): ours for theirs, ours in names.items()}


def find_joined_names(
    family: str, encoder: Mapping[str, str | tuple[str, ...]], keys: set[str]
) -> tuple[dict, str, str, str]:
    """Return the name table of decoder and encoder for files with these tensors, and how other names begin.

    That is what stands before the names of the parts, and before those of the encoder's tensors; last the head's name.
    In published files the language model is whole; since transformers 5 its head is outside of it.
    """
    is_old = any(key.startswith("language_model.model.") for key in keys)
    text, head = ("language_model.model.", "language_model.") if is_old else ("model.language_model.", "")
    names = {}
    for theirs, ours in find_names(family, has_vision=False).items():
        names[text + theirs.removeprefix("model.") if theirs.startswith("model.") else head + theirs] = ours
    tower = next((key for key in keys if "embeddings.patch_embedding" in key), "model.vision_tower.embeddings.")
    root = tower[: tower.index("embeddings.")]
    names |= {root + theirs: ours for theirs, ours in encoder.items()}
    return names, root.partition("vision_tower.")[0], root, f"{head}{HEAD}"


def check_vision(vision: VisionConfig | None):
    """Raise UserError if Idefics3, the one layout of vision-language models, has no such encoder."""
    if vision is None:
        return
    known = {field: getattr(vision, field) for field in (*VISION_FIELDS, "attention")}
    if other := differences(VisionConfig(**known), vision):
        field, _, values = other[0].partition(": ")
        raise UserError(
            f"vision.{field} = {values.rpartition(' against ')[2]} cannot be exported: Idefics3, the layout in which a "
            "vision-language model is written, has SigLIP's encoder alone; the model folder of a run has every encoder"
        )


def check_projector(config: VLMConfig):
    """Raise UserError if no layout has the projector of a vision-language model."""
    if config.vision is not None and (config.projector.type != "linear" or config.projector.bias):
        what = "bias = True" if config.projector.bias else f"type = {config.projector.type!r}"
        raise UserError(
            f"projector.{what} cannot be exported: Idefics3, the layout in which a vision-language model is written, "
            "has pixel shuffle and one linear map without bias (projector.type = linear) alone; the model folder of a "
            "run has every projector"
        )


# transformers' Idefics3Processor looks for these, and would add missing ones with ids beyond the vocabulary.
IMAGE, IDEFICS3_TOKENS = "<image>", (FAKE, "<image>", "<end_of_utterance>")


def find_family(decoder: DecoderConfig) -> str:
    """Return the key of DECODERS whose layout supports all features of this decoder.

    Raises UserError for a combination of features that no family has.
    """
    d = decoder
    for name in NOT_WRITTEN:
        if getattr(d, name) != getattr(DecoderConfig, name):
            raise UserError(
                f"decoder.{name} = {getattr(d, name)} cannot be exported: no layout that is written has it; the model "
                "folder of a run has it"
            )
    if d.layers_without_rope:
        family = "smollm3"
    elif d.moe is not None:
        family = {"none": "mixtral", "head": "qwen3_moe", "all": "olmoe"}[d.qk_norm]
    elif d.qk_norm != "none":
        family = "qwen3"
    else:
        family = "qwen2" if d.qkv_bias and not d.o_bias else "llama"
    has_both = bool(d.layers_without_rope) and (d.qk_norm != "none" or d.moe is not None)
    wrong_bias = (d.qkv_bias != d.o_bias and family != "qwen2") or (d.qkv_bias and family == "mixtral")
    if has_both or wrong_bias or (d.qk_norm == "all" and family != "olmoe"):
        raise UserError(
            f"no family of language models has decoder.qkv_bias = {d.qkv_bias}, o_bias = {d.o_bias}, qk_norm = "
            f"{d.qk_norm} and layers_without_rope = {d.layers_without_rope}{' in a mixture' if d.moe else ''}: llama, "
            "qwen3 (qk_norm = head) and smollm3 (layers_without_rope) have both biases or none, qwen2 the first alone; "
            "of the mixtures mixtral has no bias, qwen3_moe (qk_norm = head) and olmoe (all) both or none"
        )
    if d.moe is not None:
        expected = {"scores": "softmax", "num_shared_experts": 0, "routed_scaling_factor": 1.0, "capacity_factor": 0.0}
        expected |= {"norm_topk_prob": True} if family == "mixtral" else {"jitter": 0.0}
        expected["has_bias"] = False
        for field, value in expected.items():
            if getattr(d.moe, field) != value:
                raise UserError(
                    f"decoder.moe.{field} = {getattr(d.moe, field)} cannot be exported: {family} has {value}"
                )
        if len(d.mixtures) < d.num_hidden_layers and family != "qwen3_moe":
            raise UserError(
                f"decoder.moe.layers = {d.moe.layers} cannot be exported: {family} has mixtures alone, and only "
                "qwen3_moe (qk_norm = head) has dense layers among them"
            )
        if d.moe.balance == "bias":
            raise UserError(f"decoder.moe.balance = bias cannot be exported: {family} has no bias of experts")
        if family == "olmoe" and d.moe.intermediate_size != d.intermediate_size:
            raise UserError(
                f"decoder.moe.intermediate_size = {d.moe.intermediate_size} cannot be exported: olmoe has one width, "
                f"decoder.intermediate_size = {d.intermediate_size}"
            )
    if family == "llama" and d.hidden_size % d.num_attention_heads:
        raise UserError(
            f"decoder.num_attention_heads = {d.num_attention_heads} must divide decoder.hidden_size = {d.hidden_size}: "
            "transformers reads no other Llama"
        )
    return family
