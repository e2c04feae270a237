"""Compare the config of a run directory with the one that it is resumed with: what may change, and what may not."""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

from nanovlm import distributed
from nanovlm.config import TrainConfig, differences, from_dict
from nanovlm.environment import git_commit
from nanovlm.files import read_json, write_file
from nanovlm.train import checkpoint

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


def check_same_config(run_dir: Path, config: TrainConfig) -> TrainConfig:
    """Return `config`, with fields that it leaves open taken from the run's config.json.

    Raises ValueError that names the differing fields that must not change. Besides FREE, these may change: num_workers;
    threads, to 0 or the run's number; and steps of wsd, to more, while its rate has not begun to fall.
    """
    path = run_dir / "config.json"
    saved = read_json(path)
    if isinstance(saved, dict) and saved.pop("commit", None) != git_commit():
        print(f"note: {run_dir} was started at another commit")
    try:
        saved = from_dict(TrainConfig, saved)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    micro_batches = config.optim.micro_batches or saved.optim.micro_batches
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, micro_batches=micro_batches))
    checkpoints = checkpoint.list_checkpoints(run_dir)
    state = read_json(checkpoints[-1] / "state.json") if checkpoints else {"threads": saved.threads, "step": 0}
    changes = {name: getattr(config, name) for name in FREE}
    changes["data"] = dataclasses.replace(saved.data, num_workers=config.data.num_workers)
    if config.threads in (0, state["threads"]):
        changes["threads"] = config.threads
    if saved.optim.schedule == "wsd" and config.optim.steps > saved.optim.steps:
        falls = saved.optim.warmup_steps + saved.optim.decay_start * (saved.optim.steps - saved.optim.warmup_steps)
        if state["step"] > falls:
            raise ValueError(
                f"optim.steps = {config.optim.steps}: {run_dir} is at step {state['step']}, and its rate began to fall "
                f"after step {falls:.0f} of {saved.optim.steps}; start another run from its model with --init.model"
            )
        changes["optim"] = dataclasses.replace(saved.optim, steps=config.optim.steps)
    if changed := differences(dataclasses.replace(saved, **changes), config):
        raise ValueError(
            f"{run_dir} was started with another config ({'; '.join(changed)}): "
            "use the same values to continue it, or another --run-dir"
        )
    return config


def write_config(path: Path, config: TrainConfig):
    """Write config.json, with the commit that the run was started at."""
    commit = read_json(path).get("commit") if path.exists() else git_commit()
    write_file(path, json.dumps({"commit": commit, **asdict(config)}, indent=2))


def share_micro_batches(config: TrainConfig) -> TrainConfig:
    """Return the config with the number of micro-batches of a step, one for each rank by default."""
    num, ranks = config.optim.micro_batches or distributed.num_ranks(), distributed.num_ranks()
    if num % ranks:
        raise ValueError(f"optim.micro_batches = {num} cannot be shared out evenly among {ranks} ranks")
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, micro_batches=num))
