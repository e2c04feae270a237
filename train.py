"""Train a vision-language model.

    python train.py                              the default preset, scenes
    python train.py scenes --optim.lr 2e-3       any field by its dotted name
    python train.py --run-dir runs/second        started again with the same folder, a run continues
    python train.py --help                       every field with its meaning

The run directory receives config.json, metrics.jsonl (a line a step), checkpoints/, and at the end model/
(all that generate.py needs), eval.json and samples.png.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from eval.run import answer, draw_contact_sheet, evaluate, format_table
from eval.tasks import SceneTask, TrainingScan
from nanovlm import checkpoint, cli
from nanovlm.config import TrainConfig, differences, from_dict
from nanovlm.data.chat import Processor
from nanovlm.data.loader import Loader
from nanovlm.data.sources import SOURCES
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.data.types import IGNORE, Batch
from nanovlm.model.vlm import VLM
from nanovlm.objectives import OBJECTIVES
from nanovlm.optim import learning_rate, make_optimizers, set_learning_rate
from nanovlm.presets import PRESETS


@dataclass
class TrainState:
    """Everything that a resumed run needs."""

    model: VLM
    optimizers: dict[str, torch.optim.Optimizer]
    loader: Loader
    threads: int
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0

    def save(self, run_dir: Path, keep: int):
        numbers = {name: getattr(self, name) for name in ("step", "tokens", "elapsed_s", "threads")}
        numbers["loader"] = self.loader.state_dict()
        checkpoint.save_checkpoint(run_dir, self.model, self.optimizers, numbers, keep)

    def load(self, folder: Path):
        numbers = checkpoint.load_checkpoint(folder, self.model, self.optimizers)
        self.loader.load_state_dict(numbers.pop("loader"))
        for name, value in numbers.items():
            setattr(self, name, value)


def train_step(state: TrainState, batches: list[Batch], config: TrainConfig) -> dict[str, float]:
    """Run one optimizer step over micro-batches; return its metrics.

    The loss is the mean over all trained tokens of the step, however they fall into micro-batches.
    """
    device = next(state.model.parameters()).device
    num_trained = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    lr = learning_rate(state.step, config.optim)
    set_learning_rate(state.optimizers, lr)
    loss = 0.0
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss_sum = OBJECTIVES[config.objective](state.model, batch.to(device))
        (loss_sum / max(1, num_trained)).backward()
        loss += loss_sum.item() / max(1, num_trained)
    grad_norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.max_grad_norm)
    for optimizer in state.optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    state.step += 1
    state.tokens += sum(int((batch.doc_ids >= 0).sum()) for batch in batches)
    return {"step": state.step, "loss": loss, "lr": lr, "grad_norm": grad_norm.item(), "trained_tokens": num_trained}


def main(config: TrainConfig) -> dict:
    """Train, resume or report a finished run; return the contents of its eval.json."""
    # --- setup -------------------------------------------------------------------------------------------
    config.validate()
    run_dir = Path(config.run_dir)
    if (run_dir / "config.json").exists():
        check_same_config(run_dir / "config.json", config)
    if (run_dir / "eval.json").exists():
        print(f"{run_dir} is a finished run; its results are in {run_dir / 'eval.json'}")
        return checkpoint.read_json(run_dir / "eval.json")
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(
        run_dir / "config.json", json.dumps({"commit": git_commit(), **dataclasses.asdict(config)}, indent=2)
    )
    device = cli.find_device(config.device)
    torch.manual_seed(config.seed)

    # --- data --------------------------------------------------------------------------------------------
    source = SOURCES[config.data.source]("train")
    tokenizer = train_tokenizer(source.texts(1000), config.data.tokenizer_size)
    processor = Processor(tokenizer, CHAT_TEMPLATE, config.model)
    loader = Loader(source, processor.document, config.data, config.model.pad_token_id, config.seed)
    tasks = {split: SceneTask(split, config.eval_scenes) for split in ("test", "compositional")}

    # --- model, optimizer ----------------------------------------------------------------------------------
    model = VLM(config.model).to(device)
    optimizers = make_optimizers(model, config.optim)
    state = TrainState(model, optimizers, loader, config.threads)
    checkpoints = checkpoint.list_checkpoints(run_dir)
    if checkpoints:
        state.load(checkpoints[-1])
        print(f"continuing {run_dir} at step {state.step}")
    if not state.threads:
        state.threads = fastest_threads(state, config) if device.type == "cpu" else torch.get_num_threads()
    torch.set_num_threads(state.threads)
    metrics_file = open_metrics(run_dir / "metrics.jsonl", state.step)
    parts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    print(f"{sum(parts.values()):.2f} M parameters ({', '.join(f'{k} {v:.2f}' for k, v in parts.items())})")
    print(f"on {torch.cuda.get_device_name(device) if device.type == 'cuda' else f'the CPU, {state.threads} threads'}")
    log = start_wandb(config) if config.wandb else None

    # --- loop --------------------------------------------------------------------------------------------
    model.train()
    bar = tqdm(total=config.optim.steps, initial=state.step, unit="step", mininterval=1 if sys.stderr.isatty() else 15)
    while state.step < config.optim.steps:
        start = time.perf_counter()
        batches = [next(loader) for _ in range(config.optim.accumulation_steps)]
        data_wait_s = time.perf_counter() - start
        tokens_before = state.tokens
        metrics = train_step(state, batches, config)
        seconds = time.perf_counter() - start
        state.elapsed_s += seconds
        metrics |= {
            "tokens": state.tokens,
            "tokens_per_second": (state.tokens - tokens_before) / seconds,
            "padding": 1 - (state.tokens - tokens_before) / sum(batch.doc_ids.numel() for batch in batches),
            "data_wait_s": data_wait_s,
            "elapsed_s": state.elapsed_s,
        }
        metrics_file.write(json.dumps(metrics) + "\n")
        metrics_file.flush()
        if log:
            log(metrics)
        bar.update()
        bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:.0f} tokens/s", refresh=False)
        if config.sample_every and state.step % config.sample_every == 0:
            bar.write(f"step {state.step}: " + "   ".join(sample_answers(model, processor, tasks["test"])))
        if state.step % config.checkpoint_every == 0 or state.step == config.optim.steps:
            state.save(run_dir, config.keep_checkpoints)
    bar.close()
    metrics_file.close()

    # --- end ---------------------------------------------------------------------------------------------
    model.eval()
    checkpoint.save_model(run_dir / "model", model, processor)
    results = {"train_seconds": round(state.elapsed_s, 1)}
    if config.eval_scenes:
        training = TrainingScan(source, min(loader.next_index, len(source)))
        scores = evaluate(model, processor, tasks, training)
        results |= scores
        print("\n" + format_table(scores))
        draw_contact_sheet(model, processor, tasks["test"], run_dir / "samples.png")
        print(f"contact sheet: {run_dir / 'samples.png'}")
    checkpoint.write_text(run_dir / "eval.json", json.dumps(results, indent=2))
    print(f"trained in {state.elapsed_s:.0f} s; the model is in {run_dir / 'model'}")
    return results


def fastest_threads(state: TrainState, config: TrainConfig) -> int:
    """Time a forward and backward pass with one thread and with all; say and return the faster number.

    Two threads on a busy machine can be many times slower than one.
    """
    start = state.loader.state_dict()
    batch = next(state.loader)
    state.loader.load_state_dict(start)
    seconds = {}
    for threads in {1, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        for _ in range(3):
            begin = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                loss = OBJECTIVES[config.objective](state.model, batch)
            loss.backward()
            seconds[threads] = min(time.perf_counter() - begin, seconds.get(threads, float("inf")))
    state.model.zero_grad()
    print("a batch takes " + ", ".join(f"{s * 1e3:.0f} ms with {n} threads" for n, s in sorted(seconds.items())))
    return min(seconds, key=seconds.get)


def sample_answers(model: VLM, processor: Processor, task: SceneTask, num: int = 4) -> list[str]:
    """Answer a few held-out questions of different kinds."""
    by_kind = {question.kind: question for question in reversed(task.questions)}
    chosen = list(by_kind.values())[:num]
    images = [task.images[question.scene] for question in chosen]
    answers = answer(model, processor, images, [question.text for question in chosen])
    return [f"{q.text} {said!r} (truth {q.truth!r})" for q, said in zip(chosen, answers, strict=True)]


def check_same_config(path: Path, config: TrainConfig):
    """Raise ValueError that names the fields in which a run's config.json differs from `config`."""
    saved = checkpoint.read_json(path)
    saved.pop("commit", None)
    saved = dataclasses.replace(from_dict(TrainConfig, saved), run_dir=config.run_dir)
    if changed := differences(saved, config):
        raise ValueError(
            f"{path.parent} was started with another config ({'; '.join(changed)}): "
            "use the same values to continue it, or another --run-dir"
        )


