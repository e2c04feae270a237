"""Divergences of distributions, against torch's and TRL's, with whole vocabularies never in memory."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanovlm.objectives.divergences import DIVERGENCES, divergences, teach_by_model, teach_by_top_k

N, V, D, TEACHER_D, K = 11, 29, 6, 9, 5


@pytest.fixture
def sides():
    """Hidden states and head of a student and of a teacher, in fp64."""
    random = torch.Generator().manual_seed(0)
    shapes = (N, D), (V, D), (N, TEACHER_D), (V, TEACHER_D)
    hidden, head, *theirs = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return hidden.requires_grad_(), head.requires_grad_(), *theirs


def log_probs(hidden, head, temperature):
    return (hidden @ head.T / temperature).log_softmax(-1)


def by_torch(name, ours, theirs, beta):
    """The sum over tokens, by torch's kl_div(log q, log p) = KL(p || q)."""
    kl = functools.partial(F.kl_div, reduction="sum", log_target=True)
    if name == "forward_kl":
        return kl(ours, theirs)
    if name == "reverse_kl":
        return kl(theirs, ours)
    mixture = (beta * theirs.exp() + (1 - beta) * ours.exp()).log()
    return beta * kl(mixture, theirs) + (1 - beta) * kl(mixture, ours)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "max_logits"), [(1.0, 2**25), (2.5, 3 * V), (2.5, 1), (0.7, N * V - 1)])
