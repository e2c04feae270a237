"""Sample -> Document. Render the chat template, fill in image placeholders, mark what is trained.

The template is rendered by rendering.py, in the limits of template.py, to spans of text of which it is known who wrote
them; spans.py makes tokens of them: a special token is a control token only where the template or an image wrote it,
and plain text where a person wrote it. An image becomes the text of its layout (images.py), in which one image token
stands for all those of a tile.
"""

import copy
import dataclasses
import functools
import math
import re
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer

from nanovlm.config import VLMConfig
from nanovlm.data.features import Seen
from nanovlm.data.images import find_grids, layout, make_tiles, marker_tokens, plan_tiles, to_rgb
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.places import count_places
from nanovlm.data.rendering import Renderer, check_blocks
from nanovlm.data.spans import Span, SpanEncoder, boundaries
from nanovlm.data.tilings import FAKE
from nanovlm.data.tokenizer import read_tokenizer
from nanovlm.data.types import IGNORE, Batch, Document, Sample
from nanovlm.data.video import frame_tiling, shows_video, tell
from nanovlm.errors import UserError
from nanovlm.files import write_file


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
        self._image_token, self._end_token, bos_token = (
            None if i is None else tokenizer.id_to_token(i)
            for i in (config.image_token_id, config.eos_token_id, config.bos_token_id)
        )
        self._encoder = SpanEncoder(tokenizer, special, self._end_token)
        self._boundaries = functools.cache(functools.partial(boundaries, tokenizer))
        tokens = {"bos_token": bos_token, "eos_token": self._end_token}
        tokens = {name: token for name, token in tokens.items() if token is not None}
        self._renderer = Renderer(chat_template, tokens, self._image_token, special)
        if "bos_token" in self._renderer.variables and bos_token is None:
            raise UserError("the chat template writes bos_token, but bos_token_id = None")
        self.template = self._renderer.template
        # Short questions and answers repeat, and encoding one takes longer than looking it up.
        self._encode_short = functools.lru_cache(maxsize=16384)(self._encoder.encode)

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

    def document(self, sample: Sample, train_on: str = "answers") -> Document:
        """Turn a sample into a document; with `independent`, each question is a branch after the images.

        It trains the answers and their ends, or with `train_on` "all" whatever is no image. A sample of one message of
        the role text is no conversation: all of it is trained, as it stands (`text_document`).
        """
        if shows_video(sample.messages):
            told = dataclasses.replace(sample, messages=tell(sample.messages, self.config.video_prompt))
            return self.for_frames().document(told, train_on)
        if [message["role"] for message in sample.messages] == ["text"]:
            return self.text_document(_parts(sample.messages[0]["content"]), sample.images)
        sees_prompt = self.config.decoder.sees_prompt
        if not sample.independent or (sees_prompt and len(sample.messages) == 2):
            ids, labels = self._trained_tokens(sample.messages, sample.images, train_on)
            return self._make_document(ids, labels, [0] * len(ids), sample.images, count_prompt(labels))
        roles = [message["role"] for message in sample.messages]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise UserError("independent questions must be pairs of a user and an assistant message, at least one")
        if sees_prompt:
            raise UserError(
                "independent questions share their images, which cannot see each of them as decoder.prefix_attention "
                f"= {self.config.decoder.prefix_attention} asks for: give records with one question each, or choose "
                "images"
            )
        pairs = list(zip(sample.messages[::2], sample.messages[1::2], strict=True))
        branches = [self._trained_tokens(pair, sample.images, train_on) for pair in pairs]
        # All branches begin with the same tokens up to the last image: the prefix.
        first = branches[0][0]
        image = self.config.image_token_id
        prefix = len(first) - first[::-1].index(image) if image in first else 0
        # The last token of the prefix is followed by several.
        labels = [*branches[0][1][: prefix - 1], IGNORE] if prefix else []
        ids, branch_ids = first[:prefix], [0] * prefix
        for number, (branch, branch_labels) in enumerate(branches, start=1):
            if branch[:prefix] != first[:prefix]:
                raise UserError("independent questions must all begin with the same images")
            ids, labels = ids + branch[prefix:], labels + branch_labels[prefix:]
            branch_ids += [number] * (len(branch) - prefix)
        return self._make_document(ids, labels, branch_ids, sample.images)

    def pair(self, sample: Sample) -> Document:
        """Turn a sample with a rejected answer into a document with two branches, chosen and rejected.

        The prefix is the prompt. Each branch begins with the last token of the prompt and ends with the end of its
        answer, and only answers are trained. `values["ref_logprobs"]` has the sum of a branch at its first
        trained token, NaN where the sample has none.
        """
        if sample.rejected is None:
            raise UserError("the record is no pair, which the objective learns from: it needs chosen and rejected")
        if shows_video(sample.messages):
            told = dataclasses.replace(sample, messages=tell(sample.messages, self.config.video_prompt))
            return self.for_frames().pair(told)
        answers = (sample.messages[-1], sample.rejected)
        chosen, rejected = (
            self._trained_tokens([*sample.messages[:-1], answer], sample.images, "answers") for answer in answers
        )
        # Where the two part, or that is in the middle of what is trained, where that begins: the answers.
        start = next((i for i, (a, b) in enumerate(zip(chosen[0], rejected[0], strict=False)) if a != b), None)
        if start is None:
            raise UserError("chosen and rejected are the same tokens, so neither is better: leave the record out")
        while start and chosen[1][start - 1] != IGNORE:
            start -= 1
        prefix, ids = start, chosen[0][:start]
        labels, branch_ids, reference = [IGNORE] * prefix, [0] * prefix, [0.0] * prefix
        for number, ((tokens, targets), total) in enumerate(
            zip((chosen, rejected), sample.ref_logprobs or (math.nan, math.nan), strict=True), start=1
        ):
            end = len(targets) - next(i for i, target in enumerate(reversed(targets)) if target != IGNORE) + 1
            branch = slice(prefix, end)
            if targets[prefix] == IGNORE or prefix >= end:
                raise UserError("the chat template writes the prompt of the rejected answer in another way")
            ids, labels = ids + tokens[branch], labels + targets[branch]
            branch_ids += [number] * (end - prefix)
            reference += [total] + [0.0] * (end - prefix - 1)
        document = self._make_document(ids, labels, branch_ids, sample.images, min(prefix, count_prompt(chosen[1])))
        document.values = {"ref_logprobs": torch.tensor(reference)}
        return document

    def text_document(self, parts: list[dict], images: list[Image.Image] | tuple = ()) -> Document:
        """Turn text with images among it into a document that trains all of its text, without a chat template.

        It begins and ends with the tokens that the tokenizer itself puts around a text: often bos, seldom eos.
        """
        shown = iter(self._show_all(parts, images))
        spans = [next(shown) if part["type"] == "image" else Span(part["text"], is_trained=True) for part in parts]
        if not any(span.text for span in spans if not span.is_image):
            raise UserError("the text of the document is empty")
        before, after = self._boundaries()
        spans = [*(Span(x, from_template=True) for x in before), *spans, *(Span(x, from_template=True) for x in after)]
        ids, labels = self._tokens(tuple(spans), trains_all=True)
        return self._make_document(ids, labels, [0] * len(ids), images)

    def prompt(self, messages: list[dict], images: list[Image.Image] | tuple = ()) -> Document:
        """Turn a conversation that ends with a user turn into a document that ends where the answer begins.

        Images that no message places go to the beginning of the first user turn. Raises UserError
        for an empty question and where the image parts do not match the images.
        """
        if not messages or messages[-1]["role"] != "user" or not _text(messages[-1]["content"]).strip():
            raise UserError("the prompt is empty: write a question or an instruction")
        if re.search("[\ud800-\udfff]", _text(messages[-1]["content"])):
            raise UserError("the prompt is not valid UTF-8 text")
        if shows_video(messages):
            return self.for_frames().prompt(tell(messages, self.config.video_prompt), images)
        messages = [dict(message, content=_parts(message["content"])) for message in messages]
        if images and not any(part["type"] == "image" for message in messages for part in message["content"]):
            first = next(message for message in messages if message["role"] == "user")
            first["content"] = [{"type": "image"} for _ in images] + first["content"]
        images = [to_rgb(image) for image in images]
        ids, labels = self._tokens(self._spans(messages, images, add_generation_prompt=True))
        return self._make_document(ids, [IGNORE] * len(ids), [0] * len(ids), images, count_prompt(labels))

    def text_prompt(self, text: str) -> Document:
        """Turn a plain text into a document that ends where the text does, for a model to go on with.

        It begins with the tokens that the tokenizer itself puts before a text, as those of `text_document`.
        """
        if not text:
            raise UserError("the prompt is empty: write the beginning of a text")
        before, _after = self._boundaries()
        spans = (*(Span(token, from_template=True) for token in before), Span(text))
        ids, _labels = self._tokens(spans)
        return self._make_document(ids, [IGNORE] * len(ids), [0] * len(ids), ())

    def for_frames(self) -> "Processor":
        """Return the processor of conversations that show a video, in which each picture has as few tiles as can be."""
        processor = copy.copy(self)
        processor.config = dataclasses.replace(self.config, tiling=frame_tiling(self.config))
        return processor

    def token_ids(self) -> list[int]:
        """Return the ids of all tokens, in order; the model's table may have more rows."""
        return sorted(set(self.tokenizer.get_vocab().values()))

    def num_image_tokens(self, width: int, height: int) -> int:
        """Count the tokens of a single image of this size, markers included; its pixels are not needed."""
        return len(self.image_tokens(width, height))

    def image_tokens(self, width: int, height: int) -> list[int]:
        """Return the tokens of a single image of this size, markers included."""
        return self._tokens((self._show(width, height),))[0]

    def batch(self, prompts: list[Document]) -> Batch:
        """Stack prompts of different lengths, one a row, padded on the right."""
        length = max(len(prompt) for prompt in prompts)
        return collate([make_row([prompt], length, self.config.pad_token_id) for prompt in prompts])

    def __call__(self, messages: list[dict], images: list[Image.Image] | tuple = ()) -> Batch:
        """Turn one conversation into a batch of one row, for generation."""
        return self.batch([self.prompt(messages, images)])

    def encode_answer(self, text: str) -> list[int]:
        """Return the tokens of an answer's text, which stays text whatever special tokens it spells."""
        assert self._end_token is not None  # a special token of the tokenizer, as __init__ checks
        spans = (Span(self._end_token, from_template=True), Span(text))  # an answer never begins a document
        return self._encoder.encode(spans)[0][1:]

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _make_document(self, ids, labels, branch_ids, images, num_prompt=0):
        size, per_tile = self.config.tile_size, self.config.num_image_tokens
        tiles = [image.features if isinstance(image, Seen) else make_tiles(image, self.config) for image in images]
        grids = find_grids(images, self.config)
        counts = count_places(self.config, grids) if grids else [len(own) * per_tile for own in tiles]
        tiles = torch.cat(tiles) if tiles else torch.empty(0, 3, size, size, dtype=torch.uint8)
        if (placeholders := ids.count(self.config.image_token_id)) != sum(counts):
            raise UserError(f"{placeholders} image placeholders, but images of {sum(counts)} tokens")
        return Document(
            input_ids=torch.tensor(ids),
            labels=torch.tensor(labels),
            branch_ids=torch.tensor(branch_ids, dtype=torch.int32),
            tiles=tiles,
            grids=grids,
            span_ids=self._find_spans(ids, counts, num_prompt),
        )

    def _find_spans(self, ids: list[int], counts: list[int], num_prompt: int) -> torch.Tensor | None:
        """Return the spans of a document whose images have so many tokens, as decoder.prefix_attention says.

        The prompt of `num_prompt` tokens is one without its last token: that sees all of it anyway, and is the first of
        each branch where answers are branches, which the prompt cannot see. A whole_prompt has it, too.
        """
        kind, spans = self.config.decoder.prefix_attention, torch.zeros(len(ids), dtype=torch.int32)
        if kind == "causal":
            return None
        if self.config.decoder.sees_prompt:
            spans[: num_prompt + (kind == "whole_prompt")] = 1
            return spans
        places = iter([place for place, token in enumerate(ids) if token == self.config.image_token_id])
        for number, count in enumerate(counts, start=1):
            own = [next(places) for _ in range(count)]
            spans[own[0] : own[-1] + 1] = number
        return spans

    def _show(self, width, height, number=None) -> Span:
        """Make the span of an image; `number` is its index if it is one of several."""
        plan = plan_tiles(width, height, self.config)
        assert self._image_token is not None  # as there is an encoder
        return Span(layout(plan, self._image_token, self.config, number), from_template=True, is_image=True)

    def _trained_tokens(self, messages, images, train_on) -> tuple[list[int], list[int]]:
        """Return token ids and labels of a conversation."""
        spans = self._spans(messages, images)
        if train_on == "all":
            return self._tokens(spans, trains_all=True)
        check_blocks(spans, self._end_token)
        return self._tokens(spans)

    def _spans(self, messages, images, add_generation_prompt=False) -> tuple[Span, ...]:
        """Render a conversation as spans whose concatenation is the text."""
        messages = [{"role": message["role"], "content": _parts(message["content"])} for message in messages]
        shown = self._show_all([part for message in messages for part in message["content"]], images)
        return self._renderer.spans(messages, shown, add_generation_prompt)

    def _show_all(self, parts, images) -> list[Span]:
        """Make the spans of the images that parts show."""
        if (shown := sum(part["type"] == "image" for part in parts)) != len(images):
            raise UserError(f"the messages show {shown} images, but {len(images)} were given")
        return [self._show(*image.size, number=i if shown > 1 else None) for i, image in enumerate(images)]

    def _tokens(self, spans: tuple[Span, ...], trains_all=False) -> tuple[list[int], list[int]]:
        """Tokenise spans; return token ids and labels, each label at the position that predicts it."""
        image, repeats = self.config.image_token_id, self.config.num_image_tokens
        ids, labels = [], []
        is_short = sum(len(span.text) for span in spans) < 200
        encoded = (self._encode_short if is_short else self._encoder.encode)(spans, trains_all)
        for token, is_trained in zip(*encoded, strict=True):
            ids += [token] * (repeats if token == image else 1)
            labels += [token] if is_trained else [IGNORE] * (repeats if token == image else 1)
        return ids, [*labels[1:], IGNORE]


def count_prompt(labels: list[int]) -> int:
    """Count the tokens before the one that predicts the first trained token, or else before the last."""
    return next((place for place, label in enumerate(labels) if label != IGNORE), len(labels) - 1)


def _parts(content):
    """Return a message's content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _text(content):
    return "".join(part["text"] for part in _parts(content) if part["type"] == "text")
