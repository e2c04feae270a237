"""What post-training costs: shared prefixes against pairs and groups written out, adapters against full tuning.

    python benchmarks/post.py preference    DPO: a pair on a shared prompt of 1,024 tokens, against two documents
    python benchmarks/post.py group         GRPO: 8 answers to such a prompt, against eight documents
    python benchmarks/post.py adapters      LoRA and QLoRA on the 222M shapes, against full tuning
    python benchmarks/post.py engine        four adapters in one batch, against one
    python benchmarks/post.py table         the table of docs/post_training.md, of the newest lines

Each side is a process of its own; they take steps by turns, so that a machine that others slow down does it to both.
Before anything is timed, losses and gradients of both sides are compared where they must be equal. Appends lines to
benchmarks/results/post.jsonl; docs/post_training.md has the table. Weights are random, prompts and answers too.
"""

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import arguments, pages
from benchmarks.engine_report import where
from benchmarks.memory import resident
from benchmarks.speed import append_lines
from benchmarks.train import SHAPES
from benchmarks.turns import WARM_UP, alternate, work
from nanovlm import cli
from nanovlm.config import (
    AdapterConfig,
    GroupConfig,
    InitConfig,
    OptimConfig,
    ParallelConfig,
    PreferenceConfig,
    SamplingConfig,
    TrainConfig,
    VLMConfig,
)
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.types import IGNORE, Batch, Document
from nanovlm.environment import choose_precision, describe_environment
from nanovlm.errors import UserError
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import End, Request
from nanovlm.model.adapters import adapt
from nanovlm.model.inference import prepare
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives import OBJECTIVES
from nanovlm.presets import small
from nanovlm.train import adapt as adapted_runs
from nanovlm.train import parallel
from nanovlm.train.optim import assign_rules, make_optimizers

RESULTS = Path(__file__).resolve().parent / "results" / "post.jsonl"
PROMPT, ANSWER = 1024, 64  # tokens
SMALL = small().model


@dataclass(frozen=True)
class PostConfig:
    # What to measure, or the table of what was measured.
    subject: Annotated[Literal["preference", "group", "adapters", "engine", "table"], tyro.conf.Positional]
    # CPU threads.
    threads: int = 2
    # Turns that count, after two that do not.
    repeats: int = 5
    # Set by the benchmark itself: the side that this process measures.
    side: str = ""


def main(config: PostConfig):
    if config.subject == "table":
        write_table()
        return
    torch.set_num_threads(config.threads)
    sides, measure = SUBJECTS[config.subject]
    if config.side:
        work(measure(config.side))
        return
    commands = {}
    for side in sides:
        options = json.dumps(dataclasses.asdict(dataclasses.replace(config, side=side)))
        commands[side] = [sys.executable, __file__, "--json", options]
    turns = alternate(commands, [""] * (WARM_UP + config.repeats))
    check_equal(config.subject, turns[0])
    base, lines = sides[-1], []
    for side in sides[:-1]:
        line = {"subject": config.subject, "side": side, "against": base}
        for figure in ("seconds", "memory_gb"):
            counted = turns[WARM_UP:] if figure == "seconds" else turns[-1:]  # memory only grows
            ratios = sorted(turn[side][figure] / turn[base][figure] for turn in counted)
            line[figure] = round(statistics.median(turn[side][figure] for turn in counted), 3)
            line[f"{figure}_against"] = round(statistics.median(turn[base][figure] for turn in counted), 3)
            line[f"{figure}_ratio"] = [round(x, 3) for x in (statistics.median(ratios), ratios[0], ratios[-1])]
        lines.append(line)
    append_lines(
        RESULTS, lines, describe_environment(torch.device("cpu"), config.threads, precision_of(config.subject))
    )


def precision_of(subject: str) -> str:
    return choose_precision(torch.device("cpu")) if subject == "adapters" else "fp32"


def check_equal(subject: str, turn: dict[str, dict]):
    """Raise UserError where sides that compute the same do not have equal losses and gradients in their first turn."""
    if subject not in ("preference", "group"):
        return
    (a, b), tolerance = turn.values(), 1e-3
    for name in ("loss", "grad_norm"):
        if abs(a[name] - b[name]) > tolerance * abs(b[name]):
            raise UserError(f"{subject}: {name} is {a[name]} on one side and {b[name]} on the other, so no time counts")


# --- pairs and groups: shared prompts against documents that are written out -----------------------------------------


