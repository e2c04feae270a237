"""Records with categories -> fewer of them, whose categories come as often as wanted.

No record is written twice. Of N records that are kept, each category gets its share of N, or all that it has where that
is less, and what is then left goes to the others by their shares: the level t of sum(min(count, t * share)) = N.
"""

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from nanovlm.config.fields import check, read_weights
from nanovlm.data.build.carry import Carried, as_line, walk
from nanovlm.data.build.reading import ReadConfig
from nanovlm.data.sources import open_source
from nanovlm.errors import UserError, printable
from nanovlm.files import new_file, write_file


@dataclasses.dataclass(frozen=True)
class BalanceConfig(ReadConfig):
    # The records, as data.sources of train.py takes them; each has a `category`, as data.build label writes it.
    source: str
    # The file to write, .jsonl.
    out: Path
    # How many records to keep; 0 for as many as have exactly the wanted shares.
    num: int = 0
    # Shares of categories, name=weight; others have weight 1. Without any, all are equal.
    weights: tuple[str, ...] = ()
    # Levels of a category that count: 2 for animals/dogs, 1 for animals.
    levels: int = 2
    # Seed of the choice.
    seed: int = 0

    def validate(self):
        """Raise UserError for the first contradiction."""
        check(self.out.suffix == ".jsonl", f"{self.out} must end in .jsonl: a line is a record")
        check(not self.out.exists(), f"{self.out} is there already: name another file, or remove it")
        check(self.num >= 0, f"--num {self.num} must be at least 0")
        check(self.levels in (1, 2), f"--levels {self.levels} must be 1 or 2")
        self.check_reading()


def main(config: BalanceConfig):
    """Write a choice of records whose categories are balanced."""
    config.validate()
    source = open_source(config.source, allow_urls=config.allow_urls)
    weights = read_weights(config.weights, "--weights", "animals/dogs=2")
    if bad := [name for name, weight in weights.items() if weight < 0]:
        raise UserError(f"--weights {bad[0]}={weights[bad[0]]:g} must be at least 0")
    numbers: dict[str, list[int]] = defaultdict(list)
    for carried in tqdm(walk(source, config.options), desc="counting", unit="record"):
        numbers[category_of(carried, config.levels)].append(carried.number)
    counts = {name: len(found) for name, found in sorted(numbers.items())}
    check(counts, f"{config.source} has no record that can be read")
    if unknown := sorted(weights.keys() - counts.keys()):
        raise UserError(f"--weights names {unknown[0]!r}, which no record has; there are {', '.join(counts)[:300]}")
    kept = share_out(counts, {name: weights.get(name, 1.0) for name in counts}, config.num)
    chosen = {number for name, num in kept.items() for number in draw(numbers[name], num, config.seed)}
    with new_file(config.out) as file:
        for carried in tqdm(walk(source, config.options, is_told=False), desc="writing", unit="record"):
            if carried.number in chosen:
                file.write(json.dumps(as_line(carried)).encode() + b"\n")
    report = {name: {"before": counts[name], "after": kept[name]} for name in counts}
    write_file(config.out.with_suffix(".report.json"), json.dumps(report, indent=2) + "\n")
    for name in counts:
        print(f"{printable(name, 40):>30}  {kept[name]} of {counts[name]}")
    print(f"wrote {config.out}: {len(chosen)} of {sum(counts.values())} records")


def category_of(carried: Carried, levels: int) -> str:
    category = carried.raw.get("category")
    if not isinstance(category, str) or not category:
        raise UserError(f"record {carried.number} has no category: let python -m nanovlm.data.build label write it")
    return "/".join(category.split("/")[:levels])


def share_out(counts: Mapping[str, int], weights: Mapping[str, float], num: int) -> dict[str, int]:
    """Return how many of each category to keep.

    Whole numbers by largest remainders, ties by name. With num 0, the most of which each has exactly its share.
    """
    wanted = {name: weight for name, weight in weights.items() if weight > 0}
    check(wanted, "--weights leaves no category a share")
    level = min(counts[name] / weight for name, weight in wanted.items())
    full: Counter[str] = Counter()  # of which all is kept
    num = min(num, sum(counts[name] for name in wanted))
    while num:  # at most once a category
        left = {name: weight for name, weight in wanted.items() if name not in full}
        level = (num - full.total()) / sum(left.values()) if left else 0.0
        if not (more := [name for name, weight in left.items() if level * weight >= counts[name]]):
            break
        full.update({name: counts[name] for name in more})
    exact = {name: float(full.get(name, level * weights[name])) for name in counts}
    kept = {name: int(value + 1e-9) for name, value in exact.items()}
    rest = num - sum(kept.values()) if num else 0
    order = sorted(wanted, key=lambda name: (kept[name] - exact[name], name))
    for name in [name for name in order if kept[name] < counts[name]][:rest]:
        kept[name] += 1
    return kept


def draw(numbers: list[int], num: int, seed: int) -> list[int]:
    """Return `num` of the numbers of records, the same for a seed whatever else is chosen."""
    return sorted(numbers, key=lambda number: hashlib.sha256(f"{seed} {number}".encode()).digest())[:num]
