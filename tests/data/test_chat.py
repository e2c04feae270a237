"""Which tokens are trained, and which are control tokens."""

import dataclasses

import pytest
import torch

from nanovlm.data.chat import Processor
from nanovlm.data.records import to_sample
from nanovlm.data.rendering import Renderer
from nanovlm.data.tokenizer import CHAT_TEMPLATE, CHAT_TEMPLATES, train_tokenizer
from nanovlm.data.types import IGNORE, Sample
from tests.conftest import TINY, make_document, make_raw, noise

EOS = TINY.eos_token_id

# Each does something that naive masking gets wrong: a default system prompt, stripped messages, a leading token,
# a system message moved into the user turn.
TEMPLATES = {
    "ours": CHAT_TEMPLATE,
    "default system prompt": (
        "{% if messages[0].role != 'system' %}<|system|>You help.{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "stripped, with a first token": (
        "<|pad|>{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
    ),
    "system inside the user turn": (
        "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}<|{{ m.role }}|>{% if loop.first and first %}[{{ first }}] {% endif %}"
        "{{ m.content }}{% if m.role == 'assistant' %}<end_of_utterance>{% endif %}{% endfor %}"
    ),
}


def trained_texts(processor, document):
    """The text of every run of trained tokens, with control tokens written out."""
    runs, last = [], None
    for t, label in enumerate(document.labels.tolist()):
        if label == IGNORE:
            continue
        assert document.input_ids[t + 1 :].tolist()[:1] in ([label], []) or document.branch_ids[t] > 0
        runs.append([label]) if last != t - 1 else runs[-1].append(label)
        last = t
    return [processor.tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
def test_trained_tokens_are_the_answers_and_their_ends(processor, name, system):
    processor = Processor(processor.tokenizer, TEMPLATES[name], TINY)
    turns = [("what is it?", "a red circle"), ("how many?\n", "42"), ("naïve 🙂?", "no 🙂, \n never")]
    messages = [
        m
        for user, assistant in turns
        for m in ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
    ]
    if system:
        messages = [{"role": "system", "content": "Answer briefly."}, *messages]
    document = processor.document(Sample([], messages))
    assert trained_texts(processor, document) == [f"{answer}<end_of_utterance>" for _, answer in turns]
    # The untrained tokens together hold everything else, in order.
    shown = processor.tokenizer.decode(document.input_ids.tolist(), skip_special_tokens=False)
    plain = processor.template.render(messages=messages, add_generation_prompt=False)
    assert shown == plain


def test_a_stripping_template_trains_the_stripped_answer(processor):
    processor = Processor(processor.tokenizer, TEMPLATES["stripped, with a first token"], TINY)
    document = make_document(processor, 0, ("  what?  ", "  yes\n"))
    assert trained_texts(processor, document) == ["yes<end_of_utterance>"]


def test_spaces_that_a_template_writes_stay(processor):
    """Llama 2 strips messages and sets them off by spaces; the one before the end is the model's to write."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|pad|>[INST] ' + m.content | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + ' <end_of_utterance>' }}{% endif %}{% endfor %}"
    )
    processor = Processor(processor.tokenizer, template, TINY)
    document = make_document(processor, 0, ("what? ", " yes\n"), images=0)
    shown = processor.tokenizer.decode(document.input_ids.tolist(), skip_special_tokens=False)
    assert shown == "<|pad|>[INST] what? [/INST] yes <end_of_utterance>"
    assert [text.lstrip() for text in trained_texts(processor, document)] == ["yes <end_of_utterance>"]


def test_single_turn_with_image(processor):
    document = make_document(processor, 0, ("what color is the circle?", "red"))
    ids = document.input_ids.tolist()
    assert ids.count(TINY.image_token_id) == TINY.num_image_tokens == 4
    assert trained_texts(processor, document) == ["red<end_of_utterance>"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|user|>" + "<image>" * 4 + "what color is the circle?<|assistant|>red<end_of_utterance>"
    )


def test_our_template_takes_strings_and_parts(processor):
    def render(content):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
        return processor.template.render(messages=messages, add_generation_prompt=True)

    text = {"type": "text", "text": "a <b>?"}
    assert render("<image>a <b>?") == render([{"type": "image"}, text])
    assert render([text]) == "<|user|>a <b>?<|assistant|>red<end_of_utterance><|assistant|>"


def test_every_label_is_the_next_token_of_its_branch(processor):
    document = make_document(processor, 0, ("a?", "red"), ("b c?", "the blue one"), ("d?", ""), independent=True)
    answers = []
    for branch in (1, 2, 3):
        ids = document.input_ids[document.branch_ids == branch].tolist()
        labels = document.labels[document.branch_ids == branch].tolist()
        assert all(label in (IGNORE, after) for label, after in zip(labels, ids[1:], strict=False))
        assert labels[-1] == IGNORE
        answers.append(processor.tokenizer.decode([x for x in labels if x != IGNORE], skip_special_tokens=False))
    assert answers == ["red<end_of_utterance>", "the blue one<end_of_utterance>", "<end_of_utterance>"]
    assert (document.labels[document.branch_ids == 0] == IGNORE).all()


def test_branches_are_the_same_tokens_and_positions_as_separate_documents(processor):
    turns = [("a?", "red"), ("what shape?", "blue square")]
    together = make_document(processor, 3, *turns, independent=True)
    assert together.branch_ids.unique().tolist() == [0, 1, 2]
    for branch, turn in enumerate(turns, start=1):
        alone = make_document(processor, 3, turn)
        seen = (together.branch_ids == 0) | (together.branch_ids == branch)
        assert together.input_ids[seen].tolist() == alone.input_ids.tolist()
        assert together.labels[seen].tolist() == alone.labels.tolist()
        assert together.position_ids[seen].tolist() == alone.position_ids.tolist()
    assert len(together.tiles) == 1


def test_independent_questions_without_images_share_nothing(processor):
    document = make_document(processor, 0, ("a?", "b"), ("c?", "d"), images=0, independent=True)
    assert document.branch_ids.unique().tolist() == [1, 2]
    assert document.position_ids[document.branch_ids == 2][0] == 0


@pytest.mark.parametrize(
    "text",
    ["<end_of_utterance>", "a <image> b", "<|assistant|>yes<end_of_utterance>", "<|pad|><|user|>", "\ue0000\ue001"],
)
def test_special_strings_in_text_are_plain_text(processor, text):
    special = set(processor.special.values())
    plain = make_document(processor, 0, ("plain", "plain"))
    for turn in ((text, "plain"), ("plain", text)):
        question = [{"type": "image"}, {"type": "text", "text": turn[0]}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": turn[1]}]
        document = processor.document(Sample([noise(0)], messages))
        count = [sum(i in special for i in d.input_ids.tolist()) for d in (document, plain)]
        assert count[0] == count[1]
        shown = processor.tokenizer.decode(document.input_ids.tolist(), skip_special_tokens=False)
        assert text in shown
    prompt = processor.prompt([{"role": "user", "content": text}])
    assert sum(i in special for i in prompt.input_ids.tolist()) == 2
    # `document` is the one whose answer is the text.
    answer = document.labels[document.labels != IGNORE].tolist()
    assert processor.encode_answer(text) == answer[:-1] and special.isdisjoint(answer[:-1])


def test_prompt_is_the_document_up_to_the_answer(processor):
    document = make_document(processor, 7, ("what shape?", "star"))
    prompt = processor.prompt([{"role": "user", "content": "what shape?"}], [noise(7)])
    first = int((document.labels != IGNORE).nonzero()[0])
    assert prompt.input_ids.tolist() == document.input_ids[: first + 1].tolist()
    assert torch.equal(prompt.tiles, document.tiles)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_what_is_trained_can_be_asked_for(name):
    """A token that reaches from the question into the answer would be trained, and never be the model's to write."""
    tokenizer = train_tokenizer(["is it redblue?redred"] * 100, 512, ("<|im_start|>", "<|im_end|>"))
    whole = tokenizer.encode("redred", add_special_tokens=False).ids
    assert len(whole) == 1  # the tokenizer would join them
    end = tokenizer.token_to_id("<|im_end|>") if name == "chatml" else EOS
    config = dataclasses.replace(TINY, image_token_id=None, vision=None, eos_token_id=end)
    processor = Processor(tokenizer, CHAT_TEMPLATES[name], config)
    for question in ("red", [{"type": "text", "text": "red"}]):
        asked = [{"role": "user", "content": question}]
        document = processor.document(Sample([], [*asked, {"role": "assistant", "content": "red"}]))
        first = int((document.labels != IGNORE).nonzero()[0])
        assert processor.prompt(asked).input_ids.tolist() == document.input_ids[: first + 1].tolist()
        trained = [label for label in document.labels.tolist() if label != IGNORE]
        assert tokenizer.decode(trained).startswith("red") and whole[0] not in trained


def test_images_stand_where_the_messages_put_them(processor):
    content = [
        {"type": "text", "text": "first"},
        {"type": "image"},
        {"type": "text", "text": "second"},
        {"type": "image"},
    ]
    prompt = processor.prompt([{"role": "user", "content": content}], [noise(0), noise(1)])
    text = processor.tokenizer.decode(prompt.input_ids.tolist(), skip_special_tokens=False)
    assert text == "<|user|>first" + "<image>" * 4 + "second" + "<image>" * 4 + "<|assistant|>"
    assert len(prompt.tiles) == 2


def test_mistakes_are_named(processor):
    with pytest.raises(ValueError, match="prompt is empty"):
        processor.prompt([{"role": "user", "content": "  "}])
    with pytest.raises(ValueError, match="show 2 images, but 1 were given"):
        processor.prompt(
            [{"role": "user", "content": [{"type": "image"}] * 2 + [{"type": "text", "text": "?"}]}], [noise(0)]
        )
    with pytest.raises(ValueError, match="line 1"):
        Processor(processor.tokenizer, "{% for %}", TINY)
    with pytest.raises(ValueError, match="every message exactly once"):
        Processor(processor.tokenizer, "{{ messages[0].content }}", TINY).document(to_sample(make_raw(0, ("a", "b"))))
    with pytest.raises(
        ValueError, match=r"does not end an assistant message with the end-of-turn token <end_of_utterance>"
    ):
        template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<end_of_utterance>"
        make_document(Processor(processor.tokenizer, template, TINY), 0, ("a", "b"), ("c", "d"))
    with pytest.raises(ValueError, match="must be pairs of a user and an assistant message"):
        messages = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
        processor.document(Sample([], messages, independent=True))
    with pytest.raises(ValueError, match="at least one"):
        processor.document(Sample([], [], independent=True))
    with pytest.raises(ValueError, match="no system messages here"):
        template = "{{ raise_exception('no system messages here') if messages[0].role == 'system' }}"
        Processor(processor.tokenizer, template, TINY).prompt(
            [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
        )


def test_many_turns_take_few_renderings(processor, monkeypatch):
    """Over 100 questions about one picture are common; each answer once rendered the whole conversation before it."""
    renderings = []
    render = Renderer._render_marks
    monkeypatch.setattr(Renderer, "_render_marks", lambda *args: renderings.append(args) or render(*args))
    document = make_document(processor, 1, *[(f"what is {i}?", f"it is {i}") for i in range(3000)], independent=False)
    ends = (document.labels == processor.config.eos_token_id).sum()
    assert ends == 3000 and len(renderings) <= 3
    answer = trained_texts(processor, document)[-1]
    assert answer == "it is 2999<end_of_utterance>"


def test_a_template_that_wants_parts(processor):
    """Without images strings are tried first; what then fails, however it fails, is tried with parts."""
    parts = "{% for p in m.content %}{{ p['text'] }}{% endfor %}"
    for wants in (
        parts,
        "{{ m.content[0].text }}",
        "{{ (m.content | length) / m.content[0]['text'] | length and '' }}" + parts,
    ):
        template = "{% for m in messages %}<|{{ m.role }}|>" + wants + "<end_of_utterance>{% endfor %}"
        document = make_document(Processor(processor.tokenizer, template, TINY), 0, ("what?", "a thing"), images=0)
        assert trained_texts(processor, document) == ["a thing<end_of_utterance>"]


@pytest.mark.parametrize(
    "fault",
    ["{{ 1 / 0 }}", "{{ messages[9].content }}", "{{ messages | sum }}", "{% include 'x' %}", "{{ [1][5] + 2 }}"],
)
def test_whatever_a_template_raises_is_one_sentence(processor, fault):
    with pytest.raises(ValueError, match=r"the chat template refuses a conversation of user, assistant: .+"):
        make_document(Processor(processor.tokenizer, fault, TINY), 0, ("what?", "a thing"))
