"""Question and options -> the log-probability that a model gives each option.

The options of a question are branches of one document (data/types.py): images and question are computed once. A branch
begins with the last token that all options share, so that the first token of its own has a predictor.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image
from tqdm import tqdm

from nanovlm.config import DecoderConfig
from nanovlm.data.chat import Processor
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row
from nanovlm.data.types import IGNORE, Document, Sample
from nanovlm.errors import UserError
from nanovlm.model.vlm import VLM

BATCH_ROWS = 16


class Asked(Protocol):
    """A conversation that ends with a user's turn."""

    @property
    def images(self) -> list[Image.Image]: ...

    @property
    def messages(self) -> list[dict]: ...


def make_branches(processor: Processor, question: Asked, options: Sequence[str]) -> Document:
    """Return a document with the question as prefix and one branch for each option."""
    written = [
        processor.document(Sample(question.images, [*question.messages, {"role": "assistant", "content": option}]))
        for option in options
    ]
    ids = [document.input_ids.tolist() for document in written]
    shared = next((i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1), min(map(len, ids)))
    # labels[t] is the token after t: the first trained label is at the last token of the prompt.
    answer_starts = (int((document.labels != IGNORE).nonzero()[0]) for document in written)
    prefix = min(shared - 1, *answer_starts)
    branches = [(document.input_ids[prefix:], document.labels[prefix:]) for document in written]
    numbers = [torch.full_like(own, number) for number, (own, _) in enumerate(branches, start=1)]
    return Document(
        input_ids=torch.cat([written[0].input_ids[:prefix], *(own for own, _ in branches)]),
        labels=torch.cat([torch.full((prefix,), IGNORE), *(labels for _, labels in branches)]),
        branch_ids=torch.cat([torch.zeros(prefix, dtype=torch.int64), *numbers]).int(),
        tiles=written[0].tiles,
        grids=written[0].grids,
        span_ids=None if written[0].span_ids is None else written[0].span_ids[:prefix],
    )


def check_branches(decoder: DecoderConfig):
    """Raise UserError for a decoder that reads all of a prompt before its one answer."""
    if decoder.prefix_attention == "whole_prompt":
        raise UserError(
            "decoder.prefix_attention = whole_prompt has no branches, which --likelihood and data.build label make of "
            "options: take another model, or leave --likelihood out"
        )


@torch.inference_mode()
def option_scores(
    model: VLM,
    processor: Processor,
    questions: Sequence[Asked],
    options: Sequence[Sequence[str]],
    title: str | None = None,
) -> list[list[tuple[float, int]]]:
    """Return, for each question and each of its options, the sum of log-probabilities in nats and its number of tokens.

    The end of turn counts as the last token of an option: else "1" would never be less likely than "10". Raises
    UserError for a question that is too long for the model, and for a model without branches.
    """
    check_branches(model.config.decoder)
    device, scores = next(model.parameters()).device, []
    positions = model.config.decoder.max_position_embeddings
    for start in tqdm(range(0, len(questions), BATCH_ROWS), desc=title, disable=title is None, unit="batch"):
        rows = slice(start, start + BATCH_ROWS)
        documents = [
            make_branches(processor, q, texts) for q, texts in zip(questions[rows], options[rows], strict=True)
        ]
        if (longest := max(int(document.position_ids.max()) + 1 for document in documents)) > positions:
            raise UserError(f"a question with its options takes {longest} tokens, the model has {positions} positions")
        length = max(map(len, documents))
        batch = collate([make_row([document], length, model.config.pad_token_id) for document in documents]).to(device)
        hidden = model(batch).flatten(0, 1)[batch.trained]
        labels, branches = batch.labels.flatten()[batch.trained], batch.branch_ids.flatten()[batch.trained]
        logits = model.head(hidden).float()
        found = logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)
        row_of = batch.trained // length
        for row, texts in enumerate(options[rows]):
            places = branches.masked_fill(row_of != row, 0).long()  # 0 is no option
            sums = torch.zeros(len(texts) + 1, dtype=torch.float64, device=device).index_add_(0, places, found.double())
            counts = torch.bincount(places, minlength=len(texts) + 1)
            scores.append(list(zip(sums[1:].tolist(), counts[1:].tolist(), strict=True)))
    return scores
