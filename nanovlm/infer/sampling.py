"""Batch of prompts -> tokens: prefill, decode one token at a time, choose the next.

A prompt is a row with one document, padded on the right; every row has its own length. Shapes: B rows,
T prompt tokens, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nanovlm.config import SamplingConfig, VLMConfig
from nanovlm.data.types import Batch
from nanovlm.errors import UserError
from nanovlm.model.kv_cache import KVCache
from nanovlm.model.vlm import VLM


@torch.inference_mode()
def stream(model: VLM, batch: Batch, config: SamplingConfig) -> Iterator[Tensor]:
    """Yield the next token of every row, int64[B], until all rows have ended or have max_new_tokens.

    A row ends with eos_token_id or one of stop_token_ids, which is yielded, and yields pad_token_id from then on.
    Answers never contain padding or image tokens. Raises UserError if a prompt leaves no room for max_new_tokens.
    """
    config.validate()
    pad, image = model.config.pad_token_id, model.config.image_token_id
    stops = torch.tensor(find_stops(model.config), device=batch.input_ids.device)
    never = [token for token in {pad, image} if token not in (*find_stops(model.config), None)]
    lengths = (batch.doc_ids >= 0).sum(1)
    if (longest := int(lengths.max()) + config.max_new_tokens) > model.config.decoder.max_position_embeddings:
        raise UserError(
            f"a prompt of {int(lengths.max())} tokens and {config.max_new_tokens} new ones are more than the model's "
            f"{model.config.decoder.max_position_embeddings} positions: shorten the prompt or lower max_new_tokens"
        )
    cache = KVCache(
        model.config.decoder,
        len(lengths),
        longest,
        device=lengths.device,
        dtype=model.decoder.embed_tokens.weight.dtype,
    )
    generators = [torch.Generator().manual_seed(config.seed) for _ in lengths]
    seen = torch.zeros(len(lengths), model.config.decoder.vocab_size, dtype=torch.bool, device=lengths.device)
    # In place of padding, mark the first token again: the padding token itself may not occur in the prompt.
    seen.scatter_(1, torch.where(batch.doc_ids >= 0, batch.input_ids, batch.input_ids[:, :1]), True)
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    logits = prefill(model, batch, cache)
    for i in range(config.max_new_tokens):
        logits = logits.float()
        logits[:, never] = -torch.inf
        tokens = choose(logits, seen, config, generators).masked_fill(ended, pad)
        yield tokens
        ended = ended | torch.isin(tokens, stops)
        if i + 1 == config.max_new_tokens or bool(ended.all()):
            return
        seen.scatter_(1, tokens[:, None], True)
        logits = decode_one_token(model, tokens, cache)


def generate(model: VLM, batch: Batch, config: SamplingConfig = SamplingConfig(), **options) -> list[list[int]]:
    """Return the tokens of every row's answer, without the end of turn; `options` override fields of config."""
    rows = torch.stack(list(stream(model, batch, replace(config, **options))), dim=1).tolist()
    return [cut_at_end(row, model.config) for row in rows]


def cut_at_end(tokens: list[int], config: VLMConfig) -> list[int]:
    """Return the tokens before the end of turn."""
    stops = find_stops(config)
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), None)]


def find_stops(config: VLMConfig) -> list[int]:
    """Return the tokens that end an answer, the end of turn first."""
    return [config.eos_token_id, *config.stop_token_ids]


def prefill(model: VLM, batch: Batch, cache: KVCache) -> Tensor:
    """Run the prompts through the model and into the cache; return logits [B, V] after each row's last token."""
    if bool((batch.doc_ids > batch.doc_ids[:, :1]).any() | (batch.branch_ids != 0).any()):
        raise UserError("a row of prompts must hold one document without branches")
    lengths = (batch.doc_ids >= 0).sum(1)
    # Padding goes into the slots behind the prompt, which decoding overwrites before anything sees them.
    slots = torch.arange(batch.input_ids.shape[1], device=lengths.device).expand_as(batch.input_ids)
    hidden = model(replace(batch, position_ids=slots), cache)
    cache.lengths = lengths
    return model.head(hidden[torch.arange(len(lengths), device=lengths.device), lengths - 1])


def decode_one_token(model: VLM, tokens: Tensor, cache: KVCache) -> Tensor:
    """Append tokens int64[B] to the rows of the cache; return logits [B, V] after them."""
    position_ids = cache.lengths[:, None]
    x_BTD = model.decoder.embed_tokens(tokens[:, None])
    hidden, _routing = model.decoder(x_BTD, position_ids, cache.make_mask(position_ids), cache)
    cache.lengths = cache.lengths + 1
    return model.head(hidden[:, 0])


def choose(logits: Tensor, seen: Tensor, config: SamplingConfig, generators: list[torch.Generator]) -> Tensor:
    """Choose one token per row of logits fp32[B, V]: penalty, then greedy, or temperature, top-k, top-p, min-p, draw.

    `seen` bool[B, V] marks the tokens that the repetition penalty applies to. Each row draws from its own generator,
    so that an answer does not depend on its neighbours. Returns int64[B].
    """
    if config.repetition_penalty != 1:
        logits = penalize(logits, seen, config.repetition_penalty)
    if config.temperature == 0:
        return logits.argmax(-1)
    sums = filter_logits(logits, config).double().softmax(-1).cumsum(-1)
    drawn = torch.stack([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    # The first token whose cumulative sum exceeds the drawn share of the total, so never one of zero probability.
    return torch.searchsorted(sums, drawn.to(sums.device) * sums[:, -1:], right=True)[:, 0].clamp(max=sums.shape[1] - 1)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make seen tokens less likely: divide positive logits by the penalty, multiply negative ones by it."""
    return torch.where(seen, logits * torch.where(logits > 0, 1 / penalty, penalty), logits)


def filter_logits(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Divide by the temperature, then set to -inf what top-k, top-p and min-p exclude, in this order."""
    # Shift the maximum to 0 and bound the divisor from below, so that no temperature, however small, gives NaN.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(config.temperature, 1e-20)
    if config.top_k:
        kth = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if config.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # The token that crosses top_p is kept, as the sum before each token is compared.
        left_out = probabilities.cumsum(-1) - probabilities >= config.top_p
        logits = logits.masked_fill(left_out.gather(-1, order.argsort(-1)), -torch.inf)
    if config.min_p:
        probabilities = logits.softmax(-1)
        least = config.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits
