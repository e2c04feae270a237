"""Sample -> Document. Render the chat template, fill in image placeholders, mark what is trained.

The template is rendered with a mark in place of each message part; we then replace the marks by the parts. So we
know of every character whether the template or a message wrote it: a special token is a control token only where
the template or an image wrote it, and plain text where a person wrote it; and the trained span of an answer needs
no second tokenisation. A trained span is what the model has to write: everything from the end of the generation
prompt through the end-of-turn token after the message. The text between two control tokens is tokenised in one
piece, so that the tokens are those of the model's own tokenizer.

An image becomes the text of its layout (images.py), in which one image token stands for all those of a tile.
"""

import functools
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.filters
import jinja2.meta
import torch
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from tokenizers import Tokenizer

from nanovlm.config import VLMConfig
from nanovlm.data.images import FAKE, layout, make_tiles, marker_tokens, plan_tiles, to_rgb
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.tokenizer import read_tokenizer, tokenizer_errors
from nanovlm.data.types import IGNORE, Batch, Document, Sample
from nanovlm.errors import UserError, printable
from nanovlm.files import write_file
from nanovlm.limits import time_limit

RENDER_SECONDS, LONGEST_TEXT = 20, 10**7  # what a template may take
# Stands for one part of a message while the template is rendered.
MARK = "(\u2003?)\ue000([0-9]+)\ue001(\u2003?)"


class Span(NamedTuple):
    """A piece of a rendered conversation: template text, message text or the layout of one image."""

    text: str
    from_template: bool = False
    is_image: bool = False
    is_trained: bool = False


class TemplateCode(CodeGenerator):
    """Compiles `a ~ b` to a call of `TemplateEnvironment.join`, which jinja2 leaves to no environment."""

    def visit_Concat(self, node, frame):
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


def _check_size(value):
    if isinstance(value, str | list | tuple) and len(value) > LONGEST_TEXT:
        raise jinja2.TemplateError(f"something of length {len(value)} is not allowed")
    if isinstance(value, int) and value.bit_length() > 4096:
        raise jinja2.TemplateError("a number of more than 4096 bits is not allowed")
    return value


def _indent(text, width=4, *arguments, **options):
    """The filter of that name, which published templates use, up to a width that they need."""
    if (width if isinstance(width, int) else len(width)) > 1000:
        raise jinja2.TemplateError(f"indent with {printable(str(width), 40)} is not allowed")
    return _check_size(jinja2.filters.do_indent(text, width, *arguments, **options))


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Renders a template that others wrote, without access to Python, and without what would only fill memory."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = TemplateCode

    def __init__(self, **options):
        super().__init__(**options)
        del self.globals["lipsum"], self.filters["center"], self.filters["format"]
        self.filters["indent"] = _indent

    def call_binop(self, context, operator, left, right):
        """Refuse results that no chat template needs: huge numbers, and texts that are repeated or padded to fill."""
        repeats = operator == "*" and any(isinstance(x, str | list | tuple) for x in (left, right))
        largest = max((abs(x) for x in (left, right) if isinstance(x, int)), default=0)
        if (repeats or operator == "**") and largest > 1000:
            raise jinja2.TemplateError(f"{operator} with {largest} is not allowed")
        if operator == "%" and isinstance(left, str) and re.search(r"%[-#0 +]*(\*|\d{4})", left):
            raise jinja2.TemplateError(f"the format {printable(left, 40)} is not allowed")
        return _check_size(super().call_binop(context, operator, left, right))

    def call(self, context, function, *arguments, **options):
        """Refuse arguments by which methods of texts pad them, and results that are too long."""
        if any(isinstance(x, int) and abs(x) > 10**6 for x in (*arguments, *options.values())):
            raise jinja2.TemplateError("a call with a number above a million is not allowed")
        return _check_size(super().call(context, function, *arguments, **options))

    def join(self, parts: tuple) -> str:
        """What `~` means."""
        return _check_size("".join(map(str, parts)))


