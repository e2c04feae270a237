"""Compare an exported folder with the model it was made from, and list what other programs may read differently."""

import importlib.util
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.tokenizer import SPECIAL_TOKENS
from nanovlm.errors import UserError
from nanovlm.hub.engines import find_faults, find_seen
from nanovlm.hub.families import IMAGE
from nanovlm.hub.read import load
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM
from nanovlm.tensor_files import merge_numbers

CONTENT_TYPE = "the chat template writes another text beside an image than beside the marker that llama.cpp sets"


def check(folder: Path, model: VLM):
    """Compare an exported folder with its model and, if installed, with transformers; print results and known traps.

    Raises UserError if a tensor differs from the model's in any bit, or transformers gives other tokens or logits.
    """
    written, _ = load(folder)
    tensors, expected = written.state_dict(), model.state_dict()
    different = [
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected or name not in tensors or not _same_bits(expected[name], tensors[name])
    ]
    if different:
        raise UserError(f"{folder} differs from the model in {', '.join(merge_numbers(different))}")
    print(f"{len(tensors)} tensors are equal bit for bit")
    del written, tensors
    ours, processor = load(folder, dtype=torch.float32)
    print(f"seen with this layout: {'; '.join(f'{engine} {v}' for engine, v in find_seen(model.config).items())}")
    for trap in find_traps(processor, next(model.parameters()).dtype):
        print(f"note: {trap}")
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: nothing was compared with it")
        return
    for line in compare_with_transformers(folder, ours, processor):
        print(line)


def find_traps(processor: Processor, dtype: torch.dtype = torch.float32) -> list[str]:
    """List what some other programs refuse or read differently; export.py rejects or avoids what all would."""
    config, tokenizer = processor.config, processor.tokenizer
    traps = [f"{engine}: {why}" for engine, why in find_faults(config, dtype)]
    if [tokenizer.id_to_token(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS):
        traps.append(
            "llama.cpp's converter knows tokenizers by a hash, and not one made here: export with --format gguf instead"
        )
    if config.vision is None:
        return traps
    if len(tokenizer.encode("\n\n", add_special_tokens=False).ids) != 1:
        traps.append('llama.cpp looks up the token "\\n\\n", which the tokenizer does not have')
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    plain = [token for token in marker_tokens(config) if token not in added]
    if plain:
        traps.append(f"the tokenizer has no tokens for {', '.join(plain)}: they are several tokens of plain text")
    if _depends_on_content_type(processor):
        traps.append(CONTENT_TYPE)
    return traps


def find_llama_cpp_traps(processor: Processor) -> list[str]:
    """List what llama.cpp reads differently in GGUF files that are written here."""
    faults = find_faults(processor.config, torch.float32)
    traps = [f"{engine}: {why}" for engine, why in faults if engine == "llama.cpp"]
    sees = processor.config.vision is not None
    return traps + ([CONTENT_TYPE] if sees and _depends_on_content_type(processor) else [])


def _depends_on_content_type(processor):
    """Return whether the template writes an image part differently from a text part that holds the image token."""
    texts = set()
    for first in ({"type": "image"}, {"type": "text", "text": IMAGE}):
        messages = [{"role": "user", "content": [first, {"type": "text", "text": "?"}]}]
        tokens = {
            f"{name}_token": processor.tokenizer.id_to_token(i)
            for name, i in (("bos", processor.config.bos_token_id), ("eos", processor.config.eos_token_id))
            if i is not None
        }
        texts.add(processor.template.render(messages=messages, add_generation_prompt=True, **tokens))
    return len(texts) > 1


@torch.no_grad()
def compare_with_transformers(folder: Path, ours: VLM, processor: Processor) -> list[str]:
    """Run the same prompts through transformers and our model, both in fp32; return a line on each comparison.

    Raises UserError if tensors are missing or do not fit, token ids differ, or logits by over 1e-4 of the largest.
    """
    import transformers

    sees = ours.config.vision is not None
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    theirs, loading = auto.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        folder, dtype=torch.float32, output_loading_info=True
    )
    if wrong := {kind: sorted(keys) for kind, keys in loading.items() if keys}:
        raise UserError(f"transformers does not find its tensors in {folder}: {wrong}")
    their_processor = (transformers.AutoProcessor if sees else transformers.AutoTokenizer).from_pretrained(folder)
    lines = []
    for width, height in ((128, 80), (60, 60), (40, 100)) if sees else ((0, 0),):
        images = [_gradient(width, height)] if sees else []
        content = [{"type": "image", "image": image} for image in images]
        question = {"type": "text", "text": "What is in this image, 1 or 2 things?"}
        batch = processor([{"role": "user", "content": [question]}], images)
        if their_processor.chat_template is None:
            inputs = their_processor(question["text"], add_special_tokens=False, return_tensors="pt")
        else:
            messages = [{"role": "user", "content": [*content, question] if sees else question["text"]}]
            inputs = their_processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        what = f"an image of {width} x {height}" if sees else "a question"
        if inputs["input_ids"].tolist() != batch.input_ids.tolist():
            raise UserError(
                f"transformers gives {what} the tokens {inputs['input_ids'].tolist()[0]}, not "
                f"{batch.input_ids.tolist()[0]}"
            )
        ours_logits, their_logits = ours.logits(batch), theirs(**inputs).logits
        difference = (ours_logits - their_logits).abs().max() / their_logits.abs().max()
        line = f"{what}: {batch.input_ids.shape[1]} equal tokens, "
        if sees:
            pixels = (inputs["pixel_values"].flatten(0, 1) - normalize(batch.pixel_values)).abs().max()
            line += f"{len(batch.pixel_values)} tiles whose pixels differ by at most {pixels:.1e}, "
        lines.append(line + f"logits that differ from transformers' by at most {difference:.1e} of the largest")
        if not difference <= 1e-4:
            raise UserError(lines[-1])
    return lines


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _gradient(width, height):
    """Return an image in which all pixels differ."""
    row, col = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return Image.fromarray(torch.stack((2 * row, col, row + col), -1).clamp(0, 255).to(torch.uint8).numpy())
