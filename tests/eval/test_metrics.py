"""The cases by which scorers differ, each against the figure that its definition gives."""

import json
import random
import re
import sys
from pathlib import Path

import anls as anls_package
import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from nanovlm.eval.corpus import CORPUS_METRICS, cider_rows, combine_bleu, tokenise_caption
from nanovlm.eval.letters import find_letter, find_mmmu_letter
from nanovlm.eval.metrics import METRICS, find_yes_no
from nanovlm.eval.normalise import CONTRACTIONS, normalise, normalise_vqav2
from tests.eval.pairs import make_pairs

CASES = {
    "exact_match": [("red", "red", 1), (" red\n", "red", 1), ("Red", "red", 0), ("red.", "red", 0), ("", "red", 0)],
    "exact_match_normalised": [("The Red.", "red", 1), ("two", "2", 1), ("isnt", "isn't", 1), ("reds", "red", 0)],
    # the first case of scoring: half of the characters right
    "anls": [("ax", "ab", 0), ("abx", "abc", 2 / 3), ("AB  C", "ab c", 1), ("", "abc", 0), ("", "", 1)],
    "anls_lenient": [("ax", "ab", 0.5), ("abx", "abc", 2 / 3), ("AB  C", "ab c", 1), ("", "abc", 0), ("", "", 1),
                     ("abc   x", "abc y", 6 / 7)],
    "relaxed_accuracy": [
        ("105", "100", 1), ("100", "105", 1), ("95.1", "100", 1), ("100", "95.1", 0), ("50%", "0.5", 1),
        ("0", "0.0", 0), ("0", "0", 1), ("0.0", "0", 0), ("1,000", "1000", 0), ("Yes", "yes", 1), ("nan", "1", 0),
        ("50", "50%", 0), ("-95", "-100", 1), ("106", "100", 0),
    ],
    "letter": [("B", "B", 1), ("(F)", "F", 1), ("b", "B", 0), ("The answer is C.", "c", 1)],
    "letter_mmstar": [("A", "A", 1), ("A.", "A", 1), ("(A)", "A", 1), ("The answer is A", "A", 1), ("a", "A", 0),
                      ("Answer: A", "A", 1), ("apple", "A", 0), ("B or A", "A", 0), ("B or A", "B", 1), ("F", "F", 0)],
    "letter_strict": [("A", "A", 1), ("a", "A", 1), ("A. x", "A", 1), ("(A)", "A", 0), ("The answer is A", "A", 0),
                      ("a. x", "A", 0)],
    "letter_ai2d": [(" A. x", "A", 1), ("(a)", "A", 1), ("A x", "A", 0), ("B.", "A", 0)],
    "ocrbench": [("It says STOP here", "stop", 1), ("sto\np", "stop", 0), ("a b", "a\nb", 1), ("\uff21", "A", 0)],
    "ocrbench_lenient": [("It says STOP", "stop", 1), ("\uff21\uff22", "AB", 1), ("x", "stop", 0)],
    "ocrbench_formula": [("x ^ 2 = 4", "x^2", 1), ("X^2", "x^2", 0), ("x\n^2", "x ^2", 1)],
    "yes_no": [("Yes", "yes", 1), (" no ", "no", 1), ("Yes, there is.", "yes", 0), ("no", "yes", 0)],
    "yes_no_lenient": [("Yes, there is.", "yes", 1), ("yes and no", "yes", 0), ("nothing", "no", 0), ("No!", "no", 1)],
    "box_iou": [("[0, 0, 1, 1]", "[0, 0, 0.5, 1]", 0.5), ("left", "[0, 0, 1, 1]", 0)],
    "box_hit": [("[0, 0, 1, 1]", "[0, 0, 0.5, 1]", 1), ("[0, 0, 0.4, 1]", "[0, 0, 1, 1]", 0)],
    "box_f1": [("[0, 0, 1, 1] [0, 0, 0.1, 0.1]", "[0, 0, 0.5, 1]", 2 / 3), ("left", "[0, 0, 1, 1]", 0)],
    "point_hit": [("[0.2, 0.2]", "[0, 0, 0.5, 1]", 1), ("[0.6, 0.2]", "[0, 0, 0.5, 1]", 0)],
    "rouge_1": [("a red dog", "the red dog", 2 / 3), ("", "red", 0)],
    "rouge_2": [("a red dog", "the red dog", 1 / 2)],
    "rouge_l": [("dog red", "red dog", 1 / 2), ("red dog", "red dog", 1)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "answer", "reference", "expected"), [(name, *case) for name in CASES for case in CASES[name]]
)
def test_a_metric_gives_its_figure_and_the_best_of_several_references(name, answer, reference, expected):
    assert METRICS[name](answer, (reference,)) == pytest.approx(expected, abs=1e-12)
    worse = "\u2603 unlike it"  # no metric gives anything for it
    assert METRICS[name](answer, (worse, reference, worse)) == pytest.approx(expected, abs=1e-12)


