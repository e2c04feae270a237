"""The graphs of an export compute what the model does, in onnxruntime."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript", reason="needs onnxscript: pip install -e '.[onnx]'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")
import onnxruntime

import nanovlm
from nanovlm.config import (
    FusionConfig,
    MoEConfig,
    ProjectorConfig,
    QuantizationConfig,
    RopeScalingConfig,
    TilingConfig,
    VLMConfig,
)
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.errors import UserError
from nanovlm.hub import export
from nanovlm.hub.model_folder import save_model
from nanovlm.hub.onnx import FORMATS, LARGEST_FILE, check_onnx
from nanovlm.hub.onnx_parts import VisionPart
from nanovlm.kernels.quantized_weight import dequantize_ref
from nanovlm.model.quantized import quantize, quantize_weight
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise
from tests.hub.test_export import write_own

TILING = TilingConfig("idefics3", longest_edge=32)
TOKENIZER = train_tokenizer(
    sample_texts(Scenes("train"), 50), 512, marker_tokens(dataclasses.replace(TINY, tiling=TILING))
)
replace = dataclasses.replace


def variant(**decoder) -> VLMConfig:
    return replace(TINY, tiling=TILING, decoder=replace(TINY.decoder, **decoder))


DENSE = variant(
    num_hidden_layers=1,
    qk_norm="head",
    qkv_bias=True,
    tie_word_embeddings=True,
    rope_scaling=RopeScalingConfig("yarn", factor=4.0, original_max_position_embeddings=64),
)
EXPERTS = MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=16)
# What no layout of transformers has: two encoders, a projector with queries, a mixture with a shared expert.
MIXTURE = replace(
    variant(
        num_hidden_layers=1,
        layers_without_rope=(0,),
        moe=replace(EXPERTS, num_shared_experts=1, scores="sigmoid", balance="bias"),
    ),
    projector=ProjectorConfig("qformer", num_tokens=3, num_layers=1, num_attention_heads=2),
    vision=replace(
        TINY.vision,
        hidden_act="quick_gelu",
        class_token=True,
        pre_layernorm=True,
        num_hidden_layers=1,
        second=replace(TINY.vision, positions="rotary", num_hidden_layers=1, num_registers=1, layer_scale=True),
    ),
)
# Quantised already, to codes that a graph takes as they are.
TEXT = replace(variant(num_hidden_layers=1, moe=EXPERTS), vision=None, image_token_id=None)
# What Gemma-2 and -3, Granite and gpt-oss have, all at once.
WINDOWS = variant(
    sliding_window=6,
    full_attention_layers=(1,),
    window_rope_theta=100.0,
    attention="plain",
    attention_softcap=0.5,
    attention_sinks=True,
    attention_scale=0.5,
    hidden_act="gelu_tanh",
    norm_offset=1.0,
    sandwich_norms=True,
    embedding_scale=8.0,
    residual_scale=0.5,
    logit_scale=0.25,
    tie_word_embeddings=False,
)
WINDOWS = replace(WINDOWS, vision=None, image_token_id=None)
CASES = {
    "dense": (DENSE, ("q4",)),
    "mixture": (MIXTURE, ("fp32",)),
    "text": (TEXT, ("q8",)),
    "windows": (WINDOWS, ("q8",)),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def exported(request, tmp_path_factory):
    """A model of ours, its processor, the folder of its graphs, and their formats."""
    folder, (config, formats) = tmp_path_factory.mktemp("onnx"), CASES[request.param]
    model = write_own(folder / "model", config, TOKENIZER)
    if config is TEXT:
        quantize(model, QuantizationConfig("int4", group_size=32, experts=True))
        for name, scales in model.named_buffers():
            if name.endswith("scales"):  # finer ones than ours, as of other tools
                scales |= torch.randint(4096, scales.shape, dtype=torch.int32) << 4
        save_model(folder / "model", model, Processor(TOKENIZER, CHAT_TEMPLATE, model.config))
    export.export_onnx(folder / "model", folder / "out", formats, 20_000 if config is TEXT else LARGEST_FILE)
    return *nanovlm.load(folder / "model"), folder / "out", formats


class Graphs:
    """The graphs of a folder, run as transformers.js runs them."""

    def __init__(self, folder, suffix=""):
        self.config = json.loads((folder / "config.json").read_text())
        names = (
            ["model"]
            if "text_config" not in self.config
            else ["vision_encoder", "embed_tokens", "decoder_model_merged"]
        )
        sessions = [onnxruntime.InferenceSession(folder / "onnx" / f"{name}{suffix}.onnx") for name in names]
        self.decoder, self.parts = sessions[-1], dict(zip(names, sessions, strict=True))
        self.never = json.loads((folder / "generation_config.json").read_text())["suppress_tokens"]

    def embed(self, batch, tiles_of):
        """Return what the decoder reads of prompts padded on the left, whose pictures have so many tiles."""
        ids = batch["input_ids"]
        if "vision_encoder" not in self.parts:
            return {"input_ids": ids}
        (embeds,) = self.parts["embed_tokens"].run(None, {"input_ids": ids})
        if sum(tiles_of):
            shape = len(tiles_of), max(tiles_of), *batch["pixels"].shape[1:]
            pixels, shown = np.zeros(shape, np.float32), np.zeros((*shape[:2], *shape[3:]), bool)
            for row, own in enumerate(np.split(batch["pixels"], np.cumsum(tiles_of)[:-1])):
                pixels[row, : len(own)], shown[row, : len(own)] = own, True
            inputs = {"pixel_values": pixels, "pixel_attention_mask": shown}
            (features,) = self.parts["vision_encoder"].run(None, inputs)
            embeds[ids == self.config["image_token_id"]] = features.reshape(-1, features.shape[-1])
        return {"inputs_embeds": embeds}

    def decode(self, first, mask, past=None, num_logits_to_keep=0):
        """Return logits and the keys and values of all tokens."""
        text, num_new = self.config.get("text_config", self.config), next(iter(first.values())).shape[1]
        if past is None:
            empty = np.zeros((len(mask), text["num_key_value_heads"], 0, text["head_dim"]), np.float32)
            past = [empty] * 2 * text["num_hidden_layers"]
        positions = np.where(mask, mask.cumsum(1) - 1, 1)[:, -num_new:]
        names = [f"past_key_values.{i}.{kind}" for i in range(len(past) // 2) for kind in ("key", "value")]
        logits, *past = self.decoder.run(
            None,
            {
                **first,
                "attention_mask": mask,
                "position_ids": positions,
                "num_logits_to_keep": np.array(num_logits_to_keep),
                **dict(zip(names, past, strict=True)),
            },
        )
        return logits, past

    def generate(self, batch, tiles_of, num):
        """Return the logits of the prompts, and so many most likely tokens of each."""
        mask = batch["mask"]
        prompt, past = self.decode(self.embed(batch, tiles_of), mask)
        logits, tokens = prompt.copy(), []
        for _ in range(num):
            logits[..., self.never] = -np.inf
            tokens.append(logits[:, -1:].argmax(-1))
            mask = np.concatenate((mask, np.ones_like(tokens[-1])), 1)
            first = self.embed({"input_ids": tokens[-1]}, [0])
            logits, past = self.decode(first, mask, past, num_logits_to_keep=1)
            assert logits.shape[1] == 1
        return prompt, np.concatenate(tokens, 1)


def ask(processor):
    """Return two prompts of different lengths and with pictures of different sizes, and how many tiles each has."""
    sees, prompts = processor.config.vision is not None, []
    for i, (question, size) in enumerate([("what color is the circle?", (16, 16)), ("how many?", (60, 10))]):
        images = [noise(i, 64).resize(size)] if sees else []
        prompts.append(processor.prompt([{"role": "user", "content": question}], images))
    return prompts, [len(prompt.tiles) for prompt in prompts]


def pad_left(prompts, config):
    longest = max(map(len, prompts))
    ids = [[config.pad_token_id] * (longest - len(prompt)) + prompt.input_ids.tolist() for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    pixels = normalize(torch.cat([prompt.tiles for prompt in prompts])).numpy() if config.vision is not None else None
    return {"input_ids": np.array(ids), "mask": np.array(mask), "pixels": pixels}


def round_weights(model, format):
    """Give a model the weights that a graph in few bits has."""
    decoder = model.decoder
    head = decoder.head_weight.detach()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(("router", "lm_head")):
            kind = format if name.startswith("decoder.") else "int8"
            module.weight.data = dequantize_ref(quantize_weight(module.weight, kind))
        elif hasattr(module, "router"):
            for stack in (module.gate_proj, module.up_proj, module.down_proj):
                if isinstance(stack, nn.Parameter):
                    stack.data = torch.stack([dequantize_ref(quantize_weight(one, format)) for one in stack])
    decoder.embed_tokens.weight.data = dequantize_ref(
        quantize_weight(decoder.embed_tokens.weight, "int8", search=False)
    )
    if not decoder.config.tie_word_embeddings:
        decoder.lm_head.weight.data = dequantize_ref(quantize_weight(head, "int8", search=False))


def test_graphs_compute_what_the_model_does(exported):
    ours, processor, folder, formats = exported
    prompts, tiles_of = ask(processor)
    assert len({len(prompt) for prompt in prompts}) == 2 and (ours.config.vision is None or tiles_of == [5, 3])
    for name in formats:
        format, suffix = FORMATS[name]
        if format is not None:
            ours, _ = nanovlm.load(folder.parent / "model")
            round_weights(ours, format)
        graphs = Graphs(folder, suffix)
        logits, tokens = graphs.generate(pad_left(prompts, processor.config), tiles_of, 32)
        for row, prompt in enumerate(prompts):
            with torch.no_grad():
                own = ours.logits(processor.batch([prompt]))[0]
            assert np.abs(logits[row, -len(own) :] - own.numpy()).max() <= 1e-4 * own.abs().max(), name
        answers = nanovlm.generate(ours, processor.batch(prompts), max_new_tokens=32)
        assert max(map(len, answers)) == 32
        for ids, answer in zip(tokens.tolist(), answers, strict=True):
            assert ids[: len(answer)] == answer and ids[len(answer) :][:1] in ([], [ours.config.eos_token_id]), name


@pytest.mark.parametrize("exported", ["text"], indirect=True)
def test_weights_of_a_large_graph_are_beside_it(exported):
    folder = exported[2]
    config = json.loads((folder / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": {"model_quantized.onnx": 1}}
    graph, weights = ((folder / "onnx" / f"model_quantized.onnx{end}").read_bytes() for end in ("", "_data"))
    assert len(graph) < 40_000 < len(weights) + 20_000
    assert b".py" not in graph and str(folder.parent).encode() not in graph


def test_kernels_of_ours_are_in_no_graph():
    plain = VLM(MIXTURE).eval()
    second = replace(MIXTURE.vision.second, attention="triton")
    ours = VLM(replace(MIXTURE, vision=replace(MIXTURE.vision, attention="triton", second=second))).eval()
    ours.load_state_dict(plain.state_dict())
    pixels, shown = torch.randn(1, 2, 3, 16, 16), torch.ones(1, 2, 16, 16, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(VisionPart(ours)(pixels, shown), VisionPart(plain)(pixels, shown))


REFUSED = {
    "decoder.prefix_attention": variant(prefix_attention="images"),
    "fusion.type": replace(TINY, fusion=FusionConfig("cross_attention")),
    "has_score_head": replace(TINY, has_score_head=True),
    "decoder.moe.has_bias": variant(moe=replace(EXPERTS, has_bias=True, experts="loop")),
    "quantization.format": replace(TINY, quantization=QuantizationConfig("fp8")),
    "quantization.activations": replace(TINY, quantization=QuantizationConfig("int8", activations="int8")),
}


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_what_no_graph_has_is_named(field):
    with pytest.raises(UserError, match=field.replace(".", r"\.")):
        check_onnx(REFUSED[field].validate())
