"""Prompt and answer -> where each token of the answer looked, what else could have stood there, and who computed it.

One pass over the whole conversation, without a cache. A token is predicted at the position before it, so that is where
its attention, its alternatives and its experts are read. Legend: A tokens of the answer, P image tokens, S tokens that
are seen, L layers, N query heads, K key/value heads, H head size, k experts a token.
"""

import base64
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from nanovlm.config import VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import place_tiles
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.types import IGNORE, Document
from nanovlm.errors import UserError
from nanovlm.model.decoder import Attention
from nanovlm.model.vlm import VLM, Extras

NUM_LIKELIEST = 10
ROWS = 64  # queries whose weights, and positions whose logits, are computed at a time
# Of one response.
MOST_TOKENS, MOST_WEIGHTS = 256, 4 * 2**20

Means = Literal["none", "heads", "layers"]


@dataclass
class Look:
    """What led to each token of an answer. All tensors are on the CPU.

    The weights of a query add up to 1 over images and text. Where they are means over heads, N is 1, and L, too, where
    they are means over all layers.
    """

    answer_ids: list[int]
    # float32[L, N, A, P]: how much of its attention a query gives to each image token of the prompt, in their order.
    to_images: Tensor
    # float32[L, N, A]: how much of it goes to all other tokens.
    to_text: Tensor
    # float32[A]: natural log-probability of each token.
    logprobs: Tensor
    # int64[A, 10], float32[A, 10]: the likeliest tokens at each place and their log-probabilities, likeliest first.
    likeliest_ids: Tensor
    likeliest_logprobs: Tensor
    # int64[M, A, k], float32[M, A, k], of the M layers that are mixtures: the experts, best first, and the factors of
    # their outputs; None without mixture.
    experts: Tensor | None
    expert_weights: Tensor | None


@torch.inference_mode()
def look(model: VLM, prompt: Document, answer_ids: list[int], means: Means = "none") -> Look:
    """Return what led to each token of an answer to a prompt (`Processor.prompt`).

    `means` takes the mean of the weights over heads, or over layers and heads, which bounds the memory they take. The
    model must not be in use by another thread: for this pass, its attention tells its weights.
    """
    device, config = model.decoder.embed_tokens.weight.device, model.config
    if not answer_ids:
        raise UserError("there is no answer to look at: it has no tokens")
    for token in answer_ids:
        if not 0 <= token < config.decoder.vocab_size or token == config.image_token_id:
            raise UserError(f"token {token} cannot stand in an answer of this model")
    if config.decoder.attention_sinks or config.decoder.attention_softcap:
        raise UserError("where an answer looked is not drawn for attention with sinks or a softcap")
    if len(prompt.tiles):
        check_places(config)
    first, A = len(prompt) - 1, len(answer_ids)
    if first + A > (most := config.decoder.max_position_embeddings):
        raise UserError(f"prompt and answer have {first + 1 + A} tokens, more than the model's {most} positions")
    ids = torch.cat((prompt.input_ids, torch.tensor(answer_ids[:-1], dtype=torch.int64)))
    fields = {"input_ids": ids, "labels": torch.full_like(ids, IGNORE), "branch_ids": torch.zeros_like(ids).int()}
    batch = collate([make_row([replace(prompt, **fields)], len(ids), config.pad_token_id)]).to(device)
    is_image = batch.input_ids[0] == (-1 if config.image_token_id is None else config.image_token_id)

    layers = config.decoder.num_hidden_layers if means != "layers" else 1
    heads = config.decoder.num_attention_heads if means == "none" else 1
    to_images, to_text = torch.zeros(layers, heads, A, int(is_image.sum())), torch.zeros(layers, heads, A)

    def see(layer: int, start: int, weights_NAS: Tensor):
        if means != "none":
            weights_NAS = weights_NAS.mean(0, keepdim=True)
        if means == "layers":
            layer, weights_NAS = 0, weights_NAS / config.decoder.num_hidden_layers
        end = start + weights_NAS.shape[1]
        to_images[layer, :, start:end] += weights_NAS[:, :, is_image].cpu()
        to_text[layer, :, start:end] += weights_NAS[:, :, ~is_image].sum(-1).cpu()

    extras = Extras()
    with watch_attention(model, A, see):
        hidden_AD = model(batch, extras=extras)[0, first:]
    targets, chosen = torch.tensor(answer_ids, device=device), []
    for start in range(0, A, ROWS):
        logprobs_AV = model.head(hidden_AD[start : start + ROWS]).float().log_softmax(-1)
        own = logprobs_AV.gather(1, targets[start : start + ROWS, None])[:, 0]
        chosen.append((own, *logprobs_AV.topk(min(NUM_LIKELIEST, logprobs_AV.shape[1]))))
    own, values, indices = (torch.cat(parts).cpu() for parts in zip(*chosen, strict=True))
    experts = weights = None
    if extras.routing:
        experts = torch.stack([routing.choice[first:] for routing in extras.routing]).cpu()
        weights = torch.stack([routing.weights[first:] for routing in extras.routing]).float().cpu()
    return Look(answer_ids, to_images, to_text, own, indices, values, experts, weights)


