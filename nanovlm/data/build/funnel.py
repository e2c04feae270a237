"""Run a recipe: records of a source -> those that pass all stages, in shards, and a report of what was left out.

```
records --[ text, corrupt, size, marks ]--> exact --> near --[ agreement ]--> caps --> shards
             step 0: each by itself,       step 1   step 2     step 3        step 4
             by worker processes           compare marks in order
```

The source is cut into chunks. A step writes a file for each chunk, the ledger, with a line for every record that came
to it: kept, or dropped and why. A file is there whole or not at all, and depends on the recipe and the source alone: so
what is written does not depend on the workers, and a run that was killed goes on and loses the chunks, or the shards,
that were being made. Memory holds a chunk for each worker; of what is compared, digests are in a file, and hashes take
about 100 bytes a picture.

```
OUT/shard-00000.tar ...  index.json      what passed; the index is written last
OUT/dropped.jsonl                        a line for each record that did not, with the stage and the reason
OUT/report.md  report.json  *.png        the counts, and pictures of what was dropped
OUT/.work/settings.json  N/NNNNNN.jsonl  the recipe and the ledger of step N, while the run has not ended
```
"""

import dataclasses
import itertools
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from nanovlm.data.build.items import Compare, Drop, Item, Judge, Stage, read_item
from nanovlm.data.build.ledger import BATCH, as_dropped, check_unchanged, is_whole, judge_batch, read_lines, write_lines
from nanovlm.data.build.recipe import Recipe, read_recipe
from nanovlm.data.build.report import Report
from nanovlm.data.build.settings import keep_settings
from nanovlm.data.build.shards import describe_shard, to_written, write_shard
from nanovlm.data.build.stages import STAGES
from nanovlm.data.build.workers import work_all
from nanovlm.data.shard_index import KIND
from nanovlm.data.source import Ref, Source, first_pass
from nanovlm.data.sources import open_sources
from nanovlm.environment import find_device
from nanovlm.errors import UserError
from nanovlm.files import lock, new_file, write_file


class Step(NamedTuple):
    """Stages that judge each record by itself, or one that compares the marks of all."""

    judged: tuple[str, ...] = ()
    compared: str = ""


def plan(names: Iterable[str], stages: dict[str, Stage]) -> list[Step]:
    """Cut the stages of a recipe into steps."""
    steps, judged, compared = [], [], []

    def end():
        steps.extend([Step(tuple(judged)), *(Step(compared=name) for name in compared)])
        judged.clear()
        compared.clear()

    for name in names:
        if compared and (stages[name].compare is None or stages[name].is_costly):
            end()
        judged.append(name)
        if stages[name].compare is not None:
            compared.append(name)
    end()
    return steps


def run(recipe: Recipe, stages: dict[str, Stage] = STAGES) -> dict:
    """Make the data set of a recipe, or go on with it, and return the report. Raises UserError for what is wrong."""
    recipe = recipe.validate(stages)
    torch.set_num_threads(1)  # with more, sums of a model would be rounded in another way
    source = open_sources(recipe.sources, split=recipe.split, shuffle=False, allow_urls=recipe.allow_urls)
    with lock(Path(recipe.out)) as out:
        if (out / "index.json").exists():
            raise UserError(f"{out} is written already: name another folder, or remove it")
        work = out / ".work"
        take_up(work, recipe, stages, source)
        funnel = Funnel(recipe, stages, source, work)
        for step in range(len(funnel.steps)):
            funnel.take(step)
        report = write_shards(funnel, out)
        shutil.rmtree(work)
    return report


def take_up(work: Path, recipe: Recipe, stages: dict[str, Stage], source: Source):
    """Begin a run, or make sure that the one that is there was begun with the same recipe and as many records."""
    settings = recipe.settings() | {"records": len(source) if isinstance(source, Sized) else None}
    for name, options in recipe.stages.items():
        if (digest := stages[name].digest) is not None:
            settings[f"what stages.{name} names"] = digest(options)
    path = work / "settings.json"
    others = sorted(file for file in work.parent.iterdir() if not file.name.startswith("."))
    if others and not path.exists():  # perhaps records, which an index would hide from whoever reads the folder
        raise UserError(f"{others[0]} is there, and nothing tells of which recipe: name a new or empty folder as out")
    work.mkdir(exist_ok=True)
    keep_settings(path, settings, "another recipe or source", has_written=any(work.glob("*/*.jsonl")))


