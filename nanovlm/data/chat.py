"""Sample -> Document. Render the chat template, fill in image placeholders, mark what is trained.

The template is rendered with a mark in place of each message, which gives its literal text; the messages
are then put in by us. So every character is known to come from the template or from a message: special
tokens are control tokens only where the template or an image wrote them, and are plain text wherever
a person wrote them, and the trained span of an answer needs no second tokenisation. A trained span is
the assistant's message up to the end-of-turn token after it, that token and anything the template puts between
included: it is what the model has to write.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from tokenizers import Tokenizer

from nanovlm.config import VLMConfig
from nanovlm.data.images import make_tiles, to_rgb
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.tokenizer import read_tokenizer
from nanovlm.data.types import IGNORE, Batch, Document, Sample


class Span(NamedTuple):
    """A piece of a rendered conversation: template text, message text or one image."""

    text: str
    from_template: bool = False
    is_image: bool = False
    is_trained: bool = False


class Processor:
    """Everything between text and images on one side and the model's tensors on the other."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str, config: VLMConfig):
        """Raise ValueError where the special tokens of tokenizer and config do not agree."""
        self.tokenizer, self.chat_template, self.config = tokenizer, chat_template, config
        if tokenizer.get_vocab_size() > config.decoder.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens, "
                f"more than decoder.vocab_size = {config.decoder.vocab_size}"
            )
        special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        for name in ("pad_token_id", "image_token_id", "eos_token_id"):
            if getattr(config, name) not in special.values():
                raise ValueError(f"{name} = {getattr(config, name)} is not a special token of the tokenizer")
        self.special = special
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self.special_pattern = re.compile(f"({'|'.join(longest_first)})")
        tokenizer.encode_special_tokens = True  # a special token's string in running text is plain text
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        try:
            self.template = environment.from_string(chat_template)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template has an error in line {error.lineno}: {error.message}") from error
        self._literals = functools.lru_cache(maxsize=256)(self._render_literals)
        # Drawn questions repeat, and encoding one takes longer than looking it up.
        self._encode = functools.lru_cache(maxsize=65536)(self._encode_spans)

    @classmethod
    def load(cls, folder: str | Path, config: VLMConfig) -> "Processor":
        """Read tokenizer.json and chat_template.jinja of a model folder."""
        folder = Path(folder)
        for name in ("tokenizer.json", "chat_template.jinja"):
            if not (folder / name).is_file():
                raise ValueError(f"the model folder {folder} has no {name}")
        try:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / 'chat_template.jinja'} is not a text file: {error}") from error
        return cls(read_tokenizer(folder / "tokenizer.json"), template, config)

    def save(self, folder: Path):
        """Write tokenizer.json and chat_template.jinja."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(self.chat_template)

    def document(self, sample: Sample) -> Document:
        """Turn a sample into a document; with `independent`, each question is a branch after the images."""
        if not sample.independent:
            ids, labels = self._encode(self._spans(sample.messages))
            return self._make_document(ids, labels, [0] * len(ids), sample.images)
        roles = [message["role"] for message in sample.messages]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise ValueError("independent questions must be pairs of a user and an assistant message, at least one")
        pairs = list(zip(sample.messages[::2], sample.messages[1::2], strict=True))
        branches = [self._encode(self._spans(pair)) for pair in pairs]
        # All branches begin with the same tokens up to the last image: the prefix.
        first = branches[0][0]
        image = self.config.image_token_id
        prefix = len(first) - first[::-1].index(image) if image in first else 0
        ids, labels, branch_ids = first[:prefix], [IGNORE] * prefix, [0] * prefix
        for number, (branch, branch_labels) in enumerate(branches, start=1):
            if branch[:prefix] != first[:prefix]:
                raise ValueError("independent questions must all begin with the same images")
            ids, labels = ids + branch[prefix:], labels + branch_labels[prefix:]
            branch_ids += [number] * (len(branch) - prefix)
        return self._make_document(ids, labels, branch_ids, sample.images)

    def prompt(self, messages: list[dict], images: list[Image.Image] | tuple = ()) -> Document:
        """Turn a conversation that ends with a user turn into a document that ends where the answer begins.

        Images without a place in the messages stand at the beginning of the first user turn. Raises ValueError
        for an empty question and where the image parts do not match the images.
        """
        if not messages or messages[-1]["role"] != "user" or not _text(messages[-1]["content"]).strip():
            raise ValueError("the prompt is empty: write a question or an instruction")
        if re.search("[\ud800-\udfff]", _text(messages[-1]["content"])):
            raise ValueError("the prompt is not valid UTF-8 text")
        messages = [dict(message, content=_parts(message["content"])) for message in messages]
        if images and not any(part["type"] == "image" for message in messages for part in message["content"]):
            first = next(message for message in messages if message["role"] == "user")
            first["content"] = [{"type": "image"} for _ in images] + first["content"]
        ids, _labels = self._encode(self._spans(messages, add_generation_prompt=True))
        return self._make_document(ids, [IGNORE] * len(ids), [0] * len(ids), [to_rgb(image) for image in images])

    def batch(self, prompts: list[Document]) -> Batch:
        """Stack prompts of different lengths, one a row, padded on the right."""
        length = max(len(prompt) for prompt in prompts)
        return collate([make_row([prompt], length, self.config.pad_token_id) for prompt in prompts])

    def __call__(self, messages: list[dict], images: list[Image.Image] | tuple = ()) -> Batch:
        """Turn one conversation into a batch of one row, for generation."""
        return self.batch([self.prompt(messages, images)])

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _make_document(self, ids, labels, branch_ids, images):
        size, per_tile = self.config.vision.image_size, self.config.num_image_tokens
        tiles = [make_tiles(image, size) for image in images]
        if (placeholders := ids.count(self.config.image_token_id)) != per_tile * len(tiles):
            raise ValueError(f"the messages show {placeholders // per_tile} images, but {len(images)} were given")
        return Document(
            input_ids=torch.tensor(ids),
            labels=torch.tensor(labels),
            branch_ids=torch.tensor(branch_ids, dtype=torch.int32),
            tiles=torch.cat(tiles) if tiles else torch.empty(0, 3, size, size, dtype=torch.uint8),
        )

    def _spans(self, messages, add_generation_prompt=False) -> tuple[Span, ...]:
        """Render a conversation as spans whose concatenation is the text."""
        spans = []
        for piece in self._literals(tuple(message["role"] for message in messages), add_generation_prompt):
            if isinstance(piece, str):
                spans.append(Span(piece, from_template=True))
                continue
            number, strip_left, strip_right = piece
            message = messages[number]
            parts = _parts(message["content"])
            for i, part in enumerate(parts):
                if part["type"] == "image":
                    spans.append(Span("", is_image=True))
                    continue
                text = part["text"].lstrip() if strip_left and i == 0 else part["text"]
                text = text.rstrip() if strip_right and i == len(parts) - 1 else text
                spans.append(Span(text, is_trained=message["role"] == "assistant"))
        return tuple(spans)

    def _render_literals(self, roles, add_generation_prompt):
        """Render the template with marks for messages: a tuple of literal text and (message, strips, strips).

        A mark is surrounded by white space that no template writes, which shows whether it strips what it is given.
        """
        marked = [{"role": role, "content": f"\u2003\ue000{i}\ue001\u2003"} for i, role in enumerate(roles)]
        try:
            text = self.template.render(messages=marked, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses a conversation of {', '.join(roles)}: {error}") from error
        pieces = re.split("(\u2003?)\ue000([0-9]+)\ue001(\u2003?)", text)
        literals = [pieces[0]]
        for left, number, right, literal in zip(*(pieces[i::4] for i in range(1, 5)), strict=True):
            literals += [(int(number), not left, not right), literal]
        if sorted(piece[0] for piece in literals[1::2]) != list(range(len(roles))):
            raise ValueError("the chat template does not show every message exactly once")
        return tuple(literals)

    def _encode_spans(self, spans: tuple[Span, ...]) -> tuple[list[int], list[int]]:
        """Tokenise spans; return token ids and labels, each label where it is to be predicted."""
        end = self.tokenizer.id_to_token(self.config.eos_token_id)
        no_end = f"the chat template does not end an assistant message with the end-of-turn token {end}"
        ids, is_trained = [], []
        running = []  # text since the last control token: (characters, is_trained)
        answer_is_open = False

        def flush():
            encoding = self.tokenizer.encode("".join(text for text, _ in running), add_special_tokens=False)
            trained = [flag for text, flag in running for _ in text]  # one a character
            ids.extend(encoding.ids)
            is_trained.extend(any(trained[start:end]) for start, end in encoding.offsets)
            running.clear()

        for span in spans:
            if span.is_image:
                flush()
                ids += [self.config.image_token_id] * self.config.num_image_tokens
                is_trained += [False] * self.config.num_image_tokens
            elif not span.from_template:
                running.append((span.text, span.is_trained))
                answer_is_open |= span.is_trained
            else:
                for i, piece in enumerate(self.special_pattern.split(span.text)):
                    if i % 2 == 0:
                        running.append((piece, answer_is_open))
                        continue
                    flush()
                    token = self.special[piece]
                    if answer_is_open and token != self.config.eos_token_id:
                        raise ValueError(no_end)
                    ids.append(token)
                    is_trained.append(answer_is_open)
                    answer_is_open = False
        flush()
        if answer_is_open:
            raise ValueError(no_end)
        labels = [token if trained else IGNORE for token, trained in zip(ids, is_trained, strict=True)]
        return ids, [*labels[1:], IGNORE]


def _parts(content):
    """A message's content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _text(content):
    return "".join(part["text"] for part in _parts(content) if part["type"] == "text")


def _raise_exception(message):
    raise jinja2.TemplateError(message)
