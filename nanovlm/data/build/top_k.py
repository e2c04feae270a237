"""Records -> the same records with the tokens that a model finds likeliest at each trained place.

A student learns from them as from the model itself (objectives/divergences.py), which then need not be in memory. A
record gets `teacher`: the trained tokens in the order of its document, and of each the `ids` and `logprobs` of the K
likeliest tokens, likeliest first. The run must have the model's tokenizer, chat template and tiles.
"""

import dataclasses
import functools

import torch

from nanovlm.data.build.records import BuildConfig, Found, Unusable, as_record, write_records
from nanovlm.data.chat import Processor
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.sources import open_source
from nanovlm.environment import find_device, keep_freed_memory
from nanovlm.errors import UserError
from nanovlm.hub.read import load
from nanovlm.model.vlm import VLM


@dataclasses.dataclass(frozen=True)
class TopKConfig(BuildConfig):
    # How many of the likeliest tokens are written.
    k: int = 32


def main(config: TopKConfig):
    """Write the records of a source, and with each the likeliest tokens at its trained places, as a model has them."""
    config.validate()
    keep_freed_memory()
    source = open_source(config.source, allow_urls=config.allow_urls)
    model, processor = load(config.model, find_device(config.device))
    if not 1 <= config.k <= model.config.decoder.vocab_size:
        raise UserError(f"--k {config.k} must be from 1 to the model's {model.config.decoder.vocab_size} tokens")
    add = functools.partial(add_top_k, model, processor, k=config.k)
    write_records(config, source, model, lambda records: map(add, records))


@torch.no_grad()
def add_top_k(model: VLM, processor: Processor, found: Found, k: int) -> dict | Unusable:
    """Return a record with what the model says about it."""
    try:
        document = processor.document(found.sample)
    except UserError as error:
        return Unusable(str(error))
    if (most := model.config.decoder.max_position_embeddings) < len(document):
        return Unusable(f"it has {len(document)} tokens, more than the model's {most} positions")
    batch = collate([make_row([document], len(document), processor.config.pad_token_id)])
    device = model.decoder.embed_tokens.weight.device
    hidden = model(batch.to(device)).flatten(0, 1)[batch.trained.to(device)]
    top = [model.head(x).float().log_softmax(-1).topk(k) for x in hidden.split(256)]
    teacher = {
        "tokens": batch.labels.flatten()[batch.trained].tolist(),
        "ids": torch.cat([part.indices for part in top]).tolist(),
        "logprobs": [[round(x, 4) for x in row] for part in top for row in part.values.tolist()],
    }
    return {**as_record(found, found.sample.messages), "teacher": teacher}
