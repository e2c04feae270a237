"""Train a vision-language model.

    python train.py                              the default preset, scenes
    python train.py scenes --optim.lr 2e-3       any field by its dotted name
    python train.py --run-dir runs/second        started again with the same folder, a run continues
    python train.py --help                       every field with its meaning

The run directory receives config.json, metrics.jsonl (a line a step), checkpoints/, and at the end model/
(all that generate.py needs), eval.json and samples.png.
"""

import dataclasses
import itertools
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from eval.routing import draw_routing, measure_routing
from eval.run import answer, draw_contact_sheet, evaluate, format_table
from eval.tasks import SceneTask, TrainingScan
from nanovlm import checkpoint, cli, init
from nanovlm.config import MoEConfig, TrainConfig, differences, from_dict, pick
from nanovlm.data.chat import Processor
from nanovlm.data.loader import Loader
from nanovlm.data.sources import RATINGS, Scenes, open_sources, sample_texts, to_sample
from nanovlm.data.types import IGNORE, Batch, Document
from nanovlm.metrics import RoutingStats
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
    precision: str
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0

    def save(self, run_dir: Path, keep: int):
        """Write a checkpoint and keep the newest `keep`."""
        numbers = {name: getattr(self, name) for name in ("step", "tokens", "elapsed_s", "threads", "precision")}
        numbers["loader"] = self.loader.state_dict()
        checkpoint.save_checkpoint(run_dir, self.model, self.optimizers, numbers, keep)

    def load(self, folder: Path):
        """Go on from a checkpoint."""
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
    loss, extras, stats = 0.0, {}, RoutingStats()
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=state.precision == "bf16"):
            loss_sum = OBJECTIVES[config.objective](state.model, batch, extras)
        if extras.get("routing"):
            stats.update(extras["routing"], batch.doc_ids >= 0, batch.input_ids == config.model.image_token_id)
        (loss_sum / max(1, num_trained)).backward()
        loss += loss_sum.item() / max(1, num_trained)
    grad_norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.optim.max_grad_norm)
    for optimizer in state.optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    if extras.get("routing"):
        state.model.decoder.update_expert_bias(stats.load)
    state.step += 1
    state.tokens += sum(int((batch.doc_ids >= 0).sum()) for batch in batches)
    numbers = {"step": state.step, "loss": loss, "lr": lr, "grad_norm": grad_norm.item(), "trained_tokens": num_trained}
    return numbers | (stats.summary() if extras.get("routing") else {})


def main(config: TrainConfig) -> dict:
    """Train, resume or report a finished run; return the contents of its eval.json."""
    config.validate()
    device = cli.find_device(config.device)
    with checkpoint.lock(Path(config.run_dir)) as run_dir:
        return train(config, run_dir, device)


