"""Published benchmarks whose answers are mostly the letter of an option."""

import ast
import random
import re

from nanovlm.errors import UserError
from nanovlm.eval.letters import LETTERS, find_letter, find_mmmu_letter
from nanovlm.eval.metrics import letter, needed
from nanovlm.eval.published import (
    LETTER,
    NO_LIMIT,
    Asked,
    Published,
    by,
    get,
    get_texts,
    index_to_letter,
    list_options,
    picture,
)
from nanovlm.eval.questions import Question

YES_OR_NO = " Please answer yes or no."  # in some questions of MMStar, whose answer is a letter all the same
SEED = 0  # of the letters that are drawn for answers without one


def letter_of_choices(question: Question, answer: str) -> float:
    """Read the letter out of the answer, lenient."""
    return letter(answer, question.references, LETTERS[: len(question.choices)])


def ask_mmstar(record: dict) -> Asked:
    """The options are part of the question; there are always four."""
    text = get(record, "question").strip().replace(YES_OR_NO, "") + LETTER.rstrip(".")
    kind = f"{get(record, 'category')}: {get(record, 'l2_category')}"
    return Asked(text, (get(record, "answer").strip().upper(),), [picture(record)], kind, tuple("ABCD"))


def ask_ai2d(record: dict) -> Asked:
    options = get_texts(record, "options")
    text = f"{get(record, 'question')}\n{list_options(options)}{LETTER}"
    return Asked(text, (index_to_letter(record, "answer", options),), [picture(record)], choices=options)


def ask_scienceqa(record: dict) -> Asked:
    options, hint = get_texts(record, "choices"), record.get("hint")
    context = f"Context: {hint}\n" if hint else ""
    text = f"{context}{get(record, 'question')}\n{list_options(options)}{LETTER}"
    images = [] if record.get("image") is None else [picture(record)]
    kind = str(record.get("subject") or "question")
    return Asked(text, (index_to_letter(record, "answer", options),), images, kind, options)


def ask_realworldqa(record: dict) -> Asked:
    """A question has its options and what to answer in its own text."""
    truth = get(record, "answer").strip()
    is_choice = truth.upper() in tuple("ABCD")
    kind, choices = ("choice", tuple("ABCD")) if is_choice else ("open", ())
    return Asked(get(record, "question").strip(), (truth,), [picture(record)], kind, choices)


def score_realworldqa(question: Question, answer: str) -> float:
    """Read a letter out of the answer where one is asked; else compare in lower case, without a last full stop."""
    if question.choices:
        return float(find_letter(answer) == question.truth.upper())
    return float(answer.lower().strip().rstrip(".") == question.truth.lower())


# --- MMMU ------------------------------------------------------------------------------------------------------


def ask_mmmu(record: dict) -> Asked:
    """Questions and options show their images by `<image 1>`, which become image parts in their places."""
    subject = re.fullmatch(r"[a-z]+_(.+)_\d+", get(record, "id"))
    options = _literal(get(record, "options"), "options")
    if get(record, "question_type") == "multiple-choice":
        text = f"{get(record, 'question')}\n{list_options(options)}\n\n{LETTER.strip()}"
        references = (get(record, "answer"),)
    else:
        text = f"{get(record, 'question')}\n\nAnswer the question using a single word or phrase."
        answer = get(record, "answer")
        references = _literal(answer, "answer") if answer.startswith("[") else (answer,)
        options = ()
    images, parts = [], []
    for i, piece in enumerate(re.split(r"<image (\d+)>", text)):
        if i % 2:
            images.append(picture(record, f"image_{piece}"))
            parts.append({"type": "image"})
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return Asked(parts, references, images, subject[1] if subject else "question", options)


def _literal(text: str, key: str) -> tuple[str, ...]:
    """Read a list that a column has as the text of Python's list."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        values = None
    if not isinstance(values, list):
        raise UserError(f"the column {key} must hold a list in Python's form, not {text[:80]!r}")
    return tuple(map(str, values))


def score_mmmu(question: Question, answer: str) -> float:
    """Compare letters, one drawn at random where the answer has none; an open answer may hold the reference."""
    if question.choices:
        chosen = find_mmmu_letter(answer, question.choices)
        drawn = random.Random(f"{SEED} {question.record}").choice(LETTERS[: len(question.choices)])
        return float((chosen or drawn) in question.references)
    said = read_mmmu_values(answer)
    true = [value for reference in question.references for value in _mmmu_forms(reference)]
    numbers, texts = ([t for t in true if isinstance(t, kind)] for kind in (float, str))
    return float(any(value in numbers if isinstance(value, float) else _holds(value, texts) for value in said))


def _holds(text, parts):
    return any(part in text for part in parts)


def is_unread_by_mmmu(question: Question, answer: str) -> float:
    """Return whether the answer to a multiple choice has no letter, so that one is drawn."""
    return float(bool(question.choices) and find_mmmu_letter(answer, question.choices) is None)


# After these words of an open answer stands what it says; "=" counts in its last line.
KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBER_FORMS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def read_mmmu_values(answer: str) -> set[str | float]:
    """Return what an open answer may mean, by MMMU's rules: ends of lines after key words, and numbers in them."""
    whole = answer.strip().strip(".").lower()
    lines, ends = whole.split("\n"), []
    for number, line in enumerate(lines):
        shortest = ""
        for key in (*KEYS, "=") if number == len(lines) - 1 else KEYS:
            end = line.split(key)[-1].strip()
            if key in line and (not shortest or len(end) < len(shortest)):
                shortest = end
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            ends.append(shortest)
    ends = ends or [whole]
    numbers = [number for end in ends for form in NUMBER_FORMS for number in re.findall(form, end)]
    return {form for value in ends + numbers for form in _mmmu_forms(value)}


