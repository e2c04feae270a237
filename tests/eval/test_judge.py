"""A judge behind an address and in a folder: what it is asked, how often, and what becomes of its words."""

import dataclasses
import http.server
import json
import threading

import pytest
import torch

from nanovlm.eval import judge as module
from nanovlm.eval.judge import Judge, ask_server, make_prompt, open_judge
from nanovlm.eval.questions import Question
from nanovlm.hub.model_folder import save_model
from nanovlm.infer.answers import generate
from nanovlm.infer.asking import Answer
from nanovlm.infer.request import End
from nanovlm.model.vlm import VLM
from tests.conftest import TINY


def question(number=0, references=("two dogs", "2 dogs")):
    return Question(number, "a", [], [{"role": "user", "content": f"how many in {number}?"}], references)


@pytest.fixture
def server(monkeypatch):
    """A server that replies from a list of (status, body) and keeps the requests."""
    seen, replies = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body, self.headers.get("Authorization")))
            status, text = replies.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr("nanovlm.infer.chat_client.WAIT", 0.01)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1", seen, replies
        running.shutdown()


def said(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


def test_a_server_is_asked_once_about_what_does_not_match(server, tmp_path, monkeypatch):
    address, seen, replies = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    replies += [said("Yes."), said("no"), said("perhaps"), said(None)]
    asked = [question(i) for i in range(5)]
    answers = ["two dogs", "a pair of dogs", "three", "dogs?", ""]
    judge = open_judge(address, "big", tmp_path / "out")
    scores = judge.score(asked, answers)
    assert [(s["judge"], s["judged"], s["judge_unclear"]) for s in scores] == [
        (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 1, 1), (0, 1, 1),
    ]  # fmt: skip
    path, body, key = seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret" and len(seen) == 4
    assert (body["model"], body["temperature"], body["seed"]) == ("big", 0, 0)
    prompt = body["messages"][0]["content"]
    assert "how many in 1?" in prompt and "two dogs or 2 dogs" in prompt and "a pair of dogs" in prompt

    again = open_judge(address, "big", tmp_path / "out")  # a run that goes on
    assert again.score(asked, answers) == scores and len(seen) == 4
    replies.append(said("yes"))
    other = open_judge(address, "other", tmp_path / "out")  # another judge has an opinion of its own
    assert other.score(asked[2:3], answers[2:3])[0]["judge"] == 1 and len(seen) == 5
    assert "secret" not in (tmp_path / "out" / "judge.jsonl").read_text()


def test_a_line_that_was_cut_short_is_asked_again(server, tmp_path):
    address, seen, replies = server
    replies += [said("yes")] * 3
    first = open_judge(address, "big", tmp_path)
    first.score([question(1), question(2)], ["x", "y"])
    stored = (tmp_path / "judge.jsonl").read_text()
    (tmp_path / "judge.jsonl").write_text(stored[:-20])
    again = open_judge(address, "big", tmp_path)
    assert [s["judge"] for s in again.score([question(1), question(2)], ["x", "y"])] == [1, 1] and len(seen) == 3
    assert len(open_judge(address, "big", tmp_path).replies) == 2


def test_a_busy_server_is_asked_again_and_a_refusal_is_shown(server):
    address, seen, replies = server
    replies += [(503, "busy"), (429, "slow down"), said("yes")]
    assert ask_server(address + "/", "big", "?") == "yes" and len(seen) == 3
    replies += [(401, "wrong key")]
    with pytest.raises(ValueError, match=r"the judge at \S+/v1/chat/completions gives no verdict: 401 .*wrong key"):
        ask_server(address, "big", "?")
    replies += [(500, "out of memory")] * 4
    with pytest.raises(ValueError, match=r"500 .*out of memory"):
        ask_server(address, "big", "?")
    replies += [(200, '{"answer": 1}')]
    with pytest.raises(ValueError, match="its reply is not that of chat completions"):
        ask_server(address, "big", "?")
    assert len(seen) == 9
    with pytest.raises(ValueError, match=r"gives no verdict: .*refused"):
        ask_server("http://127.0.0.1:9", "big", "?")


def test_an_address_needs_the_name_of_a_model():
    with pytest.raises(ValueError, match="--judge with an address needs --judge-model"):
        open_judge("https://example.org/v1")
    with pytest.raises(ValueError, match="none"):
        open_judge("none/such/folder")


def test_a_model_in_a_folder_judges(tmp_path, processor, monkeypatch):
    """All prompts are asked together; a reply is kept, and is the greedy answer to its prompt alone."""
    torch.manual_seed(0)
    decoder = dataclasses.replace(TINY.decoder, max_position_embeddings=1024)
    model = VLM(dataclasses.replace(TINY, decoder=decoder))
    save_model(tmp_path / "model", model, processor)
    judge = open_judge(str(tmp_path / "model"), folder=tmp_path / "out")
    prompts = [make_prompt(question(i), "x" * i) for i in (0, 1, 2, 1)]
    assert "how many in 1?" in prompts[1] and "two dogs or 2 dogs" in prompts[1]
    replies = judge.ask(prompts)
    batches = [processor([{"role": "user", "content": prompt}]) for prompt in prompts]
    expected = [processor.decode(generate(model, batch, max_new_tokens=16)[0]) for batch in batches]
    assert replies == expected and len({*replies}) > 1
    assert len((tmp_path / "out" / "judge.jsonl").read_text().splitlines()) == 3
    engines = []
    monkeypatch.setattr(module, "answer_all", lambda engine, requests: iter(engines.append(engine) or []))
    assert open_judge(str(tmp_path / "model"), folder=tmp_path / "out").ask(prompts) == replies
    assert engines[0].model.decoder.norm.is_fused  # prepared


def test_a_judge_without_memory_gives_no_verdict(tmp_path, processor, monkeypatch):
    save_model(tmp_path / "model", VLM(TINY), processor)
    end = End(0, 0, "error", "there is not enough memory")
    monkeypatch.setattr(module, "answer_all", lambda *_: iter([Answer(0, 0, [], end)]))
    with pytest.raises(ValueError, match="the judge gives no verdict: there is not enough memory"):
        open_judge(str(tmp_path / "model")).score([question()], ["x"])


def test_a_verdict_in_the_folder_of_another_program_is_no_verdict(tmp_path):
    (tmp_path / "judge.jsonl").write_text('[]\n{"key": 1}\nnull\n')
    judge = Judge("a", lambda prompts: ((i, "yes") for i, _ in enumerate(prompts)), tmp_path)
    assert judge.score([question()], ["x"])[0]["judge"] == 1
