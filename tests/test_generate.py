"""generate.py as its users call it."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import nanovlm
from generate import Said
from nanovlm.command_line import GenerateConfig
from nanovlm.config import FusionConfig, MoEConfig, ProjectorConfig, SamplingConfig, VideoConfig
from nanovlm.data.boxes import Box, draw_places
from nanovlm.data.chat import Processor
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.data.video import open_video
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.infer.engine import Engine
from nanovlm.infer.prune import answer_pruned
from nanovlm.infer.request import End, Request, Token
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("generate")
    save_model(folder / "model", VLM(TINY), processor)
    other = Processor(train_tokenizer(["some other words, and none of them red"] * 9, 300), CHAT_TEMPLATE, TINY)
    save_model(folder / "other", VLM(TINY), other)
    noise(0).save(folder / "a.png")
    noise(1).convert("L").resize((500, 3)).save(folder / "b.png")
    return folder


def call(folder, *args, text=""):
    command = [sys.executable, str(ROOT / "generate.py"), "--model", "model", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, input=text)


def test_json(folder, processor):
    """Figures of each answer, which is that of its prompt alone, and of the run."""
    names = ["a.png", "b.png", "a.png", "b.png", "a.png"]
    prompts, options = ["what?", "and a longer one?"], ["--image", *names, "--max-new-tokens", "5"]
    done = call(folder, *options, "--prompt", *prompts, "--json", "--num-rows", "1")
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    model, _ = nanovlm.load(folder / "model", "cpu")
    images = [Image.open(folder / name) for name in names]
    for line, text in zip((first, second), prompts, strict=True):
        batch = processor([{"role": "user", "content": text}], images)
        (ids,) = nanovlm.generate(model, batch, max_new_tokens=5)
        assert (line["prompt"], line["answer"], line["text"]) == (text, 0, processor.decode(ids))
        assert (line["prompt_tokens"], line["new_tokens"]) == (batch.input_ids.shape[1], len(ids))
        assert line["finish_reason"] == ("length" if len(ids) == 5 else "stop")
    # The second shares the images with the first, whose 20 tokens have one whole block of 16.
    assert (first["cached_tokens"], second["cached_tokens"]) == (0, 16)
    assert 0 < first["time_to_first_token_s"]
    for key in ("tokens_per_second", "peak_memory_bytes", "tokens_per_second_per_gb"):
        assert first[key] == second[key] > 0
    decoder = TINY.decoder
    numbers = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim
    assert first["cache_bytes_per_token"] == 4 * numbers
    waits = first["time_to_first_token_s_percentiles"]
    two = sorted(line["time_to_first_token_s"] for line in (first, second))
    assert list(waits) == ["p50", "p90", "p99"] and waits["p50"] == pytest.approx(sum(two) / 2)
    assert two[0] <= waits["p90"] <= waits["p99"] <= two[1] and first["time_per_token_s_percentiles"]["p50"] > 0


def test_several_answers_to_a_prompt(folder):
    options = ["--image", "a.png", "--max-new-tokens", "9", "--temperature", "1"]
    several = [*options, "--prompt", "what?", "why?", "--num-answers", "3", "--seed", "4"]
    done = call(folder, *several, "--json")
    assert done.returncode == 0, done.stderr
    lines = list(map(json.loads, done.stdout.splitlines()))
    assert [(x["prompt"], x["answer"]) for x in lines] == [(p, i) for p in ("what?", "why?") for i in range(3)]
    assert len({x["text"] for x in lines}) == 6
    alone = call(folder, *options, "--prompt", "why?", "--seed", "6")
    assert alone.stdout == generate.harmless(lines[5]["text"]) + "\n"
    what, why = ("".join(f"  {generate.harmless(x['text'])}\n" for x in lines[i : i + 3]) for i in (0, 3))
    assert call(folder, *several).stdout == f"what?\n{what}why?\n{why}"


def test_guesses_change_no_answer_and_save_passes(folder):
    """Those looked up in the row, and those of a draft model, here the model itself, which is always right."""
    options = ["--image", "a.png", "--prompt", "is it is it is it", "--max-new-tokens", "24", "--json"]
    plain, looked_up, drafted = (
        json.loads(call(folder, *options, *more).stdout)
        for more in ([], ["--draft", "lookup"], ["--draft", "model", "--draft-tokens", "3"])
    )
    assert plain["drafted_tokens"] == 0 and looked_up["drafted_tokens"] >= looked_up["accepted_tokens"] > 0
    assert drafted["drafted_tokens"] == drafted["accepted_tokens"] > 0
    for line in (looked_up, drafted):
        assert (line["text"], line["new_tokens"]) == (plain["text"], plain["new_tokens"])


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


def talk(monkeypatch, lines):
    """Let a user say these lines, or press Ctrl-C in place of one, and then leave."""
    lines = iter(lines)

    def read(_prompt):
        line = next(lines, "/exit")
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def test_a_chat_remembers(folder, monkeypatch, processor):
    """Every prompt holds the conversation so far and all images, until /new."""
    seen = []

    def answer(engine, processor, requests, echo, stop):
        prompt = requests[0].prompt
        text = processor.tokenizer.decode(prompt.input_ids.tolist(), skip_special_tokens=False)
        seen.append((text.replace("<image>" * 4, "<I>"), len(prompt.tiles)))
        return [Said(0, 0, "fine", [7], End(0, 0, "stop"))]

    talk(monkeypatch, ["one?", f"/image {folder / 'b.png'}", "two?", "/new", "three?"])
    monkeypatch.setattr(generate, "answer", answer)
    generate.chat(lambda: None, processor, [noise(0)], SamplingConfig())
    assert seen == [
        ("<|user|><I>one?<|assistant|>", 1),
        ("<|user|><I>one?<|assistant|>fine<end_of_utterance><|user|><I>two?<|assistant|>", 2),
        ("<|user|><I>three?<|assistant|>", 1),
    ]


class Recorded(Engine):
    """An engine that keeps its events; at tokens with these numbers, or so often in a step, the user presses Ctrl-C."""

    def __init__(self, at_tokens=(), in_steps=0):
        torch.manual_seed(0)
        super().__init__(VLM(TINY), num_rows=1)
        self.at_tokens, self.in_steps, self.tokens, self.ends = at_tokens, in_steps, [], []

    def step(self):
        for _ in range(self.in_steps):
            signal.raise_signal(signal.SIGINT)
        events = super().step()
        for event in events:
            (self.tokens if isinstance(event, Token) else self.ends).append(event)
            if isinstance(event, Token) and len(self.tokens) in self.at_tokens:
                signal.raise_signal(signal.SIGINT)
        return events


def test_a_turn_of_a_chat_computes_what_is_new(monkeypatch, processor):
    """A picture is encoded once in five turns, and a turn finds the conversation so far in the cache."""
    engine = Recorded()
    talk(monkeypatch, ["what color is the circle?", "and the others?", "why?", "where?", "how many?"])
    generate.chat(lambda: engine, processor, [noise(0), noise(1)], SamplingConfig(max_new_tokens=9))
    assert len(engine.ends) == 5 and engine.features.num_encoded == 2
    assert engine.ends[0].usage.cached_tokens == 0
    for before, now in itertools.pairwise(end.usage for end in engine.ends):
        # All whole blocks of the last prompt; its answer may be tokenised in another way than it was generated.
        assert before.prompt_tokens < now.prompt_tokens and now.cached_tokens >= before.prompt_tokens // 16 * 16 > 0


def test_ctrl_c_stops_an_answer_and_not_the_chat(monkeypatch, processor, capsys):
    """What was asked is forgotten, its answer is cancelled, and the same engine answers the next question."""
    engine, other, handler = Recorded(at_tokens=[3]), Recorded(), signal.getsignal(signal.SIGINT)
    talk(monkeypatch, ["one?", KeyboardInterrupt(), "two?"])
    generate.chat(lambda: engine, processor, [], SamplingConfig(max_new_tokens=9))
    shown = capsys.readouterr().out
    assert shown.count("stopped; the question and its answer are forgotten.") == 1 and "/exit leaves." in shown
    assert engine.is_idle and engine.blocks.num_free == len(engine.blocks.all)
    assert [token.request for token in engine.tokens] == [0] * 3 + [1] * (len(engine.tokens) - 3)
    talk(monkeypatch, ["two?"])
    generate.chat(lambda: other, processor, [], SamplingConfig(max_new_tokens=9))
    assert [token.id for token in engine.tokens[3:]] == [token.id for token in other.tokens] != []
    assert signal.getsignal(signal.SIGINT) == handler


def test_what_a_second_ctrl_c_leaves_of_an_engine_is_not_used_again(monkeypatch, processor, capsys):
    first, second = Recorded(in_steps=2), Recorded()
    engines = iter([first, second])
    talk(monkeypatch, ["one?", "two?"])
    generate.chat(lambda: next(engines), processor, [], SamplingConfig(max_new_tokens=1))
    assert capsys.readouterr().out.count("stopped; the question and its answer are forgotten.") == 1
    assert (first.tokens, [end.request for end in second.ends]) == ([], [0])


def test_ctrl_c_is_heard_while_a_prompt_is_computed(monkeypatch, processor, capsys):
    engine = Recorded(in_steps=1)
    engine.chunk = 4
    talk(monkeypatch, ["what is it? " * 5])
    generate.chat(lambda: engine, processor, [], SamplingConfig(max_new_tokens=1))
    assert "stopped; the question and its answer are forgotten." in capsys.readouterr().out
    assert engine.tokens == engine.ends == [] and engine.is_idle


def test_what_is_shown_is_the_text_also_where_a_character_is_cut_off(processor, capsys):
    engine = Recorded()
    prompt, ids = processor.prompt([{"role": "user", "content": "what?"}]), processor.tokenizer.encode("a日").ids[:-1]
    engine.step = lambda: [*(Token(0, 0, i) for i in ids), End(0, 0, "length")]
    (said,) = generate.answer(engine, processor, [Request(prompt)], echo=True)
    assert said.text == "a\ufffd" == processor.decode(ids) and capsys.readouterr().out == "a\ufffd\n"


def test_an_answer_is_text_to_a_terminal_and_no_command():
    assert generate.harmless("a\tb\nc \x1b[2J\x08\x9b1m\r\x7f é 😀") == "a\tb\nc \\x1b[2J\\x08\\x9b1m\\x0d\\x7f é 😀"


@pytest.mark.parametrize("json_too", [False, True])
def test_a_failed_answer_is_named_and_the_others_are_shown(folder, monkeypatch, capsys, json_too):
    """Also its beginning; the command fails."""
    finish = Engine._take

    def take(engine, chosen):
        events = finish(engine, chosen)
        failing = [row for row in engine.rows if row.number == 1 and row.num_new == 2]
        return events + [engine._finish(row, "error", "there is not enough memory") for row in failing]

    monkeypatch.setattr(Engine, "_take", take)
    monkeypatch.chdir(folder)
    config = GenerateConfig("model", prompt=("one?", "two?", "three?"), json=json_too)
    with pytest.raises(UserError, match=r"1 of 3 answers failed; to 'two\?': there is not enough memory"):
        generate.main(dataclasses.replace(config, sampling=SamplingConfig(max_new_tokens=4)))
    shown = capsys.readouterr().out
    if json_too:
        found = [(line["finish_reason"], line["new_tokens"]) for line in map(json.loads, shown.splitlines())]
        assert found == [("length", 4), ("error", 2), ("length", 4)]
    else:
        assert all(f"{text}?\n  " in shown for text in ("one", "two", "three"))


def test_a_chat_goes_on_after_an_answer_that_failed(monkeypatch, processor, capsys):
    engine = Recorded()
    talk(monkeypatch, ["one?", "two?"])
    step = engine.step
    steps = iter([lambda: engine.cancel(0, reason="error", message="there is not enough memory")])
    engine.step = lambda: [*next(steps, step)()]
    generate.chat(lambda: engine, processor, [], SamplingConfig(max_new_tokens=2))
    assert "there is not enough memory" in capsys.readouterr().out
    assert [end.usage.prompt_tokens for end in engine.ends] == [len(processor.prompt(user("two?")))]


def test_every_prompt_is_checked_before_the_first_is_answered(folder):
    done = call(folder, "--prompt", "a", "why? " * 40, "--cache-tokens", "64", "--max-new-tokens", "20")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--prompt 'why?" in done.stderr and "more than the cache holds, 64" in done.stderr


def test_a_long_prompt_has_room_in_the_usual_cache(folder, processor, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(generate, "suitable_cache", lambda *_: 32)
    config = GenerateConfig("model", prompt=("why? " * 40,), sampling=SamplingConfig(max_new_tokens=2))
    generate.main(config)
    assert capsys.readouterr().out.strip()
    with pytest.raises(UserError, match="more than the model's 8192 positions"):
        generate.main(dataclasses.replace(config, sampling=SamplingConfig(max_new_tokens=10**9)))


def test_with_fewer_image_tokens(folder, processor, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    sampling, images = SamplingConfig(max_new_tokens=5), (Path("a.png"), Path("b.png"))
    config = GenerateConfig("model", image=images, prompt=("what?", "why?"), sampling=sampling, precision="fp32")
    generate.main(dataclasses.replace(config, prune_image_tokens=0.5, prune_after=1, device="cpu"))
    model, _ = nanovlm.load("model", "cpu")
    expected = ""
    for text in config.prompt:
        prompt = processor.prompt([{"role": "user", "content": text}], [Image.open(path) for path in images])
        found = answer_pruned(model, prompt, 0.5, 1, sampling)
        expected += f"{text}\n  {generate.harmless(processor.decode(found.ids))}\n"
        assert len(found.kept) == len(prompt) - 4
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("text", ["", "is it?"])
def test_a_language_model_is_shown_no_pictures(folder, processor, text):
    """Which is said before a chat begins, and where one is added."""
    blind = VLM(dataclasses.replace(TINY, vision=None, image_token_id=None))
    save_model(folder / "blind", blind, Processor(processor.tokenizer, processor.chat_template, blind.config))
    done = call(folder, "--model", "blind", "--image", "a.png", *(["--prompt", text] if text else []), text="hello?")
    assert done.returncode == 2 and done.stdout == ""
    assert "blind is a language model, which sees no pictures: leave --image out" in done.stderr
    if not text:
        done = call(folder, "--model", "blind", "--max-new-tokens", "3", text="/image a.png\nhello?\n")
        assert done.returncode == 0 and "> this is a language model, which sees no pictures\n" in done.stdout
        assert len(done.stdout.splitlines()) == 4


def test_tokens_that_were_generated_are_shown(folder, processor, monkeypatch):
    """Also those that no text would be encoded as, such as single letters of a word."""
    monkeypatch.chdir(folder)
    model, _ = nanovlm.load("model", "cpu")
    prompt = processor.prompt(user("what?"), [noise(0)])
    ids = [i for letter in "red" for i in processor.tokenizer.encode(letter, add_special_tokens=False).ids]
    assert processor.tokenizer.encode("red", add_special_tokens=False).ids != ids
    seen, look = [], generate.look
    monkeypatch.setattr(generate, "look", lambda *args: seen.append(args[2:]) or look(*args))
    config = GenerateConfig("model", image=(Path("a.png"),), prompt=("what?",), show_attention=Path("x.png"))
    said = Said(0, 0, processor.decode(ids), ids, End(0, 0, "stop"))
    assert generate.draw_attention(config, model, processor, [noise(0)], prompt, said)[1:4] == b"PNG"
    generate.draw_attention(dataclasses.replace(config, attention_head=1), model, processor, [noise(0)], prompt, said)
    assert seen == [(ids, "layers"), (ids, "none")]
    with pytest.raises(UserError, match=r"the answer is empty, so x\.png is not written"):
        generate.draw_attention(config, model, processor, [noise(0)], prompt, said._replace(ids=[], text=""))


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--image", "none.png", "--prompt", "a"], "there is no image file none.png"),
        (["--image", "model/config.json", "--prompt", "a"], "model/config.json cannot be read as an image"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--prompt", os.fsdecode(b"\xff")], "the prompt is not valid UTF-8 text"),
        (["--json"], "--json needs a --prompt"),
        (["--prompt", "a", "--num-answers", "0"], "--num-answers 0 must be at least 1"),
        (["--prompt", "a", "--num-rows", "0"], "--num-rows 0 must be at least 1"),
        (["--prompt", "a", "--cache-tokens", "-1"], "--cache-tokens -1 must be at least 0"),
        (["--prompt", "a", "--cache-tokens", "64"], "more than the cache holds, 64: raise cache_tokens"),
        (["--prompt", "a", "--prune-image-tokens", "2"], "--prune-image-tokens 2.0 must be a share from 0 to 1"),
        (["--prompt", "a", "--prune-image-tokens", "0.5", "--json"], "--prune-image-tokens does not go with --json"),
        (["--prompt", "a", "--draft-tokens", "0"], "--draft-tokens 0 must be at least 1"),
        (["--prompt", "a", "--draft-tokens", "4"], "--draft-tokens says how many tokens a --draft guesses: add it"),
        (["--prompt", "a", "--draft", "nowhere"], "there is no model folder nowhere"),
        (["--prompt", "a", "--draft", "other"], "the draft model has another tokenizer: token"),
        (["--prompt", "a", "--cache-tokens", "9" * 13], "GB, more than there is: lower cache_tokens"),
        (["--prompt", "a", "--seed", "9" * 20, "--temperature", "1"], "must be from -2**62 to 2**62"),
        (["--show-routing"], "--show-routing needs a --prompt"),
        (["--show-routing", "--prompt", "a", "--json"], "--show-routing prints tables, which have no JSON form"),
        (["--image", "a.png", "--prompt", "a", "--show-attention", "./a.png"], "would write over the picture a.png"),
        (["--num-answers", "2"], "--num-answers 2 needs a --prompt"),
        (["--prompt", "a", "--num-answers", "2"], "would all be equal at temperature 0: add --temperature"),
        (["--prompt", "a", "--show-attention", "a.png"], "there is none: add --image FILE"),
        (["--image", "a.png", "--show-attention", "a.png"], "draws the answer to one --prompt, not to 0"),
        (["--image", "a.png", "--prompt", "a", "--show-attention", "x.jpg"], "let the name x.jpg end in .png"),
        (["--image", "a.png", "--prompt", "a", "--show-attention", "no/x.png"], "there is no folder"),
        (["--image", "a.png", "--prompt", "a", "--attention-layer", "1"], "say what --show-attention FILE draws"),
        (
            [
                "--image",
                "a.png",
                "--prompt",
                "a",
                "--show-attention",
                "x.png",
                "--num-answers",
                "2",
                "--temperature",
                "1",
            ],
            "--show-attention draws one answer, not 2",
        ),
        (
            ["--image", "a.png", "--prompt", "a", "--show-attention", "x.png", "--attention-head", "4"],
            "--attention-head 4 is not in model: it has 0 to 3",
        ),
        (
            ["--image", "a.png", "--prompt", "a", "--show-attention", "x.png", "--cache-format", "int4"],
            "answers of --cache-format int4 were not made so: leave one of the two out",
        ),
        (["--video", "a.mp4"], "--video does not go with no --prompt, which is a chat"),
        (["--video", "a.mp4", "--image", "a.png", "--prompt", "a"], "--video does not go with --image"),
        (["--video", "a.mp4", "--num-frames", "0", "--prompt", "a"], "--num-frames = 0 must be from 1 to 999"),
        (["--video", "no.mp4", "--prompt", "a"], "there is no video file no.mp4"),
        (["--image", "a.png", "b.png", "--prompt", "a", "--draw", "x.png"], "--draw draws on one picture, not on 2"),
        (["--prompt", "a", "--draw", "x.png"], "--draw draws what the answer names on a picture, but there is none"),
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
    names = [line.split()[:3] for line in generate.format_routing(blind, speaker, prompt, [7]).splitlines()[1:]]
    assert names == [["layer", str(layer), part] for layer in (0, 1) for part in ("question", "answer")]
    refused = call(folder, "--image", "a.png", "--prompt", "what?", "--show-routing")
    assert refused.returncode == 2 and "--show-routing needs a mixture of experts" in refused.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": FusionConfig("cross_attention")}, r"with fusion\.type = 'cross_attention' there are none"),
        ({"projector": ProjectorConfig("resampler", num_tokens=4)}, r"projector\.type = 'resampler' are of no place"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_said_before_it_is_asked(folder, processor, monkeypatch, change, message):
    model = VLM(dataclasses.replace(TINY, **change))
    own = Processor(processor.tokenizer, processor.chat_template, model.config)
    monkeypatch.setattr(nanovlm, "load", lambda *_: (model, own))
    monkeypatch.setattr(generate, "answer", None)
    config = GenerateConfig("model", (folder / "a.png",), ("what?",), show_attention=folder / "no.png", device="cpu")
    with pytest.raises(UserError, match=message):
        generate.main(config)


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


def test_a_video_is_asked_about(folder, processor):
    """Its frames are images of the prompt, with their times between; written and read again as a file."""
    pytest.importorskip("av", reason="needs av, the extra video")
    frames = [noise(seed).resize((24, 16)) for seed in range(6)]
    frames[0].save(folder / "six.gif", save_all=True, append_images=frames[1:], duration=500)
    options = ["--video", "six.gif", "--num-frames", "3", "--fps", "0", "--prompt", "what?", "--max-new-tokens", "3"]
    done = call(folder, *options, "--json")
    assert done.returncode == 0, done.stderr
    clip = open_video(folder / "six.gif", VideoConfig(3, 0))
    assert len(clip.images) == 3 and clip.duration == pytest.approx(3)
    messages = [{"role": "user", "content": [clip.part(), {"type": "text", "text": "what?"}]}]
    model, _ = nanovlm.load(folder / "model", "cpu")
    batch = processor(messages, clip.images)
    (ids,) = nanovlm.generate(model, batch, max_new_tokens=3)
    told = json.loads(done.stdout)
    assert (told["text"], told["prompt_tokens"]) == (processor.decode(ids), batch.input_ids.shape[1])
    assert "three frames from a 0:00:03" in processor.tokenizer.decode(batch.input_ids[0].tolist())


def test_boxes_of_an_answer_are_drawn(folder, processor, monkeypatch):
    text = "[0.25, 0.25, 0.75, 0.75]"
    monkeypatch.setattr(nanovlm, "load", lambda *_: (VLM(TINY), processor))
    monkeypatch.setattr(generate, "answer", lambda *_: [Said(0, 0, text, [7], End(0, 0, "stop"))])
    config = GenerateConfig("model", (folder / "a.png",), ("where?",), draw=folder / "boxes.png", device="cpu")
    generate.main(config)
    expected = draw_places(Image.open(folder / "a.png"), [Box(0.25, 0.25, 0.75, 0.75)])
    assert (folder / "boxes.png").read_bytes() == expected
    text = "nowhere"
    with pytest.raises(UserError, match=r"the answer names no box and no point, so .*none.png is not written"):
        generate.main(dataclasses.replace(config, draw=folder / "none.png"))
    assert not (folder / "none.png").exists()
