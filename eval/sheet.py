"""Questions and answers -> a picture to look at, and lines to read."""

import io

from PIL import Image, ImageDraw, ImageFont, ImageOps

from nanovlm.eval.metrics import exact_match
from nanovlm.eval.questions import Question

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


def describe(question: Question, answer: str) -> str:
    """Put question, answer and truth into one line; unprintable text is escaped."""
    verdict = "right" if exact_match(answer, question.references) else "WRONG"
    asked, said, truth = (x if x.isprintable() else repr(x) for x in (question.text, answer, question.truth))
    return f"{verdict}  {asked} {said} (truth: {truth})"


def draw_sheet(questions: list[Question], answers: list[str]) -> bytes:
    """Draw each question with its first image, the answer (green where it is right) and the truth, as a PNG file."""
    font, cells = ImageFont.load_default(15), []
    for question, said in zip(questions, answers, strict=True):
        color = (0, 110, 40) if exact_match(said, question.references) else (180, 0, 0)
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
