"""What /v1/look tells is bounded, and leaves nothing behind in the engine, whatever becomes of it."""

import base64
import threading

import pytest
import torch

import nanovlm
from nanovlm.hub.model_folder import save_model
from nanovlm.infer.engine import Engine
from nanovlm.model.vlm import VLM
from tests.conftest import TINY, noise
from tests.infer.serving import chat, question, running


@pytest.fixture(scope="module")
def server(tmp_path_factory, processor):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("looked") / "model"
    save_model(folder, VLM(TINY), processor)
    with running(processor, Engine(nanovlm.load(folder)[0], num_rows=2)) as server:
        yield server


def look(server, ids):
    return server.post("/v1/look", {"model": "tiny", "messages": question("what?", noise(0)), "answer_ids": ids})


def answer(server):
    asked = chat("what?", noise(0), max_tokens=8, return_token_ids=True)
    return server.post(body=asked).json()["choices"][0]["token_ids"]


def test_a_long_answer_is_cut(server):
    told = look(server, [5] * 300).json()
    assert len(told["tokens"]) == 256 and told["left_out"] == 44
    assert len(base64.b64decode(told["attention"]["weights"])) == 2 * 4 * 256 * 4


def test_its_prompt_is_made_where_others_are(server, monkeypatch):
    """Not in the engine's thread, in which answers would wait for it."""
    threads, make = [], server.service.processor.prompt

    def prompt(*args):
        threads.append(threading.current_thread().name)
        return make(*args)

    monkeypatch.setattr(server.service.processor, "prompt", prompt)
    assert look(server, [5]).status_code == 200
    assert [name.startswith("prompt") for name in threads] == [True]


def test_answers_after_a_look_are_the_same(server, monkeypatch):
    before = answer(server)
    assert [token["id"] for token in look(server, before).json()["tokens"]] == before
    assert answer(server) == before

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("nanovlm.infer.service.look_response", fail)
    reply = look(server, before)
    assert reply.status_code == 500 and "its log says why" in reply.json()["error"]["message"]
    assert answer(server) == before
