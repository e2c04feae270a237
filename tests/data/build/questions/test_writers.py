"""Who writes: a model here and the same one behind our server say the same; a key goes to its server alone."""

import dataclasses
import itertools
import json
import re
import socket
import threading
from collections import Counter

import pytest
import torch

from nanovlm.data.build.questions.recipe import Recipe
from nanovlm.data.build.questions.write import run
from nanovlm.data.build.questions.writers import Ask, WriterOptions, ask_model, open_writer
from nanovlm.data.chat import Processor
from nanovlm.errors import UserError
from nanovlm.hub.model_folder import save_model
from nanovlm.hub.read import load
from nanovlm.infer import chat_client
from nanovlm.infer.answers import generate
from nanovlm.infer.chat_client import complete_chat
from nanovlm.infer.engine import Engine
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise
from tests.data.build.questions.fake_server import as_reply, picture_of, serving, text_of

pytestmark = pytest.mark.usefixtures("one_thread")
BODY = {"model": "m", "messages": [{"role": "user", "content": "?"}]}


def ask(i: int, text="what is it?") -> Ask:
    return Ask(f"{text} {i}", [noise(i)], seed=i, schema={"type": "object"})


def test_a_model_says_what_it_says_alone_and_behind_our_server(processor, tmp_path):
    """The oracle is generate(), one prompt at a time. A token that the random model likes ends its answers."""
    serving_tests = pytest.importorskip("tests.infer.serving", reason="needs starlette, uvicorn and openai")
    options = WriterOptions(str(tmp_path / "model"), max_new_tokens=12, temperature=0.8, num_rows=3, device="cpu")
    asked = [ask(i) for i in range(4)]

    def say(*ends: int) -> list[list[int]]:
        torch.manual_seed(3)
        model = VLM(dataclasses.replace(TINY, stop_token_ids=ends)).eval()
        save_model(tmp_path / "model", model, Processor(processor.tokenizer, processor.chat_template, model.config))
        model, own = load(tmp_path / "model")
        parts = [[{"type": "image"}, {"type": "text", "text": one.text}] for one in asked]
        prompts = [
            own.prompt([{"role": "user", "content": x}], one.images) for x, one in zip(parts, asked, strict=True)
        ]
        sampling = [options.sampling(one.seed) for one in asked]
        return [generate(model, own.batch([p]), s)[0] for p, s in zip(prompts, sampling, strict=True)]

    often = Counter(itertools.chain.from_iterable(map(set, say())))
    ids = say(often.most_common(1)[0][0])
    model, own = load(tmp_path / "model")
    expected = [own.decode(x).strip() if len(x) < 12 else "the reply is longer than max_new_tokens" for x in ids]
    for num_rows in (3, 1):
        found = open_writer(dataclasses.replace(options, num_rows=num_rows)).ask(asked)
        assert list(map(str, found)) == expected
        assert [isinstance(reply, str) for reply in found] == [len(x) < 12 for x in ids]
    assert any(len(x) < 12 for x in ids)
    with serving_tests.running(own, Engine(model, 3)) as server:
        there = open_writer(dataclasses.replace(options, model="tiny", address=f"{server.url}/v1")).ask(asked)
    assert there == [own.decode(x) for x in ids]


def test_a_model_that_writes_no_json_gives_no_records(processor, tmp_path):
    """A whole run with a random model: every reply is counted, and none of its words is kept."""
    torch.manual_seed(0)
    save_model(tmp_path / "model", VLM(TINY), processor)
    writer = WriterOptions(str(tmp_path / "model"), max_new_tokens=6, temperature=1.0, device="cpu")
    recipe = Recipe(("scenes",), str(tmp_path / "out.jsonl"), num=3, writer=writer, max_bad_fraction=1.0)
    report = run(recipe)
    assert report["records"]["without_any"] == report["records"]["read"] == 3 and not report["records"]["unusable"]
    for counts in report["kinds"].values():
        assert counts["kept"] == 0 and sum(counts["dropped"].values()) == 3
        assert {*counts["dropped"]} <= {"reply: the reply is longer than max_new_tokens", "reply: it is no JSON"}
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    with pytest.raises(UserError, match=r"nothing is kept of 3 of 3 records, .*; most often: .*reply is longer"):
        run(dataclasses.replace(recipe, out=str(tmp_path / "b.jsonl"), max_bad_fraction=0.9))


