"""A smaller model -> guesses of an engine's rows: the draft of speculative decoding.

```
engine's row   [ image tokens | question | answer so far ]        its cache, its model
                                              |  propose: compute what is new, then num_tokens times the next token
draft's row    [ image tokens | question | answer so far | g1 g2 g3 g4 ]      its own cache, the draft model
```

A draft model that takes the same tiles as the engine's model sees the pictures. To any other a prompt is shown without
image tokens, the engine's and its own. Tokens that the draft's vocabulary lacks are left out of what it is shown, too.
Where both have the same prefix attention, spans are seen in both directions; a causal draft sees none.

For a greedy request the draft is greedy. For another it draws as the request is drawn, by a generator of its own, and
tells by which probabilities (speculate.py). What it guesses follows from the row alone, and a drawn answer waits until
the draft has computed its prompt, so that it still depends on its seed alone.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from nanovlm.errors import UserError
from nanovlm.infer.blocks import Block, Blocks
from nanovlm.infer.engine import MOST_TILES, group_by_sampling, make_cache
from nanovlm.infer.features import ImageFeatures
from nanovlm.infer.row import Prompt, Row
from nanovlm.infer.sampling import choose, find_never, find_stops
from nanovlm.infer.speculate import Guess, find_probabilities, rewind
from nanovlm.model.cache_attention import BLOCK, Span
from nanovlm.model.decoder import rope_table
from nanovlm.model.vlm import VLM


class DraftRow:
    """An engine's row as the draft sees it: the tokens that it knows, and how many of them are in its cache."""

    def __init__(self, row: Row, prompt: Prompt, blocks: list[Block]):
        self.prompt, self.blocks, self.numbers = prompt, blocks, [block.number for block in blocks]
        self.tokens, self.keys = list(prompt.ids), list(prompt.keys)
        self.num_computed = 0
        # How many of the engine's tokens are in `tokens` or left out.
        self.num_seen = row.num_prompt
        # The last guess; all but its last token are in the cache, behind num_computed tokens.
        self.guess: list[int] = []
        sampling = row.request.sampling
        # Another seed than those of the rows, as a guess must not depend on the numbers that it is checked with.
        self.generator = torch.Generator().manual_seed(~(sampling.seed + row.answer))


