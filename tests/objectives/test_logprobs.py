"""Log-probabilities of trained tokens and sums over branches, against torch in fp64."""

import torch

from nanovlm.data.types import IGNORE, Batch
from nanovlm.model.vlm import Extras
from nanovlm.objectives.logprobs import batch_logprobs, find_branches, token_logprobs
from nanovlm.train.step import average
from tests.conftest import make_batch, make_document


def inputs(num=7, dtype=torch.float64):
    torch.manual_seed(0)
    hidden, weight = torch.randn(num, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(3, 11, (num,))


def test_log_probabilities_are_those_of_a_softmax_without_what_is_never_sampled():
    hidden, weight, labels = inputs()
    logits = (hidden @ weight.T)[:, 2:]  # without the tokens 0 and 1
    expected = logits.log_softmax(-1).gather(-1, labels[:, None] - 2)[:, 0]
    for most in (10**6, 22, 1):  # all at once, two by two, one by one
        found = token_logprobs(hidden, labels, weight, never=(0, 1), max_logits=most)
        torch.testing.assert_close(found, expected)
    assert torch.equal(token_logprobs(hidden[:0], labels[:0], weight), hidden.new_zeros(0))


def test_gradients_are_those_of_finite_differences():
    hidden, weight, labels = inputs()
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, labels, w, (0,), 22), (hidden, weight))


def test_sums_over_branches(model, processor):
    """Of a document without branches, of one whose questions are branches, and of one in another row."""
    turns = [("what is it?", "red"), ("and where?", "at the top left"), ("how many?", "two")]
    plain = make_document(processor, 0, turns[0])
    branched = make_document(processor, 1, *turns, independent=True)
    batch = make_batch([plain, plain, branched], rows=2)  # two in the first row
    branches, logprobs = find_branches(batch), batch_logprobs(model, batch)
    is_trained = plain.labels != IGNORE, branched.labels != IGNORE
    lengths = [int(is_trained[1][branched.branch_ids == number].sum()) for number in (1, 2, 3)]
    lengths = [int(is_trained[0].sum()), *lengths, int(is_trained[0].sum())]
    assert (branches.document.tolist(), branches.lengths.tolist()) == ([0, 1, 1, 1, 2], lengths)
    expected = [part.sum() for part in logprobs.split(lengths)]
    torch.testing.assert_close(branches.sum(logprobs), torch.stack(expected))
    torch.testing.assert_close(branches.mean(logprobs), torch.stack(expected) / torch.tensor(lengths))


def test_no_trained_token_is_no_branch(model, processor):
    batch = make_batch([make_document(processor, 0, ("what?", "red"))])
    batch = Batch(**{**vars(batch), "labels": torch.full_like(batch.labels, IGNORE), "trained": None})
    branches, logprobs = find_branches(batch), batch_logprobs(model, batch)
    assert branches.sum(logprobs).shape == (0,) and not logprobs.sum().backward()


def test_values_travel_beside_the_labels(processor):
    """Through packing, batching and a move: padding has 0, and what no document has is 0 everywhere."""
    documents = [
        make_document(processor, seed, ("what?", answer)) for seed, answer in enumerate(("red", "two of them"))
    ]
    for number, document in enumerate(documents):
        document.values = {"weights": torch.arange(len(document)) + 100.0 * (number + 1)}
    batch = make_batch(documents, row_length=200).to("cpu")
    expected = [document.values["weights"][document.labels != IGNORE] for document in documents]
    assert torch.equal(batch.value("weights"), torch.cat(expected))
    assert not batch.values["weights"][batch.doc_ids < 0].any() and (batch.doc_ids < 0).any()
    assert torch.equal(batch.value("old_logprobs"), torch.zeros(len(batch.trained)))


def test_metrics_of_an_objective_are_means_over_its_micro_batches():
    extras = Extras()
    extras.add("reward", torch.tensor(3.0, requires_grad=True), 2)
    extras.add("margin", torch.tensor(1.0), torch.tensor(0))
    extras.add("reward", torch.tensor(6.0), 1)
    found = average(extras.means, torch.device("cpu"))
    assert found["reward"] == 3 and found["margin"].isinf() and not found["reward"].requires_grad