def train(config: TrainConfig, run_dir: Path, device: torch.device) -> dict:
    """Do what `main` says, in a run directory that is ours alone."""
    # --- setup -------------------------------------------------------------------------------------------
    begin = time.perf_counter()
    if (run_dir / "config.json").exists():
        check_same_config(run_dir / "config.json", config)
    if (run_dir / "eval.json").exists():
        print(f"{run_dir} is a finished run; its results are in {run_dir / 'eval.json'}")
        return checkpoint.read_json(run_dir / "eval.json")
    torch.manual_seed(config.seed)
    wandb = import_wandb() if config.wandb else None

    # --- data --------------------------------------------------------------------------------------------
    source = open_sources(config.data.sources, config.data.weights, seed=config.seed, shuffle=config.data.shuffle)
    checkpoints = checkpoint.list_checkpoints(run_dir)
    if checkpoints:
        model, processor = VLM(config.model), Processor.load(run_dir, config.model)
    else:
        model, processor = init.start(config, sample_texts(source, 1000))
    loader = Loader(source, make_process(processor, config), config.data, config.model.pad_token_id, config.seed)
    num_scenes = config.eval_scenes if "scenes" in config.data.sources else 0
    tasks = {split: SceneTask(split, num_scenes) for split in ("test", "compositional")}

    # --- model, optimizer, state -----------------------------------------------------------------------------
    model.to(device)
    state = TrainState(model, make_optimizers(model, config.optim), loader, config.threads, config.precision)
    if checkpoints:
        state.load(checkpoints[-1])
        begin -= state.elapsed_s
        print(f"continuing {run_dir} at step {state.step}")
    else:
        choose_fastest(state, config)
        checkpoint.write_file(run_dir / "config.json", json.dumps({"commit": git_commit(), **asdict(config)}, indent=2))
        processor.save(run_dir)
    log = start_wandb(wandb, config, run_dir) if wandb else None
    torch.set_num_threads(state.threads)
    metrics_file = open_metrics(run_dir / "metrics.jsonl", state.step)
    if not checkpoints:
        state.save(run_dir, config.keep_checkpoints)
    parts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    total, active = model.count_parameters()
    print(f"{total / 1e6:.2f} M parameters ({', '.join(f'{k} {v:.2f}' for k, v in parts.items())})", end="")
    print(f", {active / 1e6:.2f} M of them active for a token" if active < total else "")
    print(f"training on {device_name(device)} with {state.threads} threads in {state.precision}")

    # --- loop --------------------------------------------------------------------------------------------
    model.train()
    bar = tqdm(total=config.optim.steps, initial=state.step, unit="step", mininterval=1 if sys.stderr.isatty() else 15)
    while state.step < config.optim.steps:
        start = time.perf_counter()
        batches = [next(loader) for _ in range(config.optim.accumulation_steps)]
        data_wait_s = time.perf_counter() - start
        tokens_before = state.tokens
        metrics = train_step(state, batches, config)
        state.elapsed_s = time.perf_counter() - begin
        metrics |= {
            "tokens": state.tokens,
            "samples": loader.counts["read"],
            **{name.replace(" ", "_"): number for name, number in loader.counts.items() if name != "read"},
            "tokens_per_second": (state.tokens - tokens_before) / (time.perf_counter() - start),
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
        if config.sample_every and num_scenes and state.step % config.sample_every == 0:
            bar.write(f"step {state.step}: " + "   ".join(sample_answers(model, processor, tasks["test"])))
        if state.step % config.checkpoint_every == 0 or state.step == config.optim.steps:
            checkpoint.flush(run_dir / "metrics.jsonl")
            state.save(run_dir, config.keep_checkpoints)
    bar.close()
    loader.close()
    metrics_file.close()
    print(f"samples: {', '.join(f'{number:,} {name}' for name, number in loader.counts.items() if number)}")

    # --- end ---------------------------------------------------------------------------------------------
    model.eval()
    checkpoint.save_model(run_dir / "model", model, processor)
    results = {
        "train_seconds": round(state.elapsed_s, 1),
        "environment": describe_environment(device, state.threads, state.precision),
    }
    if num_scenes:
        scores = evaluate(model, processor, tasks, TrainingScan(*find_scenes(source, loader.places_read())))
        results |= scores
        print("\n" + format_table(scores))
        png, lines = draw_contact_sheet(model, processor, tasks["test"])
        checkpoint.write_file(run_dir / "samples.png", png)
        print(f"Held-out scenes, drawn in {run_dir / 'samples.png'}:", *lines, sep="\n  ")
        if config.model.decoder.moe is not None:
            png = draw_routing(measure_routing(model, processor, tasks["test"]))
            checkpoint.write_file(run_dir / "routing.png", png)
            print(f"Which expert serves what is drawn in {run_dir / 'routing.png'}")
    checkpoint.write_file(run_dir / "eval.json", json.dumps(results, indent=2))
    print(f"\ntrained in {state.elapsed_s:.0f} s; the model is in {run_dir / 'model'}")
    return results


def make_process(processor: Processor, config: TrainConfig) -> Callable[[dict], Document]:
    """Return what turns a raw record into a document."""
    least = dict(zip(RATINGS, config.data.min_ratings, strict=True))
    return lambda raw: processor.document(to_sample(raw, least))


def find_scenes(source, places: list[int]) -> tuple[Scenes, list[int]]:
    """Return the drawn scenes, alone or as part of a mixture, and which of them stand at these places."""
    parts, starts = getattr(source, "sources", [source]), getattr(source, "starts", [0, len(source)])
    part = next(i for i, part in enumerate(parts) if isinstance(part, Scenes))
    return parts[part], [place - starts[part] for place in places if starts[part] <= place < starts[part + 1]]


def choose_fastest(state: TrainState, config: TrainConfig):
    """Time a batch forward and backward with each thread count and precision left open; say and keep the fastest.

    Two threads on a busy machine can be many times slower than one, and so can bf16 on a processor without it.
    """
    start = state.loader.state_dict()
    batch = next(state.loader)
    state.loader.load_state_dict(start)  # nothing was used up
    on_cpu = next(state.model.parameters()).device.type == "cpu"
    threads = [config.threads] if config.threads else sorted({1, torch.get_num_threads()} if on_cpu else {1})
    precisions = [config.precision] if config.precision != "auto" else ["bf16", "fp32"] if on_cpu else ["bf16"]
    seconds = {}
    objective = pick(OBJECTIVES, config.objective, "objective")
    for choice in itertools.product(threads, precisions) if len(threads) * len(precisions) > 1 else ():
        torch.set_num_threads(choice[0])
        for _ in range(3):
            begin = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=choice[1] == "bf16"):
                loss = objective(state.model, batch, {})
            loss.backward()
            seconds[choice] = min(time.perf_counter() - begin, seconds.get(choice, float("inf")))
    state.model.zero_grad()
    state.threads, state.precision = min(seconds, key=seconds.get) if seconds else (threads[0], precisions[0])
    if seconds:
        timed = (f"{1e3 * s:.0f} ms with {n} threads in {precision}" for (n, precision), s in seconds.items())
        print(f"a batch takes {', '.join(timed)}")


