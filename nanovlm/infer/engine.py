"""Requests -> tokens, many at a time: continuous batching over a cache in blocks.

```
submit --> queue --admit--> rows --plan--> one forward pass --choose--> tokens --> events
            first come       at most num_rows,  every answer its next token,      a row that ends makes room
            first served     blocks for all     then prompts, first come first,   for the head of the queue
                             their tokens       up to `chunk` tokens a pass
```

A row is one answer. It is admitted when a row and all the blocks that it may need are free, and never put back. Nobody
overtakes the head of the queue. Each pass (`step`) gives every row that is answering one token, so a long prompt delays
an answer by at most `chunk` tokens of prompt a token; what is left of the pass goes to prompts in the order of their
admission. A prompt begins behind the blocks that are there already (blocks.py): an equal beginning of prompts, images
included, is computed once, also for several answers to one prompt, which wait for the first to compute it.

What a row gets follows from its own tokens and its own generator alone. Beside others sums are rounded in another
order: in fp32 logits differ by some 1e-6 of the largest.
"""

import itertools
import time
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from nanovlm.config import DecoderConfig
from nanovlm.data.places import count_places
from nanovlm.data.types import count_tiles
from nanovlm.errors import UserError
from nanovlm.infer.adapters import check_adapter, choosing
from nanovlm.infer.blocks import Blocks
from nanovlm.infer.features import ImageFeatures
from nanovlm.infer.request import End, Event, Request, Token, Usage
from nanovlm.infer.row import Prompt, Row
from nanovlm.infer.sampling import choose, find_never, find_stops
from nanovlm.infer.speculate import Draft, Guess, accept, add_draft, choose_against, join_guesses, rewind
from nanovlm.model.cache_attention import BLOCK, Span
from nanovlm.model.decoder import rope_table
from nanovlm.model.fusion import View
from nanovlm.model.kv_cache import KVCache
from nanovlm.model.vlm import VLM

MOST_TILES = 8  # or native pictures are encoded in a pass, so that pictures delay answers no more than prompts do


class Chosen(NamedTuple):
    """What a pass gave to the rows that have computed all their tokens; log-probabilities if one asked for them.

    A row stands there once for its last token, and once for each guessed one.
    """

    rows: list[Row]
    ids: Tensor  # int64[R]
    logprobs: Tensor | None = None  # fp32[R]
    likeliest: tuple[Tensor, ...] | None = None  # fp32[R, n], int64[R, n]
    drawn: Tensor | None = None  # fp32[R]


