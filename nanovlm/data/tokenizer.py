"""Train and read tokenizers: byte-level BPE, which can encode any text, with our special tokens first."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nanovlm.data.boxes import NUM_LOCATIONS
from nanovlm.data.tilings import FAKE
from nanovlm.errors import UserError

IMAGE_TOKEN = "<image>"
# Their indices in this tuple are their ids: VLMConfig.pad_token_id, image_token_id, eos_token_id, and roles.
# The image and end tokens have Idefics3's names, which an exported model must have.
SPECIAL_TOKENS = ("<|pad|>", "<image>", "<end_of_utterance>", "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|' + message.role + '|>' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{{ '<image>' if part.type == 'image' else part.text }}
{%- endfor -%}
{%- endif -%}
{{ '<end_of_utterance>' if message.role == 'assistant' }}
{%- endfor -%}
{{ '<|assistant|>' if add_generation_prompt }}"""

# Of base models, not trained on conversations: the answer goes on with the text.
CONTINUATION_TEMPLATE = """\
{%- for message in messages -%}
{{ message.content }}{{ eos_token if message.role == 'assistant' }}
{%- endfor -%}"""

# To train base models: the answer is the line after the question. Without that line break the last token of a question
# could reach into its answer, and what was trained could not be asked for.
COMPLETION_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}
{%- endif -%}
{{ eos_token if message.role == 'assistant' else '\n' }}
{%- endfor -%}"""

# The format of SmolLM2, Qwen and others, with images among the text.
CHATML_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt }}"""

CHAT_TEMPLATES = {"roles": CHAT_TEMPLATE, "chatml": CHATML_TEMPLATE, "completion": COMPLETION_TEMPLATE}


def train_tokenizer(texts: Iterable[str], vocab_size: int, extra_tokens: Iterable[str] = ()) -> Tokenizer:
    """Train a BPE tokenizer on `texts`; numbers are split into digits.

    `extra_tokens` are special tokens after ours, such as images.marker_tokens. Raises UserError when `vocab_size`
    has no room for the special tokens and the 256 bytes.
    """
    special_tokens = (*SPECIAL_TOKENS, *extra_tokens)
    if vocab_size < len(special_tokens) + 256:
        raise UserError(f"data.tokenizer_size = {vocab_size} must be at least {len(special_tokens) + 256}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return with_blank_line(tokenizer, vocab_size) if FAKE in special_tokens else tokenizer


def with_locations(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer with PaliGemma's location tokens appended; they are text, which an answer may have."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy
    names = [f"<loc{number:04}>" for number in range(NUM_LOCATIONS)]
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    return tokenizer


def with_blank_line(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Make two line breaks one token; if the vocabulary is full, it replaces the last learned token.

    Idefics3 writes them between an image's tiles and the whole image, and llama.cpp looks them up as one token.
    """
    data = json.loads(tokenizer.to_str())
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    if "ĊĊ" in vocab:
        return tokenizer
    if len(vocab) >= vocab_size:
        last = max(vocab, key=vocab.get)
        kept = [merge for merge in merges if last not in (*merge, "".join(merge))]
        if len(kept) == len(merges):  # nothing was learned, every token is a byte or special
            return tokenizer
        vocab.pop(last)
        merges[:] = kept
    vocab["ĊĊ"] = len(vocab)
    merges.append(["Ċ", "Ċ"])
    return Tokenizer.from_str(json.dumps(data))


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises UserError that names the file when it cannot be read."""
    if not path.is_file():
        raise UserError(f"there is no {path}; tokenizers in other files are not read")
    with tokenizer_errors(f"{path} is not a readable tokenizer file"):
        return Tokenizer.from_file(str(path))


@contextlib.contextmanager
def tokenizer_errors(sentence: str) -> Iterator[None]:
    """Raise UserError for what the library raises: bare Exception, or a panic of its Rust code, which is none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{sentence}: {error}") from error


def extend_tokenizer(tokenizer: Tokenizer, markers: Iterable[str], image_token_id: int | None) -> Tokenizer:
    """Return a tokenizer with the special tokens of images appended that it lacks; without image_token_id, itself.

    The image token comes first, then the markers of layouts. Raises UserError if its id is not `image_token_id`.
    """
    if image_token_id is None:
        return tokenizer
    missing = [token for token in (IMAGE_TOKEN, *markers) if tokenizer.token_to_id(token) is None]
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in missing])
    if (found := tokenizer.token_to_id(IMAGE_TOKEN)) != image_token_id:
        raise UserError(f"image_token_id = {image_token_id}, but {IMAGE_TOKEN} is token {found} of the tokenizer")
    return tokenizer
