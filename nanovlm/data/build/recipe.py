"""A recipe: which records, through which stages, into which shards. As a YAML file, or the same in Python.

```yaml
sources: [photos.jsonl, shards/*.tar]
out: clean
stages:                                # run in this order; the cheap ones first
  text: {min_characters: 3, languages: [en]}
  corrupt:
  size: {min_side: 64}
  leakage: {sources: [benchmark.parquet]}
  exact:
  near: {most_bits: 31}
shards: {format: tar, most_records: 1000}
```

    Recipe(sources=("photos.jsonl",), out="clean", stages={"text": TextOptions(min_characters=3), "exact": None})
"""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, Literal

from nanovlm.config import from_dict
from nanovlm.config.fields import check, check_finite
from nanovlm.data.build.items import Stage
from nanovlm.data.build.reading import ReadConfig
from nanovlm.data.build.stages import STAGES
from nanovlm.data.build.yaml_file import read_yaml, to_config
from nanovlm.data.records import RATINGS
from nanovlm.errors import UserError


@dataclasses.dataclass(frozen=True)
class ShardOptions:
    # tar: WebDataset shards; parquet.
    format: Literal["tar", "parquet"] = "tar"
    # Most records, and about the most bytes, in a shard.
    most_records: int = 1000
    most_bytes: int = 500_000_000


@dataclasses.dataclass(frozen=True)
class Recipe(ReadConfig):
    # What data.sources of train.py takes; several are read one after the other.
    sources: tuple[str, ...] = ()
    # The folder to write.
    out: str = ""
    # Of each stage its options, by its name; None for the defaults. All records have to pass the stage corrupt, which
    # comes first where it is not named.
    stages: dict[str, Any] = dataclasses.field(default_factory=dict)
    shards: ShardOptions = dataclasses.field(default_factory=ShardOptions)
    # Of drawn scenes, hub and saved data sets.
    split: str = "train"
    # How many records to read, from the first on; 0 for all.
    num: int = 0
    # Records that a worker judges at a time, which are lost when it is killed.
    chunk: int = 256
    # Worker processes; 0 works in the process of the command. What is written does not depend on it.
    num_workers: int = 0

    def validate(self, stages: dict[str, Stage] = STAGES) -> "Recipe":
        """Return the recipe with the options of all stages. Raises UserError for the first contradiction."""
        check(self.sources, "sources is empty: name your records, as in sources: [photos.jsonl]")
        check(self.out, "out is empty: name a folder to write, as in out: clean")
        check(self.num >= 0, f"num = {self.num} must be at least 0")
        check(self.chunk >= 1, f"chunk = {self.chunk} must be at least 1")
        check(self.num_workers >= 0, f"num_workers = {self.num_workers} must be at least 0")
        for name in ("most_records", "most_bytes"):
            check(getattr(self.shards, name) >= 1, f"shards.{name} = {getattr(self.shards, name)} must be at least 1")
        self.check_reading()
        named = self.stages if "corrupt" in self.stages else {"corrupt": None} | self.stages
        found = {}
        for name, options in named.items():
            if name not in stages:
                nearest = difflib.get_close_matches(str(name), stages, n=1, cutoff=0)[0]
                raise UserError(f"stages: there is no stage {name!r}; the nearest is {nearest!r}")
            kind = stages[name].options
            options = kind() if options is None else options
            found[name] = options if isinstance(options, kind) else from_dict(kind, options, f"stages.{name}.")
            check_finite(found[name], f"stages.{name}.")
        return dataclasses.replace(self, stages=found)

    @property
    def options(self) -> dict:
        """The keyword arguments of records.check."""
        ratings = self.stages.get("ratings")
        least = {} if ratings is None else {"min_ratings": dict(zip(RATINGS, ratings.least, strict=True))}
        return super().options | least

    def settings(self) -> dict:
        """Return all that decides what is written, as JSON."""
        found = dataclasses.asdict(self) | {"stages": {k: dataclasses.asdict(v) for k, v in self.stages.items()}}
        found["order of stages"] = [*self.stages]  # which dicts that are compared do not tell
        del found["num_workers"], found["out"]
        return json.loads(json.dumps(found))


def read_recipe(path: Path) -> Recipe:
    """Read a YAML file. Raises UserError that names the file, and the field or the place that is wrong."""
    what = "the fields of a recipe, and stages: the options of each by its name"
    data = read_yaml(path, what)
    stages = data.pop("stages", None) or {}
    check(isinstance(stages, dict), f"{path} must hold {what}")
    return dataclasses.replace(to_config(path, Recipe, data), stages=stages)
