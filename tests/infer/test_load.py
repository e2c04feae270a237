"""The server under load: 100 requests at once, slow and vanishing clients, oversized bodies; nothing is lost or kept.

make serve-test
"""

import asyncio
import copy
import json
import random
import re
import time
from pathlib import Path

import httpx2
import openai
import pytest
import torch

import nanovlm
from nanovlm.hub.model_folder import save_model
from nanovlm.model.inference import prepare
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise
from tests.infer.serving import chat, data_url, end, question, read_events, started

pytestmark = pytest.mark.load

NUM_REQUESTS, ROUNDS = 100, 6
NUM_IMAGES, TEXTS = 12, ("what color is the circle?", "why?", "describe it.", "where is the red star?")
MOST_GROWTH = 16  # MiB over the rounds after the second; the cache of pictures and prompts is full by then


@pytest.fixture(scope="module")
def asked(tmp_path_factory, processor):
    """The folder of a model, and its answers to questions: (fields of a request, text).

    Rows that are computed beside others are rounded in another order. Of 50 questions, those are asked whose answers
    weights that differ by 1e-5 do not change.
    """
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("loaded") / "model"
    save_model(folder, VLM(TINY), processor)
    model, processor = nanovlm.load(folder)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weights in other.parameters():
            weights *= 1 + 1e-5 * torch.randn_like(weights)
    prepare(model)
    draw, questions = random.Random(0), []
    for i in range(50):
        images = [noise(draw.randrange(NUM_IMAGES), draw.choice((16, 30, 200))) for _ in range(draw.randrange(3))]
        text, most = f"{draw.choice(TEXTS)} {i % 7}", draw.randrange(1, 65)
        sampling = {"temperature": 0} if i % 2 else {"temperature": 1.2, "seed": i}
        batch = processor([{"role": "user", "content": text}], images)
        (tokens,), (others,) = (nanovlm.generate(m, batch, max_new_tokens=most, **sampling) for m in (model, other))
        fields = {"model": "tiny", "messages": question(text, *images), "max_tokens": most, **sampling}
        if tokens == others:
            questions.append((fields, processor.decode(tokens)))
    assert len(questions) > 25
    return folder, questions


async def ask(client, fields, text, is_streamed):
    """A client that behaves."""
    if not is_streamed:
        reply = await client.chat.completions.create(**fields)
        assert reply.choices[0].message.content == text
        return
    stream = await client.chat.completions.create(**fields, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert "".join(pieces) == text


async def send(server, body: bytes, length=None):
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=4096)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % (length or len(body)) + body)
    return reader, writer


async def read_slowly(server, fields, text):
    """A client that reads a few bytes at a time."""
    reader, writer = await send(server, json.dumps({**fields, "stream": True}).encode())
    data = bytearray()
    while not data.endswith(b"0\r\n\r\n"):
        data += await reader.read(700)
        await asyncio.sleep(0.01)
    writer.close()
    choices = [choice for event in read_events(bytes(data)) for choice in event["choices"]]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == text


async def vanish(server, seconds, is_streamed):
    """A client that goes away: before its body is there, while it waits, or amid a long answer."""
    body = json.dumps(chat("describe it.", stream=is_streamed, max_tokens=4000)).encode()
    _reader, writer = await send(server, body, len(body) + (100 if seconds < 0.02 else 0))
    await asyncio.sleep(seconds)
    writer.transport.abort()


async def send_too_much(server):
    """A client whose body is over the limit, by its length or without one."""
    async with httpx2.AsyncClient(timeout=60) as client:
        blocks = [b"x" * 2**16] * 40

        async def endless():
            for block in blocks:
                yield block

        for content in (b"".join(blocks), endless()):
            url, kind = f"{server.url}/v1/chat/completions", {"content-type": "application/json"}
            reply = await client.post(url, content=content, headers=kind)
            assert reply.status_code == 413


async def send_bad_images(server, client):
    for url in ("data:image/png;base64,AAAA", data_url(noise(0))[:90], "file:///etc/passwd", "http://127.0.0.1/a.png"):
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(**chat("what?", url))


async def one_round(server, questions, number):
    """100 requests that want an answer, and beside them 40 clients that do not behave."""
    draw = random.Random(number)
    limits = httpx2.Limits(max_connections=None)
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=120,
        http_client=httpx2.AsyncClient(limits=limits, timeout=120),
    ) as client:
        work = []
        for i in range(NUM_REQUESTS):
            fields, text = draw.choice(questions)
            if i % 10 == 0:
                work.append(read_slowly(server, fields, text))
            else:
                work.append(ask(client, fields, text, is_streamed=i % 2 == 0))
        work += [vanish(server, draw.choice((0.01, 0.1, 0.5, 1)), i % 2 == 0) for i in range(30)]
        work += [send_too_much(server) for _ in range(5)] + [send_bad_images(server, client) for _ in range(5)]
        draw.shuffle(work)
        await asyncio.gather(*work)


def memory(server):
    """MiB of the server, now and at most."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return [int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024 for name in ("VmRSS", "VmHWM")]


def count(server, name):
    return int(re.search(rf"^{name} (\d+)$", server.get("/metrics").text, re.M)[1])


def test_nothing_is_lost_and_nothing_is_kept(asked):
    folder, questions = asked
    options = ("--name", "tiny", "--max-body-mb", "1", "--max-queue", "200", "--num-rows", "16")
    with started(folder, *options) as server:
        used = []
        for number in range(ROUNDS):
            asyncio.run(one_round(server, questions, number))
            until = time.monotonic() + 20
            while count(server, "nanovlm_requests_open"):
                assert time.monotonic() < until, "requests are still open"
                time.sleep(0.01)
            used.append(memory(server))
        print("MiB after each round, now and at most:", *(f"{now:.0f} {most:.0f}" for now, most in used))
        assert used[-1][0] - used[1][0] < MOST_GROWTH, used
        assert used[-1][1] - used[1][1] < MOST_GROWTH, used
        assert count(server, "nanovlm_requests_answering") == 0
        assert count(server, "nanovlm_clients_gone_total") == 30 * ROUNDS
        assert end(server) == (0, "")
