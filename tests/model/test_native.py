"""Pictures at their own size: equal to transformers' SigLIP 2, and no picture sees another."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from nanovlm.config import ProjectorConfig, TilingConfig, VisionConfig
from nanovlm.data.chat import Processor
from nanovlm.data.records import to_sample
from nanovlm.errors import UserError
from nanovlm.model.attention import ATTENTION
from nanovlm.model.native import stretch, stretch_positions
from nanovlm.model.vision import VisionEncoder
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, make_batch, make_raw, noise, skip_without_interpreter
from tests.model.test_parity import assert_close, randomize

PATCH, SIDE = 4, 6
SHARED = dict(patch_size=PATCH, hidden_size=48, intermediate_size=100, num_hidden_layers=2, num_attention_heads=3)
# In patches: larger and smaller than the table of positions, a strip, two of one length, one of a single patch.
GRIDS = [(4, 8), (2, 2), (12, 2), (8, 4), (2, 18), (6, 6), (10, 8)]


def make_encoder(attention="sdpa"):
    torch.manual_seed(0)
    encoder = VisionEncoder(VisionConfig(image_size=SIDE * PATCH, attention=attention, **SHARED))
    randomize(encoder)
    return encoder


def make_tiles(grids, size):
    """Random pictures as tiles of size x size pixels, and as patches one row after the other."""
    random = torch.Generator().manual_seed(1)
    tiles, patches = [], []
    for rows, columns in grids:
        picture = torch.randn(3, rows * PATCH, columns * PATCH, generator=random)
        tiles.append(rearrange(picture, "C (y h) (x w) -> (y x) C h w", h=size, w=size))
        patches.append(rearrange(picture, "C (y h) (x w) -> (y x) (h w C)", h=PATCH, w=PATCH))
    return torch.cat(tiles), patches


@torch.no_grad()
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("attention", ATTENTION)
def test_features_equal_siglip2(attention, scale):
    skip_without_interpreter(attention)
    encoder = make_encoder(attention)
    config = Siglip2VisionConfig(**SHARED, num_patches=SIDE * SIDE, vision_use_head=False)
    theirs = Siglip2VisionModel(config).eval()
    renamed = {}
    for name in theirs.state_dict():
        ours = name.removeprefix("vision_model.").removeprefix("embeddings.").removeprefix("encoder.")
        tensor = encoder.state_dict()[ours]
        renamed[name] = tensor.permute(0, 2, 3, 1).flatten(1) if ours == "patch_embedding.weight" else tensor
    theirs.load_state_dict(renamed)
    tiles, patches = make_tiles(GRIDS, scale * PATCH)
    lengths = torch.tensor([len(x) for x in patches])
    padded = torch.nn.utils.rnn.pad_sequence(patches, batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    expected = theirs(padded, pixel_attention_mask=mask.int(), spatial_shapes=torch.tensor(GRIDS)).last_hidden_state
    found = encoder(tiles, [(rows // scale, columns // scale) for rows, columns in GRIDS])
    assert found.shape == (sum(lengths) // scale**2, scale**2, SHARED["hidden_size"])
    for (rows, columns), piece, wanted in zip(
        GRIDS, found.split((lengths // scale**2).tolist()), expected, strict=True
    ):
        shape = dict(y=rows // scale, x=columns // scale, a=scale, b=scale)
        assert_close(rearrange(piece, "(y x) (a b) D -> (y a x b) D", **shape), wanted[: rows * columns])


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_positions_are_interpolated_as_torch_does(grid, scale):
    torch.manual_seed(0)
    rows, columns = grid
    table = torch.randn(SIDE * SIDE, 5, requires_grad=True)
    ours = stretch_positions(table, [(rows // scale, columns // scale)], scale**2)
    stretched = F.interpolate(
        rearrange(table, "(y x) D -> 1 D y x", y=SIDE), size=grid, mode="bilinear", antialias=True, align_corners=False
    )
    theirs = rearrange(stretched, "1 D (y a) (x b) -> (y x) (a b) D", a=scale, b=scale)
    assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    ours_grad, theirs_grad = (torch.autograd.grad((x * weights).sum(), table)[0] for x in (ours, theirs))
    assert_close(ours_grad, theirs_grad)


@pytest.mark.parametrize("rows", [2, 7, 19])
def test_positions_of_one_column(rows):
    """Are those of two columns, where the table's columns are equal: of one alone torch 2.13 makes equal rows."""
    table = torch.randn(SIDE, 1, 5).expand(-1, SIDE, -1)
    ours = stretch_positions(table.flatten(0, 1), [(rows, 1)], 1)[:, 0]
    theirs = F.interpolate(rearrange(table, "y x D -> 1 D y x"), size=(rows, 2), mode="bilinear", antialias=True)
    assert_close(ours, theirs[0, :, :, 0].T)


def test_positions_found_without_gradients_serve_training():
    stretch.cache_clear()
    encoder = make_encoder()
    tiles, _ = make_tiles([(2, 4)], PATCH)
    with torch.inference_mode():
        encoder(tiles, [(2, 4)])
    encoder(tiles, [(2, 4)]).sum().backward()
    assert encoder.position_embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("attention", ATTENTION)
