"""A model and an adapter of it -> a folder with the merged model, which loads like any other.

python -m nanovlm.hub.merge MODEL ADAPTER OUT_DIR
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanovlm import cli
from nanovlm.errors import UserError
from nanovlm.hub.adapters import attach
from nanovlm.hub.model_folder import save_model
from nanovlm.hub.read import load
from nanovlm.model.adapters import merge


@dataclass(frozen=True)
class MergeConfig:
    """Write a model folder whose weights have an adapter in them."""

    # Model folder, or anything else that generate.py reads; not quantised.
    model: str
    # The adapter, in PEFT's layout: a folder, such as the adapter/ of a run, or a repository on the hub.
    adapter: str
    # Folder to write; new or empty.
    out: Path
    # Precision of the weights; auto keeps that of the model.
    precision: Literal["auto", "bf16", "fp32"] = "auto"


def main():
    """Run the command line. Raises UserError with one sentence for anything wrong with the input."""
    import tyro  # only a command needs it

    config = tyro.cli(MergeConfig, prog="python -m nanovlm.hub.merge", config=(tyro.conf.PositionalRequiredArgs,))
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"{config.out} exists and is not an empty folder: name a new one")
    dtype = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
    model, processor = load(config.model, dtype=dtype)
    merge(attach(model, config.adapter, base=config.model))
    save_model(config.out.resolve(), model, processor)
    print(f"wrote {config.out}: {config.model} with {config.adapter} in its weights")


if __name__ == "__main__":
    cli.run(main)
