"""Spans, whose tokens see each other in both directions: masks of every backend, documents, and what stays apart."""

import dataclasses

import pytest
import torch

from nanovlm.config import DataConfig, TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.data.process import make_process
from nanovlm.data.records import to_sample
from nanovlm.data.tokenizer import CHAT_TEMPLATE
from nanovlm.data.types import IGNORE, Sample
from nanovlm.errors import UserError
from nanovlm.model import attention
from nanovlm.model.attention import ATTENTION, make_mask
from nanovlm.model.vlm import VLM
from nanovlm.train.counting import count_pairs
from tests.conftest import TINY, make_batch, make_document, make_raw, noise, skip_without_interpreter
from tests.model.test_vlm import TURNS, assert_same, seen

KINDS = ("images", "prompt", "whole_prompt")


def make_config(kind, config=TINY):
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, prefix_attention=kind))


@pytest.fixture(scope="module")
def processors(processor):
    return {kind: Processor(processor.tokenizer, CHAT_TEMPLATE, make_config(kind)) for kind in KINDS}


@torch.no_grad()
@pytest.mark.parametrize("backend", ATTENTION)
def test_mask_is_the_drawing(backend):
    """A span in the middle of a prefix, one on a branch, and one of a single token."""
    doc_ids = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, -1]], dtype=torch.int32)
    branch_ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 0, 0, 0]], dtype=torch.int32)
    span_ids = torch.tensor([[0, 1, 1, 0, 0, 2, 2, 1, 0, 0]], dtype=torch.int32)
    drawing = """
        1.........
        111.......
        111.......
        1111......
        11111.....
        111..11...
        111..11...
        .......1..
        .......11.
        .........1
    """
    expected = torch.tensor([[c == "1" for c in line.strip()] for line in drawing.split()])
    assert torch.equal(make_mask(doc_ids, branch_ids, span_ids=span_ids)[0, 0], expected)
    assert torch.equal(seen(backend, make_mask(doc_ids, branch_ids, backend, span_ids), 10, 10), expected)


# Documents of a row: (length, span) pairs of the prefix, then of each branch; the same number is one span.
ROWS = [
    [[[(3, 0), (20, 1), (5, 0), (9, 2)]], [[(33, 1), (1, 0)]]],
    [[[(16, 1), (4, 0)], [(1, 0), (6, 3), (2, 0)], [(5, 0)]], [[(7, 0)]], [[(25, 4)]]],
]


def lay_out(T):
    """int32[B, T] three times: documents, branches and spans of ROWS, which end in padding."""
    ids = torch.zeros(3, len(ROWS), T, dtype=torch.int32)
    ids[0] = -1
    number = 0
    for row, documents in enumerate(ROWS):
        at = 0
        for document in documents:
            for branch, parts in enumerate(document):
                for length, span in parts:
                    ids[:, row, at : at + length] = torch.tensor([number, branch, span])[:, None]
                    at += length
            number += 1
    return ids.unbind()


