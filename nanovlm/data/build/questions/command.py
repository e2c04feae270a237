"""The command that runs a recipe: python -m nanovlm.data.build questions RECIPE.yaml."""

import dataclasses
from pathlib import Path

from nanovlm.data.build.questions.recipe import read_recipe
from nanovlm.data.build.questions.write import run


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
    # The recipe, a YAML file.
    recipe: Path
    # The file to write, in place of that of the recipe.
    out: str = ""
    # How many records to read, in place of the number of the recipe.
    num: int = -1


def main(config: QuestionsConfig):
    """Let a model write questions and answers about the pictures of a source, or go on where that was ended."""
    recipe = read_recipe(config.recipe)
    changes = {"num": config.num} if config.num >= 0 else {}
    recipe = dataclasses.replace(recipe, **changes, out=config.out or recipe.out)
    report = run(recipe)
    for kind, counts in report["kinds"].items():
        print(f"{kind:>12}  {counts['kept']} kept")
        for reason, number in counts["dropped"].items():
            print(f"{'':>12}  {number} dropped: {reason}")
    for reason, number in report["records"]["words_left_out"].items():
        print(f"{'words':>12}  {number} not shown to the writer: {reason}")
    print(f"wrote {recipe.out}: {report['records']['written']} of {report['records']['read']} records")