def open_metrics(path: Path, step: int):
    """Open metrics.jsonl to append after the line of `step`; what a killed run wrote beyond it goes."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    checkpoint.write_text(path, "".join(kept))
    return open(path, "a")


def start_wandb(config: TrainConfig) -> Callable[[dict], None]:
    """Start a Weights & Biases run, offline unless WANDB_MODE says otherwise; return its log function."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs the package wandb: pip install wandb") from None
    mode = os.environ.get("WANDB_MODE", "offline")
    run = wandb.init(project="nanovlm", dir=config.run_dir, config=dataclasses.asdict(config), mode=mode)
    return lambda metrics: run.log(metrics, step=metrics["step"])


def git_commit() -> str | None:
    """Return the commit of this checkout, with a + when files are changed; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=cli.PROJECT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def parse_config(args: list[str]) -> TrainConfig:
    """Read `[preset] [--field value ...]`; the preset is scenes when none is named."""
    preset, args = (args[0], args[1:]) if args and not args[0].startswith("-") else ("scenes", args)
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    presets = "\n".join(f"    {name:<12} {function.__doc__}" for name, function in PRESETS.items())
    description = f"{__doc__}\nPresets, named before the options:\n\n{presets}"
    return cli.parse(TrainConfig, args, prog="train.py [preset]", default=PRESETS[preset](), description=description)


if __name__ == "__main__":
    cli.run(lambda: main(parse_config(sys.argv[1:])))
