"""Folders for vLLM with our plug-in: what is in them, and what is refused.

That vLLM answers with them as we do is in tests/test_engines_benchmark.py.
"""

import dataclasses
import importlib
import json
import tomllib

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.engines_models import MODELS
from nanovlm.config import FusionConfig, ProjectorConfig, VLMConfig
from nanovlm.hub import export
from nanovlm.hub.vllm_export import SEES, TEXT, check_vllm, make_vllm_config, read_vllm_config
from tests.hub.test_gguf_export import BASE, decoder, save
from tests.hub.test_layouts import ROOT

OWN = MODELS["our own"]


def test_a_folder_has_the_model_under_our_names(tmp_path):
    """And what vLLM reads of any model; Idefics3's files, which would say how pictures are cut, it has not."""
    model, processor = save(tmp_path / "model", OWN)
    export.main([str(tmp_path / "model"), str(tmp_path / "out"), "--format", "vllm"])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert read_vllm_config(data["nanovlm"]) == model.config and data["architectures"] == [SEES]
    assert data["head_dim"] == 32 and data["num_key_value_heads"] == 2 and data["model_type"] == "nanovlm"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == processor.chat_template and "processor_class" not in settings
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve out" in card and "A vision-language model with a decoder of its own" in card


def test_a_language_model_is_another_class():
    assert make_vllm_config(VLMConfig(vision=None, image_token_id=None, decoder=BASE), "float32")["architectures"] == [
        TEXT
    ]


REFUSED = [
    (dataclasses.replace(OWN, fusion=FusionConfig("cross_attention")), "fusion.type = cross_attention"),
    (decoder(prefix_attention="prompt"), "decoder.prefix_attention = prompt"),
    (decoder(rope_sections=(2, 3, 3)), "decoder.rope_sections = (2, 3, 3)"),
    (decoder(attention="plain", attention_sinks=True), "decoder.attention_sinks = True"),
    (decoder(attention="plain", attention_softcap=30.0), "decoder.attention_softcap = 30.0"),
    (
        dataclasses.replace(OWN, projector=ProjectorConfig("merger", deepstack_layers=(0,))),
        "projector.deepstack_layers = (0,)",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_the_plug_in_does_not_have_is_named(config, message):
    with pytest.raises(ValueError) as error:
        check_vllm(config)
    assert message in str(error.value) and "cannot be exported for vLLM: " in str(error.value)


def test_vllm_finds_the_plug_in():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["nanovlm"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
