"""A recipe on an engine that spreads work over machines: the package datasets, Ray Data, Spark.

A batch of columns becomes the same columns and `nanovlm`, a text of JSON with what the stages found. All stages that
judge one record run so, wherever a row is. What compares records reads the found of all rows, in their order, on one
machine: some hundred bytes a row in place of its pictures.

    found = dataset.map(judge_columns(recipe), batched=True)                                     # datasets
    found = ray_dataset.map_batches(judge_columns(recipe))                                       # Ray Data
    found = frame.mapInPandas(lambda parts: map(judge_columns(recipe), parts), schema)           # Spark
    stages = choose(recipe, found["nanovlm"])                    # of each row "" or the stage that leaves it out

Costly stages run with the others, before anything is compared. Pictures are bytes, or dicts of bytes and path: in
datasets, `cast_column("image", datasets.Image(decode=False))`.
"""

import functools
import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanovlm.data.build.items import Judge, Stage
from nanovlm.data.build.ledger import BATCH, judge_batch
from nanovlm.data.build.recipe import Recipe
from nanovlm.data.build.stages import STAGES
from nanovlm.data.source import Ref

COLUMN = "nanovlm"
CHUNK = 1024  # rows that are compared at a time
_opened: dict[str, dict[str, Judge]] = {}  # the stages of recipes, in this process


def judge_columns(recipe: Recipe, stages: dict[str, Stage] = STAGES) -> Callable[[Any], Any]:
    """Return a function from columns (a dict of lists or arrays, or a DataFrame) to these and what the stages found."""
    return functools.partial(_judge_columns, recipe.validate(stages), stages)


def _judge_columns(recipe: Recipe, stages: dict[str, Stage], columns):
    key = json.dumps([recipe.settings(), list(stages)])
    if key not in _opened:
        _opened[key] = {name: stages[name].open(options) for name, options in recipe.stages.items()}
    values = {name: [plain(value) for value in columns[name]] for name in columns}
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    refs, found = [Ref(0, i, 0, i, "rows", f"row {i}", None) for i in range(len(rows))], []
    for start in range(0, len(refs), BATCH):
        found += judge_batch(
            rows.__getitem__, refs[start : start + BATCH], recipe.options, _opened[key], defaultdict(float)
        )
    texts = np.array([json.dumps(line) for line in found], dtype=object)
    if isinstance(columns, Mapping):
        return {**columns, COLUMN: texts}
    return columns.assign(**{COLUMN: texts})


def plain(value):
    """Return a value as Python has it: arrays are lists."""
    if isinstance(value, np.ndarray | list):
        return [plain(x) for x in value]
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items()}
    return value.item() if isinstance(value, np.generic) else value


def choose(recipe: Recipe, found: Iterable[str], stages: dict[str, Stage] = STAGES) -> Iterator[str]:
    """Yield for each row, in their order, the stage that leaves it out, or "", from what `judge_columns` found."""
    recipe = recipe.validate(stages)
    with tempfile.TemporaryDirectory() as folder:
        compares = {
            name: compare(options, Path(folder))
            for name, options in recipe.stages.items()
            if (compare := stages[name].compare) is not None
        }
        rows, start = iter(found), 0
        for texts in iter(lambda: list(itertools.islice(rows, CHUNK)), []):
            lines = [json.loads(text) for text in texts]
            for name, compare in compares.items():
                left = [i for i, line in enumerate(lines) if "stage" not in line]
                drops = compare.judge([start + i for i in left], [lines[i]["marks"][name] for i in left])
                for i, drop in zip(left, drops, strict=True):
                    lines[i] |= {} if drop is None else {"stage": name}
            yield from (line.get("stage", "") for line in lines)
            start += len(lines)
