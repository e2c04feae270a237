"""SigLIP 2 NaFlex as the encoder of a model that reads pictures at their own size: pixels to features."""

import dataclasses
import json

import pytest
import torch
from transformers import Siglip2Config, Siglip2Model, Siglip2TextConfig, Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from nanovlm.config import ProjectorConfig, TilingConfig
from nanovlm.data.images import find_grids, make_tiles
from nanovlm.hub.encoders import load_encoder, read_encoder
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM
from nanovlm.sharded import places
from tests.conftest import TINY, noise
from tests.model.test_parity import assert_close, randomize

VISION = dict(
    patch_size=8, num_patches=25, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3
)
# None is one patch wide: torch 2.13 stretches one column to several rows wrongly (tests/model/test_native.py).
SIZES = [(40, 40), (90, 30), (24, 200), (8, 8)]


def save(kind, folder):
    torch.manual_seed(0)
    if kind == "whole":
        text = Siglip2TextConfig(vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=1,
                                 num_attention_heads=3, max_position_embeddings=8)  # fmt: skip
        theirs = Siglip2Model(Siglip2Config(vision_config=VISION, text_config=text.to_dict()))
    else:
        theirs = Siglip2VisionModel(Siglip2VisionConfig(**VISION, vision_use_head=kind != "no head"))
    randomize(theirs)
    theirs.eval().save_pretrained(folder)
    return getattr(theirs, "vision_model", theirs)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["whole", "head", "no head"])
def test_naflex_is_read(kind, tmp_path, capsys):
    theirs = save(kind, tmp_path)
    vision = read_encoder(tmp_path)
    assert (vision.image_size, vision.grid_size) == (40, 5)
    tiling, projector = TilingConfig("native", max_patches=30), ProjectorConfig(scale_factor=1)
    config = dataclasses.replace(TINY, vision=vision, tiling=tiling, projector=projector)
    model = VLM(config).eval()
    load_encoder(places(model), tmp_path)
    assert ("not used" in capsys.readouterr().err) == (kind != "no head")
    images = [noise(i).resize(size) for i, size in enumerate(SIZES)]
    tiles, grids = [make_tiles(image, config) for image in images], find_grids(images, config)
    # The same pixels: torch's filter and PIL's round otherwise.
    inputs = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=30)(images, return_tensors="pt")
    assert inputs["spatial_shapes"].tolist() == [list(grid) for grid in grids]
    for row, pixels in zip(inputs["pixel_values"], tiles, strict=True):
        row[: len(pixels)] = normalize(pixels).permute(0, 2, 3, 1).flatten(1)
    expected = theirs(**inputs)
    found = model.vision(normalize(torch.cat(tiles)), grids).split([len(x) for x in tiles])
    for features, wanted in zip(found, expected.last_hidden_state, strict=True):
        assert_close(features[:, 0], wanted[: len(features)])


def test_a_table_of_positions_that_is_no_square_is_refused(tmp_path):
    data = {"model_type": "siglip2_vision_model"} | VISION | {"num_patches": 24}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"config.json: num_patches = 24 must be the square of a number"):
        read_encoder(tmp_path)
