"""An answer and its references -> a figure between 0 and 1.

METRICS scores one answer: `(answer, references) -> float`, and a task's score is the mean. CORPUS_METRICS (corpus.py)
are no mean of single scores. Where published scorers differ, the definition of the paper has the plain name, and the
more lenient form stands beside it.
"""

import importlib
import re
import string
from collections.abc import Callable, Sequence
from functools import cache

from nanovlm.data.boxes import Point, contains, iou, match_boxes, read_boxes, read_places
from nanovlm.errors import UserError
from nanovlm.eval.letters import LETTERS, find_letter
from nanovlm.eval.normalise import normalise, normalise_vqav2


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Return whether the answer equals one of the references; only white space around it is ignored."""
    return answer.strip() in references


def exact_match_normalised(answer: str, references: Sequence[str]) -> float:
    """Compare without case, punctuation and articles, in EvalAI's form (normalise.py)."""
    return float(normalise(answer) in map(normalise, references))


def anls(answer: str, references: Sequence[str]) -> float:
    """Return 1 - distance / length of the longer text if above 0.5, else 0 (Biten et al. 2019, arXiv 1907.00490).

    The distance is Levenshtein's, in lower case and with white space collapsed. The best reference counts.
    """
    return needed("anls").anls_score(answer, list(references))


def anls_lenient(answer: str, references: Sequence[str]) -> float:
    """The same as lmms-eval and VLMEvalKit have it: 0.5 itself counts, and lengths are those before collapsing."""
    distance = needed("anls.metrics.dist").levenshtein_distance

    def similarity(reference):
        length = max(len(answer.upper()), len(reference.upper()))
        apart = distance(" ".join(answer.lower().split()), " ".join(reference.lower().split()))
        return 1 - apart / length if length else 1.0

    best = max(map(similarity, references))
    return best if best >= 0.5 else 0.0


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """Allow numbers to be off by 5 % of the reference; other answers are compared in lower case (arXiv 2203.10244).

    "%" divides by 100, commas are not removed, and a reference of 0 is compared as text.
    """
    return float(any(_is_close(answer, reference) for reference in references))


def _is_close(answer, reference):
    said, true = _to_number(answer), _to_number(reference)
    if said is None or not true:
        return answer.lower() == reference.lower()
    return abs(said - true) / abs(true) <= 0.05


def _to_number(text):
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def vqa_soft(answer: str, references: Sequence[str], form: Callable[[str], str] = normalise) -> float:
    """Return the mean, over the sets that leave one reference out, of min(1, matches / 3) (arXiv 1505.00468)."""
    answer, matches = form(answer), [form(reference) for reference in references]
    equal = [reference == answer for reference in matches]
    return sum(min(1.0, (sum(equal) - own) / 3) for own in equal) / len(equal)


def vqa_soft_vqav2(answer: str, references: Sequence[str]) -> float:
    """The same with VQAv2's normalisation, which differs from TextVQA's in possessives and in "?" and ","."""
    return vqa_soft(answer, references, normalise_vqav2)


def letter(answer: str, references: Sequence[str], letters: str = LETTERS[:8]) -> float:
    """Read the chosen letter out of the answer (letters.py) and compare it with the references."""
    return float(find_letter(answer, letters) in [reference.strip().upper() for reference in references])


def letter_mmstar(answer: str, references: Sequence[str]) -> float:
    """The same among A to D, as MMStar and RealWorldQA have it."""
    return letter(answer, references, LETTERS[:4])


def letter_strict(answer: str, references: Sequence[str]) -> float:
    """Accept the letter alone, in either case, or an answer that begins with it in capitals and a full stop."""
    said = answer.strip()
    said = said[:1] if said[:1].isupper() and said[1:2] == "." else said
    return float(said.lower() in [reference.strip().lower() for reference in references])


def letter_ai2d(answer: str, references: Sequence[str]) -> float:
    """Accept what begins with a capital and a full stop, or the letter in either case among punctuation: AI2D's way."""
    match = re.match(r"\s*([A-Z])\.", answer)
    said = match[1] if match else answer.strip().translate(NO_PUNCTUATION)
    return float(said.lower() in [reference.lower() for reference in references])


NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def ocrbench(answer: str, references: Sequence[str]) -> float:
    """Return whether a reference occurs in the answer, both in lower case (arXiv 2305.07895)."""
    said = _one_line(answer.strip().lower())
    return float(any(_one_line(reference.lower().strip()) in said for reference in references))


def ocrbench_lenient(answer: str, references: Sequence[str]) -> float:
    """The same after full-width characters have become ASCII, as lmms-eval has it."""
    return ocrbench(answer.strip().translate(HALF_WIDTH), [reference.translate(HALF_WIDTH) for reference in references])


