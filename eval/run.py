"""Ask a model questions, and score its answers.

    python -m nanovlm.eval.run runs/demo/model --tasks scenes             the table of a trained model on drawn scenes
    python -m nanovlm.eval.run runs/mine/model --data mine.jsonl --metric anls relaxed_accuracy    on records of yours
    python -m nanovlm.eval.run owner/name --tasks docvqa pope --out runs/scores     published benchmarks, and a report

All answers are generated greedily. Controls are scored too: answers to the same questions about a grey image (`blank`),
about another record's image (`shuffled`), about the middle frame of a video alone (`still`) and without any (`alone`),
and, of what `--training` names, the commonest
answer to the same question, or to its kind if training never asks it (`majority`). docs/evaluation.md has the tasks,
the metrics and how to read the figures.
"""

from nanovlm import cli

if __name__ == "__main__":
    cli.end_on_interrupt()  # the imports below take seconds

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from PIL import Image
from tqdm import tqdm

from nanovlm import load
from nanovlm.config import SamplingConfig, VideoConfig
from nanovlm.data.chat import Processor
from nanovlm.data.columns import parse_fields
from nanovlm.data.source import Source, first_pass
from nanovlm.data.sources import open_source, open_sources
from nanovlm.data.video import shows_video
from nanovlm.environment import find_device, keep_freed_memory
from nanovlm.errors import UserError
from nanovlm.eval.benchmarks import BENCHMARKS
from nanovlm.eval.compare import compare, format_comparison, read_answers
from nanovlm.eval.controls import TrainingScan, blank_images, shuffled_images, still_images
from nanovlm.eval.judge import Judge, open_judge
from nanovlm.eval.likelihood import score_by_likelihood
from nanovlm.eval.questions import MAX_NEW_TOKENS, Question, Task
from nanovlm.eval.report import Answers, write_report
from nanovlm.eval.scores import format_table, summarise
from nanovlm.eval.tasks import TASKS, TRAINED_ON, open_records, open_task, read_questions
from nanovlm.infer.asking import answer_all
from nanovlm.infer.engine import Engine
from nanovlm.infer.likelihood import check_branches
from nanovlm.infer.request import Request
from nanovlm.model.inference import prepare
from nanovlm.model.vlm import VLM

NUM_ROWS = 128  # answers at a time
CACHE_TOKENS = 32768  # for the longest prompt and its answer, where the model has so many positions
__all__ = ["MAX_NEW_TOKENS", "answer", "collect", "evaluate", "format_table"]


def answer(
    model: VLM,
    processor: Processor,
    questions: list[Question],
    images: list[list[Image.Image]] | None = None,
    title: str | None = None,
    cache_format: str = "float",
) -> list[str]:
    """Generate the greedy answer to each question, about `images` if given, else its own; a title shows progress.

    Prompts are made one by one as rows of the engine become free. A question for which there are too few positions, or
    too little memory, has an empty answer, so that the others are not lost; a line on stderr names it. Raises UserError
    where an answer may be so long that no prompt would fit.
    """
    images = images or [question.images for question in questions]
    engine = open_engine(model, NUM_ROWS, cache_format)
    answers, asked = [""] * len(questions), []
    if (most := max((question.max_new_tokens for question in questions), default=0)) >= engine.longest:
        raise UserError(f"answers of up to {most} tokens do not fit {engine.longest} positions: lower --max-new-tokens")

    def leave_empty(question: Question, cause: str):
        tqdm.write(f"note: {describe(question)} is left without an answer: {cause}", file=sys.stderr)
        progress.update()

    def requests() -> Iterator[Request]:
        for i, (question, shown) in enumerate(zip(questions, images, strict=True)):
            prompt, num = processor.prompt(question.messages, shown), question.max_new_tokens
            if len(prompt) + num > engine.longest:
                cause = f"it takes {len(prompt)} tokens and its answer up to {num}, the engine {engine.longest}"
                leave_empty(question, f"{cause} (--max-new-tokens lowers it)")
                continue
            asked.append(i)
            yield Request(prompt, SamplingConfig(max_new_tokens=num))

    with tqdm(total=len(questions), desc=title, disable=title is None, unit="answer") as progress:
        for done in answer_all(engine, requests()):
            i = asked[done.request]
            if done.end.reason == "error":
                leave_empty(questions[i], done.end.message)
            else:
                answers[i] = processor.decode(done.ids)
                progress.update()
    return answers


