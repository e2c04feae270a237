"""Recipes of post-training on drawn scenes and on SmolLM2: what each gains on held-out data, and what it costs.

    python benchmarks/recipes.py style            another style, palette and language: LoRA, DoRA, QLoRA, full tuning
    python benchmarks/recipes.py group            GRPO from an under-trained model, against supervised tuning as long
    python benchmarks/recipes.py hallucinations   DPO and MPO against objects that captions name and are not there
    python benchmarks/recipes.py student          under a third of the parameters, with and without a teacher
    python benchmarks/recipes.py smollm2          SmolLM2-135M learns the style of our docs: QLoRA against full tuning
    python benchmarks/recipes.py tables           tables and curve of docs/post_training.md, from the lines of all

Every run is trained by train.py in a process of its own, from a TrainConfig that a function below writes in full. A
line of each goes to benchmarks/results/recipes.jsonl; a run that has its line is not made again while its config stays.
"""

import dataclasses
import hashlib
import io
import json
import re
import resource
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from benchmarks import pages
from benchmarks.recipe_data import find_objects, write
from nanovlm import cli
from nanovlm.config import (
    AdapterConfig,
    DistillConfig,
    EvalConfig,
    GroupConfig,
    InitConfig,
    OptimConfig,
    ParamRule,
    PreferenceConfig,
    TrainConfig,
    from_dict,
)
from nanovlm.data.chat import Processor
from nanovlm.data.scenes import draw
from nanovlm.environment import describe_environment, git_commit, short_commit
from nanovlm.errors import UserError
from nanovlm.eval.questions import Question
from nanovlm.eval.run import answer, evaluate
from nanovlm.eval.tasks import open_task, read_questions
from nanovlm.files import read_json, write_file
from nanovlm.hub.read import find_model
from nanovlm.model.vlm import VLM
from nanovlm.presets import scenes
from nanovlm.train import adapt

# What a run measured of itself, in its folder.
MEASURED = "measured.json"
RESULTS = cli.PROJECT / "benchmarks" / "results" / "recipes.jsonl"
DOCS = cli.PROJECT / "docs" / "post_training.md"
# Linear layers of encoder, projector and decoder: pictures in another style need all of them.
EVERYWHERE = r"_proj$|\.fc[12]$|^projector\."
PLAIN = (ParamRule(r"norm|bias|embed|position"), ParamRule(r"", weight_decay=0.01))


@dataclass(frozen=True)
class RecipesConfig:
    # Which recipe, or the tables of all.
    recipe: Annotated[Literal["style", "group", "hallucinations", "student", "smollm2", "tables"], tyro.conf.Positional]
    # Folder that runs and data go to.
    folder: Path = Path("runs/recipes")
    # Each way is run with these seeds.
    seeds: tuple[int, ...] = (0, 1, 2)
    # CPU threads.
    threads: int = 2
    # Only these ways of the recipe; empty for all.
    ways: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a recipe's runs and data are, and what a run of it has in common."""

    folder: Path
    seed: int
    threads: int

    def model(self, name: str) -> str:
        return str(self.folder / f"{name}_{self.seed}" / "model")

    def records(self, kind: str, split: str, num: int) -> str:
        """Return the file of records of a kind, which is written where it is not there."""
        folder = self.folder / f"{kind}_{split}_{num}"
        if not (folder / "records.jsonl").exists():
            write(folder, kind, split, num)
        return str(folder / "records.jsonl")

    def config(self, name: str, **changes) -> TrainConfig:
        """Return the preset scenes with changes, as a run of this name."""
        base = scenes()
        common = {"run_dir": str(self.folder / f"{name}_{self.seed}"), "seed": self.seed, "threads": self.threads}
        quiet = EvalConfig(show_every=0)
        return replace(base, **({"eval": quiet} | common | changes))


# --- the runs that others start from ------------------------------------------------------------------------------


def make_base(place: Place) -> TrainConfig:
    return place.config("base")


def make_short(place: Place) -> TrainConfig:
    """Return a run of half of the preset's steps, which has all its lessons behind it and still answers wrongly."""
    base = scenes()
    return place.config("short", optim=replace(base.optim, steps=500))


BASES = {"base": make_base, "short": make_short}

# --- style: another style, palette and language -------------------------------------------------------------------


