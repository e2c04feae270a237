"""Attention against an fp64 reference: masks, heads, lengths and layouts, and what must never be read."""

import contextlib
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovlm.model.attention import Window, make_mask
from tests.kernels.oracle import check, check_gradients, reserve, surround

pytest.importorskip("triton")
from nanovlm.kernels import attention as kernels
from nanovlm.kernels.attention import Runs, attention, attention_ref, find_runs, split_head

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def draw_inputs(B, T, S, N, K, H, dtype=torch.float32, device="cpu"):
    """q, k, v and a gradient of out."""
    shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, H), "grad": (B, T, N, H)}
    return {name: draw(*shape, dtype=dtype, device=device, seed=i) for i, (name, shape) in enumerate(shapes.items())}


@contextlib.contextmanager
def blocks_of(BM, BN):
    """Make every kernel use such blocks: small ones, so that few tokens are many blocks."""
    blocks = {256: (BM, BN, 4, 2)}
    with mock.patch.dict(kernels.BLOCKS, {which: {90: blocks, 80: blocks, "fp32": blocks} for which in kernels.BLOCKS}):
        yield


def pack_row(documents, T, device="cpu"):
    """doc_ids and branch_ids int32[T] of documents, each a list of lengths: of the prefix, then of the branches."""
    doc_ids, branch_ids = torch.full((T,), -1, dtype=torch.int32), torch.zeros(T, dtype=torch.int32)
    end = 0
    for i, document in enumerate(documents):
        for branch, length in enumerate(document):
            doc_ids[end : end + length], branch_ids[end : end + length] = i, branch
            end += length
    assert end <= T
    return doc_ids.to(device), branch_ids.to(device)


def pack_rows(rows, T, device="cpu"):
    packed = [pack_row(documents, T, device) for documents in rows]
    return [torch.stack(ids) for ids in zip(*packed, strict=True)]


