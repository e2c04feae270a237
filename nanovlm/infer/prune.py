"""Prompt -> the tokens of its answer, with fewer image tokens in later blocks (FastV, arXiv 2403.06764).

```
blocks 0 .. after-1      all tokens of the prompt
                         the last token's attention in block after-1, mean over heads: which image tokens it looks at
blocks after ..          without the share of image tokens that it looks at least; they are neither computed nor cached
```

Nothing is trained for it. What is left keeps its positions. With a share of 0 the answer is the engine's. One prompt at
a time, with a cache of its own: as its layers hold different numbers of tokens, and which ones depends on the question,
it has none of the engine's shared blocks.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nanovlm.config import SamplingConfig
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.types import Document
from nanovlm.errors import UserError
from nanovlm.infer.looking import attention_weights
from nanovlm.infer.sampling import choose, find_never, find_stops
from nanovlm.model.attention import make_mask
from nanovlm.model.decoder import Attention, rope_table
from nanovlm.model.vlm import VLM


class Pruned(NamedTuple):
    """An answer, and what the later blocks were given of the prompt."""

    ids: list[int]
    # int64[M], the positions of the prompt's tokens that they have.
    kept: Tensor
    # Keys and values of the prompt in the cache, and of it without pruning.
    cached_bytes: int
    whole_bytes: int


class GrowingCache:
    """The keys and values of one row; each layer has a length of its own. Stands for a CachePass in the blocks."""

    def __init__(self, model: VLM, num_new: int):
        self.attends = [module.attend for module in model.decoder.modules() if isinstance(module, Attention)]
        self.num_new, self.backend = num_new, model.config.decoder.attention
        # [1, S, K, H] for each layer, and how many of the S are filled.
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: list[int] = []
        # The layer whose weights of the last query are kept, and these, the mean over heads: fp32[T].
        self.watched, self.weights = -1, torch.empty(0)
        self.mask = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.to(v.dtype)
        if layer == len(self.keys):  # the prompt
            room = (1, k.shape[1] + self.num_new, *k.shape[2:])
            self.keys.append(k.new_empty(room))
            self.values.append(v.new_empty(room))
            self.lengths.append(0)
        start, end = self.lengths[layer], self.lengths[layer] + k.shape[1]
        self.keys[layer][:, start:end], self.values[layer][:, start:end], self.lengths[layer] = k, v, end
        if layer == self.watched:
            self.weights = attention_weights(q[0, -1:], k[0], k.shape[1] - 1)[:, 0].mean(0)
        mask = None  # one new token sees all
        if q.shape[1] > 1:
            if self.mask is None:
                one = torch.zeros(1, q.shape[1], dtype=torch.int32, device=q.device)
                self.mask = make_mask(one, one, self.backend)
            mask = self.mask
        return self.attends[layer](q, self.keys[layer][:, :end], self.values[layer][:, :end], mask)


@torch.inference_mode()
def answer_pruned(
    model: VLM, prompt: Document, share: float, after: int = 2, sampling: SamplingConfig = SamplingConfig()
) -> Pruned:
    """Answer a prompt (`Processor.prompt`), with this share of its image tokens left out after the first blocks.

    Raises UserError for a share outside 0 to 1, where no block is left that could do without them, or where pictures
    are not seen as tokens that come one after another.
    """
    config, device = model.config, model.decoder.embed_tokens.weight.device
    for name, value, needed in (
        ("fusion.type", config.fusion.type, "sequence"),
        ("decoder.prefix_attention", config.decoder.prefix_attention, "causal"),
        ("decoder.rope_sections", config.decoder.rope_sections, ()),
        ("projector.deepstack_layers", config.projector.deepstack_layers, ()),
        ("decoder.sliding_window", config.decoder.sliding_window, 0),
        ("decoder.attention_softcap", config.decoder.attention_softcap, 0),
        ("decoder.attention_sinks", config.decoder.attention_sinks, False),
        ("decoder.logit_scale", config.decoder.logit_scale, 1),
    ):
        if value != needed:
            raise UserError(f"{name} = {value} must be {needed} where image tokens are to be left out")
    num_layers, longest = config.decoder.num_hidden_layers, config.decoder.max_position_embeddings
    if not 0 <= share <= 1:
        raise UserError(f"the share of image tokens to leave out, {share}, must be from 0 to 1")
    if not 1 <= after < num_layers:
        raise UserError(
            f"image tokens can be left out after 1 to {num_layers - 1} blocks of this model's {num_layers}, not {after}"
        )
    if len(prompt) + sampling.max_new_tokens > longest:
        raise UserError(
            f"a prompt of {len(prompt)} tokens and {sampling.max_new_tokens} new ones are more than the model's "
            f"{longest} positions: shorten the prompt or lower max_new_tokens"
        )
    batch = collate([make_row([prompt], len(prompt), config.pad_token_id)]).to(device)
    cache, ids = GrowingCache(model, sampling.max_new_tokens), batch.input_ids[0].tolist()
    is_image = batch.input_ids[0] == (-1 if config.image_token_id is None else config.image_token_id)
    num_dropped = math.floor(share * int(is_image.sum()))
    cache.watched = after - 1 if num_dropped else -1
    x_BTD, positions, kept = model.embed(batch), batch.position_ids, torch.arange(len(ids), device=device)
    generator, seen = torch.Generator().manual_seed(sampling.seed), None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(1, config.decoder.vocab_size, dtype=torch.bool, device=device)
        seen[0, ids] = True
    never, stops, answer = find_never(config), find_stops(config), []
    while len(answer) < sampling.max_new_tokens:
        rope = rope_table(positions, config.decoder)
        for index, layer in enumerate(model.decoder.layers):
            if index == after and num_dropped and not answer:
                kept = choose_kept(cache.weights, is_image, num_dropped)
                x_BTD, rope, cache.mask = x_BTD[:, kept], tuple(part[:, kept] for part in rope), None
            x_BTD, _routing = layer(x_BTD, rope, None, cache, None)
        logits = model.head(model.decoder.norm(x_BTD[:, -1])).float()
        logits[:, never] = -torch.inf
        token = int(choose(logits, seen, sampling, [generator]))
        if token in stops:
            break
        answer.append(token)
        if seen is not None:
            seen[0, token] = True
        x_BTD = model.decoder.embed_tokens(torch.tensor([[token]], device=device))
        positions = torch.tensor([[len(ids) + len(answer) - 1]], device=device)
    a_token = 2 * cache.keys[0][0, 0].numel() * cache.keys[0].element_size()
    tokens = after * len(ids) + (num_layers - after) * len(kept)
    return Pruned(answer, kept.cpu(), a_token * tokens, a_token * num_layers * len(ids))


def choose_kept(weights: Tensor, is_image: Tensor, num_dropped: int) -> Tensor:
    """Return the positions of all tokens but the image tokens with the least weights, in order; ties go to the first.

    `weights` fp32[T], `is_image` bool[T].
    """
    order = weights.masked_fill(~is_image, torch.inf).argsort(stable=True)
    is_kept = torch.ones_like(is_image)
    is_kept[order[:num_dropped]] = False
    return is_kept.nonzero()[:, 0]
