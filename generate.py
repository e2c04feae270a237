"""Ask a trained model about images.

    python generate.py --model runs/scenes/model --image cat.png --prompt "what color is the circle?"
    python generate.py --model runs/scenes/model --image a.png b.png --prompt "..." --temperature 0.7 --seed 1
    python generate.py --model runs/scenes/model --image a.png --prompt "first?" "second?"     both at once
    python generate.py --model runs/scenes/model --image a.png --prompt "..." --num-answers 4 --temperature 1
    python generate.py --model runs/scenes/model --image a.png                                 a chat
    python generate.py --model smollm2 --prompt "What is the capital of France?"               text alone, no hub
    python generate.py --model runs/scenes/model --image a.png --prompt "..." --quantize int4  docs/quantization.md
    python generate.py --model runs/scenes/model --image a.png --prompt "..." --show-attention where.png
    python generate.py --model smolvlm-256m --adapter runs/mine/adapter --image a.png --prompt "..."   docs/hub.md
    python generate.py --model owner/large --image a.png --prompt "..." --draft owner/small     the same answer, sooner
    python generate.py --model smolvlm-256m --image a.png --prompt "..." --prune-image-tokens 0.5    fewer of its tokens
    python generate.py --model smolvlm2-256m --video cat.mp4 --prompt "what happens?"           frames with their times
    python generate.py --model runs/mine/model --image a.png --prompt "draw a box around ..." --draw boxes.png
    python generate.py --model smollm2 --prompt "..." --documents INDEX    answered from documents: docs/search.md

An image belongs to every prompt, and is encoded once. With `--json` one JSON object is printed for each answer.
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
import signal
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

import nanovlm
from nanovlm.config import QuantizationConfig, SamplingConfig
from nanovlm.data.boxes import draw_places, read_places
from nanovlm.data.chat import Processor
from nanovlm.data.images import open_image, place_tiles
from nanovlm.data.types import IGNORE, Document
from nanovlm.data.video import open_video
from nanovlm.environment import find_device, keep_freed_memory
from nanovlm.errors import UserError
from nanovlm.files import write_file
from nanovlm.hub.adapters import attach
from nanovlm.hub.draft import open_draft
from nanovlm.infer.adapters import settle
from nanovlm.infer.asking import ask
from nanovlm.infer.engine import Engine, suitable_cache
from nanovlm.infer.look_sheet import MOST_TOKENS, draw_look
from nanovlm.infer.looking import check_places, look, split_text
from nanovlm.infer.prune import answer_pruned
from nanovlm.infer.request import End, Request, Token, Usage
from nanovlm.infer.text import TextStream, after_thinking
from nanovlm.model.inference import prepare
from nanovlm.model.moe import expert_load
from nanovlm.model.quantized import quantize
from nanovlm.model.vlm import VLM, Extras
from nanovlm.search.documents import Documents, Passage, with_passages


def main(config: GenerateConfig):
    """Answer the prompts, or chat. Raises UserError with one sentence for anything wrong with the input."""
    config.validate()
    keep_freed_memory()
    images = [open_image(path) for path in config.image]
    clip = None if config.video is None else open_video(config.video, config.frames)
    if clip is not None:
        images = clip.images
    dtype = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
    model, processor = nanovlm.load(config.model, find_device(config.device), dtype)
    sources = find_sources(config, model, processor)  # while the weights are those that an index knows
    if config.quantize != "none":
        quantize(model, QuantizationConfig(config.quantize))
    if config.adapter:
        attach(model, config.adapter, base=config.model)
    adapter = settle(model)
    prepare(model, compiles=config.compile)
    if config.show_routing and model.config.decoder.moe is None:
        raise UserError(f"--show-routing needs a mixture of experts, but {config.model} has none")
    if config.show_attention is not None:
        check_attention(config, model)
    if images and model.config.vision is None:
        option = "--image" if clip is None else "--video"
        raise UserError(f"{config.model} is a language model, which sees no pictures: leave {option} out")
    if not config.prompt:
        return chat(lambda: open_engine(config, model, processor, 1), processor, images, config.sampling, adapter)
    asked = [ask_about(text, images, *found) for text, found in zip(config.prompt, sources, strict=True)]
    if clip is not None:
        asked = [([clip.part(), {"type": "text", "text": text}], images) for text in config.prompt]
    prompts = [processor.prompt([{"role": "user", "content": content}], shown) for content, shown in asked]
    if config.prune_image_tokens:
        for text, prompt in zip(config.prompt, prompts, strict=True):
            found = answer_pruned(model, prompt, config.prune_image_tokens, config.prune_after, config.sampling)
            print(*([text] if len(prompts) > 1 else []), harmless(processor.decode(found.ids)), sep="\n  ")
        return
    num_answers = len(prompts) * config.num_answers
    longest = max(map(len, prompts)) + config.sampling.max_new_tokens
    engine = open_engine(config, model, processor, min(config.num_rows, num_answers), longest)
    echo = num_answers == 1 and not config.json and config.documents is None
    requests = [Request(prompt, config.sampling, config.num_answers, adapter=adapter) for prompt in prompts]
    check_requests(engine, requests, config.prompt)
    start = time.perf_counter()
    said = answer(engine, processor, requests, echo)
    if config.documents is not None:
        said = [one._replace(text=after_thinking(one.ids, processor)) for one in said]
    shared = measure(engine, [one.end.usage for one in said], time.perf_counter() - start)
    for one in said:
        passages, _pictures = sources[one.request]
        if config.json:
            found = {"sources": [passage._asdict() for passage in passages]} if config.documents is not None else {}
            print(json.dumps({"prompt": config.prompt[one.request], **describe(one), **found, **shared}))
        elif not echo:
            print(*([config.prompt[one.request]] if one.answer == 0 else []), f"  {harmless(one.text)}", sep="\n")
            print(*(f"    [{i}] {passage.describe()}\n" for i, passage in enumerate(passages, start=1)), sep="", end="")
        if config.show_routing and one.end.reason != "error":
            print(format_routing(model, processor, prompts[one.request], one.ids))
    failed = [one for one in said if one.end.reason == "error"]
    if failed:
        causes = [f"to {config.prompt[one.request][:200]!r}: {one.end.message}" for one in failed]
        raise UserError(f"{len(failed)} of {len(said)} answers failed; {'; '.join(causes)}")
    if config.draw is not None:
        if not (places := read_places(said[0].text)):
            raise UserError(f"the answer names no box and no point, so {config.draw} is not written")
        write_file(config.draw, draw_places(images[0], places))
    if config.show_attention is not None:
        write_file(config.show_attention, draw_attention(config, model, processor, asked[0][1], prompts[0], said[0]))


def find_sources(config: GenerateConfig, model: VLM, processor: Processor) -> list[tuple[list[Passage], list]]:
    """Find the passages that each prompt is answered from, and read the pictures among them."""
    if config.documents is None:
        return [([], [])] * len(config.prompt)
    documents = Documents(config.documents, find_device(config.device), loaded=(model, processor))
    sees = model.config.vision is not None
    if not sees and documents.words is None:
        raise UserError(
            f"{config.documents} is an index of pictures, and {config.model} is a language model, which sees none: "
            "name a model that sees, or an index of documents"
        )
    found = [documents.find(text, config.num_passages, sees) for text in config.prompt]
    return [(some, [documents.open_picture(one) for one in some if one.is_picture]) for some in found]


def ask_about(
    question: str, images: list, passages: Sequence[Passage], pictures: list
) -> tuple[list[dict] | str, list]:
    """Return the content of a message that asks a question, and the images that it shows."""
    if not passages:
        return question, images
    return [*({"type": "image"} for _ in images), *with_passages(question, passages)], images + pictures


def open_engine(config: GenerateConfig, model: VLM, processor: Processor, num_rows: int, num_tokens: int = 0) -> Engine:
    """Return an engine for so many answers at a time, with room for one that has `num_tokens` tokens with its prompt.

    Raises UserError for a draft with another tokenizer.
    """
    draft = open_draft(config.draft, config.draft_tokens, model, processor)
    usual = suitable_cache(model.config.decoder, num_rows)
    needed = min(num_tokens, model.config.decoder.max_position_embeddings)
    room = config.cache_tokens or max(usual, needed)
    return Engine(model, num_rows, room, draft=draft, cache_format=config.cache_format)


def check_requests(engine: Engine, requests: list[Request], prompts: Sequence[str]):
    """Raise UserError that names a prompt which can never be answered."""
    for request, text in zip(requests, prompts, strict=True):
        try:
            engine.check(request)
        except UserError as error:
            raise UserError(f"--prompt {text[:200]!r}: {error}") from error


class Said(NamedTuple):
    """An answer: its prompt's index, its own among the answers to it, its text and tokens, and its end."""

    request: int
    answer: int
    text: str
    ids: list[int]
    end: End