def draw_spans(doc_ids, seed=0):
    """int32[B, T]: spans of all lengths, with tokens of none between some of them."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.rand(doc_ids.shape, generator=generator) < 0.15).cumsum(1)
    is_span = torch.rand(doc_ids.shape[1] + 1, generator=generator) < 0.7
    return torch.where(is_span[numbers], numbers + 1, 0).int().to(doc_ids.device)


def dense(runs: Runs):
    """What the runs say, spelt out, bool[B, T, T]."""
    s = torch.arange(runs.until.shape[1], device=runs.until.device)
    t = s[:, None]
    last, since = (t, s) if runs.last is None else (runs.last[..., None], runs.since[:, None])
    first, own = runs.first[..., None], runs.own[..., None]
    by_key = (since <= t) & (t < runs.until[:, None])
    if runs.window:
        gap = own - torch.where(own > first, runs.shared[..., None], own)
        first, own = first.maximum(t - gap - runs.window + 1), own.maximum(t - runs.window + 1)
        by_key &= runs.near[:, None] > runs.near[..., None] - runs.window
    by_query = ((first <= s) & (s < runs.shared[..., None])) | ((own <= s) & (s <= last))
    assert torch.equal(by_query, by_key)
    return by_key


def check_all(inputs, **options):
    """Check out, its gradients, and lse, which must be as exact as fp32 for inputs of any dtype."""
    inputs = dict(inputs)
    grad = inputs.pop("grad")
    found = {}

    def ours(**x):
        out, found["lse"] = attention(**x, **options)
        return out

    def reference(**x):
        return attention_ref(**x, **options)[0]

    check_gradients(ours, reference, reference, inputs, grad)
    lse = found["lse"]
    assert lse.dtype == torch.float32 and not lse.requires_grad

    def lse_ref(dtype):
        return attention_ref(**{name: x.to(dtype) for name, x in inputs.items()}, **options)[1]

    check(lse, lse_ref(torch.float32), lambda: lse_ref(torch.float64), name="lse")


# --- every mask, length, head size and group -----------------------------------------------------------------

LENGTHS_AND_HEADS = [  # T, S, H, N, K
    (15, 15, 64, 2, 1),
    (17, 17, 72, 3, 1),
    (19, 35, 160, 2, 1),
    (5, 21, 256, 2, 2),
    (65, 63, 80, 4, 1),
    (63, 65, 96, 3, 1),
    (129, 129, 128, 2, 1),
    (1, 129, 16, 3, 3),
    (65, 17, 40, 2, 2),
    (0, 5, 112, 6, 2),
    (5, 0, 8, 1, 1),
    (17, 63, 32, 8, 1),
    (17, 129, 88, 2, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("T", "S", "H", "N", "K"), LENGTHS_AND_HEADS)
def test_forward_and_gradients(T, S, H, N, K, causal, dtype, device):
    """Shipped block sizes. Causal with more queries than keys: the first see nothing."""
    check_all(draw_inputs(1, T, S, N, K, H, dtype, device), causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key(dtype, device):
    """It has all the weight; what is left of dq and dk is the rounding of a difference of two equal sums.

    A GPU fuses the product and the difference in exp(score - lse), and its division is off by a bit or two.
    """
    q, k, v, grad = draw_inputs(2, 1, 1, 2, 1, 72, dtype, device).values()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, causal=True)
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    epsilon = torch.finfo(torch.float32).eps
    torch.testing.assert_close(out, v.expand_as(out), rtol=16 * epsilon, atol=0)
    exact, most = grad.double().sum(2, keepdim=True), grad.double().abs().sum(2, keepdim=True)
    assert ((dv - exact).abs() <= 16 * epsilon * most + torch.finfo(dtype).eps / 2 * exact.abs()).all()
    scores = (q * k).float().sum(-1)[:, 0] * 72**-0.5
    check(lse[..., 0], scores, lambda: (q.double() * k.double()).sum(-1)[:, 0] * 72**-0.5)
    terms = (grad.double() * v.double()).abs().sum(-1).max() * 72**-0.5
    for gradient, other in ((dq, k), (dk, q)):
        assert gradient.abs().max() <= 2 * epsilon * terms * other.abs().max()


# Rows of 65 tokens, and N, K, H. In "many" and "branches" a document, and a prefix, fill a whole block of keys for the
# first of a block of queries and not for the last.
DOCUMENTS = {
    "one": ([[[65]]], (2, 1, 64)),
    "many": ([[[1], [1], [20], [2], [41]], [[50], [15]]], (1, 1, 80)),
    "padding": ([[[17], [5]], [[1]]], (2, 2, 72)),
    "branches": ([[[20, 7, 1, 15, 22]], [[5, 1, 1, 1], [18, 10, 10], [19]]], (2, 1, 40)),
    "no prefix": ([[[0, 20, 45]]], (1, 1, 96)),
    "wide heads": ([[[20, 7, 1, 15], [22]]], (2, 1, 160)),
}


SPANS = [(layout, True) for layout in ("one", "branches", "wide heads")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout, has_spans", [*((layout, False) for layout in DOCUMENTS), *SPANS], ids=str)
def test_documents_and_branches(layout, has_spans, dtype, device):
    rows, (N, K, H) = DOCUMENTS[layout]
    ids = pack_rows(rows, 65, device)
    runs = find_runs(*ids, draw_spans(ids[0]) if has_spans else None)
    with blocks_of(32, 16):
        check_all(draw_inputs(len(rows), 65, 65, N, K, H, dtype, device), runs=runs)


# In the last a block of keys of the prefix is seen whole by a block of queries that does not see the one before.
WINDOWS = [
    ("one", False, 40),
    ("many", False, 3),
    ("branches", True, 9),
    ("branches", False, 20),
    ("wide heads", True, 30),
    ("long prefix", False, 60),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout, has_spans, window", WINDOWS, ids=str)
def test_windows(layout, has_spans, window, dtype, device):
    """With sinks, too."""
    rows, (N, K, H) = ([[[36, 29]], [[41, 12, 12]]], (2, 1, 72)) if layout == "long prefix" else DOCUMENTS[layout]
    ids = pack_rows(rows, 65, device)
    runs = find_runs(*ids, draw_spans(ids[0]) if has_spans else None, window)
    inputs = draw_inputs(len(rows), 65, 65, N, K, H, dtype, device)
    with blocks_of(16, 16):
        check_all(inputs | {"sinks": draw(N, dtype=dtype, device=device, seed=9)}, runs=runs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks(dtype, device):
    """The first 20 queries see no key, and all that is left is the sink."""
    inputs = draw_inputs(2, 37, 17, 4, 2, 40, dtype, device) | {"sinks": draw(4, dtype=dtype, device=device, seed=9)}
    check_all(inputs, causal=True)
    del inputs["grad"]
    out, lse = attention(**inputs, causal=True)
    assert not out[:, :20].any()
    torch.testing.assert_close(lse[..., :20], inputs["sinks"].float()[:, None].expand(2, -1, 20))


def test_ids_may_lie_anyhow(device):
    ids = pack_rows([[[3, 7, 10]], [[5], [12]]], 20, device)
    inputs = draw_inputs(2, 20, 20, 1, 1, 16, device=device)
    del inputs["grad"]
    expected = attention(**inputs, runs=find_runs(*ids))[0]
    assert torch.equal(attention(**inputs, runs=find_runs(*(x.T.contiguous().T for x in ids)))[0], expected)


@st.composite
def layouts(draw, T):
    """Documents of a row of T tokens, now and then with branches, and padding at its end or none."""
    documents, room = [], T
    while room and draw(st.integers(0, 5)):
        document = []
        for _ in range(draw(st.sampled_from([1, 1, 2, 3, 5]))):
            document.append(draw(st.integers(0 if not document else 1, room)) if room else 0)
            room -= document[-1]
        documents.append([n for i, n in enumerate(document) if n or not i])
    if room and draw(st.booleans()):
        documents.append([room])
    return [document for document in documents if sum(document)]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_runs_are_the_mask(data):
    T = data.draw(st.integers(0, 40))
    ids = pack_rows([data.draw(layouts(T)) for _ in range(data.draw(st.integers(1, 3)))], T)
    assert torch.equal(dense(find_runs(*ids)), make_mask(*ids)[:, 0])
    spans = draw_spans(ids[0], data.draw(st.integers(0, 999)))
    assert torch.equal(dense(find_runs(*ids, spans)), make_mask(*ids, span_ids=spans)[:, 0])
    window = Window(data.draw(st.integers(1, 40)), dense(find_runs(*ids)).sum(2) - 1)
    for own in (None, spans):
        expected = make_mask(*ids, span_ids=own, window=window)[:, 0]
        assert torch.equal(dense(find_runs(*ids, own, window.size)), expected)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_shapes(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mask = data.draw(st.sampled_from(["none", "causal", "runs", "runs"]))
    T, S, B = data.draw(st.integers(16, 50)), data.draw(st.integers(16, 50)), data.draw(st.integers(1, 2))
    K, G, H = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), 2 * data.draw(st.integers(4, 64))
    options = {"causal": mask == "causal"}
    if mask == "runs":
        # The last row is one document: all of one token have gradients of 0, and nothing to measure a rounding by.
        rows = [data.draw(layouts(T)) for _ in range(B - 1)] + [[[T]]]
        window = data.draw(st.sampled_from([0, 1, 10, 25]))
        S, options = T, {"runs": find_runs(*pack_rows(rows, T, device), window=window)}
    inputs = draw_inputs(B, T, S, K * G, K, H, data.draw(st.sampled_from(DTYPES)), device)
    with blocks_of(data.draw(st.sampled_from([16, 32])), data.draw(st.sampled_from([16, 32]))):
        check_all(inputs, **options)


# --- descriptors (TMA): of blocks without a mask, on Hopper and where kernels are interpreted -----------------

HAS_TMA = kernels.device_class(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")) == 90


def describe(x):
    return kernels.describe_blocks(x["q"], x["k"], x["v"], 16)


@pytest.mark.skipif(not HAS_TMA, reason="this GPU has no TMA, or no kernels that use it")
@pytest.mark.parametrize("mask", ["full", "causal", "documents"])
@pytest.mark.parametrize("H", [40, 72, 96, 100, 128])
def test_descriptors_read_what_pointers_read(H, mask, device):
    """Rows, heads and both parts of the head, [0, 64) and [64, 96); with keys that do not lie as values do."""
    inputs = draw_inputs(2, 65, 65, 4, 2, 128 if H == 100 else H, torch.bfloat16, device)
    inputs = {name: inputs[name][..., :H] for name in "qkv"}  # of 100 columns, at strides that fit
    inputs["v"] = VIEWS["heads first"](inputs["v"]) if H % 8 == 0 else inputs["v"]
    options = {"causal": mask == "causal"}
    if mask == "documents":
        options = {"runs": find_runs(*pack_rows([[[20, 3, 22], [20]], [[17], [48]]], 65, device))}
    widths = [n for n in split_head(H)[1:] if n]
    assert [d.block_shape for d in describe(inputs) if d] == [[1, 16, 1, n] for n in widths] * 2
    with blocks_of(32, 16):
        out, lse = attention(**inputs, **options)
        with mock.patch.object(kernels, "describe_blocks", lambda *args: []):
            other, other_lse = attention(**inputs, **options)
    if device == "cpu":  # where it is compiled, other instructions may add in another order
        assert torch.equal(out, other) and torch.equal(lse, other_lse)
    else:
        check(out, other, lambda: attention_ref(*(x.double() for x in inputs.values()), **options)[0])


def test_descriptors_only_of_what_they_can_read(device):
    inputs = draw_inputs(1, 4, 20, 4, 2, 64, torch.float16, device)
    assert bool(describe(inputs)) == HAS_TMA
    for which, make in itertools.product(
        "kv",
        (
            VIEWS["misaligned"],
            VIEWS["head size first"],  # strides of 1, 20 and 40; attention copies it
            lambda x: torch.cat([x, x[..., :4]], 3)[..., :64],  # rows 136 bytes apart
            lambda x: x[:, :, :1].expand(-1, -1, 2, -1),
        ),
    ):
        assert describe(inputs | {which: make(inputs[which])}) == []
    for change in (lambda x: x.float(), lambda x: x[:, :0], lambda x: torch.cat([x, x, x], 3)):
        assert describe({name: change(x) for name, x in inputs.items()}) == []
    for gpu in (80, 120, "hip"):
        with mock.patch.object(kernels, "device_class", lambda x, gpu=gpu: gpu):
            assert describe(inputs) == []


def test_head_sizes_take_no_more_columns_than_they_must():
    width = {H: sum(split_head(H)[1:]) for H in range(2, 129, 2)}
    assert {H: width[H] for H in (16, 32, 64, 72, 80, 96, 128)} == {
        16: 16,
        32: 32,
        64: 64,
        72: 80,
        80: 80,
        96: 96,
        128: 128,
    }
    assert all(H <= width[H] for H in width)


# --- layouts of the inputs -----------------------------------------------------------------------------------

VIEWS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "head size first": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "within a larger tensor": surround,
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_give_the_same(view, device):
    inputs = draw_inputs(2, 20, 20, 2, 1, 24, torch.float16, device)
    grad = inputs.pop("grad")
    leaves = [x.requires_grad_() for x in inputs.values()]
    out, lse = attention(*leaves, causal=True)
    expected = torch.autograd.grad(out, leaves, grad)
    other, other_lse = attention(*(VIEWS[view](x) for x in leaves), causal=True)
    assert torch.equal(out, other) and torch.equal(lse, other_lse)
    for a, b in zip(expected, torch.autograd.grad(other, leaves, VIEWS[view](grad)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("which", ["k", "v"])
def test_keys_may_lie_unlike_values(which, dtype, device):
    """Strides of rows, heads and the batch that belong to one of them alone; read by blocks with a mask and without."""
    inputs = draw_inputs(2, 65, 65, 2, 2, 16, dtype, device)
    grad = inputs.pop("grad")
    expected = attention(**(leaves := {name: x.requires_grad_() for name, x in inputs.items()}), causal=True)[0]
    others = leaves | {which: VIEWS["heads first"](leaves[which])}
    assert others[which].stride() != leaves[which].stride()
    with blocks_of(32, 16):
        check_all({name: x.detach() for name, x in others.items()} | {"grad": grad}, causal=True)
    out = attention(**others, causal=True)[0]
    gradients = [torch.autograd.grad(o, list(leaves.values()), grad) for o in (expected, out)]
    assert torch.equal(out, expected) and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_broadcast_rows_and_heads(dtype, device):
    """Keys and values with strides of 0."""
    q, k, v, grad = draw_inputs(2, 17, 19, 4, 1, 16, dtype, device).values()
    k, v = k[:1], v[:1]

    def run(function):
        return lambda q, k, v: function(q, k.expand(2, -1, 2, -1), v.expand(2, -1, 2, -1))[0]

    check_gradients(run(attention), run(attention_ref), run(attention_ref), {"q": q, "k": k, "v": v}, grad)


def test_offsets_beyond_32_bits(device):
    """Rows 2^30 elements apart, of which the fourth begins beyond 2^31."""
    if device == "cuda":
        pytest.skip("needs 12 GB of addresses, which only the CPU has without memory")
    inputs = draw_inputs(1, 4, 4, 1, 1, 16, torch.float16)
    grad = inputs.pop("grad")
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    expected = attention(**leaves, causal=True)[0]
    far = reserve((3 * 2**30 + 3 * 32,), torch.float16)
    apart = {
        n: far[32 * i :].as_strided((1, 4, 1, 16), (0, 2**30, 16, 1)).copy_(x.detach()).requires_grad_()
        for i, (n, x) in enumerate(leaves.items())
    }
    out = attention(**apart, causal=True)[0]
    assert torch.equal(out, expected)
    gradients = [torch.autograd.grad(o, list(x.values()), grad) for o, x in ((expected, leaves), (out, apart))]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- what is not visible is not read -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    "layout",
    ["causal", "many", "branches", "no prefix", "branches with spans", "one in a window", "branches in a window"],
)
def test_invisible_keys_and_queries_are_not_read(layout, dtype, device):
    """NaN in all keys that no query of a block sees changes nothing there, nor NaN in all queries that see no key."""
    T = 65
    if layout == "causal":
        options, visible = {"causal": True}, torch.ones(1, T, T, dtype=torch.bool).tril()
    else:
        name, _, more = layout.partition(" with " if "with" in layout else " in ")
        ids = pack_rows(DOCUMENTS[name][0][:1], T, device)
        spans = draw_spans(ids[0]) if more == "spans" else None
        options = {"runs": find_runs(*ids, spans, 12 if more == "a window" else 0)}
        visible = dense(options["runs"]).cpu()
    inputs = draw_inputs(1, T, T, 1, 1, 16, dtype, device)
    grad = inputs.pop("grad")
    with blocks_of(32, 16):
        leaves = [x.requires_grad_() for x in inputs.values()]
        out, lse = attention(*leaves, **options)
        gradients = torch.autograd.grad(out, leaves, grad)
        q, k, v = (x.detach() for x in leaves)
        for rows in torch.arange(T).split(32):
            unseen = ~visible[0, rows].any(0).to(device)
            poisoned = [x.masked_fill(unseen[:, None, None], torch.nan).requires_grad_() for x in (k, v)]
            again, _ = attention(leaves[0], *poisoned, **options)
            (dq,) = torch.autograd.grad(again, leaves[:1], grad)
            assert torch.equal(again[:, rows], out[:, rows]) and torch.equal(dq[:, rows], gradients[0][:, rows])
        for keys in torch.arange(T).split(16):
            unseeing = ~visible[0, :, keys].any(1).to(device)[:, None, None]
            if layout == "branches in a window":  # what is seen from several branches is read up to the last of them
                seeing = visible[0, :, keys].any(1).nonzero()
                unseeing[int(seeing[0]) : int(seeing[-1])] = False
            poison = lambda x, unseeing=unseeing: x.masked_fill(unseeing, torch.nan)  # noqa: E731
            options_of_backward = options.get("runs"), options.get("causal", False), 0.25
            again = kernels.attend_backward(poison(q), k, v, out.detach(), lse, poison(grad), *options_of_backward)
            for a, b in zip(again[1:3], gradients[1:], strict=True):
                assert torch.equal(a[:, keys], b[:, keys])


# --- the same bits -------------------------------------------------------------------------------------------


def test_the_same_bits_twice_and_in_any_batch(device):
    inputs = draw_inputs(3, 40, 40, 2, 1, 40, torch.float16, device)
    grad = inputs.pop("grad")
    runs = find_runs(*pack_rows([[[10, 5, 20]], [[40]], [[3], [20]]], 40, device))

    def run(rows):
        leaves = [x[rows].detach().requires_grad_() for x in inputs.values()]
        out, lse = attention(*leaves, runs=Runs(*(x[rows] for x in runs[:4])))
        return out, lse, *torch.autograd.grad(out, leaves, grad[rows])

    with blocks_of(16, 16):
        together = run(slice(0, 3))
        assert all(torch.equal(a, b) for a, b in zip(together, run(slice(0, 3)), strict=True))
        for i in range(3):
            assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, run(slice(i, i + 1)), strict=True))


# --- mistakes ------------------------------------------------------------------------------------------------


def test_mistakes_are_named(device):
    x, half = draw(1, 4, 2, 16, device=device), draw(1, 4, 2, 16, dtype=torch.float16, device=device)
    runs = find_runs(*pack_rows([[[4]]], 4, device))
    for arguments, options, message in (
        ((x, half, half), {}, r"q, k, v have dtypes torch.float32, torch.float16, torch.float16: give one of"),
        ((x.double(),) * 3, {}, r"have dtypes torch.float64"),
        ((x, x[:, :3], x), {}, r"have shapes \[1, 4, 2, 16\], \[1, 3, 2, 16\], \[1, 4, 2, 16\]"),
        ((draw(1, 4, 3, 16, device=device), x, x), {}, r"K a divisor of N"),
        ((x, x[:, :, :0], x[:, :, :0]), {}, r"\[1, 4, 0, 16\], but must have"),
        ((x[0], x[0], x[0]), {}, r"have shapes \[4, 2, 16\]"),
        ((draw(1, 4, 2, 264, device=device),) * 3, {}, r"head size 264 is above 256"),
        ((x, x, x), {"scale": -1.0}, r"scale = -1.0 must be above 0"),
        ((x, x[:, :3], x[:, :3]), {"runs": runs}, r"as many queries and as many keys, got 4 and 3"),
        ((x, x, x), {"runs": runs, "causal": True}, r"got causal = True"),
        ((x, x, x), {"sinks": x[0, :, 0, 0]}, r"sinks of shape \[4\] must be one for each of the 2 query heads"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*arguments, **options)


def test_gradients_have_no_gradient(device):
    x = draw(1, 4, 2, 16, device=device).requires_grad_()
    (dx,) = torch.autograd.grad(attention(x, x, x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_without_a_gpu_there_is_one_sentence():
    with pytest.MonkeyPatch.context() as patch:  # mock.patch would leave the variable of the environment changed
        patch.setattr("triton.knobs.runtime.interpret", False)
        with pytest.raises(ValueError, match=r"attention = 'triton' needs a GPU, but its tensors are on the cpu"):
            attention(*[torch.zeros(1, 4, 2, 16)] * 3)
