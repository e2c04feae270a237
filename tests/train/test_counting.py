"""What a step computes, counted by formula and by torch."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanovlm.config import FusionConfig, MoEConfig, ProjectorConfig, TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.records import to_sample
from nanovlm.model.attention import make_mask
from nanovlm.model.projector import PROJECTORS
from nanovlm.model.vision import VisionEncoder
from nanovlm.model.vlm import VLM
from nanovlm.objectives import NextToken
from nanovlm.train.counting import count_encoder, count_flops, count_pairs
from tests.conftest import TINY, make_batch, make_document, make_raw, noise

MOE = MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=24, num_shared_experts=1, experts="loop")
TURNS = [("what color is the circle?", "red"), ("how many objects are there?", "3"), ("where?", "top left")]


def test_pairs_are_those_of_the_mask(processor):
    documents = [make_document(processor, i, *TURNS[: 1 + i % 3], images=1, independent=i % 2 == 0) for i in range(5)]
    batch = make_batch(documents, rows=2)
    assert (batch.branch_ids > 1).any() and (batch.doc_ids < 0).any()
    mask = make_mask(batch.doc_ids, batch.branch_ids)[:, 0]
    assert count_pairs(batch) == int((mask & (batch.doc_ids >= 0)[:, :, None]).sum())


@pytest.mark.parametrize("frozen", [(), ("fusion",), ("vision", "projector"), ("vision",)], ids=" ".join)
def test_operations_of_cross_attention_are_those_that_torch_counts(processor, frozen):
    """Of a document that fills its row; torch also computes what tokens before the picture would see."""
    config = dataclasses.replace(TINY, fusion=FusionConfig("cross_attention", every=2))
    crossing = Processor(processor.tokenizer, processor.chat_template, config)
    model, document = VLM(config), make_document(crossing, 0, ("what?", "a red circle"))
    batch, trains = make_batch([document]), {}
    for name, part in model.named_children():
        trains[name] = name not in frozen
        part.requires_grad_(trains[name])
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        NextToken().loss(model, batch).backward()
    d, T = config.decoder, len(document)
    H, before = d.num_attention_heads * d.head_dim, int((document.input_ids == TINY.image_token_id).int().argmax())
    unseen = before * (
        (2 * d.hidden_size * H + 3 * d.hidden_size * d.intermediate_size) * (2 + trains["fusion"])
        + 2 * H * config.num_image_features * 3
    )
    masked = 3 * 2 * d.num_hidden_layers * H * (T * T - count_pairs(batch))
    assert before > 0 and counter.get_total_flops() == count_flops(config, batch, trains) + 2 * (masked + unseen)


@pytest.mark.parametrize(
    "moe", [None, MOE, dataclasses.replace(MOE, layers=(1,))], ids=["dense", "mixture", "dense, then mixture"]
)
@pytest.mark.parametrize(
    "frozen", [(), ("vision",), ("vision", "decoder"), ("decoder",), ("vision", "projector")], ids=" ".join
)
def test_operations_are_those_that_torch_counts(processor, moe, frozen):
    """One document that fills its row, without the padding and the masked pairs that torch computes and we do not."""
    config = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=moe))
    compare_with_torch(config, processor, frozen)


@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "projector")], ids=" ".join)
@pytest.mark.parametrize("kind", ["tokens beside", "convolution", "two encoders"])
def test_operations_of_other_encoders(processor, kind, frozen):
    """Convolutions without groups, of whose gradients torch counts those of other groups too."""
    changes = {
        "tokens beside": {"class_token": True, "num_registers": 2, "positions": "rotary", "layer_scale": True},
        "convolution": {"patches": "convolution", "convolution_blocks": 0},
        "two encoders": {"second": dataclasses.replace(TINY.vision, hidden_size=48, class_token=True)},
    }
    compare_with_torch(
        dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, **changes[kind])), processor, frozen
    )


def test_operations_of_grouped_convolutions():
    """Forward alone, of which torch counts none too many."""
    config = dataclasses.replace(TINY.vision, patches="convolution", convolution_blocks=2, patch_size=8)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        VisionEncoder(config)(torch.zeros(1, 3, 16, 16))
    assert counter.get_total_flops() == 2 * sum(count_encoder(config))


def test_operations_on_native_pictures(processor):
    """With rotary positions, as products that stretch learned ones are not counted."""
    vision = dataclasses.replace(TINY.vision, positions="rotary")
    config = dataclasses.replace(TINY, vision=vision, tiling=TilingConfig("native", max_patches=64))
    processor = Processor(processor.tokenizer, processor.chat_template, config)
    record = make_raw(0, ("what?", "a red circle")) | {"images": [noise(0), noise(1).resize((50, 20))]}
    document = processor.document(to_sample(record))
    assert len(set(document.grids)) == 2
    compare_with_torch(config, processor, (), document)


def compare_with_torch(config, processor, frozen, document=None):
    model, document = VLM(config), document or make_document(processor, 0, ("what?", "a red circle"))
    batch = make_batch([document], len(document))
    trains = {}
    for name, part in model.named_children():
        trains[name] = name not in frozen
        part.requires_grad_(trains[name])
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        NextToken().loss(model, batch).backward()
    assert counter.get_total_flops() == count_flops(config, batch, trains) + masked_operations(config, batch)


@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "projector")], ids=" ".join)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_operations_of_a_projector_are_those_that_torch_counts(processor, projector, frozen):
    num_tokens = 0 if projector in ("linear", "mlp") else 4
    config = dataclasses.replace(TINY, projector=ProjectorConfig(type=projector, num_tokens=num_tokens))
    model, document = VLM(config), make_document(processor, 0, ("what?", "a red circle"), images=2)
    batch = make_batch([document], len(document))
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        NextToken().loss(model, batch).backward()
    trains = {name: name not in frozen for name in ("vision", "projector", "decoder")}
    assert counter.get_total_flops() == count_flops(config, batch, trains) + masked_operations(config, batch)


def masked_operations(config, batch):
    """Return the operations on masked pairs: torch computes all T x T pairs of a row."""
    d, T = config.decoder, batch.input_ids.shape[1]
    return 3 * 2 * 2 * d.num_hidden_layers * d.num_attention_heads * d.head_dim * (T * T - count_pairs(batch))
