"""The templates of well-known models: what is trained, and the same tokens as transformers gives."""

import dataclasses
import itertools
import random

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from nanovlm.config import ProjectorConfig, TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens, plan_tiles
from nanovlm.data.places import count_places
from nanovlm.data.tile_plan import find_grid
from nanovlm.data.tilings import TILING
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.data.types import Sample
from tests.conftest import TINY, make_document, noise
from tests.data.chat_templates import FAMILIES, SMOLVLM, make_tokenizer
from tests.data.test_chat import trained_texts

TURNS = [
    ("what is it?", "a red circle"),
    ("  how many?\n\n", "42  or \n 7"),
    ("naïve 🙂?", "🙂, no  🙂🙃"),
    ("", "日本\n"),
]


def make_processor(family, tokenizer=None, **tiling):
    """Our processor and transformers' tokenizer of a family."""
    config = dataclasses.replace(TINY, tiling=TilingConfig(**tiling))
    if config.tiling.policy == "anyres":
        config = dataclasses.replace(config, projector=ProjectorConfig("mlp", has_newline=True))
    tokenizer = tokenizer or make_tokenizer(family, marker_tokens(config))
    used = (family.image, family.eos, family.bos)
    ids = {
        "pad_token_id": next(i for i, t in enumerate(family.special_tokens) if t not in used),
        "image_token_id": tokenizer.token_to_id(family.image),
        "eos_token_id": tokenizer.token_to_id(family.eos),
        "bos_token_id": family.bos and tokenizer.token_to_id(family.bos),
    }
    processor = Processor(tokenizer, family.template, dataclasses.replace(config, **ids).validate())
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos, chat_template=family.template
    )
    return processor, theirs


