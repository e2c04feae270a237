"""Token -> its bytes: a token may hold a part of a character, which is no text yet."""

import re

from tokenizers import Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space


class TokenBytes:
    """Looks up the bytes that tokens stand for, of byte-level vocabularies and of SentencePiece's."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        characters = byte_characters()
        # In a byte-level vocabulary each byte is a token, written as one character.
        vocabulary = tokenizer.get_vocab()
        self.byte_of = characters if all(character in vocabulary for character in characters) else None

    def __getitem__(self, token: int) -> bytes:
        """Return the bytes of a token, none for an unknown one."""
        if token in self.added:
            return self.added[token].encode()
        text = self.tokenizer.id_to_token(token) or ""
        if self.byte_of is not None and all(character in self.byte_of for character in text):
            return bytes(self.byte_of[character] for character in text)
        if match := re.fullmatch("<0x([0-9A-Fa-f]{2})>", text):
            return bytes([int(match[1], 16)])
        return text.replace(SPACE, " ").encode()


def byte_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    GPT-2's table: a byte that Latin-1 prints is written as that character, the others as those from U+0100 on.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
