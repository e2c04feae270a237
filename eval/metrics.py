"""An answer and its references -> figures between 0 and 1."""


def exact_match(answer: str, references: tuple[str, ...]) -> bool:
    """Is the answer one of the references, word for word? Only white space around it is forgiven."""
    return answer.strip() in references
