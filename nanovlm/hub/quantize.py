"""A model -> a folder with the same model, quantised to 8 or 4 bits, which loads like any other.

python -m nanovlm.hub.quantize runs/demo/model OUT_DIR --format int4
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from nanovlm import cli
from nanovlm.config import QuantizationConfig
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.hub.read import load
from nanovlm.model.quantized import quantize


@dataclass(frozen=True)
class QuantizeConfig:
    """Write a model folder with quantised weights, which loads like any other."""

    # Model folder, or anything else that generate.py reads.
    source: str
    # Folder to write; new or empty.
    out: Path
    # Which layers to quantise, and to which format.
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    # Precision of all other weights; auto keeps that of the source.
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # Also try smaller ranges for every group of weights; without it, round to nearest in the full range.
    search: bool = True


def main():
    """Run the command line. Raises UserError with one sentence for anything wrong with the input."""
    import tyro  # only a command needs it

    options = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes)
    config = tyro.cli(QuantizeConfig, prog="python -m nanovlm.hub.quantize", config=options)
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise UserError(f"{config.out} exists and is not an empty folder: name a new one")
    dtype = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
    model, processor = load(config.source, dtype=dtype)
    before = sum(t.nbytes for t in model.state_dict().values())
    quantize(model, config.quantization, config.search)
    save_model(config.out.resolve(), model, processor)
    after = sum(t.nbytes for t in model.state_dict().values())
    print(f"wrote {config.out}: {after / 1e6:.1f} MB, before {before / 1e6:.1f}")


if __name__ == "__main__":
    cli.run(main)
