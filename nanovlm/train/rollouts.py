"""Questions of records -> the model's own answers -> the batches of a step.

```
loader --> batch of records --> questions --> Engine: G answers each --> objective.documents --> rows --> batch
           (one micro-batch)                  seeds by step and place    rewards, advantages     one micro-batch
                                                                                                 objective.prepare
```

What is sampled follows from the weights, the records and the seed alone, so a run that was killed samples it again.
Where an objective takes several steps on one set of answers, checkpoints keep its batches.
"""

import hashlib
import time
from dataclasses import replace
from itertools import chain

import torch

from nanovlm import distributed
from nanovlm.config import TrainConfig
from nanovlm.data.chat import Processor
from nanovlm.data.loader import collate
from nanovlm.data.packing import make_row, pack
from nanovlm.data.types import Batch, Document
from nanovlm.errors import UserError
from nanovlm.infer.asking import ask
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request, Token
from nanovlm.model.cache_attention import BLOCK
from nanovlm.model.vlm import Extras
from nanovlm.objectives import LearnsFromOwn
from nanovlm.objectives.own import OwnAnswer, Question, find_questions
from nanovlm.train.state import TrainState
from nanovlm.train.step import fill_up
from nanovlm.train.validate import evaluating


class Rollouts:
    """An iterator over steps, as the loader is: each is a list of this rank's batches, of the model's own answers."""

    def __init__(self, state: TrainState, processor: Processor, config: TrainConfig):
        """Raise UserError where answers cannot be sampled by each rank on its own."""
        self.state, self.processor, self.config = state, processor, config
        self.objective: LearnsFromOwn = state.objective  # pyright: ignore[reportAttributeAccessIssue]
        what = f"objective = {config.objective} learns from the model's own answers"
        if distributed.num_ranks() > 1 and config.parallel.strategy == "fsdp":
            raise UserError(
                f"{what}, which every rank samples by itself: parallel.strategy = fsdp must be ddp, as shards of "
                "weights cannot be gathered at different times"
            )
        if config.parallel.expert_ranks > 1:
            raise UserError(f"{what}: parallel.expert_ranks = {config.parallel.expert_ranks} must be 1")
        if config.data.train_on == "all":
            raise UserError(f"{what} to questions: data.train_on = all must be answers, of which each ends a question")

    def __next__(self) -> list[Batch]:
        """Return the batches of the next step, as many as the loader gave, or those of the step before once more."""
        state = self.state
        state.sampled, state.rollout_s = Extras(), 0.0
        made, num_updates = state.pending, self.objective.num_updates
        if state.step % num_updates == 0:
            batches, start = next(state.loader, []), time.perf_counter()
            with evaluating(state):
                made = self._make(batches)
            state.rollout_s = time.perf_counter() - start
        is_last = (state.step + 1) % num_updates == 0
        state.pending = [] if is_last else made  # checkpoints keep what more steps learn from
        return made

    def _make(self, batches: list[Batch]) -> list[Batch]:
        asked = [self._choose(batch, place) for place, batch in enumerate(batches)]
        questions = list(chain.from_iterable(asked))
        seeds = [self._seed(place, number) for place, of_batch in enumerate(asked) for number in range(len(of_batch))]
        groups = list(zip(questions, self._sample(questions, seeds), strict=True))
        answers = [answer for _, own in groups for answer in own]
        extras, num = self.state.sampled, len(answers)
        extras.add("answer_length", torch.tensor(float(sum(len(answer.ids) for answer in answers))), num)
        extras.add("cut_short", torch.tensor(float(sum(not answer.has_ended for answer in answers))), num)
        documents = iter(self.objective.documents(groups, extras))
        made = [self._pack([next(documents) for _ in of_batch]) for of_batch in asked]
        self.objective.prepare(self.state.model, made, extras)
        return made

    def _choose(self, batch: Batch, place: int) -> list[Question]:
        """Return the questions of a batch that leave room for an answer, at most as many as the config says."""
        positions = self.config.model.decoder.max_position_embeddings
        found = [question for question in find_questions(batch, self.processor) if len(question.prompt) < positions]
        most = self.config.group.num_questions or len(found)
        generator = torch.Generator().manual_seed(self._seed(place, -1))
        return [found[i] for i in torch.randperm(len(found), generator=generator)[:most].sort().values.tolist()]

    def _seed(self, place: int, number: int) -> int:
        """Return the seed of a question: by its place in the step, whichever rank asks it."""
        micro_batch = distributed.rank() + place * distributed.num_ranks()
        text = f"{self.config.seed} {self.state.step} {micro_batch} {number}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())

    def _sample(self, questions: list[Question], seeds: list[int]) -> list[list[OwnAnswer]]:
        """Return the answers to each question. The engine is new, as the weights are."""
        if not questions:
            return []
        most, num = self.objective.sampling.max_new_tokens, self.objective.num_answers
        positions = self.config.model.decoder.max_position_embeddings
        longest = max(len(question.prompt) for question in questions)
        num_rows = min(self.config.group.num_rows, num * len(questions))
        # For as many prompts as are open at a time, each in cache once, and for all answers.
        at_a_time = num_rows // num + 2
        room = at_a_time * (longest + BLOCK) + num_rows * (most + 2 * BLOCK)
        engine = Engine(self.state.model, num_rows=num_rows, cache_tokens=room)
        requests = (
            Request(
                question.prompt,
                replace(self.objective.sampling, seed=seed, max_new_tokens=min(most, positions - len(question.prompt))),
                num_answers=num,
                tells_draws=True,
            )
            for question, seed in zip(questions, seeds, strict=True)
        )
        answers = [[OwnAnswer() for _ in range(num)] for _ in questions]
        for index, event in chain.from_iterable(ask(engine, requests)):
            answer, token = answers[index][event.answer], event if isinstance(event, Token) else event.last
            if token is not None:
                assert token.drawn is not None  # as the request asks for draws
                answer.ids.append(token.id)
                answer.logprobs.append(token.drawn)
            if not isinstance(event, Token):
                if event.reason not in ("stop", "length"):
                    raise UserError(f"an answer could not be sampled: {event.message}")
                answer.has_ended = event.reason == "stop"
                answer.text = self.processor.decode(answer.ids)
        return answers

    def _pack(self, documents: list[Document | None]) -> Batch:
        """Return a batch of as many rows as the documents fill; of padding alone where there is none."""
        kept = [document for document in documents if document is not None]
        if not kept:
            return fill_up([], self.config)[0]
        row_length = max(self.config.data.row_length, *(len(document) for document in kept))
        packed = pack([len(d) for d in kept], [len(d.tiles) for d in kept], row_length)
        pad = self.config.model.pad_token_id
        batch = collate([make_row([kept[i] for i in row], row_length, pad) for row in packed])
        return batch.pin_memory() if torch.cuda.is_available() else batch
