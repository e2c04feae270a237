"""generate.py as its users call it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
from nanovlm.config import MoEConfig
from nanovlm.data.chat import Processor
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("generate")
    save_model(folder / "model", VLM(TINY), processor)
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
    assert first.returncode == 0 and first.stdout == second.stdout and len(first.stdout.strip()) > 3


def test_chat(folder):
    done = call(
        folder,
        "--max-new-tokens",
        "4",
        text="hello?\n/imag a.png\n/image a.png\nwhat?\n/image nothing.png\n\n/new\nwhy?\n/exit\n",
    )
    assert done.returncode == 0, done.stderr
    assert "there is no image file nothing.png" in done.stdout
    assert "the prompt is empty" in done.stdout
    assert "there is no command '/imag a.png'" in done.stdout


def test_a_chat_goes_on_after_a_prompt_that_is_too_long(folder):
    done = call(folder, "--max-new-tokens", "9000", text="one?\ntwo?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("are more than the model's 8192 positions") == 2


def test_a_chat_remembers(folder, monkeypatch, processor):
    """Every prompt holds the conversation so far and all images, until /new."""
    seen = []

    def answer(model, processor, prompts, config, echo):
        text = processor.tokenizer.decode(prompts[0].input_ids.tolist(), skip_special_tokens=False)
        seen.append((text.replace("<image>" * 4, "<I>"), len(prompts[0].tiles)))
        return ["fine"], {}

    lines = iter(["one?", f"/image {folder / 'b.png'}", "two?", "/new", "three?"])
    monkeypatch.setattr(generate, "answer", answer)
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/exit"))
    generate.chat(None, processor, [noise(0)], generate.SamplingConfig())
    assert seen == [
        ("<|user|><I>one?<|assistant|>", 1),
        ("<|user|><I>one?<|assistant|>fine<end_of_utterance><|user|><I>two?<|assistant|>", 2),
        ("<|user|><I>three?<|assistant|>", 1),
    ]


def test_ctrl_c_stops_an_answer_and_not_the_chat(monkeypatch, processor, capsys):
    asked = []

    def answer(model, processor, prompts, config, echo):
        asked.append(processor.tokenizer.decode(prompts[0].input_ids.tolist()))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return ["fine"], {}

    lines = iter(["one?", KeyboardInterrupt(), "two?"])

    def read(_prompt):
        line = next(lines, "/exit")
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(generate, "answer", answer)
    monkeypatch.setattr("builtins.input", read)
    generate.chat(None, processor, [], generate.SamplingConfig())
    assert ["one" in text for text in asked] == [True, False] and "two" in asked[1]
    shown = capsys.readouterr().out
    assert "stopped; the question and its answer are forgotten." in shown and "/exit leaves." in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--image", "none.png", "--prompt", "a"], "there is no image file none.png"),
        (["--image", "model/config.json", "--prompt", "a"], "model/config.json cannot be read as an image"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--prompt", os.fsdecode(b"\xff")], "the prompt is not valid UTF-8 text"),
        (["--json"], "--json needs a --prompt"),
        (["--prompt", "a", "--show-attention", "a.png"], "there is none: add --image FILE"),
        (["--image", "a.png", "--show-attention", "a.png"], "draws the answer to one --prompt, not to 0"),
        (["--image", "a.png", "--prompt", "a", "--show-attention", "x.jpg"], "let the name x.jpg end in .png"),
        (["--image", "a.png", "--prompt", "a", "--show-attention", "no/x.png"], "there is no folder"),
        (["--image", "a.png", "--prompt", "a", "--attention-layer", "1"], "say what --show-attention FILE draws"),
        (
            ["--image", "a.png", "--prompt", "a", "--show-attention", "x.png", "--attention-head", "4"],
            "--attention-head 4 is not in model: it has 0 to 3",
        ),
        (["--prompt", "a", "--device", "tpu"], "device = 'tpu' is not here; there are auto, cpu"),
        (["--prompt", "a", "--top-p", "0"], "top_p = 0.0 must be above 0 and at most 1"),
        (["--model", "nowhere", "--prompt", "a"], "there is no model folder nowhere"),
    ],
)
def test_mistakes_are_one_sentence(folder, args, message):
    done = call(folder, *args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_routing_of_one_answer(folder, processor):
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=3, num_experts_per_tok=2, intermediate_size=16)
    model = VLM(dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, moe=moe)))
    save_model(folder / "mixture", model, processor)
    done = call(
        folder, "--model", "mixture", "--image", "a.png", "--prompt", "what?", "--show-routing", "--max-new-tokens", "5"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[1:]
    assert lines[0].split() == ["expert", "0", "1", "2"]
    assert [line.split()[:3] for line in lines[1:3]] == [["layer", "0", "image"], ["layer", "0", "question"]]
    for line in lines[1:]:
        shares = list(map(int, line.split()[3:]))
        assert len(shares) == 3 and 98 <= sum(shares) <= 102 and max(shares) <= 50
    blind = VLM(dataclasses.replace(model.config, vision=None, image_token_id=None))
    speaker = Processor(processor.tokenizer, processor.chat_template, blind.config)
    prompt = speaker.prompt([{"role": "user", "content": "what?"}], [])
    names = [line.split()[:3] for line in generate.format_routing(blind, speaker, prompt, "red").splitlines()[1:]]
    assert names == [["layer", str(layer), part] for layer in (0, 1) for part in ("question", "answer")]
    refused = call(folder, "--image", "a.png", "--prompt", "what?", "--show-routing")
    assert refused.returncode == 2 and "--show-routing needs a mixture of experts" in refused.stderr


def test_attention_of_one_answer(folder):
    """The sheet replaces an older one at once, and a layer and a head look elsewhere than the mean."""
    (folder / "where.png").write_bytes(b"older")
    options = ["--image", "a.png", "b.png", "--prompt", "what?", "--max-new-tokens", "5", "--show-attention"]
    done = call(folder, *options, "where.png")
    assert done.returncode == 0, done.stderr
    other = call(folder, *options, "one.png", "--attention-layer", "1", "--attention-head", "3")
    assert other.returncode == 0 and other.stdout == done.stdout
    sheets = [np.asarray(Image.open(folder / name)) for name in ("where.png", "one.png")]
    assert sheets[0].shape == sheets[1].shape and (sheets[0] != sheets[1]).any()
    assert not list(folder.glob(".where*"))
