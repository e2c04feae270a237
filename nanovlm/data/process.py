"""Raw record -> Document, as a run has it by its settings: turns by their ratings, fewer tiles for what is too long."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nanovlm.config import DataConfig, TilingConfig
from nanovlm.data.chat import Processor
from nanovlm.data.dual import DualProcessor
from nanovlm.data.features import open_features
from nanovlm.data.images import plan_tiles
from nanovlm.data.reader import why_too_long
from nanovlm.data.records import options_of, to_sample
from nanovlm.data.types import IGNORE, Document, Sample, Shrunk
from nanovlm.errors import UserError


def make_process(
    processor: Processor | DualProcessor, config: DataConfig, learns_from: str = "answers"
) -> Callable[[dict], Document]:
    """Return the function that turns raw records into documents; it raises UserError, or Filtered by ratings.

    `learns_from` is that of an objective: for pairs a document has two branches, a chosen and a rejected answer (else a
    record of both gives the chosen); for teacher it has what its record has of one (data/build/top_k.py); for own each
    has a question. The processor of a dual model makes a caption and its picture of each.
    """
    options: dict[str, Any] = options_of(config) | {"video": config.video}
    if isinstance(processor, DualProcessor):
        return lambda raw: processor.document(to_sample(raw, **options))
    if learns_from == "pairs" and config.train_on == "all":
        raise UserError("data.train_on = all must be answers: the objective compares answers, not their prompts")
    if learns_from == "teacher" and config.too_long == "shrink":
        raise UserError("data.too_long = shrink must be skip: the records' teacher saw all tiles of the images")
    if learns_from in ("pairs", "own") and processor.config.decoder.prefix_attention == "whole_prompt":
        raise UserError(
            "decoder.prefix_attention = whole_prompt must be prompt: the objective compares answers, each of which "
            "begins with the last token of their prompt, so that the rest of it cannot see that"
        )
    features = open_features(config.features, processor.config) if config.features else None
    if features is not None:
        options["decode"] = features.find
    known_k: list[int] = []  # of the first record, as tokens of a row need equally many

    def process(raw: dict) -> Document:
        sample = to_sample(raw, **options)
        if learns_from == "own" and sample.messages[0]["role"] == "text":
            raise UserError("the record is text, which asks no question that the model could answer")

        def make(processor: Processor) -> Document:
            return processor.pair(sample) if learns_from == "pairs" else processor.document(sample, config.train_on)

        document = make(processor)
        if features is not None and not sample.images:
            document.tiles = features.nothing
        if learns_from == "teacher":
            document = add_teacher(document, raw.get("teacher"), processor.config.decoder.vocab_size)
            k = document.values["top_ids"].shape[1]
            known_k[:] = known_k or [k]
            if k != known_k[0]:
                raise UserError(f"the teacher of the record gives {k} tokens a place, and that of others {known_k[0]}")
            return document
        if config.too_long == "shrink" and sample.images and why_too_long(document, config):
            return shrink(sample, processor, config, make) or document
        return document

    return process


def add_teacher(document: Document, teacher, vocab_size: int) -> Document:
    """Put a teacher's likeliest tokens, top_ids and top_logprobs fp32[L, K], beside the labels that they are about."""
    names = "tokens", "ids", "logprobs"
    if not isinstance(teacher, dict) or set(names) - teacher.keys():
        raise UserError("the record has no teacher with tokens, ids and logprobs (python -m nanovlm.data.build top-k)")
    try:
        tokens, ids, logprobs = (torch.tensor(teacher[name], dtype=torch.float32) for name in names)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"the teacher of the record has lists of unequal lengths, or no numbers: {error}") from None
    is_trained = document.labels != IGNORE
    if not torch.equal(tokens, document.labels[is_trained].float()):
        raise UserError(
            f"the teacher of the record is about {tokens.numel()} other tokens than the {int(is_trained.sum())} that "
            "are trained: it had another tokenizer, chat template or data.train_on"
        )
    if ids.ndim != 2 or ids.shape != logprobs.shape or len(ids) != len(tokens) or not ids.shape[1]:
        raise UserError("the ids and logprobs of the record's teacher must be as many for each token, and at least one")
    if not ((ids >= 0) & (ids < vocab_size) & (ids == ids.floor())).all():
        raise UserError(f"an id of the record's teacher is no token of the model, which has {vocab_size}")
    if (ids.sort(dim=1).values.diff(dim=1) == 0).any():
        raise UserError("the record's teacher gives a token twice in one place")
    if not (logprobs.isfinite() & (logprobs <= 0)).all() or (logprobs.exp().sum(1) > 1 + 1e-3).any():
        raise UserError(
            "the logprobs of the record's teacher are not those of a distribution: their exp must sum to <= 1"
        )
    for name, values in (("top_ids", ids), ("top_logprobs", logprobs)):
        document.values[name] = torch.zeros(len(document), ids.shape[1])
        document.values[name][is_trained] = values
    return document


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
    if tiling.policy in ("fit", "internvl"):
        for most in range(tiling.max_tiles - 1, 0, -1):
            yield dataclasses.replace(tiling, max_tiles=most)
    if tiling.policy == "native":
        for most in range(tiling.max_patches - 1, 0, -1):
            yield dataclasses.replace(tiling, max_patches=most)
    if tiling.policy == "qwen":
        for most in range((tiling.max_pixels - 1) // side**2 * side**2, 0, -(side**2)):
            yield dataclasses.replace(tiling, max_pixels=most, min_pixels=min(most, tiling.min_pixels))
    if tiling.policy in ("idefics3", "nanovlm", "anyres"):
        for edge in range((tiling.longest_edge - 1) // side * side, 0, -side):
            yield dataclasses.replace(tiling, longest_edge=edge)