def check_places(config: VLMConfig):
    """Raise UserError for a model whose answers look at no places of a picture."""
    if config.fusion.type != "sequence":
        raise UserError(
            f"where an answer looked is drawn of image tokens in the sequence, and with fusion.type = "
            f"{config.fusion.type!r} there are none"
        )
    if config.tiling.policy == "anyres":
        raise UserError(
            "it cannot be drawn where an answer looked in pictures of tiling.policy = anyres: their tiles are put "
            "together, and some have no image tokens of their own"
        )
    if config.projector.num_tokens:
        raise UserError(
            f"the {config.num_image_tokens} image tokens of projector.type = {config.projector.type!r} are of no place "
            "in the picture, so that it cannot be drawn where an answer looked"
        )


@contextlib.contextmanager
def watch_attention(model: VLM, num_queries: int, see: Callable[[int, int, Tensor], None]) -> Iterator[None]:
    """Inside, call `see(layer, start, weights)` in each layer for the last queries of a row of one document.

    `weights` fp32[N, A, S] are those of the A queries from `start` on, counted from the first that is watched. What the
    layers compute stays as it is.
    """
    attentions = [module for module in model.decoder.modules() if isinstance(module, Attention)]
    backends, windows = [attention.attend for attention in attentions], model.config.decoder.windows

    def watch(layer, attend):
        def attend_watched(q, k, v, mask):
            first = q.shape[1] - num_queries
            for start in range(0, num_queries, ROWS):
                place = first + start
                queries = q[0, place : first + min(start + ROWS, num_queries)]
                see(layer, start, attention_weights(queries, k[0], place, windows[layer]))
            return attend(q, k, v, mask)

        return attend_watched

    try:
        for layer, attention in enumerate(attentions):
            attention.attend = watch(layer, attention.attend)
        yield
    finally:
        for attention, attend in zip(attentions, backends, strict=True):
            attention.attend = attend


def attention_weights(q: Tensor, k: Tensor, first: int, window: int = 0) -> Tensor:
    """Return the weights fp32[N, A, S] of queries [A, N, H] at the positions from `first` on for keys [S, K, H].

    A query sees the keys up to its position, as many as a window has if that is not 0; softmax(q k / sqrt(H)) is in
    fp32 whatever the dtypes are.
    """
    q_KGAH = rearrange(q.float(), "A (K G) H -> K G A H", K=k.shape[1])
    scores = torch.einsum("kgah, skh -> kgas", q_KGAH, k.float()) / math.sqrt(q.shape[-1])
    positions = torch.arange(len(k), device=k.device)
    own = positions[first : first + len(q), None]
    is_hidden = (positions > own) | (positions <= own - (window or len(k)))
    return scores.masked_fill(is_hidden, -torch.inf).softmax(-1).flatten(0, 1)


# --- as JSON, for the page ------------------------------------------------------------------------------------


