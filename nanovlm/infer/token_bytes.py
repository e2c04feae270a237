"""Token -> its bytes: a token may hold a part of a character, which is no text yet."""

from tokenizers import Tokenizer

from nanovlm.infer.text import find_steps, is_byte, to_bytes

SPACE = "\u2581"  # how SentencePiece writes a space


class TokenBytes:
    """Looks up the bytes that tokens stand for, of byte-level vocabularies and of SentencePiece's."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self.is_byte_level = [step["type"] for step in find_steps(tokenizer)] == ["ByteLevel"]

    def __getitem__(self, token: int) -> bytes:
        """Return the bytes of a token, none for an unknown one."""
        if token in self.added:
            return self.added[token].encode()
        text = self.tokenizer.id_to_token(token) or ""
        if self.is_byte_level:
            return to_bytes(text)
        return bytes([int(text[3:5], 16)]) if is_byte(text) else text.replace(SPACE, " ").encode()
