"""Options scored as branches of one question are those scored alone."""

import dataclasses

import pytest
import torch

from nanovlm.data.types import IGNORE, Sample
from nanovlm.eval.likelihood import score_by_likelihood
from nanovlm.eval.questions import Question
from nanovlm.infer.likelihood import make_branches, option_scores
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, make_batch, noise

OPTIONS = ["red", "red and blue", "a", "a large green circle", "1", "10"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VLM(TINY).eval()


def question(number, *, images=1, choices=(), truth="A"):
    text = f"what is number {number}?"
    content = [{"type": "image"} for _ in range(images)] + [{"type": "text", "text": text}]
    pictures = [noise(number + i) for i in range(images)]
    return Question(number, "a", pictures, [{"role": "user", "content": content}], (truth,), tuple(choices))


def score_alone(model, processor, asked, option):
    """Sum the log-probabilities of an option's tokens in a document of its own, and count them."""
    messages = [*asked.messages, {"role": "assistant", "content": option}]
    document = processor.document(Sample(asked.images, messages))
    with torch.inference_mode():
        logits = model.logits(make_batch([document])).double()[0]
    trained = [i for i, label in enumerate(document.labels.tolist()) if label != IGNORE]
    return sum(float(logits[i].log_softmax(-1)[document.labels[i]]) for i in trained), len(trained)


def test_branches_score_as_forwards_of_their_own(model, processor):
    """Questions of different lengths, with and without images, in one batch."""
    asked = [question(0), question(123456), question(2, images=2), question(3, images=0)]
    found = option_scores(model, processor, asked, [OPTIONS, OPTIONS[:3], OPTIONS, OPTIONS])
    assert [len(scores) for scores in found] == [6, 3, 6, 6]
    for one, scores in zip(asked, found, strict=True):
        for option, (total, number) in zip(OPTIONS, scores, strict=False):
            expected, count = score_alone(model, processor, one, option)
            assert number == count and total == pytest.approx(expected, abs=1e-4), option
    assert len({number for _, number in found[0]}) > 2  # options of several lengths
    assert max(total for total, _ in found[0]) - min(total for total, _ in found[0]) > 1


def test_a_question_is_computed_once(processor):
    asked = question(0, images=2)
    document = make_branches(processor, asked, OPTIONS)
    prompt = processor.prompt(asked.messages, asked.images)
    assert int((document.branch_ids == 0).sum()) == len(prompt) - 1  # its last token begins every branch
    assert document.input_ids[: len(prompt) - 1].equal(prompt.input_ids[:-1])
    starts = [int((document.branch_ids == i).nonzero()[0]) for i in range(1, 7)]
    assert {int(document.input_ids[start]) for start in starts} == {int(prompt.input_ids[-1])}
    assert len(document.tiles) == 2


def test_the_likeliest_option_is_compared_with_the_right_letter(model, processor, monkeypatch):
    asked = [question(0, choices=("cat", "a dog", "b"), truth="B"), question(1), question(2, choices=("x", "y"))]
    sums = {
        0: [(-1, 1), (-0.5, 1), (-2, 1), (-3, 3), (-4, 8), (-9, 1)],  # letters: B; texts: cat; per token: a dog
        2: [(-1, 1), (-2, 1), (-2, 1), (-1, 1)],
    }

    def scores(_model, _processor, questions, options, _title):
        assert options == [("A", "B", "C", "cat", "a dog", "b"), ("A", "B", "x", "y")]
        return [sums[one.record] for one in questions]

    monkeypatch.setattr("nanovlm.eval.likelihood.option_scores", scores)
    first, none, last = score_by_likelihood(model, processor, asked)
    assert first == {"likelihood_of_letter": 1, "likelihood_of_text": 0, "likelihood_of_text_per_token": 1}
    assert none == {} and last["likelihood_of_letter"] == 1 and last["likelihood_of_text"] == 0


def test_a_model_without_branches_is_refused(processor):
    decoder = dataclasses.replace(TINY.decoder, prefix_attention="whole_prompt")
    with pytest.raises(
        ValueError, match=r"decoder.prefix_attention = whole_prompt has no branches, which --likelihood"
    ):
        option_scores(VLM(dataclasses.replace(TINY, decoder=decoder)), processor, [question(0)], [OPTIONS])


def test_a_question_that_is_too_long_is_refused(processor):
    decoder = dataclasses.replace(TINY.decoder, max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"a question with its options takes \d+ tokens, the model has 16 positions"):
        option_scores(VLM(dataclasses.replace(TINY, decoder=decoder)), processor, [question(0)], [OPTIONS])
