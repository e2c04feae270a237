"""Templates that look into messages, generation blocks, and tokens added to a tokenizer beside the special ones."""

import dataclasses
import datetime

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanovlm.data.chat import Processor
from nanovlm.data.template import render
from nanovlm.data.tokenizer import CHAT_TEMPLATE
from nanovlm.data.types import IGNORE, Sample
from tests.conftest import TINY, make_document
from tests.data.chat_templates import byte_level, gemma_style
from tests.data.test_chat import trained_texts
from tests.data.test_chat_published import FOLDER, PUBLISHED, make, template_of

THOUGHT = "<think>\nit is round\n</think>\n\na circle"
QUESTION = {"role": "user", "content": "what?"}


def talk(*answers):
    return [m for a in answers for m in (QUESTION, {"role": "assistant", "content": a})]


def same_as_transformers(name, messages):
    processor, theirs = make(name)
    document = processor.document(Sample([], messages))
    expected = theirs.apply_chat_template(messages, chat_template=template_of(name), return_dict=False)
    assert document.input_ids.tolist() == expected
    return processor, document


@pytest.mark.parametrize(
    ("answer", "trained"),
    [
        (THOUGHT, THOUGHT),
        ("<think>it is round</think>a circle", THOUGHT),
        ("<think>\n\n</think>\n\na circle", "<think>\n\n</think>\n\na circle"),
        ("it is round</think>a circle", THOUGHT),
        ("a circle", "<think>\n\n</think>\n\na circle"),
        ("\n\na circle\n", "<think>\n\n</think>\n\na circle\n"),
        ("<think>a</think>b</think>c", "<think>\na\n</think>\n\nc"),
    ],
)
def test_thinking_is_taken_apart_as_by_transformers(answer, trained):
    processor, document = same_as_transformers("qwen3", talk(answer))
    assert trained_texts(processor, document) == [f"{trained}<|im_end|>"]
    tags = [processor.tokenizer.token_to_id(tag) for tag in ("<think>", "</think>")]
    assert [x for x in document.labels.tolist() if x in tags] == tags


@pytest.mark.parametrize("name", ["qwen3", "deepseekv3"])
def test_thoughts_of_earlier_turns_are_gone(name):
    processor, document = same_as_transformers(name, talk(THOUGHT, THOUGHT))
    eos = PUBLISHED[name].eos
    last = THOUGHT if name == "qwen3" else "a circle"  # DeepSeek's template drops all thoughts
    assert trained_texts(processor, document) == [f"a circle{eos}", f"{last}{eos}"]


def test_an_answer_thinks_where_the_template_says_so_only():
    """Templates that write answers as they are: the tag is a token if they know of thinking, or else text."""
    for template, count in [
        ("{{ '' if '</think>' }}", 2),
        ("", 0),
    ]:
        processor, _ = make("qwen3", template + template_of("qwen2_5"))
        document = processor.document(Sample([], talk(THOUGHT)))
        assert trained_texts(processor, document) == [f"{THOUGHT}<|im_end|>"]
        tags = [processor.tokenizer.token_to_id(tag) for tag in ("<think>", "</think>")]
        assert sum(label in tags for label in document.labels.tolist()) == count


@pytest.mark.parametrize(
    ("answer", "trained"),
    [("", ""), ("\n", ""), ("<think>a</think>", "<think>\na\n</think>\n\n"), ("<think>\n</think>\n\n ", " ")],
)
def test_an_answer_of_little_is_trained_too(answer, trained):
    """In the last turn, where the template adds an empty thought, and in one before it."""
    processor, document = same_as_transformers("qwen3", talk("\n\nx", answer))
    lead = "" if "a" in trained else "<think>\n\n</think>\n\n"
    expected = f"{lead}{trained}<|im_end|>"
    assert [x.strip("\n") for x in trained_texts(processor, document)][1:] == [expected]
    _, document = same_as_transformers("qwen3", talk(answer, "x"))
    assert len(trained_texts(processor, document)) == 2


def test_a_person_cannot_think():
    """Also where the white space of an answer makes the template be followed piece by piece."""
    processor, _ = make("qwen3")
    messages = [{"role": "user", "content": " a <think> b </think> "}, {"role": "assistant", "content": "\n\n x"}]
    ids = processor.document(Sample([], messages)).input_ids.tolist()
    tags = [processor.tokenizer.token_to_id(tag) for tag in ("<think>", "</think>")]
    assert [i for i in ids if i in tags] == tags
    shown = processor.tokenizer.decode(ids, skip_special_tokens=False)
    assert "user\n a <think> b </think> <|im_end|>" in shown


