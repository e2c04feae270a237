"""Published templates: ids and trained tokens are those of transformers' `apply_chat_template`.

Each template stands as its makers published it in `templates/`, most of them beside a copy with generation blocks, of
which transformers makes its mask. Where there is no copy, the test adds the blocks to the published text.
"""

# DeepSeek writes its control tokens with other bars.
# ruff: noqa: RUF001

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from nanovlm.data.chat import Processor
from nanovlm.data.types import IGNORE, Sample
from tests.conftest import TINY, noise
from tests.data.chat_templates import SMOLLM2, gemma_style, gpt2_style, llama3_style
from tests.data.test_chat import trained_texts

FOLDER = Path(__file__).parent / "templates"
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
TOOLS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
THINK = ["<think>", "</think>"]
COHERE = [
    "<PAD>",
    "<BOS_TOKEN>",
    *(f"<|{name}_TOKEN|>" for name in "START_OF_TURN END_OF_TURN USER CHATBOT SYSTEM".split()),
]
GEMMA = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"]
# White space after these is part of them.
PHI3 = ["<|endoftext|>", *(AddedToken(f"<|{x}|>", rstrip=True) for x in "assistant user system end".split())]


class Published(NamedTuple):
    """A template's tokens, and what it does. `added` are tokens that are not marked as special."""

    special: list
    eos: str
    bos: str | None = None
    added: list[str] | tuple = ()
    make: Callable[[list[AddedToken]], Tokenizer] = llama3_style
    image: str | None = None
    system: bool = True
    lists: bool = False  # content must be a list of parts
    strips: bool = False
    header: str = ""  # of an answer, which the training copy's block holds and no model writes
    lead: str = ""  # what the model writes before its answer
    last_lead: str = ""  # and before the last one


EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
PUBLISHED = {
    "smollm2": Published(QWEN[:3], "<|im_end|>", make=gpt2_style),
    "zephyr": Published(["<unk>", "<s>", "</s>"], "</s>", "<s>", make=gemma_style),
    "llama3": Published(LLAMA3, "<|eot_id|>", LLAMA3[0], strips=True),
    "llama3_2": Published(LLAMA3, "<|eot_id|>", LLAMA3[0], strips=True),
    "qwen2_5": Published(QWEN, "<|im_end|>", added=TOOLS, header="\n"),
    "qwen3": Published(
        QWEN, "<|im_end|>", added=TOOLS + THINK, last_lead=EMPTY_THOUGHT, header="<|im_start|>assistant\n"
    ),
    "qwen3_instruct_2507": Published(QWEN, "<|im_end|>", added=TOOLS + THINK),
    "qwen2_5_vl": Published(QWEN, "<|im_end|>", added=TOOLS, image="<|image_pad|>"),
    "qwen3_vl": Published(QWEN, "<|im_end|>", added=TOOLS + THINK, image="<|image_pad|>"),
    "gemma": Published(GEMMA, "<end_of_turn>", "<bos>", make=gemma_style, system=False, strips=True),
    "gemma3": Published(GEMMA, "<end_of_turn>", "<bos>", make=gemma_style, image="<start_of_image>", strips=True),
    "phi3": Published(PHI3, "<|end|>", make=gemma_style),
    "phi3_5": Published(PHI3, "<|end|>", make=gemma_style),
    "cohere": Published(COHERE, "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", make=gpt2_style, strips=True),
    "deepseekv3": Published(
        ["<｜▁pad▁｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        added=["<｜User｜>", "<｜Assistant｜>", *THINK],
        header="<｜Assistant｜>",
    ),
    "smolvlm": Published(
        ["<|endoftext|>", "<|im_start|>", "<image>", "<end_of_utterance>"],
        "<end_of_utterance>",
        make=gpt2_style,
        image="<image>",
        lists=True,
        lead=" ",
    ),
    "idefics3": Published(
        [*LLAMA3, "<image>", "<end_of_utterance>"],
        "<end_of_utterance>",
        "<|begin_of_text|>",
        image="<image>",
        lists=True,
        lead=" ",
    ),
    "llava_next": Published(
        ["<unk>", "<s>", "</s>", "<image>"],
        "</s>",
        "<s>",
        make=gemma_style,
        image="<image>",
        lists=True,
        lead=" ",
    ),
    "lfm2": Published(["<|pad|>", "<|startoftext|>", "<|im_end|>", "<|im_start|>"], "<|im_end|>", "<|startoftext|>"),
}


def template_of(name: str) -> str:
    return SMOLLM2 if name == "smollm2" else (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def training_template(name: str) -> str:
    """The copy with generation blocks."""
    if (path := FOLDER / f"{name}_training.jinja").is_file() and name != "qwen3":  # which thinks in every turn
        return path.read_text(encoding="utf-8")
    template = template_of(name)
    if name == "smollm2":
        whole = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        block = "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        parted = "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}" + block
        parted += "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    elif name == "zephyr":
        whole = "{{ '<|assistant|>\n'  + message['content'] + eos_token }}"
        # After a block the line end would go.
        block = "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '' }}"
        parted = "{{ '<|assistant|>\n' }}" + block
    elif name == "llama3_2":
        whole = (
            "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim"
            " + '<|eot_id|>' }}"
        )
        text = "message['content'] | trim + '<|eot_id|>' }}"
        parted = "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        parted += "{%- if message['role'] == 'assistant' %}{% generation %}{{- " + text + "{% endgeneration %}"
        parted += "{%- else %}{{- " + text + "{%- endif %}"
    else:
        assert name == "qwen3"
        whole, parted = "{%- set reasoning_content = '' %}", "{%- generation %}{%- set reasoning_content = '' %}"
        end = "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}"
        assert template.count(end) == 1
        template = template.replace(end, end.replace("}}", "}}{%- endgeneration %}", 1))
    assert template.count(whole) == 1
    return template.replace(whole, parted)


def make(name, template=None):
    """Our processor and transformers' tokenizer of a published template."""
    family = PUBLISHED[name]
    special = [
        AddedToken(str(token.content if isinstance(token, AddedToken) else token), special=True, normalized=False,
                   rstrip=isinstance(token, AddedToken))
        for token in family.special
    ]  # fmt: skip
    tokenizer = family.make(special)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.added])
    used = (family.image, family.eos, family.bos)
    ids = {
        "pad_token_id": next(tokenizer.token_to_id(t.content) for t in special if t.content not in used),
        "image_token_id": family.image and tokenizer.token_to_id(family.image),
        "eos_token_id": tokenizer.token_to_id(family.eos),
        "bos_token_id": family.bos and tokenizer.token_to_id(family.bos),
    }
    config = TINY if family.image else dataclasses.replace(TINY, vision=None)
    processor = Processor(tokenizer, template or template_of(name), dataclasses.replace(config, **ids).validate())
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=family.bos, eos_token=family.eos)
    return processor, theirs


