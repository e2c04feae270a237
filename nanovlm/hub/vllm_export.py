"""What a folder for vLLM says of a model: our own config, and what vLLM itself reads of one.

    python -m nanovlm.hub.export runs/demo OUT_DIR --format vllm
    vllm serve OUT_DIR                                                where nanovlm is installed beside vLLM

For models that no published layout has: own projectors, encoders and ways to cut pictures, any mixture. The weights
keep our names; vllm_plugin.py tells vLLM who reads them, and vllm_model.py runs our modules on vLLM's paged cache.
"""

import dataclasses

from nanovlm.config import VLMConfig, from_dict
from nanovlm.errors import UserError

MODEL_TYPE, TEXT, SEES = "nanovlm", "NanoVLMForCausalLM", "NanoVLMForConditionalGeneration"
# Fields of the decoder that vLLM reads of every model, to make room for keys and values.
DECODER_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)


def check_vllm(config: VLMConfig):
    """Raise UserError that names a setting that our modules do not have on vLLM's cache."""
    d = config.decoder
    refused = {
        "quantization": (config.quantization is not None, "the plug-in reads weights as they were trained"),
        "fusion.type": (config.fusion.type != "sequence", "vLLM keeps no keys of pictures beside the tokens"),
        "projector.deepstack_layers": (bool(config.projector.deepstack_layers), "pictures come in before the blocks"),
        "decoder.prefix_attention": (d.prefix_attention != "causal", "every token sees those before it alone"),
        "decoder.rope_sections": (bool(d.rope_sections), "a token has one position"),
        "decoder.attention_sinks": (d.attention_sinks, "it was not tried"),
        "decoder.attention_softcap": (bool(d.attention_softcap), "it was not tried"),
    }
    for name, (is_refused, why) in refused.items():
        if is_refused:
            value = config
            for part in name.split("."):
                value = getattr(value, part)
            raise UserError(f"{name} = {value} cannot be exported for vLLM: {why}")


def make_vllm_config(config: VLMConfig, dtype: str) -> dict:
    """Return the config.json of a model; `read_vllm_config` gets ours back from it."""
    return {
        "architectures": [TEXT if config.vision is None else SEES],
        "model_type": MODEL_TYPE,
        **{field: getattr(config.decoder, field) for field in DECODER_FIELDS},
        **{f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad", "image")},
        "dtype": dtype,
        "torch_dtype": dtype,
        "nanovlm": dataclasses.asdict(config),
    }


def read_vllm_config(data: dict) -> VLMConfig:
    """Return the config of a model from the field nanovlm of its config.json."""
    config = from_dict(VLMConfig, data).validate()
    check_vllm(config)
    return config
