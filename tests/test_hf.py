"""Checkpoints as transformers writes them and as the hub has them load into our modules, equal; mistakes are named."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
import transformers as hub
from safetensors.torch import load_file, save_file

import nanovlm
from nanovlm import hf
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.types import Document
from nanovlm.model.vlm import VLM
from tests.conftest import TINY
from tests.model.test_parity import randomize

hub.utils.logging.disable_progress_bar()

V, PAD, BOS, EOS = 131, 0, 1, 2
TEXT = dict(
    vocab_size=V,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8
)
DECODERS = {"llama": "Llama", "smollm3": "SmolLM3", "qwen2": "Qwen2", "qwen3": "Qwen3"}
VLMS = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}


# ---- models of transformers, with random weights ----


def make_text(family, **options):
    return getattr(hub, DECODERS[family] + "Config")(**TEXT | options)


def make_model(family, text="llama", vision=None, scale_factor=2, tied=False, **options):
    """A random model in evaluation mode; `options` are fields of the text config."""
    torch.manual_seed(0)
    if family in DECODERS:
        config = make_text(family, tie_word_embeddings=tied, **options)
        model = getattr(hub, DECODERS[family] + "ForCausalLM")(config)
    else:
        config = getattr(hub, VLMS[family] + "Config")(
            text_config=make_text(text, tie_word_embeddings=tied, **options).to_dict(),
            vision_config=VISION | (vision or {}),
            scale_factor=scale_factor,
            image_token_id=V - 1,
            tie_word_embeddings=tied,
        )
        model = getattr(hub, VLMS[family] + "ForConditionalGeneration")(config)
    randomize(model, 1.0)
    return model.eval()


def load(model, folder, dtype=None) -> VLM:
    """Save a model of transformers and load it into our modules."""
    model.save_pretrained(folder)
    return hf.load_model(folder, hf.read_config(folder), dtype=dtype)


def make_prompts(config, lengths=(150, 23, 1), images=(2, 1, 0)):
    """Random prompts of different lengths, as a batch of ours and as inputs of transformers one by one."""
    documents, inputs = [], []
    for length, num_images in zip(lengths, images, strict=True):
        ids = torch.randint(3, config.decoder.vocab_size - 1, (length,))
        pixel_values = torch.empty(0, 3, 0, 0)
        if config.vision is not None:
            per_tile, size = config.num_image_tokens, config.vision.image_size
            for i in range(num_images):
                ids[1 + i * (per_tile + 2) :][:per_tile] = config.image_token_id
            pixel_values = torch.randn(num_images, 3, size, size)
        zeros = torch.zeros(length, dtype=torch.int32)
        documents.append(Document(ids, torch.full_like(ids, -100), zeros, pixel_values))
        inputs.append({"input_ids": ids[None]} | ({"pixel_values": pixel_values[None]} if len(pixel_values) else {}))
    rows = [make_row([document], max(lengths), config.pad_token_id) for document in documents]
    pixel_values = torch.cat([document.tiles for document in documents])
    return dataclasses.replace(collate(rows), pixel_values=pixel_values), inputs


@torch.inference_mode()
def assert_same(theirs, ours):
    """Equal logits and equal greedy answers of 32 tokens, in a batch of ours and one by one there."""
    batch, inputs = make_prompts(ours.config)
    logits = ours.logits(batch)
    answers = ours.generate(batch, max_new_tokens=32)
    never = [PAD] if ours.config.vision is None else [PAD, ours.config.image_token_id]
    distinct = set()
    for row, answer, prompt in zip(logits, answers, inputs, strict=True):
        expected = theirs(**prompt).logits[0]
        assert (row[: len(expected)] - expected).abs().max() <= 1e-5 * expected.abs().max()
        told = theirs.generate(
            **prompt,
            attention_mask=torch.ones_like(prompt["input_ids"]),
            do_sample=False,
            max_new_tokens=32,
            suppress_tokens=never,
        )
        told = told[0, prompt["input_ids"].shape[1] :].tolist()
        assert answer == (told[: told.index(EOS)] if EOS in told else told)
        distinct |= set(answer)
    assert len(distinct) > 3  # no answer that repeats itself only


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
MODELS = {
    **{family: {"family": family} for family in DECODERS},
    "llama no groups": {"family": "llama", "num_key_value_heads": 4},
    "llama groups of 3": {"family": "llama", "num_attention_heads": 6, "num_key_value_heads": 2},
    "llama groups of 4": {"family": "llama", "num_attention_heads": 4, "num_key_value_heads": 1},
    "llama groups of 8": {"family": "llama", "num_attention_heads": 8, "num_key_value_heads": 1},
    "llama wide heads": {"family": "llama", "head_dim": 32},
    "llama narrow heads": {"family": "llama", "head_dim": 6},
    "llama tied": {"family": "llama", "tied": True},
    "llama one layer": {"family": "llama", "num_hidden_layers": 1},
    "llama odd vocabulary": {"family": "llama", "vocab_size": 97, "tied": True},
    "llama biases": {"family": "llama", "attention_bias": True},
    "llama eps": {"family": "llama", "rms_norm_eps": 0.3},
    "llama linear": {"family": "llama", "rope_parameters": LINEAR},
    "llama llama3": {"family": "llama", "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 128}},
    "llama yarn": {"family": "llama", "rope_parameters": YARN},
    "llama yarn 64": {"family": "llama", "rope_parameters": YARN | {"original_max_position_embeddings": 64}},
    "llama yarn betas": {
        "family": "llama",
        "rope_parameters": YARN
        | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0, "original_max_position_embeddings": 128},
    },
    "smollm3 listed": {"family": "smollm3", "no_rope_layers": [0, 1, 0]},
    "smollm3 interval": {"family": "smollm3", "no_rope_layer_interval": 2, "num_hidden_layers": 5, "tied": True},
    "smollm3 biases": {"family": "smollm3", "attention_bias": True},
    "qwen2 tied": {"family": "qwen2", "tied": True, "num_attention_heads": 6, "num_key_value_heads": 2},
    "qwen2 yarn": {"family": "qwen2", "rope_parameters": YARN | {"original_max_position_embeddings": 64}},
    "qwen3 heads": {"family": "qwen3", "head_dim": 20, "tied": True},
    "qwen3 biases": {"family": "qwen3", "attention_bias": True},
    **{f"{vlm} of {text}": {"family": vlm, "text": text} for vlm in VLMS for text in DECODERS},
    "idefics3 tied": {"family": "idefics3", "tied": True},
    "idefics3 shuffle 3": {"family": "idefics3", "vision": {"image_size": 48}, "scale_factor": 3},
    "idefics3 shuffle 4": {"family": "idefics3", "vision": {"layer_norm_eps": 0.1}, "scale_factor": 4},
    "idefics3 no shuffle": {"family": "idefics3", "vision": {"image_size": 24, "num_hidden_layers": 1}, "scale_factor": 1},
    "idefics3 border": {"family": "idefics3", "vision": {"image_size": 54, "patch_size": 8}},
    "smolvlm linear": {"family": "smolvlm", "text": "qwen2", "rope_parameters": LINEAR, "head_dim": 20},
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_answers_are_those_of_transformers(name, tmp_path):
    theirs = make_model(**MODELS[name])
    assert_same(theirs, load(theirs, tmp_path))


def test_attention_of_the_test_models_is_not_flat():
    """Else a wrong mask, position or group of heads would hardly show."""
    for family in DECODERS:
        model = make_model(family)
        model.set_attn_implementation("eager")
        weights = model(input_ids=torch.randint(3, V, (1, 150)), output_attentions=True).attentions
        assert torch.stack(weights)[..., 100:, :].amax(-1).mean() > 0.1  # flat: 0.01


@torch.inference_mode()
@pytest.mark.parametrize("family", [*DECODERS, *VLMS])
def test_bf16_differs_no_more_than_transformers_itself(family, tmp_path):
    theirs = make_model(family)
    ours = load(theirs, tmp_path, torch.bfloat16)
    batch, inputs = make_prompts(ours.config, (150, 150, 150), (2, 2, 2))
    exact = torch.cat([theirs(**prompt).logits for prompt in inputs])
    theirs.to(torch.bfloat16)
    half = [{k: v if k == "input_ids" else v.bfloat16() for k, v in prompt.items()} for prompt in inputs]
    allowed = torch.cat([theirs(**prompt).logits for prompt in half]).float() - exact
    error = ours.logits(batch).float() - exact
    print(family, error.abs().max() / allowed.abs().max(), error.norm() / allowed.norm(), allowed.norm() / exact.norm())
    assert error.norm() <= allowed.norm() and error.abs().max() <= allowed.abs().max()
