"""Questions and answers -> a picture to look at, and lines to read."""

import io

from PIL import Image, ImageDraw, ImageFont, ImageOps

from nanovlm.eval.metrics import exact_match
from nanovlm.eval.questions import Question, Task
from nanovlm.eval.scores import find_main

COLUMNS, SIDE, GAP, LINE = 4, 256, 12, 18


def choose(questions: list[Question], num: int) -> list[Question]:
    """Choose one question from each of the first `num` records, taking turns among the kinds."""
    by_record = {}
    for question in questions:
        by_record.setdefault(question.record, []).append(question)
    shown, chosen = list(by_record.values())[:num], []
    kinds = list(dict.fromkeys(question.kind for asked in shown for question in asked))
    for number, asked in enumerate(shown):
        wanted = [question for question in asked if question.kind == kinds[number % len(kinds)]]
        chosen.append((wanted or asked)[0])
    return chosen


def judge(task: Task, question: Question, answer: str) -> float:
    """Return the main figure of an answer; of figures that all answers have together, whether it is the truth."""
    figures = task.score(question, answer) or {"exact": float(exact_match(answer, question.references))}
    return figures[find_main(getattr(task, "main", None), [figures], figures)]


def describe(task: Task, question: Question, answer: str) -> str:
    """Put verdict, question, answer and truth into one line; unprintable text is escaped."""
    score = judge(task, question, answer)
    verdict = {0.0: "WRONG", 1.0: "right"}.get(score, f"{score:5.0%}")
    asked, said, truth = (x if x.isprintable() else repr(x) for x in (question.text, answer, question.truth))
    return f"{verdict}  {asked} {said} (truth: {truth})"


def draw_sheet(task: Task, questions: list[Question], answers: list[str]) -> bytes:
    """Draw questions with their first images, answers (green if at least half right) and truths, as a PNG file."""
    font, cells = ImageFont.load_default(15), []
    for question, said in zip(questions, answers, strict=True):
        color = (0, 110, 40) if judge(task, question, said) >= 0.5 else (180, 0, 0)
        lines = [(line, (0, 0, 0)) for line in _wrap(font, question.text)]
        lines += [(line, color) for line in _wrap(font, f"answer: {said}")]
        lines += [(line, (110, 110, 110)) for line in _wrap(font, f"truth: {question.truth}")]
        cells.append(lines)
    height = SIDE + GAP + LINE * max(len(lines) for lines in cells)
    rows = (len(cells) + COLUMNS - 1) // COLUMNS
    sheet = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (question, lines) in enumerate(zip(questions, cells, strict=True)):
        x, y = GAP + i % COLUMNS * (SIDE + GAP), GAP + i // COLUMNS * (height + GAP)
        if question.images:
            is_small = max(question.images[0].size) < SIDE
            method = Image.Resampling.NEAREST if is_small else Image.Resampling.LANCZOS
            sheet.paste(ImageOps.pad(question.images[0], (SIDE, SIDE), method, color="white"), (x, y))
        for number, (line, color) in enumerate(lines):
            canvas.text((x, y + SIDE + 2 + LINE * number), line, fill=color, font=font)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()


def _wrap(font, text):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= SIDE else [*lines, word]
    return lines
