"""Records -> the same questions with a model's answers, for a student to learn (Kim & Rush 2016, arXiv 1606.07947).

A conversation is answered turn by turn: the model sees its own earlier answers, not those of the record. An answer
depends on the record, its number and the seed alone.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from nanovlm.config import SamplingConfig
from nanovlm.data.build.records import BuildConfig, Found, Unusable, as_record, write_records
from nanovlm.data.chat import Processor
from nanovlm.data.sources import open_source
from nanovlm.data.types import Document
from nanovlm.environment import find_device, keep_freed_memory
from nanovlm.errors import UserError
from nanovlm.hub.read import load
from nanovlm.infer.asking import answer_all
from nanovlm.infer.engine import Engine
from nanovlm.infer.request import Request
from nanovlm.model.inference import prepare
from nanovlm.model.vlm import VLM


@dataclasses.dataclass(frozen=True)
class AnswerConfig(BuildConfig):
    # How answers are chosen; what is longer than sampling.max_new_tokens is left out, as it would teach no end.
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=512)
    # How many answers are made at a time.
    num_rows: int = 16


def main(config: AnswerConfig):
    """Write the records of a source with a model's answers in place of their own."""
    config.validate()
    config.sampling.validate()
    keep_freed_memory()
    source = open_source(config.source, allow_urls=config.allow_urls)
    model, processor = load(config.model, find_device(config.device))
    prepare(model)
    write_records(config, source, model, lambda records: answer(model, processor, records, config))


def answer(model: VLM, processor: Processor, records: list[Found], config: AnswerConfig) -> list[dict | Unusable]:
    """Return each record with the model's answers."""
    talks = [[dict(message) for message in found.sample.messages] for found in records]
    failed: dict[int, Unusable] = {}
    for turn in range(max((sum(m["role"] == "assistant" for m in talk) for talk in talks), default=0)):
        # A new engine each time, as what one has in its cache changes how sums are rounded.
        engine = Engine(model, config.num_rows)
        asked: list[tuple[int, int]] = []
        requests = ask_turn(engine, processor, records, talks, failed, turn, asked, config.sampling)
        for done in answer_all(engine, requests):
            i, place = asked[done.request]
            text = processor.decode(done.ids).strip()
            if done.end.reason != "stop" or not text:
                why = done.end.message or ("it is longer than sampling.max_new_tokens" if text else "it is empty")
                failed[i] = Unusable(f"the answer to question {turn + 1} is left out: {why}")
            talks[i][place]["content"] = text
    for i, found in enumerate(records):
        if not any(message["role"] == "assistant" for message in found.sample.messages):
            failed[i] = Unusable("it asks no question")
    return [failed.get(i) or as_record(found, talks[i]) for i, found in enumerate(records)]


def ask_turn(
    engine: Engine,
    processor: Processor,
    records: list[Found],
    talks: list[list[dict]],
    failed: dict[int, Unusable],
    turn: int,
    asked: list[tuple[int, int]],
    sampling: SamplingConfig,
) -> Iterator[Request]:
    """Yield requests for one answer of each record that has so many; note each in `asked`, or why not in `failed`."""
    for i, (found, talk) in enumerate(zip(records, talks, strict=True)):
        places = [place for place, message in enumerate(talk) if message["role"] == "assistant"]
        if i in failed or turn >= len(places):
            continue
        place = places[turn]
        first = place - 1 if found.sample.independent else 0
        seed = int(np.random.SeedSequence((abs(sampling.seed), found.number, turn)).generate_state(1)[0])
        try:
            prompt: Document = processor.prompt(talk[first:place], found.sample.images)
            request = Request(prompt, dataclasses.replace(sampling, seed=seed))
            engine.check(request)
        except UserError as error:
            failed[i] = Unusable(str(error))
            continue
        asked.append((i, place))
        yield request
