"""The document is the unit: what a token may see, and what it may not, for every attention backend."""

import dataclasses
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import nanovlm
from nanovlm.config import MoEConfig, ParallelConfig
from nanovlm.data.types import IGNORE
from nanovlm.model.attention import ATTENTION, make_mask
from nanovlm.model.vision import normalize, whitening_filters
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives import NextToken
from nanovlm.objectives.losses import CROSS_ENTROPY, next_token_loss, next_token_losses
from nanovlm.presets import scenes
from nanovlm.train.parallel import parallelize
from tests.conftest import TINY, make_batch, make_document, skip_without_interpreter

TURNS = [("what color is the circle?", "red"), ("how many objects are there?", "3"), ("where?", "top left")]


def seen(backend, mask, T, S):
    """bool[T, S]: what gets a weight above 0, with every score the same."""
    skip_without_interpreter(backend)
    zero = torch.zeros(1, T, 1, S)
    return ATTENTION[backend](zero, torch.zeros(1, S, 1, S), torch.eye(S)[None, :, None], mask)[0, :, 0] > 0


@torch.no_grad()
@pytest.mark.parametrize("backend", ATTENTION)
def test_mask_is_the_drawing(backend):
    doc_ids = torch.tensor([[0, 0, 0, 0, 1, 1, -1]], dtype=torch.int32)
    branch_ids = torch.tensor([[0, 0, 1, 2, 0, 0, 0]], dtype=torch.int32)
    drawing = """
        1......
        11.....
        111....
        11.1...
        ....1..
        ....11.
        ......1
    """
    expected = torch.tensor([[c == "1" for c in line.strip()] for line in drawing.split()])
    assert torch.equal(make_mask(doc_ids, branch_ids)[0, 0], expected)
    assert torch.equal(seen(backend, make_mask(doc_ids, branch_ids, backend), 7, 7), expected)


def test_without_triton_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "nanovlm.kernels.attention", raising=False)
    monkeypatch.delattr("nanovlm.kernels.attention", raising=False)
    ids = torch.zeros(1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="attention = 'triton' needs the package triton, which is not installed"):
        make_mask(ids, ids, "triton")


@torch.no_grad()
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_changing_a_document_leaves_the_others_bit_equal(model, processor, changed):
    documents = [make_document(processor, 10 * i, *TURNS[: i + 1]) for i in range(3)]
    batch = make_batch(documents, row_length=160)
    other = make_document(processor, 99, ("what shape is the red object?", "star"), ("why?", "no 9"))
    length = len(documents[changed])
    documents[changed].input_ids = torch.cat([documents[changed].input_ids[:5], other.input_ids[5:]])[:length]
    documents[changed].input_ids = torch.nn.functional.pad(
        documents[changed].input_ids, (0, length - len(documents[changed].input_ids)), value=77
    )
    documents[changed].tiles = other.tiles
    after = make_batch(documents, row_length=160)
    same = batch.doc_ids != changed
    assert not torch.equal(model.logits(batch)[~same], model.logits(after)[~same])
    assert torch.equal(model.logits(batch)[same], model.logits(after)[same])


@torch.no_grad()
def test_changing_a_branch_leaves_the_others_bit_equal(model, processor):
    document = make_document(processor, 0, *TURNS, independent=True)
    batch = make_batch([document], row_length=100)
    for branch in (1, 2, 3):
        changed = (batch.doc_ids == 0) & (batch.branch_ids == branch)
        after = dataclasses.replace(
            batch, input_ids=torch.where(changed, (batch.input_ids + 7) % 400 + 6, batch.input_ids)
        )
        assert torch.equal(model.logits(batch)[~changed], model.logits(after)[~changed])
        assert not torch.equal(model.logits(batch)[changed], model.logits(after)[changed])


@torch.no_grad()
def test_padding_never_reaches_a_document(model, processor):
    document = make_document(processor, 0, *TURNS)
    batch = make_batch([document], row_length=len(document) + 9)
    poisoned = dataclasses.replace(batch, input_ids=batch.input_ids.masked_fill(batch.doc_ids < 0, 300))
    real = batch.doc_ids >= 0
    assert torch.equal(model.logits(batch)[real], model.logits(poisoned)[real])


def loss_and_gradients(model, batches):
    model.zero_grad()
    total = sum(NextToken().loss(model, batch) for batch in batches)
    (total / sum(int((b.labels != IGNORE).sum()) for b in batches)).backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(model, left, right):
    (loss_a, gradients_a), (loss_b, gradients_b) = loss_and_gradients(model, left), loss_and_gradients(model, right)
    assert loss_a == pytest.approx(loss_b, rel=1e-5)
    for name, gradient in gradients_a.items():
        assert (gradient - gradients_b[name]).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7, name


def test_packed_loss_is_the_sum_over_documents(model, processor):
    documents = [make_document(processor, i, *TURNS[: 1 + i % 3], images=1 + i % 2) for i in range(5)]
    assert_same(model, [make_batch(documents, rows=2)], [make_batch([d]) for d in documents])


