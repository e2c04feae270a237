"""Reply -> OpenAI's JSON: whole, or in events as it grows."""

import json
import math
import time
import uuid
from typing import Any

from nanovlm.infer.replies import Piece, Reply
from nanovlm.infer.request import Token
from nanovlm.infer.token_bytes import TokenBytes

LINE_ENDS = "\x85\u2028\u2029"  # JSON may hold them, but some clients take them for the end of an event
LEAST_LOGPROB = -9999.0  # in the place of minus infinity, which JSON cannot say


def to_json(data: Any) -> bytes:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in LINE_ENDS:
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode(errors="replace")


def event(data: dict) -> bytes:
    """Write one of the Server-Sent Events."""
    return b"data: %b\n\n" % to_json(data)


class ReplyJson:
    """Writes one reply, of `/v1/chat/completions` or `/v1/completions`."""

    def __init__(self, reply: Reply, model: str, token_bytes: TokenBytes):
        self.reply, self.token_bytes = reply, token_bytes
        self.is_chat = reply.ask.text is None
        self.head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "",
            "created": int(time.time()),
            "model": model,
        }
        self.kind = "chat.completion" if self.is_chat else "text_completion"

    def whole(self) -> bytes:
        """Return the reply when it is over, written one answer at a time: objects take many times the memory."""
        choices = []
        for piece in self.reply.take():
            text = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
            choices.append(to_json(self._choice(piece, text if self.is_chat else {"text": piece.text})))
        head, usage = to_json({**self.head, "object": self.kind}), to_json(self.reply.usage())
        return b'%b,"choices":[%b],"usage":%b}' % (head.removesuffix(b"}"), b",".join(choices), usage)

    def opening(self) -> bytes:
        """Return the events that precede those with text."""
        if not self.is_chat:
            return b""
        delta = {"delta": {"role": "assistant", "content": ""}}
        opened = [Piece(index, "", [], None) for index in range(len(self.reply.answers))]
        return b"".join(event(self._chunk([self._choice(piece, delta)])) for piece in opened)

    def events(self, pieces: list[Piece]) -> bytes:
        """Return the events with what is new, one a piece."""
        written = []
        for piece in pieces:
            delta = {"content": piece.text} if piece.text or piece.tokens else {}
            choice = self._choice(piece, {"delta": delta} if self.is_chat else {"text": piece.text})
            written.append(event(self._chunk([choice])))
        return b"".join(written)

    def closing(self) -> bytes:
        """Return the events that follow those with text."""
        return event(self._chunk([], self.reply.usage())) if self.reply.ask.includes_usage else b""

    def _chunk(self, choices: list[dict], usage: dict | None = None) -> dict:
        chunk = {**self.head, "object": "chat.completion.chunk" if self.is_chat else self.kind, "choices": choices}
        return chunk | ({"usage": usage} if self.reply.ask.includes_usage else {})

    def _choice(self, piece: Piece, text: dict) -> dict:
        logprobs, ask = None, self.reply.ask
        if piece.tokens and ask.num_logprobs is not None:
            logprobs = self._chat_logprobs(piece.tokens) if self.is_chat else self._logprobs(piece.tokens)
        choice = {"index": piece.index, **text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        return choice | ({"token_ids": [token.id for token, _ in piece.tokens]} if ask.tells_tokens else {})

    def _chat_logprobs(self, tokens: list[tuple[Token, int]]) -> dict:
        def entry(token, logprob):
            data = self.token_bytes[token]
            return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}

        content = [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*other) for other in token.likeliest]}
            for token, _ in tokens
        ]
        return {"content": content, "refusal": None}

    def _logprobs(self, tokens: list[tuple[Token, int]]) -> dict:
        likeliest = []
        for token, _ in tokens:
            others = {}
            for other, logprob in token.likeliest:  # of two that read the same, the likelier
                others.setdefault(self._text(other), _finite(logprob))
            likeliest.append(others)
        return {
            "tokens": [self._text(token.id) for token, _ in tokens],
            "token_logprobs": [_finite(token.logprob) for token, _ in tokens],
            "top_logprobs": likeliest if self.reply.ask.num_logprobs else None,
            "text_offset": [start for _, start in tokens],
        }

    def _text(self, token: int) -> str:
        return self.token_bytes[token].decode(errors="replace")


def _finite(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None or math.isinf(logprob) else logprob
