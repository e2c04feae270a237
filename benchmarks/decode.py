"""Answers of models of real shapes with random weights: prefill, and tokens a second of the engine and of generate().

    python benchmarks/decode.py                           222m and 460m; on a GPU with torch's attention and the kernels
    python benchmarks/decode.py --shapes tiny             does all of it run? nothing is written

Weights have the precision of a run on the device. What the engine chose is checked first, against one forward pass over
the whole rows: in fp32 the logit of every token may be below the largest by 1e-4 of it, in bf16 by four times what that
forward pass itself is off from the same in fp32. Appends lines to benchmarks/results/decode.jsonl. benchmarks/engine.py
compares the engine with others.
"""

import copy
import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import arguments
from nanovlm import cli
from nanovlm.config import SamplingConfig, VLMConfig
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.types import IGNORE, Document
from nanovlm.environment import choose_precision, choose_threads, describe_environment, find_device
from nanovlm.infer.answers import generate
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request, Token
from nanovlm.infer.sampling import find_never
from nanovlm.model.cache_attention import BLOCK
from nanovlm.model.inference import prepare
from nanovlm.model.vlm import VLM

RESULTS = Path(__file__).resolve().parent / "results" / "decode.jsonl"


@dataclass(frozen=True)
class DecodeConfig:
    # Keys of SHAPES of benchmarks/train.py.
    shapes: tuple[str, ...] = ("222m", "460m")
    # Keys of BACKENDS of benchmarks/train.py; none for all that the device has.
    backends: tuple[str, ...] = ()
    # Prompts decoded together, one line each.
    batch_sizes: tuple[int, ...] = (1, 32)
    # Tokens of text in a prompt, beside an image.
    text_tokens: int = 64
    new_tokens: int = 64
    # Timed decodings; the medians count.
    repeats: int = 5


def main(config: DecodeConfig):
    from benchmarks.train import BACKENDS, SHAPES, interpret_kernels, with_backends

    device = find_device("auto")
    precision = choose_precision(device) if device.type == "cuda" else "fp32"
    torch.set_num_threads(choose_threads(device))
    environment = describe_environment(device, torch.get_num_threads(), precision)
    for shape in config.shapes:
        for backends in config.backends or (BACKENDS if device.type == "cuda" else ("torch",)):
            if backends == "kernels" and device.type == "cpu":
                interpret_kernels()
            torch.manual_seed(0)
            exact = VLM(with_backends(SHAPES[shape], backends)).to(device).eval()
            model = prepare(copy.deepcopy(exact).to(torch.bfloat16 if precision == "bf16" else torch.float32))
            for size in config.batch_sizes:
                prompts = make_prompts(model.config, size, config.text_tokens)
                line = {"shape": shape, "backends": backends}
                line |= time_decoding(model, exact, prompts, config.new_tokens, config.repeats)
                line["generated_per_second"] = time_generating(model, prompts, config)
                print(json.dumps(environment | line), flush=True)
                if shape != "tiny":
                    with open(RESULTS, "a") as file:
                        file.write(json.dumps(environment | line) + "\n")


def make_prompts(config: VLMConfig, num: int, num_text: int) -> list[Document]:
    """Make prompts of an image and random text, all of one length."""
    generator = torch.Generator().manual_seed(0)
    size, length, prompts = config.vision.image_size, config.num_image_tokens + num_text, []
    for _ in range(num):
        text = torch.randint(8, 500, (num_text,), generator=generator).tolist()  # special tokens lie outside
        prompts.append(
            Document(
                input_ids=torch.tensor([config.image_token_id] * config.num_image_tokens + text),
                labels=torch.full((length,), IGNORE),
                branch_ids=torch.zeros(length, dtype=torch.int32),
                tiles=torch.randint(0, 256, (1, 3, size, size), generator=generator, dtype=torch.uint8),
            )
        )
    return prompts


