"""Language models of the hub: for each family its class, its name table and what its config.json leaves out.

A name table maps prefixes of their tensor names to ours; `{}` stands for a number (see families.py).
"""

from typing import NamedTuple

# Additional names of mixtures: each expert's matrix is a slice of our tensor, so their names have one more number.
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

# Kinds of layers, as configs name them.
FULL, SLIDING = "full_attention", "sliding_attention"


class Family(NamedTuple):
    """A family of language models: its class, the defaults of what its config.json leaves out, and its features."""

    architecture: str
    defaults: dict
    qkv_bias: bool = False
    qk_norm: str = "none"
    # For a mixture: its additional name table, and its config fields -> those of MoEConfig.
    names: dict | None = None
    moe: dict | None = None
    # Which layers see whole documents, where the config does not say: in turn from the first on.
    layer_types: tuple[str, ...] = (FULL,)
    # What all models of the family have, as fields of DecoderConfig, and what their configs must say.
    features: dict | None = None
    fixed: dict | None = None
    # What all its mixtures have, as fields of MoEConfig.
    moe_features: dict | None = None


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
MISTRAL_DEFAULTS = LLAMA_DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
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
GEMMA_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
}
GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 1e4,
}
# Their norm behind attention is of what it adds, and the one before the feed-forward layer is ours behind attention.
GEMMA3_NAMES = {
    "model.layers.{}.post_attention_layernorm.": "decoder.layers.{}.attn_out_norm.",
    "model.layers.{}.pre_feedforward_layernorm.": "decoder.layers.{}.post_attention_layernorm.",
    "model.layers.{}.post_feedforward_layernorm.": "decoder.layers.{}.mlp_out_norm.",
}
# A router with a bias for the choice alone and experts that every token sees, as in DeepSeek-V3.
DOTS1_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 152064,
    "hidden_size": 4608,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 62,
    "num_key_value_heads": 32,
    "n_routed_experts": 0,
    "n_shared_experts": 0,
    "num_experts_per_tok": 0,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "sliding_window": 4096,
    "max_window_layers": 62,
}
DOTS1_NAMES = QWEN_MOE_NAMES | {
    "model.layers.{}.mlp.gate.e_score_correction_bias": "decoder.layers.{}.mlp.selection_bias",
    "model.layers.{}.mlp.shared_experts.": "decoder.layers.{}.mlp.shared.",
}
GPT_OSS_DEFAULTS = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "router_aux_loss_coef": 0.001,
    "swiglu_limit": 7.0,
}
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
# The experts' matrices are stored in another layout (weights.py).
GPT_OSS_NAMES = {
    "model.layers.{}.mlp.experts.down_proj_bias": "decoder.layers.{}.mlp.down_bias",
}
GRANITE_DEFAULTS = LLAMA_DEFAULTS | {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
# Their config fields of a mixture -> those of MoEConfig.
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
DOTS1_FIELDS = {
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "moe_intermediate_size": "intermediate_size",
    "n_shared_experts": "num_shared_experts",
    "norm_topk_prob": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
}
GPT_OSS_FIELDS = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "intermediate_size": "intermediate_size",
    "router_aux_loss_coef": "balance_weight",
    "swiglu_limit": "swiglu_limit",
}
OLMOE_FIELDS = {theirs.removeprefix("moe_"): ours for theirs, ours in QWEN3_MOE_FIELDS.items()}
DECODERS = {
    "llama": Family("LlamaForCausalLM", LLAMA_DEFAULTS),
    "mistral": Family("MistralForCausalLM", MISTRAL_DEFAULTS, layer_types=(SLIDING,)),
    "smollm3": Family("SmolLM3ForCausalLM", SMOLLM3_DEFAULTS),
    "qwen2": Family("Qwen2ForCausalLM", QWEN_DEFAULTS, qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", QWEN_DEFAULTS | {"head_dim": 128}, qk_norm="head"),
    "mixtral": Family(
        "MixtralForCausalLM", MIXTRAL_DEFAULTS, names=MIXTRAL_NAMES, moe=MIXTRAL_FIELDS, layer_types=(SLIDING,)
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", QWEN3_MOE_DEFAULTS, qk_norm="head", names=QWEN_MOE_NAMES, moe=QWEN3_MOE_FIELDS
    ),
    "olmoe": Family("OlmoeForCausalLM", OLMOE_DEFAULTS, False, "all", QWEN_MOE_NAMES, OLMOE_FIELDS),
    "gemma": Family(
        "GemmaForCausalLM",
        GEMMA_DEFAULTS,
        features={"hidden_act": "gelu_tanh", "norm_offset": 1.0},
        fixed={"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        GEMMA3_DEFAULTS,
        qk_norm="head",
        names=GEMMA3_NAMES,
        layer_types=(*[SLIDING] * 5, FULL),
        features={"hidden_act": "gelu_tanh", "norm_offset": 1.0, "sandwich_norms": True},
        fixed={
            "hidden_activation": "gelu_pytorch_tanh",
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        GPT_OSS_DEFAULTS,
        names=GPT_OSS_NAMES,
        moe=GPT_OSS_FIELDS,
        layer_types=(SLIDING, FULL),
        features={"attention": "plain", "attention_sinks": True},
        fixed={"swiglu_alpha": 1.702},
        moe_features={"has_bias": True, "experts": "loop"},
    ),
    "granite": Family("GraniteForCausalLM", GRANITE_DEFAULTS),
    "dots1": Family(
        "Dots1ForCausalLM",
        DOTS1_DEFAULTS,
        qk_norm="head",
        names=DOTS1_NAMES,
        moe=DOTS1_FIELDS,
        layer_types=(FULL, SLIDING),
        fixed={"n_group": 1, "topk_group": 1},
        moe_features={"scores": "sigmoid", "balance": "bias"},
    ),
}
# Language models that are not read, and why.
LATENT = "its attention keeps latent vectors (MLA), which we do not have; of its kind of mixtures dots1 is read"
REFUSED = {"deepseek_v2": LATENT, "deepseek_v3": LATENT}
