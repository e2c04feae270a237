"""A cell of benchmarks/fusion.py: its model, the steps that it takes, and how it is asked.

All cells of a seed begin with one image encoder and one language model, and see the same scenes in the same steps, at a
rate that stays constant after the warm-up. The language model has read questions about scenes that are described in
words: it never had a picture. An answer is right where each of its tokens, and the end, is the likeliest after the true
ones before: what greedy decoding would write. Seconds are the processor's, of forward, backward and optimizer alone.
"""

import dataclasses
import hashlib
import itertools
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from nanovlm.config import (
    AdapterConfig,
    EvalConfig,
    FusionConfig,
    InitConfig,
    OptimConfig,
    ProjectorConfig,
    TilingConfig,
    TrainConfig,
    VLMConfig,
)
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row, pack
from nanovlm.data.process import make_process
from nanovlm.data.scenes import draw
from nanovlm.data.types import Batch
from nanovlm.environment import choose_precision, describe_environment
from nanovlm.files import write_file
from nanovlm.presets import scenes, scenes_siglip
from nanovlm.train import init
from nanovlm.train.optim import make_optimizers
from nanovlm.train.state import TrainState
from nanovlm.train.step import train_step
from nanovlm.train.validate import evaluating

KINDS = ("color", "shape", "position", "digits")
ROW_LENGTH = 176
NUM_TEXTS = 8000  # scenes that the language model reads of
# A scene has at most four things; with the ground between them, five tokens can tell all of it.
NUM_TOKENS = {"linear": 0, "mlp": 0, "resampler": 5, "qformer": 5, "merge": 5}
FUSIONS = ("sequence", "cross_attention")
# Peak rate by what of the backbones learns: that of the preset scenes for all, none tuned (`--rate` tries another).
RATES = {"frozen": 4e-3, "lora": 4e-3, "full": 4e-3}
# As in the preset, but that weights which have learned hardly decay.
RULES = tuple(replace(rule, weight_decay=min(rule.weight_decay, 0.1)) for rule in scenes().optim.rules)


@dataclass(frozen=True)
class FusionBenchConfig:
    # What to measure, or to write of what was measured.
    subject: Annotated[Literal["measure", "encoder", "table", "draw"], tyro.conf.Positional]
    # Each cell is run with these seeds, each with backbones of its own.
    seeds: tuple[int, ...] = (0, 1, 2)
    # Only cells in whose names this regular expression is found, such as "linear .* full".
    cells: str = ""
    # Folder that backbones and runs go to.
    folder: Path = Path("runs/fusion")
    # CPU threads.
    threads: int = 1
    # measure: steps of a cell, and scenes of a step.
    steps: int = 160
    batch_scenes: int = 24
    # measure: how often a cell is asked, and about how many scenes of the test split.
    points: int = 8
    num_test: int = 100
    # Steps of the encoder by contrast, of the language model, and of the preset scenes in `encoder`.
    encoder_steps: int = 400
    language_steps: int = 500
    scenes_steps: int = 950
    # measure: peak learning rate in place of RATES, to try it: lines then go to tried.jsonl of the folder.
    rate: float = 0.0
    # Set by the benchmark itself: the cell or the backbone that this process trains.
    worker: str = ""


@dataclass(frozen=True)
class Cell:
    projector: str
    fusion: str
    decoder: str  # what of the backbones learns: frozen, lora or full
    encoder: str = "contrast"

    @property
    def name(self) -> str:
        return " ".join(dataclasses.astuple(self))


CELLS = [Cell(*parts) for parts in itertools.product(NUM_TOKENS, FUSIONS, RATES)]
CELLS += [Cell("linear", fusion, "full", "nothing") for fusion in FUSIONS]

# --- configs ----------------------------------------------------------------------------------------------------------


def make_model(projector: str = "linear", fusion: str = "sequence") -> VLMConfig:
    return replace(
        scenes().model,
        projector=ProjectorConfig(projector, scale_factor=1, num_tokens=NUM_TOKENS[projector]),
        fusion=FusionConfig(fusion),
        tiling=TilingConfig("square"),
    )


