"""Pictures at their own size become documents, rows and batches."""

import dataclasses
import random

import pytest
import torch
from einops import rearrange
from PIL import Image
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

from nanovlm.config import DataConfig, ProjectorConfig, TilingConfig, VisionConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import make_tiles, marker_tokens, plan_tiles
from nanovlm.data.loader import collate, fingerprint, join
from nanovlm.data.packing import image_cost, make_row, pack
from nanovlm.data.process import make_process
from nanovlm.data.reader import flatten, unflatten
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.data.types import Batch, Document, Shrunk
from nanovlm.model.vision import normalize
from tests.conftest import TINY, make_raw, noise


def native(max_patches=64, scale=2, **vision):
    return dataclasses.replace(
        TINY,
        vision=dataclasses.replace(TINY.vision, **vision),
        tiling=TilingConfig("native", max_patches=max_patches),
        projector=ProjectorConfig(scale_factor=scale),
    )


@pytest.fixture(scope="module")
def processor():
    return Processor(train_tokenizer(["what is it? a cat"], 400), CHAT_TEMPLATE, native())


def sizes():
    rng = random.Random(0)
    drawn = [(round(3000 ** rng.random()), round(3000 ** rng.random())) for _ in range(150)]
    return [(1, 1), (1, 5000), (65535, 1), (16, 16), (256, 256), (640, 480), *drawn]


@pytest.mark.parametrize(("patch_size", "scale", "max_patches"), [(16, 1, 256), (14, 1, 729), (16, 2, 1023), (4, 2, 4)])
def test_sizes_are_those_of_transformers(patch_size, scale, max_patches):
    """A tile of 2 x 2 patches as a patch of twice the side, and a fourth as many."""
    config = native(max_patches, scale, patch_size=patch_size, image_size=4 * patch_size * scale).validate()
    for width, height in sizes():
        plan = plan_tiles(width, height, config)
        unit = patch_size * scale
        expected = get_image_size_for_max_num_patches(height, width, unit, max_patches // scale**2)
        assert (plan.height, plan.width) == expected == (plan.rows * unit, plan.cols * unit), (width, height)
        assert plan.num_tiles * scale**2 <= max_patches and not plan.has_global


def test_pixels_are_those_of_transformers():
    """As far as torch's filter and PIL's round alike."""
    config = native(64, 1, patch_size=8, image_size=64)
    theirs = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=64)
    for i, size in enumerate([(40, 40), (64, 64), (30, 100), (300, 7), (301, 203)]):
        image = noise(i, 24).resize(size)
        expected = theirs(image, return_tensors="pt")
        tiles, plan = make_tiles(image, config), plan_tiles(*size, config)
        assert expected["spatial_shapes"][0].tolist() == [plan.rows, plan.cols]
        patches = rearrange(normalize(tiles), "I C h w -> I (h w C)")
        steps = ((expected["pixel_values"][0][: len(patches)] - patches) * 127.5).abs()
        assert steps.max() < 2.1 and steps.mean() < 0.1, size


def test_documents_rows_and_batches_carry_the_grids(processor):
    process = make_process(processor, DataConfig())
    pictures = [noise(0).resize((40, 20)), noise(1), noise(2).resize((10, 90))]
    records = [make_raw(0, ("what is it?", "a cat"), images=0) | {"images": pictures[:n]} for n in (2, 0, 1)]
    records[2]["images"] = pictures[2:]
    documents = [process(record) for record in records]
    plans = [plan_tiles(*picture.size, processor.config) for picture in pictures]
    grids = [(plan.rows, plan.cols) for plan in plans]
    assert len(set(grids)) == 3
    assert [d.grids for d in documents] == [grids[:2], [], grids[2:]]
    for document in documents:
        assert (document.input_ids == processor.config.image_token_id).sum() == len(document.tiles)
    for ours, back in zip(documents, unflatten(flatten(documents)), strict=True):
        assert ours.grids == back.grids and torch.equal(ours.tiles, back.tiles)
    batch = collate([make_row(documents[:2], 200, 0), make_row(documents[2:], 200, 0)])
    assert batch.grids == grids and batch.to("cpu").grids == grids
    joined = join([collate([make_row([document], 200, 0)]) for document in documents])
    assert joined.grids == grids and joined.span_ids is None
    for number, document in enumerate(documents):
        for tiles, own in (batch.tiles_of(number), joined.tiles_of(number)):
            assert torch.equal(tiles, document.tiles) and own == document.grids


