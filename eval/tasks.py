"""Tasks, which a model is evaluated on. A task has a name, questions, and a way to score an answer.

```
scenes                  held-out drawn scenes
scenes:compositional    drawn scenes with a pair of color and shape that training never shows
scenes_boxes            boxes and points of what is in drawn scenes, as text
scenes_video            drawn clips: what happens in them
documents               drawn documents with templates, fonts and words that training never shows
docvqa, ...             published benchmarks, read from the hub (benchmarks.py)
questions.jsonl, ...    any source of records (nanovlm/data/sources.py), scored by metrics of your choice
```

A new task is a class with `name`, `questions` and `score` and an entry of TASKS; a data set of the hub is an entry of
BENCHMARKS.
"""

import difflib
from collections.abc import Iterator, Sequence
from itertools import islice

from nanovlm.config import VideoConfig
from nanovlm.data.boxes import read_boxes
from nanovlm.data.documents.draw import Documents
from nanovlm.data.reader import explain
from nanovlm.data.scenes import Scenes
from nanovlm.data.scenes_video import Clips
from nanovlm.data.source import Source, first_pass
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError
from nanovlm.eval.benchmarks import BENCHMARKS, Benchmark
from nanovlm.eval.corpus import CORPUS_METRICS
from nanovlm.eval.letters import LETTERS
from nanovlm.eval.metrics import METRICS, box_hit, box_iou, exact_match, letter, point_hit
from nanovlm.eval.questions import Question, Task, ask