def test_branches_equal_documents_of_their_own(model, processor):
    together = make_document(processor, 5, *TURNS, images=2, independent=True)
    apart = [make_document(processor, 5, turn, images=2) for turn in TURNS]
    assert_same(model, [make_batch([together])], [make_batch(apart)])


def test_every_backend_gives_the_same_gradients_and_answers(processor, device):
    """Image encoder and decoder, where the kernels run."""
    document = make_document(processor, 5, *TURNS, independent=True)
    batch = make_batch([document], row_length=len(document) + 3).to(device)
    prompts = processor.batch([processor.prompt([{"role": "user", "content": text}], []) for text in ("why?", "a")])
    results = {}
    for backend in ATTENTION:
        vision = dataclasses.replace(TINY.vision, attention=backend)
        decoder = dataclasses.replace(TINY.decoder, attention=backend, head_dim=16)  # flex takes no less on a GPU
        torch.manual_seed(0)
        model = VLM(dataclasses.replace(TINY, vision=vision, decoder=decoder)).to(device)
        results[backend] = (
            *loss_and_gradients(model, [batch]),
            nanovlm.generate(model, prompts.to(device), max_new_tokens=3),
        )
    loss, gradients, answers = results.pop("sdpa")
    for other, others, theirs in results.values():
        assert other == pytest.approx(loss, rel=1e-5) and theirs == answers
        for name, gradient in gradients.items():
            assert (gradient - others[name]).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


@torch.no_grad()
def test_turns_of_a_conversation_do_see_each_other(model, processor):
    """The control of the test above: without `independent` a turn sees the earlier ones."""
    chat = make_batch([make_document(processor, 5, *TURNS)])
    alone = make_batch([make_document(processor, 5, turn) for turn in TURNS])
    assert abs(NextToken().loss(model, chat).item() - NextToken().loss(model, alone).item()) > 1e-3


@pytest.mark.parametrize("backend", CROSS_ENTROPY)
def test_logits_only_at_trained_positions_give_the_same_loss(model, processor, backend):
    skip_without_interpreter(backend)
    model.config = dataclasses.replace(
        model.config, decoder=dataclasses.replace(model.config.decoder, cross_entropy=backend)
    )
    batch = make_batch([make_document(processor, i, *TURNS) for i in range(2)])
    logits = model.logits(batch)
    full = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    # Each term of the sum is added with a rounding of its own, and they may be added in another order.
    rounding = len(batch.trained) * torch.finfo(torch.float32).eps
    assert NextToken().loss(model, batch).item() == pytest.approx(full.item(), rel=rounding)