def test_joined_batches_keep_their_spans(processor):
    """A batch without any beside one that has some."""
    process = make_process(processor, DataConfig())
    documents = [process(make_raw(i, ("what is it?", "a cat"))) for i in range(2)]
    documents[1].span_ids = torch.tensor([0, 1, 1, 0, 2], dtype=torch.int32)
    joined = join([collate([make_row([document], 200, 0)]) for document in documents])
    assert joined.span_ids.dtype == torch.int32 and joined.span_ids.shape == (2, 200)
    assert not joined.span_ids[0].any() and joined.span_ids[1, :6].tolist() == [0, 1, 1, 0, 2, 0]


def test_pictures_are_weighed_by_their_own_patches(processor):
    """P patches of D = 768: 12 D^2 multiplications each in the linear layers, 2 D P in attention, of each block.

    A picture of 24 x 24 patches of 16 pixels costs as much as a tile of as many. One large picture costs more than
    small ones of as many patches together, so that rows of equally long documents share the large ones.
    """

    def make(*grids, length=60, side=32):
        tiles = torch.zeros(sum(rows * columns for rows, columns in grids), 3, side, side, dtype=torch.uint8)
        document = Document(*(torch.zeros(length, dtype=torch.int64) for _ in range(3)), tiles)
        return dataclasses.replace(document, grids=list(grids))

    def multiply(document):
        numbers = [4 * rows * columns for rows, columns in document.grids]
        return sum(P * (12 * 768**2 + 2 * 768 * P) for P in numbers)

    tile = 576 * (12 * 768**2 + 2 * 768 * 576)
    whole, large, small = make((12, 12), length=200), make((6, 8)), make(*[(1, 2)] * 24)
    assert image_cost(whole) == pytest.approx(256) == image_cost(dataclasses.replace(whole, grids=[])) / 144
    for document in (whole, large, small):
        assert image_cost(document) == pytest.approx(256 * multiply(document) / tile)
    assert image_cost(make()) == 0 and image_cost(make((12, 12), side=16)) < 256 / 4
    documents = [large if i < 8 else small for i in range(16)]
    costs = [image_cost(document) for document in documents]
    rows = pack([60] * 16, [48] * 16, 240, None, costs)
    assert [sum(i < 8 for i in row) for row in rows] == [2] * 4
    assert [sum(costs[i] for i in row) for row in rows] == [pytest.approx(sum(costs) / 4)] * 4


def test_pictures_of_equal_pixels_but_another_grid_have_another_fingerprint(processor):
    document = make_process(processor, DataConfig())(make_raw(0, ("what is it?", "a cat")))
    turned = dataclasses.replace(document, grids=[(1, len(document.tiles))])
    assert document.grids != turned.grids and fingerprint(document) != fingerprint(turned)


def test_what_is_too_long_is_shrunk_to_fewer_patches(processor):
    record = make_raw(0, ("what is it?", "a cat"))
    whole = make_process(processor, DataConfig())(record)
    length = len(whole) - 5
    document = make_process(processor, DataConfig(row_length=length, too_long="shrink"))(record)
    assert type(document) is Shrunk and len(document) == length - (len(whole.tiles) - 5 - len(document.tiles))
    assert sum(rows * columns for rows, columns in document.grids) == len(document.tiles)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (native(3), "tiling.max_patches = 3 is too few for one image token, which takes 4: the square of"),
        (native(class_token=True), "vision.class_token = True must be False for tiling.policy = native"),
        (native(num_registers=2), "vision.num_registers = 2 must be 0 for tiling.policy = native"),
        (native(second=VisionConfig(16, 4)), "vision.second = .* must be None for tiling.policy = native"),
    ],
)
def test_what_does_not_go_with_it_is_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        config.validate()


def test_a_batch_without_pictures_has_no_grids(processor):
    batch = processor.batch([processor.prompt([{"role": "user", "content": "what?"}])])
    assert isinstance(batch, Batch) and batch.grids == [] and batch.pixel_values.shape == (0, 3, 8, 8)


def test_other_policies_have_no_grids():
    config = dataclasses.replace(TINY, tiling=TilingConfig("fit", max_tiles=4))
    processor = Processor(train_tokenizer(["a cat"], 400, marker_tokens(config)), CHAT_TEMPLATE, config)
    document = processor.prompt([{"role": "user", "content": "what?"}], [Image.new("RGB", (32, 16))])
    assert len(document.tiles) == 3 and document.grids == []
