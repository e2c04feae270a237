"""A run by contrast learns which caption is a picture's, stops, resumes, and does on two ranks what it does on one."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train
from nanovlm.config import (
    ContrastiveConfig,
    DataConfig,
    DualConfig,
    EvalConfig,
    InitConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from nanovlm.data.dual import DualProcessor, train_text_tokenizer
from nanovlm.data.scenes import draw
from nanovlm.errors import UserError
from nanovlm.hub.dual import load_dual
from nanovlm.objectives.contrastive import number_texts
from nanovlm.presets import PRESETS
from nanovlm.train import init
from tests.test_distributed import ROOT, finish, torchrun
from tests.test_train import KILL_AT_STEP, comparable, metrics

SHAPES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
DUAL = DualConfig(
    vision=VisionConfig(image_size=48, patch_size=16, **SHAPES),
    text=TextConfig(vocab_size=400, max_position_embeddings=32, is_padded=True, **SHAPES),
    projection_size=32,
    initial_bias=-3.0,
)


def make_config(run_dir, **changes):
    config = TrainConfig(
        run_dir=str(run_dir),
        dual=DUAL,
        data=DataConfig(
            sources=("scenes:caption",),
            row_length=128,
            batch_rows=2,
            tokenizer_size=400,
            pack_buffer=8,
            val_fraction=0.2,
        ),
        optim=OptimConfig(lr=3e-3, steps=6, warmup_steps=1, micro_batches=2),
        eval=EvalConfig(show_every=0, every=3, val_batches=2),
        objective="contrastive",
        checkpoint_every=2,
        threads=1,
        precision="fp32",
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    train.main(make_config(folder))
    return folder


def test_a_run_writes_its_numbers_and_a_model(unbroken):
    lines = metrics(unbroken)
    assert len(lines) == 6 and lines[0]["scale"] == pytest.approx(10)
    assert lines[0]["bias"] == -3 and lines[-1]["bias"] != -3 and lines[-1]["scale"] != lines[0]["scale"]
    assert {"accuracy_of_texts", "accuracy_of_pictures"} <= lines[0].keys() and lines[2]["val_loss"] > 0
    assert lines[0]["flops_per_second"] > 0 and lines[0]["padding"] == 0
    model, processor = load_dual(unbroken / "model")
    assert model.logit_bias.item() == pytest.approx(lines[-1]["bias"], abs=0.02)
    record = draw("test", 0, ("caption",))
    images, texts = (
        model.embed_images(processor.encode_images(record["images"])),
        processor.encode_texts(["a red circle"]),
    )
    assert model.logits(images, model.embed_texts(texts)).shape == (1, 1)


def test_the_loss_of_a_step_is_that_of_all_its_pairs(unbroken, tmp_path, monkeypatch):
    """Two micro-batches of 8 pairs are 16 pairs, each against all, as SigLIP's formula has it, divided by 16."""
    seen = []

    def train_step(state, batches, num_units, config):
        seen.append((state, batches, num_units))
        return step(state, batches, num_units, config)

    step = train.train_step
    monkeypatch.setattr(train, "train_step", train_step)
    losses = []

    class Stop(Exception):
        pass

    def add(log, numbers, totals, wait):
        losses.append(float(numbers["loss"]))
        raise Stop

    monkeypatch.setattr(train.Log, "add", add)
    with pytest.raises(Stop):
        train.main(make_config(tmp_path, optim=OptimConfig(lr=1e-12, steps=1, warmup_steps=0, micro_batches=2)))
    (state, batches, num_units) = seen[0]
    with torch.no_grad():
        pairs = [state.model(batch) for batch in batches]
        images, texts = (torch.cat(part) for part in zip(*pairs, strict=True))
        z = 2 * torch.eye(16) - 1
        expected = -torch.nn.functional.logsigmoid(z * state.model.logits(images, texts)).sum() / 16
    assert len(images) == num_units == 16
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_equal_texts_have_equal_numbers():
    """Wherever they are in a row, and whatever is beside them; others have others."""
    tokenizer = train_text_tokenizer(["a red circle and a blue star"], 300)
    for text in (DUAL.text, dataclasses.replace(DUAL.text, is_padded=False)):
        processor = DualProcessor(tokenizer, dataclasses.replace(DUAL, text=text))
        texts = [f"a {a} {b}" for a in ("red", "blue", "green") for b in range(60)]
        batch = processor.encode_texts([*texts, *texts[::-1]])
        numbers = number_texts(batch)
        assert torch.equal(numbers[:180], numbers[180:].flip(0)) and len(set(numbers.tolist())) == 180
        assert numbers.min() >= 0 and numbers.max() < 2**24


