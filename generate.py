"""Ask a trained model about images.

    python generate.py --model runs/scenes/model --image cat.png --prompt "what color is the circle?"
    python generate.py --model runs/scenes/model --image a.png b.png --prompt "..." --temperature 0.7 --seed 1
    python generate.py --model runs/scenes/model --image a.png --prompt "first?" "second?"     one batch
    python generate.py --model runs/scenes/model --image a.png                                 a chat
    python generate.py --model smollm2 --prompt "What is the capital of France?"               text alone, no hub
    python generate.py --model runs/scenes/model --image a.png --prompt "..." --quantize int4  docs/quantization.md
    python generate.py --model runs/scenes/model --image a.png --prompt "..." --show-attention where.png

An image belongs to every prompt. With `--json` one JSON object is printed for each prompt.
"""

import sys

from nanovlm import cli

if __name__ == "__main__":
    cli.end_on_interrupt()

from nanovlm.command_line import GenerateConfig, parse_generate

if __name__ == "__main__":  # before the imports below, which take seconds
    CONFIG = cli.run(lambda: parse_generate(sys.argv[1:], __doc__).validate())

import contextlib
import json
import resource
import time
from dataclasses import replace

import torch

import nanovlm
from nanovlm.config import QuantizationConfig, SamplingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import open_image, place_tiles
from nanovlm.data.types import IGNORE, Document
from nanovlm.environment import find_device
from nanovlm.errors import UserError
from nanovlm.files import write_file
from nanovlm.infer.engine import Engine
from nanovlm.infer.look_sheet import MOST_TOKENS, draw_look
from nanovlm.infer.looking import look, split_text
from nanovlm.infer.request import Request, Token
from nanovlm.model.moe import expert_load
from nanovlm.model.quantized import quantize
from nanovlm.model.vlm import VLM, Extras


def main(config: GenerateConfig):
    """Answer the prompts, or chat. Raises UserError with one sentence for anything wrong with the input."""
    config.validate()
    images = [open_image(path) for path in config.image]
    dtype = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
    model, processor = nanovlm.load(config.model, find_device(config.device), dtype)
    if config.quantize != "none":
        quantize(model, QuantizationConfig(config.quantize))
    if config.show_routing and model.config.decoder.moe is None:
        raise UserError(f"--show-routing needs a mixture of experts, but {config.model} has none")
    if config.show_attention is not None:
        check_attention(config, model)
    if not config.prompt:
        return chat(model, processor, images, config.sampling)
    prompts = [processor.prompt([{"role": "user", "content": text}], images) for text in config.prompt]
    echo = len(prompts) == 1 and not config.json
    texts, numbers = answer(model, processor, prompts, config.sampling, echo)
    if config.show_routing:
        for prompt, text in zip(prompts, texts, strict=True):
            print(format_routing(model, processor, prompt, text))
    if config.show_attention is not None:
        write_file(config.show_attention, draw_attention(config, model, processor, images, prompts[0], texts[0]))
    if config.json:
        for prompt, text, (prompt_tokens, new_tokens) in zip(config.prompt, texts, numbers["tokens"], strict=True):
            shared = {key: value for key, value in numbers.items() if key != "tokens"}
            counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
            print(json.dumps({"prompt": prompt, "text": text, **counts, **shared}))
    elif not echo:
        for prompt, text in zip(config.prompt, texts, strict=True):
            print(f"{prompt}\n  {text}")


