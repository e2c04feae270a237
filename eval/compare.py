"""Two models' answers to the same questions -> whether one is better.

python -m nanovlm.eval.compare runs/a/scores runs/b/scores            folders that nanovlm.eval.run --out wrote
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from nanovlm import cli
from nanovlm.errors import UserError
from nanovlm.eval.intervals import bootstrap, mcnemar

RIGHT = 0.5  # the least score of an answer that counts as right in McNemar's test


def read_answers(path: Path) -> dict[str, list[dict]]:
    """Read answers.jsonl, or the one in a folder: `{task: [line]}`. Raises UserError that names file and line."""
    path = path / "answers.jsonl" if path.is_dir() else path
    tasks: dict[str, list[dict]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the answers in {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            answer = json.loads(line)
            tasks.setdefault(answer["task"], []).append(answer)
            if not all(isinstance(value, int | float) for value in answer["scores"].values()):
                raise TypeError("scores must be numbers")
            if missing := {"number", "record", "question", "references", "answer"} - answer.keys():
                raise TypeError(f"it has no {', '.join(sorted(missing))}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"line {number} of {path} is no answer that nanovlm.eval.run --out wrote: {error}"
            ) from error
    if not tasks:
        raise UserError(f"{path} has no answers")
    return tasks


def compare(ours: Sequence[dict], others: dict[str, list[dict]], task: str) -> dict:
    """Compare the scores of two models on the questions of a task that both were asked.

    Returns the means of both over these questions, their difference with its 95 % interval, the questions that only one
    gets right (a score of at least 0.5), and McNemar's exact p-value for that. Raises UserError where the questions
    differ.
    """
    if task not in others:
        raise UserError(f"the other answers are to {', '.join(others)}, not to {task}")
    own_by_place, theirs = by_place(ours), by_place(others[task])
    pairs = [(own_by_place[place], theirs[place]) for place in own_by_place if place in theirs]
    for own, other in pairs:
        if (own["question"], list(own["references"])) != (other["question"], list(other["references"])):
            raise UserError(
                f"question {own['number']} of {task} differs: {own['question'][:200]!r} here, "
                f"{other['question'][:200]!r} in the other answers"
            )
    figures = [name for own, other in pairs for name in own["scores"] if name in other["scores"]]
    if not figures:
        raise UserError(f"no question of {task} was asked of both models and scored in the same way")
    main = "accuracy" if "accuracy" in figures else figures[0]
    pairs = [(own, other) for own, other in pairs if main in own["scores"] and main in other["scores"]]
    scores = np.array([[own["scores"][main], other["scores"][main]] for own, other in pairs], float)
    is_right = scores >= RIGHT
    only_this = int((is_right[:, 0] & ~is_right[:, 1]).sum())
    only_other = int((is_right[:, 1] & ~is_right[:, 0]).sum())
    interval = bootstrap(
        scores[:, :1] - scores[:, 1:],
        [own["record"] for own, _ in pairs],
        lambda sums, number: {"difference": float(sums[0]) / number},
    )["difference"]
    return {
        "figure": main,
        "n": len(pairs),
        "this": float(scores[:, 0].mean()),
        "other": float(scores[:, 1].mean()),
        "difference": float((scores[:, 0] - scores[:, 1]).mean()),
        "interval": interval,
        "only_this_right": only_this,
        "only_other_right": only_other,
        "p_value": mcnemar(only_this, only_other),
    }


def by_place(lines: Sequence[dict]) -> dict[tuple[int, int], dict]:
    """Return the answers by record and place in it, which stay when records are left out."""
    places, seen = {}, Counter()
    for line in lines:
        places[line["record"], seen[line["record"]]] = line
        seen[line["record"]] += 1
    return places


def format_comparison(task: str, compared: dict, this: str, other: str) -> str:
    """Say in three lines which of two models is better, and how sure that is."""
    low, high = (100 * x for x in compared["interval"])
    return (
        f"{task}: {this} {100 * compared['this']:.1f}, {other} {100 * compared['other']:.1f} "
        f"({compared['figure'].replace('_', ' ')} % of {compared['n']} questions)\n"
        f"  difference {100 * compared['difference']:+.1f}, 95 % interval {low:+.1f} to {high:+.1f}\n"
        f"  only the first is right in {compared['only_this_right']}, only the second in "
        f"{compared['only_other_right']}; McNemar's exact p = {compared['p_value']:.3g}"
    )


def main(first: Path, second: Path):
    """Print the comparison of each task that both were asked."""
    ours, others = read_answers(first), read_answers(second)
    if not (shared := [task for task in ours if task in others]):
        raise UserError(
            f"{first} has answers to {', '.join(ours)}, {second} to {', '.join(others)}: no task is in both"
        )
    for task in shared:
        print(format_comparison(task, compare(ours[task], others, task), str(first), str(second)))


if __name__ == "__main__":
    import tyro

    @dataclass(frozen=True)
    class CompareConfig:
        # The answers of one model: a folder that --out wrote, or its answers.jsonl.
        first: Annotated[Path, tyro.conf.Positional]
        # The answers of the other one.
        second: Annotated[Path, tyro.conf.Positional]

    cli.run(lambda: main(**vars(tyro.cli(CompareConfig, description=__doc__))))
