"""Predictions and truths -> numbers."""

from collections import defaultdict

from eval.tasks import Question


def exact_match(prediction: str, truth: str) -> bool:
    """Is the answer the truth, word for word? Only white space around it is forgiven."""
    return prediction.strip() == truth


def accuracy_by_kind(questions: list[Question], predictions: list[str]) -> dict[str, float]:
    """Return the share of exact answers for each kind of question."""
    hits = defaultdict(list)
    for question, prediction in zip(questions, predictions, strict=True):
        hits[question.kind].append(exact_match(prediction, question.truth))
    return {kind: sum(found) / len(found) for kind, found in hits.items()}