def test_the_loss_can_be_differentiated_twice_through_one_graph():
    """With other gradients: what the first backward pass used is not changed by it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = next_token_loss(hidden, torch.arange(5), weight)
    first = torch.autograd.grad(loss, (hidden, weight), torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.5))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a / 6, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_logits", [1, 3 * 11, 10**9], ids=["one by one", "chunks of 3", "at once"])
@pytest.mark.parametrize("num", [0, 1, 7])
@pytest.mark.parametrize("backend", CROSS_ENTROPY)
def test_loss_in_chunks_is_cross_entropy(backend, num, max_logits):
    """Values and gradients, also where the loss is scaled afterwards; against torch in fp64."""
    skip_without_interpreter(backend)
    torch.manual_seed(0)
    hidden, weight = torch.randn(num, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    labels = torch.randint(11, (num,))
    loss, losses = next_token_losses(hidden, labels, weight, max_logits, backend)
    (0.3 * loss).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="none")
    (0.3 * expected.sum()).backward()
    torch.testing.assert_close(loss, expected.sum().float())  # what is fp32 is as near as fp32 can be
    torch.testing.assert_close(losses, expected.detach().float())
    assert not losses.requires_grad
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-6, rtol=1e-5)


def test_bf16_gradients_are_scaled_in_fp32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5).bfloat16().requires_grad_(), torch.randn(11, 5).bfloat16()
    scale = 1 + 2**-8  # 1 in bf16
    whole, scaled = (
        torch.autograd.grad(factor * next_token_loss(hidden, torch.arange(7), weight), hidden)[0]
        for factor in (1, scale)
    )
    assert torch.equal(scaled, (scale * whole.float()).bfloat16()) and not torch.equal(scaled, whole)


def test_a_batch_without_trained_tokens_has_no_loss_and_no_gradients(model, processor):
    batch = make_batch([make_document(processor, 0, *TURNS)])
    batch = dataclasses.replace(batch, labels=torch.full_like(batch.labels, IGNORE), trained=None)
    loss = NextToken().loss(model, batch)
    loss.backward()
    assert loss.item() == 0 and all(p.grad.abs().sum() == 0 for p in model.parameters())


@torch.no_grad()
def test_image_features_go_to_their_placeholders_in_order(model, processor):
    documents = [make_document(processor, 20 + i, ("what?", "red"), images=2) for i in range(3)]
    batch = make_batch(documents, rows=2)
    is_image = batch.input_ids == model.config.image_token_id
    embedded = model.embed(batch)
    assert torch.equal(embedded[is_image], model.projector(model.vision(normalize(batch.pixel_values))).flatten(0, 1))
    assert torch.equal(embedded[~is_image], model.decoder.embed_tokens(batch.input_ids[~is_image]))


def test_a_wrong_number_of_images_is_an_error(model, processor):
    batch = make_batch([make_document(processor, 0, ("what?", "red"), images=2)])
    with pytest.raises(ValueError, match=r"8 image placeholders in input_ids, but 4 image features \(1 tiles of 4\)"):
        model(dataclasses.replace(batch, pixel_values=batch.pixel_values[:1]))


def test_tiles_of_another_document_are_an_error(model, processor):
    """As many tiles as placeholders, but not those of the documents that show them."""
    batch = make_batch([make_document(processor, i, ("what?", "red"), images=1 + i) for i in range(2)])
    assert batch.tile_doc_ids.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="the tiles of the batch are not in the order of the documents"):
        model(dataclasses.replace(batch, tile_doc_ids=torch.tensor([0, 0, 1], dtype=torch.int32)))


def test_pixels_are_normalised_in_the_model(model, processor):
    batch = make_batch([make_document(processor, 0, ("what?", "red"))])
    floats = dataclasses.replace(batch, pixel_values=normalize(batch.pixel_values))
    assert batch.pixel_values.dtype == torch.uint8 and torch.equal(model(batch), model(floats))
    assert normalize(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_text_alone_works(model, processor):
    batch = make_batch([make_document(processor, 0, ("what?", "red"), images=0)])
    assert model.logits(batch).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize(("num_filters", "patch_size"), [(48, 8), (192, 8), (300, 8), (20, 4)])
def test_a_new_linear_patch_embedding_whitens_patches(num_filters, patch_size):
    """Patches with the stated correlations come out with even variance in every direction but that of the noise."""
    torch.manual_seed(0)
    n = 3 * patch_size**2
    i = torch.arange(n)
    color, y, x = i // patch_size**2, i // patch_size % patch_size, i % patch_size
    correlation = 0.95 ** ((y[:, None] - y).abs() + (x[:, None] - x).abs())
    covariance = 0.2 * correlation * torch.where(color[:, None] == color, 1.0, 0.8)
    filters = whitening_filters(num_filters, patch_size).flatten(1)
    assert filters.shape == (num_filters, n)
    variances = torch.linalg.eigvalsh(filters @ covariance @ filters.T).flip(0)[: min(num_filters, n)]
    even = max(1, num_filters / n)
    assert variances.max() <= even * 1.001 and variances[:12].min() > 0.8 * even


@pytest.mark.parametrize("moe", [None, MoEConfig(num_experts=4, intermediate_size=16)], ids=["dense", "mixture"])
def test_a_training_step_has_no_graph_break(processor, moe):
    model = VLM(dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=moe)))
    model.to(torch.bfloat16 if moe else torch.float32)  # torch cannot trace its grouped product in fp32
    batch = make_batch([make_document(processor, i, *TURNS) for i in range(2)])
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(NextToken().loss)(model, batch, Extras())
    assert explanation.graph_count == 1 and explanation.graph_break_count == 0, explanation.break_reasons


def test_a_training_step_with_kernels_has_no_graph_break(processor):
    skip_without_interpreter("triton")
    moe = MoEConfig(num_experts=4, intermediate_size=16, experts="triton")
    decoder = dataclasses.replace(TINY.decoder, moe=moe, attention="triton", cross_entropy="triton")
    model = VLM(dataclasses.replace(TINY, decoder=decoder, vision=dataclasses.replace(TINY.vision, attention="triton")))
    batch = make_batch([make_document(processor, i, *TURNS) for i in range(2)])
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(NextToken().loss)(model, batch, Extras())
    assert explanation.graph_count == 1 and explanation.graph_break_count == 0, explanation.break_reasons


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_blocks_are_compiled_whole_and_once(processor, monkeypatch, checkpointing):
    """Ten blocks of a kind, one program; also where the backward pass computes them again."""
    counter, compile_block = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile_block(block, backend=counter, fullgraph=True))
    deep = {name: dataclasses.replace(getattr(TINY, name), num_hidden_layers=10) for name in ("vision", "decoder")}
    model, plain = VLM(dataclasses.replace(TINY, **deep)), VLM(dataclasses.replace(TINY, **deep))
    plain.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    parallelize(model, ParallelConfig(compile=True, checkpointing=checkpointing), torch.device("cpu"), "fp32")
    batch = make_batch([make_document(processor, i, *TURNS) for i in range(2)])
    for m in (model, plain):
        NextToken().loss(m, batch).backward()
    assert counter.frame_count == 2
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_seed_gives_the_same_weights_with_any_number_of_threads():
    before, weights = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        weights.append(VLM(scenes().model).state_dict())
    torch.set_num_threads(before)
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
