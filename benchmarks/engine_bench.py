"""A model and prompts in a folder, the sides of engine_sides.py that read it, and whether their answers are right."""

import copy
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from benchmarks import turns
from benchmarks.decode import last_logits
from benchmarks.engine_jobs import QUESTIONS, find_config, make_model, make_picture, write_job, write_prompt
from benchmarks.engine_sides import read_prompts
from nanovlm.config import QuantizationConfig
from nanovlm.data.chat import Processor
from nanovlm.model.quantized import quantize
from nanovlm.model.vlm import VLM

SIDES = Path(__file__).resolve().parent / "engine_sides.py"
BATCH = 16  # prompts of those that answer in batches


class Bench:
    """A model in one format and prompts, in a folder that the sides read, and the same computed in fp32."""

    def __init__(self, folder: Path, before: str, shape: str, format: str, rows: int = 64, repeats: int = 3, python=""):
        """`before` is the checkout of a commit without an engine, `python` an interpreter that has vLLM."""
        self.folder, self.before, self.shape, self.format = folder, before, shape, format
        self.rows, self.repeats, self.python = rows, repeats, python

    def prepare(self, exact: VLM, processor: Processor, prompts: list[dict], exports: bool = False, **job):
        """Write what the sides read, also in the hub's layout if one of them needs it; `job` is for some of them."""
        self.exact, self.timed = make_format(exact, self.format)
        job |= {"threads": torch.get_num_threads(), "batch": BATCH, "engine": {"num_rows": self.rows}}
        job |= {"dtype": "float32" if self.format == "fp32" else "bfloat16"}
        write_job(self.folder, self.timed, processor, prompts, job, exports)
        self.prompts = read_prompts(self.folder)

    def prepare_questions(self, num_pictures: int, **options) -> list[list[int]]:
        """Ask all questions about each picture; return requests of answers of 1 to as many tokens as prompts, mixed."""
        config = find_config(self.shape)
        exact, processor = make_model(config, torch.float32)
        prompts = [
            write_prompt(self.folder, processor, make_picture(number, config.tile_size), f"picture{number}", [question])
            for number in range(num_pictures)
            for question in QUESTIONS
        ]
        self.prepare(exact, processor, prompts, **options)
        lengths = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)) + 1
        return [[i, num] for i, num in enumerate(lengths.tolist())]

    def prepare_chat(self):
        """Ask two questions, one after the other, about a picture twice as large as a tile, which is enlarged to 16."""
        config = find_config(self.shape, tiles=4)
        exact, processor = make_model(config, torch.float32)
        picture, texts = make_picture(0, 2 * config.tile_size), [QUESTIONS[0], "a red one.", QUESTIONS[1]]
        prompts = [write_prompt(self.folder, processor, picture, "picture", texts[:num]) for num in (1, 3)]
        self.prepare(exact, processor, prompts)

    def time(
        self, sides: Sequence[str], warm_up: Sequence, timed: Sequence, check: Callable | None = None
    ) -> list[dict]:
        """Let the sides answer requests by turns; return what the timed turns measured. Exits where one is wrong."""
        lines = [{"requests": requests} for requests in (*warm_up, *timed)]
        results = self.take_turns(sides, lines)
        for number in (0, len(warm_up)):
            (check or Bench.check)(self, lines[number]["requests"], results[number])
        return results[len(warm_up) :]

    def take_turns(self, sides: Sequence[str], lines: Sequence[dict]) -> list[dict[str, dict]]:
        """Let the sides answer each line, one after the other; return what each turn measured, by side."""
        return turns.alternate({side: self.command(side) for side in sides}, [json.dumps(line) for line in lines])

    def command(self, side: str) -> list[str]:
        python = self.python if side == "vLLM" else sys.executable
        tree = self.before if side == "before" else str(turns.ROOT)
        return [python, str(SIDES), side, str(self.folder), tree]

    def check(self, requests, turn: dict[str, dict]):
        """Note the share of a side's answers that are ours to the letter. Exits where one is wrong."""
        bound = self.find_bound()
        for side, result in turn.items():
            same, end = 0, self.exact.config.eos_token_id
            for (i, num), *both in zip(requests, turn["engine"]["answers"], result["answers"], strict=True):
                # The token that ends an answer is none of it, but it was chosen.
                ours, theirs = (tokens + [end] * (len(tokens) < num) for tokens in both)
                if ours == theirs:
                    same += 1
                    continue
                first = next(j for j, (a, b) in enumerate(itertools.zip_longest(ours, theirs)) if a != b)
                if first >= min(len(ours), len(theirs)):
                    sys.exit(f"error: {side} gives {len(theirs)} tokens, {num} were asked for: not timed")
                logits = last_logits(self.exact, self.prompts[i], ours[:first])[-1]
                gap = (logits.max() - logits[[ours[first], theirs[first]]].min()) / logits.abs().max()
                if gap > bound:
                    sys.exit(
                        f"error: {side} answers prompt {i} otherwise at token {first}, where the choice is clear by "
                        f"{gap:.1e} of the largest logit, above {bound:.1e}: not timed"
                    )
            result["equal"] = round(same / len(requests), 3)

    def check_before(self, requests):
        """Exit where the engine answers otherwise than generate() did before it."""
        self.check(requests, self.take_turns(("engine", "before"), [{"requests": requests}])[0])

    def find_bound(self) -> float:
        """Return how far apart, of the largest logit, two tokens may be of which one side chooses this, one that.

        Each may be off by twice what one pass in bf16 is off from the same weights in fp32, and in fp32 by 5e-5.
        """
        if self.format == "fp32":
            return 1e-4
        errors = []
        for prompt in self.prompts[:8]:
            expected, found = (last_logits(model, prompt, [])[-1] for model in (self.exact, self.timed))
            errors.append(((found - expected).abs().max() / expected.abs().max()).item())
        return 4 * max(errors)


