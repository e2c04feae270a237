"""Batch -> Questions; a question and the model's own answers to it -> Document.

```
document of the loader   [image, user: what?] [assistant: red <end>]          the reference answer
question                 [image, user: what? assistant:]                      its prompt, for the engine
document to learn from   [image, user: what? assistant] [: red <end>] [: blue <end>] ...    a branch for each answer
```

Every branch begins with the last token of the prompt, which predicts the first of the answer; all before it is the
prefix, so that the prompt and its images are computed once, forward and backward.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanovlm.data.chat import Processor
from nanovlm.data.places import count_places
from nanovlm.data.types import IGNORE, Batch, Document, Grid, count_tiles


@dataclass(frozen=True)
class Question:
    """What the model is asked: a prompt that ends where the answer begins, and what a record says about it."""

    prompt: Document
    # The text of the prompt, without images and special tokens.
    text: str
    # The answer of the record.
    reference: str


@dataclass
class OwnAnswer:
    """What the model answered."""

    # All tokens that were sampled, also the one that ended the answer.
    ids: list[int] = field(default_factory=list)
    # The log-probabilities with which they were drawn.
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    # Whether the model ended it, not the largest number of tokens.
    has_ended: bool = False


def find_questions(batch: Batch, processor: Processor) -> Iterator[Question]:
    """Yield the last question of each document of a batch, and each of those that are branches, in order."""
    for row, doc_ids in enumerate(batch.doc_ids):
        for number in doc_ids[doc_ids >= 0].unique().tolist():
            is_own = doc_ids == number
            ids, labels, branch_ids = (x[row][is_own] for x in (batch.input_ids, batch.labels, batch.branch_ids))
            spans = None if batch.span_ids is None else batch.span_ids[row][is_own]
            tiles, grids = batch.tiles_of(number)
            for branch in branch_ids[branch_ids > 0].unique().tolist() or [0]:
                is_seen = (branch_ids == 0) | (branch_ids == branch)
                trained = (labels[is_seen] != IGNORE).nonzero()[:, 0]
                if len(trained):
                    # The last run of trained positions is the last answer.
                    start = int(trained[torch.nn.functional.pad(trained.diff() > 1, (1, 0), value=True)][-1])
                    seen_spans = None if spans is None else spans[is_seen][: start + 1]
                    yield make_question(ids[is_seen], labels[is_seen], start, tiles, processor, grids, seen_spans)


def make_question(
    ids: Tensor,
    labels: Tensor,
    start: int,
    tiles: Tensor,
    processor: Processor,
    grids: Sequence[Grid] = (),
    spans: Tensor | None = None,
) -> Question:
    """Cut a conversation before the answer whose first token is the label at `start`; later images are left out."""
    prompt, config = ids[: start + 1].clone(), processor.config
    if config.vision is not None:
        num_places = int((prompt == config.image_token_id).sum())
        ends = itertools.accumulate(count_places(config, grids) if grids else ())
        grids = [grid for grid, end in zip(grids, ends, strict=True) if end <= num_places]
        tiles = tiles[: [0, *count_tiles(grids)][-1] if config.has_grids else num_places // config.num_image_tokens]
    answer = [token for token in labels[start:].tolist() if token != IGNORE and token not in config.stop_token_ids]
    document = Document(
        input_ids=prompt,
        labels=torch.full_like(prompt, IGNORE),
        branch_ids=torch.zeros(len(prompt), dtype=torch.int32),
        tiles=tiles.clone(),
        grids=list(grids),
        span_ids=spans,
    )
    return Question(document, processor.decode(prompt.tolist()), processor.decode(answer))


def make_document(question: Question, answers: Sequence[OwnAnswer], **values: Sequence[float]) -> Document:
    """Return a document whose branches are the answers; `values` are numbers of each answer.

    Its values are these, and old_logprobs, the log-probabilities with which the tokens were drawn.
    """
    before, last = question.prompt.input_ids[:-1], question.prompt.input_ids[-1:]
    sampled = [torch.tensor(answer.ids) for answer in answers]
    lengths = torch.tensor([len(ids) for ids in sampled])
    outside = torch.zeros(len(before))
    drawn = torch.tensor([x for answer in answers for x in answer.logprobs])
    return Document(
        input_ids=torch.cat([before, *(torch.cat((last, ids[:-1])) for ids in sampled)]),
        labels=torch.cat([torch.full_like(before, IGNORE), *sampled]),
        branch_ids=torch.cat((outside, torch.arange(1, len(answers) + 1).repeat_interleave(lengths))).int(),
        tiles=question.prompt.tiles,
        grids=question.prompt.grids,
        span_ids=question.prompt.span_ids,
        values={
            "old_logprobs": torch.cat((outside, drawn)),
            **{
                name: torch.cat((outside, torch.tensor(numbers, dtype=torch.float32).repeat_interleave(lengths)))
                for name, numbers in values.items()
            },
        },
    )