def make_style(place: Place, way: str) -> TrainConfig:
    """Embeddings and head learn in every way: the tokens of another language hardly had a chance to, before."""
    base = scenes()
    lora = AdapterConfig(rank=8, alpha=16, target=EVERYWHERE, train=("embed_tokens|lm_head",))
    adapter = {
        "full": AdapterConfig(),
        "lora": lora,
        "dora": replace(lora, use_dora=True),
        "qlora": replace(lora, base="nf4"),
    }[way]
    german = place.records("german", "train", 2000)
    return place.config(
        f"style_{way}",
        init=InitConfig(model=place.model("base")),
        adapter=adapter,
        data=replace(base.data, sources=(german,), lessons=(), row_length=512, batch_rows=5),
        optim=OptimConfig(lr=4e-3, steps=900, warmup_steps=20, rules=base.optim.rules if way == "full" else PLAIN),
    )


# --- group: GRPO against supervised tuning ------------------------------------------------------------------------


def make_group(place: Place, way: str) -> TrainConfig:
    base = scenes()
    common = {
        "init": InitConfig(model=place.model("short")),
        "data": replace(base.data, sources=("scenes",), lessons=()),
    }
    if way == "grpo":
        return place.config(
            "group_grpo",
            **common,
            objective="group",
            group=GroupConfig(num_generations=8, num_questions=32, max_completion_length=8, num_rows=256),
            optim=OptimConfig(lr=3e-4, steps=300, rules=PLAIN),
        )
    # As many steps as took as long, by the seconds of a step of the run that both start from.
    short, grpo = (read_json(Path(place.model(name)).parent / MEASURED) for name in ("short", "group_grpo"))
    steps = round(grpo["seconds"] / (short["seconds"] / short["steps"]))
    return place.config("group_sft", **common, optim=OptimConfig(lr=3e-4, steps=steps, rules=PLAIN))


# --- hallucinations: DPO and MPO on pairs of captions -------------------------------------------------------------


def make_hallucinations(place: Place, way: str) -> TrainConfig:
    base = scenes()
    return place.config(
        f"hallucinations_{way}",
        init=InitConfig(model=place.model("base")),
        objective="next_token" if way == "sft" else "preference",
        preference=PreferenceConfig(losses=("dpo" if way == "sft" else way,)),
        data=replace(
            base.data, sources=(place.records("pairs", "train", 2000),), lessons=(), row_length=192, batch_rows=12
        ),
        optim=OptimConfig(lr=1e-4, steps=150, rules=PLAIN),
    )


# --- student: with and without a teacher --------------------------------------------------------------------------


def make_student(place: Place, way: str) -> TrainConfig:
    base = scenes()
    model = base.model
    assert model.vision is not None
    small = replace(
        model,
        vision=replace(model.vision, hidden_size=96, intermediate_size=384),
        decoder=replace(model.decoder, hidden_size=48, intermediate_size=128, head_dim=16),
    )
    is_taught = way == "taught"
    return place.config(
        f"student_{way}",
        model=small,
        objective="distill" if is_taught else "next_token",
        distill=DistillConfig(place.model("base"), ("forward_kl=1", "next_token=1")) if is_taught else DistillConfig(),
    )


# --- smollm2: a style of text -------------------------------------------------------------------------------------


def make_smollm2(place: Place, way: str) -> TrainConfig:
    texts = place.folder / "docs.jsonl"
    if not texts.exists():
        place.folder.mkdir(parents=True, exist_ok=True)
        write_file(texts, "".join(json.dumps({"text": text}) + "\n" for text in read_docs()))
    # A step at a rate that hardly changes a last digit: the loss is that of the model itself.
    steps, lr = (1, 1e-9) if way == "untuned" else (30, 2e-4 if way == "qlora" else 2e-5)
    return TrainConfig(
        run_dir=str(place.folder / f"smollm2_{way}_{place.seed}"),
        model=find_model("smollm2").config,
        init=InitConfig(model="smollm2"),
        adapter=AdapterConfig(rank=16, alpha=32, base="nf4") if way == "qlora" else AdapterConfig(),
        data=replace(scenes().data, sources=(str(texts),), lessons=(), row_length=512, batch_rows=1, val_fraction=0.15),
        optim=OptimConfig(lr=lr, steps=steps, warmup_steps=3, rules=PLAIN),
        eval=EvalConfig(every=steps, best="none", show_every=0),
        seed=place.seed,
        threads=place.threads,
    )


def read_docs() -> list[str]:
    """Return the paragraphs of docs/*.md, without tables, code and pictures."""
    found = []
    for path in sorted((cli.PROJECT / "docs").glob("*.md")):
        text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
        found += [" ".join(part.split()) for part in text.split("\n\n") if len(part) > 200 and part[0] not in "|!<#"]
    return found


# --- what is measured of a model ----------------------------------------------------------------------------------

Measure = Callable[[VLM, Processor, Place], dict[str, float]]