def open_engine(model: VLM, num_rows: int, cache_format: str = "float") -> Engine:
    """Return an engine for so many answers at a time; a prompt and its answer may have Engine.longest tokens.

    That is what the model has positions for, at most CACHE_TOKENS or 512 for each row. On a CPU the system gives the
    cache its memory when it is written to.
    """
    longest = model.config.decoder.max_position_embeddings
    room = max(min(longest, CACHE_TOKENS), num_rows * min(longest, 512))
    return Engine(model, num_rows, cache_tokens=room, cache_format=cache_format)


def describe(question: Question) -> str:
    return f"the question {question.text[:200]!r} of record {question.record}"


def collect(
    model: VLM,
    processor: Processor,
    questions: list[Question],
    training: TrainingScan | None = None,
    controls: bool = False,
    title: str | None = None,
    cache_format: str = "float",
) -> dict[str, list[str]]:
    """Return the answers to the questions under `accuracy`, and those of the controls by their names.

    All are asked in one go, so that an image which is shown twice is encoded once.
    """
    asked = {"accuracy": (questions, [question.images for question in questions])}
    if controls and any(question.images for question in questions):
        asked["blank"] = questions, blank_images(questions)
        asked["shuffled"] = questions, shuffled_images(questions)
        if any(shows_video(question.messages) for question in questions):
            asked["still"] = questions, still_images(questions)
        bare = [question.without_images() for question in questions]
        asked["alone"] = bare, [[] for _ in bare]
    everything = [question for qs, _ in asked.values() for question in qs]
    shown = [images for _, all_images in asked.values() for images in all_images]
    answers = iter(answer(model, processor, everything, shown, title, cache_format))
    columns = {name: list(itertools.islice(answers, len(qs))) for name, (qs, _) in asked.items()}
    if training:
        columns["majority"] = [training.guess(question) for question in questions]
    return columns


def evaluate(
    model: VLM,
    processor: Processor,
    task: Task,
    questions: list[Question],
    training: TrainingScan | None = None,
    controls: bool = False,
    title: str | None = None,
) -> dict:
    """Return `{"mean", "overall", "n", "dropped", "intervals", "kinds": {kind: {"accuracy", "n"}}}` and other figures.

    `accuracy` is the task's main figure, which `figure` names if it is another one; `mean` is its mean over the kinds
    of question, `overall` that over the questions; all but CIDEr are between 0 and 1. `intervals` has the 95 % interval
    of each figure. With `controls`, and if there are images, there are `blank`, `shuffled` and `alone` for each kind,
    and their means. With `training` there is `majority` too, and records with a training image are left out: `dropped`
    counts them. If none is left there is no mean.
    """
    questions, dropped = leave_out(questions, training)
    columns = collect(model, processor, questions, training, controls, title)
    return summarise(task, questions, columns, dropped)[0]


def leave_out(questions: list[Question], training: TrainingScan | None) -> tuple[list[Question], int]:
    """Return the questions of records without a training image, and the number of the others."""
    num_records = len({question.record for question in questions})
    questions = training.leave_out(questions) if training else questions
    return questions, num_records - len({question.record for question in questions})


