"""Projectors, fusions and what of the decoder learns, side by side on drawn scenes; an encoder by contrast or none.

    python benchmarks/fusion.py measure    every projector, fusion and way to tune, on three seeds
    python benchmarks/fusion.py encoder    the preset scenes, from the encoder of scenes_siglip and from nothing
    python benchmarks/fusion.py draw       docs/fusion.png and docs/from_siglip.png, from the lines of both
    python benchmarks/fusion.py table      the tables of docs/architectures.md, with links to the pictures

Does it hold in small what Idefics2 found (Laurençon et al. 2024, arXiv 2405.02246): that cross-attention is better
where the backbones are frozen, and the sequence where they are tuned? All cells of a seed begin with one image encoder,
trained by contrast (scenes_siglip), and one language model, trained on questions about scenes that are described in
words: it never had a picture. They see the same scenes in the same steps, at a rate that stays constant after the
warm-up, so that a curve tells at each of its points what a run of that length gives. A line of each goes to
benchmarks/results/fusion.jsonl; a cell that has its line is not run again while its config stays.
benchmarks/fusion_cells.py trains a cell.
"""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import arguments, fusion_report, pages
from benchmarks.fusion_cells import (
    CELLS,
    Cell,
    FusionBenchConfig,
    digest,
    encoder_dir,
    language_dir,
    make_language,
    name_encoder_run,
    train_cell,
    write_texts,
)
from benchmarks.speed import append_lines
from nanovlm import cli
from nanovlm.environment import git_commit
from nanovlm.errors import UserError
from nanovlm.files import read_json, write_file

RESULTS = cli.PROJECT / "benchmarks" / "results" / "fusion.jsonl"

# --- backbones --------------------------------------------------------------------------------------------------------


def train_encoder(config: FusionBenchConfig, seed: int) -> Path:
    """Train the encoder of a seed by contrast, or go on where it was stopped; return the folder of its run."""
    run_dir = encoder_dir(config, seed)
    if not (run_dir / "eval.json").exists():
        options = ["--run-dir", run_dir, "--seed", seed, "--threads", config.threads]
        run(cli.PROJECT / "train.py", "scenes_siglip", *options, "--optim.steps", config.encoder_steps)
    return run_dir


def run(*command):
    """Run a script of the project, or raise UserError with the end of what it said."""
    ended = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"{' '.join(map(str, command))} failed: {ended.stderr[-2000:]}")


# --- subjects ---------------------------------------------------------------------------------------------------------


def main(config: FusionBenchConfig):
    if config.worker:
        return work(replace(config, folder=Path(config.folder)))
    SUBJECTS[config.subject](config)


def work(config: FusionBenchConfig):
    """Do what one process of its own does: train the language model of a seed, or a cell of it, and print its line."""
    (seed,) = config.seeds
    if config.worker == "language":
        import train

        run = make_language(config, write_texts(config), seed)
        train.main(replace(run, run_dir=str(language_dir(config, seed))))
    else:
        cell = next(cell for cell in CELLS if cell.name == config.worker)
        write_file(config.folder / "line.json", json.dumps(train_cell(config, cell, seed)))


def measure(config: FusionBenchConfig):
    """Run the cells that have no line yet."""
    commit, cells = git_commit(), [cell for cell in CELLS if re.search(config.cells, cell.name)]
    results = config.folder / "tried.jsonl" if config.rate else RESULTS
    if not cells:
        raise UserError(f"--cells {config.cells!r} is found in no name, such as {CELLS[0].name!r}")
    with tqdm(total=len(config.seeds) * len(cells), unit="cell") as progress:
        for seed in config.seeds:
            for cell in cells:
                progress.set_postfix_str(f"seed {seed}: {cell.name}")
                about = {"subject": "fusion", "cell": dataclasses.asdict(cell), "seed": seed}
                about |= {"config": digest(config, cell, seed), "commit": commit}
                if not is_done(about, results):
                    train_encoder(config, seed)
                    start(config, seed, "language")
                    start(config, seed, cell.name)
                    with progress.external_write_mode():
                        append_lines(results, [about], read_json(config.folder / "line.json"))
                progress.update()


def start(config: FusionBenchConfig, seed: int, worker: str):
    """Run a worker; the language model of a seed that is there stays."""
    options = dataclasses.asdict(replace(config, seeds=(seed,), worker=worker)) | {"folder": str(config.folder)}
    if worker != "language" or not (language_dir(config, seed) / "eval.json").exists():
        run(__file__, "--json", json.dumps(options))


def is_done(about: dict, results: Path) -> bool:
    """Whether there is a line of the same run, of whichever commit."""
    about = {name: x for name, x in about.items() if name != "commit"}
    return any(about.items() <= line.items() for line in pages.read_lines(results))


def measure_encoder(config: FusionBenchConfig):
    """Train the preset scenes from the encoder that contrast trained, and from nothing, and keep both curves."""
    commit = git_commit()
    looks = ["--eval.every", max(1, config.scenes_steps // 19), "--eval.tasks", "scenes", "--eval.limit", 64]
    ways = list(itertools.product(config.seeds, ("nothing", "contrast")))
    for seed, way in tqdm(ways, unit="run"):
        about = {"subject": "encoder", "encoder": way, "seed": seed}
        about |= {"config": name_encoder_run(config), "threads": config.threads}
        if is_done(about, RESULTS):
            continue
        encoder, run_dir = train_encoder(config, seed), config.folder / f"scenes_{way}_{seed}_{config.scenes_steps}"
        vision = ["--init.vision", encoder / "model"] if way == "contrast" else []
        options = ["--seed", seed, "--threads", config.threads, "--eval.best", "none", "--eval.no-controls"]
        options += ["--optim.steps", config.scenes_steps, *looks, *vision]
        run(cli.PROJECT / "train.py", "scenes", "--run-dir", run_dir, *options)
        metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
        curve = [
            {"step": x["step"], "seconds": round(x["elapsed_s"], 1), "accuracy": round(100 * x["accuracy_scenes"], 2)}
            for x in metrics
            if "accuracy_scenes" in x
        ]
        results, own = read_json(run_dir / "eval.json"), read_json(encoder / "eval.json")
        said = {"curve": curve, "encoder_seconds": own["train_seconds"] if way == "contrast" else 0.0}
        append_lines(RESULTS, [about | said | {"commit": commit}], results["environment"])


def read_lines() -> list[dict]:
    """Return the lines of the benchmark as it is: of what was run with other settings none is in the tables."""
    base = FusionBenchConfig("measure")
    names = {
        "fusion": lambda x: digest(base, Cell(**x["cell"]), x["seed"]),
        "encoder": lambda x: name_encoder_run(base),
    }
    return [line for line in pages.read_lines(RESULTS) if line["config"] == names[line["subject"]](line)]


SUBJECTS = {
    "measure": measure,
    "encoder": measure_encoder,
    "draw": lambda config: fusion_report.draw(read_lines()),
    "table": lambda config: fusion_report.write_tables(read_lines()),
}

if __name__ == "__main__":
    cli.run(lambda: main(arguments.read(FusionBenchConfig, __doc__)))
