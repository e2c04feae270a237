"""Raw record -> Document, as a run has it by its settings: turns by their ratings, fewer tiles for what is too long."""

import copy
import dataclasses
from collections.abc import Callable, Iterator

from nanovlm.config import DataConfig, TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import plan_tiles
from nanovlm.data.reader import why_too_long
from nanovlm.data.records import options_of, to_sample
from nanovlm.data.types import Document, Sample, Shrunk


def make_process(processor: Processor, config: DataConfig, pairs: bool = False) -> Callable[[dict], Document]:
    """Return the function that turns raw records into documents; it raises UserError, or Filtered by ratings.

    With `pairs` a document has two branches, a chosen and a rejected answer; else a record of both gives the chosen.
    """
    options = options_of(config)

    def process(raw: dict) -> Document:
        sample = to_sample(raw, **options)

        def make(processor: Processor) -> Document:
            return processor.pair(sample) if pairs else processor.document(sample, config.train_on)

        document = make(processor)
        if config.too_long == "shrink" and sample.images and why_too_long(document, config):
            return shrink(sample, processor, config, make) or document
        return document

    return process


def shrink(
    sample: Sample, processor: Processor, config: DataConfig, make: Callable[[Processor], Document]
) -> Document | None:
    """Return the document with as many tiles as fit, all images of it cut by one smaller tiling; None if none fits."""
    model, before = processor.config, None
    for tiling in smaller(model.tiling, model.tile_size):
        with_fewer = copy.copy(processor)
        with_fewer.config = dataclasses.replace(model, tiling=tiling)
        num_tiles = sum(plan_tiles(*image.size, with_fewer.config).num_tiles for image in sample.images)
        is_hopeless = num_tiles * model.num_image_tokens > config.row_length
        if is_hopeless or num_tiles == before or num_tiles > (config.max_tiles or num_tiles):
            continue
        before, document = num_tiles, make(with_fewer)
        if not why_too_long(document, config):
            return Shrunk(**vars(document))
    return None


def smaller(tiling: TilingConfig, side: int) -> Iterator[TilingConfig]:
    """Yield the tilings of a policy that make fewer tiles of `side` pixels than this one, the largest first."""
    if tiling.policy == "fit":
        for most in range(tiling.max_tiles - 1, 0, -1):
            yield dataclasses.replace(tiling, max_tiles=most)
    if tiling.policy in ("idefics3", "nanovlm"):
        for edge in range((tiling.longest_edge - 1) // side * side, 0, -side):
            yield dataclasses.replace(tiling, longest_edge=edge)
