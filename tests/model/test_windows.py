"""Sliding windows, sinks and softcaps: masks of every backend, the cache, and what is computed under them."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanovlm
from nanovlm.config import DecoderConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.errors import UserError
from nanovlm.model import attention
from nanovlm.model.attention import ATTENTION, Window, attend_plain, make_mask
from nanovlm.model.cache_attention import BLOCK, Span
from nanovlm.model.decoder import rope_table
from nanovlm.model.kv_cache import KVCache
from nanovlm.model.vlm import VLM, initial_weights
from nanovlm.train.counting import count_pairs
from tests.conftest import TINY, make_batch, make_document, skip_without_interpreter
from tests.model.test_kv_cache import NUM_BLOCKS, draw_spans
from tests.model.test_vlm import TURNS, assert_same, seen

pytestmark = pytest.mark.usefixtures("one_thread")


def with_window(config=TINY, **fields):
    fields = {"sliding_window": 7, "full_attention_layers": (1,)} | fields
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **fields))


@torch.no_grad()
@pytest.mark.parametrize("backend", ATTENTION)
def test_mask_is_the_drawing(backend):
    """A span of three on the prefix, whose first token the last one does not see in a window of two."""
    skip_without_interpreter(backend)
    doc_ids = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, -1]], dtype=torch.int32)
    branch_ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 0, 0, 0]], dtype=torch.int32)
    span_ids = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    window = Window(2, torch.tensor([[0, 1, 2, 3, 4, 3, 4, 0, 1, 0]]))
    drawing = """
        111.......
        111.......
        .11.......
        ..11......
        ...11.....
        ..1..1....
        .....11...
        .......1..
        .......11.
        .........1
    """
    expected = torch.tensor([[c == "1" for c in line.strip()] for line in drawing.split()])
    mask = make_mask(doc_ids, branch_ids, backend, span_ids, window)
    assert torch.equal(seen(backend, mask, 10, 10), expected)
    mask = make_mask(doc_ids, branch_ids, backend, None, window)
    assert torch.equal(seen(backend, mask, 10, 10), expected & torch.ones(10, 10).tril().bool())


@torch.no_grad()
@pytest.mark.parametrize("by_documents", [False, True])
def test_what_no_window_reaches_changes_nothing(processor, by_documents, monkeypatch):
    if by_documents:
        monkeypatch.setattr(attention, "CALL", -(10**9))
    model = VLM(with_window(full_attention_layers=())).eval()
    documents = [make_document(processor, 10 * i, *TURNS[: i + 1]) for i in range(2)]
    batch = make_batch(documents, row_length=100)
    changed = dataclasses.replace(batch, input_ids=batch.input_ids.clone())
    changed.input_ids[0, 0] = 400
    before, after = model.logits(batch), model.logits(changed)
    length = int((batch.doc_ids == 0).sum())
    reach = 1 + 6 * model.config.decoder.num_hidden_layers  # the last token that sees it through all blocks
    assert length > reach and torch.equal(before[0, reach:], after[0, reach:])
    assert all(not torch.equal(before[0, i], after[0, i]) for i in range(reach))


def test_packed_loss_is_the_sum_over_documents(processor, monkeypatch):
    for call in (attention.CALL, -(10**9)):
        monkeypatch.setattr(attention, "CALL", call)
        torch.manual_seed(0)
        model = VLM(with_window(window_rope_theta=100.0))
        documents = [make_document(processor, i, *TURNS[: 1 + i % 3], images=i % 3) for i in range(5)]
        assert_same(model, [make_batch(documents, rows=2)], [make_batch([document]) for document in documents])


def test_branches_equal_documents_of_their_own(processor):
    torch.manual_seed(0)
    model = VLM(with_window())
    together = make_document(processor, 5, *TURNS, images=2, independent=True)
    apart = [make_document(processor, 5, turn, images=2) for turn in TURNS]
    assert_same(model, [make_batch([together])], [make_batch(apart)])


@torch.no_grad()
def test_pairs_are_those_of_the_mask(processor):
    together = make_document(processor, 5, *TURNS, images=2, independent=True)
    batch = make_batch([together, make_document(processor, 1, TURNS[0])], row_length=150)
    for size in (1, 7, 60, 1000):
        mask = make_mask(batch.doc_ids, batch.branch_ids, "plain", None, Window(size, batch.position_ids))
        assert count_pairs(batch, size) == mask[batch.doc_ids[:, None] >= 0].sum()


@settings(max_examples=60, deadline=None)
@given(draw_spans(), st.sampled_from([1, 2, 15, 16, 17, 40]), st.sampled_from(["sdpa", "plain"]), st.integers(0, 10**6))
def test_the_cache_is_seen_as_far_as_the_window(spans, window, backend, seed):
    assert_seen_as_far_as_the_window(spans, window, backend, seed)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_kernels_see_as_far_as_the_window(seed):
    skip_without_interpreter("triton")
    rows = [Span([3, 4, 5, 6, 9], 66, 1), Span([20, 8], 17, 1), Span([11, 2, 25, 12], 16, 34)]
    assert_seen_as_far_as_the_window(rows, 20, "triton", seed)


def assert_seen_as_far_as_the_window(spans, window, backend, seed):
    """In one block of two; a row of several new tokens may be a span."""
    torch.manual_seed(seed)
    N, K, H = 4, 2, 8
    config = DecoderConfig(
        num_hidden_layers=2,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        attention=backend,
        sliding_window=window,
        full_attention_layers=(0,),
    )
    spans = [x._replace(lasts=[x.start + x.num_new - 1] * x.num_new) if seed % 2 else x for x in spans]
    cache = KVCache(config, NUM_BLOCKS, "cpu", torch.float32)
    for x in (*cache.keys, *cache.values):
        x.normal_()
    now = cache.begin(spans)
    num = sum(span.num_new for span in spans)
    q, k, v = torch.randn(1, num, N, H), torch.randn(1, num, K, H), torch.randn(1, num, K, H)
    for layer, size in ((0, 10**6), (1, window)):
        out, offset = now.attend(layer, q, k, v)[0], 0
        for i in now.order:
            span, queries = spans[i], q[0, offset : offset + spans[i].num_new]
            positions = torch.arange(span.start + span.num_new)
            slots = [span.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in positions.tolist()]
            keys, values = (x[layer][slots].double().repeat_interleave(N // K, 1) for x in (cache.keys, cache.values))
            own = positions[span.start :, None]
            last = own if span.lasts is None else torch.tensor(span.lasts)[:, None]
            scores = torch.einsum("tnh,snh->nts", queries.double(), keys) * H**-0.5
            weights = scores.masked_fill((positions > last) | (positions <= own - size), -torch.inf).softmax(-1)
            expected = torch.einsum("nts,snh->tnh", weights, values)
            assert (out[offset : offset + span.num_new] - expected).abs().max() <= 2e-5
            offset += span.num_new


@pytest.mark.parametrize(
    "fields",
    [
        {"window_rope_theta": 100.0, "attention_scale": 0.5},
        {"full_attention_layers": (), "prefix_attention": "images"},
        {"attention": "plain", "attention_softcap": 3.0, "attention_sinks": True},
    ],
)
def test_answers_are_those_without_a_cache(processor, fields):
    """Also in chunks of a prompt, and beside others."""
    torch.manual_seed(0)
    config = with_window(**fields)
    own = Processor(processor.tokenizer, processor.chat_template, config)
    model = VLM(config).eval()
    if config.decoder.attention_sinks:
        for block in model.decoder.layers:
            torch.nn.init.normal_(block.self_attn.sinks)
    documents = [make_document(own, 10 * i, *TURNS[: i + 1], images=i) for i in range(3)]
    answers = nanovlm.generate(model, own.batch(documents), max_new_tokens=12)
    with torch.no_grad():
        for document, answer in zip(documents, answers, strict=True):
            for length, token in enumerate(answer):
                ids = torch.cat((document.input_ids, torch.tensor(answer[:length], dtype=torch.int64)))
                fields = {"input_ids": ids, "labels": ids, "branch_ids": torch.zeros_like(ids).int()}
                if document.span_ids is not None:
                    fields["span_ids"] = torch.cat((document.span_ids, torch.zeros(length).int()))
                logits = model.logits(make_batch([dataclasses.replace(document, **fields)]))[0, len(ids) - 1]
                logits[[config.pad_token_id, config.image_token_id]] = -torch.inf
                assert int(logits.argmax()) == token


def test_sinks_and_softcap_are_the_published_formulas():
    """With gradients, judged in fp64: a sink is one more key, of any score, whose value is 0."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, n, 8).requires_grad_() for n in (4, 2, 2))
    sinks = torch.randn(4).requires_grad_()
    mask = make_mask(torch.zeros(2, 9).int(), torch.zeros(2, 9).int(), "plain")
    upstream = torch.randn(2, 9, 4, 8)

    def published(q, k, v, sinks):
        k, v = (x.repeat_interleave(2, 2) for x in (k, v))
        scores = 1.5 * torch.tanh(torch.einsum("btnh,bsnh->bnts", q, k) * 8**-0.5 / 1.5)
        e = scores.exp() * mask
        weights = e / (e.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
        return torch.einsum("bnts,bsnh->btnh", weights, v)

    inputs = (q, k, v, sinks)
    found = attend_plain(q, k, v, mask, 1.5, sinks)
    exact = published(*(x.double() for x in inputs))
    for ours, wanted in zip(
        (found, *torch.autograd.grad(found, inputs, upstream)),
        (exact, *torch.autograd.grad(exact, inputs, upstream.double())),
        strict=True,
    ):
        assert (ours - wanted).abs().max() <= 1e-5


def test_windows_have_frequencies_of_their_own():
    config = with_window(window_rope_theta=100.0).decoder
    positions = torch.arange(5)[None]
    for table, whole, near in zip(
        rope_table(positions, config),
        rope_table(positions, with_window().decoder),
        rope_table(positions, with_window(rope_theta=100.0).decoder),
        strict=True,
    ):
        assert torch.equal(table, torch.cat((whole, near), dim=2))


def test_a_new_model_begins_as_one_without_offsets_and_factors():
    """Gemma's norms begin at 0, to which 1 is added, and its embeddings have the scale 1 behind their factor."""
    torch.manual_seed(0)
    fields = {"norm_offset": 1.0, "sandwich_norms": True, "embedding_scale": 32**0.5, "tie_word_embeddings": False}
    model = VLM(with_window(**fields))
    norms = {name: x for name, x in model.decoder.named_parameters() if "norm" in name}
    assert len(norms) == 1 + 4 * len(model.decoder.layers) and not any(x.any() for x in norms.values())
    assert 0.9 < model.decoder.embed_tokens(torch.arange(400)).std() < 1.1
    assert {id(x) for x, _ in initial_weights(model)} == {id(x) for x in model.parameters()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"full_attention_layers": (9,)}, r"decoder.full_attention_layers = \(9,\) must be indices"),
        ({"full_attention_layers": (1, 1)}, "must be indices"),
        ({"sliding_window": 0}, r"decoder.full_attention_layers = \(1,\) is for decoder.sliding_window, which is 0"),
        ({"attention_sinks": True}, "decoder.attention = sdpa must be plain or triton for decoder.attention_sinks"),
        ({"attention_softcap": 5.0}, "decoder.attention = sdpa must be plain for decoder.attention_softcap = 5.0"),
        (
            {"attention_softcap": 5.0, "attention": "triton"},
            "decoder.attention = triton must be plain for decoder.attention_s",
        ),
        ({"attention_scale": -1.0}, "decoder.attention_scale = -1.0 must be at least 0"),
        ({"residual_scale": 0.0}, "decoder.residual_scale = 0.0 must be positive"),
    ],
)
def test_what_does_not_go_together_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        with_window(**fields).validate()
    assert isinstance(with_window().validate(), VLMConfig)
