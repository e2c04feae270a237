"""Cross-attention: gates at 0, who sees which picture, packing and branches; and what every fusion must do."""

import dataclasses

import pytest
import torch
from transformers import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from nanovlm.config import DecoderConfig, FusionConfig, ParallelConfig, TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.tokenizer import CHAT_TEMPLATE
from nanovlm.errors import UserError
from nanovlm.model.fusion import FUSION, CrossBlock, KeysValues
from nanovlm.model.vlm import VLM
from nanovlm.objectives import NextToken
from nanovlm.presets import scenes
from nanovlm.train.optim import make_optimizers
from nanovlm.train.parallel import clear_unused, parallelize
from tests.conftest import TINY, make_batch, make_document
from tests.model.test_vlm import TURNS, assert_same, loss_and_gradients

CROSS = dataclasses.replace(TINY, fusion=FusionConfig("cross_attention"), tiling=TilingConfig("square"))


@pytest.fixture(scope="module")
def crossing(processor):
    """A processor that writes one placeholder a tile."""
    return Processor(processor.tokenizer, CHAT_TEMPLATE, CROSS)


def open_gates(model):
    """Draw the gates, at which a trained model may arrive."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model


def make_model(config=CROSS, **changes):
    torch.manual_seed(0)
    fusion = dataclasses.replace(CROSS.fusion, **changes)
    return open_gates(VLM(dataclasses.replace(config, fusion=fusion, tiling=CROSS.tiling))).eval()


@pytest.fixture
def crossed(model):
    """A model with open gates for each attention backend of the decoder."""
    return make_model(model.config)


@torch.no_grad()
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_a_layer_is_that_of_llama_vision(num_key_value_heads):
    """Of tokens that see all features, and gates that are open."""
    shape = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=num_key_value_heads)
    theirs = MllamaTextConfig(**shape, num_hidden_layers=1, vocab_size=8, pad_token_id=0, rms_norm_eps=1e-5)
    theirs._attn_implementation = "eager"
    torch.manual_seed(0)
    oracle = MllamaCrossAttentionDecoderLayer(theirs, 0).eval()
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, mean=0.3, std=0.3)
    config = DecoderConfig(**shape, head_dim=8)
    block, keys_values = CrossBlock(config), KeysValues(config)
    named = {name.replace("cross_attn_", "").replace("cross_attn.", ""): x for name, x in oracle.state_dict().items()}
    parts = {name: named.pop(name) for name in keys_values.state_dict()}
    keys_values.load_state_dict(parts)
    block.load_state_dict(named)
    x, features = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    mask, sees = torch.ones(2, 1, 7, 5, dtype=torch.bool), torch.ones(2, 7, 1, dtype=torch.bool)
    ours = block(x, *keys_values(features), mask, sees)
    expected = oracle(x, features, None, None, None)
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_new_model_is_its_language_model_to_the_bit(crossed, crossing):
    for block in crossed.fusion.layers:
        block.attn_gate.zero_(), block.mlp_gate.zero_()
    language = VLM(dataclasses.replace(crossed.config, vision=None, image_token_id=None)).eval()
    language.decoder.load_state_dict(crossed.decoder.state_dict())
    batch = make_batch([make_document(crossing, i, *TURNS, images=i) for i in range(3)], row_length=200)
    assert torch.equal(crossed.logits(batch), language.logits(batch))
    assert not torch.equal(open_gates(crossed).logits(batch), language.logits(batch))


def test_drawn_gates_are_closed():
    model = VLM(CROSS)
    assert len(model.fusion.layers) == 2
    assert all(block.attn_gate.item() == block.mlp_gate.item() == 0 for block in model.fusion.layers)


@torch.no_grad()
def test_a_token_that_sees_no_picture_is_as_in_the_language_model(crossed, crossing):
    """Open gates too: a text without pictures, and what stands before the first picture."""
    language = VLM(dataclasses.replace(crossed.config, vision=None, image_token_id=None)).eval()
    language.decoder.load_state_dict(crossed.decoder.state_dict())
    batch = make_batch([make_document(crossing, i, *TURNS, images=i) for i in range(2)], row_length=160)
    is_image = batch.input_ids == crossed.config.image_token_id
    before = (batch.doc_ids == 0) | (torch.arange(160) < is_image.int().argmax())
    assert (before & (batch.doc_ids == 1)).any()
    assert torch.equal(crossed.logits(batch)[before], language.logits(batch)[before])
    alone = make_batch([make_document(crossing, 0, *TURNS, images=0)])
    assert torch.equal(crossed.logits(alone), language.logits(alone))


@torch.no_grad()
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_changing_a_picture_leaves_other_documents_bit_equal(crossed, crossing, changed):
    batch = make_batch([make_document(crossing, 10 * i, *TURNS[: i + 1], images=2) for i in range(3)], row_length=160)
    pixels = torch.where((batch.tile_doc_ids == changed)[:, None, None, None], 7, batch.pixel_values)
    before, after = crossed.logits(batch), crossed.logits(dataclasses.replace(batch, pixel_values=pixels))
    same = batch.doc_ids != changed
    assert torch.equal(before[same], after[same]) and not torch.equal(before[~same], after[~same])


@torch.no_grad()
@pytest.mark.parametrize("only_latest", [False, True])
def test_only_the_latest_picture_is_seen_where_asked(crossing, only_latest):
    """Changing the first of two changes what stands before the second; and behind it, where that sees both."""
    model = make_model(only_latest=only_latest)
    batch = make_batch([make_document(crossing, 0, *TURNS, images=2)])
    first, second = (batch.input_ids[0] == TINY.image_token_id).nonzero()[:, 0].tolist()
    pixels = batch.pixel_values.clone()
    pixels[0] = 7
    before, after = model.fuse(batch), model.fuse(dataclasses.replace(batch, pixel_values=pixels))
    x = before[0]
    changed = (before[1](0, x) != after[1](0, x)).any(-1)[0]
    assert not changed[:first].any() and changed[first:second].all()
    assert changed[second:].all() if not only_latest else not changed[second:].any()


@pytest.mark.parametrize("only_latest", [False, True])
def test_packed_loss_is_the_sum_over_documents(crossing, only_latest):
    model = make_model(only_latest=only_latest)
    documents = [make_document(crossing, i, *TURNS[: 1 + i % 3], images=i % 3) for i in range(5)]
    apart = [make_batch([documents[0], document]) for document in documents[1:]]  # the first has no picture
    assert_same(model, [make_batch(documents + 3 * documents[:1], rows=2)], apart)


def test_branches_equal_documents_of_their_own(crossed, crossing):
    together = make_document(crossing, 5, *TURNS, images=2, independent=True)
    apart = [make_document(crossing, 5, turn, images=2) for turn in TURNS]
    assert int(together.branch_ids.max()) == 3
    assert_same(crossed, [make_batch([together])], [make_batch(apart)])


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_what_is_computed_again_is_the_same(crossing, checkpointing):
    batch = make_batch([make_document(crossing, i, *TURNS, images=i) for i in range(3)])
    loss, gradients = loss_and_gradients(make_model(), [batch])
    model = make_model()
    parallelize(model, ParallelConfig(checkpointing=checkpointing), torch.device("cpu"), "fp32")
    found, theirs = loss_and_gradients(model, [batch])
    assert found == loss and all(torch.equal(gradient, theirs[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("every", [1, 2])
def test_every_parameter_learns(crossing, every):
    model = make_model(every=every)
    assert len(model.fusion.layers) == 2 // every
    _, gradients = loss_and_gradients(model, [make_batch([make_document(crossing, 0, *TURNS, images=2)])])
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("fusion", FUSION)
def test_ranks_run_every_layer_without_pictures(processor, fusion):
    """As ranks that exchange gradients must use the same parameters; a step without pictures moves none of them."""
    model = VLM(dataclasses.replace(CROSS, fusion=FusionConfig(fusion)))
    open_gates(model)
    batch = make_batch([make_document(processor, 0, *TURNS, images=0)])
    with torch.no_grad():
        expected = model.logits(batch)
    model.always_sees = True
    assert torch.equal(model.logits(batch), expected)
    NextToken().loss(model, batch).backward()
    for name, parameter in model.named_parameters():
        is_of_pictures = name.startswith(("vision.", "projector.", "fusion."))
        assert parameter.grad is not None and (not is_of_pictures or not parameter.grad.any()), name
    clear_unused(model, 0)
    assert all(p.grad is None for part in (model.vision, model.projector, model.fusion) for p in part.parameters())


def test_rows_know_their_tiles(processor):
    documents = [make_document(processor, i, *TURNS, images=images) for i, images in enumerate((2, 0, 1, 0, 3, 0))]
    batch = make_batch(documents, rows=3)  # rows of (0, 3), (1, 4), (2, 5)
    assert batch.row_tiles.tolist() == [[0, 1, -1], [2, 3, 4], [5, -1, -1]]
    assert make_batch(documents[1:2]).row_tiles.shape == (1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(fusion=FusionConfig("glue")), "fusion.type = 'glue' is unknown; there are sequence, cross_attention"),
        (dict(fusion=FusionConfig(every=3)), "fusion.every = 3 is above decoder.num_hidden_layers = 2"),
        (dict(fusion=FusionConfig(every=0)), "fusion.every = 0 must be at least 1"),
        (
            dict(fusion=FusionConfig("cross_attention", only_latest=True), tiling=TilingConfig("fit", max_tiles=2)),
            "fusion.only_latest = True needs pictures of one tile, but tiling.policy = fit may cut them: choose square",
        ),
    ],
)
def test_mistakes_in_a_config_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        VLM(dataclasses.replace(TINY, **changes))


def test_gates_have_an_optimizer_where_muon_has_the_rest():
    config = scenes()
    model = VLM(dataclasses.replace(config.model, fusion=FusionConfig("cross_attention")))
    assert make_optimizers(model, config.optim).keys() == {"adamw", "muon"}