def is_alike(bench: Bench, requests, turn: dict[str, dict]):
    """Exit where answers differ in likelihood, under the weights in fp32, by more than a nat a token."""
    means, (prompt,), ((_, num),) = {}, bench.prompts, requests
    for side, result in turn.items():
        (answer,) = result["answers"]
        if len(answer) != num:
            sys.exit(f"error: {side} gives {len(answer)} tokens, {num} were asked for: not timed")
        logprobs = last_logits(bench.exact, prompt, answer)[:-1].log_softmax(-1)
        means[side] = logprobs.gather(-1, torch.tensor(answer)[:, None]).mean().item()
        result["equal"] = float(answer == turn["engine"]["answers"][0])
    if max(means.values()) - min(means.values()) > 1:
        sys.exit(f"error: mean log-probabilities of the answers are {means}: not timed")


def make_format(model: VLM, format: str) -> tuple[VLM, VLM]:
    """Return a model in fp32 and the same as it is timed: fp32 or bf16, for a quantised one that of all else."""
    if format == "fp32":
        return model, model
    exact = model if format == "bf16" else quantize(copy.deepcopy(model), QuantizationConfig(format), search=False)
    return exact, copy.deepcopy(exact).bfloat16()


def decoding_rate(result: dict) -> float:
    """Return the tokens a second of one answer after its first."""
    return (len(result["answers"][0]) - 1) / (result["seconds"] - result["firsts"][0])


def compare(timed: list[dict[str, dict]], peer: str, unit: str, rate: Callable[[dict], float], ours="engine") -> dict:
    """Return the medians of what a side of ours and a peer do a second, and the spread of the ratios of a turn."""
    pairs = [(rate(turn[ours]), rate(turn[peer])) for turn in timed]
    return {
        "unit": unit,
        "per_second": median(ours for ours, _ in pairs),
        "peer": peer,
        "peer_per_second": median(theirs for _, theirs in pairs),
        **spread([ours / theirs for ours, theirs in pairs]),
        "equal": min(timed[0][ours]["equal"], timed[0][peer]["equal"]),
    }


def spread(ratios: Sequence[float]) -> dict:
    return {
        "ratio": median(ratios),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
        "turns": len(ratios),
    }


def median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)
