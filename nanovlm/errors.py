"""A user's mistake in one sentence, and how text from data is shown."""


class UserError(ValueError):
    """A mistake in a command, a file or data, which its message explains: commands print it without a traceback.

    The message may quote data: what a terminal would obey instead of showing it is escaped.
    """

    def __str__(self):
        return printable(super().__str__(), most=4000)


def printable(text: str, most: int = 1000) -> str:
    """Escape characters that are not printable, and cut out the middle of a text longer than `most` characters."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return text if text.isprintable() else "".join(map(_escape, text))


def _escape(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