def test_changing_a_picture_leaves_the_others_bit_equal(attention):
    """Their features, and the gradients of their pixels."""
    skip_without_interpreter(attention)
    encoder = make_encoder(attention)
    grids = [(2, 3), (1, 2), (3, 2)]
    tiles, _ = make_tiles([(2 * rows, 2 * columns) for rows, columns in grids], 2 * PATCH)
    owner = torch.arange(len(grids)).repeat_interleave(torch.tensor([rows * columns for rows, columns in grids]))
    weights = torch.randn(len(tiles), 4, 48)

    def see(tiles):
        tiles = tiles.clone().requires_grad_()
        found = encoder(tiles, grids)
        return found.detach(), torch.autograd.grad((found * weights).sum(), tiles)[0]

    before, slopes = see(tiles)
    for number in (0, 1):
        changed = torch.where((owner == number)[:, None, None, None], tiles.flip(2) + 1, tiles)
        after, slopes_after = see(changed)
        for x, y in ((before, after), (slopes, slopes_after)):
            same = (x == y).flatten(1).all(1)
            assert same[owner != number].all()
            assert not same[owner == number].any()


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_picture_alone_is_a_picture_in_a_row(attention):
    skip_without_interpreter(attention)
    encoder = make_encoder(attention)
    grids = GRIDS[:4]
    sizes = [rows * columns for rows, columns in grids]
    tiles, _ = make_tiles(grids, PATCH)
    together = encoder(tiles, grids).split(sizes)
    for grid, x, found in zip(grids, tiles.split(sizes), together, strict=True):
        assert_close(found, encoder(x, [grid]))


@torch.no_grad()
def test_a_picture_of_the_tables_size_is_a_tile():
    encoder = make_encoder()
    tile = torch.randn(1, 3, SIDE * PATCH, SIDE * PATCH)
    patches = rearrange(tile, "1 C (y h) (x w) -> (y x) C h w", h=PATCH, w=PATCH)
    assert_close(encoder(patches, [(SIDE, SIDE)])[:, 0], encoder(tile)[0])


@torch.no_grad()
@pytest.mark.parametrize("scale", [1, 2])
def test_rotary_positions_and_norms_are_those_of_a_tile(scale):
    """A square picture read as one tile, and as tiles of one image token."""
    options = dict(positions="rotary", pre_layernorm=True, post_layernorm=False, layer_scale=True)
    torch.manual_seed(0)
    encoder = VisionEncoder(VisionConfig(image_size=SIDE * PATCH, **SHARED, **options))
    randomize(encoder)
    tile = torch.randn(1, 3, SIDE * PATCH, SIDE * PATCH)
    tiles = rearrange(tile, "1 C (y h) (x w) -> (y x) C h w", h=scale * PATCH, w=scale * PATCH)
    found = encoder(tiles, [(SIDE // scale, SIDE // scale)])
    whole = rearrange(found, "(y x) (a b) D -> (y a x b) D", y=SIDE // scale, a=scale)
    assert_close(whole, encoder(tile)[0])


# --- in a model ----------------------------------------------------------------------------------------------

CONFIG = dataclasses.replace(
    TINY, tiling=TilingConfig("native", max_patches=40), projector=ProjectorConfig(scale_factor=2)
)


@pytest.fixture
def native(processor):
    torch.manual_seed(0)
    return VLM(CONFIG), Processor(processor.tokenizer, processor.chat_template, CONFIG)


def make_native_batch(processor, pictures, rows=1):
    documents = []
    for i, shown in enumerate(pictures):
        record = make_raw(0, ("what?", f"a circle {i}"), images=0) | {"images": shown}
        documents.append(processor.document(to_sample(record)))
    return make_batch(documents, rows=rows)


PICTURES = [[noise(0).resize((40, 20)), noise(1)], [], [noise(2).resize((20, 40))], [noise(3)]]


@torch.no_grad()
def test_a_document_alone_is_a_document_in_a_row(native):
    model, processor = native
    together = make_native_batch(processor, PICTURES, rows=2)
    hidden = model(together).flatten(0, 1)
    for number, shown in enumerate([PICTURES[0], PICTURES[2], PICTURES[1], PICTURES[3]]):  # dealt out to two rows
        place = PICTURES.index(shown)
        alone = processor.document(to_sample(make_raw(0, ("what?", f"a circle {place}"), images=0) | {"images": shown}))
        assert_close(hidden[(together.doc_ids == number).flatten()], model(make_batch([alone]))[0])


@torch.no_grad()
def test_changing_a_picture_changes_its_document_alone(native):
    model, processor = native
    before = model(make_native_batch(processor, PICTURES, rows=2))
    changed = [PICTURES[0], [], [noise(9).resize((20, 40))], PICTURES[3]]
    batch = make_native_batch(processor, changed, rows=2)
    same = (before == model(batch)).all(-1)
    assert same[batch.doc_ids != 1].all() and not same[batch.doc_ids == 1].all()


def test_without_pictures_the_encoder_has_gradients_of_zero_if_ranks_need_them(native):
    model, processor = native
    batch = make_native_batch(processor, [[]])
    model(batch).sum().backward()
    assert all(parameter.grad is None for parameter in model.vision.parameters())
    model.always_sees = True
    model(batch).sum().backward()
    for part in (model.vision, model.projector):
        assert all((parameter.grad == 0).all() for parameter in part.parameters())


def test_grids_of_other_tiles_are_an_error(native):
    model, processor = native
    batch = make_native_batch(processor, PICTURES)
    batch.grids = batch.grids[:-1]
    with pytest.raises(UserError, match=r"grids = .* are not those of \d+ tiles"):
        model(batch)
