"""Native pictures in the engine: each is encoded once, as a whole, however its prompt is cut."""

import dataclasses

import pytest
import torch

import nanovlm
from nanovlm.config import ProjectorConfig, TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.errors import UserError
from nanovlm.infer.draft_model import DraftModel
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request
from nanovlm.infer.row import Prompt
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise
from tests.infer.test_engine import GREEDY, NUM, check_blocks, finish, written_out

CONFIG = dataclasses.replace(
    TINY, tiling=TilingConfig("native", max_patches=40), projector=ProjectorConfig(scale_factor=2)
)
SIZES = [(40, 20), (16, 16), (9, 70), (60, 60)]


@pytest.fixture(scope="module")
def native(processor):
    torch.manual_seed(0)
    return VLM(CONFIG).eval(), Processor(processor.tokenizer, processor.chat_template, CONFIG)


def ask(processor, text, *seeds):
    pictures = [noise(seed).resize(SIZES[seed % len(SIZES)]) for seed in seeds]
    return processor.prompt([{"role": "user", "content": text}], pictures)


def count(monkeypatch, model):
    """Record the grids of what is encoded."""
    seen, encode = [], model.encode

    def record(pixel_values, grids=()):
        seen.extend(grids)
        return encode(pixel_values, grids)

    monkeypatch.setattr(model, "encode", record)
    return seen


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_answers_equal_those_without_a_cache(native, chunk, monkeypatch):
    model, processor = native
    prompts = [
        ask(processor, "why?", 0, 1),
        ask(processor, "what?"),
        ask(processor, "how many?", 2),
        ask(processor, "why?", 0, 3),
    ]
    expected = [written_out(model, processor, prompt)[0] for prompt in prompts]
    assert len({tuple(answer) for answer in expected}) > 2
    engine, seen = Engine(model, num_rows=3, chunk=chunk), count(monkeypatch, model)
    numbers = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
    answers, _ = finish(engine, *numbers)
    assert [answers[number, 0] for number in numbers] == expected
    assert sorted(seen) == [(2, 4), (3, 3), (3, 3), (8, 1)]  # each picture once
    check_blocks(engine)


def test_a_batch_equals_its_rows(native):
    model, processor = native
    prompts = [ask(processor, "why?", 0, 1), ask(processor, "how many?", 2), ask(processor, "what?")]
    together = nanovlm.generate(model, processor.batch(prompts), GREEDY)
    assert together == [written_out(model, processor, prompt)[0] for prompt in prompts]


def test_which_picture_a_token_shows(native):
    model, processor = native
    document = ask(processor, "why?", 0, 1, 2)
    prompt = Prompt(Request(document, GREEDY), model)
    places = (document.input_ids == CONFIG.image_token_id).nonzero()[:, 0].tolist()
    owners = [i for i, (rows, columns) in enumerate(document.grids) for _ in range(rows * columns)]
    assert len(set(document.grids)) == 3 and prompt.image_positions == places
    for start in range(len(document)):
        for end in range(start, len(document) + 1):
            shown = sorted({owner for place, owner in zip(places, owners, strict=True) if start <= place < end})
            assert list(prompt.pictures_of(start, end)) == shown
    for i in range(3):
        assert prompt.places[i] == [p for p, owner in zip(places, owners, strict=True) if owner == i]


def test_equal_pixels_in_another_grid_are_another_picture(native):
    model, processor = native
    document = ask(processor, "why? " * 30, 1)
    turned = dataclasses.replace(document, grids=[(1, len(document.tiles))])
    one, other = (Prompt(Request(x, GREEDY), model) for x in (document, turned))
    assert one.digests != other.digests and one.keys[0] != other.keys[0]


@pytest.mark.parametrize("draft_config", [CONFIG, TINY], ids=["native", "tiles"])
def test_a_draft_changes_no_answer(native, draft_config):
    """It sees the pictures if it is native itself."""
    model, processor = native
    torch.manual_seed(1)
    draft = DraftModel(VLM(draft_config).eval(), num_tokens=3)
    engine = Engine(model, draft=draft)
    assert draft.sees_images == (draft_config is CONFIG)
    prompts = [ask(processor, "why?", 0, 1), ask(processor, "how many?", 2)]
    numbers = [engine.submit(Request(prompt, GREEDY)) for prompt in prompts]
    answers, _ = finish(engine, *numbers)
    assert [answers[number, 0] for number in numbers] == [written_out(model, processor, p, NUM)[0] for p in prompts]


def test_a_prompt_without_its_grids_is_refused(native):
    model, processor = native
    prompt = dataclasses.replace(ask(processor, "why?", 1), grids=[])
    with pytest.raises(UserError, match=r"grids = \[\] are not those of 9 tiles of the prompt"):
        Engine(model).submit(Request(prompt, GREEDY))
