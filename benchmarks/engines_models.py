"""The models that benchmarks/engines.py has other engines run, written to disk with a picture, and what we answer."""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import nanovlm
from nanovlm.config import (
    AdapterConfig,
    DecoderConfig,
    MoEConfig,
    ProjectorConfig,
    TilingConfig,
    VisionConfig,
    VLMConfig,
)
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.hub import export
from nanovlm.hub.adapters import save_adapter
from nanovlm.hub.model_folder import save_model
from nanovlm.model.adapters import adapt, adapter_tensors
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM

QUESTION, NUM_TOKENS = "what color is the 2nd circle?", 8
LLAMA = DecoderConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=False,
)
MIXTURE = MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=96)
VISION = VisionConfig(
    image_size=32, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
)
IDEFICS3 = VLMConfig(
    vision=VISION,
    projector=ProjectorConfig(scale_factor=2),
    tiling=TilingConfig(policy="idefics3", longest_edge=64),
    decoder=LLAMA,
)
OWN_MIXTURE = dataclasses.replace(MIXTURE, num_shared_experts=1, scores="sigmoid", balance="bias")
# Models that are asked, by what the page calls them.
MODELS = {
    "Llama": IDEFICS3,
    "Qwen3-MoE": dataclasses.replace(IDEFICS3, decoder=dataclasses.replace(LLAMA, moe=MIXTURE, qk_norm="head")),
    "Llama with an adapter": IDEFICS3,
    "our own": dataclasses.replace(
        IDEFICS3,
        projector=ProjectorConfig(type="resampler", num_tokens=12, num_layers=1),
        tiling=TilingConfig(policy="fit", max_tiles=6),
        decoder=dataclasses.replace(LLAMA, moe=OWN_MIXTURE, layers_without_rope=(1,)),
    ),
}


class Written(NamedTuple):
    """A model in all formats, a picture and a question, and what we answer."""

    folder: Path
    inputs: dict[str, np.ndarray]
    logits: np.ndarray  # [V], of the last token of the prompt
    tokens: list[int]
    text: str
    logprobs: np.ndarray


def write_model(folder: Path, name: str) -> Written:
    """Write a random model whose likeliest tokens are words: some engines report halves of characters as one token."""
    torch.manual_seed(0)
    config = MODELS[name]
    size = config.decoder.vocab_size
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), size, marker_tokens(config))
    model = VLM(config.validate()).eval()
    is_word = [bool(re.fullmatch(r"Ġ?[a-z]+", tokenizer.id_to_token(i) or "")) for i in range(size)]
    with torch.no_grad():
        model.decoder.head_weight.mul_(20 * torch.tensor(is_word)[:, None])
    processor = Processor(tokenizer, CHAT_TEMPLATE, config)
    save_model(folder / "model", model, processor)
    export.export(folder / "model", folder / "hub", format="vllm" if name == "our own" else "hub")
    if name in ("Llama", "Qwen3-MoE"):
        export.export(folder / "model", folder / "gguf", format="gguf")
    if name == "Llama with an adapter":
        adapt(model, AdapterConfig(rank=8))
        for tensor in adapter_tensors(model).values():
            tensor.data.normal_(std=0.1)
        save_adapter(folder / "adapter", model)
    row, col = np.mgrid[0:100, 0:64]
    image = Image.fromarray(np.stack((2 * row, 3 * col, row + col), -1).clip(0, 255).astype(np.uint8))
    image.save(folder / "picture.png")
    document = processor.prompt([{"role": "user", "content": QUESTION}], [image])
    batch, length = processor.batch([document]), len(document)
    tokens = nanovlm.generate(model, batch, max_new_tokens=NUM_TOKENS)[0]
    with torch.no_grad():
        logits = model.logits(batch)[0, -1]
        document.input_ids = document.labels = torch.cat((document.input_ids, torch.tensor(tokens)))
        document.branch_ids = torch.zeros(len(document.input_ids), dtype=torch.int32)
        found = model.logits(processor.batch([document]))[0, length - 1 : -1].log_softmax(-1)
    inputs = {"input_ids": batch.input_ids.numpy(), "pixel_values": normalize(batch.pixel_values)[None].numpy()}
    np.savez(folder / "inputs.npz", **inputs)
    logprobs = found[torch.arange(len(tokens)), tokens].numpy()
    return Written(folder, inputs, logits.numpy(), tokens, processor.decode(tokens), logprobs)
