"""Make data sets.

    python -m nanovlm.data.build RECIPE.yaml                          records that pass its stages, in shards: recipe.py
    python -m nanovlm.data.build answer MODEL SOURCE OUT.jsonl        the questions of a source with a model's answers
    python -m nanovlm.data.build top-k MODEL SOURCE OUT.jsonl         its records with the tokens that a model expects
    python -m nanovlm.data.build reference MODEL SOURCE OUT.jsonl     its pairs with the log-probabilities by a model
    python -m nanovlm.data.build questions RECIPE.yaml                questions and answers that a model writes
    python -m nanovlm.data.build label MODEL SOURCE OUT.jsonl         its records with a category of a taxonomy
    python -m nanovlm.data.build balance SOURCE OUT.jsonl             a choice of them with balanced categories
    python -m nanovlm.data.build page SOURCE PAGE.html                a sample of records, for a person to judge
    python -m nanovlm.data.build verdicts SOURCE VERDICTS OUT.jsonl   the records without those that were judged bad

SOURCE is what data.sources of train.py takes, and OUT.jsonl can be one. It appears once it is whole; a command that was
killed goes on when it is given again. So does a recipe.
"""

import sys
from pathlib import Path

from nanovlm import cli

if __name__ == "__main__":
    cli.end_on_interrupt()  # the imports below take seconds

from nanovlm.data.build import answer, balance, funnel, label, reference, review, top_k
from nanovlm.data.build.questions import command as questions

COMMANDS = {
    "recipe": (funnel.RecipeConfig, funnel.main),
    "answer": (answer.AnswerConfig, answer.main),
    "top-k": (top_k.TopKConfig, top_k.main),
    "reference": (reference.ReferenceConfig, reference.main),
    "questions": (questions.QuestionsConfig, questions.main),
    "label": (label.LabelConfig, label.main),
    "balance": (balance.BalanceConfig, balance.main),
    "page": (review.PageConfig, review.write_page),
    "verdicts": (review.VerdictsConfig, review.apply_verdicts),
}


def main(args: list[str]):
    """Run the command that the first argument names; a recipe is one by itself."""
    if args and Path(args[0]).suffix in (".yaml", ".yml"):
        args = ["recipe", *args]
    cli.run_command(args, COMMANDS, "python -m nanovlm.data.build", __doc__)


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