def sample_answers(model: VLM, processor: Processor, task: SceneTask, num: int = 4) -> list[str]:
    """Answer a few held-out questions of different kinds."""
    by_kind = {question.kind: question for question in reversed(task.questions)}
    chosen = list(by_kind.values())[:: -(-len(by_kind) // num)]
    images = [task.images[question.scene] for question in chosen]
    model.eval()
    answers = answer(model, processor, images, [question.text for question in chosen])
    model.train()
    return [f"{q.text} {said!r} (truth {q.truth!r})" for q, said in zip(chosen, answers, strict=True)]


def check_same_config(path: Path, config: TrainConfig):
    """Raise ValueError that names the fields in which a run's config.json differs from `config`."""
    saved = checkpoint.read_json(path)
    if isinstance(saved, dict) and saved.pop("commit", None) != git_commit():
        print(f"note: {path.parent} was started at another commit")
    try:
        saved = dataclasses.replace(from_dict(TrainConfig, saved), run_dir=config.run_dir)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if changed := differences(saved, config):
        raise ValueError(
            f"{path.parent} was started with another config ({'; '.join(changed)}): "
            "use the same values to continue it, or another --run-dir"
        )


def open_metrics(path: Path, step: int):
    """Open metrics.jsonl to append after the line of `step`; what a killed run wrote beyond it goes."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if len(lines) < step:
        raise ValueError(f"{path} has {len(lines)} lines, but the newest checkpoint is of step {step}")
    checkpoint.write_file(path, "".join(lines[:step]))
    return open(path, "a")


def import_wandb():
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs the package wandb: pip install wandb") from None
    return wandb


def start_wandb(wandb, config: TrainConfig, run_dir: Path) -> Callable[[dict], None]:
    """Start a Weights & Biases run, offline unless WANDB_MODE says otherwise; return its log function.

    Online, a resumed run goes on in the same W&B run; offline, each start is one of its own.
    """
    mode = os.environ.get("WANDB_MODE", "offline")
    if mode == "offline":
        run = wandb.init(project="nanovlm", dir=run_dir, config=asdict(config), mode=mode)
        return lambda metrics: run.log(metrics, step=metrics["step"])
    if not (run_dir / "wandb_id").exists():
        checkpoint.write_file(run_dir / "wandb_id", uuid.uuid4().hex)
    name = (run_dir / "wandb_id").read_text()
    run = wandb.init(project="nanovlm", id=name, resume="allow", dir=run_dir, config=asdict(config), mode=mode)
    return lambda metrics: run.log(metrics, step=metrics["step"])


def git_commit() -> str | None:
    """Return the commit of this checkout, with a + when files are changed; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=cli.PROJECT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_environment(device: torch.device, threads: int, precision: str | None = None) -> dict:
    """Say what a result was measured on; without a precision where no model computes."""
    return {
        "commit": git_commit(),
        "device": device_name(device),
        "threads": threads,
        **({"precision": precision} if precision else {}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor where the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def parse_config(args: list[str]) -> TrainConfig:
    """Read `[preset] [--field value ...]`; the preset is scenes when none is named."""
    preset, args = (args[0], args[1:]) if args and not args[0].startswith("-") else ("scenes", args)
    recipe = pick(PRESETS, preset, "preset")()
    # Naming one of its fields switches the mixture of experts on; the help shows them too.
    if recipe.model.decoder.moe is None and any(a.startswith(("--model.decoder.moe.", "--help", "-h")) for a in args):
        decoder = dataclasses.replace(recipe.model.decoder, moe=MoEConfig())
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, decoder=decoder))
    presets = "\n".join(f"    {name:<12} {function.__doc__}" for name, function in PRESETS.items())
    description = f"{__doc__}\nPresets, named before the options:\n\n{presets}"
    return tyro.cli(
        TrainConfig,
        args=args,
        prog="train.py [preset]",
        default=recipe,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
    )


if __name__ == "__main__":
    cli.run(lambda: main(parse_config(sys.argv[1:])))