class Funnel:
    """What is read, and through which steps."""

    def __init__(self, recipe: Recipe, stages: dict[str, Stage], source: Source, work: Path):
        self.recipe, self.stages, self.source, self.work = recipe, stages, source, work
        self.steps, self.seconds = plan(recipe.stages, stages), defaultdict(float)

    def chunks(self) -> Iterator[tuple[int, list[Ref]]]:
        """Yield the refs of each chunk, in the order of the source."""
        refs = (ref._replace(after=None) for ref in itertools.islice(first_pass(self.source), self.recipe.num or None))
        return enumerate(iter(lambda: list(itertools.islice(refs, self.recipe.chunk)), []))

    def ledger(self, step: int, chunk: int) -> Path:
        return self.work / str(step) / f"{chunk:06d}.jsonl"

    def progress(self, step: int, what: str) -> tqdm:
        total = len(self.source) if isinstance(self.source, Sized) else None
        total = min(total, self.recipe.num or total) if total is not None else self.recipe.num or None
        return tqdm(total=total, desc=f"{step + 1}/{len(self.steps) + 1} {what}", unit="record")

    def take(self, step: int):
        """Take a step with the chunks for which that was not done yet."""
        (self.work / str(step)).mkdir(exist_ok=True)
        judged, compared = self.steps[step]
        missing = ((chunk, refs) for chunk, refs in self.chunks() if not is_whole(self.ledger(step, chunk)))
        first = next(missing, None)
        if first is None:
            return
        with self.progress(step, compared or ", ".join(judged)) as progress:
            if compared:
                compare = self.stages[compared].compare
                assert compare is not None
                self.compare(step, compare(self.recipe.stages[compared], self.work), progress)
                return
            progress.update(first[0] * self.recipe.chunk)
            judges = {name: self.stages[name].open(self.recipe.stages[name]) for name in judged}
            devices = [find_device(vars(self.recipe.stages[name]).get("device", "cpu")) for name in judged]
            is_on_cpu = all(device.type == "cpu" for device in devices)
            worker, jobs = Worker(self, step, judges), itertools.chain([first], missing)
            for num, seconds in work_all(worker, jobs, self.recipe.num_workers if is_on_cpu else 0):
                for name, some in seconds.items():
                    self.seconds[name] += some
                progress.update(num)

    def compare(self, step: int, compare: Compare, progress: tqdm):
        """Compare the marks of all records, chunk by chunk."""
        name = self.steps[step].compared
        for chunk, refs in self.chunks():
            start, path = time.process_time(), self.ledger(step, chunk)
            lines = [line for line in read_lines(self.ledger(step - 1, chunk)) if "stage" not in line]
            marks = {line["number"]: line["marks"].pop(name) for line in lines}
            if is_whole(path):
                kept = [line["number"] for line in read_lines(path) if "stage" not in line]
                compare.add(kept, [marks[number] for number in kept])
            else:
                drops = compare.judge(list(marks), list(marks.values()))
                write_lines(
                    path, [as_dropped(line, name, x) if x else line for line, x in zip(lines, drops, strict=True)]
                )
            self.seconds[name] += time.process_time() - start
            progress.update(len(refs))

    def results(self) -> Iterator[tuple[Ref, dict]]:
        """Yield each record that was read with the last line that a ledger has about it."""
        for chunk, refs in self.chunks():
            last = {}
            for step in range(len(self.steps)):
                last |= {line["number"]: line for line in read_lines(self.ledger(step, chunk))}
            assert list(last) == [ref.number for ref in refs], f"chunk {chunk} lost records"
            yield from ((ref, last[ref.number]) for ref in refs)


class Worker(Dataset):
    """Judges chunks, in a worker process or not; returns how many records they have, and the seconds of each stage."""

    def __init__(self, funnel: Funnel, step: int, judges: dict[str, Judge]):
        self.funnel, self.step, self.judges = funnel, step, judges

    def __getitem__(self, job: tuple[int, list[Ref]]) -> tuple[int, dict[str, float]] | str:
        chunk, refs = job
        funnel, seconds, lines = self.funnel, defaultdict(float), []
        before = None
        if self.step:
            before = {line["number"]: line for line in read_lines(funnel.ledger(self.step - 1, chunk))}
            refs = [ref for ref in refs if "stage" not in before.get(ref.number, {"stage": ""})]
        for start in range(0, len(refs), BATCH):
            part = refs[start : start + BATCH]
            lines += judge_batch(funnel.source.read, part, funnel.recipe.options, self.judges, seconds, before)
        write_lines(funnel.ledger(self.step, chunk), lines)
        return len(job[1]), dict(seconds)


