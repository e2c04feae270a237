"""Answers of models of real shapes with random weights: prefill, and tokens a second with the cache and of generate().

    python benchmarks/decode.py                           222m and 460m; on a GPU with torch's attention and the kernels
    python benchmarks/decode.py --shapes tiny             does all of it run? nothing is written

Weights have the precision of a run on the device. The logits after the last token are checked first, against one
forward pass over the whole rows: in fp32 they may be off by 1e-4 of the largest, in bf16 by twice what that forward
pass itself is off from the same in fp32. Appends lines to benchmarks/results/decode.jsonl.
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
from nanovlm.data.types import IGNORE, Batch, Row
from nanovlm.environment import choose_precision, choose_threads, describe_environment, find_device
from nanovlm.infer.sampling import decode_one_token, prefill, stream
from nanovlm.model.kv_cache import KVCache
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
            model = copy.deepcopy(exact).bfloat16() if precision == "bf16" else exact
            for size in config.batch_sizes:
                batch = make_prompts(model.config, size, config.text_tokens).to(device)
                line = {"shape": shape, "backends": backends}
                line |= time_decoding(model, exact, batch, config.new_tokens, config.repeats)
                line["generated_per_second"] = time_generating(model, batch, config)
                print(json.dumps(environment | line), flush=True)
                if shape != "tiny":
                    with open(RESULTS, "a") as file:
                        file.write(json.dumps(environment | line) + "\n")


def make_prompts(config: VLMConfig, num: int, num_text: int) -> Batch:
    """Make prompts of an image and random text, all of one length."""
    generator = torch.Generator().manual_seed(0)
    size, length, rows = config.vision.image_size, config.num_image_tokens + num_text, []
    for _ in range(num):
        text = torch.randint(8, 500, (num_text,), generator=generator).tolist()  # special tokens lie outside
        rows.append(
            Row(
                input_ids=torch.tensor([config.image_token_id] * config.num_image_tokens + text),
                labels=torch.full((length,), IGNORE),
                doc_ids=torch.zeros(length, dtype=torch.int32),
                branch_ids=torch.zeros(length, dtype=torch.int32),
                position_ids=torch.arange(length),
                tiles=torch.randint(0, 256, (1, 3, size, size), generator=generator, dtype=torch.uint8),
                tile_doc_ids=torch.zeros(1, dtype=torch.int32),
            )
        )
    return collate(rows)


@torch.inference_mode()
def time_decoding(model: VLM, exact: VLM, batch: Batch, new_tokens: int, repeats: int) -> dict:
    """Time prefill and decode_one_token over a static cache; `exact` is the same model in fp32."""
    (num, length), device = batch.input_ids.shape, batch.input_ids.device
    dtype = model.decoder.embed_tokens.weight.dtype

    def decode():
        cache = KVCache(model.config.decoder, num, length + new_tokens, device, dtype)
        synchronize(device)
        begin = time.perf_counter()
        logits = prefill(model, batch, cache)
        synchronize(device)
        middle = time.perf_counter()
        tokens = []
        for _ in range(new_tokens):
            tokens.append(logits.argmax(-1).clamp(min=6))  # 6: behind the special tokens
            logits = decode_one_token(model, tokens[-1], cache)
        synchronize(device)
        return middle - begin, time.perf_counter() - middle, tokens, logits

    _, _, tokens, logits = decode()
    check(model, exact, batch, torch.stack(tokens, dim=1), logits)
    prefills, decodes, _, _ = zip(*(decode() for _ in range(repeats)), strict=True)
    return {
        "batch_size": num,
        "prompt_tokens": length,
        "new_tokens": new_tokens,
        "prefill_ms": round(1e3 * statistics.median(prefills), 2),
        "token_ms": round(1e3 * statistics.median(decodes) / new_tokens, 3),
        "tokens_per_second": round(num * new_tokens / statistics.median(decodes)),
    }


def check(model: VLM, exact: VLM, batch: Batch, tokens: Tensor, logits: Tensor):
    """Exit where the last logits differ from those of one forward pass over the whole rows by more than they may."""
    grown = torch.cat([batch.input_ids, tokens], dim=1)
    whole = dataclasses.replace(
        batch,
        input_ids=grown,
        doc_ids=batch.doc_ids[:, :1].expand_as(grown),
        branch_ids=batch.branch_ids[:, :1].expand_as(grown),
        position_ids=torch.arange(grown.shape[1], device=grown.device).expand_as(grown),
    )
    expected, ours = (x.head(x(whole)[:, -1]).float() for x in (exact, model))
    error = ((logits.float() - expected).abs().max() / expected.abs().max()).item()
    bound = 1e-4
    if model is not exact:
        bound = 2 * ((ours - expected).abs().max() / expected.abs().max()).item() + torch.finfo(logits.dtype).eps
    if not error <= bound:
        raise SystemExit(f"error: decoding is wrong by {error:.1e} relative, above {bound:.1e}: it is not timed")


def time_generating(model: VLM, batch: Batch, config: DecodeConfig) -> int:
    """Return how many tokens a second nanovlm.generate yields, prompts included in the time."""
    seconds = []
    for _ in range(1 + config.repeats):
        synchronize(batch.input_ids.device)
        start = time.perf_counter()
        num = sum(len(tokens) for tokens in stream(model, batch, SamplingConfig(max_new_tokens=config.new_tokens)))
        synchronize(batch.input_ids.device)
        seconds.append((time.perf_counter() - start) / num)
    return round(1 / statistics.median(seconds[1:]))


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    cli.run(lambda: main(arguments.read(DecodeConfig, __doc__)))
