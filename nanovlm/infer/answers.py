"""Batch of prompts -> the tokens of their answers: the engine for those who need neither a queue nor events."""

from dataclasses import replace

from nanovlm.config import SamplingConfig
from nanovlm.data.types import Batch, Document
from nanovlm.errors import UserError
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request, Token
from nanovlm.model.cache_attention import BLOCK
from nanovlm.model.vlm import VLM


def generate(model: VLM, batch: Batch, config: SamplingConfig = SamplingConfig(), **options) -> list[list[int]]:
    """Return the tokens of every row's answer, without the end of turn; `options` override fields of config.

    A row is one document without branches. Every row draws with a generator of its own with the config's seed. Raises
    UserError if a prompt leaves no room for max_new_tokens.
    """
    config = replace(config, **options).validate()
    prompts = [read_row(batch, row) for row in range(len(batch.input_ids))]
    if not prompts:
        return []
    longest = model.config.decoder.max_position_embeddings
    num = sum(min(len(prompt) + config.max_new_tokens, longest) + BLOCK for prompt in prompts)
    engine = Engine(model, num_rows=len(prompts), cache_tokens=num)
    numbers = [engine.submit(Request(prompt, config)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    while not engine.is_idle:
        for event in engine.step():
            if isinstance(event, Token):
                answers[event.request].append(event.id)
            elif event.reason == "error":
                raise UserError(event.message)
    return [answers[number] for number in numbers]


def read_row(batch: Batch, row: int) -> Document:
    """Return the prompt of a row. Raises UserError if the row holds more than one document, or branches."""
    doc_ids = batch.doc_ids[row]
    if bool((doc_ids > doc_ids[:1]).any() | (batch.branch_ids[row] != 0).any()):
        raise UserError("a row of prompts must hold one document without branches")
    is_token = doc_ids >= 0
    tiles, grids = batch.tiles_of(int(doc_ids[0]))
    return Document(
        input_ids=batch.input_ids[row][is_token].cpu(),
        labels=batch.labels[row][is_token].cpu(),
        branch_ids=batch.branch_ids[row][is_token].cpu(),
        tiles=tiles.cpu(),
        grids=grids,
        span_ids=None if batch.span_ids is None else batch.span_ids[row][is_token].cpu(),
    )
