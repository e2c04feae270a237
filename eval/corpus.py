"""All answers and their references -> figures that are no mean of single scores: BLEU, CIDEr, POPE's F1.

A corpus metric is a pair: `rows(answers, references) -> fp64[N, C]` counts for each answer, and `combine(fp64[C], N)
-> {figure: value}` makes the figures of the sum of N rows. So a bootstrap (intervals.py) resamples rows.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from nanovlm.eval.metrics import find_yes_no, needed

ORDERS = 4  # n-grams of one to four words


class CorpusMetric(NamedTuple):
    """Counts for each answer, and the figures of their sum."""

    rows: Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]
    combine: Callable[[np.ndarray, int], dict[str, float]]

    def __call__(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        return self.combine(self.rows(answers, references).sum(0), len(answers))


def bleu_rows(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Count clipped n-grams and n-grams of each order, and the lengths of answer and closest reference: fp64[N, 10]."""
    scorer = needed("sacrebleu").BLEU(effective_order=True)  # which silences a warning; the counts are the same
    scores = [scorer.sentence_score(answer, list(refs)) for answer, refs in zip(answers, references, strict=True)]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in scores], float)


def combine_bleu(sums: np.ndarray, number: int) -> dict[str, float]:
    """Corpus BLEU of up to 1, 2, 3 and 4 words with brevity penalty, as sacrebleu has it by default, from 0 to 1."""
    compute = needed("sacrebleu").BLEU.compute_bleu
    *counts, length, reference = map(round, sums.tolist())  # of whole numbers
    correct, total = counts[:ORDERS], counts[ORDERS:]
    figures = {}
    for n in range(1, ORDERS + 1):
        score = compute(correct[:n], total[:n], length, reference, smooth_method="exp", max_ngram_order=n)
        figures[f"bleu_{n}"] = score.score / 100
    return figures


def cider_rows(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Score each caption by CIDEr-D against the references of all: fp64[N, 1] (Vedantam et al. 2015, arXiv 1411.5726).

    An n-gram weighs its count times log(N / number of images in whose references it occurs); a score is 10 times the
    mean over n of clipped cosines, averaged over references, each times exp(-(difference of lengths)^2 / 72). Lengths
    are in pairs of words, as in pycocoevalcap. With a single image every weight, and so the score, is 0.
    """
    said = [count_ngrams(tokenise_caption(answer)) for answer in answers]
    true = [[count_ngrams(tokenise_caption(reference)) for reference in refs] for refs in references]
    in_images = Counter(gram for refs in true for gram in set().union(*refs))

    def weigh(counts):
        weights = {gram: n * (math.log(len(said)) - math.log(max(1, in_images[gram]))) for gram, n in counts.items()}
        norms = [math.sqrt(sum(w * w for gram, w in weights.items() if len(gram) == n)) for n in range(1, ORDERS + 1)]
        return weights, norms, sum(n for gram, n in counts.items() if len(gram) == 2)

    def similarity(ours, theirs):
        (a, a_norms, a_length), (b, b_norms, b_length) = ours, theirs
        dots = [0.0] * ORDERS
        for gram, weight in a.items():
            other = b.get(gram, 0.0)
            dots[len(gram) - 1] += min(weight, other) * other
        cosines = [d / (x * y) if x * y else d for d, x, y in zip(dots, a_norms, b_norms, strict=True)]
        return sum(cosines) / ORDERS * math.exp(-((a_length - b_length) ** 2) / 72)

    scores = [
        10 * np.mean([similarity(ours, weigh(reference)) for reference in refs])
        for ours, refs in zip(map(weigh, said), true, strict=True)
    ]
    return np.array(scores, float)[:, None]


def combine_cider(sums: np.ndarray, number: int) -> dict[str, float]:
    """Mean of 10 times the tf-idf weighted cosine of n-grams with the references, over all captions (CIDEr-D)."""
    return {"cider": float(sums[0]) / number}


def count_ngrams(words: Sequence[str]) -> Counter:
    """Count the runs of one to four words."""
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def tokenise_caption(text: str) -> list[str]:
    """Split a caption into words by the rules of the Penn Treebank, in lower case and without punctuation.

    pycocoevalcap runs Stanford's Java program for this; nltk has the same rules. As there, an abbreviation at the end
    keeps its full stop, and brackets, which are to go, stay: they are looked up in capitals after lowering the case.
    """
    words = needed("nltk.tokenize").NLTKWordTokenizer().tokenize(text.replace("\n", " ").lower())
    if words[-1:] == ["."] and re.fullmatch(r"(\w\.)+\w", "".join(words[-2:-1])):
        words[-2:] = [words[-2] + "."]
    return [BRACKETS[word] if word in BRACKETS else word for word in words if word not in PUNCTUATION]


PUNCTUATION = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def pope_rows(answers: Sequence[str], references: Sequence[Sequence[str]], read: Callable) -> np.ndarray:
    """Count, for each answer, right yes, wrong yes, missed yes, and an answer that is neither: fp64[N, 4]."""
    rows = []
    for answer, (true, *_) in zip(answers, references, strict=True):
        said, is_yes = read(answer), true.strip().lower() == "yes"
        says_yes = said == "yes"
        rows.append([says_yes and is_yes, says_yes and not is_yes, not says_yes and is_yes, said is None])
    return np.array(rows, float)


def combine_pope(sums: np.ndarray, number: int, suffix: str = "") -> dict[str, float]:
    """Precision, recall and F1 with yes as the positive answer, and the shares of yes and of neither in the answers."""
    right, wrong, missed, neither = sums.tolist()
    figures = {
        "precision": right / (right + wrong) if right + wrong else 0.0,
        "recall": right / (right + missed) if right + missed else 0.0,
        "f1": 2 * right / (2 * right + wrong + missed) if right else 0.0,
        "yes_ratio": (right + wrong) / number,
        "neither_yes_nor_no": neither / number,
    }
    return {name + suffix: value for name, value in figures.items()}


def combine_pope_lenient(sums: np.ndarray, number: int) -> dict[str, float]:
    """The same where an answer may contain one of the words yes and no."""
    return combine_pope(sums, number, suffix="_lenient")


def _read_strictly(answer):
    said = answer.strip().lower()
    return said if said in ("yes", "no") else None


CORPUS_METRICS = {
    "bleu": CorpusMetric(bleu_rows, combine_bleu),
    "cider": CorpusMetric(cider_rows, combine_cider),
    "pope": CorpusMetric(lambda *x: pope_rows(*x, read=_read_strictly), combine_pope),
    "pope_lenient": CorpusMetric(lambda *x: pope_rows(*x, read=find_yes_no), combine_pope_lenient),
}