def test_thinking_tags_can_be_special_tokens():
    """As in some tokenizers; then too they are written within an answer, and do not end it."""
    processor, _ = make("qwen3")
    tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in ("<think>", "</think>")])
    special = Processor(tokenizer, processor.chat_template, processor.config)
    assert "<think>" in special.special and "<think>" not in processor.special
    for answer in (THOUGHT, "a circle", "<think>a"):
        documents = [p.document(Sample([], talk(answer))) for p in (special, processor)]
        assert documents[0].input_ids.tolist() == documents[1].input_ids.tolist()
        assert documents[0].labels.tolist() == documents[1].labels.tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_person_writes_becomes_no_control_token(name):
    """Not marked as special is not enough: <think>, <tool_call> and DeepSeek's <User> are added tokens like any."""
    processor, _ = make(name)
    tokens = [str(getattr(token, "content", token)) for token in PUBLISHED[name].special] + list(PUBLISHED[name].added)
    control = {processor.tokenizer.token_to_id(token) for token in tokens}
    assert None not in control and len(control) == len(tokens)

    def count(question):
        prompt = processor.prompt([{"role": "user", "content": question}])
        return sum(i in control for i in prompt.input_ids.tolist())

    for token in tokens:
        assert count(f"a {token} b") == count("a b")
        assert count(token) == count("a b")
        ids = processor.prompt([{"role": "user", "content": f"a {token} b"}]).input_ids.tolist()
        assert f"a {token} b" in processor.tokenizer.decode(ids, skip_special_tokens=False)


def test_a_person_cannot_play_a_tool():
    """Qwen3 finds the last question by what the messages begin and end with."""
    processor, _ = make("qwen3")
    messages = [
        *talk("<think>it is round</think>a circle"),
        {"role": "user", "content": "<tool_response>x</tool_response>"},
    ]
    messages.append({"role": "assistant", "content": "no"})
    with pytest.raises(ValueError, match=r"the chat template looks into the messages and writes something else"):
        processor.document(Sample([], messages))


@pytest.mark.parametrize(
    "look",
    [
        "{{ m.content | replace('e', 'E') }}",
        "{{ m.content | upper }}",
        "{{ m.content[:3] + m.content[3:] if 'the' not in m.content else '' }}",
        "{{ m.content ~ ('!' if m.content | length == 9) }}",
        "{{ m.content.split('thing')[0] ~ (m.content.split('thing')[1:] | join('-')) }}",
    ],
)
def test_what_cannot_be_followed_is_refused(processor, look):
    template = "{% for m in messages %}<|{{ m.role }}|>" + look + "<end_of_utterance>{% endfor %}"
    with pytest.raises(ValueError, match=r"looks into the messages and writes something else .* would stand$|once$"):
        make_document(Processor(processor.tokenizer, template, TINY), 0, ("what?", "the thing"), images=0)


def test_the_first_difference_is_shown(processor):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ 'none' if m.content == 'x' else m.content }}"
    template += "<end_of_utterance>{% endfor %}"
    processor = Processor(processor.tokenizer, template, TINY)
    assert make_document(processor, 0, ("what?", "y"), images=0)
    with pytest.raises(ValueError) as error:
        make_document(processor, 0, ("what?", "x"), images=0)
    assert "'hat?<end_of_utterance><|assistant|>none<end_of_utterance>' where" not in str(error.value)
    assert "|assistant|>none<end" in str(error.value) and "|assistant|>x<end" in str(error.value)


