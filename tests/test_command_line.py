"""Command lines: fields by name, help, and answers without torch."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nanovlm
import train
from nanovlm import cli
from nanovlm.command_line import NEEDED, GenerateConfig, parse_generate, parse_train
from nanovlm.config import (
    DataConfig,
    DecoderConfig,
    EvalConfig,
    MoEConfig,
    ProjectorConfig,
    RopeScalingConfig,
    TilingConfig,
    TrainConfig,
    VisionConfig,
)
from nanovlm.config.fields import comments
from nanovlm.data.tilings import TILING
from nanovlm.data.tokenizer import CHAT_TEMPLATES
from nanovlm.eval.tasks import TASKS
from nanovlm.model.attention import ATTENTION
from nanovlm.model.decoder import ROPE_SCALING
from nanovlm.model.moe import EXPERTS, GATES
from nanovlm.model.projector import PROJECTORS
from nanovlm.model.vision import ACTIVATIONS, PATCHES
from nanovlm.objectives import OBJECTIVES
from nanovlm.objectives.losses import CROSS_ENTROPY
from nanovlm.presets import PRESETS


def test_the_command_line():
    assert parse_train([]) == PRESETS["scenes"]()
    changed = parse_train(["scenes", "--optim.lr", "0.5", "--model.vision.hidden-size", "64", "--wandb"])
    assert (changed.optim.lr, changed.model.vision.hidden_size, changed.wandb) == (0.5, 64, True)
    with pytest.raises(ValueError, match="preset = 'scene' is unknown; there are scenes"):
        parse_train(["scene"])


def test_a_typo_names_the_nearest_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_train(["scenes", "--optim.lrr", "1"])
    assert stopped.value.code == 2
    output = capsys.readouterr().err
    assert "--optim.lrr" in output and "Perhaps you meant" in output and "--optim.lr " in output


def test_help_shows_every_field_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        parse_train(["--help-all"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())

    def leaves(config, prefix=""):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                yield from leaves(value, f"{prefix}{field.name}.")
            elif field.name == "rules":
                for i, rule in enumerate(value):
                    yield from leaves(rule, f"{prefix}rules.{i}.")
            else:
                yield f"--{prefix}{field.name}".replace("_", "-")

    decoder = dataclasses.replace(TrainConfig().model.decoder, moe=MoEConfig())
    vision = dataclasses.replace(TrainConfig().model.vision, second=VisionConfig())
    model = dataclasses.replace(TrainConfig().model, decoder=decoder, vision=vision)
    options = list(leaves(dataclasses.replace(TrainConfig(), model=model)))
    options.remove("--model.quantization")  # which a run cannot have
    options.remove("--model.vision.second.second")  # nor can a model have a third encoder
    options.remove("--dual")  # which presets have
    assert len(options) > 40
    for option in options:
        start = max(shown.rfind(f" {option}{end}") for end in (" ", ","))
        assert start >= 0, option
        assert "(default:" in shown[start : start + 600], option
    assert "Peak learning rate." in shown and "Side of one square patch, in pixels." in shown


def test_naming_a_field_of_a_second_encoder_adds_one():
    names = ["--model.vision.class-token", "--model.vision.mean", "0.4", "0.5", "0.6"]
    vision = parse_train(["scenes", *names, "--model.vision.second.positions", "rotary"]).validate().model.vision
    assert vision.class_token and vision.mean == (0.4, 0.5, 0.6) and vision.positions == "learned"
    first = PRESETS["scenes"]().model.vision
    assert vision.second == dataclasses.replace(first, positions="rotary") and first.second is None


def test_other_sources_leave_the_lessons_of_the_preset():
    assert parse_train(["scenes"]).data.lessons
    assert parse_train(["scenes", "--data.sources", "a.jsonl"]).validate().data.lessons == ()
    config = parse_train(["--data.sources", "a.jsonl", "b.jsonl", "--data.lessons", "100"]).validate()
    assert (config.data.sources, config.data.lessons) == (("a.jsonl", "b.jsonl"), (100,))
    with pytest.raises(
        ValueError, match=r"data.lessons has 1 entries; it needs one for each of the 1 data.sources but"
    ):
        parse_train(["--data.sources", "a.jsonl", "--data.lessons", "100"]).validate()


def test_help_fits_on_a_screen(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_train(["small", "--help", "--optim.lr", "1"], "Train.")
    lines = capsys.readouterr().out.splitlines()
    assert not stopped.value.code and len(lines) < 45 and max(map(len, lines)) <= 120
    assert any(line.split()[:2] == ["--optim.lr", "0.001"] for line in lines)
    assert any(line.split()[0] == "smolvlm_256m_stage1" for line in lines if line)
    assert "--help-all" in "\n".join(lines)


@pytest.mark.parametrize(
    ("config", "field", "table"),
    [
        (DecoderConfig, "attention", ATTENTION),
        (DecoderConfig, "cross_entropy", CROSS_ENTROPY),
        (DecoderConfig, "hidden_act", GATES),
        (MoEConfig, "experts", EXPERTS),
        (VisionConfig, "patches", PATCHES),
        (VisionConfig, "hidden_act", ACTIVATIONS),
        (ProjectorConfig, "type", PROJECTORS),
        (TilingConfig, "policy", TILING),
        (RopeScalingConfig, "type", ROPE_SCALING),
        (DataConfig, "chat_template", CHAT_TEMPLATES),
        (TrainConfig, "objective", OBJECTIVES),
        (EvalConfig, "tasks", TASKS),
    ],
)
def test_help_lists_the_choices_of_a_name(config, field, table):
    assert not {name for name in table if name not in comments(config)[field]}


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_help_and_mistakes_import_no_torch(tmp_path, script):
    """And without the packages a command names the Python that lacks them."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def answer(*command):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=cli.PROJECT, env=environment
        )
        return done.returncode, done.stdout + done.stderr

    for option, status in (("--help", 0), ("--help-all", 0), ("--devise", 2)):
        if option != "--help-all" or script == "train.py":
            code, output = answer(script, option)
            assert code == status and "torch is imported" not in output, output
    code, output = answer("-S", script)  # without site-packages
    assert code == 2 and output.startswith(f"error: {sys.executable} has no ") and len(output.splitlines()) == 1
    assert "tyro" in output and "activate the environment" in output


