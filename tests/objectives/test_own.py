"""Questions of packed documents are the prompts that the processor makes, and answers become branches."""

import pytest
import torch

from nanovlm.data.types import IGNORE
from nanovlm.objectives.own import OwnAnswer, find_questions, make_document
from tests.conftest import make_batch, noise
from tests.conftest import make_document as make_sample

TURNS = [("what is it?", "red"), ("and where?", "at the top left")]


def read_prompt(processor, seed, *turns, images=1):
    """The prompt of the last of some turns, as generation has it."""
    messages = [
        {"role": role, "content": text}
        for question, answer in turns
        for role, text in (("user", question), ("assistant", answer))
    ]
    return processor.prompt(messages[:-1], [noise(seed + i) for i in range(images)])


def test_the_last_answer_of_a_document_is_asked_for(processor):
    """Also of documents that are packed into rows, the second of which begins with padding's neighbours."""
    documents = [
        make_sample(processor, 0, TURNS[0]),
        make_sample(processor, 10, *TURNS, images=2),
        make_sample(processor, 20, TURNS[1], images=0),
    ]
    found = list(find_questions(make_batch(documents, row_length=300, rows=2), processor))
    expected = [  # dealt out to rows in turns
        read_prompt(processor, 0, TURNS[0]),
        read_prompt(processor, 20, TURNS[1], images=0),
        read_prompt(processor, 10, *TURNS, images=2),
    ]
    assert [question.reference for question in found] == ["red", "at the top left", "at the top left"]
    for question, prompt in zip(found, expected, strict=True):
        for name in ("input_ids", "labels", "branch_ids", "tiles"):
            assert torch.equal(getattr(question.prompt, name), getattr(prompt, name)), name
    assert "and where?" in found[2].text and "<" not in found[2].text


def test_each_branch_of_a_document_is_a_question_of_its_own(processor):
    batch = make_batch([make_sample(processor, 5, *TURNS, independent=True)])
    found = list(find_questions(batch, processor))
    assert [question.reference for question in found] == [answer for _, answer in TURNS]
    for question, turn in zip(found, TURNS, strict=True):
        prompt = read_prompt(processor, 5, turn)
        assert torch.equal(question.prompt.input_ids, prompt.input_ids)
        assert torch.equal(question.prompt.tiles, prompt.tiles)


def test_a_document_without_a_trained_token_asks_nothing(processor):
    document = make_sample(processor, 0, TURNS[0])
    document.labels = torch.full_like(document.labels, IGNORE)
    assert list(find_questions(make_batch([document]), processor)) == []


@pytest.mark.parametrize("length", [1, 4])
def test_every_answer_is_a_branch_that_begins_with_the_last_token_of_the_prompt(processor, length):
    [question] = find_questions(make_batch([make_sample(processor, 0, TURNS[0])]), processor)
    question.prompt.input_ids = question.prompt.input_ids[:length]  # one token: there is no prefix
    *before, last = question.prompt.input_ids.tolist()
    answers = [OwnAnswer([7, 8, 9], [-1.0, -2.0, -3.0]), OwnAnswer([2], [-4.0])]
    document = make_document(question, answers, weights=[0.5, -0.5])
    nothing = [0.0] * len(before)
    assert document.input_ids.tolist() == [*before, last, 7, 8, last]
    assert document.labels.tolist() == [IGNORE] * len(before) + [7, 8, 9, 2]
    assert document.branch_ids.tolist() == [0] * len(before) + [1, 1, 1, 2]
    assert document.position_ids.tolist() == [*range(length + 2), length - 1]
    assert document.values["weights"].tolist() == [*nothing, 0.5, 0.5, 0.5, -0.5]
    assert document.values["old_logprobs"].tolist() == [*nothing, -1, -2, -3, -4]
    assert document.values["weights"].dtype == document.values["old_logprobs"].dtype == torch.float32
