"""Tasks, which a model is evaluated on. A task has a name, questions, and a way to score an answer.

```
scenes                  held-out drawn scenes
scenes:compositional    drawn scenes with a pair of color and shape that training never shows
questions.jsonl, ...    any source of records (nanovlm/data/sources.py): an answer must match the record's
```

A new task is a class with `name`, `questions` and `score` and an entry of TASKS.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from PIL import Image

from nanovlm.data.reader import explain
from nanovlm.data.records import content_parts, to_sample
from nanovlm.data.scenes import Scenes
from nanovlm.data.source import Source, first_pass
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError, printable
from nanovlm.eval.metrics import exact_match


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a user's turn, and its correct answers."""

    # Number of its record; the questions of a record show the same images.
    record: int
    # Results are averaged over the questions of a kind, then over the kinds.
    kind: str
    images: list[Image.Image]
    messages: list[dict]
    references: tuple[str, ...]

    @property
    def text(self) -> str:
        """What the user says in the last turn."""
        return _text(self.messages[-1])

    @property
    def truth(self) -> str:
        return self.references[0]


class Task(Protocol):
    """Questions for a model, and a score for its answers."""

    name: str

    def questions(self) -> Iterator[Question]:
        """Yield the questions, always the same ones, record by record."""
        ...

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Return figures by name, each between 0 and 1; the task's mean is over `accuracy`."""
        ...


class Records:
    """The questions of the first records of a source; an answer must match the record's word for word."""

    def __init__(self, name: str, source: Source, limit: int):
        self.name, self.source, self.limit = name, source, limit

    def questions(self) -> Iterator[Question]:
        return _questions_of(self.source, self.limit)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        return {"accuracy": float(exact_match(answer, question.references))}


class DrawnScenes:
    """The drawn scenes of a held-out split; captions have many details to miss, so they do not count in the mean."""

    def __init__(self, name: str, split: str, limit: int):
        self.name, self.source, self.limit = name, Scenes(split), limit

    def questions(self) -> Iterator[Question]:
        return _questions_of(self.source, self.limit)

    def score(self, question: Question, answer: str) -> dict[str, float]:
        figure = "caption_exact" if question.kind == "caption" else "accuracy"
        return {figure: float(exact_match(answer, question.references))}


def _questions_of(source: Source, limit: int) -> Iterator[Question]:
    """Yield the questions of the first records of a source. Raises UserError that names a record without any."""
    for number, ref in enumerate(islice(first_pass(source), limit)):
        try:
            questions = ask(source.read(ref.key), number)
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


def ask(raw: dict, number: int) -> list[Question]:
    """Turn a raw record (nanovlm/data/records.py) into questions, one for each answer in it.

    In a conversation, earlier turns are shown with their true answers. A turn of `texts` may name its `kind`.
    """
    sample, turns = to_sample(raw), raw.get("texts") or ()
    answers = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
    kinds = [printable(str(turn.get("kind", "answer"))) for turn in turns] or ["answer"] * len(answers)
    return [
        Question(
            number,
            kind,
            sample.images,
            sample.messages[i - 1 : i] if sample.independent else sample.messages[:i],
            (_text(sample.messages[i]).strip(),),
        )
        for i, kind in zip(answers, kinds, strict=True)
    ]


def _text(message: dict) -> str:
    return "".join(part["text"] for part in content_parts(message["content"]) if part["type"] == "text")


# (name, number of records) -> Task
TASKS = {
    "scenes": lambda name, limit: DrawnScenes(name, "test", limit),
    "scenes:compositional": lambda name, limit: DrawnScenes(name, "compositional", limit),
}


def open_task(name: str, limit: int) -> Task:
    """Return the task of this name, or the records of the source that it names (for a hub source, its test split).

    Raises UserError if the name is neither.
    """
    if name in TASKS:
        return TASKS[name](name, limit)
    try:
        return Records(name, open_source(name, split="test"), limit)
    except ValueError as error:
        raise UserError(
            f"{name!r} is no task; there are {', '.join(TASKS)}, and sources of records: {error}"
        ) from error
