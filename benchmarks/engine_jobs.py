"""What the sides of benchmarks/engine.py are given: models of real shapes with random weights, pictures and prompts."""

import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.train import SHAPES
from nanovlm.config import TilingConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.data.types import Document
from nanovlm.hub import export
from nanovlm.hub.gguf import find_smollm2
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from nanovlm.presets import SMOLVLM_256M

# Every question is asked of every picture.
QUESTIONS = (
    "what color is the circle?",
    "how many squares are there?",
    "what is to the left of the triangle?",
    "describe the image.",
)


def find_config(shape: str, tiles: int = 1) -> VLMConfig:
    """Return the config of scenes, 222m, 256m, 460m or tiny, with a tokenizer that is trained here.

    A picture is one tile, or with `tiles` a side a grid of them and one of the whole.
    """
    config = SMOLVLM_256M if shape == "256m" else SHAPES[shape]
    edge = config.tile_size * tiles
    return dataclasses.replace(
        config,
        tiling=TilingConfig(policy="idefics3", longest_edge=edge),
        pad_token_id=0,
        image_token_id=1,
        eos_token_id=2,
        bos_token_id=None,
    )


def make_model(config: VLMConfig, dtype: torch.dtype) -> tuple[VLM, Processor]:
    """Make a model with random weights whose answers depend on picture and question, and never end.

    Blocks add as much as the residual stream has, or a tied head would repeat the last token. The logits of what no
    answer has, for some sides would have, are 0, below the largest of the others.
    """
    markers = marker_tokens(config)
    size = min(config.decoder.vocab_size, 512 + len(markers))
    processor = Processor(train_tokenizer(sample_texts(Scenes("train"), 200), size, markers), CHAT_TEMPLATE, config)
    torch.manual_seed(0)
    model = VLM(config).eval()
    with torch.no_grad():
        for layer in model.decoder.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight *= 4
        head = model.decoder.embed_tokens if config.decoder.tie_word_embeddings else model.decoder.lm_head
        head.weight[[config.eos_token_id, config.pad_token_id, config.image_token_id]] = 0
    return model.to(dtype), processor


def make_picture(number: int, size: int) -> Image.Image:
    """Draw colored spots that no other number gives."""
    generator = torch.Generator().manual_seed(number)
    spots = torch.rand(1, 3, 8, 8, generator=generator)
    pixels = F.interpolate(spots, (size, size), mode="bilinear").mul(255).byte()[0]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def write_prompt(folder: Path, processor: Processor, picture: Image.Image, name: str, turns: list[str]) -> dict:
    """Write a picture and its tiles; return a prompt about it as the sides read it. The user has every other turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    document = processor.prompt(messages, [picture])
    if not (folder / f"{name}.pt").exists():
        picture.save(folder / f"{name}.png")
        torch.save(document.tiles, folder / f"{name}.pt")
    return {"ids": document.input_ids.tolist(), "pictures": [name], "question": turns[-1]}


def write_job(folder: Path, model: VLM, processor: Processor, prompts: list[dict], job: dict, exports: bool = False):
    """Write what engine_sides.py reads."""
    save_model(folder / "model", model, processor)
    if exports:
        export.export(folder / "model", folder / "hub")
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "job.json").write_text(json.dumps({"model": str(folder / "model")} | job))


def make_document(processor: Processor, picture: int, size: int, question: str) -> Document:
    return processor.prompt([{"role": "user", "content": question}], [make_picture(picture, size)])


def write_gguf(folder: Path, kind: str) -> Path:
    """Write SmolLM2-135M-Instruct with matrices in Q8_0 or Q4_0, the embeddings in Q8_0; return the file."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import dequantize, quantize

    reader, path = GGUFReader(find_smollm2()), folder / f"{kind}.gguf"
    writer = GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), *field.types[:2])
    for tensor in reader.tensors:
        to = GGMLQuantizationType["Q8_0" if tensor.name == "token_embd.weight" else kind]
        to = GGMLQuantizationType.F32 if len(tensor.shape) == 1 else to
        weight = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, quantize(weight, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
