"""Logits -> the next token: repetition penalty, then greedy, or temperature, top-k, top-p, min-p and a draw.

Shapes: R rows, V vocabulary.
"""

import torch
from torch import Tensor

from nanovlm.config import SamplingConfig, VLMConfig


def find_stops(config: VLMConfig) -> list[int]:
    """Return the tokens that end an answer, the end of turn first."""
    return [config.eos_token_id, *config.stop_token_ids]


def find_never(config: VLMConfig) -> list[int]:
    """Return the tokens that no answer contains: padding and image tokens."""
    return [token for token in {config.pad_token_id, config.image_token_id} if token not in (*find_stops(config), None)]


def choose(logits: Tensor, seen: Tensor | None, config: SamplingConfig, generators: list[torch.Generator]) -> Tensor:
    """Choose one token per row of logits fp32[R, V]: penalty, then greedy, or temperature, top-k, top-p, min-p, draw.

    `seen` bool[R, V] marks the tokens that the repetition penalty applies to. Each row draws from its own generator,
    so that an answer does not depend on its neighbours. Returns int64[R].
    """
    if config.repetition_penalty != 1 and seen is not None:
        logits = penalize(logits, seen, config.repetition_penalty)
    if config.temperature == 0:
        return logits.argmax(-1)
    sums = filter_logits(logits, config).double().softmax(-1).cumsum(-1)
    drawn = torch.stack([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    shares = drawn.to(sums.device, non_blocking=True) * sums[:, -1:]
    # The first token whose cumulative sum exceeds the drawn share of the total, so never one of zero probability.
    return torch.searchsorted(sums, shares, right=True)[:, 0].clamp(max=sums.shape[1] - 1)


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