def time_decoding(model: VLM, exact: VLM, prompts: list[Document], new_tokens: int, repeats: int) -> dict:
    """Time the engine until all prompts have their first token, and from there on; `exact` is the model in fp32."""
    num, device = len(prompts), model.decoder.embed_tokens.weight.device
    length = max(map(len, prompts))

    def decode():
        cache_tokens, config = num * (length + new_tokens + BLOCK), SamplingConfig(max_new_tokens=new_tokens)
        engine = Engine(model, num_rows=num, cache_tokens=cache_tokens, chunk=num * length, keeps_prefixes=False)
        engine.stops = []  # answers are of one length
        answers = {engine.submit(Request(prompt, config)): [] for prompt in prompts}
        synchronize(device)
        begin = middle = time.perf_counter()
        num_first = 0
        while not engine.is_idle:
            for event in engine.step():
                if isinstance(event, Token):
                    answers[event.request].append(event.id)
            if not num_first and all(answers.values()):
                synchronize(device)
                middle, num_first = time.perf_counter(), sum(map(len, answers.values()))
        rate = (num * new_tokens - num_first) / (time.perf_counter() - middle)
        return middle - begin, rate, list(answers.values())

    check(model, exact, prompts, decode()[2])
    prefills, rates, _ = zip(*(decode() for _ in range(repeats)), strict=True)
    return {
        "batch_size": num,
        "prompt_tokens": length,
        "new_tokens": new_tokens,
        "prefill_ms": round(1e3 * statistics.median(prefills), 2),
        "token_ms": round(1e3 * num / statistics.median(rates), 3),
        "tokens_per_second": round(statistics.median(rates)),
    }


def check(model: VLM, exact: VLM, prompts: list[Document], answers: list[list[int]]):
    """Exit where a token was chosen that is not among the likeliest, as far as the precision goes."""
    is_fp32 = model.decoder.embed_tokens.weight.dtype == torch.float32
    for prompt, tokens in zip(prompts, answers, strict=True):
        expected, found = (last_logits(x, prompt, tokens)[:-1] for x in (exact, model))
        largest = expected.abs().max()
        bound = 1e-4 if is_fp32 else (4 * (found - expected).abs().max() / largest).item()
        chosen = expected.gather(-1, torch.tensor(tokens, device=expected.device)[:, None])[:, 0]
        gap = ((expected.amax(-1) - chosen).max() / largest).item()
        if not gap <= bound:
            raise SystemExit(f"error: decoding is wrong by {gap:.1e} relative, above {bound:.1e}: it is not timed")


@torch.inference_mode()
def last_logits(model: VLM, prompt: Document, tokens: list[int]) -> Tensor:
    """Return the logits behind a prompt and behind each of some tokens, fp32[1 + k, V]: one pass, without a cache."""
    device = model.decoder.embed_tokens.weight.device
    ids = torch.cat((prompt.input_ids, torch.tensor(tokens, dtype=torch.int64)))
    branches = torch.zeros(len(ids), dtype=torch.int32)
    grown = dataclasses.replace(prompt, input_ids=ids, labels=torch.full_like(ids, IGNORE), branch_ids=branches)
    hidden = model(collate([make_row([grown], len(ids), model.config.pad_token_id)]).to(device))
    logits = model.head(hidden[0, len(prompt) - 1 :]).float()
    never = torch.tensor(find_never(model.config), dtype=torch.int64, device=device)
    return logits.index_fill(-1, never, logits.min().item())


def time_generating(model: VLM, prompts: list[Document], config: DecodeConfig) -> int:
    """Return how many tokens a second nanovlm.generate gives, prompts included in the time."""
    length, pad = max(map(len, prompts)), model.config.pad_token_id
    batch = collate([make_row([prompt], length, pad) for prompt in prompts])
    batch = batch.to(model.decoder.embed_tokens.weight.device)
    seconds = []
    for _ in range(1 + config.repeats):
        start = time.perf_counter()
        num = sum(map(len, generate(model, batch, max_new_tokens=config.new_tokens)))
        seconds.append((time.perf_counter() - start) / max(num, 1))
    return round(1 / statistics.median(seconds[1:]))


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    cli.run(lambda: main(arguments.read(DecodeConfig, __doc__)))
