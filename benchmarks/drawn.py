"""What the commands of docs/data.md learn of boxes, points and clips, in drawn scenes that they never saw.

    python benchmarks/drawn.py boxes    seeds 0 to 2 on one thread, seed 0 on two
    python benchmarks/drawn.py video    one seed, which takes 22 minutes on one thread; starts from the model of --demo
    python benchmarks/drawn.py table    the tables of docs/data.md, from the lines that are there

The figures are those of the command's task at the end of a run, and of its controls. A run that has its line in
benchmarks/results/drawn.jsonl is not made again while its config stays; one that was stopped goes on.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import pages
from benchmarks.recipes import digest, summarise, train_apart
from benchmarks.speed import append_lines
from nanovlm import cli
from nanovlm.command_line import parse_train
from nanovlm.config import TrainConfig
from nanovlm.environment import describe_environment, git_commit
from nanovlm.files import read_json

RESULTS = cli.PROJECT / "benchmarks" / "results" / "drawn.jsonl"
DOCS = cli.PROJECT / "docs" / "data.md"
DEMO = "runs/demo/model"
START = f"--init.model {DEMO} "
# Each as it stands on the page; tests/test_layout.py compares.
COMMANDS = {
    "boxes": "scenes --data.sources scenes:box,point --data.row-length 256 --data.batch-rows 9 "
    "--eval.tasks scenes_boxes --run-dir runs/boxes",
    "video": f"scenes {START}--data.sources scenes_video scenes:position,shape "
    "--data.weights 3 1 --model.video-prompt times --data.row-length 512 --data.batch-rows 8 --optim.lr 3e-3 "
    "--optim.steps 4000 --eval.tasks scenes_video --run-dir runs/video",
}
# Seed and threads of each run.
RUNS = {"boxes": ((0, 1), (1, 1), (2, 1), (0, 2)), "video": ((0, 1),)}
CONTROLS = {"blank": "grey picture", "shuffled": "another picture", "still": "middle frame", "alone": "no picture"}


@dataclass(frozen=True)
class DrawnConfig:
    # What to measure, or the tables of what was measured.
    subject: Annotated[Literal["boxes", "video", "table"], tyro.conf.Positional]
    # Folder of the runs.
    folder: str = "runs/drawn"
    # The model of the preset scenes that runs of clips start from.
    demo: str = DEMO


def main(config: DrawnConfig):
    commit = git_commit()
    for seed, threads in RUNS.get(config.subject, ()):
        run_dir = Path(config.folder) / f"{config.subject}-seed-{seed}-threads-{threads}"
        about = {"seed": seed, "threads": threads, "config": name_run(config.subject, seed, threads)}
        if any(about.items() <= line.items() for line in pages.read_lines(RESULTS)):
            continue
        run = make_run(config.subject, seed, threads, f"--init.model {config.demo} ")
        measured = train_apart(replace(run, run_dir=str(run_dir)))
        [found] = read_json(run_dir / "eval.json")["tasks"].values()
        environment = describe_environment(torch.device("cpu"), threads, measured.pop("precision"))
        append_lines(RESULTS, [about | measured | {"found": found, "commit": commit}], environment)
    for subject, table in tables(pages.read_lines(RESULTS)).items():
        pages.put(DOCS, subject, "drawn.py", table)


def make_run(subject: str, seed: int, threads: int, start: str) -> TrainConfig:
    return replace(parse_train(COMMANDS[subject].replace(START, start).split()), seed=seed, threads=threads)


def name_run(subject: str, seed: int, threads: int) -> str:
    """Name a run by its config; where it starts is no part of it, as that model need not be there any more."""
    return digest(make_run(subject, seed, threads, start=""))


def tables(lines: list[dict]) -> dict[str, str]:
    """Lay out the runs of each subject; of equal runs the last line counts."""
    found = {subject: {} for subject in COMMANDS}
    for line in lines:
        for subject in COMMANDS:
            key = line["seed"], line["threads"]
            if key in RUNS[subject] and line["config"] == name_run(subject, *key):
                found[subject][key] = line
    return {subject: format_table(list(of.values())) if of else "not measured yet" for subject, of in found.items()}


def format_table(lines: list[dict]) -> str:
    """Lay out mean, deviation, least and most of runs of one command, in percent."""
    first, rows = lines[0]["found"], []
    shown = {name: title for name, title in CONTROLS.items() if f"{name}_mean" in first}
    for kind in first["kinds"]:
        of_runs = [line["found"]["kinds"][kind] for line in lines]
        shares = ([round(100 * each[name], 1) for each in of_runs] for name in ("accuracy", *shown))
        rows.append([f"{kind} ({first['kinds'][kind]['n']} questions)", *map(summarise, shares)])
    header = [f"{len(lines)} runs, percent" if len(lines) > 1 else "one run, percent", "right", *shown.values()]
    about = []
    if "box_iou" in first:
        about.append("mean IoU of the boxes " + summarise([round(100 * line["found"]["box_iou"], 1) for line in lines]))
    if seconds := [line["seconds"] for line in lines if line["seconds"]]:
        about.append(f"{summarise(seconds)} processor seconds of training")
    places = dict.fromkeys(pages.where(line) for line in lines)
    return "\n".join([pages.lay_out(header, rows), "", *(f"({text})" for text in ("; ".join(about), *places) if text)])


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(DrawnConfig, description=__doc__)))
