"""Spans of a text -> tokens. What a person wrote stays text, what the template or an image wrote can be control tokens.

Control tokens are the special tokens and all tokens added to a tokenizer beside them, such as `<think>`, `<tool_call>`
or `<|user|>`, be they marked as special or not. White space that was added is text, and so are location tokens and what
the model's own vocabulary makes of the same characters. The text between two control tokens is tokenised in one piece,
so that the tokens are those of the model's own tokenizer.
"""

import json
import re
from typing import NamedTuple

from tokenizers import Tokenizer

from nanovlm.data.boxes import LOCATION
from nanovlm.data.tokenizer import tokenizer_errors
from nanovlm.errors import UserError

# Tokens that an answer may hold before its end: `</think>` is written by the model.
THINK = ("<think>", "</think>")


class Span(NamedTuple):
    """A piece of a rendered conversation: template text, message text or the layout of one image."""

    text: str
    from_template: bool = False
    is_image: bool = False
    is_trained: bool = False
    in_block: bool | None = None  # whether a {% generation %} block wrote it, None where the template has none


class SpanEncoder:
    """Turns spans into token ids, each tile as one image token."""

    def __init__(self, tokenizer: Tokenizer, special: dict[str, int], end_token: str | None):
        """`special` are the ids of special tokens, and `end_token` is the one that ends an answer."""
        self.special, self.end_token = special, end_token
        added = tokenizer.get_added_tokens_decoder()
        # No post-processor: it would add tokens and shift offsets.
        data = json.loads(tokenizer.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
        bare = _read(data, ())
        texts = {
            token.content: i
            for i, token in added.items()
            if token.content not in special
            and (
                _is_space(token)
                or LOCATION.fullmatch(token.content)
                or bare.encode(token.content, add_special_tokens=False).ids == [i]
            )
        }
        self._first = self._later = _read(data, texts) if texts else bare
        # Where a space is put before the beginning of a text, it is not put before what follows a control token.
        for part in _pre_tokenizers(data["pre_tokenizer"]):
            if part.get("prepend_scheme") == "first":
                part["prepend_scheme"] = "never"
                self._later = _read(data, texts)
        self._text_ids = {self._first.token_to_id(text): i for text, i in texts.items()}
        self._text_ids = {ours: theirs for ours, theirs in self._text_ids.items() if ours != theirs}
        self.control = {token.content: i for i, token in added.items() if token.content not in texts} | special
        unknown = data["model"].get("unk_token")
        self._control_ids = {i for text, i in self.control.items() if text != unknown} - {data["model"].get("unk_id")}
        # Some control tokens take in the white space beside them.
        self._strips = {token.content: (token.lstrip, token.rstrip) for token in added.values()}
        longest_first = sorted(map(re.escape, self.control), key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(longest_first)})")

    def encode(self, spans: tuple[Span, ...], trains_all: bool = False) -> tuple[list[int], list[bool]]:
        """Return token ids and whether they are trained: of answers to their end, or of all but images.

        Raises UserError where the template does not end an answer.
        """
        no_end = f"the chat template does not end an assistant message with the end-of-turn token {self.end_token}"
        ids, is_trained = [], []
        running = []  # text since the last control token: (characters, is_trained)
        answer_is_open = eats_space = False

        def add(text, flag):
            nonlocal eats_space
            text = text.lstrip() if eats_space else text
            eats_space &= not text
            running.append((text, flag))

        def flush(eats_before=False):
            while eats_before and running:
                text, flag = running.pop()
                if text.rstrip():
                    running.append((text.rstrip(), flag))
                    break
            text = "".join(text for text, _ in running)
            if text:
                new, offsets = self._encode_text(text, is_first=not ids)
                ids.extend(new)
                trained = [flag for text, flag in running for _ in text]  # one per character
                is_trained.extend(any(trained[start:end]) for start, end in offsets)
            running.clear()

        for span in spans:
            answer_is_open |= span.is_trained and not trains_all
            if not span.from_template:
                add(span.text, span.is_trained or trains_all)
                continue
            is_answer = answer_is_open and not span.is_image
            for i, piece in enumerate(self._pattern.split(span.text)):
                if i % 2 == 0:
                    add(piece, is_answer or (trains_all and not span.is_image))
                    continue
                eats_before, eats_space = self._strips.get(piece, (False, False))
                flush(eats_before)
                is_end = piece == self.end_token
                if is_answer and piece in self.special and not is_end and piece not in THINK:
                    raise UserError(no_end)
                ids.append(self.control[piece])
                is_trained.append(is_answer or (trains_all and not span.is_image))
                if is_answer and is_end:
                    is_answer = answer_is_open = False
        flush()
        if answer_is_open:
            raise UserError(no_end)
        return ids, is_trained

    def _encode_text(self, text, is_first):
        """Tokenise what is no control token; return ids and the characters of each."""
        with tokenizer_errors("the tokenizer cannot encode a text"):
            encoding = (self._first if is_first else self._later).encode(text, add_special_tokens=False)
        ids = [self._text_ids.get(i, i) for i in encoding.ids] if self._text_ids else encoding.ids
        if not self._control_ids.isdisjoint(ids):
            made = next(text for text, i in self.control.items() if i in ids)
            raise UserError(f"the tokenizer makes the control token {made} out of plain text")
        return ids, encoding.offsets


def _read(data: dict, added) -> Tokenizer:
    """Make a tokenizer with some of its added tokens."""
    kept = [token for token in data["added_tokens"] if token["content"] in added]
    with tokenizer_errors("the tokenizer does not fit together"):
        return Tokenizer.from_str(json.dumps(data | {"added_tokens": kept}))


def _pre_tokenizers(part) -> list[dict]:
    return [] if part is None else part.get("pretokenizers", [part])


def _is_space(token) -> bool:
    return not token.special and not token.content.replace("▁", " ").strip()


def boundaries(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Return the tokens that a tokenizer's post-processor puts before and after a text, such as bos and eos."""
    plain = Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_str()) | {"truncation": None, "padding": None}))
    bare, whole = (plain.encode("a", add_special_tokens=flag).tokens for flag in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise UserError(f"the tokenizer does not put tokens around a text, it writes {whole} where {bare} stood")
