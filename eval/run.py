"""Ask a model what a task asks, and average the scores.

    python -m nanovlm.eval.run runs/demo/model                            the table of a trained model on drawn scenes
    python -m nanovlm.eval.run runs/demo/model --tasks mine.jsonl         on the questions of records of your own
    python -m nanovlm.eval.run runs/demo/model --limit 64                 faster

All answers are generated greedily. Controls are scored too: answers to the same questions about a grey image (`blank`)
and about another record's image (`shuffled`), and the commonest training answer to the same question, or to its kind
if training never asks it (`majority`).
"""

from nanovlm import cli

if __name__ == "__main__":
    cli.end_on_interrupt()  # the imports below take seconds

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from PIL import Image
from tqdm import tqdm

from nanovlm import load
from nanovlm.config import SamplingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.source import first_pass
from nanovlm.data.sources import open_sources
from nanovlm.environment import find_device
from nanovlm.errors import UserError
from nanovlm.eval.controls import TrainingScan, blank_images, shuffled_images
from nanovlm.eval.tasks import TASKS, Question, Task, open_task, read_questions
from nanovlm.infer.sampling import generate
from nanovlm.model.vlm import VLM

BATCH_ROWS = 128
MAX_NEW_TOKENS = 48
LONGEST_KIND = 40  # characters of a kind that a table shows


def answer(
    model: VLM,
    processor: Processor,
    questions: list[Question],
    images: list[list[Image.Image]] | None = None,
    title: str | None = None,
) -> list[str]:
    """Generate the greedy answer to each question, about `images` if given, else its own; a title shows progress."""
    images = images or [question.images for question in questions]
    device, answers = next(model.parameters()).device, []
    for start in tqdm(range(0, len(questions), BATCH_ROWS), desc=title, disable=title is None, unit="batch"):
        rows = slice(start, start + BATCH_ROWS)
        prompts = [processor.prompt(q.messages, shown) for q, shown in zip(questions[rows], images[rows], strict=True)]
        batch = processor.batch(prompts).to(device)
        answers += [
            processor.decode(ids) for ids in generate(model, batch, SamplingConfig(max_new_tokens=MAX_NEW_TOKENS))
        ]
    return answers


def evaluate(
    model: VLM,
    processor: Processor,
    task: Task,
    questions: list[Question],
    training: TrainingScan | None = None,
    controls: bool = False,
    title: str | None = None,
) -> dict:
    """Return `{"mean", "n", "dropped", "kinds": {kind: {"accuracy", "n"}}}` and other figures by name.

    All are between 0 and 1; the mean is over the kinds of question. With `controls`, and if there are images, there
    are `blank` and `shuffled` for each kind, and their means. With `training` there is `majority` too, and records with
    a training image are left out: `dropped` counts them. If none is left there is no mean.
    """
    num_records = len({question.record for question in questions})
    questions = training.leave_out(questions) if training else questions
    dropped = num_records - len({question.record for question in questions})
    # Short answers first, so that none waits for a long one in its batch.
    questions = sorted(questions, key=lambda question: len(question.truth))
    columns = {"accuracy": answer(model, processor, questions, title=title)}
    if controls and any(question.images for question in questions):
        for name, images in (("blank", blank_images(questions)), ("shuffled", shuffled_images(questions))):
            columns[name] = answer(model, processor, questions, images, title and f"{title}, {name} images")
    if training:
        columns["majority"] = [training.guess(question) for question in questions]
    scores = {column: average(task, questions, answers) for column, answers in columns.items()}
    others, counts = scores["accuracy"], Counter(question.kind for question in questions)
    by_kind = {column: figures.pop("accuracy", {}) for column, figures in scores.items()}
    kinds = {kind: {c: by_kind[c][kind] for c in columns} | {"n": counts[kind]} for kind in by_kind["accuracy"]}
    means = {column: mean(of_kind.values()) for column, of_kind in by_kind.items() if of_kind}
    return {
        **{"mean" if column == "accuracy" else f"{column}_mean": value for column, value in means.items()},
        **{figure: mean(of_kind.values()) for figure, of_kind in others.items()},
        "n": len(questions),
        "dropped": dropped,
        "kinds": kinds,
    }


def average(task: Task, questions: list[Question], answers: list[str]) -> dict[str, dict[str, float]]:
    """Score the answers; return the mean of each figure over the questions of each kind."""
    values = defaultdict(lambda: defaultdict(list))
    for question, said in zip(questions, answers, strict=True):
        for figure, value in task.score(question, said).items():
            values[figure][question.kind].append(value)
    return {figure: {kind: mean(x) for kind, x in of_kind.items()} for figure, of_kind in values.items()}


def format_table(results: dict[str, dict]) -> str:
    """Lay out what `evaluate` returned for each task, in percent."""
    lines = []
    for name, result in results.items():
        columns = [column for column in ("blank", "shuffled", "majority") if f"{column}_mean" in result]
        width = max(14, len(name), *(min(len(kind), LONGEST_KIND) + 2 for kind in result["kinds"]))
        lines.append(f"{name:<{width}} {'exact %':>8}{''.join(f'{c:>10}' for c in columns)}{'n':>7}")
        for kind, row in sorted(result["kinds"].items()):
            shares = "".join(f"{100 * row[column]:10.1f}" for column in columns)
            kind = kind if len(kind) <= LONGEST_KIND else kind[: LONGEST_KIND - 4] + " ..."
            lines.append(f"{'  ' + kind:<{width}} {100 * row['accuracy']:8.1f}{shares}{row['n']:7}")
        if "mean" in result:
            shares = "".join(f"{100 * result[f'{column}_mean']:10.1f}" for column in columns)
            lines.append(f"{'  MEAN':<{width}} {100 * result['mean']:8.1f}{shares}")
        known = {"mean", "n", "dropped", "kinds", *(f"{column}_mean" for column in columns)}
        lines += [
            f"  {figure.replace('_', ' ')} {100 * result[figure]:.1f}" for figure in result if figure not in known
        ]
        if columns or result["dropped"]:
            lines.append(f"  {result['dropped']} records left out because their images occur in training")
        lines.append("")
    return "\n".join(lines)


@dataclass(frozen=True)
class AskConfig:
    # A model folder.
    model: Path
    # What to ask: names of tasks, or sources of records.
    tasks: tuple[str, ...] = tuple(TASKS)
    # How many records of a task are asked, from its first on.
    limit: int = 512
    # What the model was trained on: its first 50,000 records give the commonest answers, and questions about their
    # images are left out. (At the end of a run, train.py uses the records that the run has read.)
    training: tuple[str, ...] = ("scenes",)
    # Print one JSON object instead of the table.
    json: bool = False
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "auto"


def main(config: AskConfig):
    """Print the scores of a model folder."""
    if config.limit < 1:
        raise UserError(f"--limit {config.limit} must be at least 1")
    tasks = [open_task(name, config.limit) for name in config.tasks]
    asked = [(task, read_questions(task)) for task in tasks]
    model, processor = load(config.model, find_device(config.device))
    scan = None
    if config.training:
        source = open_sources(config.training, shuffle=False)
        scan = TrainingScan(source, (ref.key for ref in first_pass(source)))
    results = {
        task.name: evaluate(model, processor, task, questions, scan, controls=True, title=task.name)
        for task, questions in asked
    }
    print(json.dumps(results) if config.json else format_table(results))


def command():
    """Run `python -m nanovlm.eval.run`, or the command nanovlm-eval."""
    import tyro  # only a command needs it

    cli.run(lambda: main(tyro.cli(AskConfig, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))))


if __name__ == "__main__":
    command()