def test_every_metric_has_cases():
    assert CASES.keys() | {"vqa_soft", "vqa_soft_vqav2"} == METRICS.keys()


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
@pytest.mark.parametrize("name", ["vqa_soft", "vqa_soft_vqav2"])
def test_soft_accuracy_leaves_each_reference_out_once(name, matches, expected):
    references = ["red"] * matches + [f"x{i}" for i in range(10 - matches)]
    assert METRICS[name]("The Red.", references) == pytest.approx(expected)


def test_the_two_normalisations_of_vqa_differ_in_possessives():
    assert (normalise("The dog's, 1,000?"), normalise_vqav2("The dog's, 1,000?")) == ("dog 's 1000", "dog's 1000")
    assert normalise("x-y isnt ten/3.5 u.s.") == "x y isn't 10 3.5 us"
    assert normalise("a - b. 1,2 (c)/d") == normalise("b 12 c d") == "b 12 c d"
    assert CONTRACTIONS["couldnt've"] == CONTRACTIONS["couldn'tve"] == "couldn't've" and len(CONTRACTIONS) == 114
    assert normalise("." * 40) == "." * 8  # the scorers take out the first 32 only


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(A) no, (C) yes, (B) no", "B"),  # the last of a kind
        ("is it D or is it B", "B"),  # the end before others
        ("D: is wrong, the answer is B", "D"),  # the beginning before the end
        ("the answer is B, I think so", "B"),  # a phrase before (A)
        ("it is (C) as A. is not", "C"),
        ("C is what I see", "C"),
        ("so C) or D: x", "D"),  # A: before A)
        ("I see aBc", "B"),  # anywhere
        ("nothing", None),
        ("  ", None),
        ("the answer is C, Because", "B"),  # odd, but so it is published: the last capital after a phrase
        ("Dogs", "D"),
        ("USA.", "A"),
    ],
)
def test_a_letter_is_the_last_of_the_best_kind(answer, expected):
    assert find_letter(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(B) and (A)", "A"),
        ("A or B it is", "B"),
        ("it is C.", "C"),
        ("I do not know", None),
        ("it must surely be the big dog", "B"),
        ("surely the big brown dog", None),  # texts count in answers of more than five words
        ("it may be a dog or maybe a cat", "A"),  # the last text
    ],
)
def test_mmmu_reads_letters_and_then_texts(answer, expected):
    assert find_mmmu_letter(answer, ("cat", "dog", "cow")) == expected


def test_anls_is_that_of_its_package_and_equal_to_the_formula():
    """The package has no lenient form; the formula is written out here with a recursive distance."""

    def distance(a, b):
        rows = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            before, rows[0] = rows[0], i
            for j, y in enumerate(b, 1):
                before, rows[j] = rows[j], min(before + (x != y), rows[j] + 1, rows[j - 1] + 1)
        return rows[-1]

    some_half = 0
    for answer, references in make_pairs(seed=1, num=300):
        strict = lenient = 0.0
        for reference in references:
            a, b = (" ".join(x.lower().split()) for x in (answer, reference))
            ratio = distance(a, b) / max(len(a), len(b), 1)
            strict = max(strict, 1 - ratio if ratio < 0.5 else 0.0)
            longest = max(len(answer), len(reference))
            lenient = max(lenient, 1 - distance(a, b) / longest if longest else 1.0)
        assert METRICS["anls"](answer, references) == pytest.approx(strict, abs=1e-12)
        assert METRICS["anls"](answer, references) == anls_package.anls_score(answer, list(references))
        assert METRICS["anls_lenient"](answer, references) == pytest.approx(lenient if lenient >= 0.5 else 0, abs=1e-12)
        some_half += strict != lenient
    assert some_half > 10


def test_rouge_is_that_of_its_package():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for answer, references in make_pairs(seed=2, num=100):
        scores = scorer.score_multi(list(references), answer)
        for name, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
            assert METRICS[name](answer, references) == scores[theirs].fmeasure


