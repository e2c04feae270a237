"""The questions of benchmarks/retrieval.py have their answers in our docs, and its scores are those of SQuAD."""

import json

import pytest

from benchmarks.retrieval import DOCS, QUESTIONS, contains, normalise, score_way, token_f1
from nanovlm.search.documents import Passage

QUESTIONS_ASKED = json.loads(QUESTIONS.read_text())


@pytest.mark.parametrize("one", QUESTIONS_ASKED, ids=[one["question"] for one in QUESTIONS_ASKED])
def test_the_answer_to_each_question_is_in_its_file(one):
    assert contains((DOCS / one["file"]).read_text(), one["answers"][0])


@pytest.mark.parametrize(
    ("said", "truth", "f1"),
    [
        ("The answer is 60 seconds.", "60 seconds", 2 * (2 / 4) / (2 / 4 + 1)),
        ("a grey, grey picture", "Grey", 2 * (1 / 3) / (1 / 3 + 1)),
        ("", "grey", 0),
        ("blue", "grey", 0),
        ("--eval.patience", "eval.patience", 1),
    ],
)
def test_token_f1(said, truth, f1):
    assert token_f1(said, truth) == pytest.approx(f1)


def test_scores_of_a_way():
    questions = [{"question": "q", "answers": ["64 MB", "64"], "file": "a.md"}] * 2
    passage = Passage("a.md", "", 0, 9, "at most 64 MB each", 1.0, None, 1.0)
    line = score_way("words", questions, [[passage], [passage._replace(file="b.md")]], ["64", "it is 64 MB"])
    assert (line["exact"], line["contains"], line["found"]) == (0.5, 1.0, 0.5) and line["f1"] == 0.833
    assert normalise("The 10,000!") == ["10", "000"] and not contains("10,0001", "10,000")
