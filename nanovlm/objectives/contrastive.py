"""Batch of pictures and their captions -> the sum of the contrastive losses of its pairs (contrastive_losses.py).

A unit is a pair. Every picture of a step is compared with every text of it, over all micro-batches and ranks, so that
the number of pairs in a step decides what is learned; how they are divided does not. Where two captions are equal,
neither is a wrong answer for the other's picture.

With a weight of captions, each pair's own loss has beside it that weight times the mean over the tokens of its caption
of what a decoder, which no model keeps, needs to tell it from the picture (captions.py). So the loss of a step is the
contrastive one plus the weight times the mean of its captions' losses, each of which counts alike, long or short.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from nanovlm.config import TrainConfig, pick
from nanovlm.data.spans import boundaries
from nanovlm.data.types import IGNORE, Batch
from nanovlm.model.dual import find_ends
from nanovlm.model.vlm import Extras
from nanovlm.objectives.captions import CaptionDecoder, find_captions
from nanovlm.objectives.contrastive_losses import sigmoid_loss, softmax_loss


class Contrastive:
    """Give a picture and its own caption a larger product than others."""

    learns_from: Literal["captions"] = "captions"

    def __init__(self, config: TrainConfig, processor: Any = None, device: torch.device | None = None):
        self.config, self.batch_rows = config.contrastive, config.data.batch_rows
        self.of_pairs = pick(LOSSES, self.config.loss, "contrastive.loss")
        self.processor, self.decoder = processor, None
        self.state: dict[str, Tensor] = {}
        if self.config.caption_weight:
            assert config.dual is not None
            self.decoder = CaptionDecoder(config.dual, self.config.caption_layers, config.seed).to(device)
            self.state |= self.decoder.named_parameters()

    def count(self, batch: Batch) -> int:
        return len(find_ends(batch.doc_ids))

    def loss(self, model, batch: Batch, extras: Extras) -> Tensor:
        """Return the sum of the losses of a Dual; a step's batch has the rows of all its micro-batches on this rank.

        Metrics are about this rank's pairs alone: how often the right text is the likeliest of a picture, and a picture
        of a text.
        """
        if model.training:
            with torch.no_grad():
                model.logit_scale.clamp_(max=torch.tensor(self.config.max_scale).log().item())
        beside = None if self.decoder is None else self.read_captions(self.decoder, model, batch)
        num_parts = max(1, len(batch.input_ids) // self.batch_rows)
        images, texts, *captions = model(batch, num_parts=num_parts, beside=beside)
        scale = model.logit_scale.float().exp()
        numbers = number_texts(batch)
        loss = self.of_pairs(images, texts, scale, model.logit_bias, self.config.chunk or None, numbers)
        for losses in captions:
            loss = loss + self.config.caption_weight * losses.sum()
            extras.add("caption_loss", losses.sum(), len(losses))
        with torch.no_grad():
            products = images @ texts.T
            for name, dim in (("accuracy_of_texts", 1), ("accuracy_of_pictures", 0)):
                best = products.argmax(dim) if len(images) else numbers
                extras.add(name, (numbers[best] == numbers).sum(), len(images))
            extras.add("scale", scale.sum(), 1)
            if model.logit_bias is not None:
                extras.add("bias", model.logit_bias.float().sum(), 1)
        return loss

    def read_captions(self, decoder: CaptionDecoder, model, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function from features of pictures and their indices to the losses of their captions."""
        captions = find_captions(batch)
        given = self.processor.find_padding(captions)
        given[:, : len(boundaries(self.processor.tokenizer)[0])] = True  # a token before every text tells nothing of it
        captions = captions.masked_fill(given, IGNORE)
        return lambda features, index: decoder(features, captions[index], model.text.token_embedding.weight)


def number_texts(batch: Batch) -> Tensor:
    """Return int64[J] from 0 to 2**24 - 1, equal for equal texts and hardly ever for others: a hash of their tokens."""
    at = batch.doc_ids.flatten().long()
    is_token = at >= 0
    mixed = (batch.input_ids + 1) * 0x9E3779B1 + batch.position_ids * 0x85EBCA77
    mixed = (mixed ^ (mixed >> 15)) * 0x27D4EB2F165667C5
    mixed = (mixed ^ (mixed >> 29)).flatten()
    sums = torch.zeros(len(find_ends(batch.doc_ids)), dtype=torch.int64, device=at.device)
    sums = sums.index_add(0, at[is_token], mixed[is_token])
    return (sums ^ (sums >> 31)) & 0xFFFFFF


# Embeddings fp32[n, E] of pairs, exp(logit_scale), logit_bias, images at once, numbers of texts -> this rank's part


def softmax(images: Tensor, texts: Tensor, scale: Tensor, _bias, chunk: int | None, numbers: Tensor) -> Tensor:
    return softmax_loss(images, texts, scale, chunk=chunk, numbers=numbers)


def sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias, chunk: int | None, numbers: Tensor) -> Tensor:
    return sigmoid_loss(images, texts, scale, bias, chunk=chunk, numbers=numbers)


LOSSES = {"sigmoid": sigmoid, "softmax": softmax}