def make_language(config: FusionBenchConfig, texts: str, seed: int) -> TrainConfig:
    """Return the run of a language model on questions in words, most of them after a description of the scene."""
    base = scenes()
    return TrainConfig(
        model=replace(make_model(), vision=None, image_token_id=None),
        data=replace(base.data, sources=(texts,), lessons=(), row_length=ROW_LENGTH),
        optim=replace(base.optim, steps=config.language_steps),
        eval=EvalConfig(show_every=0),
        seed=seed,
        threads=config.threads,
    )


def put_in_words(index: int) -> list[dict]:
    """Return a scene's questions as records without a picture; three of four have its description before them."""
    texts = draw("train", index, (*KINDS, "caption"))["texts"]
    caption, records = texts[-1]["assistant"], []
    for number, text in enumerate(texts):
        is_described = text["kind"] != "caption" and (index + number) % 4
        asked = f"{caption} {text['user']}" if is_described else text["user"]
        roles = {"user": asked, "assistant": text["assistant"]}
        records.append({"messages": [{"role": role, "content": content} for role, content in roles.items()]})
    return records


def make_cell(config: FusionBenchConfig, cell: Cell, seed: int) -> TrainConfig:
    base = scenes()
    encoder = str(encoder_dir(config, seed) / "model") if cell.encoder == "contrast" else ""
    lora = AdapterConfig(
        rank=8, alpha=16, target=r"^(vision|decoder)\..*(_proj|fc[12])$", train=(r"^projector\.", r"^fusion\.")
    )
    lora = replace(lora, train=lora.train if cell.fusion == "cross_attention" else lora.train[:1])
    return TrainConfig(
        run_dir=str(config.folder / cell.name.replace(" ", "_")),
        model=make_model(cell.projector, cell.fusion),
        init=InitConfig(vision=encoder, decoder=str(language_dir(config, seed) / "model")),
        adapter=lora if cell.decoder == "lora" else AdapterConfig(),
        data=replace(base.data, sources=("scenes",), lessons=(), row_length=ROW_LENGTH),
        optim=OptimConfig(
            lr=config.rate or RATES[cell.decoder],
            steps=config.steps,
            warmup_steps=min(20, config.steps),
            min_lr_ratio=1.0,  # no fall after the warm-up
            momentum=base.optim.momentum,
            rules=RULES,
            freeze=(r"^(vision|decoder)\.",) if cell.decoder == "frozen" else (),
        ),
        seed=seed,
        threads=config.threads,
    ).validate()


def encoder_dir(config: FusionBenchConfig, seed: int) -> Path:
    return config.folder / f"encoder_{name_backbones(config)}_{seed}"


def language_dir(config: FusionBenchConfig, seed: int) -> Path:
    return config.folder / f"language_{name_backbones(config)}_{seed}"


def name_backbones(config: FusionBenchConfig) -> str:
    """Name what the image encoder and the language model learn by a hash of it."""
    language = replace(make_language(config, "", 0), threads=0)
    plain = [dataclasses.asdict(scenes_siglip()), config.encoder_steps, dataclasses.asdict(language), NUM_TEXTS]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:8]


# --- data and answers -------------------------------------------------------------------------------------------------


@dataclass
class Asked:
    """A batch, and the kind of each question of it: `kinds[document][branch - 1]`."""

    batch: Batch
    kinds: list[list[str]]


def make_batches(process, split: str, first: int, num: int, pad_token_id: int, rows: int | None = None) -> list[Asked]:
    """Pack scenes [first, first + num) into rows, all into one batch or into batches of some rows."""
    raws = [draw(split, index, KINDS) for index in range(first, first + num)]
    documents = [process(raw) for raw in raws]
    packed = pack([len(d) for d in documents], [len(d.tiles) for d in documents], ROW_LENGTH)
    made, rows = [], rows or len(packed)
    for part in (packed[i : i + rows] for i in range(0, len(packed), rows)):
        batch = collate([make_row([documents[i] for i in row], ROW_LENGTH, pad_token_id) for row in part])
        made.append(Asked(batch, [[text["kind"] for text in raws[i]["texts"]] for row in part for i in row]))
    return made


