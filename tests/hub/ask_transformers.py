"""Folder and prompts -> greedy answers of transformers to each prompt alone and to all at once, as JSON.

    python tests/hub/ask_transformers.py FOLDER PROMPTS.json
    python tests/hub/ask_transformers.py             which grids of patches have no positions of their own, by dtype

Imports nothing of ours, so that an environment with another version of transformers can run it.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image

NEW_TOKENS = 24


@torch.inference_mode()
def ask(folder: Path, prompts: list[dict], repaired: bool = False) -> dict:
    """Answer prompts, each `{"text", "images"}` with paths of images, with the classes chosen for the folder.

    Returns `{"inputs", "alone", "together"}`: the names of the inputs, and the tokens of every answer. `repaired` gives
    every patch its own position, which some versions do not (huggingface/transformers#41190).
    """
    sees = any(prompt["images"] for prompt in prompts)
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    processor = (transformers.AutoProcessor if sees else transformers.AutoTokenizer).from_pretrained(folder)
    model = auto.from_pretrained(folder).eval()
    end = model.generation_config.eos_token_id
    if repaired:
        patches = model.model.vision_model.embeddings
        patches.forward = lambda pixel_values, patch_attention_mask: (
            patches.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + patches.position_embedding.weight
        )

    def answer(some):
        texts = []
        for prompt in some:
            content = [{"type": "image"} for _ in prompt["images"]] + [{"type": "text", "text": prompt["text"]}]
            messages = [{"role": "user", "content": content if sees else prompt["text"]}]
            texts.append(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        images = {"images": [[Image.open(path) for path in prompt["images"]] for prompt in some]} if sees else {}
        inputs = processor(text=texts, padding=True, return_tensors="pt", **images)
        rows = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        rows = rows[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(end)] if end in row else row for row in rows], sorted(inputs)

    together, inputs = answer(prompts)
    return {"inputs": inputs, "alone": [answer([prompt])[0][0] for prompt in prompts], "together": together}


@torch.no_grad()
def grids_without_positions(dtype: str, largest: int = 128) -> list[int]:
    """List the numbers of patches a side for which Idefics3 does not give every patch its own position, in order."""
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    grids = []
    for n in range(2, largest + 1):
        config = Idefics3VisionConfig(hidden_size=2, num_attention_heads=1, image_size=n, patch_size=1)
        embeddings = Idefics3VisionEmbeddings(config).to(getattr(torch, dtype))
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        own = torch.stack((torch.arange(n * n) // n, torch.arange(n * n) % n), dim=1)
        embeddings.position_embedding.weight.copy_(own)  # so that what comes out is the row and the column
        pixels = torch.zeros(1, 3, n, n, dtype=getattr(torch, dtype))
        if not torch.equal(embeddings(pixels, torch.ones(1, n, n, dtype=torch.bool))[0].long(), own):
            grids.append(n)
    return grids


def main(folder: str = "", prompts: str = ""):
    """Print everything, with the version that said it."""
    result = {"version": transformers.__version__}
    if folder:
        questions = json.loads(Path(prompts).read_text())
        result["as it is"] = ask(Path(folder), questions)
        if any(question["images"] for question in questions):
            result["repaired"] = ask(Path(folder), questions, repaired=True)
    else:
        result["grids"] = {dtype: grids_without_positions(dtype) for dtype in ("float32", "bfloat16", "float16")}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
