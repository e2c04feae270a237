"""Intervals, McNemar's test and comparisons against closed forms."""

import json
import math

import numpy as np
import pytest

from nanovlm.eval import compare as module
from nanovlm.eval.compare import compare, format_comparison, read_answers
from nanovlm.eval.intervals import bootstrap, mcnemar


def mean(sums, number):
    return {"mean": float(sums[0]) / number}


def test_an_interval_is_that_of_the_normal_approximation():
    """Of 2000 independent answers the two agree to a tenth of half the width."""
    right = np.random.default_rng(1).random((2000, 1)) < 0.3
    low, high = bootstrap(right.astype(float), range(2000), mean)["mean"]
    share = right.mean()
    half = 1.96 * math.sqrt(share * (1 - share) / 2000)
    assert (low, high) == pytest.approx((share - half, share + half), abs=0.1 * half)
    assert bootstrap(right.astype(float), range(2000), mean) == {"mean": [low, high]}  # seeded
    assert bootstrap(right.astype(float), range(2000), mean, seed=1) != {"mean": [low, high]}


def test_questions_about_one_image_are_drawn_together():
    """Ten questions that all depend on one image are worth one, not ten."""
    right = np.repeat(np.random.default_rng(2).random(200) < 0.5, 10).astype(float)[:, None]
    alone = bootstrap(right, range(2000), mean)["mean"]
    together = bootstrap(right, np.repeat(np.arange(200), 10).tolist(), mean)["mean"]
    ratio = (together[1] - together[0]) / (alone[1] - alone[0])
    assert ratio == pytest.approx(math.sqrt(10), rel=0.15)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(0, 0, 1), (5, 0, 2 / 32), (1, 6, 2 * 8 / 128), (6, 1, 2 * 8 / 128), (3, 3, 1), (10, 1, 2 * 12 / 2048)],
)
def test_mcnemars_p_is_twice_the_tail_of_the_binomial(first, second, expected):
    assert mcnemar(first, second) == pytest.approx(min(1, expected))


def test_mcnemars_p_of_many_questions_is_that_of_the_normal_approximation():
    """With a correction for continuity: p = erfc((|b - c| - 1) / sqrt(2 (b + c)))."""
    assert mcnemar(5200, 4900) == pytest.approx(math.erfc(299 / math.sqrt(2 * 10100)), rel=1e-2)


def lines(scores, task="t", figure="accuracy", per_record=1):
    return [
        {"task": task, "number": i, "record": i // per_record, "question": f"q{i}", "references": ["a"], "answer": "x",
         "scores": {figure: score}}
        for i, score in enumerate(scores)
    ]  # fmt: skip


def test_two_models_are_compared_on_the_questions_of_both():
    ours, theirs = lines([1, 1, 1, 0, 1, 0.7]), lines([1, 0, 0, 0, 0, 0.2])
    got = compare(ours, {"t": theirs}, "t")
    assert (got["n"], got["only_this_right"], got["only_other_right"]) == (6, 4, 0)
    assert got["this"] == pytest.approx(4.7 / 6) and got["difference"] == pytest.approx(3.5 / 6)
    assert got["p_value"] == pytest.approx(2 / 16)
    assert got["interval"][0] <= got["difference"] <= got["interval"][1] and got["interval"][0] > 0
    text = format_comparison("t", got, "a", "b")
    assert "a 78.3, b 20.0 (accuracy % of 6 questions)" in text and "exact p = 0.125" in text
    swapped = compare(theirs, {"t": ours}, "t")
    assert swapped["difference"] == -got["difference"] and swapped["only_other_right"] == 4


def test_left_out_records_do_not_shift_the_others():
    ours, theirs = lines([1, 0, 1, 1, 0, 0], per_record=2), lines([0, 0, 1, 1, 0, 1], per_record=2)
    fewer = [{**line, "number": line["number"] - 2} for line in theirs[2:]]  # without record 0
    got = compare(ours, {"t": fewer}, "t")
    assert got["n"] == 4 and (got["only_this_right"], got["only_other_right"]) == (0, 1)


def test_what_cannot_be_compared_is_refused():
    ours = lines([1, 0])
    with pytest.raises(ValueError, match="the other answers are to other, not to t"):
        compare(ours, {"other": ours}, "t")
    changed = [{**ours[0], "question": "another"}, ours[1]]
    with pytest.raises(ValueError, match="question 0 of t differs: 'q0' here, 'another' in the other answers"):
        compare(ours, {"t": changed}, "t")
    with pytest.raises(ValueError, match="no question of t was asked of both models and scored in the same way"):
        compare(ours, {"t": lines([1, 0], figure="anls")}, "t")


def test_two_files_of_answers_are_compared(tmp_path, capsys):
    for name, scores in (("a", [1, 1, 0]), ("b", [0, 1, 0])):
        (tmp_path / name).mkdir()
        written = "".join(json.dumps(line) + "\n" for line in [*lines(scores), *lines([0], task=f"only_{name}")])
        (tmp_path / name / "answers.jsonl").write_text(written)
    module.main(tmp_path / "a", tmp_path / "b" / "answers.jsonl")
    out = capsys.readouterr().out
    assert out.count("McNemar") == 1 and "66.7" in out and "33.3" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no answers"),
        ("{", "line 1 of .*answers.jsonl is no answer"),
        ("[]", "line 1 of .* is no answer"),
        ('{"task": "t", "scores": {"a": "b"}}', "line 1 .*scores must be numbers"),
        (
            '{"task": "t", "scores": {"a": 1}, "number": 0, "record": 0}',
            "no answer, question, references",
        ),
    ],
)
def test_a_file_that_holds_no_answers_is_named(tmp_path, text, message):
    (tmp_path / "answers.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_answers(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_answers(tmp_path / "none")