def test_torch_gives_the_same_values_and_gradients(sides, name, temperature, max_logits):
    hidden, head, their_hidden, their_head = sides
    theirs = log_probs(their_hidden, their_head, temperature)
    expected = temperature**2 * by_torch(name, log_probs(hidden, head, temperature), theirs, 0.3)
    grads = torch.autograd.grad(expected, (hidden, head))
    teach = teach_by_model(their_hidden, their_head, temperature)
    values, _agreed = divergences(hidden, head, teach, [name], 0.3, temperature, max_logits)
    torch.testing.assert_close(values[0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(values[0], (hidden, head)), grads, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_trl_gives_the_same_values(sides, beta):
    trl = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    hidden, head, their_hidden, their_head = sides
    name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jensen_shannon")
    logits, their_logits = hidden @ head.T, their_hidden @ their_head.T
    for temperature in (1.0, 2.0):  # which TRL does not make up for
        expected = trl.generalized_jsd_loss(logits, their_logits, None, beta, temperature, reduction="sum")
        teach = teach_by_model(their_hidden, their_head, temperature)
        value = divergences(hidden, head, teach, [name], beta, temperature)[0][0] / temperature**2
        assert float(value) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("is_stored", [False, True])
def test_gradients_are_those_of_finite_differences(sides, name, is_stored):
    hidden, head, their_hidden, their_head = sides
    top = log_probs(their_hidden, their_head, 1.0).topk(K)
    temperature = 1.0 if is_stored else 1.7
    teach = teach_by_top_k(top.indices, top.values) if is_stored else teach_by_model(their_hidden, their_head, 1.7)

    def value(hidden, head):
        return divergences(hidden, head, teach, [name], 0.2, temperature, 4 * V)[0]

    assert torch.autograd.gradcheck(value, (hidden, head))


def test_several_are_the_sum_and_agreement_counts_equal_choices(sides):
    hidden, head, their_hidden, their_head = sides
    teach = teach_by_model(their_hidden, their_head)
    values, agreed = divergences(hidden, head, teach, list(DIVERGENCES), max_logits=2 * V)
    weights = torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64)
    grads = torch.autograd.grad(values @ weights, (hidden, head))
    for name, value in zip(DIVERGENCES, values, strict=True):
        assert value == divergences(hidden, head, teach, [name], max_logits=2 * V)[0][0]
    alone = [torch.autograd.grad(divergences(hidden, head, teach, [n])[0][0], (hidden, head)) for n in DIVERGENCES]
    for i, grad in enumerate(grads):
        torch.testing.assert_close(grad, sum(w * g[i] for w, g in zip(weights, alone, strict=True)))
    same = (hidden @ head.T).argmax(-1) == (their_hidden @ their_head.T).argmax(-1)
    assert 0 < int(same.sum()) < N or not int(same.sum())
    assert float(agreed) == int(same.sum())
    own = teach_by_model(hidden.detach(), head.detach())
    values, agreed = divergences(hidden, head, own, list(DIVERGENCES))
    assert float(agreed) == N and float(values.detach().abs().max()) < 1e-12


@pytest.mark.parametrize("name", DIVERGENCES)
def test_stored_tokens_give_the_divergence_of_their_outcomes(sides, name):
    hidden, head, their_hidden, their_head = sides
    theirs, ours = log_probs(their_hidden, their_head, 1.0), log_probs(hidden, head, 1.0)
    top = theirs.topk(K)

    def outcomes(x):
        kept = x.gather(-1, top.indices)
        return torch.cat((kept, (1 - kept.exp().sum(-1, keepdim=True)).log()), dim=-1)

    expected = by_torch(name, outcomes(ours), outcomes(theirs), 0.3)
    grads = torch.autograd.grad(expected, (hidden, head))
    values, agreed = divergences(hidden, head, teach_by_top_k(top.indices, top.values), [name], 0.3, max_logits=V)
    torch.testing.assert_close(values[0], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(values[0], (hidden, head)), grads, rtol=1e-8, atol=1e-10)
    assert float(agreed) == int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    assert float(values[0]) < float(by_torch(name, ours, theirs, 0.3))
    every = theirs.topk(V)  # the rest has nothing left, which rounding makes a little
    values, _agreed = divergences(hidden, head, teach_by_top_k(every.indices, every.values), [name], 0.3)
    torch.testing.assert_close(values[0], by_torch(name, ours, theirs, 0.3), rtol=1e-9, atol=1e-9)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("is_stored", [False, True])
def test_no_pass_holds_the_logits_of_all_tokens(is_stored):
    num, size, rows = 64, 512, 4
    hidden, head = torch.randn(num, 8, requires_grad=True), torch.randn(size, 8, requires_grad=True)
    theirs = torch.randn(num, 8), torch.randn(size, 8)
    top = log_probs(*theirs, 1.0).topk(K)
    teach = teach_by_top_k(top.indices, top.values) if is_stored else teach_by_model(*theirs)
    saved = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        values, _agreed = divergences(hidden, head, teach, list(DIVERGENCES), max_logits=rows * size)
        values.sum().backward()
    assert largest.numel == max(rows * size, head.numel())
    assert {x.numel() for x in saved} == {hidden.numel(), head.numel()}


def test_a_frozen_head_has_no_gradient_in_memory():
    hidden, head = torch.randn(0, 8, requires_grad=True), torch.randn(64, 8)
    values, _agreed = divergences(hidden, head, teach_by_model(torch.randn(0, 8), head), ["forward_kl"])
    with Largest() as largest:
        values.sum().backward()
    assert largest.numel < head.numel()


def test_bf16_products_and_no_tokens():
    hidden, head = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    theirs = torch.randn(N, TEACHER_D), torch.randn(V, TEACHER_D)
    exact = divergences(hidden, head, teach_by_model(*theirs), list(DIVERGENCES))[0]
    with torch.autocast("cpu", torch.bfloat16):
        values, _agreed = divergences(hidden, head, teach_by_model(*theirs), list(DIVERGENCES))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, exact, rtol=0.03, atol=0.03)
    empty = hidden[:0]
    values, agreed = divergences(empty, head, teach_by_model(theirs[0][:0], theirs[1]), list(DIVERGENCES))
    values.sum().backward()
    assert not values.any() and not agreed and not head.grad.any() and not hidden.grad.any()
