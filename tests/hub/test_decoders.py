"""Language models with windows, sinks, multipliers or norms of their own: logits and answers are transformers'."""

import pytest
import torch
import transformers as hub

from nanovlm.hub import configs
from nanovlm.hub.families import find_family
from tests.hub.test_layouts import TEXT, assert_same, load
from tests.model.test_parity import randomize

pytestmark = pytest.mark.usefixtures("one_thread")

GEMMA3 = {"head_dim": 16, "query_pre_attn_scalar": 24, "num_hidden_layers": 4, "sliding_window": 12}
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
# Windows of fewer, as many and more tokens than a block of the cache, in prompts of 150 and 23 tokens.
MODELS = {
    "mistral of 2": ("Mistral", {"sliding_window": 2}),
    "mistral of 16": ("Mistral", {"sliding_window": 16}),
    "mistral of 40": ("Mistral", {"sliding_window": 40, "tie_word_embeddings": True}),
    "mixtral of 7": ("Mixtral", {"sliding_window": 7, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "gemma3": ("Gemma3Text", GEMMA3 | {"layer_types": KINDS, "rope_parameters": ROPE}),
    "gemma3, nothing said": ("Gemma3Text", GEMMA3 | {"num_hidden_layers": 6, "num_key_value_heads": 1}),
    "gemma3, a head": ("Gemma3Text", GEMMA3 | {"layer_types": ["full_attention"] * 4, "tie_word_embeddings": False}),
    "granite": ("Granite", MULTIPLIERS),
    "granite tied": ("Granite", MULTIPLIERS | {"tie_word_embeddings": True, "attention_bias": True}),
}
GEMMA = {"head_dim": 16, "num_key_value_heads": 1}
MODELS |= {"gemma": ("Gemma", GEMMA), "gemma, a head": ("Gemma", GEMMA | {"tie_word_embeddings": False})}
DOTS1 = {"n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS |= {
    "dots1": ("Dots1", DOTS1 | {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}),
    "dots1, windows": ("Dots1", DOTS1 | {"sliding_window": 9, "max_window_layers": 2}),
}
GPT_OSS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 11}
GPT_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS |= {
    "gpt_oss": ("GptOss", GPT_OSS),
    "gpt_oss, clamped": ("GptOss", GPT_OSS | {"swiglu_limit": 0.5, "rope_parameters": GPT_ROPE | {"truncate": False}}),
}
CLASSES = {"Gemma3Text": "Gemma3"}


def make(kind, options):
    torch.manual_seed(0)
    config = getattr(hub, f"{kind}Config")(**TEXT | options)
    model = getattr(hub, f"{CLASSES.get(kind, kind)}ForCausalLM")(config)
    randomize(model, 1.0)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_answers_are_those_of_transformers(name, tmp_path):
    theirs = make(*MODELS[name])
    ours = load(theirs, tmp_path)
    window = MODELS[name][1].get("sliding_window", 0)
    full = "full_attention" in getattr(theirs.config, "layer_types", ()) or not window
    assert set(ours.config.decoder.windows) == {window} | ({0} if full else set()) or name == "gemma3, a head"
    assert_same(theirs, ours)


def test_nothing_of_it_is_written(tmp_path):
    for kind, options in (MODELS["mistral of 16"], MODELS["gemma3"], MODELS["granite"]):
        ours = load(make(kind, options), tmp_path / kind)
        with pytest.raises(ValueError, match=r"decoder\.\w+ = .* cannot be exported"):
            find_family(ours.config.decoder)


@pytest.mark.parametrize("kind", ["Gemma", "Gemma3Text", "Granite", "GptOss"])
def test_what_a_config_leaves_out_is_what_transformers_takes(kind, tmp_path):
    full = getattr(hub, f"{kind}Config")().to_dict()
    assert configs.read_decoder({"model_type": full["model_type"]}, tmp_path) == configs.read_decoder(full, tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("DeepseekV3", {}, r"model_type = 'deepseek_v3' is not read: its attention keeps latent vectors \(MLA\)"),
        ("GptOss", {"quantization_config": {"quant_method": "mxfp4"}}, r"quantization_config = \{.* is not supported"),
        ("GptOss", {"swiglu_alpha": 1.5}, "swiglu_alpha = 1.5 is not supported; it must be 1.702"),
        ("Gemma", {"hidden_act": "silu"}, "hidden_act = 'silu' is not supported; it must be gelu_pytorch_tanh"),
        ("Granite", {"logits_scaling": 0.0}, "logits_scaling = 0.0 must be a number above 0"),
        ("Dots1", DOTS1 | {"n_group": 2}, "n_group = 2 is not supported; it must be 1"),
        ("Dots1", DOTS1 | {"first_k_dense_replace": 3}, "first_k_dense_replace = 3 must leave some of 3 layers"),
    ],
)
def test_what_we_do_not_compute_is_refused(kind, changes, message, tmp_path):
    data = {"model_type": getattr(hub, f"{kind}Config").model_type} | TEXT | changes
    with pytest.raises(ValueError, match=rf"config.json: {message}"):
        configs.check_kind(data, tmp_path / "config.json")
        configs.read_decoder(data, tmp_path / "config.json")
