"""Checkpoints in 4 bits as GPTQ and AWQ tools publish them load into int4, equal to the published formulas."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovlm.config import QuantizationConfig
from nanovlm.data.types import Batch
from nanovlm.errors import UserError
from nanovlm.hub import configs, weights
from nanovlm.hub.stored import Stored, read_model
from nanovlm.model.quantized import QuantizedLinear
from tests.conftest import assert_ranks_fill_their_rows
from tests.hub.test_layouts import make_model

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def words_of(codes):
    """int[..., 8] -> int32 words, the first in the lowest bits, one by one in Python's numbers."""
    flat = [sum(int(code) << (4 * i) for i, code in enumerate(eight)) for eight in codes.reshape(-1, 8)]
    words = torch.tensor([word - (1 << 32) if word >= 1 << 31 else word for word in flat], dtype=torch.int32)
    return words.view(codes.shape[:-1])


def quantized(linear, settings, generator):
    """Random codes, zero points and scales for a layer: its tensors as published, and its weight by the formula."""
    N, K = linear.weight.shape
    size = K if settings["group_size"] == -1 else settings["group_size"]
    G = -(-K // size)
    codes = torch.randint(0, 16, (K, N), generator=generator)
    zeros = torch.randint(1, 16, (G, N), generator=generator)
    scales = (torch.rand(G, N, generator=generator) + 0.5).mul(0.02).half()
    g_idx = torch.arange(K) // size
    weight = torch.empty(N, K)
    for k in range(K):
        weight[:, k] = scales[g_idx[k]].float() * (codes[k] - zeros[g_idx[k]]).float()
    if settings["quant_method"] == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        parts = {
            "qweight": words_of(codes.view(K, N // 8, 8)[:, :, order]),
            "qzeros": words_of(zeros.view(G, N // 8, 8)[:, :, order]),
        }
    else:
        less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        parts = {
            "qweight": words_of(codes.t().reshape(N, K // 8, 8).transpose(0, 1)),
            "qzeros": words_of((zeros - less).view(G, N // 8, 8)),
            "g_idx": g_idx.int(),
        }
    return parts | {"scales": scales}, weight


def publish(folder, settings, family="llama", biases=False, change=lambda tensors: None, **sizes):
    """Write a random model whose linear layers are quantised; return the model of transformers with their weights."""
    model = make_model(family, **SIZES | sizes)
    model.save_pretrained(folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and "layers" in name:
            del tensors[f"{name}.weight"]
            parts, weight = quantized(linear, settings, generator)
            linear.weight.data = weight
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            if biases and linear.bias is None:
                tensors[f"{name}.bias"] = torch.zeros(len(weight))
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return model


def load(folder):
    config = configs.read_config(folder)
    dtype, fill = weights.open_weights(folder, config)
    return read_model(Stored(config, None, dtype, fill), "cpu", torch.float32)[0]


CASES = {
    "gptq": (GPTQ, {}),
    "gptq v2, zero biases": (GPTQ | {"checkpoint_format": "gptq_v2"}, {"biases": True}),
    "gptq, a group a row": (GPTQ | {"group_size": -1}, {"family": "qwen2"}),
    "gptq, a group of several of ours and a part of one": (
        GPTQ | {"group_size": 512},
        {"intermediate_size": 640},
    ),
    "awq": (AWQ, {"family": "qwen2"}),
    "awq, in capitals": (AWQ | {"version": "GEMM"}, {}),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_those_of_the_published_formula(tmp_path, name):
    settings, options = CASES[name]
    theirs = publish(tmp_path, settings, **options)
    model = load(tmp_path)
    group = 32 if settings["group_size"] == 32 else 128
    assert model.config.quantization == QuantizationConfig("int4", group)
    named = dict(theirs.named_modules())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 14
    for key, layer in layers.items():
        assert torch.equal(layer.dequantize(), named[key.replace("decoder.", "model.")].weight), key
    ids = torch.randint(3, 130, (1, 40), generator=torch.Generator().manual_seed(1))
    doc_ids = torch.zeros_like(ids, dtype=torch.int32)
    batch = Batch(ids, ids, doc_ids, doc_ids, torch.arange(40)[None], torch.empty(0, 3, 0, 0), doc_ids[0, :0])
    expected = theirs(input_ids=ids).logits
    assert (model.logits(batch) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_every_rank_reads_its_rows(tmp_path):
    publish(tmp_path, AWQ)
    config = configs.read_config(tmp_path)
    assert_ranks_fill_their_rows(Stored(config, None, *weights.open_weights(tmp_path, config)))


def shuffle_groups(tensors):
    name = "model.layers.1.mlp.up_proj.g_idx"
    tensors[name] = tensors[name][torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(0))]


def edit(part, function):
    def change(tensors):
        name = f"model.layers.0.self_attn.q_proj.{part}"
        tensors[name] = function(tensors[name])

    return change


def drop(tensors):
    del tensors["model.layers.0.mlp.down_proj.qzeros"]


def add(tensors):
    tensors["lm_head.qweight"] = torch.zeros(8, 8, dtype=torch.int32)


def set_bias(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)


MISTAKES = {
    "bits": (GPTQ | {"bits": 8}, None, r"config.json: quantization_config.bits = 8 is not supported; it must be 4$"),
    "method": (GPTQ | {"quant_method": "fp8"}, None, r"quant_method = 'fp8' is not supported; there are gptq, awq"),
    "a list": (
        GPTQ | {"quant_method": ["gptq"]},
        None,
        r"quant_method = \['gptq'\] is not supported; there are gptq, awq",
    ),
    "group": (AWQ | {"group_size": 16}, None, r"group_size = 16 is not supported; it must be -1 or a multiple of 32"),
    "gemv": (AWQ | {"version": "gemv"}, None, r"version = 'gemv' is not supported; it must be 'gemm' or 'GEMM'"),
    "act-order": (
        GPTQ,
        shuffle_groups,
        r"up_proj in .* cannot be read: its groups are not of neighbouring",
    ),
    "missing": (GPTQ, drop, r"does not fit the config: model.layers.0.mlp.down_proj.qzeros is missing"),
    "unknown": (GPTQ, add, r"lm_head.qweight is unknown"),
    "bias": (GPTQ, set_bias, r"model.layers.0.self_attn.q_proj.bias is unknown"),
    "zero point": (GPTQ, edit("qzeros", lambda x: x | -1), r"q_proj in .* a group has the zero point 16"),
    "dtype": (GPTQ, edit("qweight", lambda x: x.short()), r"qweight is torch.int16 .* must be int32"),
    "shape": (
        GPTQ,
        edit("scales", lambda x: x[:1]),
        r"\[2, 64\] zero points and \[1, 64\] scales for \[2, 64\]",
    ),
    "size": (AWQ, edit("qweight", lambda x: torch.cat((x, x))), r"zero points and .* for \[4, 64\] groups"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(tmp_path, name):
    settings, change, message = MISTAKES[name]
    publish(tmp_path, settings, change=change or (lambda tensors: None))
    with pytest.raises(UserError, match=message):
        load(tmp_path)