class DraftModel:
    """Guesses the next `num_tokens` tokens of each row by a model with the same tokenizer (check_vocabulary).

    It begins with a prompt in the step after the answer's first token. In a step it computes at most `chunk` tokens of
    prompts and encodes MOST_TILES tiles, one prompt after the other. A row whose prompt is not done gets no guesses,
    and neither does one for which the draft has too few positions.
    """

    def __init__(self, model: VLM, num_tokens: int = 4, chunk: int = 512, feature_bytes: int = 2**26):
        for name, value in (("num_tokens", num_tokens), ("chunk", chunk)):
            if value < 1:
                raise UserError(f"{name} = {value} must be at least 1")
        self.model, self.num_tokens, self.chunk = model, num_tokens, chunk
        self.device = model.decoder.embed_tokens.weight.device
        self.features = ImageFeatures(model, feature_bytes)
        self.rows: dict[Row, DraftRow | None] = {}
        # What this step has yet to spend on prompts.
        self.tokens_left = self.tiles_left = 0

    def prepare(self, model: VLM, num_rows: int, num_blocks: int):
        own, config, weight = self.model.config, model.config, self.model.decoder.embed_tokens.weight
        if own.decoder.prefix_attention not in ("causal", config.decoder.prefix_attention):
            raise UserError(
                f"the draft model has decoder.prefix_attention = {own.decoder.prefix_attention}, and the model "
                f"{config.decoder.prefix_attention}: take a draft with the same, or a causal one"
            )
        self.has_other_spans = own.decoder.prefix_attention != config.decoder.prefix_attention
        self.vocab_size = config.decoder.vocab_size
        self.num_known = min(self.vocab_size, own.decoder.vocab_size)  # tokens that both models have, the first ones
        self.image_token_id, self.stops = config.image_token_id, frozenset(find_stops(config))
        never = {token for token in (*find_never(own), *find_never(config)) if token < self.num_known}
        self.never = torch.tensor(sorted(never), dtype=torch.int64, device=self.device)
        self.sees_images = (
            own.vision is not None
            and config.vision is not None
            and (own.tile_size, own.num_image_tokens, own.is_native)
            == (config.tile_size, config.num_image_tokens, config.is_native)
            and own.image_token_id == config.image_token_id
            and not own.decoder.rope_sections
            and "anyres" not in (own.tiling.policy, config.tiling.policy)
            and not own.projector.deepstack_layers
            and not self.model.fusion.looks_back  # of another one it is shown no pictures
        )
        # Without image tokens prompts share their blocks at other places, so each row may need a block more; and the
        # draft computes num_tokens behind the last token, even where an answer may have fewer.
        num_blocks += num_rows * (1 + (self.num_tokens + BLOCK - 1) // BLOCK)
        self.cache = make_cache(own.decoder, num_blocks, self.device, weight.dtype)
        self.blocks = Blocks(num_blocks)
        num = min(own.decoder.max_position_embeddings + self.num_tokens, num_blocks * BLOCK)
        self.rope = rope_table(torch.arange(num, device=self.device)[None], own.decoder)
        self.rows = {}

    @torch.inference_mode()
    def propose(self, rows: Sequence[Row]) -> list[Guess | None]:
        self.tokens_left, self.tiles_left = self.chunk, MOST_TILES
        followed = [self._follow(row) for row in rows]
        guesses = [None if self._is_late(row) and row.request.sampling.temperature > 0 else Guess([]) for row in rows]
        asked = [(i, own) for i, own in enumerate(followed) if own is not None]
        if not asked:
            return guesses
        wanted, followed = [rows[i] for i, _ in asked], [own for _, own in asked]
        seen = self._see(wanted, followed)
        logits = self._run([(own, own.num_computed, self._count_new(own)) for own in followed])
        for own in followed:
            self._advance(own, self._count_new(own))
        # As many as an answer may still get, but for the token that the pass gives anyway.
        most = [min(self.num_tokens, row.most_tokens - len(row.tokens) - 1) for row in wanted]
        states = [own.generator.get_state() for own in followed]
        drawn, drawn_by = [], []
        for step in range(max(most)):
            if step:
                logits = self._run([(own, own.num_computed + step - 1, 1) for own in followed], drawn[-1])
            ids, probabilities = self._choose(wanted, followed, logits, seen)
            drawn.append(ids)
            drawn_by.append(probabilities)
        listed = torch.stack(drawn, 1).tolist()  # the one wait for the device
        for r, (i, own) in enumerate(asked):
            own.guess = listed[r]
            ends = [num for num, token in enumerate(own.guess, 1) if token in self.stops]
            is_drawn = rows[i].request.sampling.temperature > 0
            guess = Guess(own.guess, torch.stack([p[r] for p in drawn_by]) if is_drawn else None)
            guesses[i] = guess.cut(min([*ends, most[r]]))  # nothing is accepted behind an end
            if is_drawn:  # how far it was drawn beside others must not matter
                rewind(own.generator, states[r], most[r])
        return guesses

    def forget(self, row: Row):
        own = self.rows.pop(row, None)
        if own is not None:
            self.blocks.release(own.blocks, own)

    # --- in the order of a proposal ---------------------------------------------------------------------------

    def _is_late(self, row: Row) -> bool:
        """Whether a row's prompt is yet to be computed."""
        own = self.rows.get(row)
        return row not in self.rows or (own is not None and self._count_new(own) > self.num_tokens + 1)

    def _count_new(self, own: DraftRow) -> int:
        return len(own.tokens) - own.num_computed

    def _follow(self, row: Row) -> DraftRow | None:
        """Take over what is new of an engine's row. None if its prompt is not done, or there is no room for the row."""
        if row not in self.rows:
            if self.tokens_left == 0:  # later it finds what others have computed by then
                return None
            self.rows[row] = self._begin(row)
        own = self.rows[row]
        if own is None:
            return None
        new = row.tokens[own.num_seen :]
        own.num_seen = len(row.tokens)
        own.tokens += [token for token in new if token < self.num_known]
        num = 0  # of the guess that are in the cache and were right
        while num < min(len(own.guess) - 1, len(new)) and own.guess[num] == new[num]:
            num += 1
        own.guess = []
        self._advance(own, num)
        # The last token again, if the draft knows none of the new ones: what follows it is to be guessed.
        own.num_computed = min(own.num_computed, len(own.tokens) - 1)
        if self._is_late(row) and (num := self._claim(own, self._count_new(own) - 1)):
            self._run([(own, own.num_computed, num)])
            self._advance(own, num)
            own.num_computed = min(own.num_computed, len(own.tokens) - 1)  # as above
        return None if self._is_late(row) else own

    def _claim(self, own: DraftRow, most: int) -> int:
        """Return how many tokens of a prompt, at most `most`, this step still computes, and spend them."""
        start, num = own.num_computed, min(most, self.tokens_left)
        if num == 0:
            return 0
        first, last = own.prompt.span_at(start + num - 1)  # which is not cut
        if last > start + num:
            num = (first if first > start else last) - start
        _, needed = own.prompt.span_at(start)
        for i in own.prompt.pictures_of(start, start + num):
            if self.features.has(own.prompt.digests[i]):
                continue
            place = own.prompt.places[i][0]
            if self.tiles_left <= 0 and place >= needed:  # stop before it, and for this step
                num = max(own.prompt.span_at(place)[0] - start, 0)
                self.tokens_left = num
                break
            self.tiles_left -= 1
        self.tokens_left = max(self.tokens_left - num, 0)
        return num

    def _begin(self, row: Row) -> DraftRow | None:
        prompt, ids = row.prompt, row.request.prompt.input_ids
        is_shown = ids < self.num_known
        for token in (self.image_token_id, self.model.config.image_token_id):
            if not self.sees_images and token is not None:
                is_shown &= ids != token
        if not bool(is_shown.all()) or (prompt.digests and not self.sees_images) or self.has_other_spans:
            shown, spans = row.request.prompt, row.request.prompt.span_ids
            if not self.sees_images:
                shown = replace(shown, tiles=shown.tiles[:0], grids=[])
            if spans is not None:
                spans = torch.cat((spans, spans.new_zeros(len(ids) - len(spans))))[is_shown]
            prompt = Prompt(
                replace(row.request, prompt=replace(shown, input_ids=ids[is_shown], span_ids=spans)), self.model
            )
        most = len(prompt.ids) + row.request.sampling.max_new_tokens
        if not prompt.ids or most > self.model.config.decoder.max_position_embeddings:
            return None
        blocks = self.blocks.take(prompt.keys, (most + self.num_tokens + BLOCK - 1) // BLOCK)
        if blocks is None:
            return None
        own = DraftRow(row, prompt, blocks)
        # What is there already; what another row has yet to compute is computed twice, and is the same.
        for block in blocks[: len(prompt.keys)]:
            if not block.is_filled:
                break
            own.num_computed += BLOCK
        return own

    def _run(self, work: list[tuple[DraftRow, int, int]], ids: Tensor | None = None) -> Tensor:
        """Run the model over new tokens of rows, each from a position on and so many.

        `ids` int64[R] are the tokens where the host does not know them. Returns the logits behind the last of each row,
        of the tokens that the engine's model knows, too.
        """
        now = self.cache.begin(
            [Span(row.numbers, start, num, row.prompt.lasts(start, num)) for row, start, num in work]
        )
        listed, places, features, lasts, end = [], [], [], [0] * len(work), 0
        for i in now.order:
            row, start, num = work[i]
            listed += row.tokens[start : start + num]
            positions = row.prompt.image_positions if self.sees_images and ids is None else []
            first, last = bisect_left(positions, start), bisect_left(positions, start + num)
            if first < last:
                places += [end + position - start for position in positions[first:last]]
                features.append(self._encode(row.prompt, first, last))
            end += num
            lasts[i] = end - 1
        if ids is None:
            ids = torch.tensor(listed).to(self.device, non_blocking=True)
        else:
            ids = ids[torch.tensor(now.order).to(self.device, non_blocking=True)]
        x_BTD = self.model.decoder.embed_tokens(ids[None])
        if places:
            index = torch.tensor(places).to(self.device, non_blocking=True)
            x_BTD[0].index_copy_(0, index, torch.cat(features).to(x_BTD.dtype))
        rope = tuple(table[:, now.position_ids[0]] for table in self.rope)
        hidden, _routing = self.model.decoder(x_BTD, now.position_ids, None, now, rope=rope)
        last = hidden[0, torch.tensor(lasts).to(self.device, non_blocking=True)]
        logits = self.model.head(last).float()[:, : self.num_known]
        return logits.index_fill(1, self.never, -torch.inf)

    def _encode(self, prompt: Prompt, first: int, last: int) -> Tensor:
        """Return the features of the image tokens from `first` to `last` of a prompt, [last - first, D]."""
        shown = range(bisect_right(prompt.starts, first) - 1, bisect_left(prompt.starts, last))
        found = self.features.get([prompt.digests[i] for i in shown], [prompt.pictures[i] for i in shown])
        return torch.cat(found)[first - prompt.starts[shown[0]] : last - prompt.starts[shown[0]]]

    def _see(self, rows: list[Row], followed: list[DraftRow]) -> Tensor | None:
        """Return the tokens that the repetition penalty applies to, bool[R, V]; None if no row has one."""
        if all(row.request.sampling.repetition_penalty == 1 for row in rows):
            return None
        seen = torch.zeros(len(rows), self.num_known, dtype=torch.bool)
        for own, of_row in zip(followed, seen, strict=True):
            of_row[own.tokens] = True
        return seen.to(self.device, non_blocking=True)

    def _choose(
        self, rows: list[Row], followed: list[DraftRow], logits: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Choose the next token of each row, int64[R], and add it to `seen`; return the probabilities fp32[R, V], too.

        The probabilities of greedy rows are not filled in.
        """
        ids = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        is_drawn = any(row.request.sampling.temperature > 0 for row in rows)
        probabilities = torch.zeros(len(rows), self.vocab_size if is_drawn else 0, device=self.device)
        for indices in group_by_sampling(rows):
            config = rows[indices[0]].request.sampling
            where = torch.tensor(indices).to(self.device, non_blocking=True)
            of_group = None if seen is None else seen[where]
            ids[where] = choose(logits[where], of_group, config, [followed[i].generator for i in indices])
            if config.temperature > 0:
                found = find_probabilities(logits[where], of_group, config)
                probabilities[where, : self.num_known] = found.float()
        if seen is not None:
            seen.scatter_(1, ids[:, None], True)
        return ids, probabilities

    def _advance(self, row: DraftRow, num: int):
        """Note that so many more tokens of a row are in the cache, and which blocks are full now."""
        before, row.num_computed = row.num_computed, row.num_computed + num
        for index in range(before // BLOCK, row.num_computed // BLOCK):
            if index == len(row.keys):
                row.keys.append(row.prompt.key(row.keys[-1] if index else row.prompt.root, row.tokens, index * BLOCK))
            self.blocks.name(row.blocks[index], row.keys[index])
            row.blocks[index].is_filled = True


def check_vocabulary(tokenizer: Tokenizer, draft: Tokenizer):
    """Raise UserError if a token id that both tokenizers have is not the same token in both."""
    own, other = ({i: token for token, i in each.get_vocab().items()} for each in (tokenizer, draft))
    for i in sorted(own.keys() & other.keys()):
        if own[i] != other[i]:
            raise UserError(
                f"the draft model has another tokenizer: token {i} is {other[i]!r} there and {own[i]!r} in the model"
            )