def conversation(name, system, images=0):
    """Two turns; the form in which transformers is given them; the answers as the template writes them."""
    family, answers = PUBLISHED[name], ["a red circle.", "42, or 7"]
    messages = [{"role": "system", "content": "Answer briefly."}] if system else []
    for question, answer in zip(["what is it?", "how many?\n yes"], answers, strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    shown = [dict(m, content=[{"type": "text", "text": m["content"]}]) if family.lists else m for m in messages]
    if images:
        parts = [{"type": "image"} for _ in range(images)] + [{"type": "text", "text": "what is it?"}]
        messages[system]["content"] = parts
        shown = [
            dict(m, content=[{"type": "text", "text": m["content"]}]) if isinstance(m["content"], str) else m
            for m in messages
        ]
    return messages, shown, answers


def trained_by_the_mask(theirs, shown, template, family):
    """Which tokens transformers' mask trains, and their ids: of each block what the model writes, to its end."""
    output = theirs.apply_chat_template(
        shown, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = output["input_ids"], output["assistant_masks"]
    eos = theirs.convert_tokens_to_ids(family.eos)
    header = theirs.encode(family.header, add_special_tokens=False)
    trained, is_over = list(mask), True
    for t, (token, flag) in enumerate(zip(ids, mask, strict=True)):
        if flag and not (t and mask[t - 1]):
            is_over = False
            assert ids[t : t + len(header)] == header
            trained[t : t + len(header)] = [0] * len(header)
        trained[t] &= not is_over
        is_over |= token == eos
    return ids, trained


def ours(document):
    """Ids and whether each is trained."""
    labels = [IGNORE, *document.labels.tolist()[:-1]]
    ids = document.input_ids.tolist()
    assert all(label in (IGNORE, token) for label, token in zip(labels, ids, strict=True))
    return ids, [int(label != IGNORE) for label in labels]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_and_trained_tokens_are_those_of_transformers(name, system):
    family = PUBLISHED[name]
    processor, theirs = make(name)
    messages, shown, answers = conversation(name, system)
    if system and not family.system:
        with pytest.raises(ValueError, match="System role not supported"):
            processor.document(Sample([], messages))
        return
    document = processor.document(Sample([], messages))
    expected = theirs.apply_chat_template(shown, chat_template=template_of(name), tokenize=True, return_dict=False)
    assert document.input_ids.tolist() == expected
    assert ours(document) == trained_by_the_mask(theirs, shown, training_template(name), family)
    leads = [family.lead, family.last_lead or family.lead]
    assert trained_texts(processor, document) == [f"{x}{a}{family.eos}" for x, a in zip(leads, answers, strict=True)]
    prompt = processor.prompt(messages[:-1]).input_ids.tolist()
    options = {"chat_template": template_of(name), "tokenize": True, "add_generation_prompt": True}
    assert prompt == theirs.apply_chat_template(shown[:-1], return_dict=False, **options)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if (FOLDER / f"{name}_training.jinja").is_file()])
def test_training_templates_are_checked_by_their_own_blocks(name):
    """A template with generation blocks is used as it is, and trains what its blocks say."""
    family, template = PUBLISHED[name], (FOLDER / f"{name}_training.jinja").read_text(encoding="utf-8")
    if name == "qwen3":
        family = family._replace(header="")
    processor, theirs = make(name, template)
    messages, shown, _ = conversation(name, False)
    assert ours(processor.document(Sample([], messages))) == trained_by_the_mask(theirs, shown, template, family)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", [name for name, family in PUBLISHED.items() if family.image])
def test_images_among_published_templates(name, images):
    family = PUBLISHED[name]
    processor, theirs = make(name)
    messages, shown, _ = conversation(name, True, images)
    document = processor.document(Sample([noise(i) for i in range(images)], messages))
    ids, mask = trained_by_the_mask(theirs, shown, training_template(name), family)
    image, repeats = processor.config.image_token_id, processor.config.num_image_tokens
    expected = [(t, m) for t, m in zip(ids, mask, strict=True) for _ in range(repeats if t == image else 1)]
    assert ours(document) == ([t for t, _ in expected], [m for _, m in expected])
    assert len(document.tiles) == images


@pytest.mark.parametrize("name", PUBLISHED)
def test_random_conversations(name):
    """Whatever white space and thinking tags messages hold, the ids are those of transformers, each answer trained."""
    family, rng = PUBLISHED[name], random.Random(name)
    processor, theirs = make(name)
    pieces = [*"ab r.?!<|:12'é🙂日\t\n\u2003", "\n\n", "  ", " \n", "e\u0301", "\ue0000\ue001", "{{ x }}"]
    of_role = {"user": pieces, "assistant": pieces + THINK * 2 * (name in ("qwen3", "deepseekv3"))}
    for _ in range(60):
        messages = [
            {"role": role, "content": "".join(rng.choices(of_role[role], k=rng.randint(0, 8)))}
            for role in ("user", "assistant") * rng.randint(1, 3)
        ]
        shown = [dict(m, content=[{"type": "text", "text": m["content"]}]) if family.lists else m for m in messages]
        document = processor.document(Sample([], messages))
        expected = theirs.apply_chat_template(shown, chat_template=template_of(name), tokenize=True, return_dict=False)
        assert document.input_ids.tolist() == expected
        ends = sum(label == processor.config.eos_token_id for label in document.labels.tolist())
        assert ends == len(messages) // 2
