"""Training and decoding speed of a preset.

    python benchmarks/speed.py                                  print, and append to benchmarks/results/speed.jsonl
    python benchmarks/speed.py --preset scenes --threads 1
    python benchmarks/speed.py tune                             print which threads and precision are fastest here

Nothing that `tune` prints is used by itself: threads and precision of a run follow from its config and the device
(nanovlm/environment.py), and `--threads` and `--precision` set them. Decoding with the cache is checked against a
forward pass without it on the timed shape before it is timed. Every line has the medians of `repeats` runs.
"""

import copy
import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from benchmarks.decode import time_decoding
from nanovlm import cli
from nanovlm.config import pick
from nanovlm.data.sources import open_sources, sample_texts
from nanovlm.environment import choose_precision, choose_threads, count_cores, describe_environment, keep_freed_memory
from nanovlm.presets import PRESETS
from nanovlm.train import init
from nanovlm.train.optim import make_optimizers

RESULTS = Path(__file__).resolve().parent / "results" / "speed.jsonl"


@dataclass(frozen=True)
class SpeedConfig:
    # measure: append to the results; tune: suggest threads and precision.
    what: Annotated[Literal["measure", "tune"], tyro.conf.Positional] = "measure"
    # Preset to time.
    preset: str = "scenes"
    # CPU threads; 0 as in a run.
    threads: int = 0
    # Timed training steps and timed decodings.
    repeats: int = 10
    # Tokens decoded in one timed decoding.
    new_tokens: int = 64
    # Prompts decoded together, one line each.
    batch_sizes: tuple[int, ...] = (1, 32)


def main(config: SpeedConfig):
    keep_freed_memory()  # as train.py does
    preset = pick(PRESETS, config.preset, "preset")()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sources = (
        preset.data.sources[-1:] if preset.data.lessons else preset.data.sources
    )  # most steps are the last lesson's
    source = open_sources(sources, preset.data.weights)
    torch.manual_seed(0)
    model, processor = init.start(preset, sample_texts(source, 1000))
    model.to(device)
    loader = train.make_loader(source, processor, train.share_micro_batches(preset))
    threads, precision = config.threads or choose_threads(device), choose_precision(device)
    if config.what == "tune":
        return tune(model, loader, preset, config)
    torch.set_num_threads(threads)
    state = train.TrainState(model, model, make_optimizers(model, preset.optim, precision), loader, threads, precision)
    lines = [time_training(state, preset, config)]
    lines += [time_prompts(model.eval(), processor, source, config, size) for size in config.batch_sizes]
    environment = describe_environment(device, state.threads, state.precision)
    append_lines(RESULTS, lines, {"preset": config.preset} | environment)


def tune(model, loader, preset, config):
    """Time whole steps with one and all threads and in both precisions, from equal weights; print the fastest last."""
    weights, position = copy.deepcopy(model.state_dict()), loader.state_dict()
    on_cpu = next(model.parameters()).device.type == "cpu"
    seconds = {}
    for threads, precision in itertools.product(sorted({1, count_cores()} if on_cpu else {1}), ("fp32", "bf16")):
        torch.set_num_threads(threads)
        model.load_state_dict(weights)
        loader.load_state_dict(position)
        state = train.TrainState(
            model, model, make_optimizers(model, preset.optim, precision), loader, threads, precision
        )
        step_ms = time_training(state, preset, config)["step_ms"]
        seconds[f"--threads {threads} --precision {precision}"] = step_ms
        print(f"{step_ms:8.1f} ms a step with --threads {threads} --precision {precision}")
    print(f"fastest here: {min(seconds, key=seconds.get)}")


def append_lines(path: Path, lines: list[dict], environment: dict):
    """Print results and append them to a file of JSON lines, each with what it was measured on."""
    with open(path, "a") as file:
        for line in lines:
            text = json.dumps(environment | line)
            print(text)
            file.write(text + "\n")


def time_training(state, preset, config):
    """Time whole steps as train.py takes them: data, forward, backward, optimizer."""
    loader, device = state.loader, next(state.model.parameters()).device
    tokens, trained, images, seconds, data_seconds = [], [], [], [], []
    for _ in range(config.repeats + 3):
        start = time.perf_counter()
        [batch] = next(loader)
        data_seconds.append(time.perf_counter() - start)
        metrics = train.train_step(state, [batch.to(device)], len(batch.trained), preset)
        loss = metrics["loss"].item()
        seconds.append(time.perf_counter() - start)
        tokens.append(int((batch.doc_ids >= 0).sum()))
        trained.append(len(batch.trained))
        images.append(len(batch.pixel_values))
    assert loss == loss, "the loss is not a number"
    step = statistics.median(seconds[3:])
    return {
        "what": "training",
        "tokens_per_second": round(statistics.median(tokens[3:]) / step),
        "trained_tokens_per_second": round(statistics.median(trained[3:]) / step),
        "images_per_second": round(statistics.median(images[3:]) / step, 1),
        "step_ms": round(1e3 * step, 1),
        "data_ms": round(1e3 * statistics.median(data_seconds[3:]), 1),
    }


def time_prompts(model, processor, source, config, batch_size):
    """Time decoding of prompts of the preset's records, in fp32."""
    question = [{"role": "user", "content": "describe the image."}]
    prompts = [processor.prompt(question, source.read(i)["images"]) for i in range(batch_size)]
    times = time_decoding(model, model, prompts, config.new_tokens, config.repeats)
    return {"what": "decoding", "precision": "fp32"} | times


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(SpeedConfig, description=__doc__)))
