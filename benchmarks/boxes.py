"""What the command of docs/data.md learns of boxes and points, in drawn scenes that it never saw.

    python benchmarks/boxes.py            seeds 0 to 2 on one thread, seed 0 on two
    python benchmarks/boxes.py --table    the table of docs/data.md, from the lines that are there

The figures are those of the task scenes_boxes at the end of a run, and of its controls. A run that has its line in
benchmarks/results/boxes.jsonl is not made again while its config stays.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import arguments, pages
from benchmarks.recipes import digest, summarise, train_apart
from benchmarks.speed import append_lines
from nanovlm import cli
from nanovlm.command_line import parse_train
from nanovlm.config import TrainConfig
from nanovlm.environment import describe_environment, git_commit
from nanovlm.files import read_json

RESULTS = cli.PROJECT / "benchmarks" / "results" / "boxes.jsonl"
DOCS = cli.PROJECT / "docs" / "data.md"
TASK = "scenes_boxes"
COMMAND = (
    f"scenes --data.sources scenes:box,point --data.row-length 256 --data.batch-rows 9 --eval.tasks {TASK} "
    "--run-dir runs/boxes"
)
COLUMNS = {"accuracy": "hit", "blank": "grey picture", "shuffled": "another picture", "alone": "no picture"}


@dataclass(frozen=True)
class BoxesConfig:
    # Folder of the runs.
    folder: str = "runs/boxes"
    # Seed and threads of each run.
    runs: tuple[tuple[int, int], ...] = ((0, 1), (1, 1), (2, 1), (0, 2))
    # Only write the table.
    table: bool = False


def main(config: BoxesConfig):
    commit = git_commit()
    for seed, threads in () if config.table else config.runs:
        run_dir = Path(config.folder) / f"seed-{seed}-threads-{threads}"
        about = {"seed": seed, "threads": threads, "config": name_run(seed, threads)}
        if any(about.items() <= line.items() for line in pages.read_lines(RESULTS)):
            continue
        measured = train_apart(make_run(seed, threads, str(run_dir)))
        found = read_json(run_dir / "eval.json")["tasks"][TASK]
        environment = describe_environment(torch.device("cpu"), threads, measured.pop("precision"))
        append_lines(RESULTS, [about | measured | {"found": found, "commit": commit}], environment)
    pages.put(DOCS, "boxes", "boxes.py", format_table(pages.read_lines(RESULTS)))


def make_run(seed: int, threads: int, run_dir: str = "") -> TrainConfig:
    return replace(parse_train(COMMAND.split()), run_dir=run_dir, seed=seed, threads=threads)


def name_run(seed: int, threads: int) -> str:
    return digest(make_run(seed, threads))


def format_table(lines: list[dict]) -> str:
    """Lay out mean, deviation, least and most of the runs, in percent; of equal runs the last line counts."""
    lines = [line for line in lines if line["config"] == name_run(line["seed"], line["threads"])]
    lines = list({(line["seed"], line["threads"]): line for line in lines}.values())
    if not lines:
        return "not measured yet"
    rows = []
    for kind in ("box", "point"):
        shares = ([round(100 * line["found"]["kinds"][kind][name], 1) for line in lines] for name in COLUMNS)
        rows.append([kind, *map(summarise, shares)])
    overlap = summarise([round(100 * line["found"]["box_iou"], 1) for line in lines])
    seconds = summarise([line["seconds"] for line in lines if line["seconds"]])
    asked = f"percent of {lines[0]['found']['n']} questions"
    about = f"({asked}; mean IoU of the boxes {overlap}; {seconds} processor seconds of training)"
    places = dict.fromkeys(f"({pages.where(line)})" for line in lines)
    return "\n".join([pages.lay_out([f"{len(lines)} runs", *COLUMNS.values()], rows), "", about, *places])


if __name__ == "__main__":
    cli.run(lambda: main(arguments.read(BoxesConfig, __doc__)))
