"""generate.py as its users call it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovlm import checkpoint
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("generate")
    checkpoint.save_model(folder / "model", VLM(TINY), processor)
    noise(0).save(folder / "a.png")
    noise(1).convert("L").resize((500, 3)).save(folder / "b.png")
    return folder


def call(folder, *args, text=""):
    command = [sys.executable, str(ROOT / "generate.py"), "--model", "model", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, input=text)


def test_json(folder):
    done = call(
        folder, "--image", "a.png", "b.png", "--prompt", "what?", "and a longer one?", "--json", "--max-new-tokens", "5"
    )
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["prompt"] == "what?" and isinstance(first["text"], str)
    assert first["prompt_tokens"] < second["prompt_tokens"]
    assert 0 <= first["new_tokens"] <= 5
    for key in ("time_to_first_token_s", "tokens_per_second", "peak_memory_bytes", "tokens_per_second_per_gb"):
        assert first[key] > 0


def test_text_is_streamed_and_repeats(folder):
    options = ["--image", "a.png", "--prompt", "what?", "--temperature", "1", "--seed", "3", "--max-new-tokens", "9"]
    first, second = call(folder, *options), call(folder, *options)
    assert first.returncode == 0 and first.stdout == second.stdout != ""


def test_chat(folder):
    done = call(
        folder, "--max-new-tokens", "4", text="hello?\n/image a.png\nwhat?\n/image nothing.png\n\n/new\nwhy?\n/exit\n"
    )
    assert done.returncode == 0, done.stderr
    assert "there is no image file nothing.png" in done.stdout
    assert "the prompt is empty" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--image", "none.png", "--prompt", "a"], "there is no image file none.png"),
        (["--image", "model/config.json", "--prompt", "a"], "model/config.json cannot be read as an image"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--prompt", "a", "--top-p", "0"], "top_p = 0.0 must be above 0 and at most 1"),
        (["--model", "nowhere", "--prompt", "a"], "there is no model folder nowhere"),
    ],
)
def test_mistakes_are_one_sentence(folder, args, message):
    done = call(folder, *args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