def write_texts(config: FusionBenchConfig) -> str:
    """Write what the language model reads, unless it is there; return its file."""
    texts = config.folder / f"texts_{name_backbones(config)}.jsonl"
    if not texts.exists():
        config.folder.mkdir(parents=True, exist_ok=True)
        write_file(texts, "".join(json.dumps(record) + "\n" for i in range(NUM_TEXTS) for record in put_in_words(i)))
    return str(texts)


def name_encoder_run(config: FusionBenchConfig) -> str:
    """Name what `encoder` runs by a hash of it."""
    plain = [dataclasses.asdict(scenes()), config.scenes_steps, name_backbones(config)]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:12]


def score(state: TrainState, asked: Sequence[Asked], is_blank: bool = False) -> dict[str, float]:
    """Return the percentage of right answers of each kind, and their mean; all about grey pictures with `is_blank`."""
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    with evaluating(state):
        for one in asked:
            batch, where = one.batch, one.batch.trained
            if is_blank:
                batch = replace(batch, pixel_values=torch.full_like(batch.pixel_values, 128))
            likeliest = state.model.head(state.model(batch).flatten(0, 1)[where]).argmax(-1)
            is_right = likeliest == batch.labels.flatten()[where]
            places = zip(
                batch.doc_ids.flatten()[where].tolist(),
                batch.branch_ids.flatten()[where].tolist(),
                is_right.tolist(),
                strict=True,
            )
            answers: dict[tuple[int, int], bool] = {}
            for document, branch, is_token_right in places:
                answers[document, branch] = answers.get((document, branch), True) and is_token_right
            for (document, branch), is_answer_right in answers.items():
                right[one.kinds[document][branch - 1]].append(is_answer_right)
    kinds = {kind: 100 * sum(found) / len(found) for kind, found in right.items() if found}
    return {kind: round(x, 2) for kind, x in kinds.items()} | {"mean": round(sum(kinds.values()) / len(kinds), 2)}


# --- a cell -----------------------------------------------------------------------------------------------------------


def train_cell(config: FusionBenchConfig, cell: Cell, seed: int) -> dict:
    """Train a cell, ask it now and then, and return its line; memory is that of this whole process."""
    settings = make_cell(config, cell, seed)
    torch.manual_seed(seed)
    torch.set_num_threads(config.threads)
    precision = choose_precision(torch.device("cpu"))
    model, processor = init.start(settings, [])
    optimizers = make_optimizers(model, settings.optim, precision, settings.adapter)
    state = TrainState(model, model, optimizers, None, config.threads, precision)  # whose loader no step asks
    process, pad = make_process(processor, settings.data), settings.model.pad_token_id
    test = make_batches(process, "test", 0, config.num_test, pad, rows=32)
    curve, seconds = [{"step": 0, "seconds": 0.0, "accuracy": score(state, test)["mean"]}], 0.0
    model.train()
    looks = {round(config.steps * point / config.points) for point in range(1, config.points + 1)}
    scored = {}
    while state.step < config.steps:
        first = seed * 1_000_000 + state.step * config.batch_scenes
        (one,) = make_batches(process, "train", first, config.batch_scenes, pad)
        start = time.process_time()
        train_step(state, [one.batch], len(one.batch.trained), settings)
        seconds += time.process_time() - start
        if state.step in looks:
            scored = score(state, test)
            curve.append({"step": state.step, "seconds": round(seconds, 3), "accuracy": scored["mean"]})
    return {
        "accuracy": scored["mean"],
        "kinds": scored,
        "blank": score(state, test, is_blank=True)["mean"],
        "curve": curve,
        "image_tokens": settings.model.num_image_tokens,
        "image_features": settings.model.num_image_features,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in model.parameters()),
        "step_ms": round(1000 * seconds / config.steps, 1),
        "memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
        **describe_environment(torch.device("cpu"), config.threads, precision),
    }


def digest(config: FusionBenchConfig, cell: Cell, seed: int) -> str:
    """Name a cell's run by a hash of all that changes what it learns: not by where it is."""
    here = replace(config, folder=Path(), seeds=(), cells="", worker="", scenes_steps=0)
    plain = [dataclasses.asdict(make_cell(here, cell, seed)), dataclasses.asdict(here) | {"folder": ""}]
    return hashlib.sha256(json.dumps([*plain, KINDS]).encode()).hexdigest()[:12]
