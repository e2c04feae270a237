"""The numbers of a run -> metrics.jsonl, the progress bar, Weights & Biases."""

import contextlib
import itertools
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from nanovlm import distributed
from nanovlm.config import TrainConfig
from nanovlm.errors import UserError
from nanovlm.files import write_file
from nanovlm.train.counting import peak_flops

NAMED = 5  # documents of a bad step to name


class Log:
    """The numbers of a run, whose TrainState is `state`; the first rank writes them.

    On a GPU they are read one step late, so that the host need not wait for them.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, state, device: torch.device, begin: float, wandb):
        self.config, self.state, self.begin, self.last = config, state, begin, time.perf_counter()
        self.peak_flops = distributed.num_ranks() * (peak_flops(device) or float("nan"))
        self.device, self.pending = device, None
        self.is_first = distributed.rank() == 0
        self.file = open_metrics(run_dir / "metrics.jsonl", state.step) if self.is_first else None
        self.wandb = start_wandb(wandb, config, run_dir) if wandb else None
        self.bar = tqdm(
            total=config.optim.steps,
            initial=state.step,
            unit="step",
            mininterval=1 if sys.stderr.isatty() else 15,
            disable=not self.is_first,
        )

    def add(self, metrics: dict, totals: dict, data_wait_s: float):
        """Take what `train_step` and `count` returned for a step; on a GPU, write the step before."""
        self.settle()
        self.state.tokens += totals["tokens"]
        if self.state.rollout_s:
            metrics["rollout_s"] = self.state.rollout_s
        self.pending = metrics, totals, data_wait_s, list(self.state.loader.batch_names)
        if self.device.type == "cpu":
            self.settle()  # on the CPU the step is done, so its time ends now

    def settle(self):
        """Wait for the last step's numbers and write them.

        Raises UserError when more steps than `max_skipped_steps` had a loss or gradient that is not finite.
        """
        if self.pending is None:
            return
        (metrics, totals, data_wait_s, names), self.pending = self.pending, None
        numbers = {
            name: x.item() if isinstance(x, torch.Tensor) else x for name, x in metrics.items() if name != "routing"
        }
        numbers |= metrics["routing"].summary() if "routing" in metrics else {}
        if numbers.pop("is_bad"):
            self.skip(metrics["step"], names)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.state.elapsed_s = now - self.begin
        numbers |= {
            "trained_tokens": totals["trained_tokens"],
            "tokens": self.state.tokens,
            "samples": totals["samples read"],
            **{
                name.removeprefix("samples ").replace(" ", "_"): x
                for name, x in totals.items()
                if name.startswith("samples ") and name != "samples read"
            },
            "padding": 1 - totals["tokens"] / totals["places"],
            "skipped_steps": self.state.skipped_steps,
            "tokens_per_second": totals["tokens"] / seconds,
            "trained_tokens_per_second": totals["trained_tokens"] / seconds,
            "image_tokens_per_second": totals["image_tokens"] / seconds,
            "flops_per_second": totals["flops"] / seconds,
            "data_wait_s": data_wait_s,
            "elapsed_s": self.state.elapsed_s,
        }
        shown = f"loss {numbers['loss']:.3f}, {numbers['tokens_per_second']:.0f} tokens/s"
        shown += f", data {data_wait_s / seconds:.0%}"  # the share of the step that waited for its batch
        if "reward" in numbers:
            shown += f", rollouts {numbers['rollout_s'] / seconds:.0%}, reward {numbers['reward']:.3f}"
        if "sampler_kl" in numbers:
            shown += f", sampler KL {numbers['sampler_kl']:.1e}"
        if self.device.type == "cuda":
            numbers["mfu"] = totals["flops"] / seconds / self.peak_flops
            numbers["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            shown += f", MFU {numbers['mfu']:.1%}, {numbers['memory_gb']:.1f} GB"
        numbers = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in numbers.items()}
        if self.file is not None:
            self.file.write(json.dumps(numbers, allow_nan=False) + "\n")
            self.file.flush()
            self.bar.update()
            self.bar.set_postfix_str(shown, refresh=False)
            if self.wandb:
                self.wandb(numbers)

    def skip(self, step: int, names: list[str]):
        """Count a skipped step and report it; raise UserError after too many."""
        self.state.skipped_steps += 1
        what = f"step {step}: the loss or a gradient is not finite"
        if self.state.skipped_steps <= self.config.optim.max_skipped_steps:
            self.say(f"{what}; the step changes nothing")
            return
        documents = list(itertools.chain(*distributed.gather(names)))
        more = f"; and {len(documents) - NAMED} more" if len(documents) > NAMED else ""
        raise UserError(
            f"{what}, as in {self.state.skipped_steps - 1} steps before, more than optim.max_skipped_steps = "
            f"{self.config.optim.max_skipped_steps} allows; the step's documents: {'; '.join(documents[:NAMED])}{more}"
        )

    @contextlib.contextmanager
    def paused(self):
        """Exclude the enclosed time from the seconds of the step and of the run; write the previous step first."""
        self.settle()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self.last += seconds
        self.begin += seconds

    def say(self, text: str):
        """Print a line above the progress bar."""
        if self.is_first:
            self.bar.write(text)

    def close(self):
        """Write the last step and close the progress bar and the file."""
        self.settle()
        self.bar.close()
        if self.file is not None:
            self.file.close()


def open_metrics(path: Path, step: int):
    """Open metrics.jsonl to append after the line of `step`; drop later lines of a killed run, and damaged ones."""
    lines = read_metrics(path) if path.exists() else []
    kept = [line for line in lines if line["step"] <= step]
    if len(kept) < step:
        print(f"note: {path} has lines of {len(kept)} of the {step} steps before; the others are lost")
    write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
    return open(path, "a")


def read_metrics(path: Path) -> list[dict]:
    """Return the lines of metrics.jsonl that are whole, each with a later step than the one before."""
    lines = []
    for text in path.read_text("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if (
                isinstance(line, dict)
                and type(line.get("step")) is int
                and line["step"] > (lines or [{"step": 0}])[-1]["step"]
            ):
                lines.append(line)
    return lines


def import_wandb():
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--wandb needs the package wandb: pip install wandb") from None
    return wandb


def start_wandb(wandb, config: TrainConfig, run_dir: Path) -> Callable[[dict], None]:
    """Start a Weights & Biases run, offline unless WANDB_MODE says otherwise; return its log function.

    Online, a resumed run continues the same W&B run; offline, each start is a new one.
    """
    mode = os.environ.get("WANDB_MODE", "offline")
    if mode == "offline":
        run = wandb.init(project="nanovlm", dir=run_dir, config=asdict(config), mode=mode)
        return lambda metrics: run.log(metrics, step=metrics["step"])
    if not (run_dir / "wandb_id").exists():
        write_file(run_dir / "wandb_id", uuid.uuid4().hex)
    name = (run_dir / "wandb_id").read_text()
    run = wandb.init(project="nanovlm", id=name, resume="allow", dir=run_dir, config=asdict(config), mode=mode)
    return lambda metrics: run.log(metrics, step=metrics["step"])
