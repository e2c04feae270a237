"""Requests that are checked, bytes of tokens, counts, and the engine's thread."""

import asyncio
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nanovlm.errors import UserError
from nanovlm.infer.api import ApiError, read_chat, read_completion
from nanovlm.infer.metrics import Count, Gauge, Histogram, exposition
from nanovlm.infer.request import End, Request, Token
from nanovlm.infer.token_bytes import TokenBytes
from nanovlm.infer.worker import Worker
from tests.infer.serving import FakeEngine, chat, wait_for

# --- bytes of tokens ------------------------------------------------------------------------------------------


def test_the_bytes_of_tokens_are_those_of_their_text(processor):
    text = "what color is the circle? \u20ac \U0001f600 a\u0300\n\t"
    ids = processor.tokenizer.encode(text, add_special_tokens=False).ids
    found = TokenBytes(processor.tokenizer)
    assert b"".join(found[i] for i in ids) == text.encode()
    singles = [
        i for i in range(processor.tokenizer.get_vocab_size()) if "\ufffd" not in processor.tokenizer.decode([i])
    ]
    assert len(singles) > 200
    for i in singles:
        assert found[i].decode() == processor.tokenizer.decode([i], skip_special_tokens=False), i
    assert found[10**6] == b""


def test_the_bytes_of_a_vocabulary_of_sentencepiece():
    vocabulary = {"<unk>": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "\u2581a": 4, "b": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    found = TokenBytes(tokenizer)
    assert b"".join(found[i] for i in (4, 5, 1, 2, 3)).decode() == " ab\u20ac"


# --- requests -------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["model", "messages", "prompt", "stop", "n", "seed", "stream_options", "tools", "logprobs",
                         "top_logprobs", "temperature", "top_p", "max_tokens", "logit_bias", "stream"])  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(NAMES | st.text(max_size=6), VALUES, max_size=6), st.booleans())
def test_any_json_is_read_or_refused(fields, is_chat):
    base = chat() if is_chat else {"model": "tiny", "prompt": "a"}
    try:
        (read_chat if is_chat else read_completion)(base | fields)
    except ApiError as error:
        assert error.status == 400 and error.message and error.body()["error"]["message"].isprintable()


@settings(deadline=None, max_examples=100)
@given(VALUES)
def test_any_content_is_read_or_refused(content):
    for message in ({"role": "user", "content": content}, content, {"role": content, "content": "a"}):
        try:
            read_chat({"model": "tiny", "messages": [message]})
        except ApiError as error:
            assert error.status == 400


def test_seeds_leave_room_for_several_answers():
    for seed in (0, -1, 2**64, -(2**70), 2**63 - 1):
        assert 0 <= read_chat(chat(seed=seed)).sampling.seed < 2**62
    assert read_chat(chat(seed=5)).sampling.seed == 5
    assert read_chat(chat()).sampling.seed != read_chat(chat()).sampling.seed


# --- counts ---------------------------------------------------------------------------------------------------


def test_counts_are_read_as_they_were_written():
    count, plain, histogram = Count("path", "status"), Count(), Histogram((0.1, 1))
    count.add(2, 'a"b\\c\nd', "200")
    count.add(1, "x", "404")
    for value in (0.05, 0.1, 0.5, 7):
        histogram.add(value)
    text = exposition(
        {"a_total": ("A.", count), "b_total": ("B.", plain), "c": ("C.", histogram), "d": ("D.", Gauge(lambda: 3))}
    )
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    values = {(s.name, *s.labels.values()): s.value for s in samples}
    assert values["a_total", 'a"b\\c\nd', "200"] == 2 and values["a_total", "x", "404"] == 1
    assert values["b_total",] == 0 and values["d",] == 3
    assert [values["c_bucket", le] for le in ("0.1", "1", "+Inf")] == [2, 3, 4]
    assert values["c_sum",] == pytest.approx(7.65) and values["c_count",] == 4


# --- the engine's thread --------------------------------------------------------------------------------------


