"""M-RoPE: positions in time, row and column against transformers', in rows of several documents and in branches."""

import dataclasses

import pytest
import torch
import transformers as hub

from nanovlm.config import ProjectorConfig, SamplingConfig, TilingConfig
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.types import Document
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request, Token
from nanovlm.model.decoder import find_axes
from nanovlm.model.mrope import place_tokens
from nanovlm.model.vlm import VLM
from tests.conftest import TINY

IMAGE = TINY.image_token_id


def make_config():
    """DeepStack, squares of attention and M-RoPE together."""
    vision = dataclasses.replace(
        TINY.vision, num_hidden_layers=3, window_size=16, full_attention_layers=(2,), positions="both"
    )
    return dataclasses.replace(
        TINY,
        vision=vision,
        projector=ProjectorConfig("merger", norm="layer", deepstack_layers=(1,)),
        tiling=TilingConfig("qwen", min_pixels=64, max_pixels=64 * 30),
        decoder=dataclasses.replace(TINY.decoder, rope_sections=(2, 1, 1)),
    )


def make_document(seed, parts):
    """`parts` are numbers of text tokens or grids of pictures, with the branch that each is on: (part, branch)."""
    generator = torch.Generator().manual_seed(seed)
    ids, branches, grids = [], [], []
    for part, branch in parts:
        if isinstance(part, tuple):
            grids.append(part)
            own = [IMAGE] * (part[0] * part[1])
        else:
            own = torch.randint(3, 500, (part,), generator=generator).tolist()
        ids, branches = ids + own, branches + [branch] * len(own)
    num = sum(rows * columns for rows, columns in grids)
    tiles = torch.randint(0, 256, (num, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([*ids[1:], -100])
    return Document(torch.tensor(ids), labels, torch.tensor(branches, dtype=torch.int32), tiles, grids=grids)


def stack(*rows):
    length = max(sum(map(len, row)) for row in rows)
    return collate([make_row(list(row), length + 3, TINY.pad_token_id) for row in rows])


def flat(*parts):
    return [(part, 0) for part in parts]


ALONE = [
    make_document(0, flat(3, (2, 3), 4)),
    make_document(1, flat((1, 5), (4, 2), 2, (3, 3))),
    make_document(2, flat(7)),
]


def theirs(document):
    """The positions that Qwen2.5-VL and Qwen3-VL give a document, int64[3, L]."""
    config = hub.Qwen3VLConfig(vision_config={"depth": 1, "hidden_size": 8, "num_heads": 1}, text_config={
        "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 8, "intermediate_size": 8,
    })  # fmt: skip
    with torch.device("meta"):
        model = hub.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLModel(config)
    ids = document.input_ids[None]
    grids = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in document.grids]).view(-1, 3)
    return model.get_rope_index(ids, (ids == IMAGE).int(), grids if len(grids) else None)[0][:, 0]


def places_of(batch):
    where = (batch.input_ids == IMAGE).flatten().nonzero()[:, 0]
    return place_tokens(batch.position_ids, batch.doc_ids, batch.branch_ids, where, batch.grids)


def test_positions_are_those_of_transformers_in_rows_of_several_documents():
    """With a token between pictures, without which transformers takes two of them for one."""
    spaced = make_document(1, flat(1, (1, 5), 1, (4, 2), 2, (3, 3)))
    documents = [ALONE[0], spaced, ALONE[2]]
    placed = places_of(stack([documents[0], documents[1]], [documents[2], documents[0]]))
    for row, start, document in ((0, 0, 0), (0, len(documents[0]), 1), (1, 0, 2), (1, len(documents[2]), 0)):
        own = placed[:, row, start : start + len(documents[document])]
        assert torch.equal(own, theirs(documents[document]))


def test_pictures_side_by_side_begin_where_the_one_before_has_its_end():
    placed = places_of(stack([ALONE[1]]))[:, 0]
    assert placed[:, :6].tolist() == [[0] * 5 + [5], [0] * 5 + [5], [0, 1, 2, 3, 4, 5]]
    assert placed[0, 5:].tolist() == [5] * 8 + [9, 10] + [11] * 9 + placed[0, 24:].tolist()


def test_frequencies_turn_with_the_axis_that_is_theirs():
    d = dataclasses.replace(TINY.decoder, head_dim=16)
    assert find_axes(dataclasses.replace(d, rope_sections=(3, 3, 2))) == [0, 0, 0, 1, 1, 1, 2, 2]
    both = dataclasses.replace(d, rope_sections=(4, 2, 2), rope_interleaved=True)
    assert find_axes(both) == [0, 1, 2, 0, 1, 2, 0, 0]


@torch.no_grad()
def test_branches_with_pictures_are_the_documents_written_out():
    torch.manual_seed(0)
    model = VLM(make_config()).eval()
    whole = make_document(3, [(2, 0), ((3, 2), 0), (2, 0), (2, 1), ((1, 4), 1), (3, 1), (4, 2), ((2, 2), 2), (1, 2)])
    logits = model.logits(stack([ALONE[0], whole]))[0, len(ALONE[0]) :]
    prefix, pictures = whole.branch_ids == 0, [(0, 6, (3, 2)), (6, 10, (1, 4)), (10, 14, (2, 2))]
    for branch, own in ((1, pictures[1]), (2, pictures[2])):
        kept = prefix | (whole.branch_ids == branch)
        tiles = torch.cat([whole.tiles[start:end] for start, end, _ in (pictures[0], own)])
        ids, zeros = whole.input_ids[kept], torch.zeros(int(kept.sum()), dtype=torch.int32)
        alone = Document(ids, whole.labels[kept], zeros, tiles, grids=[pictures[0][2], own[2]])
        expected = model.logits(stack([alone]))[0, : len(alone)]
        found = logits[: len(whole)][kept]
        assert (found - expected)[: len(alone)].abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_document_is_not_changed_by_its_neighbours():
    torch.manual_seed(0)
    model = VLM(make_config()).eval()
    first = model.logits(stack([ALONE[0], ALONE[1]]))[0, len(ALONE[0]) :]
    alone = model.logits(stack([ALONE[1]]))[0]
    assert (first[: len(ALONE[1])] - alone[: len(ALONE[1])]).abs().max() <= 1e-5 * alone.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("chunk", [512, 5])
def test_the_engine_answers_as_whole_passes_do(chunk):
    """In chunks of a prompt that cut pictures, beside others, and again from kept blocks."""
    torch.manual_seed(0)
    model = VLM(make_config()).eval()
    long = make_document(5, flat(9, (4, 5), 3, (2, 6), 2))
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.0)
    engine = Engine(model, chunk=chunk)
    for _again in range(2):
        prompts = [long, ALONE[0], ALONE[2]]
        numbers = [engine.submit(Request(prompt, sampling)) for prompt in prompts]
        told = {number: [] for number in numbers}
        while not engine.is_idle:
            for event in engine.step():
                if isinstance(event, Token):
                    told[event.request].append(event.id)
        for number, prompt in zip(numbers, prompts, strict=True):
            ids = prompt.input_ids
            for token in told[number]:
                fields = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
                fields["branch_ids"] = torch.zeros(len(ids), dtype=torch.int32)
                logits = model.logits(stack([dataclasses.replace(prompt, **fields)]))[0, len(ids) - 1]
                logits[[TINY.pad_token_id, IMAGE]] = -torch.inf
                assert int(logits.argmax()) == token
                ids = torch.cat((ids, torch.tensor([token])))


def test_gradients_reach_every_part():
    torch.manual_seed(0)
    model = VLM(make_config())
    model(stack([ALONE[0], ALONE[1]])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