def answer(engine: Engine, processor: Processor, requests: list[Request], echo: bool, stop=lambda: False) -> list[Said]:
    """Return the answers to the requests, in order; with `echo` texts appear on the terminal as they are made.

    As soon as `stop`, which is asked once a step, returns true, what has not ended is cancelled and left out. An answer
    that fails ends alone, as its end says.
    """
    texts = {(i, j): "" for i, request in enumerate(requests) for j in range(request.num_answers)}
    ids: dict[tuple[int, int], list[int]] = {key: [] for key in texts}
    streams = {key: TextStream(processor) for key in texts}
    ends: dict[tuple[int, int], End] = {}
    with contextlib.closing(ask(engine, requests)) as steps:
        for events in steps:
            for index, event in events:
                key = index, event.answer
                if isinstance(event, Token):
                    new = streams[key].add(event.id)
                    ids[key].append(event.id)
                else:
                    new, ends[key] = streams[key].end(), event
                texts[key] += new
                if echo:
                    print(harmless(new), end="" if isinstance(event, Token) else "\n", flush=True)
            if stop():
                break
    return [Said(*key, texts[key], ids[key], ends[key]) for key in texts if key in ends]


def harmless(text: str) -> str:
    """Write control characters, which would move the cursor or change the terminal, as \\x1b is written here."""
    return "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def describe(said: Said) -> dict:
    """Return what is an answer's own among the figures of --json."""
    usage = said.end.usage
    return {
        "answer": said.answer,
        "text": said.text,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "new_tokens": usage.new_tokens,
        "drafted_tokens": usage.drafted_tokens,
        "accepted_tokens": usage.accepted_tokens,
        "finish_reason": said.end.reason,
        "time_to_first_token_s": usage.first_token_s,
    }


