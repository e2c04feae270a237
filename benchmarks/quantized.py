"""Ask a trained scenes model, and the same with quantised weights, about held-out scenes.

    make demo test && .venv/bin/python benchmarks/quantized.py runs/demo

Writes benchmarks/results/quantized.json: for each format the accuracy as eval.run counts it, how many answers are those
of fp32, the bytes that a weight of the quantised layers takes, and the size of the file.
"""

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nanovlm
import train
from benchmarks.scenes import TASKS
from nanovlm import cli
from nanovlm.config import QuantizationConfig
from nanovlm.eval.run import answer
from nanovlm.eval.scores import average
from nanovlm.eval.tasks import open_task, read_questions
from nanovlm.files import read_json, write_file
from nanovlm.hub.model_folder import save_model
from nanovlm.model.quantized import QuantizedLinear, quantize

RESULT = Path(__file__).resolve().parent / "results" / "quantized.json"
# Most points of accuracy that a format may lose.
GOALS = {"int8": 0.5, "int4": 3.0, "nf4": 3.0}


@dataclass(frozen=True)
class QuantizedBenchmarkConfig:
    # Folder of a finished run of the scenes.
    run_dir: Annotated[Path, tyro.conf.Positional]
    # Held-out scenes a split, each with a question of every kind.
    scenes: int = 512
    # int4: weights in a group.
    group_size: int = 64
    # Try smaller ranges for every group of weights; without, nearest codes in the whole range.
    search: bool = True
    # CPU threads.
    threads: int = 1


def main(config: QuantizedBenchmarkConfig):
    torch.set_num_threads(config.threads)
    tasks = {split: open_task(name, config.scenes) for split, name in TASKS.items()}
    rows, fp32_answers = [], None
    for format in ("fp32", *GOALS):
        model, processor = nanovlm.load(config.run_dir / "model", dtype=torch.float32)
        if format != "fp32":
            quantize(model, QuantizationConfig(format, config.group_size), config.search)
        row, answers = {"format": format} | measure_size(model, processor), []
        for split, task in tasks.items():
            questions = read_questions(task)
            answers.append(answer(model, processor, questions, title=split))
            figures = average(task, questions, answers[-1])
            row[f"{split} caption exact"] = figures["caption_exact"]["caption"]
            row[f"{split} mean"] = statistics.mean(figures["accuracy"].values())
        fp32_answers = fp32_answers or answers
        same = [a == b for x, y in zip(answers, fp32_answers, strict=True) for a, b in zip(x, y, strict=True)]
        row["answers as in fp32"] = sum(same) / len(same)
        if format != "fp32":
            row["points lost"] = 100 * (rows[0]["test mean"] - row["test mean"])
            row["goal met"] = row["points lost"] <= GOALS[format]
        rows.append(row)
        print(json.dumps(row))
    result = {
        "formats": rows,
        "scenes a split": config.scenes,
        "int4 group": config.group_size,
        "search": config.search,
        "trained at commit": read_json(config.run_dir / "config.json")["commit"],
        "environment": train.describe_environment(torch.device("cpu"), config.threads, "fp32"),
    }
    write_file(RESULT, json.dumps(result, indent=2) + "\n")


def measure_size(model, processor) -> dict[str, float]:
    """Bytes of the decoder's linear layers for each of their weights, and of the model's file."""
    layers = [m for m in model.decoder.layers.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    weights = sum(m.weight.numel() if isinstance(m, nn.Linear) else m.shape[0] * m.shape[1] for m in layers)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", model, processor)
        file = (Path(folder) / "model" / "model.safetensors").stat().st_size
    return {
        "bytes a weight": sum(t.nbytes for m in layers for t in m.state_dict().values()) / weights,
        "quantised weights": weights,
        "all weights": model.count_parameters()[0] + (0 if isinstance(layers[0], nn.Linear) else weights),
        "file bytes": file,
    }


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(QuantizedBenchmarkConfig, description=__doc__)))
