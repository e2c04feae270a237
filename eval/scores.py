"""Answers to the questions of a task -> its figures, by kind and over all, with intervals; and their table."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import NamedTuple

import numpy as np

from nanovlm.eval.corpus import CORPUS_METRICS
from nanovlm.eval.intervals import bootstrap
from nanovlm.eval.questions import Question, Task

LONGEST_KIND = 40  # characters of a kind that a table shows
CONTROLS = ("blank", "shuffled", "still", "alone", "majority")


class Measure(NamedTuple):
    """Figures that follow from the sum of rows fp64[N, C], of which the last column counts the rows that matter."""

    rows: np.ndarray
    combine: Callable[[np.ndarray], dict[str, float]]

    def of(self, chosen: np.ndarray) -> dict[str, float]:
        """Return the figures of the chosen rows, none if none matters."""
        sums = self.rows[chosen].sum(0)
        return self.combine(sums) if sums[-1] else {}


def summarise(
    task: Task,
    questions: list[Question],
    columns: dict[str, list[str]],
    dropped: int = 0,
    more: Sequence[dict[str, float]] = (),
) -> tuple[dict, list[dict[str, float]]]:
    """Return the figures of a task as `evaluate` (run.py) describes them, and those of each answer.

    `columns` has the answers under `accuracy`, and those of controls by their names; `more` are further figures of
    each answer.
    """
    result: dict = {"n": len(questions), "dropped": dropped, "kinds": {}}
    if not questions:
        return result, []
    scores, by_kind = {}, {}
    for column, answers in columns.items():
        scores[column] = [dict(task.score(q, said)) for q, said in zip(questions, answers, strict=True)]
    if more:
        scores["accuracy"] = [own | extra for own, extra in zip(scores["accuracy"], more, strict=True)]
    corpus = getattr(task, "corpus", ())
    measures = {column: list(make_measures(questions, scores[column], columns[column], corpus)) for column in columns}
    figures = {}
    for measure in measures["accuracy"]:
        figures |= measure.of(np.ones(len(questions), bool))
    main = find_main(getattr(task, "main", None), scores["accuracy"], figures)
    names = np.array([question.kind for question in questions])
    shown = {kind: names == kind for kind in dict.fromkeys(names.tolist())}
    for column in columns:
        measure = pick_measure(measures[column], main)
        values = {kind: measure.of(is_kind).get(main) for kind, is_kind in shown.items()}
        by_kind[column] = {kind: value for kind, value in values.items() if value is not None}
    counts = Counter(names.tolist())
    result["kinds"] = {
        kind: {column: by_kind[column][kind] for column in columns} | {"n": counts[kind]}
        for kind in by_kind["accuracy"]
    }
    means = {column: mean(of_kind.values()) for column, of_kind in by_kind.items() if of_kind}
    result |= {"mean" if column == "accuracy" else f"{column}_mean": value for column, value in means.items()}
    if main in figures:
        result["overall"] = figures.pop(main)
    if main != "accuracy":
        result["figure"] = main
    result |= figures
    result["intervals"] = find_intervals(measures["accuracy"], main, [shown[k] for k in by_kind["accuracy"]], questions)
    return result, scores["accuracy"]


def make_measures(
    questions: Sequence[Question], scores: Sequence[dict[str, float]], answers: Sequence[str], corpus: Sequence[str]
) -> Iterator[Measure]:
    """Yield the mean of each figure over the answers that have it, and the corpus metrics."""
    for name in dict.fromkeys(name for figures in scores for name in figures):
        rows = np.array([[figures.get(name, 0.0), name in figures] for figures in scores], float)
        yield Measure(rows, lambda sums, name=name: {name: float(sums[0] / sums[1])})
    for metric in corpus:
        rows, combine = CORPUS_METRICS[metric]
        rows = rows(answers, [question.references for question in questions])
        rows = np.column_stack([rows, np.ones(len(rows))])
        yield Measure(rows, lambda sums, combine=combine: combine(sums[:-1], round(sums[-1])))


def find_main(named: str | None, scores: Sequence[dict[str, float]], figures: dict[str, float]) -> str:
    """Return the name of the main figure: the one named, or accuracy, or the first of a corpus metric, or the first."""
    if main := next((name for name in (named, "accuracy") if name in figures), None):
        return main
    single = dict.fromkeys(name for row in scores for name in row)
    return next((name for name in figures if name not in single), next(iter(figures)))


def pick_measure(measures: Sequence[Measure], main: str) -> Measure:
    everything = np.ones(len(measures[0].rows), bool)
    return next((measure for measure in measures if main in measure.of(everything)), measures[0])


def find_intervals(
    measures: Sequence[Measure], main: str, kinds: Sequence[np.ndarray], questions: Sequence[Question]
) -> dict[str, list[float]]:
    """Return 95 % intervals of all figures, of `mean` over the kinds and of `overall`."""
    of_main = pick_measure(measures, main)
    # Beside the columns of every measure, those of the main one once for each kind, zero for questions of other kinds.
    parts = [*measures, *(Measure(of_main.rows * is_kind[:, None], of_main.combine) for is_kind in kinds)]
    ends = np.cumsum([part.rows.shape[1] for part in parts])

    def combine(sums, _number):
        pieces = np.split(sums, ends[:-1])
        found = [part.combine(own) if own[-1] else {} for part, own in zip(parts, pieces, strict=True)]
        figures = {name: value for own in found[: len(measures)] for name, value in own.items()}
        of_kinds = [own[main] for own in found[len(measures) :] if own]
        overall = {"overall": figures.pop(main)} if main in figures else {}
        return ({"mean": mean(of_kinds)} if of_kinds else {}) | overall | figures

    rows = np.hstack([part.rows for part in parts])
    return bootstrap(rows, [question.record for question in questions], combine)


def average(task: Task, questions: list[Question], answers: list[str]) -> dict[str, dict[str, float]]:
    """Score the answers; return the mean of each figure over the questions of each kind."""
    values: dict[str, dict[str, list[float]]] = {}
    for question, said in zip(questions, answers, strict=True):
        for figure, value in task.score(question, said).items():
            values.setdefault(figure, {}).setdefault(question.kind, []).append(value)
    return {figure: {kind: mean(x) for kind, x in of_kind.items()} for figure, of_kind in values.items()}


def format_table(results: dict[str, dict]) -> str:
    """Lay out what `evaluate` returned for each task, in percent."""
    lines = []
    for name, result in results.items():
        columns = [column for column in CONTROLS if f"{column}_mean" in result]
        title = f"{result['figure'].replace('_', ' ')} %" if "figure" in result else "exact %"
        width = max(14, len(name), *(min(len(kind), LONGEST_KIND) + 2 for kind in result["kinds"]))
        wide = max(8, len(title))
        lines.append(f"{name:<{width}} {title:>{wide}}{''.join(f'{c:>10}' for c in columns)}{'n':>7}")
        for kind, row in sorted(result["kinds"].items()):
            shares = "".join(f"{100 * row[column]:10.1f}" for column in columns)
            kind = kind if len(kind) <= LONGEST_KIND else kind[: LONGEST_KIND - 4] + " ..."
            lines.append(f"{'  ' + kind:<{width}} {100 * row['accuracy']:{wide}.1f}{shares}{row['n']:7}")
        if "mean" in result:
            shares = "".join(f"{100 * result[f'{column}_mean']:10.1f}" for column in columns)
            lines.append(f"{'  MEAN':<{width}} {100 * result['mean']:{wide}.1f}{shares}")
        known = {
            "mean",
            "n",
            "dropped",
            "kinds",
            "intervals",
            "figure",
            "compared",
            *(f"{column}_mean" for column in columns),
        }
        for figure in result:
            if figure not in known and (figure != "overall" or len(result["kinds"]) > 1):
                lines.append(f"  {figure.replace('_', ' ')} {100 * result[figure]:.1f}{_interval(result, figure)}")
        if "mean" in result.get("intervals", {}):
            low, high = result["intervals"]["mean"]
            lines.append(f"  95 % interval of the mean {100 * low:.1f} to {100 * high:.1f}")
        if "majority" in columns or result["dropped"]:
            lines.append(f"  {result['dropped']} records left out because their images occur in training")
        lines.append("")
    return "\n".join(lines)


def _interval(result, figure):
    if figure not in result.get("intervals", {}):
        return ""
    low, high = result["intervals"][figure]
    return f" ({100 * low:.1f} to {100 * high:.1f})"
