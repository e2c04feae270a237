"""Texts of a packed row are embedded as each alone; the poolings are what their formulas say."""

import dataclasses

import pytest
import torch
from torch import nn

from nanovlm.config import DualConfig, TextConfig, VisionConfig
from nanovlm.data.dual import DualProcessor, train_text_tokenizer
from nanovlm.errors import UserError
from nanovlm.model.dual import IMAGE_POOLING, TEXT_POOLING, Dual
from tests.model.test_parity import assert_close, randomize

SHAPES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TINY_DUAL = DualConfig(
    vision=VisionConfig(image_size=16, patch_size=4, **SHAPES),
    text=TextConfig(vocab_size=300, max_position_embeddings=24, **SHAPES),
    projection_size=32,
)
TEXTS = ["a red circle", "two blue squares and a star", "x", "the digit 7", "a red circle at the top"]
TEXT_TOWERS = {
    "SigLIP": {"is_padded": True},
    "bidirectional": {},
    "causal": {"is_causal": True},
    "rotary": {"positions": "rotary"},
    "mean": {"pooling": "mean"},
    "causal rotary mean": {"is_causal": True, "positions": "rotary", "pooling": "mean"},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_text_tokenizer(TEXTS, 290)


def make(tokenizer, text=None, **changes) -> tuple[Dual, DualProcessor]:
    config = dataclasses.replace(TINY_DUAL, text=dataclasses.replace(TINY_DUAL.text, **text or {}), **changes)
    torch.manual_seed(0)
    model = Dual(config)
    randomize(model)
    return model, DualProcessor(tokenizer, config)


def tile(*fill):
    return torch.tensor(fill, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


@torch.no_grad()
@pytest.mark.parametrize("kind", TEXT_TOWERS)
def test_a_text_in_a_row_is_embedded_as_it_is_alone(tokenizer, kind):
    model, processor = make(tokenizer, TEXT_TOWERS[kind])
    batch = processor.encode_texts(TEXTS)
    assert len(batch.input_ids) == 1  # all in one row
    together = model.embed_texts(batch)
    assert together.shape == (len(TEXTS), 32)
    for text, embedding in zip(TEXTS, together, strict=True):
        assert_close(model.embed_texts(processor.encode_texts([text]))[0], embedding)
    assert (together[1:] - together[:1]).abs().amax(1).min() > 0.01
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(TEXTS)))


@torch.no_grad()
@pytest.mark.parametrize("kind", TEXT_TOWERS)
def test_another_text_beside_it_changes_no_bit(tokenizer, kind):
    model, processor = make(tokenizer, TEXT_TOWERS[kind])
    batch = processor.encode_texts(TEXTS)
    before = model.embed_texts(batch)
    batch.input_ids[batch.doc_ids == 1] = 280
    after = model.embed_texts(batch)
    assert (after[1] - before[1]).abs().max() > 0.01
    others = [i for i in range(len(TEXTS)) if i != 1]
    assert torch.equal(after[others], before[others])


@torch.no_grad()
def test_a_bidirectional_text_sees_its_end_and_a_causal_one_does_not(tokenizer):
    """What stands for a text is read at its first token here, which the last one reaches or does not."""
    for is_causal in (False, True):
        model, processor = make(tokenizer, {"is_causal": is_causal})
        batch = processor.encode_texts(["two blue squares"])
        rows = (batch.input_ids, batch.doc_ids, batch.branch_ids, batch.position_ids)
        before = model.text(*rows)[0][0, 0]
        batch.input_ids[0, int((batch.doc_ids == 0).sum()) - 1] = 280
        assert torch.equal(model.text(*rows)[0][0, 0], before) == is_causal


@torch.no_grad()
def test_the_order_of_words_is_known_to_learned_and_rotary_positions(tokenizer):
    for positions in ("learned", "rotary"):
        model, processor = make(tokenizer, {"positions": positions, "pooling": "mean"})
        one, other = model.embed_texts(processor.encode_texts(["red circle", "circle red"]))
        assert (one - other).abs().max() > 0.01