def _mmmu_forms(text: str) -> list[str | float]:
    """Return a number rounded to hundredths, or a text in lower case; a single letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


# --- MathVista -------------------------------------------------------------------------------------------------

HINTS = {
    "integer": "Answer the question using a single integer number.",
    "float": "Answer the question using a single floating-point number with {} decimal place{}.",
    "list": "Answer the question using a Python list.",
}


def ask_mathvista(record: dict) -> Asked:
    options = get_texts(record, "choices") if record.get("choices") else ()
    unit = f" (Unit: {record['unit']})" if record.get("unit") else ""
    places = int(record.get("precision") or 0)
    hint = {1: HINTS["float"].format("one", ""), 2: HINTS["float"].format("two", "s")}.get(places, "")
    if get(record, "question_type") == "multi_choice":
        hint = LETTER.strip()
    elif get(record, "answer_type") != "float":
        hint = HINTS.get(record["answer_type"], "")
    lines = [get(record, "question") + unit, list_options(options), hint]
    text, metadata = "\n".join(filter(None, lines)), record.get("metadata") or {}
    kind = f"{record['answer_type']}{places or ''}" if not options else "choice"
    truth = get(record, "answer")
    return Asked(text, (truth,), [picture(record, "decoded_image")], f"{metadata.get('task', '?')}: {kind}", options)


def score_mathvista(question: Question, answer: str, is_lenient: bool = False) -> float:
    """Compare the option that the answer chooses, or its number rounded as the answer is.

    Strict, the answer is the letter or the text of an option, or a number alone. Lenient, a letter is read out of it by
    patterns, else the most similar option is taken, or the last number in it. MathVista itself lets a language model
    read the answer: see `--judge`.
    """
    if question.choices:
        return float(_choose(answer, question.choices, is_lenient) == question.truth)
    form = question.kind.rpartition(": ")[2]
    if form == "list":
        return float(answer == question.truth)
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer.replace(",", "")) if is_lenient else [answer]
    try:
        number = float(numbers[-1])
        said = str(int(number)) if form == "integer" else str(round(number, int(form.removeprefix("float") or 0)))
    except (ValueError, OverflowError, IndexError):
        return 0.0
    return float(said == question.truth)


def _choose(answer, choices, is_lenient):
    if answer in choices:
        return answer
    letters = LETTERS[: len(choices)]
    bare = answer.strip("(). ")
    chosen = bare if bare and bare in letters and len(bare) == 1 else None
    if chosen is None and is_lenient:
        chosen = find_letter(answer, letters)
    if chosen is not None:
        return choices[letters.index(chosen)]
    distance = needed("anls.metrics.dist").levenshtein_distance
    return min(choices, key=lambda choice: distance(answer, choice)) if is_lenient else None


MULTIPLE_CHOICE = {
    "mmstar": Published(
        "Lin-Chen/MMStar",
        "",
        "val",
        ask_mmstar,
        by("letter_mmstar", "letter_strict"),
        NO_LIMIT,
        kinds="`category` and `l2_category`",
        score="mean over kinds, as each of six categories has three",
    ),
    "mmmu": Published(
        "lmms-lab-encoder/MMMU",
        "",
        "validation",
        ask_mmmu,
        {"accuracy": score_mmmu, "drawn_at_random": is_unread_by_mmmu},
        128,
        kinds="the subject, from `id`",
    ),
    "mathvista": Published(
        "AI4Math/MathVista",
        "",
        "testmini",
        ask_mathvista,
        {"accuracy": score_mathvista, "accuracy_lenient": lambda q, a: score_mathvista(q, a, is_lenient=True)},
        NO_LIMIT,
        kinds="`task`, and form of the answer",
    ),
    "ai2d": Published(
        "lmms-lab-encoder/ai2d", "", "test", ask_ai2d, by("letter_ai2d") | {"letter": letter_of_choices}, 16
    ),
    "scienceqa": Published(
        "lmms-lab-encoder/ScienceQA",
        "ScienceQA-IMG",
        "test",
        ask_scienceqa,
        by("letter_strict") | {"letter": letter_of_choices},
        16,
        kinds="`subject`",
    ),
    "realworldqa": Published(
        "lmms-lab-encoder/RealWorldQA",
        "",
        "test",
        ask_realworldqa,
        {"accuracy": score_realworldqa},
        16,
        kinds="choice and open",
    ),
}
