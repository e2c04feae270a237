"""Multiple choice without generating: the log-probability that a model gives each option (infer/likelihood.py)."""

from collections.abc import Sequence

from nanovlm.data.chat import Processor
from nanovlm.eval.letters import LETTERS
from nanovlm.eval.questions import Question
from nanovlm.infer.likelihood import option_scores
from nanovlm.model.vlm import VLM


def score_by_likelihood(
    model: VLM, processor: Processor, questions: Sequence[Question], title: str | None = None
) -> list[dict[str, float]]:
    """Score multiple choices by their likeliest option: among the letters, and among the texts, also per token.

    The question is asked as it is for generating. Others than multiple choices get no figures.
    """
    asked = [question for question in questions if question.choices]
    letters = [LETTERS[: len(question.choices)] for question in asked]
    options = [(*own, *question.choices) for own, question in zip(letters, asked, strict=True)]
    results = iter(option_scores(model, processor, asked, options, title))
    return [_pick(question, next(results)) if question.choices else {} for question in questions]


def _pick(question, scores):
    letters, number = LETTERS[: len(question.choices)], len(question.choices)
    truths = {reference.strip().upper() for reference in question.references}
    truths |= {letters[i] for i, choice in enumerate(question.choices) if choice in question.references}

    def is_right(values):
        return float(letters[max(range(number), key=values.__getitem__)] in truths)

    sums, counts = zip(*scores, strict=True)
    return {
        "likelihood_of_letter": is_right(sums[:number]),
        "likelihood_of_text": is_right(sums[number:]),
        "likelihood_of_text_per_token": is_right([s / n for s, n in zip(sums[number:], counts[number:], strict=True)]),
    }