@torch.no_grad()
def test_pooling_by_attention_is_that_of_torch():
    """SigLIP's head: torch's own attention of the probe over the patches, then the MLP beside it, in fp64."""
    torch.manual_seed(0)
    pooling = IMAGE_POOLING["attention"](TINY_DUAL.vision)
    nn.init.normal_(pooling.probe)
    randomize(pooling)
    pooling.double()
    theirs = nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    ours = pooling.attention
    theirs.in_proj_weight.copy_(torch.cat([f.weight for f in (ours.q_proj, ours.k_proj, ours.v_proj)]))
    theirs.in_proj_bias.copy_(torch.cat([f.bias for f in (ours.q_proj, ours.k_proj, ours.v_proj)]))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x_IPD = torch.randn(3, 7, 32, dtype=torch.float64)
    x_ID = theirs(pooling.probe.expand(3, 1, 32), x_IPD, x_IPD)[0][:, 0]
    expected = x_ID + pooling.mlp(pooling.layernorm(x_ID))
    assert_close(pooling(x_IPD), expected)  # attention computes in fp32


@torch.no_grad()
def test_class_and_mean_poolings_take_their_tokens():
    vision = dataclasses.replace(TINY_DUAL.vision, class_token=True, num_registers=2)
    x_IPD = torch.randn(2, 3 + 16, 32)
    assert torch.equal(IMAGE_POOLING["class"](vision)(x_IPD), x_IPD[:, 0])
    torch.testing.assert_close(IMAGE_POOLING["mean"](vision)(x_IPD), x_IPD[:, 3:].sum(1) / 16)
    doc_ids = torch.tensor([[4, 4, 5, -1], [6, 6, 6, 7]], dtype=torch.int32)
    x_BTD = torch.randn(2, 4, 8)
    means = [x_BTD[0, :2].mean(0), x_BTD[0, 2], x_BTD[1, :3].mean(0), x_BTD[1, 3]]
    torch.testing.assert_close(TEXT_POOLING["mean"](x_BTD, doc_ids), torch.stack(means))
    ends = torch.stack([x_BTD[0, 1], x_BTD[0, 2], x_BTD[1, 2], x_BTD[1, 3]])
    assert torch.equal(TEXT_POOLING["last"](x_BTD, doc_ids), ends)


@pytest.mark.parametrize("kind", ["SigLIP", "mean"])
def test_parts_have_the_gradients_of_the_whole(tokenizer, kind):
    model, processor = make(tokenizer, TEXT_TOWERS[kind])
    batch = processor.encode_texts(TEXTS * 5)  # several rows
    batch.pixel_values = tile(*range(0, 250, 10))
    found = []
    for num_parts in (1, 3):
        model.zero_grad()
        images, texts = model(batch, num_parts)
        assert images.shape == texts.shape == (25, 32)
        (model.logits(images, texts).sigmoid() * torch.linspace(-1, 1, 25)).sum().backward()
        found.append([p.grad for p in model.parameters()])
    for whole, parts in zip(*found, strict=True):
        assert (whole - parts).abs().max() <= 1e-5 * max(1, whole.abs().max())


def test_a_rank_without_pairs_uses_every_parameter(tokenizer):
    for kind in ("SigLIP", "bidirectional", "mean"):
        model, processor = make(tokenizer, TEXT_TOWERS[kind])
        batch = processor.encode_texts(["a"])
        batch.doc_ids[:] = -1
        batch.pixel_values = tile()
        images, texts = model(batch)
        assert images.shape == texts.shape == (0, 32)
        (images.sum() + texts.sum() + model.logit_scale.sum() + model.logit_bias.sum()).backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(projection_size=16), "dual.vision.hidden_size = 32 must be dual.projection_size = 16 without"),
        (dict(image_pooling="class"), "dual.image_pooling = class needs dual.vision.class_token = True"),
        (dict(text={"is_padded": True, "is_causal": True}), "is_padded = True does not fit dual.text.is_causal = True"),
        (dict(text={"num_attention_heads": 5}), "dual.text.num_attention_heads = 5 must divide"),
        (dict(text={"num_attention_heads": 32, "positions": "rotary"}), "gives 32 heads an odd width"),
        (dict(pad_token_id=300), "dual.pad_token_id = 300 is outside dual.text.vocab_size = 300"),
        (dict(image_pooling="max"), "dual.image_pooling = 'max' is unknown; there are attention, class, mean"),
        (dict(text={"pooling": "first"}), "dual.text.pooling = 'first' is unknown; there are last, mean"),
        (dict(vision={"patch_size": 17}), "dual.vision.patch_size = 17 is above dual.vision.image_size = 16"),
    ],
)
def test_mistakes_in_the_config(changes, sentence):
    towers = {
        name: dataclasses.replace(getattr(TINY_DUAL, name), **changes[name])
        for name in changes.keys() & {"text", "vision"}
    }
    with pytest.raises(UserError, match=sentence):
        Dual(dataclasses.replace(TINY_DUAL, **changes | towers))