def test_bleu_is_that_of_its_package_on_the_whole_corpus():
    answers, references = zip(*make_pairs(seed=3), strict=True)
    most = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    ours = CORPUS_METRICS["bleu"](answers, references)
    for n in range(1, 5):
        theirs = sacrebleu.BLEU(max_ngram_order=n).corpus_score(answers, streams).score / 100
        assert ours[f"bleu_{n}"] == pytest.approx(theirs, abs=1e-12) and 0.1 < theirs < 0.9
    assert ours["bleu_4"] == pytest.approx(sacrebleu.corpus_bleu(answers, streams).score / 100)
    single = CORPUS_METRICS["bleu"](["a b c"], [["a b d"]])  # no 3-gram is right: smoothing
    assert single["bleu_3"] == pytest.approx(
        sacrebleu.BLEU(max_ngram_order=3).corpus_score(["a b c"], [["a b d"]]).score / 100
    )
    assert combine_bleu(np.zeros(10), 1) == dict.fromkeys(("bleu_1", "bleu_2", "bleu_3", "bleu_4"), 0.0)


def test_captions_come_out_as_in_pycocoevalcap():
    """captions.json has what its Java program and its scorer gave for captions drawn at random."""
    theirs = json.loads((Path(__file__).parent / "captions.json").read_text())
    assert len(theirs["tokens"]) > 200
    for caption, tokens in theirs["tokens"].items():
        assert " ".join(tokenise_caption(caption)) == tokens
    ours = cider_rows(theirs["answers"], theirs["references"])[:, 0]
    np.testing.assert_allclose(ours, theirs["cider"], rtol=0, atol=1e-12)
    score = CORPUS_METRICS["cider"](theirs["answers"], theirs["references"])["cider"]
    assert score == pytest.approx(np.mean(theirs["cider"])) and score > 1


def test_a_caption_that_equals_all_references_of_its_image_scores_ten():
    references = [["a red dog runs here"] * 5, ["two cats sleep on a bed"] * 5, ["one bus is parked outside"]]
    answers = ["a red dog runs here", "two cats sleep on a bed", "nothing like it"]
    assert cider_rows(answers, references)[:, 0].tolist() == pytest.approx([10, 10, 0])
    assert cider_rows(answers[:1], references[:1]).tolist() == [[0]]  # of one image nothing is rare


def test_popes_figures_are_those_of_their_definitions():
    rng = random.Random(0)
    truths = [rng.choice(("yes", "no")) for _ in range(300)]
    said = [rng.choice(("Yes", "no", "Yes, there is.", "no dog", "maybe")) for _ in truths]
    for name, read, suffix in (("pope", lambda x: x.lower(), ""), ("pope_lenient", find_yes_no, "_lenient")):
        got = CORPUS_METRICS[name](said, [(truth,) for truth in truths])
        pairs = [(read(x), truth) for x, truth in zip(said, truths, strict=True)]
        right, yes = pairs.count(("yes", "yes")), sum(x == "yes" for x, _ in pairs)
        precision, recall = right / yes, right / truths.count("yes")
        assert got[f"precision{suffix}"] == precision and got[f"recall{suffix}"] == recall
        assert got[f"f1{suffix}"] == pytest.approx(2 * precision * recall / (precision + recall))
        assert got[f"yes_ratio{suffix}"] == yes / 300
        assert got[f"neither_yes_nor_no{suffix}"] == sum(x not in ("yes", "no") for x, _ in pairs) / 300
    none = CORPUS_METRICS["pope"](["x"], [("no",)])
    assert (none["precision"], none["recall"], none["f1"], none["neither_yes_nor_no"]) == (0, 0, 0, 1)


@pytest.mark.parametrize(("metric", "package"), [("anls", "anls"), ("rouge_l", "rouge-score")])
def test_a_missing_package_is_named(monkeypatch, metric, package):
    from nanovlm.eval.metrics import _rouge_scorer

    _rouge_scorer.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == package.replace("-", "_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    with pytest.raises(ValueError, match=re.escape(f'needs the package {package}: pip install -e ".[eval]"')):
        METRICS[metric]("a", ("a",))


def test_pairs_have_what_scorers_differ_in():
    pairs = make_pairs()
    assert len(pairs) == 200 and pairs == make_pairs() and pairs != make_pairs(seed=1)
    for name in (
        "anls",
        "relaxed_accuracy",
        "vqa_soft",
        "ocrbench",
        "exact_match_normalised",
        "letter",
        "letter_mmstar",
    ):
        scores = [METRICS[name](answer, references) for answer, references in pairs]
        assert 0.05 < np.mean(scores) < 0.9, name
    assert sum(METRICS["anls"](*pair) != METRICS["anls_lenient"](*pair) for pair in pairs) >= 5