def test_every_package_that_is_needed_is_looked_for():
    project = tomllib.loads((cli.PROJECT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", package)[0].replace("-", "_") for package in project["dependencies"]}
    assert set(NEEDED) == names - {"pillow", "pyyaml"} | {"PIL", "yaml"}


def test_a_model_without_images_is_trained(tmp_path):
    record = {"texts": [{"user": "what?", "assistant": "a word"}]}
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(record)] * 9))
    sizes = "--model.decoder.num-hidden-layers 1 --data.row-length 64 --data.pack-buffer 8 --optim.steps 2 --threads 1"
    places = ["--data.sources", str(tmp_path / "a.jsonl"), "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    more = ["--data.val-fraction", "0", "--eval.every", "0"]
    train.main(parse_train(["small", "--model.vision", "None", *sizes.split(), *places, *more]))
    assert nanovlm.load(tmp_path / "run" / "model")[0].config.vision is None
    assert parse_train(["--run-dir", str(tmp_path / "run")]).model.vision is None


def test_a_model_without_images_can_be_asked_for():
    for option in (["--model.vision", "None"], ["--model.vision=None"]):
        config = parse_train(["small", *option, "--data.sources", "a.jsonl", "--optim.lr", "0.5"]).validate()
        assert (config.model.vision, config.model.image_token_id, config.optim.lr) == (None, None, 0.5)
        assert config.data.sources == ("a.jsonl",)


def test_records_must_be_named_where_the_preset_brings_none():
    with pytest.raises(ValueError, match=r"data.sources is empty: name your records, as in --data.sources mine.jsonl"):
        parse_train(["small"]).validate()


def test_the_options_of_an_answer_have_no_prefix():
    config = parse_generate(["--model", "m", "--image", "a.png", "--temperature", "0.5", "--prompt", "what?"])
    assert config.sampling.temperature == 0.5
    assert dataclasses.replace(config, sampling=GenerateConfig("m").sampling) == GenerateConfig(
        "m", (Path("a.png"),), ("what?",)
    )
