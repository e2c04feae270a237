"""Pairs -> the same pairs with the log-probabilities of both answers by a model, which a run then need not have.

    python -m nanovlm.objectives.precompute MODEL SOURCE OUT.jsonl

OUT.jsonl holds the pictures too, and is read with preference.reference = records.
"""

import itertools
import json
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from nanovlm import cli
from nanovlm.config import DataConfig
from nanovlm.data.layouts import REFERENCE
from nanovlm.data.pictures import to_url
from nanovlm.data.reader import explain
from nanovlm.data.records import check, options_of, to_sample
from nanovlm.data.source import first_pass
from nanovlm.data.sources import open_source
from nanovlm.data.types import Document
from nanovlm.environment import find_device
from nanovlm.errors import UserError, printable
from nanovlm.files import new_file
from nanovlm.hub.read import load
from nanovlm.objectives.logprobs import batch_logprobs, find_branches
from nanovlm.objectives.reference import evaluating


@dataclass(frozen=True)
class PrecomputeConfig:
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


def write_pairs(config: PrecomputeConfig) -> tuple[int, int]:
    """Do what the config says; return how many pairs were written, and how many records are left out.

    Raises UserError where no pair could be written, with what is wrong with the first record.
    """
    if config.out.suffix != ".jsonl" or config.out.exists():
        raise UserError(f"{config.out} must be the name of a new .jsonl file")
    device = find_device(config.device)
    options = options_of(DataConfig(layout=config.layout, fields=config.fields))
    source = open_source(config.source, allow_urls=config.allow_urls)
    model, processor = load(config.model, device, torch.float32)
    num, failures, most = 0, [], model.config.decoder.max_position_embeddings

    def read() -> Iterator[tuple[dict, Document]]:
        for ref in tqdm(first_pass(source), total=len(source) if isinstance(source, Sized) else None, unit="pair"):
            try:
                raw = source.read(ref.key)
                document = processor.pair(to_sample(raw, **options))
                if (length := int(document.position_ids.max()) + 1) > most:
                    raise UserError(f"it has {length} tokens, more than the model's {most} positions")
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
    config = tyro.cli(PrecomputeConfig, prog="python -m nanovlm.objectives.precompute", config=options)
    print(f"wrote {write_pairs(config)[0]} pairs to {config.out}")


if __name__ == "__main__":
    cli.run(main)
