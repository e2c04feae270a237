"""Tokens of an answer -> its text in pieces, as soon as nothing that follows can change them.

All pieces together equal `Processor.decode` of all tokens, whatever the tokens are, at a cost that is linear in their
number. What must be waited for depends on the tokenizer's decoder:

- byte level (GPT-2, Llama 3, Qwen, SmolLM2): tokens are bytes, and a character may be incomplete
- byte fallback (Llama 2, Gemma): one wrong byte makes U+FFFD of each byte token beside it, so the whole run must end
- a text for each token, spaces at the beginning of all left out (Metaspace, WordPiece): nothing; the token before it is
  decoded with it, so that it does not become the first
- any other decoder may change everything: the text comes at the end

`DecodeStream` of tokenizers fails on some runs of bytes and never gives an incomplete character at the end.
"""

import codecs
import json
import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from nanovlm.data.chat import Processor
from nanovlm.errors import UserError

# How GPT-2's byte-level vocabulary writes each byte: as the character of the same number where that one is visible,
# else as the next of those from U+0100 on.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(0x100 + i): byte for i, byte in enumerate(HIDDEN)}

# Steps of decoders that make a text of each token by itself, but for the first and last one and for runs of bytes.
LOCAL = ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece", "BPEDecoder")


class TextStream:
    """The text of one answer as it grows, up to the first of the `stop` strings, which is left out.

    `stopped` is that string; None until there is one. Raises UserError for an empty stop string.
    """

    def __init__(self, processor: Processor, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.stopped = processor.tokenizer, tuple(stop), None
        if "" in self.stop:
            raise UserError("a stop string must have at least one character")
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.special = {token.content for token in added if token.special}
        steps = find_steps(self.tokenizer)
        types = [step["type"] for step in steps]
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace") if types == ["ByteLevel"] else None
        self.is_local, self.has_bytes = is_local(steps), "ByteFallback" in types
        # Of a decoder that is not byte level: the token before those of which no text was given, and these.
        self.before: list[int] = []
        self.waiting: list[int] = []
        # Text that may begin a stop string.
        self.held = ""
        # Characters of all tokens so far; one that is not complete counts with the token that completes it.
        self.length = 0

    def add(self, token_id: int) -> str:
        """Return the text that has become final with one more token."""
        token = self.tokenizer.id_to_token(token_id)
        if self.stopped is not None or token is None or token in self.special:
            return ""
        if self.bytes is not None:
            return self._until_stop(self.bytes.decode(to_bytes(token)))
        self.waiting.append(token_id)
        if not self.is_local or (self.has_bytes and is_byte(token)):
            return ""
        return self._until_stop(self._decode_waiting())

    def end(self) -> str:
        """Return the rest of the text. Nothing can be added any more."""
        if self.stopped is not None:
            return ""
        rest = self.bytes.decode(b"", final=True) if self.bytes is not None else self._decode_waiting()
        text = self._until_stop(rest)
        held, self.held = self.held, ""
        return text + held

    def _decode_waiting(self) -> str:
        if not self.waiting:
            return ""
        known = self.tokenizer.decode(self.before, skip_special_tokens=True) if self.before else ""
        text = self.tokenizer.decode(self.before + self.waiting, skip_special_tokens=True)
        self.before, self.waiting = self.waiting[-1:], []
        return text[len(known) :]

    def _until_stop(self, new: str) -> str:
        """Return the text up to the stop string that is complete first, or to what may begin one."""
        self.length += len(new)
        text, self.held = self.held + new, ""
        found = [(start + len(stop), start, stop) for stop in self.stop if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.stopped = min(found)
            return text[:start]
        num_held = max((count_begun(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def after_thinking(ids: Sequence[int], processor: Processor) -> str:
    """Return the text of an answer behind the end of its thinking, if there is one; the token may be a special one."""
    end = processor.tokenizer.token_to_id("</think>")
    if end is not None and end in ids:
        ids = ids[len(ids) - list(reversed(ids)).index(end) :]
    return processor.decode([*ids]).rpartition("</think>")[2].strip()


def count_begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(stop) - 1, len(text))
    return next((num for num in range(longest, 0, -1) if text.endswith(stop[:num])), 0)


def find_steps(tokenizer: Tokenizer) -> list[dict]:
    """Return the steps of a tokenizer's decoder, as tokenizer.json writes them."""
    if tokenizer.decoder is None:  # tokens are joined with spaces
        return []
    step = json.loads(tokenizer.decoder.__getstate__())
    return step["decoders"] if step["type"] == "Sequence" else [step]


def is_local(steps: list[dict]) -> bool:
    """Return whether the text of a token, the one before it given, does not depend on what follows."""
    types = [step["type"] for step in steps]
    whole = steps[types.index("Fuse") + 1 :] if "Fuse" in types else []  # these see all of the text as one token
    return set(types) <= set(LOCAL) and all(
        step["type"] == "Strip" and step["start"] <= 1 and step["stop"] == 0 for step in whole
    )


def is_byte(token: str) -> bool:
    """Return whether a token with byte fallback stands for a byte: <0x0A>."""
    return re.fullmatch("<0x[0-9A-Fa-f]{2}>", token) is not None


def to_bytes(token: str) -> bytes:
    """Return the bytes that a token of a byte-level vocabulary stands for; an added token stands for its own text."""
    if all(character in BYTES for character in token):
        return bytes(BYTES[character] for character in token)
    return token.encode()