def write_shards(funnel: Funnel, out: Path) -> dict:
    """Write the shards, what was dropped, the report and then the index; return the report."""
    recipe = funnel.recipe
    worded = {name for name in recipe.stages if funnel.stages[name].shows_words}
    report = Report(tuple(recipe.stages), worded, funnel.source, recipe.options)
    with new_file(out / "dropped.jsonl") as dropped, funnel.progress(len(funnel.steps), "shards") as progress:

        def kept() -> Iterator[tuple[Ref, dict]]:
            for ref, line in funnel.results():
                report.count(ref, line)
                progress.update()
                if "stage" not in line:
                    yield ref, line
                else:
                    about = {"source": ref.source, "where": ref.where, **line}
                    dropped.write(json.dumps(about).encode() + b"\n")

        writer = Writer(funnel, out)
        shards = list(work_all(writer, enumerate(cut(kept(), recipe)), recipe.num_workers))
    index = {"__kind__": KIND} if recipe.shards.format == "tar" else {}  # by which a folder is read as shards
    index |= {"wids_version": 1, "shardlist": shards, "records": report.kept, "recipe": recipe.settings()}
    found = report.write(out, funnel.seconds)
    if not report.kept:
        raise UserError(
            f"none of {report.num} records passed all stages: {out / 'report.md'} says where they were lost"
        )
    write_file(out / "index.json", json.dumps(index, indent=2) + "\n")
    return found


def cut(kept: Iterable[tuple[Ref, dict]], recipe: Recipe) -> Iterator[list[tuple[Ref, dict]]]:
    """Cut records into shards of at most so many records and about so many bytes."""
    shard, size = [], 0
    for ref, line in kept:
        if shard and (len(shard) == recipe.shards.most_records or size + line["bytes"] > recipe.shards.most_bytes):
            yield shard
            shard, size = [], 0
        shard.append((ref, line))
        size += line["bytes"]
    if shard:
        yield shard


class Writer(Dataset):
    """Writes shards, in a worker process or not; returns what the index has of each."""

    def __init__(self, funnel: Funnel, out: Path):
        self.funnel, self.out, self.names = funnel, out, list(funnel.recipe.stages)

    def __getitem__(self, job: tuple[int, list[tuple[Ref, dict]]]) -> dict:
        number, records = job
        path = self.out / f"shard-{number:05d}.{self.funnel.recipe.shards.format}"
        if not path.exists():
            write_shard(path, (self.read(ref, line) for ref, line in records))
        return describe_shard(path, len(records))

    def read(self, ref: Ref, line: dict):
        item = read_item(self.funnel.source.read, ref, self.funnel.recipe.options)
        check_unchanged([ref], [] if isinstance(item, Drop) else [item], {ref.number: line | {"marks": {}}})
        assert isinstance(item, Item)
        about = {"source": ref.source, "where": ref.where, "number": ref.number, "content": line["content"]}
        about |= {"stages": self.names, "scores": line["scores"]}
        return to_written(item, about, self.funnel.recipe.shards.format)


@dataclasses.dataclass(frozen=True)
class RecipeConfig:
    # The recipe, a YAML file.
    recipe: Path
    # The folder to write, in place of that of the recipe.
    out: str = ""
    # Worker processes, in place of those of the recipe; what is written does not depend on it.
    num_workers: int = -1
    # How many records to read, in place of the number of the recipe.
    num: int = -1


def main(config: RecipeConfig):
    """Make the data set of a recipe, or go on where it was ended."""
    recipe = read_recipe(config.recipe)
    changes = {name: value for name in ("num_workers", "num") if (value := getattr(config, name)) >= 0}
    recipe = dataclasses.replace(recipe, **changes, out=config.out or recipe.out)
    report = run(recipe)
    for name, number in report["dropped"].items():
        print(f"{name:>12}  {number} left out")
    print(f"wrote {recipe.out}: {report['kept']} of {report['read']} records; {recipe.out}/report.md says more")