def measure(engine: Engine, usages: list[Usage], seconds: float) -> dict:
    """Return speed and memory of the whole run; of several answers, percentiles of the times that each took."""
    if engine.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(engine.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    speed = sum(usage.new_tokens for usage in usages) / seconds
    figures = {
        "tokens_per_second": speed,
        "peak_memory_bytes": peak,
        "tokens_per_second_per_gb": speed / (peak / 1e9),
        "cache_bytes_per_token": engine.cache.bytes_per_token,
    }
    if len(usages) > 1:
        between = [(u.total_s - u.first_token_s) / (u.new_tokens - 1) for u in usages if u.new_tokens > 1]
        figures["time_to_first_token_s_percentiles"] = percentiles([u.first_token_s for u in usages if u.first_token_s])
        figures["time_per_token_s_percentiles"] = percentiles(between)
    return figures


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the 50th, 90th and 99th percentile; nothing of nothing."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99) if values}


@torch.inference_mode()
def format_routing(model: VLM, processor: Processor, prompt: Document, answer_ids: list[int]) -> str:
    """Lay out, in percent, which experts the image tokens, the question and the answer went to in each layer."""
    ids = torch.cat((prompt.input_ids, torch.tensor(answer_ids, dtype=torch.int64)))
    fields = {"input_ids": ids, "labels": torch.full_like(ids, IGNORE), "branch_ids": torch.zeros_like(ids).int()}
    document = replace(prompt, **fields)
    batch, extras = processor.batch([document]).to(next(model.parameters()).device), Extras()
    model(batch, extras=extras)
    image_id = -1 if model.config.image_token_id is None else model.config.image_token_id
    is_image, index = (ids == image_id).to(batch.input_ids.device), torch.arange(len(ids))
    is_answer = (index >= len(prompt)).to(is_image)
    num_experts = model.config.decoder.moe.num_experts
    lines = ["expert".rjust(18) + "".join(f"{e:>5}" for e in range(num_experts))]
    for layer, routing in zip(model.config.decoder.mixtures, extras.routing, strict=True):
        for name, where in (("image", is_image), ("question", ~is_image & ~is_answer), ("answer", is_answer)):
            load = expert_load(routing.choice, where, num_experts)
            if load.sum() > 0:
                share = (100 * load / load.sum()).tolist()
                lines.append(f"layer {layer:<3}{name:>9}" + "".join(f"{x:5.0f}" for x in share))
    return "\n".join(lines)


def check_attention(config: GenerateConfig, model: VLM):
    """Raise UserError if the layer or the head to draw is not in the model, or it looks at no places of a picture."""
    check_places(model.config)
    counts = {"layer": model.config.decoder.num_hidden_layers, "head": model.config.decoder.num_attention_heads}
    for name, wanted in (("layer", config.attention_layer), ("head", config.attention_head)):
        if wanted is not None and not 0 <= wanted < counts[name]:
            raise UserError(f"--attention-{name} {wanted} is not in {config.model}: it has 0 to {counts[name] - 1}")


def draw_attention(
    config: GenerateConfig, model: VLM, processor: Processor, images: list, prompt: Document, said: Said
) -> bytes:
    """Draw where the first tokens of an answer looked, as a PNG file. Raises UserError if it has none."""
    if not said.ids:
        raise UserError(f"the answer is empty, so {config.show_attention} is not written: there is nothing to draw")
    shown = said.ids[:MOST_TOKENS]
    is_mean = config.attention_layer is None and config.attention_head is None
    weights, names = look(model, prompt, shown, "layers" if is_mean else "none").to_images, []
    for axis, name, number in ((0, "layer", config.attention_layer), (1, "head", config.attention_head)):
        names.append(f"all {name}s" if number is None else f"{name} {number}")
        weights = weights.mean(axis, keepdim=True) if number is None else weights.narrow(axis, number, 1)
    about = f"attention of {' and '.join(names)}"
    if len(shown) < len(said.ids):
        about += f", the first {len(shown)} tokens of {len(said.ids)}"
    places = [place_tiles(*image.size, model.config) for image in images]
    titles = [config.prompt[0], said.text, f"({about})"]
    return draw_look(images, places, weights[0, 0], split_text(shown, processor), titles)


def chat(
    make_engine: Callable[[], Engine],
    processor: Processor,
    images: list,
    config: SamplingConfig,
    adapter: str | None = None,
):
    """Talk until the input ends; the conversation so far is part of every prompt. Ctrl-C stops an answer alone.

    One engine lasts for the whole conversation, so that a turn computes what is new in it: the cache has the rest.
    """
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401, lets `input` edit lines and recall earlier ones
    about = "Ask" if processor.config.vision is None else "Ask about the image. /image FILE shows another one"
    print(f"{about}. /new forgets the conversation, /exit leaves.")
    messages, pending = [], list(images)
    shown, engine = [], make_engine()
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            cli.interrupts.clear()
            print("\n/exit leaves.")
            continue
        if line == "/exit":
            return
        if line == "/new":
            messages, pending, shown = [], list(images), []
            continue
        try:
            if line.startswith("/image "):
                if processor.config.vision is None:
                    raise UserError("this is a language model, which sees no pictures")
                pending.append(open_image(line.removeprefix("/image ").strip()))
                continue
            if line.startswith("/"):
                raise UserError(f"there is no command {line!r}; there are /image FILE, /new and /exit")
            content = [{"type": "image"} for _ in pending] + [{"type": "text", "text": line}]
            asked = [*messages, {"role": "user", "content": content}]
            prompt = processor.prompt(asked, shown + pending)
            with cli.watch_signals(signal.SIGINT) as seen:
                said = answer(
                    engine, processor, [Request(prompt, config, adapter=adapter)], echo=True, stop=lambda: bool(seen)
                )
        except ValueError as error:
            print(error)
            continue
        except KeyboardInterrupt:  # the second one, perhaps in the middle of a step
            cli.interrupts.clear()
            said, engine = [], make_engine()
        if not said:
            print("\nstopped; the question and its answer are forgotten.")
            continue
        if said[0].end.reason == "error":
            print(said[0].end.message)
            continue
        messages, shown, pending = [*asked, {"role": "assistant", "content": said[0].text}], shown + pending, []


if __name__ == "__main__":
    cli.run(lambda: main(CONFIG))