def test_what_a_model_cannot_be_asked_is_unusable(processor):
    torch.manual_seed(0)
    decoder = dataclasses.replace(TINY.decoder, max_position_embeddings=64)
    model = VLM(dataclasses.replace(TINY, decoder=decoder)).eval()
    options = WriterOptions("m", max_new_tokens=2)
    replies = ask_model(model, processor, options, [ask(0, "long " * 100), ask(1, "long " * 100)])
    assert [str(reply) for reply in replies] == ["the prompt is longer than the model can read"] * 2


def test_a_picture_is_sent_as_its_pixels_alone():
    """What a file says of place and time does not go to a server, and a large picture is made small."""
    image = noise(0, 64)
    image.info["icc_profile"] = b"of the camera, with its number"  # which PNG files get
    with serving(lambda _body: "ok") as (address, seen):
        writer = open_writer(WriterOptions("m", address, longest_side=32))
        assert writer.ask([Ask("?", [image], 7), Ask("?", [noise(1)], 8)]) == ["ok", "ok"]
    large, small = sorted(map(picture_of, seen.bodies), key=lambda picture: -picture.width)
    assert large.size == (32, 32) and not large.info and small.tobytes() == noise(1).tobytes()
    assert image.size == (64, 64)
    assert {body["seed"] for body in seen.bodies} == {7, 8} and {body["model"] for body in seen.bodies} == {"m"}


def test_replies_come_in_the_order_of_the_prompts():
    with serving(text_of) as (address, _seen):
        asked = [Ask(f"{i}", [], i) for i in range(20)]
        assert open_writer(WriterOptions("m", address, num_rows=5)).ask(asked) == [f"{i}" for i in range(20)]


def test_a_prompt_that_a_server_refuses_is_unusable_and_a_server_that_refuses_all_ends_the_run(monkeypatch):
    monkeypatch.setattr(chat_client, "WAIT", 0.01)
    refuse = {"1": (400, "too long"), "2": (413, "too large")}
    with serving(lambda body: refuse.get(text_of(body), "fine")) as (address, _seen):
        replies = open_writer(WriterOptions("m", address)).ask([Ask(f"{i}", [], 0) for i in range(4)])
        assert [str(reply) for reply in replies] == ["fine", *["the server refuses the prompt"] * 2, "fine"]
        assert "400 Bad Request: too long" in str(replies[1].__cause__)
    for status, text, message in (
        (401, "wrong key", "401 Unauthorized: wrong key"),
        (404, "no model", "404 Not Found: no model"),
        (503, "busy", "503 Service Unavailable: busy"),
        (200, "{}", r"its reply is not that of chat completions \(KeyError"),
        (200, "[" * 100_000, "its reply is not that of chat completions"),
        (200, json.dumps({"choices": [{"message": {"content": "x" * 2**21}}]}), "is not that of chat completions"),
    ):
        with serving(lambda _body, made=(status, text): made) as (address, seen):
            with pytest.raises(UserError, match=message):
                open_writer(WriterOptions("m", address)).ask([Ask("?", [], 0)])
            assert len(seen.bodies) == (8 if status == 503 else 1)
    with pytest.raises(UserError, match=r"the server at http://127.0.0.1:9/v1/models gives no reply: .*refused"):
        open_writer(WriterOptions("m", "http://127.0.0.1:9/v1"))


def test_a_prompt_that_a_server_fails_at_is_left_out_and_one_that_fails_at_all_ends_the_run(monkeypatch):
    """Here a server fails at a prompt, there at so many in a row, or when it is asked the plainest thing, too."""
    monkeypatch.setattr(chat_client, "WAIT", 0.0)
    asked = [Ask(f"{i}", [], 0) for i in range(24)]

    def ask(fails: str, num=24):
        with serving(lambda body: (500, "out of memory") if re.fullmatch(fails, text_of(body)) else "x") as (at, seen):
            try:
                return open_writer(WriterOptions("m", at, num_rows=4)).ask(asked[:num]), seen
            finally:
                assert all(
                    count == 4 for text, count in Counter(map(text_of, seen.bodies)).items() if re.match(fails, text)
                )

    replies, seen = ask("3|1[0-6]|23")  # not more than 7 in a row
    failed = {3, *range(10, 17), 23}
    assert [str(reply) for reply in replies] == [
        "it gives no reply to the prompt" if i in failed else "x" for i in range(24)
    ]
    assert all("500 Internal Server Error: out of memory" in str(replies[i].__cause__) for i in failed)
    assert [text_of(body) for body in seen.bodies].count("Reply with the word yes.") == 1
    for fails in ("1[0-7]", "3|Reply.*"):
        with pytest.raises(UserError, match="gives no reply: 500 Internal Server Error: out of memory"):
            ask(fails)


