"""Chat templates in the form in which models publish them, and small tokenizers with each model's special tokens."""

from collections.abc import Callable
from typing import NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

QWEN25 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" \
and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {{- tool_call.arguments | tojson }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

QWEN2_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


TEXTS = [
    "what is in this image?",
    "a red circle. a blue square!\n\n",
    "You are a helpful assistant",
    "User: yes  no",
    "a\n\nb",
] * 9

# How Llama 3 and Qwen 2.5 split text before BPE; line ends stay together, whatever follows.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(pre_tokenizer, special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def gpt2_style(special):
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), special)


def llama3_style(special):
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    byte_level_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(pre_tokenizers.Sequence([split, byte_level_only]), special)


def gemma_style(special):
    """Spaces are written as a letter, and what is not in the vocabulary is written in bytes."""
    pieces = [token.content for token in special] + [f"<0x{i:02X}>" for i in range(256)]
    pieces += [chr(i) for i in range(33, 127)] + ["▁", "\n", "\n\n", "▁r", "re", "▁re"]
    merges = [("\n", "\n"), ("▁", "r"), ("r", "e"), ("▁r", "e")]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    return tokenizer


class Family(NamedTuple):
    """What a model publishes besides its weights, and what its template does."""

    template: str
    special_tokens: list[str]
    eos: str
    image: str = "<image>"
    bos: str | None = None
    has_system: bool = True
    strips: bool = False
    lists: bool = False  # content must be a list of parts
    lead: str = ""  # what the model itself writes before its answer
    make: Callable[[list[AddedToken]], Tokenizer] = gpt2_style


FAMILIES = {
    "SmolLM2": Family(SMOLLM2, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"], "<|im_end|>"),
    "SmolVLM": Family(
        SMOLVLM,
        ["<|endoftext|>", "<|im_start|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"],
        "<end_of_utterance>",
        lists=True,
        lead=" ",
    ),
    "Llama-3": Family(
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>", "<image>"],
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        strips=True,
        make=llama3_style,
    ),
    "Qwen2.5": Family(
        QWEN25, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"], "<|im_end|>", make=llama3_style
    ),
    "Gemma": Family(
        GEMMA,
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<image>"],
        "<end_of_turn>",
        bos="<bos>",
        has_system=False,
        strips=True,
        make=gemma_style,
    ),
    "Qwen2-VL": Family(
        QWEN2_VL,
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"],
        "<|im_end|>",
        image="<|image_pad|>",
        make=llama3_style,
    ),
}


def make_tokenizer(family: Family, extra_tokens=()) -> Tokenizer:
    """A small tokenizer of the family's kind in which a double line end is one token.

    Its post-processor is like Llama 3's: it trims offsets and puts bos (or some special token) before every text,
    neither of which may be seen.
    """
    special = [AddedToken(token, special=True, normalized=False) for token in (*family.special_tokens, *extra_tokens)]
    tokenizer = family.make(special)
    bos = family.bos or family.special_tokens[0]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]),
        ]
    )
    assert [len(tokenizer.encode("\n\n", add_special_tokens=flag).ids) for flag in (False, True)] == [1, 2]
    return tokenizer
