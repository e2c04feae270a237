"""Pairs -> the same pairs with the log-probabilities of both answers by a model, which a run then need not have.

They are read with preference.reference = records.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

import torch

from nanovlm.data.build.records import BuildConfig, Found, Unusable, as_record, write_records
from nanovlm.data.chat import Processor
from nanovlm.data.layouts import REFERENCE
from nanovlm.data.sources import open_source
from nanovlm.data.types import Document
from nanovlm.environment import find_device, keep_freed_memory
from nanovlm.errors import UserError
from nanovlm.hub.read import load
from nanovlm.model.vlm import VLM
from nanovlm.objectives.logprobs import batch_logprobs, find_branches


@dataclasses.dataclass(frozen=True)
class ReferenceConfig(BuildConfig):
    # How many pairs are computed at a time.
    num_rows: int = 8
    # Precision of matrix products; that of the run is the best.
    precision: Literal["fp32", "bf16"] = "fp32"


def main(config: ReferenceConfig):
    """Write the pairs of a source, and with each what a model finds of its answers: their log-probabilities."""
    config.validate()
    keep_freed_memory()
    source = open_source(config.source, allow_urls=config.allow_urls)
    model, processor = load(config.model, find_device(config.device), torch.float32)
    write_records(config, source, model, lambda records: add_logprobs(model, processor, records, config))


def add_logprobs(
    model: VLM, processor: Processor, records: list[Found], config: ReferenceConfig
) -> Iterator[dict | Unusable]:
    """Yield each pair with what the model says about it."""
    read = [read_pair(model, processor, found) for found in records]
    documents = (document for document in read if isinstance(document, Document))
    totals = (
        pair
        for chunk in iter(lambda: list(itertools.islice(documents, config.num_rows)), [])
        for pair in sum_logprobs(model, processor, chunk, config.precision)
    )
    for found, document in zip(records, read, strict=True):
        if isinstance(document, Unusable):
            yield document
        else:
            record, messages = as_record(found, []), found.sample.messages
            pair = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": [found.sample.rejected]}
            yield {"images": record["images"]} | pair | dict(zip(REFERENCE, next(totals), strict=True))


def read_pair(model: VLM, processor: Processor, found: Found) -> Document | Unusable:
    """Return a pair as a document of two branches."""
    try:
        document = processor.pair(found.sample)
    except UserError as error:
        return Unusable(str(error))
    length, most = int(document.position_ids.max()) + 1, model.config.decoder.max_position_embeddings
    if length > most:
        return Unusable(f"it has {length} tokens, more than the model's {most} positions")
    return document


@torch.no_grad()
def sum_logprobs(model: VLM, processor: Processor, documents: list[Document], precision: str) -> list[list[float]]:
    """Return the log-probabilities of the chosen and the rejected answer of each pair."""
    device = model.decoder.embed_tokens.weight.device
    batch = processor.batch(documents).to(device)
    with torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
        return find_branches(batch).sum(batch_logprobs(model, batch)).view(-1, 2).tolist()
