"""Image tokens of anyres pictures that are far from square, and how they are put together."""

import dataclasses

import pytest
import torch
from PIL import Image

from nanovlm.config import ProjectorConfig, TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.places import count_places, shrink
from nanovlm.errors import UserError
from nanovlm.model.anyres import join_tiles
from nanovlm.model.vlm import VLM
from tests.conftest import TINY

CONFIG = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, image_size=64, patch_size=8),
    projector=ProjectorConfig("mlp", has_newline=True),
    tiling=TilingConfig("anyres", longest_edge=640, max_tiles=1),
).validate()


@pytest.mark.parametrize("size", [(900, 30), (30, 900)])
def test_a_long_picture_keeps_a_row(size, processor):
    own = Processor(processor.tokenizer, processor.chat_template, CONFIG)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    batch = own.batch([own.prompt([message], [Image.new("RGB", size, "red")])])
    rows, columns = shrink(CONFIG, batch.grids[0])
    assert min(rows, columns) == 1
    assert count_places(CONFIG, batch.grids) == [16 + rows * (columns + 1)]
    torch.manual_seed(0)
    model = VLM(CONFIG).eval()
    assert torch.isfinite(model.logits(batch)).all()
    batch.input_ids[0, 0] = CONFIG.image_token_id
    with pytest.raises(UserError, match=r"image placeholders in input_ids, but \d+ image features$"):
        model.logits(batch)


def test_pictures_are_shrunk_in_fp32_under_autocast():
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, tiling=dataclasses.replace(CONFIG.tiling, longest_edge=256))
    x, newline, grid = torch.randn(17, 16, 32), torch.randn(32), (4, 4, 16, 16)
    plain = join_tiles(x, [grid], newline, config)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(join_tiles(x, [grid], newline, config), plain)
