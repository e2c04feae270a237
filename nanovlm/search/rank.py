"""Words of a question -> passages by BM25; and several rankings -> one.

BM25 (Robertson et al. 1994) in the form that Lucene has, by the package bm25s (arXiv 2407.03618), which computes the
score of each word in each passage when the index is made. A passage t of words, of which n of N have the word q:
idf(q) tf / (tf + k1 (1 - b + b |t| / mean |t|)), idf(q) = log(1 + (N - n + 0.5) / (n + 0.5)), k1 = 1.5, b = 0.75.

Reciprocal rank fusion (Cormack et al. 2009, doi 10.1145/1571941.1572114): a passage has the sum over rankings of
1 / (60 + rank), so that scores of different scales need not be compared.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nanovlm.errors import UserError
from nanovlm.search.extra import needed

RRF = 60
# Words that say nothing about what a text is about.
STOP_WORDS = frozenset(
    "a an and are as at be but by can do does for from had has have how i if in into is it its my no not of on or our "
    "so such that the their then there these they this to was we were what when where which who why will with you "
    "your".split()
)


def words_of(text: str) -> list[str]:
    """Split a text into words in lower case. A name such as row_length is one, and each of its parts is another."""
    found = []
    for word in re.findall(r"\w+", text.lower()):
        parts = [part for part in word.split("_") if part]
        found += [word, *parts] if len(parts) > 1 else parts
    return [word for word in found if word not in STOP_WORDS]


def write_words(folder: Path, texts: Iterable[str]):
    """Add the words of texts to an index; nothing where they have none."""
    corpus = [words_of(text) for text in texts]
    if any(corpus):
        bm25 = needed("bm25s").BM25(k1=1.5, b=0.75, method="lucene")
        bm25.index(corpus, show_progress=False)
        bm25.save(folder, show_progress=False)


class Words:
    """The words of an index, in mapped memory."""

    def __init__(self, folder: Path):
        """Raise UserError where they cannot be read."""
        self.bm25, self.vocabulary = None, frozenset()
        if (folder / "vocab.index.json").is_file():
            try:
                self.bm25 = needed("bm25s").BM25.load(folder, mmap=True)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"the words of the index {folder} are damaged: {error}") from error
            self.vocabulary = self.bm25.vocab_dict.keys()

    def search(self, question: str, k: int) -> list[tuple[int, float]]:
        """Return the rows of the k best passages that share a word with the question, with their scores."""
        words = [word for word in words_of(question) if word in self.vocabulary]
        if self.bm25 is None or not words:
            return []
        scores = self.bm25.get_scores(words)
        best = np.argsort(-scores, kind="stable")[:k]
        return [(int(row), float(scores[row])) for row in best if scores[row] > 0]


def fuse(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Return all rows of some rankings, the best first, with their scores."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, row in enumerate(ranking, start=1):
            scores[row] = scores.get(row, 0.0) + 1 / (RRF + rank)
    return sorted(scores.items(), key=lambda found: (-found[1], found[0]))
