"""A record of a published benchmark -> what is asked, and how its answer is scored: the parts that entries share.

Columns, prompts and token limits are those of lmms-eval (75571cfe, 2026-08), which names the data sets that it reads.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from PIL import Image

from nanovlm.data.images import decode_image
from nanovlm.errors import UserError
from nanovlm.eval.letters import LETTERS
from nanovlm.eval.metrics import METRICS
from nanovlm.eval.questions import Question

# What is written after a question.
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
# Where answers end for which lmms-eval leaves the limit to the model.
NO_LIMIT = 128


class Asked(NamedTuple):
    """One question of a benchmark; `content` is a text, which images precede, or parts of text and image."""

    content: str | list[dict]
    references: tuple[str, ...]
    images: list[Image.Image]
    kind: str = "question"
    choices: tuple[str, ...] = ()


class Published(NamedTuple):
    """A benchmark: where its records are, what they ask and how answers are scored."""

    data: str  # owner/name on the hub
    config: str
    split: str
    ask: Callable[[dict], Asked]
    # The figures of one answer by name; the first is the main one, unless there are corpus metrics.
    figures: dict[str, Callable[[Question, str], float]]
    max_new_tokens: int
    corpus: tuple[str, ...] = ()
    # What the kinds of questions are, and which mean is the published score.
    kinds: str = "one kind"
    score: str = "mean over questions"


def by(*metrics: str) -> dict[str, Callable[[Question, str], float]]:
    """Return figures that are metrics of one answer."""
    return {name: lambda question, answer, name=name: METRICS[name](answer, question.references) for name in metrics}


def get(record: dict, key: str, kind: type | tuple[type, ...] = str) -> Any:
    """Return a column of a record. Raises UserError that names it where it is missing or holds something else."""
    if key not in record:
        raise UserError(f"the record has no column {key}; it has {', '.join(map(str, record))}")
    if not isinstance(record[key], kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"the column {key} must hold a {wanted}, not a {type(record[key]).__name__}")
    return record[key]


def get_texts(record: dict, key: str) -> tuple[str, ...]:
    """Return a column that holds a text or a list of at least one."""
    value = get(record, key, (str, list))
    texts = tuple([value] if isinstance(value, str) else value)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"the column {key} must hold a text or a list of texts, not {value!r}")
    return texts


def picture(record: dict, key: str = "image") -> Image.Image:
    """Decode the image in a column, which `datasets` gives as the bytes of its file."""
    image = get(record, key, dict)
    if not isinstance(image.get("bytes"), bytes):
        raise UserError(f"the column {key} holds no bytes of an image")
    return decode_image(image["bytes"], f"the column {key}")


def list_options(options: Sequence[str]) -> str:
    """Write each option after its letter, one a line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def index_to_letter(record: dict, key: str, choices: Sequence[str]) -> str:
    """Return the letter of the right option, which a column has as its index from 0."""
    index = get(record, key, (int, str))
    if not str(index).isdigit() or int(index) >= len(choices):
        raise UserError(f"the column {key} must be the index of one of {len(choices)} options, not {index!r}")
    return LETTERS[int(index)]
