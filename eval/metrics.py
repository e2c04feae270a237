"""An answer and its references -> figures between 0 and 1."""


def exact_match(answer: str, references: tuple[str, ...]) -> bool:
    """Return whether the answer equals one of the references; only white space around it is ignored."""
    return answer.strip() in references
