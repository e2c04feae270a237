"""A request -> its rows: one for each answer, with what the engine knows about it."""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from nanovlm.data.places import count_places
from nanovlm.data.types import Document, Grid, num_tiles
from nanovlm.infer.adapters import key_of
from nanovlm.infer.blocks import Block, block_key, digest_picture
from nanovlm.infer.features import Picture
from nanovlm.infer.request import Request
from nanovlm.infer.speculate import Guess
from nanovlm.model.cache_attention import BLOCK
from nanovlm.model.mrope import place_tokens
from nanovlm.model.vlm import VLM


class Prompt:
    """What the answers to a request share: token ids, pictures, their digests and image tokens, block keys."""

    def __init__(self, request: Request, model: VLM):
        document, config = request.prompt, model.config
        self.ids = document.input_ids.tolist()
        sizes = [num_tiles(grid) for grid in document.grids] or [1] * len(document.tiles)
        grids: Sequence[Grid | None] = document.grids or [None] * len(document.tiles)
        self.pictures = [Picture(*pair) for pair in zip(document.tiles.split(sizes), grids, strict=True)]
        # What keys begin with, and what stands before the digests of pictures: those of the adapters that it uses.
        self.root = key_of(model, request.adapter)
        sees = key_of(model, request.adapter, ("vision.", "projector.", "fusion."))
        self.digests = [sees + digest_picture(*picture) for picture in self.pictures]
        # How many image tokens stand before each picture, and how many there are.
        counts = count_places(config, document.grids) if document.grids else [config.num_image_tokens] * len(sizes)
        self.starts = [0, *itertools.accumulate(counts)]
        self.image_positions: list[int] = []
        if config.image_token_id is not None:
            self.image_positions = (document.input_ids == config.image_token_id).nonzero()[:, 0].tolist()
        # Those of each picture.
        self.places = [self.image_positions[start:end] for start, end in itertools.pairwise(self.starts)]
        # First and last + 1 of the tokens that see each other, also those behind them.
        self.spans = [] if config.decoder.prefix_attention == "causal" else find_spans(document)
        # int64[3, L]: where its tokens are in time, row and column (M-RoPE), and how many positions pictures save.
        self.placed = torch.empty(3, 0, dtype=torch.int64)
        if config.decoder.rope_sections:
            positions, branches = document.position_ids[None], document.branch_ids[None]
            places = torch.tensor(self.image_positions, dtype=torch.int64)
            self.placed = place_tokens(positions, torch.zeros_like(branches), branches, places, document.grids)[:, 0]
            self.num_saved = sum(rows * columns - max(rows, columns) for rows, columns in document.grids)
        # Of the blocks that may be found; the last token is always computed, as what follows it is to be known.
        self.keys: list[bytes] = []
        for start in range(0, len(self.ids) - BLOCK, BLOCK):
            self.keys.append(self.key(self.keys[-1] if start else self.root, self.ids, start))

    def key(self, before: bytes, tokens: Sequence[int], start: int) -> bytes:
        """Return the key of the block of these tokens that begins at `start`; it says all of a span that it is in."""
        digests = [self.digests[i] for i in self.pictures_of(start, start + BLOCK)]
        for first, end in self.spans:
            if first < start + BLOCK < end:
                pictures = [self.digests[i] for i in self.pictures_of(first, end)]
                digests.append(block_key(b"span", self.ids[first:end], pictures))
        return block_key(before, tokens[start : start + BLOCK], digests)

    def pictures_of(self, start: int, end: int) -> range:
        """Return the indices of the pictures that have image tokens at the positions from `start` to `end`."""
        first, last = (bisect_left(self.image_positions, position) for position in (start, end))
        return range(bisect_right(self.starts, first) - 1, bisect_left(self.starts, last)) if last > first else range(0)

    def placed_at(self, start: int, num: int) -> Tensor:
        """int64[3, num]: where the tokens from `start` on are, those of an answer included."""
        length = len(self.ids)
        answer = torch.arange(max(start, length), max(start + num, length)) - self.num_saved
        return torch.cat((self.placed[:, start : start + num], answer.expand(3, -1)), dim=1)

    def span_at(self, position: int) -> tuple[int, int]:
        """Return the span that a position is in; where it is in none, nothing, (position, position)."""
        return next(((first, end) for first, end in self.spans if first <= position < end), (position, position))

    def lasts(self, start: int, num: int) -> list[int] | None:
        """Return the last positions that tokens see; None where each sees no further than itself."""
        if not any(first < start + num and start < end for first, end in self.spans):
            return None
        return [max(self.span_at(position)[1] - 1, position) for position in range(start, start + num)]


def find_spans(document: Document) -> list[tuple[int, int]]:
    """Return first and last + 1 of the tokens of each span."""
    if document.span_ids is None:
        return []
    numbers, lengths = torch.unique_consecutive(document.span_ids, return_counts=True)
    ends = lengths.cumsum(0)
    is_span = numbers > 0
    return list(zip((ends - lengths)[is_span].tolist(), ends[is_span].tolist(), strict=True))


class Row:
    """An answer that is being made: its tokens, prompt first, and how many of them are in the cache."""

    def __init__(self, number: int, answer: int, request: Request, prompt: Prompt, now: float):
        self.number, self.answer, self.request, self.prompt, self.submitted = number, answer, request, prompt, now
        self.generator = torch.Generator().manual_seed(request.sampling.seed + answer)
        self.tokens, self.num_prompt = list(prompt.ids), len(prompt.ids)
        self.most_tokens = self.num_prompt + request.sampling.max_new_tokens
        self.blocks: list[Block] = []
        self.numbers: list[int] = []
        self.keys = list(prompt.keys)
        self.num_computed = self.num_cached = 0
        # Whether the prompt is done: all tokens but the one chosen last are in the cache.
        self.is_answering = False
        self.first_token_s = 0.0
        # What fusion keeps of pictures that the prompt has yet to show, or of all that tokens look back at, by index.
        self.features: dict[int, Tensor] = {}
        # bool[V], the tokens that the repetition penalty applies to.
        self.seen: Tensor | None = None
        # Tokens that may follow, computed in the same pass.
        self.guess = Guess([])
        # Whether it takes no part in the next pass, as its draft is not ready.
        self.is_waiting = False
        # The generator's, before a pass draws whose outcome is not known yet.
        self.state: Tensor | None = None
        self.num_drafted = self.num_accepted = 0

    @property
    def num_new(self) -> int:
        return len(self.tokens) - self.num_prompt
