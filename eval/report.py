"""Answers and their scores -> answers.jsonl, scores.json, and report.html, a page to look at."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from nanovlm.errors import printable
from nanovlm.eval.compare import by_place
from nanovlm.eval.questions import Question
from nanovlm.eval.scores import format_table
from nanovlm.files import lock, write_file

SHOWN, SIDE, LONGEST = 12, 240, 600  # samples of a kind, pixels of a thumbnail, characters of a text
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #1b1b1b }
pre { background: #f5f5f3; padding: 1em; overflow-x: auto; font-size: 13px; line-height: 1.35 }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(17em, 1fr)); gap: 1em }
figure { margin: 0; border: 1px solid #d8d8d4; border-radius: 6px; padding: .7em; overflow-wrap: anywhere }
figure img { max-width: 100%; image-rendering: auto } p { margin: .35em 0; white-space: pre-wrap }
.right { border-left: 5px solid #1a7f37 } .wrong { border-left: 5px solid #b42318 }
.note { color: #666; font-size: 13px }
"""


@dataclass(frozen=True)
class Answers:
    """A task's questions, the answers to them and to those of the controls, the figures of each, and of all."""

    task: str
    questions: list[Question]
    columns: dict[str, list[str]]
    scores: list[dict[str, float]]
    result: dict

    def lines(self) -> list[dict]:
        """Return one JSON object for each question."""
        return [
            {
                "task": self.task,
                "number": number,
                "record": question.record,
                "kind": question.kind,
                "question": question.text,
                "references": list(question.references),
                "answer": self.columns["accuracy"][number],
                "scores": self.scores[number],
                "controls": {name: column[number] for name, column in self.columns.items() if name != "accuracy"},
            }
            for number, question in enumerate(self.questions)
        ]


def write_report(
    folder: Path,
    model: str,
    answers: Sequence[Answers],
    others: dict[str, list[dict]] | None = None,
    other: str = "",
):
    """Write all answers, the figures and the page; files of an earlier report are replaced one by one."""
    with lock(folder):
        lines = [json.dumps(line, ensure_ascii=False) for own in answers for line in own.lines()]
        # Half a surrogate pair, which a model may write, is no UTF-8.
        write_file(folder / "answers.jsonl", "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
        results = {own.task: own.result for own in answers}
        write_file(folder / "scores.json", json.dumps({"model": model, "tasks": results}, indent=2))
        write_file(folder / "report.html", draw_page(model, answers, others or {}, other).encode(errors="replace"))


def draw_page(model: str, answers: Sequence[Answers], others: dict[str, list[dict]], other: str) -> str:
    """Write the page: the table, and for each task right and wrong answers and those that are in dispute."""
    table = format_table({own.task: own.result for own in answers})
    parts = [f"<h1>{html.escape(model)}</h1>", f"<pre>{html.escape(table)}</pre>"]
    for own in answers:
        places, theirs = by_place(own.lines()), by_place(others.get(own.task, ()))
        theirs = {line["number"]: theirs[place] for place, line in places.items() if place in theirs}
        parts.append(f"<h2>{html.escape(own.task)}</h2>")
        for title, chosen in choose_samples(own, theirs):
            if chosen:
                figures = "".join(draw_sample(own, number, theirs.get(number), other) for number in chosen)
                parts.append(f'<h3>{html.escape(title)}</h3><div class="samples">{figures}</div>')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(model)}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def choose_samples(own: Answers, theirs: dict[int, dict]) -> list[tuple[str, list[int]]]:
    """Choose, all over the questions, right and wrong ones, and those in dispute, the largest difference first.

    In dispute are questions that the two models answer differently well; without another model, those whose metrics
    differ.
    """
    numbers = [number for number, scores in enumerate(own.scores) if scores]
    main = {number: main_score(own, number) for number in numbers}
    right, wrong = ([n for n in numbers if (main[n] >= 0.5) == is_right] for is_right in (True, False))
    if theirs:
        title = "The two models differ"
        gap = {
            n: abs(main[n] - theirs[n]["scores"][name])
            for n in numbers
            if n in theirs and (name := main_name(own, n)) in theirs[n]["scores"]
        }
    else:
        title = "The metrics differ"
        gap = {n: max(own.scores[n].values()) - min(own.scores[n].values()) for n in numbers}
    disputed = sorted((n for n in gap if gap[n] > 0), key=lambda n: -gap[n])
    return [("Right", spread(right)), ("Wrong", spread(wrong)), (title, disputed[:SHOWN])]


def main_name(own: Answers, number: int) -> str:
    """Return the name of an answer's main figure; a corpus metric has none for a single answer."""
    scores, figure = own.scores[number], own.result.get("figure", "accuracy")
    return figure if figure in scores else next(iter(scores))


def main_score(own: Answers, number: int) -> float:
    return own.scores[number][main_name(own, number)]


def spread(numbers: Sequence[int]) -> list[int]:
    """Choose up to SHOWN of the numbers, evenly."""
    step = max(1, len(numbers) / SHOWN)
    return [numbers[int(i * step)] for i in range(min(SHOWN, len(numbers)))]


def draw_sample(own: Answers, number: int, theirs: dict | None, other: str) -> str:
    """Write one question with its thumbnails, answer, references, figures and what the controls said."""
    question, scores = own.questions[number], own.scores[number]
    lines = [
        *(f'<img alt="image {i + 1}" src="{thumbnail(image)}">' for i, image in enumerate(question.images[:4])),
        f"<p><b>{_show(question.text)}</b></p>",
        f"<p>answer: {_show(own.columns['accuracy'][number]) or '<i>nothing</i>'}</p>",
        f'<p class="note">right: {_show(" | ".join(question.references))}</p>',
    ]
    if theirs:
        lines.append(f'<p class="note">{_show(other)}: {_show(str(theirs["answer"]))}</p>')
    lines.append(
        '<p class="note">' + _show(", ".join(f"{name} {value:.2f}" for name, value in scores.items())) + "</p>"
    )
    controls = [f"{name}: {column[number]}" for name, column in own.columns.items() if name != "accuracy"]
    if controls:
        lines.append(f'<p class="note">{_show("; ".join(controls))}</p>')
    lines.append(f'<p class="note">question {number}, record {question.record}, {_show(question.kind)}</p>')
    verdict = "right" if main_score(own, number) >= 0.5 else "wrong"
    return f'<figure class="{verdict}">{"".join(lines)}</figure>'


def _show(text: str) -> str:
    """Cut a text, escape what a terminal or a browser would obey, and keep its line breaks."""
    return "\n".join(html.escape(printable(line, LONGEST)) for line in text[: 10 * LONGEST].split("\n"))


def thumbnail(image: Image.Image) -> str:
    """Return a copy of an image that fits a square of SIDE pixels as a data: URL."""
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    if (times := SIDE // max(small.size)) > 1:  # pixels large enough to see
        small = small.resize((small.width * times, small.height * times), Image.Resampling.NEAREST)
    file = io.BytesIO()
    small.save(file, "PNG" if max(image.size) <= SIDE else "JPEG", quality=85)
    kind = "png" if max(image.size) <= SIDE else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
