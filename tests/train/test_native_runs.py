"""A run on pictures of many sizes, read at their own size: it stops, goes on bit for bit, and its model answers."""

import dataclasses
import json
import random

import pytest

import nanovlm
from nanovlm.config import EvalConfig, ProjectorConfig, TilingConfig, VisionConfig
from nanovlm.data.images import plan_tiles
from nanovlm.hub import export
from tests.conftest import noise
from tests.test_train import SMALL, comparable, metrics, run, stop_after

MODEL = dataclasses.replace(
    SMALL.model,
    vision=VisionConfig(
        image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    ),
    tiling=TilingConfig("native", max_patches=24),
    projector=ProjectorConfig(scale_factor=2),
)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), random.Random(0)
    lines = []
    for i in range(24):
        noise(i).resize((rng.randint(8, 90), rng.randint(8, 90))).save(folder / f"{i}.png")
        text = {"user": "what is it?", "assistant": f"number {i}"}
        shown = [f"{j}.png" for j in range(i, i - i % 3, -1)]  # 0, 1 or 2 pictures
        lines.append(json.dumps({"images": shown, "texts": [text]}))
    (folder / "records.jsonl").write_text("\n".join(lines))
    data = dataclasses.replace(SMALL.data, sources=(str(folder / "records.jsonl"),), lessons=(), tokenizer_size=300)
    optim = dataclasses.replace(SMALL.optim, steps=6)
    return dict(model=MODEL, data=data, optim=optim, eval=EvalConfig(), checkpoint_every=3)


def test_a_run_learns_and_a_stopped_one_goes_on_bit_for_bit(tmp_path, options, monkeypatch):
    run(tmp_path / "unbroken", **options)
    lines = metrics(tmp_path / "unbroken")
    assert len(lines) == 6 and lines[-1]["loss"] < lines[0]["loss"]
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(SystemExit):
            run(tmp_path / "stopped", **options)
    run(tmp_path / "stopped", **options)
    assert comparable(metrics(tmp_path / "stopped")) == comparable(lines)

    model, processor = nanovlm.load(tmp_path / "unbroken" / "model")
    picture = noise(0).resize((70, 20))
    prompt = processor.prompt([{"role": "user", "content": "what is it?"}], [picture])
    plan = plan_tiles(70, 20, model.config)
    assert prompt.grids == [(plan.rows, plan.cols)] and plan.cols > 2 * plan.rows
    assert len(nanovlm.generate(model, processor.batch([prompt]), max_new_tokens=3)) == 1
    with pytest.raises(ValueError, match=r"tiling.policy = 'native' cannot be exported"):
        export.export(tmp_path / "unbroken" / "model", tmp_path / "out")


def test_a_row_needs_room_for_a_picture(tmp_path, options):
    data = dataclasses.replace(options["data"], row_length=6)
    with pytest.raises(ValueError, match=r"data.row_length = 6 leaves no room for text beside one image of 6 tokens"):
        run(tmp_path, **options | {"data": data})