class Engine:
    """Answers many requests at once. Not thread-safe: one thread calls all of it.

    The model is in eval mode, as `nanovlm.load` returns it; `prepare` (model/inference.py) makes it faster on a CPU.
    `num_rows` answers at a time; a cache of `cache_tokens` tokens, 0 for what suits num_rows, in one of CACHE_FORMATS
    (model/cache_codes.py); `chunk` tokens of prompts a pass; at most `feature_bytes` of image features are kept. With
    `read_every` k the host reads the tokens of k passes at once and a GPU waits for nothing in between; 0 for 8 on a
    GPU, and 1 on a CPU and with a `draft`.

    What `draft` guesses (speculate.py, draft_model.py) is checked in the pass that would give one token. Where memory
    runs out, guessing ends before any request does.
    """

    def __init__(
        self,
        model: VLM,
        num_rows: int = 16,
        cache_tokens: int = 0,
        chunk: int = 512,
        feature_bytes: int = 2**28,
        keeps_prefixes: bool = True,
        read_every: int = 0,
        draft: Draft | None = None,
        cache_format: str = "float",
    ):
        for name, value, least in (
            *(("num_rows", num_rows, 1), ("cache_tokens", cache_tokens, 0), ("chunk", chunk, 1)),
            *(("feature_bytes", feature_bytes, 0), ("read_every", read_every, 0)),
        ):
            if value < least:
                raise UserError(f"{name} = {value} must be at least {least}")
        self.model, self.config = model, model.config
        self.num_rows, self.chunk = num_rows, chunk
        weight, positions = model.decoder.embed_tokens.weight, self.config.decoder.max_position_embeddings
        self.device = weight.device
        self.read_every = read_every or (1 if self.device.type == "cpu" else 8)
        num_blocks = ((cache_tokens or suitable_cache(self.config.decoder, num_rows)) + BLOCK - 1) // BLOCK
        self.longest = min(positions, num_blocks * BLOCK)  # a prompt with its answer
        self.cache = make_cache(self.config.decoder, num_blocks, self.device, weight.dtype, cache_format)
        self.blocks = Blocks(num_blocks, keeps_prefixes)
        self.features = ImageFeatures(model, feature_bytes)
        self.looks_back = self.config.vision is not None and model.fusion.looks_back
        self.stops = find_stops(self.config)
        self.never = torch.tensor(find_never(self.config), dtype=torch.int64, device=self.device)
        self.rope = rope_table(torch.arange(self.longest, device=self.device)[None], self.config.decoder)
        self.queue: deque[Row] = deque()
        self.rows: list[Row] = []
        self.num_submitted = 0
        if model.adapters is not None:
            model.adapters.is_stacked = False  # they may have learned since
        self.draft = draft
        if draft is not None:
            draft.prepare(model, num_rows, num_blocks)

    # --- what callers use -------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether no request is queued or being answered."""
        return not self.rows and not self.queue

    def submit(self, request: Request) -> int:
        """Queue a request and return its number. Raises UserError if it can never be answered."""
        self.check(request)
        number, now = self.num_submitted, time.monotonic()
        self.num_submitted += 1
        prompt = Prompt(request, self.model)
        # All of them, or none where one cannot be made.
        rows = [Row(number, answer, request, prompt, now) for answer in range(request.num_answers)]
        self.queue.extend(rows)
        return number

    def check(self, request: Request):
        """Raise UserError if a request can never be answered."""
        request.sampling.validate()
        check_adapter(self.model, request.adapter)
        prompt, num, most = request.prompt, len(request.prompt), request.sampling.max_new_tokens
        positions, vocab_size = self.config.decoder.max_position_embeddings, self.config.decoder.vocab_size
        if request.num_answers < 1:
            raise UserError(f"num_answers = {request.num_answers} must be at least 1")
        if request.num_logprobs is not None and not 0 <= request.num_logprobs <= vocab_size:
            raise UserError(f"num_logprobs = {request.num_logprobs} must be from 0 to the size of the vocabulary")
        if not num or bool((prompt.branch_ids != 0).any()):
            raise UserError("a prompt must be one document without branches, of at least one token")
        if not 0 <= int(prompt.input_ids.min()) <= int(prompt.input_ids.max()) < vocab_size:
            raise UserError(f"a token of the prompt is not one of the model's vocabulary, 0 to {vocab_size - 1}")
        if num + most > positions:
            raise UserError(
                f"a prompt of {num} tokens and {most} new ones are more than the model's {positions} positions: "
                "shorten the prompt or lower max_new_tokens"
            )
        if num + most > self.longest:
            raise UserError(
                f"a prompt of {num} tokens and {most} new ones are more than the cache holds, {self.longest}: raise "
                "cache_tokens, shorten the prompt or lower max_new_tokens"
            )
        if self.config.has_grids and [0, *count_tiles(prompt.grids)][-1] != len(prompt.tiles):
            raise UserError(f"grids = {prompt.grids} are not those of {len(prompt.tiles)} tiles of the prompt")
        num_image = int((prompt.input_ids == self.config.image_token_id).sum()) if self.config.vision else 0
        expected = len(prompt.tiles) * self.config.num_image_tokens if self.config.vision else 0
        if self.config.has_grids:
            expected = sum(count_places(self.config, prompt.grids))
        if num_image != expected:
            raise UserError(f"{num_image} image placeholders in the prompt, but {expected} image features of its tiles")

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run the model once, or `read_every` times where all rows are answering; return what came of it."""
        events: list[Event] = [*self._end_late()]
        self._admit()
        self._guess()
        work, passes = self._plan(), []
        try:
            self._encode(work)
            for number in range(self._count_passes(work)):
                passes.append(self._run(work, passes[-1].ids if number else None, number))
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            for row in self.rows:
                if row.state is not None:  # numbers of the pass that failed are drawn again
                    row.generator.set_state(row.state)
                    row.state = None
            if any(row.guess.tokens for row, _ in work):
                self._end_guessing()
                return events
            if not passes:
                return [*events, self._give_up(work)]
        for number, chosen in enumerate(passes):
            for row, num in work:
                self._advance(row, num - len(row.guess.tokens) if number == 0 else 1)
            events += self._take(chosen)
            work = [(row, num) for row, num in work if row.blocks]  # without those that have ended
        return events

    def cancel(self, number: int, answer: int | None = None, reason: str = "cancelled", message: str = "") -> list[End]:
        """End a request, or one of its answers, now; return the ends, none where it has ended already."""
        rows = [row for row in (*self.rows, *self.queue) if row.number == number and answer in (None, row.answer)]
        return [self._finish(row, reason, message) for row in rows]

    # --- in the order of a step -------------------------------------------------------------------------------

    def _end_late(self) -> list[End]:
        now, late = time.monotonic(), []
        for row in (*self.rows, *self.queue):
            limit = row.request.timeout
            if limit is not None and now - row.submitted > limit:
                late.append((row, f"not finished after {limit:g} seconds: the time-out of the request"))
        return [self._finish(row, "timeout", message) for row, message in late]

    def _admit(self):
        while self.queue and len(self.rows) < self.num_rows:
            row = self.queue[0]
            # The last token is never read, so it needs no slot.
            blocks = self.blocks.take(row.prompt.keys, (row.most_tokens - 1 + BLOCK - 1) // BLOCK)
            if blocks is None:
                return
            row.blocks, row.numbers = blocks, [block.number for block in blocks]
            self.rows.append(self.queue.popleft())

    def _guess(self):
        """Ask for the tokens that may follow those of the rows that are answering and get more than one token."""
        rows = [row for row in self.rows if row.is_answering and row.most_tokens - len(row.tokens) > 1]
        if self.draft is None or not rows:
            return
        try:
            for row, guess in zip(rows, self.draft.propose(rows), strict=True):
                row.is_waiting = guess is None
                if guess is not None:
                    row.guess = guess.cut(row.most_tokens - len(row.tokens) - 1)  # the pass gives one token more
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            self._end_guessing()

    def _end_guessing(self):
        self.draft = None
        for row in self.rows:
            row.guess, row.is_waiting = Guess([]), False
        self._free()

    def _plan(self) -> list[tuple[Row, int]]:
        """Return which rows take part in the next pass, and with how many new tokens, guessed ones included."""
        work = [(row, 1 + len(row.guess.tokens)) for row in self.rows if row.is_answering and not row.is_waiting]
        tokens, tiles, missing = self.chunk, MOST_TILES, set()
        for row in self.rows:
            if tokens <= 0 or row.is_answering:
                continue
            num, (_, needed) = self._claim(row, tokens), row.prompt.span_at(row.num_computed)
            for i in self._pictures_seen(row, row.num_computed, num):
                digest = row.prompt.digests[i]
                if i in row.features or digest in missing or self.features.has(digest):
                    continue
                first = row.prompt.places[i][0]
                if len(missing) >= tiles and first >= needed:  # stop before it
                    num = max(row.prompt.span_at(first)[0] - row.num_computed, 0)
                    break
                missing.add(digest)
            tokens -= num
            work += [(row, num)] if num else []
        return work

    def _claim(self, row: Row, most: int) -> int:
        """Pass by what others have computed of a row's prompt; return how many tokens it computes next, at most `most`.

        It computes no block that another row is filling, but waits for it.
        """
        while row.num_computed < len(row.keys) * BLOCK and row.num_computed % BLOCK == 0:
            if not row.blocks[row.num_computed // BLOCK].is_filled:
                break
            row.num_computed += BLOCK
            row.num_cached += BLOCK
        end = min(row.num_computed + most, len(row.tokens))
        first, last = row.prompt.span_at(end - 1)  # which is not cut
        end = (first if first > row.num_computed else last) if last > end else end
        for index in range(row.num_computed // BLOCK, (end + BLOCK - 1) // BLOCK):
            block = row.blocks[index]
            if block.writer not in (None, row) or (block.is_filled and index * BLOCK >= row.num_computed):
                return max(row.prompt.span_at(index * BLOCK)[0] - row.num_computed, 0)
            block.writer = row
        return end - row.num_computed

    def _pictures_seen(self, row: Row, start: int, num: int) -> range:
        """Return the pictures that the next new tokens of a row need, by their index."""
        return row.prompt.pictures_of(0 if self.looks_back else start, start + num)

    def _encode(self, work: list[tuple[Row, int]]):
        """Give the rows what fusion keeps of the pictures that they show next; all new ones are one batch."""
        wanted = [
            (row, i)
            for row, num in work
            if not row.is_answering
            for i in self._pictures_seen(row, row.num_computed, num)
            if i not in row.features
        ]
        if wanted:
            digests = [row.prompt.digests[i] for row, i in wanted]
            found = self.features.get(digests, [row.prompt.pictures[i] for row, i in wanted])
            for (row, i), features in zip(wanted, found, strict=True):
                row.features[i] = features

    def _count_passes(self, work: list[tuple[Row, int]]) -> int:
        """Return how many passes can run before their tokens are read."""
        if not work:
            return 0
        if self.draft is not None or len(work) < len(self.rows) or not all(row.is_answering for row, _ in work):
            return 1
        return min(self.read_every, *(row.most_tokens - len(row.tokens) for row, _ in work))

    def _run(self, work: list[tuple[Row, int]], ids: Tensor | None, number: int) -> Chosen:
        """Run the model over the new tokens; `ids` int64[R] are those of pass `number`, which the host has not read."""
        starts = [row.num_computed + number for row, _ in work]
        spans = [
            Span(row.numbers, start, num, None if row.is_answering else row.prompt.lasts(start, num))
            for (row, num), start in zip(work, starts, strict=True)
        ]
        now = self.cache.begin(spans)
        rows, lasts, listed, end = [], [], [], 0
        views, placed = [], []
        for i in now.order:
            (row, num), start = work[i], starts[i]
            placed += [row.prompt.placed_at(start, num)] if self.config.decoder.rope_sections else []
            if ids is None:
                listed += row.tokens[start : start + num] + row.guess.tokens
            if row.features and (self.looks_back or not row.is_answering):
                shown = {i: row.features[i] for i in self._pictures_seen(row, start, num)}
                views += [View(end, start, num, row.prompt.places, shown)] if shown else []
            end += num
            if ids is not None or start + num >= len(row.tokens):
                rows += [row] * (1 + len(row.guess.tokens))
                lasts += range(end - 1 - len(row.guess.tokens), end)
        if ids is None:
            ids = torch.tensor(listed).to(self.device, non_blocking=True)
        x_BTD, between = self.model.decoder.embed_tokens(ids[None]), None
        if views:
            x_BTD, between = self.model.fusion.see(x_BTD, views)
        if placed:
            positions = torch.cat(placed, dim=1)[:, None].to(self.device, non_blocking=True)
            rope = rope_table(positions, self.config.decoder)
        else:
            rope = tuple(table[:, now.position_ids[0]] for table in self.rope)
        with choosing(
            self.model, [work[i][0].request.adapter for i in now.order], [spans[i].num_new for i in now.order]
        ):
            hidden, _routing = self.model.decoder(x_BTD, now.position_ids, None, now, rope=rope, between=between)
        if not rows:
            return Chosen([], ids[:0])
        last = hidden[0] if len(lasts) == end else hidden[0, torch.tensor(lasts).to(self.device, non_blocking=True)]
        return self._choose(rows, self.model.head(last).float())

    def _choose(self, rows: list[Row], logits: Tensor) -> Chosen:
        """Choose the token behind the last and each guessed token of the rows, given logits fp32[R, V]."""
        logprobs, likeliest = None, None
        asked = [row.request.num_logprobs for row in rows if row.request.num_logprobs is not None]
        if asked:
            logprobs = logits.log_softmax(-1)
            likeliest = logprobs.topk(max(asked)) if max(asked) else None
        logits.index_fill_(1, self.never, -torch.inf)
        ids = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        for own in group_by_sampling(rows):
            generators, chosen = [rows[i].generator for i in own], list(dict.fromkeys(rows[i] for i in own))
            config = chosen[0].request.sampling
            seen = None
            if config.repetition_penalty != 1:
                seen = torch.cat([add_draft(self._seen(row), row.guess.tokens) for row in chosen])
            if config.temperature > 0:
                for row in chosen:
                    row.state = row.generator.get_state()
            where = slice(None)
            if len(own) < len(rows):
                where = torch.tensor(own).to(self.device, non_blocking=True)
            if all(row.guess.probabilities is None for row in chosen):
                ids[where] = choose(logits[where], seen, config, generators)
            else:
                draft, drawn_by = join_guesses([row.guess for row in chosen], logits)
                ids[where] = choose_against(logits[where], seen, config, generators, draft, drawn_by)
        for i, row in enumerate(rows):
            if row.guess.tokens:  # until it is known how many are accepted
                continue
            row.state = None
            if row.seen is not None:
                row.seen.index_fill_(0, ids[i : i + 1], True)
        if logprobs is not None:
            logprobs = logprobs.gather(-1, ids[:, None])[:, 0]
        drawn = drawn_logprobs(rows, logits, ids) if any(row.request.tells_draws for row in rows) else None
        return Chosen(rows, ids, logprobs, likeliest and tuple(likeliest), drawn)

    def _seen(self, row: Row) -> Tensor:
        if row.seen is None:
            row.seen = torch.zeros(self.config.decoder.vocab_size, dtype=torch.bool, device=self.device)
            row.seen.index_fill_(0, torch.tensor(row.tokens).to(self.device, non_blocking=True), True)
        return row.seen

    def _advance(self, row: Row, num: int):
        """Note that so many more tokens of a row are in the cache, and which blocks are full now."""
        before, row.num_computed = row.num_computed, row.num_computed + num
        for index in range(before // BLOCK, row.num_computed // BLOCK):
            if index == len(row.keys):
                row.keys.append(row.prompt.key(row.keys[-1] if index else row.prompt.root, row.tokens, index * BLOCK))
            block = row.blocks[index]
            self.blocks.name(block, row.keys[index])
            block.is_filled, block.writer = True, None
        if row.features and not self.looks_back:
            left = row.prompt.pictures_of(row.num_computed, row.num_prompt)
            row.features = {i: features for i, features in row.features.items() if i in left}

    def _take(self, chosen: Chosen) -> list[Event]:
        """Read the chosen tokens; return them as events, with the ends of those rows that have ended."""
        events, ids = [], chosen.ids.tolist()
        logprobs, drawn = (x.tolist() if x is not None else [None] * len(ids) for x in (chosen.logprobs, chosen.drawn))
        values, others = (
            (x.tolist() for x in chosen.likeliest) if chosen.likeliest else ([()] * len(ids), [()] * len(ids))
        )
        for row, places in itertools.groupby(range(len(ids)), key=chosen.rows.__getitem__):
            if not row.blocks:  # ended in an earlier pass of this step
                continue
            own = list(places)
            tokens = accept(row.guess.tokens, [ids[i] for i in own], self.stops)
            if not row.num_new:
                row.first_token_s, row.is_answering = time.monotonic() - row.submitted, True
            has_ended = tokens[-1] in self.stops
            new = tokens[:-1] if has_ended else tokens
            row.tokens += new
            if row.guess.tokens:
                self._settle(row, tokens)
            told = []
            for i, token in zip(own, tokens, strict=False):
                num, logprob, likeliest = row.request.num_logprobs, None, ()
                if num is not None:
                    logprob, likeliest = logprobs[i], tuple(zip(others[i], values[i], strict=True))[:num]
                draw = drawn[i] if row.request.tells_draws else None
                told.append(Token(row.number, row.answer, token, logprob, likeliest, draw))
            events += told[: len(new)]
            if has_ended:
                events.append(self._finish(row, "stop", last=told[-1] if row.request.tells_draws else None))
            elif len(row.tokens) == row.most_tokens:
                events.append(self._finish(row, "length"))
        return events

    def _settle(self, row: Row, tokens: list[int]):
        """Note what came of a guess: the accepted tokens, and one more."""
        row.num_drafted += len(row.guess.tokens)
        row.num_accepted += sum(token == guessed for token, guessed in zip(tokens, row.guess.tokens, strict=False))
        self._advance(row, len(tokens) - 1)
        if row.state is not None:
            rewind(row.generator, row.state, len(tokens))
        if row.seen is not None:
            row.seen[tokens] = True
        row.guess, row.state = Guess([]), None

    def _give_up(self, work: list[tuple[Row, int]]) -> End:
        """End the row with most new tokens, of equal ones the last, so that the others can go on."""
        row, _ = max(reversed(work), key=lambda pair: pair[1])
        self._free()
        return self._finish(
            row, "error", "there is not enough memory on the device for this request and those beside it"
        )

    def _free(self):
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _finish(self, row: Row, reason: str, message: str = "", last: Token | None = None) -> End:
        if row.blocks:
            self.blocks.release(row.blocks, row)
            self.rows.remove(row)
        else:
            self.queue.remove(row)
        row.blocks, row.numbers, row.features = [], [], {}
        if self.draft is not None:
            self.draft.forget(row)
        total_s, guessed = time.monotonic() - row.submitted, (row.num_drafted, row.num_accepted)
        usage = Usage(row.num_prompt, row.num_cached, row.num_new, row.first_token_s, total_s, *guessed)
        return End(row.number, row.answer, reason, message, usage, last)


def suitable_cache(config: DecoderConfig, num_rows: int) -> int:
    """Return how many tokens a cache has room for where nobody says it."""
    positions = config.max_position_embeddings
    return max(min(positions, 8192), num_rows * min(positions, 1024))


def make_cache(
    config: DecoderConfig, num_blocks: int, device: torch.device, dtype: torch.dtype, format: str = "float"
) -> KVCache:
    """Raise UserError where the device has too little memory for the cache."""
    try:
        return KVCache(config, num_blocks, device, dtype, format)
    except OUT_OF_MEMORY as error:
        if not is_out_of_memory(error):
            raise
        num, size = num_blocks * BLOCK, KVCache(config, 0, device, dtype, format).bytes_per_token
        raise UserError(
            f"a cache of {num} tokens takes {num * size / 1e9:.3g} GB, more than there is: lower cache_tokens"
        ) from error


def drawn_logprobs(rows: list[Row], logits: Tensor, ids: Tensor) -> Tensor:
    """Return log softmax(logits / temperature)[id] of each row, fp32[R]; -inf in logits leaves a token out."""
    temperatures = torch.tensor([row.request.sampling.temperature or 1.0 for row in rows])
    logits = logits / temperatures.clamp(min=1e-20).to(logits.device, non_blocking=True)[:, None]
    return logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)


def group_by_sampling(rows: list[Row]) -> list[list[int]]:
    """Return the indices of the rows in groups that choose in the same way, whatever their seeds."""
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        c = row.request.sampling
        groups.setdefault((c.temperature, c.top_k, c.top_p, c.min_p, c.repetition_penalty), []).append(i)
    return list(groups.values())


# What torch raises where memory is short: on a CPU a plain RuntimeError.
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError, RuntimeError)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