def test_an_answer_that_a_template_drops_is_refused(processor):
    """It would be in the record, and train nothing."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content if '</think>' not in m.content }}"
    template += "<end_of_utterance>{% endfor %}"
    processor = Processor(processor.tokenizer, template, TINY)
    assert processor.document(Sample([], talk("a", "b")))
    for answers in (["a</think>b", "c"], ["c", "<think>a</think>b"]):
        with pytest.raises(ValueError, match="the chat template does not show every message exactly once"):
            processor.document(Sample([], talk(*answers)))


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}<end_of_utterance>\n", "leave out '<end_of_utterance>'"),
        ("{{ m.content }}{% generation %}<end_of_utterance>{% endgeneration %}\n", "leave out 'a thing'"),
        ("{{ m.content }}<end_of_utterance>\n{% generation %}{% endgeneration %}", "leave out 'a thing'"),
        ("{% generation %}{{ m.content }}<end_of_utterance>\n{% endgeneration %}", ""),
        ("{%- generation -%}{{ m.content }}<end_of_utterance>{%- endgeneration -%}", ""),
    ],
)
def test_generation_blocks_have_to_agree_with_what_is_trained(processor, block, says):
    template = "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'user' %}{{ m.content }}{% else %}" + block
    template += "{% endif %}{% endfor %}"
    processor = Processor(processor.tokenizer, template, TINY)
    if says:
        with pytest.raises(ValueError, match=f"generation blocks {says}, which the model has to write"):
            make_document(processor, 0, ("what?", "a thing"), images=0)
    else:
        document = make_document(processor, 0, ("what?", "a thing"), images=0)
        assert trained_texts(processor, document) == ["a thing<end_of_utterance>"]
    assert processor.prompt([QUESTION])
    assert "\ue002" not in processor.template.render(messages=talk("x"))


def test_a_generation_block_around_a_question_is_refused(processor):
    template = "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content }}<end_of_utterance>"
    template += "{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match=r"generation blocks hold 'what\?', which is of no answer"):
        make_document(Processor(processor.tokenizer, template, TINY), 0, ("what?", "a thing"), images=0)


def test_what_transformers_offers_templates(processor):
    source = (
        "{{ strftime_now('%d %b %Y') }} {{ {'b': 'é<', 'a': [1]} | tojson }} "
        "{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }} {{ [1, 2] | tojson(separators=(',', ':')) }}"
        "{{ 'é' | tojson(ensure_ascii=true) }}{{ dict(a=1) }}{{ dict.fromkeys('ab', 1) }}"
        "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% if i == 5 %}{% break %}{% endif %}"
        "{% if i % 2 %}{% continue %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}"
        "{{ tools is none }}{{ documents is defined }}{{ add_generation_prompt }}{{ messages[0]['content'][::-1] }}"
        "{{ joiner is defined }}{{ cycler('x').next() }}{{ messages | map(attribute='role') | join('/') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ '%s-%d' | format('a', 3) }}"
        "{{ 'a b' | title | center(9) }}{{ (messages | first).content | wordcount }}{{ [3, 1, 2] | sort | string }}"
        "{{ 'x'.join(['a', 'b']) }}{{ 'a,b'.split(',')[-1] }}{{ '{:>4}'.format('a') }}{{ missing }}{{ 7.5 | round(1) }}"
        "{% macro m(x, y=2) %}[{{ x }}{{ y }}{{ caller() if caller }}]{% endmacro %}{{ m(1) }}"
        "{% call m(3) %}q{% endcall %}"
        "{% filter upper %}low{% endfilter %}{% set block %}in{{ 1 }}{% endset %}{{ block }}"
        "{% for r in [[1, [2]]] recursive %}{{ loop.depth }}{% if r is iterable %}{{ loop(r) }}{% endif %}{% endfor %}"
    )
    processor = Processor(processor.tokenizer, source, TINY)
    theirs = PreTrainedTokenizerFast(tokenizer_object=processor.tokenizer)
    expected = theirs.apply_chat_template([QUESTION], chat_template=source, tokenize=False)
    assert render(processor.template, messages=[QUESTION], add_generation_prompt=False) == expected
    assert datetime.datetime.now().strftime("%Y") in expected


def test_a_date_in_a_template_is_that_of_the_conversation(processor, monkeypatch):
    """Template and check are rendered at one time, and the next conversation at its own."""
    day, calls = [1], iter(range(1000))

    class Clock(datetime.datetime):
        @classmethod
        def now(cls):
            return datetime.datetime(2030, 1, day[0], microsecond=next(calls))

    monkeypatch.setattr("datetime.datetime", Clock)
    processors = [
        Processor(processor.tokenizer, "{{ strftime_now('" + form + "') }}" + CHAT_TEMPLATE, TINY)
        for form in ("%d", "%d%f")
    ]
    for day[0] in (1, 2):
        for processor in processors:
            for _ in range(2):
                ids = processor.prompt([QUESTION]).input_ids.tolist()
                assert processor.tokenizer.decode(ids).startswith(f"0{day[0]}")


def test_added_white_space_and_words_stay_tokens():
    """Tokens like Gemma's lines and GPT-NeoX's spaces are no control tokens, and decide how text is split."""
    family = PUBLISHED["gemma"]
    special = [AddedToken(token, special=True, normalized=False) for token in family.special]
    tokenizer = gemma_style(special)
    added = ["\n\n\n", "▁▁▁▁", "<table>", "re"]  # the last is a token of the vocabulary
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=token[0] == "▁") for token in added])
    config = dataclasses.replace(
        TINY,
        vision=None,
        image_token_id=None,
        pad_token_id=0,
        eos_token_id=tokenizer.token_to_id("<end_of_turn>"),
        bos_token_id=tokenizer.token_to_id("<bos>"),
    )
    processor = Processor(tokenizer, template_of("gemma"), config.validate())
    assert set(processor._encoder.control) == {*family.special, "<table>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<end_of_turn>")
    for text in ("a\n\n\nb", "a    b", "re    x re\n\n\n\nre", "a\n\n\n    b"):
        messages = talk(text)
        expected = theirs.apply_chat_template(messages, chat_template=template_of("gemma"), return_dict=False)
        assert processor.document(Sample([], messages)).input_ids.tolist() == expected
        assert {tokenizer.token_to_id(x) for x in added[:2]} & set(expected)


def test_a_tokenizer_that_makes_control_tokens_of_text_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "a": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in ("<pad>", "<end>", "<unk>")])
    config = dataclasses.replace(TINY, vision=None, image_token_id=None, pad_token_id=0, eos_token_id=1)
    template = "{% for m in messages %}{{ m.content + ' ' }}{{ '<end>' if m.role == 'assistant' }}{% endfor %}"
    processor = Processor(tokenizer, template, config.validate())
    assert processor.document(Sample([], talk("a b"))).input_ids.tolist() == [3, 2, 3, 1]
    with pytest.raises(ValueError, match="the tokenizer makes the control token <end> out of plain text"):
        processor.document(Sample([], talk("a <end> a")))


def test_labels_are_the_answers_alone_with_any_published_template():
    """No token of a question is ever trained, whatever it holds."""
    for name in PUBLISHED:
        processor, _ = make(name)
        content = "".join(PUBLISHED[name].added) + "{% generation %}"
        document = processor.document(Sample([], [{"role": "user", "content": content}, talk("a circle")[1]]))
        trained = [label for label in document.labels.tolist() if label != IGNORE]
        assert processor.tokenizer.decode(trained).strip().endswith("a circle")
    assert (FOLDER / "README.md").is_file()


@pytest.mark.parametrize("style", ["first", "always", "never", "prepend", "byte level"])
@pytest.mark.parametrize("strips", [(False, False), (True, False), (False, True), (True, True)])
def test_spaces_beside_control_tokens_are_as_in_transformers(style, strips):
    """Tokenizers write a space before the first text, or before each one; some control tokens take in white space."""
    left, right = strips
    special = [AddedToken(x, special=True, normalized=False) for x in ("<pad>", "<s>")]
    special += [
        AddedToken(x, special=True, normalized=False, lstrip=left, rstrip=right) for x in ("<user>", "<bot>", "<end>")
    ]
    tokenizer = gemma_style(special)
    if style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif style == "byte level":
        tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True), special)
    else:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
    config = dataclasses.replace(TINY, vision=None, image_token_id=None, pad_token_id=0)
    config = dataclasses.replace(config, eos_token_id=tokenizer.token_to_id("<end>"))
    for start in ("", "<s>", "Talk: "):
        template = start + (
            "{% for m in messages %}{{ ' <user>\n ' if m.role == 'user' else ' <bot> ' }}{{ m.content }}"
            "{{ ' <end>' if m.role == 'assistant' }}{% endfor %}"
        )
        processor = Processor(tokenizer, template, config.validate())
        theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
        for question, answer in [("re a", "yes re"), (" \n re", "\n x  "), ("", "a"), ("a ", " ")]:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            expected = theirs.apply_chat_template(messages, chat_template=template, return_dict=False)
            document = processor.document(Sample([], messages))
            assert document.input_ids.tolist() == expected
            trained = processor.tokenizer.decode([x for x in document.labels.tolist() if x != IGNORE])
            assert trained.strip() == answer.strip()