@pytest.mark.parametrize("backend", [*ATTENTION, "sdpa by documents"])
def test_every_backend_computes_what_the_written_out_mask_says(backend, monkeypatch):
    """Outputs and gradients, judged by torch in fp64."""
    backend, by_documents = backend.removesuffix(" by documents"), backend.endswith("by documents")
    skip_without_interpreter(backend)
    if by_documents:
        monkeypatch.setattr(attention, "CALL", -(10**9))
    T = 75
    docs, branches, spans = lay_out(T)
    index = torch.arange(T)
    visible = torch.zeros(len(ROWS), T, T, dtype=torch.bool)
    for b in range(len(ROWS)):
        for t in range(T):
            for s in range(T):
                before = s <= t or (spans[b, t] == spans[b, s] and spans[b, t] > 0)
                branch = branches[b, s] in (0, branches[b, t])
                visible[b, t, s] = before and branch and docs[b, t] == docs[b, s]
    real = (docs >= 0)[..., None, None]
    assert (visible & (index > index[:, None]) & real[..., 0]).any()
    torch.manual_seed(0)
    inputs = [torch.randn(len(ROWS), T, n, 16) for n in (4, 2, 2)]
    upstream = torch.randn(len(ROWS), T, 4, 16) * real

    def attend(dtype):
        q, k, v = leaves = [x.to(dtype).requires_grad_() for x in inputs]
        if dtype == torch.float64:
            k, v = (x.repeat_interleave(2, 2) for x in (k, v))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None]).transpose(1, 2)
        else:
            out = ATTENTION[backend](q, k, v, make_mask(docs, branches, backend, spans))
        return [x.double() * real for x in (out, *torch.autograd.grad(out, leaves, upstream.to(dtype)))]

    for ours, wanted in zip(attend(torch.float32), attend(torch.float64), strict=True):
        assert (ours - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_changing_a_document_leaves_the_others_bit_equal(model, processors, kind, monkeypatch):
    """And a later token of a span changes what is computed of its first one, as it does not without spans."""
    model.config = make_config(kind, model.config)
    documents = [make_document(processors[kind], 10 * i, *TURNS[: i + 1], images=2) for i in range(2)]
    batch = make_batch(documents, row_length=100)
    in_span = (batch.doc_ids == 0) & (batch.span_ids == 1)
    first, last = in_span[0].nonzero()[[0, -1], 0].tolist()
    changed = dataclasses.replace(batch, input_ids=batch.input_ids.clone(), pixel_values=batch.pixel_values.clone())
    if kind != "images":
        changed.input_ids[0, last] = 400
    else:  # the lower half of the first picture, of which the first image token shows none
        changed.pixel_values[0, :, 8:] = 255 - changed.pixel_values[0, :, 8:]

        def encode(pixels, _grids):
            """Of each quarter of the rows the first one's mean."""
            return (pixels.float().mean((1, 3)).unflatten(1, (4, 4))[..., :1] / 99).expand(-1, -1, 32)

        monkeypatch.setattr(model, "encode", encode)
    before, after = model.logits(batch), model.logits(changed)
    assert torch.equal(before[batch.doc_ids == 1], after[batch.doc_ids == 1])
    assert not torch.equal(before[0, first], after[0, first])
    model.config = make_config("causal", model.config)  # as a teacher whose student has spans
    assert torch.equal(*(model.logits(x)[0, first] for x in (batch, changed)))


def test_packed_loss_is_the_sum_over_documents(processors):
    torch.manual_seed(0)
    model = VLM(make_config("prompt"))
    documents = [make_document(processors["prompt"], i, *TURNS[: 1 + i % 3], images=i % 3) for i in range(5)]
    assert_same(model, [make_batch(documents, rows=2)], [make_batch([document]) for document in documents])


def test_branches_equal_documents_of_their_own(model, processors):
    """Questions about the same images; and in `prompt` a chosen and a rejected answer to one prompt."""
    model.config = make_config("images", model.config)
    together = make_document(processors["images"], 5, *TURNS, images=2, independent=True)
    apart = [make_document(processors["images"], 5, turn, images=2) for turn in TURNS]
    assert together.span_ids.max() == 2
    assert_same(model, [make_batch([together])], [make_batch(apart)])
    sample = to_sample(make_raw(5, ("what color is the circle?", "red"), images=2))
    other = dataclasses.replace(
        sample, messages=[*sample.messages[:-1], {"role": "assistant", "content": "a blue star"}]
    )
    pair = processors["prompt"].pair(dataclasses.replace(sample, rejected=other.messages[-1]))
    assert pair.branch_ids.max() == 2 and (pair.span_ids > 0).sum() == (pair.branch_ids == 0).sum() > 8
    pair.values = {}
    documents = [processors["prompt"].document(each) for each in (sample, other)]
    assert_same(model, [make_batch([pair])], [make_batch(documents)])


def test_spans_are_where_the_config_says(processors, processor):
    messages = [{"role": role, "content": text} for role, text in
                (("user", "what color?"), ("assistant", "red"), ("user", "why?"), ("assistant", "it is"))]  # fmt: skip
    images = [noise(0), noise(1)]
    messages[0]["content"] = [
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    sample = Sample(images, messages)
    assert processor.document(sample).span_ids is None
    found = processors["images"].document(sample)
    is_image = found.input_ids == TINY.image_token_id
    assert torch.equal(found.span_ids > 0, is_image) and found.span_ids[is_image].tolist() == [1] * 4 + [2] * 4
    for kind, more in (("prompt", 0), ("whole_prompt", 1)):
        found = processors[kind].document(sample)
        first = int((found.labels != IGNORE).nonzero()[0]) + more
        assert found.span_ids.tolist() == [1] * first + [0] * (len(found) - first)
        for num in (1, 3):  # a prompt of one turn, and one of two: the same tokens see each other as in training
            prompt = processors[kind].prompt(messages[:num], images)
            assert prompt.span_ids[:first].all() and prompt.span_ids.sum() == first
            assert torch.equal(prompt.input_ids, found.input_ids[: len(prompt)])


def test_what_would_see_its_own_answer_is_refused(processors):
    sample = to_sample(make_raw(0, *TURNS, independent=True))
    with pytest.raises(UserError, match=r"give records with one question each, or choose images"):
        processors["prompt"].document(sample)
    for learns_from in ("pairs", "own"):
        assert make_process(processors["prompt"], DataConfig(), learns_from)
        with pytest.raises(UserError, match=r"prefix_attention = whole_prompt must be prompt: the objective compares"):
            make_process(processors["whole_prompt"], DataConfig(), learns_from)
    one = to_sample(make_raw(0, TURNS[0], independent=True))
    assert processors["prompt"].document(one).branch_ids.max() == 0
    model = make_config("prompt", TrainConfig().model)
    with pytest.raises(UserError, match=r"data.train_on = all must be answers"):
        dataclasses.replace(
            TrainConfig(), model=model, data=dataclasses.replace(TrainConfig().data, train_on="all")
        ).validate()


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_those_of_the_mask(processors, kind):
    documents = [make_document(processors[kind], i, *TURNS[: 1 + i % 3], images=i % 3) for i in range(4)]
    batch = make_batch(documents, rows=2)
    mask = make_mask(batch.doc_ids, batch.branch_ids, span_ids=batch.span_ids)[:, 0]
    assert count_pairs(batch) == int((mask & (batch.doc_ids >= 0)[:, :, None]).sum())
