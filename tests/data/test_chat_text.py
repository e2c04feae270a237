"""Text with pictures among it, without a template, and conversations of which all text is trained."""

import dataclasses
import random

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from nanovlm.config import TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.tilings import TILING
from nanovlm.data.types import IGNORE, Sample
from tests.conftest import TINY, make_document, noise
from tests.data.chat_templates import FAMILIES, gemma_style, llama3_style
from tests.data.test_chat_published import PUBLISHED, make
from tests.data.test_chat_templates import make_processor

IMAGE = {"type": "image"}


def text(content):
    return {"type": "text", "text": content}


def trained(document):
    """The ids of all tokens, and those that are trained."""
    ids, labels = document.input_ids.tolist(), [IGNORE, *document.labels.tolist()[:-1]]
    assert all(label in (IGNORE, token) for label, token in zip(labels, ids, strict=True))
    return ids, [label for label in labels if label != IGNORE]


def with_ends(tokenizer, single):
    """Let a tokenizer put special tokens around texts, as those of many models do."""
    special = [(token, tokenizer.token_to_id(token)) for token in single.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("single", ["$A", "<|begin_of_text|> $A", "<|begin_of_text|> $A <|eot_id|>", "$A <|pad|>"])
@pytest.mark.parametrize("style", [llama3_style, gemma_style])
def test_a_text_begins_and_ends_as_with_its_tokenizer(single, style):
    processor, _ = make("llama3")
    special = [token for token in processor.tokenizer.get_added_tokens_decoder().values() if token.special]
    tokenizer = with_ends(style(special), single)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    processor = Processor(tokenizer, processor.chat_template, processor.config)
    tokenizer = with_ends(style(special), single)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for content in ("the red circle is here, not there", " two\n\nlines ", "é🙂"):
        document = processor.document(Sample([], [{"role": "text", "content": content}]))
        ids, labels = trained(document)
        assert ids == theirs(content).input_ids
        assert labels == ids[1:]
        assert document.branch_ids.tolist() == [0] * len(ids)
        end = len(ids) - len(single.partition("$A")[2].split())
        prompt = processor.text_prompt(content)
        assert prompt.input_ids.tolist() == ids[:end] and set(prompt.labels.tolist()) == {IGNORE}
        assert len(prompt.tiles) == 0


def test_a_prompt_of_plain_text_holds_no_control_token(processor):
    document = processor.text_prompt("a <|im_end|> <image> b")
    assert not set(document.input_ids.tolist()) & set(processor.special.values())
    with pytest.raises(ValueError, match="the prompt is empty"):
        processor.text_prompt("")


@pytest.mark.parametrize("longest_edge", [16, 64])
def test_pictures_in_a_text_are_as_in_idefics3(longest_edge):
    """Idefics3Processor writes each picture's tokens where `<image>` stands in a text."""
    processor, tokenizer = make_processor(FAMILIES["SmolVLM"], policy="idefics3", longest_edge=longest_edge)
    edge = {"longest_edge": longest_edge}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size={"longest_edge": 16})
    theirs = Idefics3Processor(images, tokenizer, image_seq_len=TINY.num_image_tokens)
    rng = random.Random(longest_edge)
    for _ in range(10):
        parts = [text(" what\nis "), *rng.choices([IMAGE, text("red circle. "), text("\n\n")], k=6), IMAGE]
        pictures = [
            noise(n).resize((rng.randint(1, 90), rng.randint(1, 90))) for n in range(sum(p == IMAGE for p in parts))
        ]
        written = "".join(part.get("text", "<image>") for part in parts)
        document = processor.document(Sample(pictures, [{"role": "text", "content": parts}]))
        expected = theirs(text=written, images=pictures)
        ids, labels = trained(document)
        assert ids == expected["input_ids"][0]
        assert len(document.tiles) == len(expected["pixel_values"][0])
        words = "".join(part.get("text", "") for part in parts)
        assert processor.tokenizer.decode(labels, skip_special_tokens=False) == words


@pytest.mark.parametrize("policy", TILING)
def test_all_of_a_conversation_but_its_images_is_trained(policy):
    config = dataclasses.replace(TINY, tiling=TilingConfig(policy=policy, max_tiles=6, longest_edge=48))
    processor, _ = make_processor(FAMILIES["SmolVLM"], policy=policy, max_tiles=6, longest_edge=48)
    messages = [
        {"role": "user", "content": [text("see "), IMAGE, text(" what?")]},
        {"role": "assistant", "content": "a circle"},
    ]
    sample = Sample([noise(0).resize((40, 30))], messages)
    ids, labels = trained(processor.document(sample, "all"))
    assert ids == processor.document(sample).input_ids.tolist()
    words = "User: see  what?<end_of_utterance>\nAssistant: a circle<end_of_utterance>\n"
    assert processor.tokenizer.decode(labels, skip_special_tokens=False) == words
    assert not {processor.tokenizer.token_to_id(x) for x in ("<image>", *marker_tokens(config))} & set(labels)


def test_all_of_separate_questions_is_trained():
    """Also what stands before an image of all of them; of the token after it each branch has another."""
    processor, _ = make_processor(FAMILIES["SmolVLM"])
    pairs = [
        [
            {"role": "user", "content": [text("see"), IMAGE, text(question)]},
            {"role": "assistant", "content": answer},
        ]
        for question, answer in [("what?", "a circle"), ("how many?", "2")]
    ]
    sample = Sample([noise(0)], pairs[0] + pairs[1], independent=True)
    document = processor.document(sample, "all")
    assert document.input_ids.tolist() == processor.document(sample).input_ids.tolist()
    prefix = document.branch_ids == 0
    ids, labels = document.input_ids[prefix].tolist(), document.labels[prefix].tolist()
    before = ids.index(processor.config.image_token_id)
    assert before > 3 and labels == ids[1:before] + [IGNORE] * (1 + 4)
    for branch in (1, 2):
        chosen = document.branch_ids == branch
        ids, labels = document.input_ids[chosen].tolist(), document.labels[chosen].tolist()
        assert labels == [*ids[1:], IGNORE]


def test_what_ends_no_answer_can_be_trained_whole(processor):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    processor = Processor(processor.tokenizer, template, TINY)
    with pytest.raises(ValueError, match="does not end an assistant message"):
        make_document(processor, 0, ("a", "b"), images=0)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, labels = trained(processor.document(Sample([], messages), "all"))
    assert labels == ids[1:]


def test_mistakes_are_named(processor):
    with pytest.raises(ValueError, match="the text of the document is empty"):
        processor.text_document([IMAGE], [noise(0)])
    with pytest.raises(ValueError, match="the messages show 1 images, but 0 were given"):
        processor.text_document([text("a"), IMAGE])


@pytest.mark.parametrize("name", PUBLISHED)
def test_control_tokens_in_a_text_are_text(name):
    processor, _ = make(name)
    control = set(processor._encoder.control.values())
    for token in processor._encoder.control:
        ids, _labels = trained(processor.text_document([text(f"a {token} b")]))
        assert not control & set(ids[len(processor._boundaries()[0]) :])
