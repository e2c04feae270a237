"""A model -> a folder with the same model, quantised to 8 or 4 bits, which loads like any other.

    python -m nanovlm.quant runs/demo/model OUT --format int4                                     rounded
    python -m nanovlm.quant runs/demo/model OUT --format int4 --method gptq --calibration scenes  by what layers read

A method other than round looks at what the layers read in records, pictures and text, as training packs them.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from nanovlm import cli
from nanovlm.config import DataConfig, QuantizationConfig
from nanovlm.data.chat import Processor
from nanovlm.data.loader import Loader
from nanovlm.data.process import make_process
from nanovlm.data.sources import open_sources
from nanovlm.data.types import Batch
from nanovlm.environment import find_device, keep_freed_memory
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.hub.read import load
from nanovlm.model.quantized import quantize
from nanovlm.quant.calibrate import calibrate

# The formats that a method makes.
FORMATS = {"round": ("int8", "int4", "nf4", "fp8"), "gptq": ("int4",), "awq": ("int4",), "smooth": ("int8",)}


@dataclass(frozen=True)
class QuantizeConfig:
    """Write a model folder with quantised weights, which loads like any other."""

    # Model folder, or anything else that generate.py reads.
    source: Annotated[str, tyro.conf.Positional]
    # Folder to write; new or empty.
    out: Annotated[Path, tyro.conf.Positional]
    # Which layers to quantise, and to which format.
    quantization: Annotated[QuantizationConfig, tyro.conf.arg(name="")] = field(default_factory=QuantizationConfig)
    # How codes are found: round takes the nearest; gptq and awq (int4) those that change least what layers compute of
    # the records of --calibration; smooth (int8) makes what layers read easy to round, which it sets --activations for.
    method: Literal["round", "gptq", "awq", "smooth"] = "round"
    # Records to calibrate with, as data.sources of train.py takes them.
    calibration: tuple[str, ...] = ()
    # Rows of packed records to calibrate with; fewer where the records end.
    num_samples: int = 128
    # Tokens in a row; what is longer is left out, or its pictures are cut into fewer tiles.
    seq_len: int = 512
    # How records are laid out, and the names of their columns, as data.layout and data.fields of train.py.
    layout: str = ""
    fields: tuple[str, ...] = ()
    # Order of the records.
    seed: int = 0
    # Precision of all other weights; auto keeps that of the source.
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    # Also try smaller ranges for every group of weights; without it, take the full range.
    search: bool = True
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "cpu"

    def validate(self) -> "QuantizeConfig":
        """Raise UserError with the values of the first contradiction; return self."""
        if self.quantization.format not in FORMATS[self.method]:
            raise UserError(
                f"--method {self.method} makes {' or '.join(FORMATS[self.method])}, not --format "
                f"{self.quantization.format}"
            )
        if self.method == "round" and self.calibration:
            raise UserError("--calibration is for --method gptq, awq and smooth: round looks at the weights alone")
        if self.method != "round" and not self.calibration:
            raise UserError(f"--method {self.method} needs --calibration: name records, such as those of the training")
        for name, value in (("--num-samples", self.num_samples), ("--seq-len", self.seq_len)):
            if value < 1:
                raise UserError(f"{name} {value} must be at least 1")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} exists and is not an empty folder: name a new one")
        return self


def main(config: QuantizeConfig):
    """Load, quantise and save."""
    config.validate()
    keep_freed_memory()
    dtype = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
    model, processor = load(config.source, find_device(config.device), dtype)
    before = sum(t.nbytes for t in model.state_dict().values())
    quantization = config.quantization
    if config.method == "smooth":
        quantization = dataclasses.replace(quantization, activations="int8")
    if config.method == "round":
        quantize(model, quantization, config.search)
    else:
        calibrate(model, quantization, config.method, read_batches(processor, config), config.search)
    save_model(config.out.resolve(), model, processor)
    after = sum(t.nbytes for t in model.state_dict().values())
    print(f"wrote {config.out}: {after / 1e6:.1f} MB, before {before / 1e6:.1f}")


# Options of a training, as errors about records name them, and what they are here.
OWN_NAMES = {
    ", more than data.max_bad_fraction = 0.999 allows": "",
    ", or give data.too_long = shrink": "",
    "data.row_length": "--seq-len",
    "--data.fields": "--fields",
    "--data.layout": "--layout",
    "data.layout": "--layout",
}


def read_batches(processor: Processor, config: QuantizeConfig) -> Iterator[Batch]:
    """Yield batches of one packed row, and say how many records they hold. Raises UserError if there is none."""
    if config.seq_len > (longest := processor.config.decoder.max_position_embeddings):
        raise UserError(f"--seq-len {config.seq_len} is more than the model's {longest} positions")
    data = DataConfig(
        sources=config.calibration,
        row_length=config.seq_len,
        too_long="shrink",
        layout=config.layout,
        fields=config.fields,
        batch_rows=1,
        max_bad_fraction=0.999,  # what fits is searched for, but not in a million records
    )
    source = open_sources(data.sources, seed=config.seed)
    loader = Loader(source, make_process(processor, data), data, processor.config.pad_token_id, num_epochs=1)
    num_tokens = 0
    try:
        for step in itertools.islice(loader, config.num_samples):
            for batch in step:
                num_tokens += int((batch.doc_ids >= 0).sum())
                yield batch
    except UserError as error:
        sentence = str(error)
        for name, own in OWN_NAMES.items():
            sentence = sentence.replace(name, own)
        raise UserError(sentence) from None
    finally:
        loader.close()
    counts = loader.counts
    if not num_tokens:
        raise UserError(
            f"no record of {' '.join(config.calibration)} fits into --seq-len {config.seq_len} tokens: "
            f"{counts['too long']} are too long"
        )
    print(f"calibrating with {counts['packed']} records of {num_tokens} tokens; {counts['too long']} were too long")


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(QuantizeConfig, prog="python -m nanovlm.quant", description=__doc__)))
