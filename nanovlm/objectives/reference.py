"""The model that a run's own is compared with, and its log-probabilities: computed beside it, or once into the data.

python -m nanovlm.objectives.reference MODEL SOURCE OUT.jsonl     pairs of SOURCE, with log-probabilities of MODEL
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from nanovlm import cli
from nanovlm.config import DataConfig, TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.data.layouts import REFERENCE
from nanovlm.data.pictures import to_url
from nanovlm.data.reader import explain
from nanovlm.data.records import check, options_of, to_sample
from nanovlm.data.source import first_pass
from nanovlm.data.sources import open_source
from nanovlm.data.types import Batch, Document
from nanovlm.environment import find_device
from nanovlm.errors import UserError, printable
from nanovlm.files import new_file
from nanovlm.hub.read import load
from nanovlm.model.adapters import disabled
from nanovlm.model.vlm import VLM
from nanovlm.objectives.logprobs import batch_logprobs, find_branches


def make_reference(
    config: TrainConfig, name: str, processor: Processor, device: torch.device, never: tuple[int, ...] = ()
) -> Callable[[VLM, Batch], Tensor]:
    """Return what gives the reference's log-probability of each trained token, fp32[N], of the run's model and a batch.

    `name` is a model, or empty for what the run starts from: the model itself without its adapters, where these are all
    that learns and the base is as it was read (pissa changes it); else a frozen copy, in fp32 as the run's own weights,
    on every rank. It is no part of checkpoints, and read again when a run goes on. `never` is as in `token_logprobs`.
    """
    if not name and config.adapter.rank and not config.adapter.train and config.adapter.init != "pissa":

        def compute_base(model: VLM, batch: Batch) -> Tensor:
            with evaluating(model), disabled(model):
                return batch_logprobs(model, batch, never=never)

        return compute_base
    if not (name := name or config.init.model):
        raise UserError(
            f"objective = {config.objective} compares the model with a reference, and there is none: start from "
            "init.model, name another in preference.reference, or records for log-probabilities that records bring"
        )
    frozen, theirs = load(name, device, torch.float32)
    check_fits(name, theirs, processor)
    frozen.requires_grad_(False)

    def compute(_model: VLM, batch: Batch) -> Tensor:
        with evaluating(frozen):
            return batch_logprobs(frozen, batch, never=never)

    return compute


def check_fits(name: str, theirs: Processor, ours: Processor):
    """Raise UserError if a model reads other tokens or tiles than those of a run's batches."""
    if theirs.tokenizer.get_vocab() != ours.tokenizer.get_vocab():
        raise UserError(
            f"the reference {name} has another tokenizer than the model, so it cannot read the same batches"
        )
    for field in ("image_token_id", "tile_size", "num_image_tokens"):
        if (one := getattr(theirs.config, field)) != (other := getattr(ours.config, field)):
            raise UserError(f"the reference {name} has {field} = {one}, and the model {other}: they must be equal")


@contextlib.contextmanager
def evaluating(model: VLM) -> Iterator[None]:
    """Compute without gradients or noise."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


# --- once into the data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceConfig:
    """Write pairs with the log-probabilities of their answers by a model, for preference.reference = records."""

    # A model folder, or whatever else generate.py reads.
    model: str
    # Where the pairs come from, as for --data.sources.
    source: str
    # The .jsonl file to write.
    out: Path
    # How records are laid out, and columns of other names, as --data.layout and --data.fields.
    layout: str = ""
    fields: tuple[str, ...] = ()
    # Fetch images that records name by an address, http or https, of a public server.
    allow_urls: bool = False
    # Pairs that are computed at a time.
    num_rows: int = 8
    # cpu, cuda, or auto (cuda when there is one).
    device: str = "auto"
    # Precision of matrix products; that of the run is the best.
    precision: Literal["fp32", "bf16"] = "fp32"


def write_pairs(config: ReferenceConfig) -> tuple[int, int]:
    """Do what the config says; return how many pairs were written, and how many records are left out.

    Raises UserError where no pair could be written, with what is wrong with the first record.
    """
    if config.out.suffix != ".jsonl" or config.out.exists():
        raise UserError(f"{config.out} must be the name of a new .jsonl file")
    device = find_device(config.device)
    options = options_of(DataConfig(layout=config.layout, fields=config.fields))
    source = open_source(config.source, allow_urls=config.allow_urls)
    model, processor = load(config.model, device, torch.float32)
    num, failures = 0, []

    def read() -> Iterator[tuple[dict, Document]]:
        for ref in tqdm(first_pass(source), total=len(source) if isinstance(source, Sized) else None, unit="pair"):
            try:
                raw = source.read(ref.key)
                document = processor.pair(to_sample(raw, **options))
            except Exception as error:  # whatever a record does, it is counted and named
                failures.append(f"{ref.source}, {ref.where}: {explain(error)}")
            else:
                yield rewrite(raw, options), document

    pairs = read()
    with new_file(config.out) as file, torch.autocast(device.type, torch.bfloat16, config.precision == "bf16"):
        while chunk := list(itertools.islice(pairs, config.num_rows)):
            batch = processor.batch([document for _record, document in chunk]).to(device)
            with evaluating(model):
                sums = find_branches(batch).sum(batch_logprobs(model, batch)).view(-1, 2).tolist()
            for (record, _document), totals in zip(chunk, sums, strict=True):
                line = record | dict(zip(REFERENCE, totals, strict=True))
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            num += len(chunk)
        if not num:
            raise UserError(printable(f"no record of {source.name} is a pair that can be read: {failures[0]}"))
    if failures:
        print(printable(f"left out {len(failures)} records, such as {failures[0]}"))
    return num, len(failures)


def rewrite(raw: dict, options: dict) -> dict:
    """Return a pair in TRL's layout, its pictures among it."""
    images, messages, _independent = check(raw, **options)
    rejected = to_sample(raw, **options).rejected
    pictures = {"images": [to_url(image) for image in images]} if images else {}
    return pictures | {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [rejected]}


def main():
    """Run the command line. Raises UserError with one sentence for anything wrong with the input."""
    import tyro  # only a command needs it

    options = (tyro.conf.PositionalRequiredArgs,)
    config = tyro.cli(ReferenceConfig, prog="python -m nanovlm.objectives.reference", config=options)
    print(f"wrote {write_pairs(config)[0]} pairs to {config.out}")


if __name__ == "__main__":
    cli.run(main)