class Processor:
    """Everything between text and images on one side and the model's tensors on the other."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str, config: VLMConfig):
        """Raise UserError where the special tokens of tokenizer and config do not agree."""
        self.tokenizer, self.chat_template, self.config = tokenizer, chat_template, config
        if (needed := max(tokenizer.get_vocab().values(), default=-1) + 1) > config.decoder.vocab_size:
            raise UserError(
                f"the tokenizer has tokens up to id {needed - 1}, and so needs {needed} embeddings, more than "
                f"decoder.vocab_size = {config.decoder.vocab_size}"
            )
        added, markers = tokenizer.get_added_tokens_decoder(), marker_tokens(config)
        special = {token.content: i for i, token in added.items() if token.special or token.content in markers}
        for name in ("pad_token_id", "image_token_id", "eos_token_id"):
            if getattr(config, name) not in (None, *special.values()):
                raise UserError(f"{name} = {getattr(config, name)} is not a special token of the tokenizer")
        # Some published models with Idefics3's layout, whose markers include FAKE, write tile positions as plain text.
        if missing := [token for token in ([FAKE] if FAKE in markers else markers) if token not in special]:
            raise UserError(
                f"tiling.policy = {config.tiling.policy!r} writes special tokens that the tokenizer does not have: "
                f"{', '.join(missing)}"
            )
        self.special = special
        longest_first = sorted(map(re.escape, special), key=len, reverse=True)
        self.special_pattern = re.compile(f"({'|'.join(longest_first)})")
        # Encodes a special token's string as plain text. No post-processor: it would add tokens and shift offsets.
        plain = json.loads(tokenizer.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
        with tokenizer_errors("the tokenizer does not fit together"):
            self._text_tokenizer = Tokenizer.from_str(json.dumps(plain))
        self._text_tokenizer.encode_special_tokens = True
        self._image_token, self._end_token, self._bos_token = (
            None if i is None else tokenizer.id_to_token(i)
            for i in (config.image_token_id, config.eos_token_id, config.bos_token_id)
        )
        environment = TemplateEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = _raise_exception
        try:
            self.template = environment.from_string(chat_template)
            variables = jinja2.meta.find_undeclared_variables(environment.parse(chat_template))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template has an error in line {error.lineno}: {error.message}") from error
        except Exception as error:  # of Python, which compiles it, such as a {% break %} outside a loop
            raise UserError(f"the chat template cannot be compiled: {error}") from error
        if "bos_token" in variables and config.bos_token_id is None:
            raise UserError("the chat template writes bos_token, but bos_token_id = None")
        self._literals = functools.lru_cache(maxsize=256)(self._render_literals)
        # Short questions and answers repeat, and encoding one takes longer than looking it up.
        self._encode_short = functools.lru_cache(maxsize=16384)(self._encode_spans)

    @classmethod
    def load(cls, folder: str | Path, config: VLMConfig) -> "Processor":
        """Read tokenizer.json and chat_template.jinja of a model folder."""
        folder = Path(folder)
        for name in ("tokenizer.json", "chat_template.jinja"):
            if not (folder / name).is_file():
                raise UserError(f"the model folder {folder} has no {name}")
        try:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{folder / 'chat_template.jinja'} is not a text file: {error}") from error
        return cls(read_tokenizer(folder / "tokenizer.json"), template, config)

    def save(self, folder: Path):
        """Write tokenizer.json and chat_template.jinja."""
        write_file(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        write_file(folder / "chat_template.jinja", self.chat_template)

    def document(self, sample: Sample) -> Document:
        """Turn a sample into a document; with `independent`, each question is a branch after the images."""
        if not sample.independent:
            ids, labels = self._tokens(self._spans(sample.messages, sample.images))
            return self._make_document(ids, labels, [0] * len(ids), sample.images)
        roles = [message["role"] for message in sample.messages]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise UserError("independent questions must be pairs of a user and an assistant message, at least one")
        pairs = list(zip(sample.messages[::2], sample.messages[1::2], strict=True))
        branches = [self._tokens(self._spans(pair, sample.images)) for pair in pairs]
        # All branches begin with the same tokens up to the last image: the prefix.
        first = branches[0][0]
        image = self.config.image_token_id
        prefix = len(first) - first[::-1].index(image) if image in first else 0
        ids, labels, branch_ids = first[:prefix], [IGNORE] * prefix, [0] * prefix
        for number, (branch, branch_labels) in enumerate(branches, start=1):
            if branch[:prefix] != first[:prefix]:
                raise UserError("independent questions must all begin with the same images")
            ids, labels = ids + branch[prefix:], labels + branch_labels[prefix:]
            branch_ids += [number] * (len(branch) - prefix)
        return self._make_document(ids, labels, branch_ids, sample.images)

    def prompt(self, messages: list[dict], images: list[Image.Image] | tuple = ()) -> Document:
        """Turn a conversation that ends with a user turn into a document that ends where the answer begins.

        Images that no message places go to the beginning of the first user turn. Raises UserError
        for an empty question and where the image parts do not match the images.
        """
        if not messages or messages[-1]["role"] != "user" or not _text(messages[-1]["content"]).strip():
            raise UserError("the prompt is empty: write a question or an instruction")
        if re.search("[\ud800-\udfff]", _text(messages[-1]["content"])):
            raise UserError("the prompt is not valid UTF-8 text")
        messages = [dict(message, content=_parts(message["content"])) for message in messages]
        if images and not any(part["type"] == "image" for message in messages for part in message["content"]):
            first = next(message for message in messages if message["role"] == "user")
            first["content"] = [{"type": "image"} for _ in images] + first["content"]
        images = [to_rgb(image) for image in images]
        ids, _labels = self._tokens(self._spans(messages, images, add_generation_prompt=True))
        return self._make_document(ids, [IGNORE] * len(ids), [0] * len(ids), images)

    def num_image_tokens(self, width: int, height: int) -> int:
        """Count the tokens of a single image of this size, markers included; its pixels are not needed."""
        return len(self._tokens((self._show(width, height),))[0])

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
        size, per_tile = self.config.tile_size, self.config.num_image_tokens
        tiles = [make_tiles(image, self.config) for image in images]
        tiles = torch.cat(tiles) if tiles else torch.empty(0, 3, size, size, dtype=torch.uint8)
        if (placeholders := ids.count(self.config.image_token_id)) != per_tile * len(tiles):
            raise UserError(f"{placeholders} image placeholders, but {len(tiles)} tiles of {per_tile} tokens")
        return Document(
            input_ids=torch.tensor(ids),
            labels=torch.tensor(labels),
            branch_ids=torch.tensor(branch_ids, dtype=torch.int32),
            tiles=tiles,
        )

    def _show(self, width, height, number=None) -> Span:
        """Make the span of an image; `number` is its index if it is one of several."""
        plan = plan_tiles(width, height, self.config)
        assert self._image_token is not None  # as there is an encoder
        return Span(layout(plan, self._image_token, self.config, number), from_template=True, is_image=True)

    def _spans(self, messages, images, add_generation_prompt=False) -> tuple[Span, ...]:
        """Render a conversation as spans whose concatenation is the text."""
        parts = [(message["role"], part) for message in messages for part in _parts(message["content"])]
        if (shown := sum(part["type"] == "image" for _, part in parts)) != len(images):
            raise UserError(f"the messages show {shown} images, but {len(images)} were given")
        unseen = iter([self._show(*image.size, number=i if shown > 1 else None) for i, image in enumerate(images)])
        content = [
            next(unseen) if part["type"] == "image" else Span(part["text"], is_trained=role == "assistant")
            for role, part in parts
        ]
        spans = []
        shape = tuple((m["role"], tuple(part["type"] for part in _parts(m["content"]))) for m in messages)
        for piece in self._literals(shape, add_generation_prompt):
            if isinstance(piece, Span):
                spans.append(piece)
                continue
            number, strip_left, strip_right = piece
            span = content[number]
            if not span.is_image:
                text = span.text.lstrip() if strip_left else span.text
                span = span._replace(text=text.rstrip() if strip_right else text)
            spans.append(span)
        return tuple(spans)

    def _render_literals(self, shape, add_generation_prompt):
        """Render the template: a tuple of literal Spans and, between them, (part number, strips left, strips right).

        `shape` holds each message's role and part types. A mark is surrounded by white space that no template writes,
        which shows whether the template strips its input. Text that precedes an answer but is not in the generation
        prompt, like the space of "Assistant: ", has to be written by the model: it is trained. Answers that follow the
        same text have the same generation prompt, so that it is rendered once for all of them.
        """
        pieces = re.split(MARK, self._render_marks(shape, add_generation_prompt))
        owners = [message for message, (_, types) in enumerate(shape) for _ in types]
        literals: list = [Span(pieces[0], from_template=True)]
        prompts = {}
        for left, number, right, literal in zip(*(pieces[i::4] for i in range(1, 5)), strict=True):
            message = owners[int(number)]
            is_first = int(number) == 0 or owners[int(number) - 1] != message
            if message and is_first and shape[message][0] == "assistant":
                written = literals.pop().text
                case = written, shape[message - 1]
                if case not in prompts:
                    prompts[case] = re.split(MARK, self._render_marks(shape[:message], True))[-1]
                prompt = prompts[case]
                if not written.startswith(prompt) or self.special_pattern.search(written.removeprefix(prompt)):
                    prompt = written
                literals.append(Span(prompt, from_template=True))
                literals.append(Span(written.removeprefix(prompt), from_template=True, is_trained=True))
            literals += [(int(number), not left, not right), Span(literal, from_template=True)]
        return tuple(literals)

    def _render_marks(self, shape, add_generation_prompt) -> str:
        """Render the template with a mark for each part, in the form of content that shows every part once.

        Content is a string or a list of parts. With images the list is tried first, as a template may write
        something beside an image. In that form the template writes the image token, which becomes the image's mark.
        """
        number, image = itertools.count(), self._image_token
        parts = [[(f"\u2003\ue000{next(number)}\ue001\u2003", kind) for kind in kinds] for _, kinds in shape]
        image_marks = [mark for marks in parts for mark, kind in marks if kind == "image"]
        strings = ["".join(mark for mark, _ in marks) for marks in parts]
        lists = [
            [{"type": kind, "text": mark} if kind == "text" else {"type": kind} for mark, kind in marks]
            for marks in parts
        ]
        refusal = None
        for contents in (lists, strings) if image_marks else (strings, lists):
            messages = [{"role": role, "content": content} for (role, _), content in zip(shape, contents, strict=True)]
            try:
                with time_limit(RENDER_SECONDS, "rendering"):
                    pieces, length = [], 0
                    for piece in self.template.generate(
                        messages=messages,
                        add_generation_prompt=add_generation_prompt,
                        bos_token=self._bos_token,
                        eos_token=self._end_token,
                    ):
                        pieces.append(piece)
                        length += len(piece)
                        if length > LONGEST_TEXT:
                            raise jinja2.TemplateError(f"a text of more than {LONGEST_TEXT} characters is not allowed")
                    text = "".join(pieces)
            except Exception as error:  # a template can raise any
                refusal = error if contents is strings else refusal or error
                continue
            if contents is lists and image is not None and text.count(image) == len(image_marks):
                unseen = iter(image_marks)
                text = re.sub(re.escape(image), lambda _, unseen=unseen: next(unseen), text)
            if sorted(int(shown) for _, shown, _ in re.findall(MARK, text)) == list(range(sum(map(len, parts)))):
                return text
        if refusal is None:
            raise UserError("the chat template does not show every message exactly once")
        roles = ", ".join(role for role, _ in shape)
        raise UserError(f"the chat template refuses a conversation of {roles}: {refusal}") from refusal

    def _tokens(self, spans: tuple[Span, ...]) -> tuple[list[int], list[int]]:
        """Tokenise spans; return token ids and labels, each label at the position that predicts it."""
        image, repeats = self.config.image_token_id, self.config.num_image_tokens
        ids, labels = [], []
        is_short = sum(len(span.text) for span in spans) < 200
        encoded = self._encode_short(spans) if is_short else self._encode_spans(spans)
        for token, is_trained in zip(*encoded, strict=True):
            ids += [token] * (repeats if token == image else 1)
            labels += [token] if is_trained else [IGNORE] * (repeats if token == image else 1)
        return ids, [*labels[1:], IGNORE]

    def _encode_spans(self, spans: tuple[Span, ...]) -> tuple[list[int], list[bool]]:
        """Tokenise spans, each tile as one image token; return token ids and whether they are trained."""
        no_end = f"the chat template does not end an assistant message with the end-of-turn token {self._end_token}"
        ids, is_trained = [], []
        running = []  # text since the last control token: (characters, is_trained)
        answer_is_open = False

        def flush():
            text = "".join(text for text, _ in running)
            if text:
                with tokenizer_errors("the tokenizer cannot encode a text"):
                    encoding = self._text_tokenizer.encode(text, add_special_tokens=False)
                trained = [flag for text, flag in running for _ in text]  # one per character
                ids.extend(encoding.ids)
                is_trained.extend(any(trained[start:end]) for start, end in encoding.offsets)
            running.clear()

        for span in spans:
            answer_is_open |= span.is_trained
            if not span.from_template:
                running.append((span.text, span.is_trained))
                continue
            is_answer = answer_is_open and not span.is_image
            for i, piece in enumerate(self.special_pattern.split(span.text)):
                if i % 2 == 0:
                    running.append((piece, is_answer))
                    continue
                flush()
                if is_answer and self.special[piece] != self.config.eos_token_id:
                    raise UserError(no_end)
                ids.append(self.special[piece])
                is_trained.append(is_answer)
                if is_answer:
                    is_answer = answer_is_open = False
        flush()
        if answer_is_open:
            raise UserError(no_end)
        return ids, is_trained


def _parts(content):
    """Return a message's content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _text(content):
    return "".join(part["text"] for part in _parts(content) if part["type"] == "text")


def _raise_exception(message):
    raise jinja2.TemplateError(message)
