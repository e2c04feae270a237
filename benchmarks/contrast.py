"""What the preset scenes_siglip learns: retrieval, zero-shot classes and probes, on scenes that it never saw.

    python benchmarks/contrast.py            seeds 0 to 2 on one thread, seed 0 on two
    python benchmarks/contrast.py --table    the table of docs/architectures.md, from the lines that are there

The figures are those of `python -m nanovlm.eval.dual --train scenes`, on scenes of two splits: test, and
compositional, whose pairs of color and shape no training scene has. A run that has its line in
benchmarks/results/contrast.jsonl is not made again while the preset stays.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import arguments, pages
from benchmarks.pages import read_lines, where
from benchmarks.recipes import digest, summarise, train_apart
from benchmarks.speed import append_lines
from nanovlm import cli
from nanovlm.config import TrainConfig
from nanovlm.environment import describe_environment, git_commit
from nanovlm.eval import dual
from nanovlm.presets import scenes_siglip

RESULTS = cli.PROJECT / "benchmarks" / "results" / "contrast.jsonl"
DOCS = cli.PROJECT / "docs" / "architectures.md"
# What eval/dual.py finds, and its name in the table.
ROWS = {
    ("retrieval", "image_to_text_1"): "the text of a picture, recall@1",
    ("retrieval", "image_to_text_5"): "recall@5",
    ("retrieval", "image_to_text_10"): "recall@10",
    ("retrieval", "text_to_image_1"): "the picture of a text, recall@1",
    ("retrieval", "text_to_image_5"): "recall@5",
    ("retrieval", "text_to_image_10"): "recall@10",
    ("classes", "zero_shot_top_1"): "zero-shot, color and shape of one object, top 1",
    ("classes", "zero_shot_top_5"): "top 5",
    ("classes", "knn_top_1"): "k-NN, top 1",
    ("classes", "linear_top_1"): "linear probe, top 1",
}


@dataclass(frozen=True)
class ContrastConfig:
    # Folder of the runs.
    folder: str = "runs/contrast"
    # Seed and threads of each run.
    runs: tuple[tuple[int, int], ...] = ((0, 1), (1, 1), (2, 1), (0, 2))
    # Only write the table.
    table: bool = False


def main(config: ContrastConfig):
    commit, splits = git_commit(), tuple(dual.SPLITS)
    for seed, threads in () if config.table else config.runs:
        run_dir = Path(config.folder) / f"seed-{seed}-threads-{threads}"
        about = {"seed": seed, "threads": threads, "config": name_run(seed, threads)}
        if any(about.items() <= line.items() for line in read_lines(RESULTS)):
            continue
        measured = train_apart(make_run(seed, threads, str(run_dir)))
        torch.set_num_threads(threads)
        found = dual.main(dual.DualEvalConfig(str(run_dir / "model"), splits, splits, train="scenes"))
        environment = describe_environment(torch.device("cpu"), threads, measured.pop("precision"))
        append_lines(RESULTS, [about | measured | {"found": found, "commit": commit}], environment)
    pages.put(DOCS, "contrast", "contrast.py", format_table(read_lines(RESULTS)))


def make_run(seed: int, threads: int, run_dir: str = "") -> TrainConfig:
    return replace(scenes_siglip(), run_dir=run_dir, seed=seed, threads=threads)


def name_run(seed: int, threads: int) -> str:
    return digest(make_run(seed, threads))


def format_table(lines: list[dict]) -> str:
    """Lay out mean, deviation, least and most of the preset's runs, in percent; of equal runs the last line counts."""
    lines = [line for line in lines if line["config"] == name_run(line["seed"], line["threads"])]
    lines = list({(line["seed"], line["threads"]): line for line in lines}.values())
    if not lines:
        return "not measured yet"
    text = [f"| {len(lines)} runs | {' | '.join(dual.SPLITS.values())} |", "|---" * (1 + len(dual.SPLITS)) + "|"]
    for (task, figure), name in ROWS.items():
        found = ([line["found"][f"{spec}, {task}"][figure] for line in lines] for spec in dual.SPLITS)
        of_splits = [summarise([round(100 * share, 1) for share in shares]) for shares in found]
        if figure.startswith(("knn", "linear")):  # which know the classes of training alone
            of_splits[1:] = [""]
        text.append(f"| {name} | {' | '.join(of_splits)} |")
    counts = {f"{lines[0]['found'][f'{spec}, retrieval']['n']} of {split}" for spec, split in dual.SPLITS.items()}
    seconds = summarise([line["seconds"] for line in lines if line["seconds"]])
    text += ["", f"(percent; scenes: {', '.join(sorted(counts))}; {seconds} processor seconds of training)"]
    return "\n".join([*text, *dict.fromkeys(f"({where(line)})" for line in lines)])


if __name__ == "__main__":
    cli.run(lambda: main(arguments.read(ContrastConfig, __doc__)))