def accuracy(model: VLM, processor: Processor, name: str, limit: int = 300) -> float:
    """Return the percentage of exact answers of a task, the mean of its kinds but captions."""
    task = open_task(name, limit)
    return round(100 * evaluate(model, processor, task, read_questions(task))["mean"], 1)


def measure_style(model: VLM, processor: Processor, place: Place) -> dict[str, float]:
    return {
        "new": accuracy(model, processor, place.records("german", "test", 300)),
        "old": accuracy(model, processor, "scenes"),
    }


def measure_scenes(model: VLM, processor: Processor, place: Place) -> dict[str, float]:
    return {"test": accuracy(model, processor, "scenes", 512)}


def measure_captions(model: VLM, processor: Processor, place: Place, num: int = 400) -> dict[str, float]:
    """Return percentages of captions of test scenes: those that name an absent object, and those that are exact.

    An object that is named more often than it is there is absent, too.
    """
    truths, questions = [], []
    for index in range(num):
        scene = draw("test", index, ("caption",))
        truths.append(scene["texts"][0]["assistant"])
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "describe the image."}]}]
        questions.append(Question(index, "caption", scene["images"], messages, (truths[-1],), max_new_tokens=64))
    said = answer(model, processor, questions)
    named = [Counter(find_objects(text)) for text in said]
    there = [Counter(find_objects(text)) for text in truths]
    return {
        "hallucinated": round(100 * sum(bool(a - b) for a, b in zip(named, there, strict=True)) / num, 1),
        "objects": round(sum(sum(a.values()) for a in named) / num, 2),
        "exact": round(100 * sum(a.strip() == b for a, b in zip(said, truths, strict=True)) / num, 1),
        "test": accuracy(model, processor, "scenes"),
    }


def measure_nothing(model: VLM, processor: Processor, place: Place) -> dict[str, float]:
    """Of SmolLM2 the loss on held-out text is measured by the run itself."""
    return {}


@dataclass(frozen=True)
class Recipe:
    make: Callable[[Place, str], TrainConfig]
    ways: tuple[str, ...]
    measure: Measure
    # The run that the ways start from, which is measured too; empty for none.
    base: str = ""


RECIPES = {
    "style": Recipe(make_style, ("lora", "dora", "qlora", "full"), measure_style, "base"),
    "group": Recipe(make_group, ("grpo", "sft"), measure_scenes, "short"),
    "hallucinations": Recipe(make_hallucinations, ("dpo", "mpo", "sft"), measure_captions, "base"),
    "student": Recipe(make_student, ("alone", "taught"), measure_scenes, "base"),
    "smollm2": Recipe(make_smollm2, ("untuned", "qlora", "full"), measure_nothing),
}

# --- runs -----------------------------------------------------------------------------------------------------------


def main(config: RecipesConfig):
    if config.recipe == "tables":
        write_tables()
        return
    recipe, commit = RECIPES[config.recipe], git_commit()
    ways = [way for way in recipe.ways if way in (config.ways or recipe.ways)]
    with tqdm(total=len(config.seeds) * (len(ways) + bool(recipe.base)), unit="run") as progress:
        for seed in config.seeds:
            place = Place(config.folder, seed, config.threads)
            if recipe.base:
                base = BASES[recipe.base](place)
                if not Path(base.run_dir, MEASURED).exists():
                    train_apart(base)
                record(config.recipe, "before", base, lambda: {}, place, commit, progress)
                progress.update()
            for way in ways:
                made = recipe.make(place, way)
                record(config.recipe, way, made, lambda made=made: train_apart(made), place, commit, progress)
                progress.update()


def record(name: str, way: str, config: TrainConfig, run: Callable[[], dict], place: Place, commit: str, progress):
    """Make a run and measure its model, unless that has been done; append its line."""
    about = {"recipe": name, "way": way, "seed": place.seed, "config": digest(config)}
    if any(about.items() <= line.items() for line in pages.read_lines(RESULTS)):
        return
    measured = run()
    model, processor = adapt.load(Path(config.run_dir), config, torch.device("cpu"))
    torch.set_num_threads(place.threads)
    measured |= RECIPES[name].measure(model, processor, place)
    environment = describe_environment(torch.device("cpu"), place.threads, measured.pop("precision", "fp32"))
    line = about | measured | environment | {"commit": commit}
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    progress.write(json.dumps(line))


def digest(config: TrainConfig) -> str:
    """Name a config by a hash of all that changes what is learned: not by where it is."""
    plain = replace(config, run_dir="", init=replace(config.init, model=Path(config.init.model).parent.name))
    plain = replace(
        plain, data=replace(plain.data, sources=tuple(Path(name).parent.name for name in plain.data.sources))
    )
    plain = replace(plain, distill=replace(plain.distill, teacher=Path(plain.distill.teacher).parent.name))
    return hashlib.sha256(json.dumps(dataclasses.asdict(plain)).encode()).hexdigest()[:12]


