"""The loss and its gradients, without all logits at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from nanovlm.kernels import cross_entropy as kernels
from nanovlm.kernels.cross_entropy import cross_entropy_, linear_cross_entropy, linear_cross_entropy_ref, split_work
from tests.kernels.oracle import check_gradients, judge, poison, round_often, surround

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(N, D, V, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).to(device, dtype)
    weight = torch.randn(V, D, generator=generator).div(D**0.5).to(device, dtype)
    return hidden, weight, torch.randint(V, (N,), generator=generator).to(device)


def check_loss(hidden, weight, labels, **options):
    ignore_index = options.get("ignore_index")
    return check_gradients(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, **options),
        lambda hidden, weight: linear_cross_entropy_ref(hidden, weight, labels, ignore_index),
        lambda hidden, weight: linear_cross_entropy_ref(hidden, weight, labels, ignore_index),
        {"hidden": hidden, "weight": weight},
        gradient=torch.tensor(0.37, device=hidden.device),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 2, 127, 1000, 4096, 4097, 9001])
def test_loss_and_gradients(device, dtype, V):
    check_loss(*make(7, 24, V, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, chunk", [(0, 4), (1, 4), (4, 4), (5, 4), (17, 4), (64, 1)])
def test_chunks(device, dtype, N, chunk):
    check_loss(*make(N, 17, 65, dtype, device), chunk=chunk)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 9),
    D=st.integers(1, 40),
    V=st.integers(1, 200),
    chunk=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(N, D, V, chunk, dtype):
    check_loss(*make(N, D, V, dtype, "cuda" if torch.cuda.is_available() else "cpu"), chunk=chunk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_ignored_labels_have_no_part(device, ignored, dtype):
    hidden, weight, labels = make(9, 16, 65, dtype, device)
    share = {"none": 0, "some": 4, "all": 9}[ignored]
    labels[:share] = -100
    check_loss(hidden, weight, labels, ignore_index=-100, chunk=3)
    poison(hidden[:share])  # they are not even looked at
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, ignore_index=-100)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all() and (hidden.grad[:share] == 0).all()
    if ignored == "all":
        assert loss == 0 and (weight.grad == 0).all()


def test_ignored_labels_may_be_in_the_vocabulary(device):
    hidden, weight, labels = make(9, 16, 65, torch.float32, device)
    labels[::2] = 3
    check_loss(hidden, weight, labels, ignore_index=3, chunk=4)
    logits = make(9, 65, 1, torch.float32, device)[0]
    before = logits.clone()
    losses = cross_entropy_(logits, labels, ignore_index=3)
    assert (losses[::2] == 0).all() and (logits[::2] == 0).all()
    others = before.clone()
    assert torch.equal(losses[1::2], cross_entropy_(others, labels)[1::2]) and torch.equal(logits[1::2], others[1::2])


@pytest.mark.parametrize("gradient", [True, False])
def test_a_program_takes_several_rows(device, monkeypatch, gradient):
    """Two processors, each with room for one row in the cache: seven rows, and as many as there are programs."""
    for N in (7, 2, 1):
        logits, labels = make(N, 300, 1, torch.bfloat16, device)[0], torch.arange(N, device=device)
        expected = logits.clone()
        losses = cross_entropy_(expected, labels, gradient)
        monkeypatch.setattr(kernels, "measure_gpu", lambda logits: (2, 2 * 600))
        assert split_work(logits)[0] == 2
        assert torch.equal(cross_entropy_(logits, labels, gradient), losses) and torch.equal(logits, expected)
        monkeypatch.undo()


def test_rows_in_flight_fit_into_the_cache(device, monkeypatch):
    """Of an H100, where they can; a processor has as many bytes on their way with few programs as with many."""
    monkeypatch.setattr(kernels, "measure_gpu", lambda logits: (132, 50 * 2**20))
    shapes = ((151936, torch.bfloat16), (49152, torch.bfloat16), (32000, torch.bfloat16), (9000, torch.bfloat16))
    work = {V: split_work(torch.empty(1, V, dtype=dtype, device="meta")) for V, dtype in shapes}
    assert work == {151936: (132, 16384), 49152: (4 * 132, 8192), 32000: (6 * 132, 8192), 9000: (8 * 132, 4096)}
    assert all(programs * 2 * V <= 50 * 2**20 for V, (programs, _) in work.items())
    assert split_work(torch.empty(1, 2**20, device="meta")) == (132, 16384)  # more than fits
    assert split_work(torch.empty(1, 3, device="meta")) == (8 * 132, 4)


def test_a_gradient_is_scaled_in_place_unless_it_is_needed_again(device):
    """In fp32, where it is as large as the head; a second backward pass finds what the first one found."""
    hidden, weight, labels = make(9, 16, 65, torch.float32, device)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, chunk=4)
    kept = {x.data_ptr() for x in loss.grad_fn.saved_tensors}
    found = []
    for retain in (True, True, False):
        found.append(torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=retain))
        assert len(kept & {x.data_ptr() for x in found[-1]}) == (0 if retain else 2)
    exact = torch.autograd.grad(3 * linear_cross_entropy_ref(hidden, weight, labels), (hidden, weight))
    for grads in found:
        for grad, first, reference in zip(grads, found[0], exact, strict=True):
            assert torch.equal(grad, first)
            torch.testing.assert_close(grad, reference)


def test_the_backward_pass_makes_nothing_of_the_size_of_the_head(device):
    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == weight.shape and out.data_ptr() not in kept:
                made.append(function)
            return out

    hidden, weight, labels = make(9, 16, 65, torch.float32, device)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels)
    kept, made = {x.data_ptr() for x in loss.grad_fn.saved_tensors}, []
    with Made():
        loss.backward()
    assert not made


def test_views_and_inputs_without_gradient(device):
    hidden, weight, labels = make(6, 16, 65, torch.float32, device)
    views = surround(hidden), surround(weight), surround(labels[:, None])[:, 0]  # labels are apart, too
    expected = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(linear_cross_entropy(*views), expected)  # nor is any gradient needed
    for needs in ((True, False), (False, True), (True, True)):
        inputs = [x.clone().requires_grad_(need) for x, need in zip((hidden, weight), needs, strict=True)]
        loss = linear_cross_entropy(*inputs, labels)
        loss.backward()
        assert torch.equal(loss, expected) and [x.grad is not None for x in inputs] == list(needs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(device, dtype):
    """Rows far up and down, of one value, with a large one late, and with all but one minus infinity."""
    largest = torch.finfo(dtype).max / 4
    logits = torch.randn(8, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0] += 1000
    logits[1] -= 1000
    logits[2] = 3
    logits[3, 4998] = 300
    logits[4, :4500] = -torch.inf
    logits[5] = -torch.inf
    logits[5, 4999] = -2
    logits[6, 1] = largest
    logits[7] = -largest
    labels = torch.tensor([0, 1, 2, 3, 4600, 4999, 1, 7])

    def losses_and_gradients(dtype):
        leaf = logits.to(torch.promote_types(dtype, logits.dtype)).requires_grad_()
        losses = torch.nn.functional.cross_entropy(leaf.to(dtype), labels, reduction="none")
        return losses, *torch.autograd.grad(losses.sum(), leaf)

    gradients = logits.to(device, copy=True)
    ours = cross_entropy_(gradients, labels.to(device)), gradients
    (losses, grads), exact = losses_and_gradients(torch.float32), losses_and_gradients(torch.float64)
    eager = losses, grads.to(dtype)
    rounded = [round_often(lambda: losses_and_gradients(torch.float64), x.dtype) for x in ours]
    for i, name in enumerate(("loss", "gradient")):
        for row in range(8):  # each by itself: they differ by 1e37
            judge(ours[i][row], eager[i][row], exact[i][row], [x[i][row] for x in rounded[i]], f"{name} {row}")


def test_labels_outside_the_vocabulary_have_no_loss(device):
    logits = torch.zeros(4, 10, device=device)
    losses = cross_entropy_(logits, torch.tensor([-1, 10, 2**40, 9], device=device))
    assert losses.isnan().tolist() == [True, True, True, False]


def test_logits_without_gradient_stay_as_they_are(device):
    logits = make(3, 70, 70, torch.float32, device)[0]
    before = logits.clone()
    losses = cross_entropy_(logits, torch.tensor([0, 69, 5], device=device), gradient=False)
    torch.testing.assert_close(
        losses, torch.nn.functional.cross_entropy(before, torch.tensor([0, 69, 5], device=device), reduction="none")
    )
    assert torch.equal(logits, before)


def test_rows_may_begin_beyond_2_to_the_31(device):
    """The fourth row begins at element 3 * 2^30. The 6 GiB between are not touched, so a CPU does not use them."""
    storage = torch.UntypedStorage(2 * (3 * 2**30 + 100), device=device)
    logits = torch.empty(0, dtype=torch.float16, device=device).set_(storage, 0, (4, 100), (2**30, 1))
    logits.copy_(make(4, 100, 1, torch.float16, device)[0])
    labels = torch.arange(4, device=device)
    small = logits.clone()
    assert torch.equal(cross_entropy_(logits, labels), cross_entropy_(small, labels))
    assert torch.equal(logits, small)


def test_two_runs_are_equal_bit_for_bit(device):
    hidden, weight, labels = make(9, 16, 65, torch.bfloat16, device)
    results = []
    for _ in range(2):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(*leaves, labels, chunk=4)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(map(torch.equal, *results))


def test_what_does_not_fit_is_refused(device, monkeypatch):
    hidden, weight, labels = make(4, 8, 10, torch.float32, device)
    for arguments, message in (
        ((hidden.half(), weight, labels), "hidden is torch.float16 and weight torch.float32"),
        ((hidden.double(), weight.double(), labels), "must be one of fp32, fp16, bf16"),
        ((hidden[:, :7], weight, labels), r"hidden \(4, 7\) and weight \(10, 8\)"),
        ((hidden, weight, labels[:3]), "must be integers"),
        ((hidden, weight, labels.float()), "must be integers"),
        ((hidden, weight, labels, None, 0), "chunk = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments)
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    if device == "cpu":
        with pytest.raises(ValueError, match="hidden is on cpu; kernels run on a GPU"):
            linear_cross_entropy(hidden, weight, labels)