def ocrbench_formula(answer: str, references: Sequence[str]) -> float:
    """The form for handwritten formulas (HME100k): without spaces, case kept."""
    said = _one_line(answer.strip()).replace(" ", "")
    return float(any(_one_line(reference.strip()).replace(" ", "") in said for reference in references))


HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


def _one_line(text):
    return text.replace("\n", " ")


def yes_no(answer: str, references: Sequence[str]) -> float:
    """Accept yes or no alone, in any case: POPE, strict."""
    return float(answer.strip().lower() in [reference.strip().lower() for reference in references])


def yes_no_lenient(answer: str, references: Sequence[str]) -> float:
    """Accept an answer that contains one of the words yes and no, and not the other."""
    return float(find_yes_no(answer) in [reference.strip().lower() for reference in references])


def find_yes_no(answer: str) -> str | None:
    """Return which of the words yes and no an answer contains; None for neither or both."""
    words = "".join(c if c.isalnum() else " " for c in answer.lower()).split()
    found = {"yes", "no"} & set(words)
    return found.pop() if len(found) == 1 else None


def box_iou(answer: str, references: Sequence[str]) -> float:
    """Return the IoU of the answer's box and the reference's; of several the mean, of which each has one partner.

    What has no partner counts as 0. The best reference with a box counts.
    """

    def mean(said, true):
        return sum(match_boxes(said, true)) / max(len(said), len(true))

    return max((mean(read_boxes(answer), true) for x in references if (true := read_boxes(x))), default=0.0)


def box_hit(answer: str, references: Sequence[str]) -> float:
    """Return whether the answer's first box has an IoU of at least 0.5 with that of a reference (RefCOCO)."""
    said = read_boxes(answer)[:1]
    return float(any(iou(said[0], true) >= 0.5 for x in references for true in read_boxes(x)[:1]) if said else 0)


def box_f1(answer: str, references: Sequence[str]) -> float:
    """Return the F1 of the answer's boxes: one is right whose IoU with a reference's box of its own is 0.5 or more."""

    def f1(said, true):
        return 2 * sum(overlap >= 0.5 for overlap in match_boxes(said, true)) / (len(said) + len(true))

    return max((f1(read_boxes(answer), true) for x in references if (true := read_boxes(x))), default=0.0)


def point_hit(answer: str, references: Sequence[str]) -> float:
    """Return whether the answer's first point is in a box of a reference."""
    said = [place for place in read_places(answer) if isinstance(place, Point)][:1]
    return float(any(contains(box, point) for point in said for x in references for box in read_boxes(x)))


def rouge(answer: str, references: Sequence[str], kind: str) -> float:
    """Return the F1 of n-grams, or of the longest common subsequence; the best reference counts (rouge-score)."""
    return max(_rouge_scorer(kind).score(reference, answer)[kind].fmeasure for reference in references)


def rouge_1(answer: str, references: Sequence[str]) -> float:
    """F1 of words with the best reference."""
    return rouge(answer, references, "rouge1")


def rouge_2(answer: str, references: Sequence[str]) -> float:
    """F1 of pairs of words with the best reference."""
    return rouge(answer, references, "rouge2")


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words with the best reference."""
    return rouge(answer, references, "rougeL")


@cache
def _rouge_scorer(kind):
    return needed("rouge_score.rouge_scorer").RougeScorer([kind])


def needed(module: str):
    """Import what the extra `eval` installs. Raises UserError that says how."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0].replace("_", "-")
        raise UserError(f'this metric needs the package {package}: pip install -e ".[eval]"') from None


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "exact_match_normalised": exact_match_normalised,
    "anls": anls,
    "anls_lenient": anls_lenient,
    "relaxed_accuracy": relaxed_accuracy,
    "vqa_soft": vqa_soft,
    "vqa_soft_vqav2": vqa_soft_vqav2,
    "letter": letter,
    "letter_mmstar": letter_mmstar,
    "letter_strict": letter_strict,
    "letter_ai2d": letter_ai2d,
    "ocrbench": ocrbench,
    "ocrbench_lenient": ocrbench_lenient,
    "ocrbench_formula": ocrbench_formula,
    "yes_no": yes_no,
    "yes_no_lenient": yes_no_lenient,
    "box_iou": box_iou,
    "box_hit": box_hit,
    "box_f1": box_f1,
    "point_hit": point_hit,
    "rouge_1": rouge_1,
    "rouge_2": rouge_2,
    "rouge_l": rouge_l,
}
