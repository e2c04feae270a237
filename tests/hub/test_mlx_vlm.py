"""An exported model computes the same in mlx-vlm, and what engines.py says of it holds.

pip install --no-deps --target mlx mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm mlx-vlm==0.7.10
PYTHONPATH=mlx python -m pytest tests/hub/test_mlx_vlm.py
"""

import importlib.util

import numpy as np
import pytest
import torch

import nanovlm
from nanovlm.hub import engines, export
from nanovlm.model.vision import normalize
from tests.conftest import noise
from tests.hub.test_engines import FAULTY, GOOD
from tests.hub.test_export import write_own

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlx_vlm") is None, reason="needs the package mlx_vlm")


def largest_difference(folder, config):
    """Export a random model; return the largest difference of a logit of mlx-vlm, relative to the largest logit."""
    import mlx.core as mx
    from mlx_vlm.utils import load_model

    ours = write_own(folder / "model", config)
    processor = nanovlm.load(folder / "model")[1]
    export.export(folder / "model", folder / "hub")
    theirs, differences = load_model(folder / "hub"), []
    for width, height in ((16, 16), (100, 64), (40, 130)):
        batch = processor([{"role": "user", "content": "what color?"}], [noise(width, 90).resize((width, height))])
        pixels = normalize(batch.pixel_values)
        mask = mx.ones((1, len(pixels), *pixels.shape[2:]), dtype=mx.int32)
        inputs = mx.array(batch.input_ids.numpy()), mx.array(pixels[None].numpy())
        logits = torch.tensor(np.array(theirs(*inputs, pixel_attention_mask=mask).logits))
        with torch.no_grad():
            expected = ours.logits(batch)
        differences.append(((logits - expected).abs().max() / expected.abs().max()).item())
    return max(differences)


def test_mlx_vlm_computes_the_same(tmp_path):
    """Measured with mlx-vlm 0.7.10 on a CPU: 1.3e-6."""
    assert largest_difference(tmp_path, GOOD) <= 1e-5


@pytest.mark.parametrize("name", [name for name in FAULTY if "grid" not in name])  # tiles of 208 pixels take long
def test_what_is_said_of_it_holds(tmp_path, name):
    """Models with a fault are refused or computed wrongly, and those without are not."""
    config, programs, _ = FAULTY[name]
    assert ("mlx-vlm" in programs) == ("mlx-vlm" in dict(engines.find_faults(config, torch.float32)))
    try:
        is_right = largest_difference(tmp_path, config) <= 1e-5
    except ValueError as error:  # of mlx-vlm: tensors that are missing, unknown or of another shape
        assert "parameters" in str(error) or "Expected shape" in str(error)
        is_right = False
    assert is_right == ("mlx-vlm" not in programs)