def make_documents(
    config: VLMConfig, num_answers: int, is_shared: bool, values: dict[str, list[float]]
) -> list[Document]:
    """Return a prompt with one picture and its answers, as one document with branches or as one for each answer.

    `values` are given to all tokens of an answer, one number each.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(num: int) -> torch.Tensor:
        return torch.randint(10, config.decoder.vocab_size, (num,), generator=generator)

    size, num_tiles = config.tile_size, 8
    tiles = torch.randint(0, 256, (num_tiles, 3, size, size), generator=generator).to(torch.uint8)
    num_image = num_tiles * config.num_image_tokens
    prompt = torch.cat((torch.full((num_image,), config.image_token_id), draw(PROMPT - num_image)))
    answers = [draw(ANSWER) for _ in range(num_answers)]
    branches = []
    for number, answer in enumerate(answers):
        ids = torch.cat((prompt[-1:], answer[:-1]))
        branches.append(
            (ids, answer, {name: torch.full((ANSWER,), of_each[number]) for name, of_each in values.items()})
        )
    prefix, nothing = prompt[:-1], torch.full((PROMPT - 1,), IGNORE)
    zeros = {name: torch.zeros(PROMPT - 1) for name in values}
    groups = [branches] if is_shared else [[branch] for branch in branches]
    documents = []
    for group in groups:
        first = 1 if is_shared else 0
        branch_ids = [torch.zeros(PROMPT - 1)] + [torch.full((ANSWER,), first + i) for i in range(len(group))]
        documents.append(
            Document(
                torch.cat([prefix, *(ids for ids, _, _ in group)]),
                torch.cat([nothing, *(labels for _, labels, _ in group)]),
                torch.cat(branch_ids).int(),
                tiles,
                {name: torch.cat([zeros[name], *(of[name] for _, _, of in group)]) for name in values},
            )
        )
    return documents


def measure_shared(objective: str, num_answers: int, values: dict[str, list[float]]) -> Callable[[str], Callable]:
    """Return what makes the measuring function of a side: a step without the optimizer."""

    def begin(side: str) -> Callable[[], dict]:
        torch.manual_seed(0)
        model = VLM(SMALL).train()
        preference = PreferenceConfig(reference="records")
        group = GroupConfig(num_generations=num_answers, max_completion_length=ANSWER, loss_type="dapo")
        config = TrainConfig(model=SMALL, objective=objective, preference=preference, group=group)
        processor: object = None  # neither loss reads text
        learned = OBJECTIVES[objective](config, processor, torch.device("cpu"))
        documents = make_documents(SMALL, num_answers, side == "shared", values)
        batch = collate([make_row(documents, sum(map(len, documents)), SMALL.pad_token_id)])
        return lambda: step(model, learned, batch)

    return begin


def step(model: VLM, objective, batch: Batch) -> dict:
    start = time.perf_counter()
    loss = objective.loss(model, batch, Extras()) / objective.count(batch)
    loss.backward()
    seconds = time.perf_counter() - start
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return {
        "seconds": seconds,
        "loss": loss.item(),
        "grad_norm": norm.item(),
        "memory_gb": resident("VmHWM") / 1e9,
    }


# --- adapters against full tuning -------------------------------------------------------------------------------------

# A side: its adapter, and what its blocks recompute in the backward pass: everything, in the preset captions_qlora.
WAYS = {
    "lora": (AdapterConfig(rank=16), "none"),
    "qlora": (AdapterConfig(rank=16, base="nf4"), "none"),
    "qlora, recomputed": (AdapterConfig(rank=16, base="nf4"), "full"),
    "full, recomputed": (AdapterConfig(), "full"),
    "full": (AdapterConfig(), "none"),
}


def measure_adapters(side: str) -> Callable[[], dict]:
    """Return a whole step of 1 x 1,088 tokens with one picture, optimizer included; full tuning trains the encoder too.

    The model is made as a run makes it, but for its random weights.
    """
    shape, precision = SHAPES["222m"], precision_of("adapters")
    adapter, recomputed = WAYS[side]
    config = TrainConfig(
        model=shape,
        init=InitConfig(model="random weights"),
        adapter=adapter,
        optim=OptimConfig(lr=1e-5),
        parallel=ParallelConfig(checkpointing=recomputed),
    )
    torch.manual_seed(0)
    model = adapted_runs.build(config)
    assign_rules(model, config.optim, config.adapter)
    fill = functools.partial(fill_random, config=config)
    parallel.parallelize(model, config.parallel, torch.device("cpu"), precision, fill)
    optimizers = make_optimizers(model, config.optim, precision, config.adapter)
    objective = OBJECTIVES["next_token"](config, None, torch.device("cpu"))
    document = make_documents(shape, 1, False, {})[0]
    document.labels = torch.cat((document.input_ids[1:], document.labels[-1:]))  # all of it is trained
    document.labels[document.labels == shape.image_token_id] = IGNORE
    batch = collate([make_row([document], len(document), shape.pad_token_id)])
    model.train()

    def measure() -> dict:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = objective.loss(model, batch, Extras()) / objective.count(batch)
            with torch.autocast("cpu", enabled=False):
                loss.backward()
        for optimizer in optimizers.values():
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
            optimizer.zero_grad()
        return {"seconds": time.perf_counter() - start, "loss": loss.item(), "memory_gb": resident("VmHWM") / 1e9}

    return measure


@torch.no_grad()
def fill_random(model: VLM, config: TrainConfig):
    """Fill a model as `init` fills one from a file: the base tensor by tensor, rounded where it is quantised."""
    for name, place in adapted_runs.base_places(model, config.adapter).items():
        values = torch.empty(place.shape, dtype=torch.float32)
        place.copy_(
            values.normal_(std=0.02) if values.ndim > 1 else torch.ones_like(values) * (not name.endswith("bias"))
        )
    adapted_runs.draw_adapter(model)


# --- several adapters in one batch ------------------------------------------------------------------------------------


def measure_engine(side: str) -> Callable[[], dict]:
    """Return the seconds of 16 greedy answers of 64 tokens, of requests that share four adapters or one."""
    shape = SHAPES["222m"]
    torch.manual_seed(0)
    model = VLM(shape).eval()
    names = [f"a{i}" for i in range(4)]
    for name in names:
        adapt(model, AdapterConfig(rank=16), name)
        adapted_runs.draw_adapter(model, name)
    prepare(model)
    documents = make_documents(shape, 16, False, {})
    prompts = [document_of(d.input_ids[PROMPT - 128 : PROMPT]) for d in documents]

    def measure() -> dict:
        engine = Engine(model, num_rows=16)
        sampling = SamplingConfig(max_new_tokens=64)
        start = time.perf_counter()
        for i, prompt in enumerate(prompts):
            name = names[i % 4] if side == "four" else names[0]
            engine.submit(Request(prompt, dataclasses.replace(sampling, seed=i), adapter=name))
        ended = 0
        while not engine.is_idle:
            ended += sum(isinstance(event, End) for event in engine.step())
        assert ended == len(prompts)
        return {"seconds": time.perf_counter() - start, "memory_gb": resident("VmHWM") / 1e9}

    return measure


def document_of(ids: torch.Tensor) -> Document:
    size = SHAPES["222m"].tile_size
    nothing = torch.zeros(len(ids), dtype=torch.int32)
    return Document(ids, torch.full_like(ids, IGNORE), nothing, torch.empty(0, 3, size, size, dtype=torch.uint8))


# A subject: its sides, the last of which the others are held against, and what makes the measuring function of a side.
SUBJECTS = {
    "preference": (
        ("shared", "written out"),
        measure_shared("preference", 2, {"ref_logprobs": [-8.0, -8.5]}),
    ),
    "group": (
        ("shared", "written out"),
        measure_shared(
            "group", 8, {"weights": [1.0, -1.0, 0.5, -0.5, 0.2, -0.2, 1.5, -1.5], "old_logprobs": [-8.0] * 8}
        ),
    ),
    "adapters": (tuple(WAYS), measure_adapters),
    "engine": (("four", "one"), measure_engine),
}

# --- the table ----------------------------------------------------------------------------------------------------

DOCS = cli.PROJECT / "docs" / "post_training.md"
# A side's bars: the most of the other side's seconds and memory, where there is one.
BARS = {
    "preference, shared": ("a pair on a shared prompt / two documents", 0.65, None),
    "group, shared": ("8 answers on a shared prompt / 8 documents", 0.35, 0.5),
    "adapters, lora": ("LoRA, rank 16, on 222M / full tuning", 0.75, 0.45),
    "adapters, qlora, recomputed": ("QLoRA in nf4, rank 16, blocks recomputed, on 222M / full tuning", None, 0.30),
    "adapters, qlora": ("QLoRA, nothing recomputed / full tuning", None, 0.30),
    "adapters, full, recomputed": ("full tuning, blocks recomputed / full tuning", None, None),
    "engine, four": ("four adapters in a batch / one", round(1 / 0.7, 2), None),
}


def write_table():
    """Put the newest line of each side between its marks in docs/post_training.md."""
    lines = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.exists() else []
    newest = {f"{line['subject']}, {line['side']}": line for line in lines}
    text = ["| | time | bar | memory | bar |", "|---|---|---|---|---|"]
    for name, (what, *bars) in BARS.items():
        cells = []
        for figure, bar in zip(("seconds_ratio", "memory_gb_ratio"), bars, strict=True):
            ratio = newest[name][figure] if name in newest else None
            cells += ["{} ({} to {})".format(*ratio) if ratio else "not measured yet", f"{bar}" if bar else ""]
        text.append(f"| {what} | {' | '.join(cells)} |")
    for place in dict.fromkeys(map(where, lines)):
        text += ["", f"({place})"]
    pages.put(DOCS, "post", "post.py", "\n".join(text))


if __name__ == "__main__":
    cli.run(lambda: main(arguments.read(PostConfig, __doc__)))