@dataclass(frozen=True)
class AskConfig:
    # A model folder, or owner/name on the hub.
    model: str
    # What to ask: names of tasks, or sources of records.
    tasks: tuple[str, ...] = ()
    # Files of yours to ask: sources of records, as for training.
    data: tuple[str, ...] = ()
    # How answers to records are scored: names of metrics, the main one first. Without one they must match exactly.
    metric: tuple[str, ...] = ()
    # The layout of the records, if it is not to be recognised, and the names of their columns, as in image=img.
    layout: str = ""
    fields: tuple[str, ...] = ()
    # Fetch images that records name by an http or https address.
    allow_urls: bool = False
    # Which frames are shown of a record's video.
    video: VideoConfig = field(default_factory=VideoConfig)
    # How many records of a task are asked, from its first on.
    limit: int = 512
    # Where answers are cut off; 0 for the task's own limit.
    max_new_tokens: int = 0
    # What the model was trained on: its first 50,000 records give the commonest answers, and questions about their
    # images are left out. Drawn scenes are compared with those of training if nothing is named.
    training: tuple[str, ...] = ()
    # Also ask about grey images, another record's images and without any.
    controls: bool = True
    # Score the options of multiple choices by their log-probability, too.
    likelihood: bool = False
    # A judge of answers that do not match a reference: the address of an OpenAI-compatible server, such as
    # http://localhost:8000/v1, or a model folder; and the name by which the server calls the model.
    judge: str = ""
    judge_model: str = ""
    # Another model to compare with on the same questions, or a folder that --out wrote for one.
    compare: str = ""
    # A folder for all answers (answers.jsonl), the figures (scores.json) and a page to look at (report.html).
    out: Path | None = None
    # A folder with copies of data sets of the hub, as owner/name, in place of the hub.
    root: str = ""
    # What the cache keeps of keys and values while answers are made: themselves, or codes of 8 or 4 bits.
    cache_format: Literal["float", "int8", "int4"] = "float"
    # Print one JSON object instead of the table.
    json: bool = False
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "auto"


def main(config: AskConfig):
    """Print the scores of a model, and write the report."""
    keep_freed_memory()
    tasks = open_tasks(config)
    asked = [(task, read_questions(task)) for task in tasks]
    if config.max_new_tokens:
        asked = [(task, [replace(q, max_new_tokens=config.max_new_tokens) for q in qs]) for task, qs in asked]
    if config.likelihood and not any(question.choices for _, questions in asked for question in questions):
        raise UserError("--likelihood needs questions with options, and there is none")
    others = read_answers(Path(config.compare)) if config.compare and is_answers(config.compare) else None
    device = find_device(config.device)
    model, processor = load(config.model, device)
    if config.likelihood:
        check_branches(model.config.decoder)
    prepare(model)
    judge = open_judge(config.judge, config.judge_model, config.out, device) if config.judge else None
    scans = scan_training(config, tasks)
    answers = [
        examine(model, processor, task, questions, scans.get(task.name), config, judge) for task, questions in asked
    ]
    if config.compare and others is None:
        del model
        other, other_processor = load(config.compare, device)
        prepare(other)
        plain = replace(config, controls=False, likelihood=False)
        others = {
            own.task: examine(other, other_processor, task, own.questions, None, plain, judge).lines()
            for own, task in zip(answers, tasks, strict=True)
        }
    comparisons = {own.task: compare(own.lines(), others, own.task) for own in answers} if others is not None else {}
    results = {own.task: own.result for own in answers}
    for name, comparison in comparisons.items():
        results[name]["compared"] = comparison
    if config.out:
        write_report(config.out, str(config.model), answers, others, config.compare)
    print(json.dumps(results) if config.json else format_table(results))
    if not config.json:
        for name, comparison in comparisons.items():
            print(format_comparison(name, comparison, str(config.model), config.compare))
        for task in tasks:
            if task.name not in scans and not config.training:
                print(f"{task.name}: no majority column, as --training does not say what the model was trained on")
        if config.out:
            print(f"the answers are in {config.out / 'answers.jsonl'}; look at {config.out / 'report.html'}")


