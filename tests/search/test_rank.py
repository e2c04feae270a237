"""BM25 has the scores of its published formula; fused ranks those of theirs."""

import math
import random

import pytest

from nanovlm.search.rank import Words, fuse, words_of, write_words

TEXTS = [
    "The learning rate falls along a cosine.",
    "A run that was killed resumes from its last checkpoint; the learning rate goes on where it was.",
    "row_length is how long a row is",
    "",
    "Rows are packed: a row holds documents, and documents never see each other. Rows, rows, rows!",
]


def bm25(question: str, texts: list[str], k1=1.5, b=0.75) -> list[float]:
    """The formula of Lucene's BM25, without its constant factor k1 + 1, word by word."""
    corpus = [words_of(text) for text in texts]
    mean = sum(map(len, corpus)) / len(corpus)
    scores = [0.0] * len(texts)
    for word in words_of(question):
        n = sum(word in words for words in corpus)
        idf = math.log(1 + (len(corpus) - n + 0.5) / (n + 0.5))
        for i, words in enumerate(corpus):
            tf = words.count(word)
            scores[i] += idf * tf / (tf + k1 * (1 - b + b * len(words) / mean))
    return scores


@pytest.mark.parametrize("question", ["the learning rate", "rows of documents", "what is row_length?", "killed killed"])
def test_scores_are_those_of_the_formula(tmp_path, question):
    write_words(tmp_path, TEXTS)
    found = Words(tmp_path).search(question, 10)
    truth = {i: score for i, score in enumerate(bm25(question, TEXTS)) if score > 0}
    assert dict(found) == pytest.approx(truth, rel=1e-5) and truth
    assert [row for row, _ in found] == sorted(truth, key=lambda i: -truth[i])
    assert Words(tmp_path).search(question, 1) == found[:1]


def test_what_shares_no_word_is_not_found(tmp_path):
    write_words(tmp_path, TEXTS)
    assert (
        Words(tmp_path).search("zebra", 3) == Words(tmp_path).search("", 3) == Words(tmp_path).search("of the", 3) == []
    )
    write_words(tmp_path / "empty", ["", "the"])
    assert Words(tmp_path / "empty").search("rows", 3) == []


def test_a_name_is_found_by_its_parts_too():
    assert words_of("The `row_length` of data/packing.py") == ["row_length", "row", "length", "data", "packing", "py"]


def test_fused_ranks_have_the_published_scores():
    rng = random.Random(0)
    rankings = [rng.sample(range(12), 9), rng.sample(range(12), 5), [3]]
    truth = {row: sum(1 / (61 + r.index(row)) for r in rankings if row in r) for row in range(12)}
    found = fuse(rankings)
    assert dict(found) == pytest.approx({row: score for row, score in truth.items() if score})
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert fuse([]) == fuse([[], []]) == []