class Records:
    """The questions of the first records of a source, scored by metrics; the first of them is the main figure.

    Without metrics an answer must match one of the references word for word. `layout`, `fields` and `min_ratings` are
    as in records.py.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        limit: int,
        metrics: Sequence[str] = (),
        layout: str = "",
        fields: dict | None = None,
        min_ratings: dict[str, int] | None = None,
        video: VideoConfig | None = None,
    ):
        for metric in metrics:
            if metric not in METRICS and metric not in CORPUS_METRICS:
                near = difflib.get_close_matches(metric, [*METRICS, *CORPUS_METRICS], n=3)
                raise UserError(
                    f"{metric!r} is no metric; "
                    + (f"do you mean {' or '.join(near)}? " if near else "")
                    + f"There are {', '.join([*METRICS, *CORPUS_METRICS])}"
                )
        self.name, self.source, self.limit = name, source, limit
        self.how = {"layout": layout, "fields": fields, "min_ratings": min_ratings, "video": video}
        self.metrics = [metric for metric in metrics if metric in METRICS]
        self.corpus = tuple(metric for metric in metrics if metric in CORPUS_METRICS)
        self.main = metrics[0] if metrics else None

    def questions(self) -> Iterator[Question]:
        for question in _questions_of(self.source, self.limit, **self.how):
            for metric in (*self.metrics, *self.corpus):
                if metric in NEEDS and not NEEDS[metric][0](question.references):
                    raise UserError(f"{metric} needs {NEEDS[metric][1]}: {question.text!r} has {question.references!r}")
            yield question

    def score(self, question: Question, answer: str) -> dict[str, float]:
        if self.main is None:
            return {"accuracy": float(exact_match(answer, question.references))}
        said = answer.strip()
        scores = {metric: float(METRICS[metric](said, question.references)) for metric in self.metrics}
        if "letter" in scores and question.choices:
            scores["letter"] = letter(said, question.references, LETTERS[: len(question.choices)])
        return scores


def _are_letters(references):
    return all(len(reference) == 1 and reference.upper() in LETTERS for reference in references)


def _are_yes_or_no(references):
    return {reference.lower() for reference in references} <= {"yes", "no"}


def _have_boxes(references):
    return any(map(read_boxes, references))


# What references must be, so that a metric means anything.
NEEDS = (
    dict.fromkeys(("letter", "letter_mmstar", "letter_strict", "letter_ai2d"), (_are_letters, "letters as references"))
    | dict.fromkeys(("yes_no", "yes_no_lenient", "pope", "pope_lenient"), (_are_yes_or_no, "yes or no as references"))
    | dict.fromkeys(("box_iou", "box_hit", "box_f1", "point_hit"), (_have_boxes, "a reference with a box"))
    | dict.fromkeys(("vqa_soft", "vqa_soft_vqav2"), (lambda x: len(x) >= 4, "at least four references, usually ten"))
)


class DrawnScenes:
    """Drawn scenes or clips, held out; captions have many details to miss, so they do not count in the mean."""

    def __init__(self, name: str, source: Source, limit: int, is_about_places: bool = False):
        self.name, self.source, self.limit = name, source, limit
        self.main, self.score = ("hit", score_place) if is_about_places else ("accuracy", score_words)

    def questions(self) -> Iterator[Question]:
        return _questions_of(self.source, self.limit)


def score_words(question: Question, answer: str) -> dict[str, float]:
    figure = "caption_exact" if question.kind == "caption" else "accuracy"
    return {figure: float(exact_match(answer, question.references))}


def score_place(question: Question, answer: str) -> dict[str, float]:
    """Count a box with an IoU of 0.5 or more as right, and a point that is in the box of what it shows."""
    if question.kind == "point":
        return {"hit": point_hit(answer, question.references)}
    return {"hit": box_hit(answer, question.references), "box_iou": box_iou(answer, question.references)}


class DrawnDocuments:
    """The drawn documents of the split for tests, each kind scored as its published benchmark is."""

    main = "score"

    def __init__(self, name: str, limit: int):
        self.name, self.source, self.limit = name, Documents("test"), limit

    def questions(self) -> Iterator[Question]:
        for metric in dict.fromkeys(DOCUMENT_METRICS.values()):
            METRICS[metric]("1", ["1"])  # says before anything is asked which package it needs
        yield from _questions_of(self.source, self.limit)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        said = answer.strip()
        score = METRICS[DOCUMENT_METRICS[question.kind]](said, question.references)
        return {"score": float(score), "exact": float(exact_match(said, question.references))}


# How answers about drawn documents are scored, by kind: as DocVQA, as ChartQA, word for word.
DOCUMENT_METRICS = (
    dict.fromkeys(("letter", "form", "receipt", "table", "table_reason", "text"), "anls")
    | dict.fromkeys(("chart", "chart_reason"), "relaxed_accuracy")
    | {"formula": "exact_match"}
)


def _questions_of(source: Source, limit: int, **how) -> Iterator[Question]:
    """Yield the questions of the first records of a source. Raises UserError that names a record without any."""
    for number, ref in enumerate(islice(first_pass(source), limit)):
        try:
            questions = ask(source.read(ref.key), number, **how)
        except Exception as error:  # whatever a record does, it is named
            raise UserError(f"{ref.source}, {ref.where}: {explain(error)}") from error
        yield from questions


def read_questions(task: Task) -> list[Question]:
    """Read all questions of a task. Raises UserError that names the task and what is wrong with it."""
    try:
        questions = list(task.questions())
    except ValueError as error:
        raise UserError(f"the task {task.name} cannot be asked: {error}") from error
    if not questions:
        raise UserError(f"the task {task.name} has no questions")
    return questions


# (name, number of records) -> Task
TASKS = {
    "scenes": lambda name, limit: DrawnScenes(name, Scenes("test"), limit),
    "scenes:compositional": lambda name, limit: DrawnScenes(name, Scenes("compositional"), limit),
    "scenes_boxes": lambda name, limit: DrawnScenes(name, Scenes("test", kinds=("box", "point")), limit, True),
    "scenes_video": lambda name, limit: DrawnScenes(name, Clips("test"), limit),
    "documents": DrawnDocuments,
}
# What they are compared with where nobody names what a model was trained on.
TRAINED_ON = {
    "scenes": "scenes",
    "scenes:compositional": "scenes",
    "scenes_boxes": "scenes:box,point",
    "scenes_video": "scenes_video",
}


def open_task(name: str, limit: int, root: str = "", **how) -> Task:
    """Return the task of this name, or the records of the source that it names (for a hub source, its test split).

    `root` is a folder that stands for the hub of a benchmark, `how` is as in `open_records`. Raises UserError if the
    name is neither.
    """
    if name in TASKS:
        return TASKS[name](name, limit)
    if name in BENCHMARKS:
        return Benchmark(name, limit, root)
    return open_records(name, limit, f"{name!r} is no task; there are ", **how)


def open_records(spec: str, limit: int, refusal: str = "", allow_urls: bool = False, **how) -> Task:
    """Return the questions of a source of records, by metrics, layout and fields as in Records.

    Raises UserError, which `refusal` and the names of tasks begin.
    """
    try:
        source = open_source(spec, split="test", allow_urls=allow_urls)
    except ValueError as error:
        names = f"{', '.join((*TASKS, *BENCHMARKS))}, and sources of records: " if refusal else ""
        raise UserError(f"{refusal}{names}{error}") from error
    return Records(spec, source, limit, **how)