def answer(model: VLM, processor: Processor, prompts: list, config: SamplingConfig, echo: bool):
    """Generate an answer to each prompt document; return the texts and their token counts, speed and memory.

    With `echo` the text of the first prompt appears on the terminal as it is generated.
    """
    device = next(model.parameters()).device
    engine = Engine(model, num_rows=len(prompts))
    rows: list[list[int]] = [[] for _ in prompts]
    shown, first = "", 0.0
    start = time.perf_counter()
    numbers = [engine.submit(Request(prompt, config)) for prompt in prompts]
    while not engine.is_idle:
        for event in engine.step():
            first = first or time.perf_counter()
            if isinstance(event, Token):
                rows[numbers.index(event.request)].append(event.id)
        if echo:
            text = processor.decode(rows[0])
            # A character of several bytes may still be incomplete at the end.
            if not text.endswith("\ufffd"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
    end = time.perf_counter()
    texts = [processor.decode(row) for row in rows]
    if echo:
        print(texts[0][len(shown) :])
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    num_new = sum(len(row) for row in rows)
    speed = num_new / (end - start)
    return texts, {
        "tokens": [(len(prompt), len(row)) for prompt, row in zip(prompts, rows, strict=True)],
        "time_to_first_token_s": first - start,
        "tokens_per_second": speed,
        "peak_memory_bytes": peak,
        "tokens_per_second_per_gb": speed / (peak / 1e9),
    }


@torch.inference_mode()
def format_routing(model: VLM, processor: Processor, prompt: Document, text: str) -> str:
    """Lay out, in percent, which experts the image tokens, the question and the answer went to in each layer."""
    answer_ids = torch.tensor(processor.tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int64)
    ids = torch.cat((prompt.input_ids, answer_ids))
    fields = {"input_ids": ids, "labels": torch.full_like(ids, IGNORE), "branch_ids": torch.zeros_like(ids).int()}
    document = replace(prompt, **fields)
    batch, extras = processor.batch([document]).to(next(model.parameters()).device), Extras()
    model(batch, extras=extras)
    image_id = -1 if model.config.image_token_id is None else model.config.image_token_id
    is_image, index = (ids == image_id).to(batch.input_ids.device), torch.arange(len(ids))
    is_answer = (index >= len(prompt)).to(is_image)
    num_experts = model.config.decoder.moe.num_experts
    lines = ["expert".rjust(18) + "".join(f"{e:>5}" for e in range(num_experts))]
    for layer, routing in enumerate(extras.routing):
        for name, where in (("image", is_image), ("question", ~is_image & ~is_answer), ("answer", is_answer)):
            load = expert_load(routing.choice, where, num_experts)
            if load.sum() > 0:
                share = (100 * load / load.sum()).tolist()
                lines.append(f"layer {layer:<3}{name:>9}" + "".join(f"{x:5.0f}" for x in share))
    return "\n".join(lines)


def check_attention(config: GenerateConfig, model: VLM):
    """Raise UserError if the layer or the head to draw is not in the model."""
    counts = {"layer": model.config.decoder.num_hidden_layers, "head": model.config.decoder.num_attention_heads}
    for name, wanted in (("layer", config.attention_layer), ("head", config.attention_head)):
        if wanted is not None and not 0 <= wanted < counts[name]:
            raise UserError(f"--attention-{name} {wanted} is not in {config.model}: it has 0 to {counts[name] - 1}")


def draw_attention(
    config: GenerateConfig, model: VLM, processor: Processor, images: list, prompt: Document, text: str
) -> bytes:
    """Draw where the first tokens of an answer looked, as a PNG file."""
    answer_ids = processor.encode_answer(text)
    shown = answer_ids[:MOST_TOKENS]
    weights, names = look(model, prompt, shown).to_images, []
    for axis, name, number in ((0, "layer", config.attention_layer), (1, "head", config.attention_head)):
        names.append(f"all {name}s" if number is None else f"{name} {number}")
        weights = weights.mean(axis, keepdim=True) if number is None else weights.narrow(axis, number, 1)
    about = f"attention of {' and '.join(names)}"
    if len(shown) < len(answer_ids):
        about += f", the first {len(shown)} tokens of {len(answer_ids)}"
    places = [place_tiles(*image.size, model.config) for image in images]
    titles = [config.prompt[0], text, f"({about})"]
    return draw_look(images, places, weights[0, 0], split_text(shown, processor), titles)


def chat(model: VLM, processor: Processor, images: list, config: SamplingConfig):
    """Talk until the input ends; the conversation so far is part of every prompt. Ctrl-C stops an answer alone."""
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401, lets `input` edit lines and recall earlier ones
    about = "Ask" if processor.config.vision is None else "Ask about the image. /image FILE shows another one"
    print(f"{about}. /new forgets the conversation, /exit leaves.")
    messages, pending = [], list(images)
    shown = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/exit leaves.")
            continue
        if line == "/exit":
            return
        if line == "/new":
            messages, pending, shown = [], list(images), []
            continue
        try:
            if line.startswith("/image "):
                pending.append(open_image(line.removeprefix("/image ").strip()))
                continue
            if line.startswith("/"):
                raise UserError(f"there is no command {line!r}; there are /image FILE, /new and /exit")
            content = [{"type": "image"} for _ in pending] + [{"type": "text", "text": line}]
            asked = [*messages, {"role": "user", "content": content}]
            prompt = processor.prompt(asked, shown + pending)
            text = answer(model, processor, [prompt], config, echo=True)[0][0]
        except ValueError as error:
            print(error)
            continue
        except KeyboardInterrupt:
            print("\nstopped; the question and its answer are forgotten.")
            continue
        messages, shown, pending = [*asked, {"role": "assistant", "content": text}], shown + pending, []


if __name__ == "__main__":
    cli.run(lambda: main(CONFIG))