def test_a_killed_run_goes_on_bit_for_bit(unbroken, tmp_path):
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from tests.objectives.test_contrastive import make_config
def die(): os.kill(os.getpid(), signal.SIGKILL)
{KILL_AT_STEP.format(3)}
train.main(make_config({str(tmp_path / "run")!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    train.main(make_config(tmp_path / "run"))
    assert comparable(metrics(tmp_path / "run")) == comparable(metrics(unbroken))
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())


RANKS = """
import train
from nanovlm import cli
from nanovlm.config import ParallelConfig
from tests.objectives.test_contrastive import make_config
cli.run(lambda: train.main(make_config({folder!r}, parallel=ParallelConfig(strategy={strategy!r}))))
cli.end(0)
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_learn_what_one_does(unbroken, tmp_path, strategy):
    (tmp_path / "run.py").write_text(RANKS.format(folder=str(tmp_path / "run"), strategy=strategy))
    finish(torchrun(tmp_path / "run.py"))
    for one, two in zip(metrics(unbroken), metrics(tmp_path / "run"), strict=True):
        for name in ("loss", "grad_norm", "scale", "bias"):
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", unbroken))
    for name in theirs:
        if not name.endswith("k_proj.bias"):  # moves no softmax, so that its gradient is rounding
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)


def test_softmax_bf16_and_a_causal_text_tower_run(tmp_path):
    text = dataclasses.replace(DUAL.text, is_padded=False, is_causal=True)
    dual = dataclasses.replace(DUAL, text=text, initial_bias=None, initial_scale=1 / 0.07)
    loss = ContrastiveConfig(loss="softmax", max_scale=15.0, chunk=3)
    optim = OptimConfig(lr=0.1, steps=3, warmup_steps=0)
    train.main(make_config(tmp_path, dual=dual, contrastive=loss, optim=optim, precision="bf16"))
    lines = metrics(tmp_path)
    assert "bias" not in lines[0] and lines[0]["scale"] == pytest.approx(1 / 0.07)
    assert max(line["scale"] for line in lines) <= 15.0001


def test_an_image_tower_that_is_locked_does_not_move(unbroken, tmp_path):
    """Locked-image tuning (arXiv 2111.07991): the encoder of another run, frozen, and a text tower that learns."""
    optim = OptimConfig(lr=3e-3, steps=2, warmup_steps=1, freeze=(r"^vision\.",))
    train.main(make_config(tmp_path, init=InitConfig(vision=str(unbroken / "model")), optim=optim))
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, unbroken))
    is_same = {name: torch.equal(ours[name], theirs[name]) for name in ours}
    assert all(same == name.startswith("vision.") for name, same in is_same.items())


def test_a_run_begins_with_the_model_of_another(unbroken, tmp_path):
    config = make_config(tmp_path / "run", init=InitConfig(model=str(unbroken / "model")))
    _processor, fill = init.prepare(init.take_model(config), [])
    model = init.build(config).to_empty(device="cpu")
    fill(model)
    theirs = load_file(unbroken / "model" / "model.safetensors")
    assert all(torch.equal(x, theirs[name]) for name, x in model.state_dict().items())
    other = dataclasses.replace(DUAL, image_pooling="mean")
    with pytest.raises(UserError, match=r"dual\.image_pooling: 'attention' against 'mean'"):
        init.prepare(dataclasses.replace(config, dual=other), [])


def test_a_vision_language_model_begins_with_the_image_tower(unbroken):
    """The one that scenes would have: its encoder is that of the run, to the bit."""
    scenes = PRESETS["scenes"]()
    model = dataclasses.replace(scenes.model, vision=DUAL.vision)
    config = dataclasses.replace(scenes, model=model, init=InitConfig(vision=str(unbroken / "model")))
    vlm, _ = init.start(config, ["a red circle"])
    theirs = load_file(unbroken / "model" / "model.safetensors")
    for name, x in vlm.vision.state_dict().items():
        assert torch.equal(x, theirs[f"vision.{name}"]), name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(dual=None), "objective = contrastive does not fit dual = None"),
        (dict(objective="next_token"), "objective = next_token does not fit dual = DualConfig"),
        (dict(contrastive=ContrastiveConfig(loss="softmax")), "initial_bias = -3.0 does not fit contrastive.loss"),
        (dict(contrastive=ContrastiveConfig(chunk=-1)), "contrastive.chunk = -1 must be at least 0"),
        (dict(eval=EvalConfig(tasks=("scenes",))), "eval.tasks = .* is for models that answer"),
        (dict(model=PRESETS["scenes"]().model), r"model\.vision\.image_size is given, but the run trains a dual model"),
        (dict(data=DataConfig(row_length=20, tokenizer_size=400)), "data.row_length = 20 is below dual.text.max_pos"),
        (dict(data=DataConfig(tokenizer_size=401)), "data.tokenizer_size = 401 is above dual.text.vocab_size = 400"),
    ],
)
def test_mistakes_in_the_config_of_a_run(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        make_config(tmp_path, **changes).validate()
    other = TrainConfig(contrastive=ContrastiveConfig(chunk=3))
    with pytest.raises(UserError, match=r"contrastive\.chunk is given, but objective = next_token does not read it"):
        other.validate()


def test_records_without_one_picture_are_told(tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"texts": [{"user": "what?", "assistant": "that"}]}) + "\n")
    data = DataConfig(sources=(str(tmp_path / "texts.jsonl"),), row_length=128, tokenizer_size=400)
    with pytest.raises(UserError, match="the record has 0 pictures: contrast learns from one and its caption"):
        train.main(make_config(tmp_path / "run", data=data, eval=EvalConfig(show_every=0)))