def look_response(
    model: VLM, processor: Processor, prompt: Document, sizes: list[tuple[int, int]], answer_ids: list[int]
) -> dict:
    """Return as JSON what led to each token of the answer to a prompt, which shows images of these (width, height).

    ```
    images     [{width, height}], in pixels, in the order in which they are shown
    tiles      [{image, box: [left, top, right, bottom], whole}], as TilePlace
    grid       image tokens along each side of a tile; they lie row by row
    tokens     [{id, text, logprob, likeliest: [[id, text, logprob], ...]}], of the answer
    left_out   how many more tokens the answer has
    attention  layers L, heads N, mean (none, heads or layers: whether L and N below are 1), and in base64, with P the
               image tokens of all tiles:
                 weights uint8[L, N, A, P]     attention as shares of the largest weight of a query, 255 for 1
                 peaks   float32[L, N, A]      the largest weight
                 text    float32[L, N, A]      how much attention other tokens have
    experts    null, or {count, chosen: [A][L][k], weights: [A][L][k]}, empty lists for a dense layer among mixtures
    ```

    `weights` has at most MOST_WEIGHTS bytes: where there are more, they are means over heads, or layers and heads, and
    at last the answer is cut; no more than MOST_TOKENS tokens are told.
    """
    config = model.config
    P = len(prompt.tiles) * config.num_image_tokens
    shown = answer_ids[: max(1, min(MOST_TOKENS, MOST_WEIGHTS // max(1, P)))]
    L, N = config.decoder.num_hidden_layers, config.decoder.num_attention_heads
    means = choose_means(L, N, len(shown) * P)
    found = look(model, prompt, shown, means)
    tiles = []
    for number, size in enumerate(sizes):
        for place in place_tiles(*size, config):
            tiles.append({"image": number, "box": list(place[:4]), "whole": place.is_whole})
    told = zip(shown, split_text(shown, processor), found.logprobs.tolist(), strict=True)
    tokens = [{"id": token, "text": text, "logprob": logprob} for token, text, logprob in told]
    for token, ids, logprobs in zip(tokens, found.likeliest_ids, found.likeliest_logprobs, strict=True):
        likeliest = zip(ids.tolist(), logprobs.tolist(), strict=True)
        token["likeliest"] = [[i, show_token(i, processor), logprob] for i, logprob in likeliest]
    # Of a prompt without images there are no weights.
    peaks = found.to_images.amax(-1) if P else torch.zeros_like(found.to_text)
    shares = found.to_images / peaks.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return {
        "version": 1,
        "images": [{"width": width, "height": height} for width, height in sizes],
        "tiles": tiles,
        "grid": math.isqrt(config.num_image_tokens),
        "tokens": tokens,
        "left_out": len(answer_ids) - len(shown),
        "attention": {
            "layers": L,
            "heads": N,
            "mean": means,
            "weights": _base64((255 * shares).round().to(torch.uint8)),
            "peaks": _base64(peaks),
            "text": _base64(found.to_text),
        },
        "experts": _tell_experts(found, config),
    }


def choose_means(num_layers: int, num_heads: int, num_weights: int) -> Means:
    """Return what to take means over so that a response has room; `num_weights` are those of a head of a layer."""
    if num_layers * num_heads * num_weights <= MOST_WEIGHTS:
        return "none"
    return "heads" if num_layers * num_weights <= MOST_WEIGHTS else "layers"


def _tell_experts(found: Look, config: VLMConfig) -> dict | None:
    if found.experts is None or found.expert_weights is None or config.decoder.moe is None:
        return None
    chosen, weights = ([[[]] * config.decoder.num_hidden_layers for _ in found.answer_ids] for _ in range(2))
    for i, layer in enumerate(config.decoder.mixtures):
        for a in range(len(chosen)):
            chosen[a][layer], weights[a][layer] = found.experts[i, a].tolist(), found.expert_weights[i, a].tolist()
    return {"count": config.decoder.moe.num_experts, "chosen": chosen, "weights": weights}


def _base64(tensor: Tensor) -> str:
    """Write the values of a tensor, little-endian."""
    values = tensor.contiguous().numpy()
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def split_text(ids: list[int], processor: Processor) -> list[str]:
    """Return the text that each token of an answer adds; a character of several tokens comes with the last of them."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = processor.decode(ids[:end])
        if end < len(ids) and text.endswith("\ufffd"):
            text = before
        texts.append(text[len(before) :])
        before = text
    return texts


def show_token(token: int, processor: Processor) -> str:
    """Return the text of a token by itself, or its name if it is a special token or a part of a character."""
    name = processor.tokenizer.id_to_token(token)
    if name is None or name in processor.special:
        return name or f"token {token}"
    end = processor.config.eos_token_id  # after a token, decoders keep the space before a word
    text = processor.tokenizer.decode([end, token], skip_special_tokens=False).removeprefix(
        processor.tokenizer.decode([end], skip_special_tokens=False)
    )
    return name if not text or "\ufffd" in text else text