def test_a_list_of_models_tells_one_from_another_behind_its_name():
    ours = {"id": "m", "object": "model", "created": 5, "root": "/models/one", "permission": [{"id": "modelperm-3"}]}
    other = {"id": "other"}

    def describe(*models):
        with serving(lambda _body: "x", list(models)) as (address, _seen):
            return chat_client.describe_model(address, "m")

    same = describe(ours, other)
    assert same == describe({"id": "new"}, ours | {"created": 9, "permission": []}) and "one" in same
    assert len({same, describe(ours | {"root": "/models/two"}), describe(other), describe({"id": "third"}), ""}) == 5
    with serving(lambda _body: "x") as (address, _seen):
        assert chat_client.describe_model(address, "m") == ""


def test_a_busy_server_is_asked_again(monkeypatch):
    monkeypatch.setattr(chat_client, "WAIT", 0.01)
    replies = [(503, "busy"), (429, "slow down"), (200, as_reply("yes"))]
    with serving(lambda _body: replies.pop(0)) as (address, seen):
        assert complete_chat(address + "/", BODY) == "yes" and len(seen.bodies) == 3


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (b"garbage\r\n\r\n", "BadStatusLine"),
        (b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{"a":', "IncompleteRead"),
        (b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nno", "500 Oh"),
        (b"", "closed connection"),
    ],
)
def test_a_server_that_speaks_no_http_is_asked_again_and_named(monkeypatch, reply, reason):
    monkeypatch.setattr(chat_client, "WAIT", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            for _ in range(chat_client.TRIES):
                connection, _address = server.accept()
                with connection, connection.makefile("rb") as asked:
                    headers = list(iter(asked.readline, b"\r\n"))
                    [length] = [int(x.split(b":")[1]) for x in headers if x.lower().startswith(b"content-length")]
                    asked.read(length)  # what is not read when a connection is closed resets it
                    connection.sendall(reply)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(UserError, match=f"gives no reply: .*{reason}"):
            complete_chat(f"http://127.0.0.1:{server.getsockname()[1]}/v1", BODY)
        thread.join(10)
        assert not thread.is_alive()  # it was asked so often
    for address in ("http://127.0.0.1:80a/v1", "http://local host/v1"):
        with pytest.raises(UserError, match=f"'{address}' is no address"):
            complete_chat(address, BODY)


def test_a_key_goes_to_its_server_and_is_never_shown(monkeypatch):
    """A server that repeats it, one that sends us elsewhere, and a key that is none."""
    monkeypatch.setattr(chat_client, "WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    with serving(lambda _body: (401, "Bearer sk-secret is wrong: sk-secret" + "x" * 4000)) as (address, seen):
        with pytest.raises(UserError, match=r"401 .*Bearer \[key\] is wrong: \[key\]") as caught:
            complete_chat(address, BODY)
        assert seen.keys == ["Bearer sk-secret"] and "secret" not in str(caught.value) and len(str(caught.value)) < 700
    for status in (301, 302, 303, 307, 308):
        with serving(lambda _body: "stolen") as (thief, taken):
            with serving(lambda _body, to=(status, f"{thief}/x"): to) as (address, _seen):
                with pytest.raises(UserError, match=f"gives no reply: {status}"):
                    complete_chat(address, BODY)
            assert not taken.keys
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\nsecret")
    with pytest.raises(UserError, match="OPENAI_API_KEY has characters that are of no key") as caught:
        complete_chat("http://127.0.0.1:9", BODY)
    assert "secret" not in str(caught.value)
