"""What a model is asked: a question with its references, and the interface of a task."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from PIL import Image

from nanovlm.config import VideoConfig
from nanovlm.data.records import choices, content_parts, references, to_sample, turns_of_texts
from nanovlm.errors import printable

MAX_NEW_TOKENS = 48


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
    # The options of a multiple choice, in the order of their letters.
    choices: tuple[str, ...] = ()
    # Where an answer is cut off.
    max_new_tokens: int = MAX_NEW_TOKENS

    @property
    def text(self) -> str:
        """What the user says in the last turn."""
        return text_of(self.messages[-1])

    @property
    def truth(self) -> str:
        return self.references[0]

    def without_images(self) -> "Question":
        """Return the question alone: what a model can answer without looking."""
        messages = [
            {**m, "content": [part for part in content_parts(m["content"]) if part["type"] == "text"]}
            for m in self.messages
        ]
        return replace(self, images=[], messages=messages)


class Task(Protocol):
    """Questions for a model, and a score for its answers.

    A task may also have `corpus`, names of CORPUS_METRICS (corpus.py) that are taken of all its answers together, and
    `main`, the name of its main figure.
    """

    name: str

    def questions(self) -> Iterator[Question]:
        """Yield the questions, always the same ones, record by record."""
        ...

    def score(self, question: Question, answer: str) -> dict[str, float]:
        """Return figures by name, each between 0 and 1.

        If the task does not name it, its main figure is `accuracy`, or else the first of its corpus metrics, or else
        the first that it returns: the score of a kind is the mean of this, and the task's mean is that of its kinds.
        """
        ...


def ask(
    raw: dict,
    number: int,
    layout: str = "",
    fields: dict | None = None,
    min_ratings: dict[str, int] | None = None,
    video: VideoConfig | None = None,
) -> list[Question]:
    """Turn a raw record (nanovlm/data/records.py) into questions, one for each answer in it.

    In a conversation, earlier turns are shown with their true answers. A turn of `texts`, or a record, may name its
    `kind`, and a turn what else is right as a list, `references`.
    """
    how = {"min_ratings": min_ratings, "layout": layout, "fields": fields}
    sample, right, options = to_sample(raw, **how, video=video), references(raw, **how), choices(raw, **how)
    answers = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
    turns = turns_of_texts(raw, **how) or [{}] * len(answers)
    of_record = "answer" if raw.get("kind") is None else raw["kind"]
    kinds = [of_record if turn.get("kind") is None else turn["kind"] for turn in turns]
    return [
        Question(
            number,
            printable(str(kind)),
            sample.images,
            sample.messages[i - 1 : i] if sample.independent else sample.messages[:i],
            tuple(reference.strip() for reference in (*all_right, *_more_references(turn))),
            options,
        )
        for i, turn, kind, all_right in zip(answers, turns, kinds, right, strict=True)
    ]


def _more_references(turn: dict) -> list[str]:
    found = turn.get("references")
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def text_of(message: dict) -> str:
    """Return the text of a message, without its images."""
    return "".join(part["text"] for part in content_parts(message["content"]) if part["type"] == "text")