def open_tasks(config: AskConfig) -> list[Task]:
    """Open what is asked. Raises UserError for options that do not go together."""
    if config.limit < 1:
        raise UserError(f"--limit {config.limit} must be at least 1")
    if config.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens {config.max_new_tokens} must be 0 or more")
    config.video.validate("--video.")
    if not config.tasks and not config.data:
        raise UserError(
            "nothing to ask: give --data FILE with records of yours (and --metric), or --tasks with one or more of "
            f"{', '.join((*TASKS, *BENCHMARKS))}"
        )
    named = [name for name in config.tasks if name in TASKS or name in BENCHMARKS]
    if config.metric and not config.data and len(named) == len(config.tasks):
        raise UserError(f"--metric is for records of --data; {', '.join(named)} have metrics of their own")
    if len(names := (*config.tasks, *config.data)) != len(set(names)):
        raise UserError(f"each task can be asked once, and these are named: {', '.join(names)}")
    how = {
        "metrics": config.metric,
        "layout": config.layout,
        "fields": parse_fields(config.fields),
        "allow_urls": config.allow_urls,
        "video": config.video,
    }
    return [open_task(name, config.limit, config.root, **how) for name in config.tasks] + [
        open_records(spec, config.limit, **how) for spec in config.data
    ]


def scan_training(config: AskConfig, tasks: Sequence[Task]) -> dict[str, TrainingScan]:
    """Scan the training records that each task is compared with: those named, or drawn scenes for drawn scenes."""
    compared = [task.name for task in tasks if config.training or task.name in TRAINED_ON]
    if not compared:
        return {}
    if not config.training:
        sources = {name: TRAINED_ON[name] for name in compared}
        scans = {spec: scan_source(open_source(spec)) for spec in dict.fromkeys(sources.values())}
        return {name: scans[spec] for name, spec in sources.items()}
    source = open_sources(config.training, shuffle=False, allow_urls=config.allow_urls)
    scan = scan_source(source, layout=config.layout, fields=parse_fields(config.fields), video=config.video)
    if not scan.num_read:
        raise UserError(
            f"no record of --training {' '.join(config.training)} can be read as those that are asked are, by --layout "
            f"{config.layout or 'of their keys'} and --fields {' '.join(config.fields) or 'of their own'}: write both "
            "with the same columns"
        )
    return dict.fromkeys(compared, scan)


def scan_source(source: Source, **how) -> TrainingScan:
    return TrainingScan(source, (ref.key for ref in first_pass(source)), **how)


def is_answers(name: str) -> bool:
    """Return whether a name is that of stored answers and not of a model."""
    path = Path(name)
    return path.is_file() or (path / "answers.jsonl").is_file()


def examine(
    model: VLM,
    processor: Processor,
    task: Task,
    questions: list[Question],
    training: TrainingScan | None,
    config: AskConfig,
    judge: Judge | None = None,
) -> Answers:
    """Ask a model all questions of a task; return its answers and their scores."""
    questions, dropped = leave_out(questions, training)
    columns = collect(model, processor, questions, training, config.controls, task.name, config.cache_format)
    more: list[dict[str, float]] = [{} for _ in questions]
    if config.likelihood:
        found = score_by_likelihood(model, processor, questions, f"{task.name}, likelihood")
        more = [old | new for old, new in zip(more, found, strict=True)]
    if judge:
        found = judge.score(questions, columns["accuracy"], f"{task.name}, judge")
        more = [old | new for old, new in zip(more, found, strict=True)]
    result, scores = summarise(task, questions, columns, dropped, more)
    return Answers(task.name, questions, columns, scores, result)


def command():
    """Run `python -m nanovlm.eval.run`, or the command nanovlm-eval."""
    import tyro  # only a command needs it

    cli.run(lambda: main(tyro.cli(AskConfig, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))))


if __name__ == "__main__":
    command()