def conversation(num_turns, system, lists=False):
    messages = [{"role": "system", "content": "Answer briefly. "}] if system else []
    for user, answer in TURNS[:num_turns]:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    if lists:
        return [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return messages


@pytest.mark.parametrize(("name", "system"), list(itertools.product(FAMILIES, [False, True])))
@pytest.mark.parametrize("num_turns", [1, 4])
def test_answers_are_trained_and_tokens_are_those_of_transformers(name, system, num_turns):
    family = FAMILIES[name]
    processor, theirs = make_processor(family)
    messages = conversation(num_turns, system)
    shown = conversation(num_turns, system, lists=family.lists)
    if system and not family.has_system:
        with pytest.raises(ValueError, match=r"refuses a conversation of system, user, .*: System role not supported"):
            processor.document(Sample([], messages))
        return
    document = processor.document(Sample([], messages))
    answers = [answer.strip() if family.strips else answer for _, answer in TURNS[:num_turns]]
    assert trained_texts(processor, document) == [f"{family.lead}{answer}{family.eos}" for answer in answers]
    expected = theirs.apply_chat_template(shown, tokenize=True, return_dict=False)
    assert document.input_ids.tolist() == expected
    if family.bos:
        assert expected.count(processor.config.bos_token_id) == 1 and expected[0] == processor.config.bos_token_id
    if num_turns == 4:
        messages, shown = messages[:-2], shown[:-2]  # the last question is empty
    expected = theirs.apply_chat_template(shown[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert processor.prompt(messages[:-1]).input_ids.tolist() == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_what_stands_before_the_trained_tokens(name):
    """Else the model would be trained at places at which generation never begins."""
    processor, _ = make_processor(FAMILIES[name])
    for question, answer in TURNS[:-1]:
        document = processor.document(
            Sample([], [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        )
        prompt = processor.prompt([{"role": "user", "content": question}])
        first = int((document.labels != -100).nonzero()[0])
        assert prompt.input_ids.tolist() == document.input_ids[: first + 1].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_random_conversations(name):
    family = FAMILIES[name]
    processor, theirs = make_processor(family)
    rng = random.Random(name)
    pieces = [
        *"ab r.?!<|:12'é\t\n\n",
        "  ",
        " \n",
        "e\u0301",
        "🙂",
        "日",
        "\u2003",
        "\ue0000\ue001",
        "{{ x }}",
        "User:",
    ]
    for _ in range(40):
        messages = [
            {"role": role, "content": "".join(rng.choices(pieces, k=rng.randint(0, 8)))}
            for role in ("user", "assistant") * rng.randint(1, 3)
        ]
        document = processor.document(Sample([], messages))
        shown = [dict(m, content=[{"type": "text", "text": m["content"]}]) if family.lists else m for m in messages]
        assert document.input_ids.tolist() == theirs.apply_chat_template(shown, tokenize=True, return_dict=False)
        answers = [m["content"].strip() if family.strips else m["content"] for m in messages[1::2]]
        # A line end of the template and one of the answer can be one token, which then is trained.
        if not any(answer.startswith("\n") for answer in answers):
            assert trained_texts(processor, document) == [f"{family.lead}{a}{family.eos}" for a in answers]


@pytest.mark.parametrize("name", FAMILIES)
def test_strings_of_special_tokens_stay_plain_text(name):
    family = FAMILIES[name]
    processor, _ = make_processor(family)
    special = set(processor.special.values())
    counts = set()
    for text in ["plain", *family.special_tokens]:
        document = processor.document(
            Sample([], [{"role": "user", "content": text}, {"role": "assistant", "content": text}])
        )
        counts.add(sum(i in special for i in document.input_ids.tolist()))
        assert trained_texts(processor, document) == [f"{family.lead}{text}{family.eos}"]
    assert len(counts) == 1


def test_a_template_that_writes_bos_needs_its_id():
    processor, _ = make_processor(FAMILIES["Gemma"])
    config = dataclasses.replace(processor.config, bos_token_id=None)
    with pytest.raises(ValueError, match="the chat template writes bos_token, but bos_token_id = None"):
        Processor(processor.tokenizer, processor.chat_template, config)


def test_a_template_that_writes_around_images_is_given_the_parts():
    processor, _ = make_processor(FAMILIES["Qwen2-VL"])
    content = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    prompt = processor.prompt([{"role": "user", "content": content}], [noise(0), noise(1)])
    text = processor.tokenizer.decode(prompt.input_ids.tolist(), skip_special_tokens=False)
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    assert f"<|im_start|>user\n{image}a{image}b<|im_end|>\n<|im_start|>assistant\n" in text


@pytest.mark.parametrize("longest_edge", [16, 64])
def test_idefics3_tokens_are_those_of_transformers(longest_edge):
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    processor, tokenizer = make_processor(FAMILIES["SmolVLM"], policy="idefics3", longest_edge=longest_edge)
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": 16}
    )
    theirs = Idefics3Processor(image_processor, tokenizer, image_seq_len=TINY.num_image_tokens, chat_template=SMOLVLM)
    rng = random.Random(longest_edge)
    image, text = {"type": "image"}, {"type": "text", "text": " what is\n this?"}
    contents = [[image, text], [text, image], [image, image, text], [image, text, image, text], [text, image, image]]
    for i in range(30):
        messages = [{"role": "user", "content": contents[i % len(contents)]}]
        if i % 3 == 0:
            messages += [{"role": "assistant", "content": [{"type": "text", "text": "a circle"}]}, messages[0]]
        images = [
            noise(n).resize((rng.randint(1, 90), rng.randint(1, 90)))
            for n in range(sum(part == image for message in messages for part in message["content"]))
        ]
        ours = processor.prompt(messages, images)
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True)
        expected = theirs(text=prompt, images=images, add_special_tokens=False)
        assert ours.input_ids.tolist() == expected["input_ids"][0]
        assert len(ours.tiles) == len(expected["pixel_values"][0])


@pytest.mark.parametrize("policy", TILING)
def test_the_tokens_of_an_image_are_known_from_its_size(policy):
    config = dataclasses.replace(TINY, tiling=TilingConfig(policy=policy, max_tiles=6, longest_edge=48))
    processor = Processor(train_tokenizer(["a b"], 400, marker_tokens(config)), CHAT_TEMPLATE, config)
    rng = random.Random(0)
    alone = make_document(processor, 0, ("what?", "yes"), images=0)
    for _ in range(60):
        width, height = round(200 ** rng.random()), round(200 ** rng.random())
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "yes"},
        ]
        document = processor.document(Sample([Image.new("RGB", (width, height))], messages))
        assert len(document) - len(alone) == processor.num_image_tokens(width, height)
        plan = plan_tiles(width, height, config)
        assert len(document.tiles) == plan.num_tiles
        expected = config.num_image_tokens * plan.num_tiles
        if policy == "anyres":
            expected = count_places(config, [find_grid(plan)])[0]
        assert document.input_ids.tolist().count(config.image_token_id) == expected
        assert trained_texts(processor, document) == ["yes<end_of_utterance>"]


@pytest.mark.parametrize("policy", TILING)
def test_branches_after_several_tiles_are_separate_documents(policy):
    processor, _ = make_processor(FAMILIES["SmolVLM"], policy=policy, max_tiles=6, longest_edge=48)
    image = noise(0).resize((40, 30))
    pairs = [
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
        for question, answer in [("what?", "a circle"), ("how many?", "2")]
    ]
    together = processor.document(Sample([image], pairs[0] + pairs[1], independent=True))
    assert (
        len(together.tiles)
        == plan_tiles(40, 30, processor.config).num_tiles
        > (0 if policy in ("square", "gemma", "paligemma", "crop") else 5)
    )
    for branch, pair in enumerate(pairs, start=1):
        alone = processor.document(Sample([image], pair))
        seen = (together.branch_ids == 0) | (together.branch_ids == branch)
        assert together.input_ids[seen].tolist() == alone.input_ids.tolist()
        assert together.labels[seen].tolist() == alone.labels.tolist()


def test_fit_layout():
    config = dataclasses.replace(TINY, tiling=TilingConfig(max_tiles=2))
    processor = Processor(train_tokenizer(["a b"], 400, marker_tokens(config)), CHAT_TEMPLATE, config)
    prompt = processor.prompt([{"role": "user", "content": "what?"}], [noise(0), noise(0).resize((32, 16))])
    image = "<image>" * 4
    assert processor.tokenizer.decode(prompt.input_ids.tolist(), skip_special_tokens=False) == (
        f"<|user|>{image}<row_1_col_1>{image}<row_1_col_2>{image}<global-img>{image}what?<|assistant|>"
    )
    assert len(prompt.tiles) == 4


@pytest.mark.parametrize(
    ("tiling", "missing"),
    [
        ({"max_tiles": 2}, "<global-img>, <row_1_col_1>, <row_1_col_2>, <row_2_col_1>"),
        ({"policy": "idefics3", "longest_edge": 16}, "<fake_token_around_image>"),
    ],
)
def test_missing_marker_tokens_are_named(processor, tiling, missing):
    with pytest.raises(ValueError, match=f"special tokens that the tokenizer does not have: {missing}$"):
        Processor(processor.tokenizer, CHAT_TEMPLATE, dataclasses.replace(TINY, tiling=TilingConfig(**tiling)))