class Heard:
    """A listener that keeps what it hears, and in which thread."""

    def __init__(self):
        self.accepted, self.events, self.error, self.threads = False, [], None, set()

    def accept(self):
        self.accepted = True
        self.threads.add(threading.get_ident())

    def receive(self, event):
        assert self.accepted
        self.events.append(event)
        self.threads.add(threading.get_ident())

    def fail(self, error):
        self.error = error


async def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


@pytest.fixture
def prompt(processor):
    return processor.text_prompt("what?")


def test_events_go_to_who_asked(prompt):
    engine = FakeEngine(lambda request, answer: [10 * request.num_answers + answer] * 3, num_rows=4)
    worker = Worker(engine)
    worker.start()

    async def ask():
        heard = [Heard() for _ in range(3)]
        for number, listener in enumerate(heard):
            worker.submit(Request(prompt, num_answers=number + 1), listener)
        await until(lambda: all(sum(isinstance(e, End) for e in h.events) == n for n, h in enumerate(heard, 1)))
        for number, listener in enumerate(heard, 1):
            for answer in range(number):
                ids = [e.id for e in listener.events if isinstance(e, Token) and e.answer == answer]
                assert ids == [10 * number + answer] * 3
            assert listener.threads == {threading.get_ident()}
        assert not worker._listeners and not worker._numbers and not worker._num_open

    asyncio.run(ask())
    worker.stop()


def test_a_request_that_cannot_be_answered_fails_alone(prompt):
    engine = FakeEngine(lambda _request, _answer: [1])
    submit = engine.submit

    def refuse(request):
        if request.num_logprobs == 1:
            raise UserError("too long")
        if request.num_logprobs == 2:
            raise RuntimeError("a bug")
        return submit(request)

    engine.submit = refuse
    worker = Worker(engine)
    worker.start()

    async def ask():
        heard = [Heard() for _ in range(3)]
        for number, listener in enumerate(heard):
            worker.submit(Request(prompt, num_logprobs=number), listener)
        await until(lambda: heard[0].events and isinstance(heard[0].events[-1], End) and heard[2].error)
        assert isinstance(heard[1].error, UserError) and isinstance(heard[2].error, RuntimeError)
        assert worker.failure is None

    asyncio.run(ask())
    worker.stop()


def test_functions_run_between_steps_in_the_engines_thread(prompt):
    engine = FakeEngine(lambda _request, _answer: [1] * 10**6, pace=0.001)
    worker = Worker(engine)
    worker.start()

    def fail():
        raise KeyError("x")

    async def ask():
        heard = Heard()
        worker.submit(Request(prompt), heard)
        await until(lambda: heard.events)
        ident = await worker.call(threading.get_ident)
        assert ident == worker._thread.ident != threading.get_ident()
        assert await worker.call(max, 3, 5) == 5
        with pytest.raises(KeyError):
            await worker.call(fail)
        worker.cancel(heard)
        await until(lambda: isinstance(heard.events[-1], End))
        assert heard.events[-1].reason == "cancelled" and worker.failure is None

    asyncio.run(ask())
    worker.stop()
    assert not worker._thread.is_alive()


def test_after_a_bug_in_the_engine_nothing_is_answered(prompt):
    engine = FakeEngine(lambda _request, _answer: [1] * 10**6, pace=0.001)
    worker = Worker(engine)
    worker.start()

    async def ask():
        first, later = Heard(), Heard()
        worker.submit(Request(prompt), first)
        await until(lambda: first.events)
        engine.breaks = True
        await until(lambda: first.error)
        worker.submit(Request(prompt), later)
        await until(lambda: later.error)
        assert str(worker.failure) == "broken on purpose"

    asyncio.run(ask())
    worker.stop()


def test_a_loop_that_is_gone_stops_nobody(prompt):
    """A listener of a loop that is closed hears nothing more, and the others do."""
    engine = FakeEngine(lambda _request, _answer: [1] * 200, pace=0.001)
    worker = Worker(engine)
    worker.start()

    async def leave():
        worker.submit(Request(prompt), Heard())
        await asyncio.sleep(0)

    async def stay():
        heard = Heard()
        worker.submit(Request(prompt), heard)
        await until(lambda: heard.events and isinstance(heard.events[-1], End))

    asyncio.run(leave())
    asyncio.run(stay())
    wait_for(lambda: engine.is_idle)
    worker.stop()