def train_apart(config: TrainConfig) -> dict:
    """Train in a process of its own; return what it measured of itself, which it leaves in its folder too."""
    command = [sys.executable, __file__, "--worker", json.dumps(dataclasses.asdict(config))]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise UserError(f"{config.run_dir} failed: {ended.stdout[-1000:]}")
    return read_json(Path(config.run_dir, MEASURED))


def work(text: str):
    """Train, and measure processor seconds (which do not grow beside other work), peak memory and the last losses.

    Of a run that was stopped in between the seconds are not known (None). A run that was measured is left as it is.
    """
    config = from_dict(TrainConfig, json.loads(text))
    measured, is_whole = Path(config.run_dir, MEASURED), not Path(config.run_dir, "checkpoints").exists()
    if measured.exists():
        return
    results = train.main(config)
    metrics = [json.loads(line) for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]
    used, workers = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    said = {
        "steps": len(metrics),
        "seconds": round(sum(x.ru_utime + x.ru_stime for x in (used, workers)), 1) if is_whole else None,
        "memory_gb": round(used.ru_maxrss / 1e6, 3),
        "precision": results["environment"]["precision"],
    }
    if "val_loss" in metrics[-1]:
        said["val_loss"] = round(metrics[-1]["val_loss"], 4)
    if "reward" in metrics[-1]:
        said["rewards"] = [round(line["reward"], 4) for line in metrics]
    write_file(measured, json.dumps(said))


# --- tables -----------------------------------------------------------------------------------------------------------

# For each recipe the figures of its columns.
COLUMNS = {
    "style": ("new", "old", "seconds", "memory_gb"),
    "group": ("test", "seconds"),
    "hallucinations": ("hallucinated", "objects", "exact", "test", "seconds"),
    "student": ("test", "seconds"),
    "smollm2": ("val_loss", "seconds", "memory_gb"),
}
NAMES = {
    "new": "new style, German",
    "old": "old style, English",
    "seconds": "processor seconds",
    "memory_gb": "peak memory, GB",
    "test": "test scenes",
    "hallucinated": "captions with an absent object",
    "objects": "objects a caption",
    "exact": "exact captions",
    "val_loss": "held-out loss, nats a token",
}


def write_tables():
    """Put the table of every recipe between its marks in docs/post_training.md."""
    for name in RECIPES:
        pages.put(DOCS, name, "recipes.py", format_table(name))
    draw_rewards(DOCS.parent / "rewards.png")


def draw_rewards(png: Path, window: int = 20):
    """Draw the share of right answers among the samples of GRPO's steps, for each seed, as a mean over some steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {line["seed"]: line["rewards"] for line in pages.read_lines(RESULTS) if line["way"] == "grpo"}
    figure, axis = plt.subplots(figsize=(8, 2.6), layout="constrained")
    for seed, rewards in runs.items():
        means = torch.tensor(rewards).unfold(0, window, 1).mean(1).tolist()
        axis.plot(range(window, len(rewards) + 1), means, label=f"seed {seed}", linewidth=1)
    axis.set_xlabel("step")
    axis.set_ylabel(f"reward, mean of {window} steps")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, dpi=100)
    plt.close(figure)
    write_file(png, image.getvalue())


def format_table(name: str) -> str:
    """Lay out mean, deviation and worst of the seeds of each way; of lines of one config the last counts."""
    lines = [line for line in pages.read_lines(RESULTS) if line["recipe"] == name]
    lines = list({(line["way"], line["seed"]): line for line in lines}.values())
    columns = COLUMNS[name]
    text = [
        f"| {name} | seeds | {' | '.join(NAMES[column] for column in columns)} |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for way in ("before", *RECIPES[name].ways):
        of_way = [line for line in lines if line["way"] == way]
        if of_way:
            cells = [summarise([line[c] for line in of_way if line.get(c) is not None]) for c in columns]
            text.append(f"| {way} | {len(of_way)} | {' | '.join(cells)} |")
    if lines:
        line = lines[-1]
        where = f"{line['device']}, {line['threads']} threads, {line['precision']}"
        commits = ", ".join(dict.fromkeys(short_commit(line["commit"]) for line in lines))
        text += ["", f"({where}; shares in percent; commits {commits}; {line['date']})"]
    return "\n".join(text) if lines else "not measured yet"


def summarise(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2g} ({min(values):g} to {max(values):g})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{spread}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
    else:
        cli.run(lambda: main(tyro.cli(RecipesConfig, description=__doc__)))
