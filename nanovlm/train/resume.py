"""Compare the config of a run directory with the one that it is resumed with: what may change, and what may not."""

import dataclasses
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from nanovlm import distributed
from nanovlm.config import OptimConfig, TrainConfig, differences, from_dict
from nanovlm.environment import git_commit
from nanovlm.errors import UserError
from nanovlm.files import read_json, write_file
from nanovlm.train import checkpoint
from nanovlm.train.log import read_metrics

# Fields that may change when a run is resumed: none of them changes a loss.
FREE = (
    "run_dir",
    "parallel",
    "profile",
    "device",
    "checkpoint_every",
    "keep_checkpoints",
    "eval",
    "wandb",
)


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints to go on from, oldest first: none for a new run, or one that never took a step.

    Raises UserError for a run that has lost its checkpoints or its config.
    """
    taken, whole = steps_taken(run_dir), checkpoint.whole_checkpoints(run_dir)
    if taken and not whole:
        raise UserError(
            f"{run_dir} took {taken} steps and has no whole checkpoint to go on from: use another --run-dir"
        )
    if taken and not (run_dir / "config.json").is_file():
        raise UserError(f"{run_dir} took {taken} steps and has lost its config.json: use another --run-dir")
    if not taken:  # of a first attempt that failed: what it was asked for does not bind the next
        for folder in whole:
            shutil.rmtree(folder)
    return whole if taken else []


def steps_taken(run_dir: Path) -> int:
    """Return the steps that a run took, by its metrics and by the checkpoints that it ever had, whole or not."""
    lines = read_metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").is_file() else []
    return max(checkpoint.steps_saved(run_dir), lines[-1]["step"] if lines else 0)


def read_config(run_dir: Path) -> TrainConfig:
    """Return the config that a run was started with."""
    saved = read_json(run_dir / "config.json")
    saved.pop("commit", None)
    try:
        return from_dict(TrainConfig, saved)
    except ValueError as error:
        raise UserError(f"{run_dir / 'config.json'}: {error}") from error


def check_same_config(run_dir: Path, config: TrainConfig, checkpoints: list[Path]) -> TrainConfig:
    """Return `config`, with fields that it leaves open taken from the run's config.json.

    Raises UserError that names the differing fields that must not change. Besides FREE, these may change: num_workers
    and where shards are kept; threads, to 0 or the run's number; and steps of wsd, to more, while its rate has not
    begun to fall.
    """
    if read_json(run_dir / "config.json").get("commit") != git_commit():
        print(f"note: {run_dir} was started at another commit")
    saved = read_config(run_dir)
    micro_batches = config.optim.micro_batches or saved.optim.micro_batches
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, micro_batches=micro_batches))
    state = read_json(checkpoints[-1] / "state.json") if checkpoints else {"threads": saved.threads, "step": 0}
    changes = {name: getattr(config, name) for name in FREE}
    changes["data"] = dataclasses.replace(
        saved.data,
        num_workers=config.data.num_workers,
        shard_cache=config.data.shard_cache,
        shard_cache_gb=config.data.shard_cache_gb,
    )
    if config.threads in (0, state["threads"]):
        changes["threads"] = config.threads
    if config.optim.steps > saved.optim.steps:
        if reason := why_no_more_steps(run_dir, saved.optim, state["step"]):
            raise UserError(
                f"optim.steps = {config.optim.steps}: {run_dir} {reason}. To train on, begin another run from its "
                f"model: --init.model {run_dir / 'model'} --run-dir ANOTHER"
            )
        changes["optim"] = dataclasses.replace(saved.optim, steps=config.optim.steps)
    if changed := differences(dataclasses.replace(saved, **changes), config):
        raise UserError(
            f"{run_dir} was started with another config ({'; '.join(changed)}): "
            "use the same values to continue it, or another --run-dir"
        )
    return config


def why_no_more_steps(run_dir: Path, optim: OptimConfig, step: int) -> str:
    """Say why a run cannot take more steps than it was started with; nothing if it can."""
    if (run_dir / "eval.json").exists():
        return f"has ended, after step {step} of {optim.steps}"
    falls = optim.warmup_steps + optim.decay_start * (optim.steps - optim.warmup_steps)
    if optim.schedule == "wsd" and step <= falls:
        return ""
    since = f"after step {falls:.0f}" if optim.schedule == "wsd" else "from its warm-up on"
    return f"is at step {step}, its rate falls {since} towards step {optim.steps}, and it must end there"


def write_config(path: Path, config: TrainConfig, is_new: bool):
    """Write config.json, with the commit that the run was started at."""
    commit = git_commit() if is_new else read_json(path).get("commit")
    write_file(path, json.dumps({"commit": commit, **asdict(config)}, indent=2))


def share_micro_batches(config: TrainConfig) -> TrainConfig:
    """Return the config with the number of micro-batches of a step, one for each rank by default."""
    num, ranks = config.optim.micro_batches or distributed.num_ranks(), distributed.num_ranks()
    if num % ranks:
        raise UserError(f"optim.micro_batches = {num} cannot be shared out evenly among {ranks} ranks")
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, micro_batches=num))
