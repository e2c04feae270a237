"""nanovlm.load("owner/name") with the real download, against a server of this machine that answers as the hub does."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import nanovlm
from nanovlm.hub import download
from tests.data.chat_templates import FAMILIES, make_tokenizer
from tests.hub.test_layouts import ROOT, make_model, split_weights, write_json

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
OTHERS = (
    "README.md",
    "pytorch_model.bin",
    "onnx/model.onnx",
    "original/model-00001-of-00001.safetensors",
    "vocab.json",
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A language model in shards beside files that are not needed, by revision: v1 has other weights."""
    revisions = {}
    for seed, name in enumerate(COMMITS):
        folder = tmp_path_factory.mktemp(name)
        tokenizer = make_tokenizer(FAMILIES["SmolLM2"])
        model = make_model("llama", vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=1, seed=seed)
        model.save_pretrained(folder)
        split_weights(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        template = {"chat_template": FAMILIES["SmolLM2"].template}
        write_json(folder, tokenizer_config={"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | template)
        for other in OTHERS:
            (folder / other).parent.mkdir(exist_ok=True)
            (folder / other).write_text("not needed")
        revisions[name] = folder
    return revisions


@pytest.fixture
def server(repository):
    """The hub's endpoints for owner/model, owner/private and owner/gated; `asked` keeps who asked for what."""

    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0]
            is_file = re.fullmatch(r"/(owner/\w+)/resolve/(\w+)/(.+)", path)
            is_info = re.fullmatch(r"/api/models/(owner/[\w-]+)(?:/(revision|tree)/(\w+))?", path)
            if not is_file and not is_info:
                return self.answer(404)
            asked.append((self.command, path, self.headers.get("Authorization")))
            name, revision = (is_file[1], is_file[2]) if is_file else (is_info[1], is_info[3] or "main")
            by_commit = {commit: known for known, commit in COMMITS.items()}
            revision = by_commit.get(revision, revision)
            if name == "owner/broken":
                return self.answer(500, b"out of order")
            if name not in ("owner/model", "owner/private", "owner/gated"):
                # The hub does not tell strangers what there is not from what is private.
                return self.answer(404 if self.headers.get("Authorization") else 401, X_Error_Code="RepoNotFound")
            if name == "owner/private" and self.headers.get("Authorization") != "Bearer hf_secret":
                return self.answer(401, X_Error_Code="RepoNotFound")
            if revision not in COMMITS:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if is_file and name == "owner/gated":
                return self.answer(403 if self.headers.get("Authorization") else 401, X_Error_Code="GatedRepo")
            folder, commit = repository[revision], COMMITS[revision]
            files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
            if is_info:
                if is_info[2] == "tree":
                    data = [
                        {"type": "file", "path": path, "size": p.stat().st_size, "oid": digest(p)}
                        for path, p in files.items()
                    ]
                else:
                    data = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}
                return self.answer(200, json.dumps(data).encode(), Content_Type="application/json")
            body = files[is_file[3]].read_bytes()
            return self.answer(200, body, ETag=f'"{digest(files[is_file[3]])}"', X_Repo_Commit=commit)

        do_HEAD = do_GET

    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        running.asked, running.url = asked, f"http://127.0.0.1:{running.server_port}"
        yield running
        running.shutdown()


def digest(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


ADVICE = "check the network, or give a folder that holds its files"
LOAD = """
import sys, nanovlm, torch
for name in sys.argv[2:]:
    try:
        model, processor = nanovlm.load(name)
        torch.save(model.state_dict(), sys.argv[1])
        print("loaded", nanovlm.generate(model, processor([{"role": "user", "content": "hi"}]), max_new_tokens=8)[0])
    except ValueError as error:
        print(error)
"""


def call(home, url, *names, **variables):
    """Load repositories in a process of its own, as the hub's client reads its environment once."""
    own = ("HF_", "HUGGING")  # whoever runs the tests may have a token, or a cache, under either
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(own) and "proxy" not in k.lower()}
    env = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD, str(home / "weights.pt"), *names]
    home.mkdir(exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, env=inherited | env | variables, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def assert_loaded(said, home, folder):
    model, processor = nanovlm.load(folder)
    answer = nanovlm.generate(model, processor([{"role": "user", "content": "hi"}]), max_new_tokens=8)[0]
    assert said == f"loaded {answer}"
    weights = torch.load(home / "weights.pt")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_repository_is_downloaded_once_and_only_what_is_needed(server, repository, tmp_path):
    said, again = call(tmp_path, server.url, "owner/model", "owner/model")
    assert_loaded(said, tmp_path, repository["main"])
    gets = [
        path.partition("/resolve/")[2] for method, path, _ in server.asked if method == "GET" and "/resolve/" in path
    ]
    there = {str(path.relative_to(repository["main"])) for path in repository["main"].rglob("*") if path.is_file()}
    assert sorted(gets) == sorted(f"{COMMITS['main']}/{path}" for path in there - set(OTHERS)) and len(gets) > 10
    assert again == said
    assert {token for *_, token in server.asked} == {None}
    server.asked.clear()
    offline = call(tmp_path, server.url, "owner/model", "owner/other", HF_HUB_OFFLINE="1")
    assert offline[0] == said and server.asked == []
    assert (
        offline[1].startswith("there is no folder owner/other, and the hub cannot be reached") and ADVICE in offline[1]
    )


def test_a_revision_and_a_token(server, repository, tmp_path):
    names = ("owner/private@v1", f"owner/private@{COMMITS['v1']}", "owner/gated", "owner/nothing")
    by_tag, by_commit, gated, nothing = call(tmp_path, server.url, *names, HF_TOKEN="hf_secret")
    assert_loaded(by_tag, tmp_path, repository["v1"])
    assert by_commit == by_tag
    assert gated == "owner/gated is gated: accept its terms on the hub, then log in with hf auth login"
    assert nothing.startswith("there is no folder and no public repository owner/nothing")
    assert {token for *_, token in server.asked} == {"Bearer hf_secret"}
    assert all("/v1" in path or COMMITS["v1"] in path for _, path, _ in server.asked if "private" in path)


def test_what_the_hub_refuses_is_one_sentence(server, tmp_path):
    names = (
        "owner/nothing",
        "owner/private",
        "owner/model@v9",
        "owner/gated",
        "owner/broken",
        "owner/na--me",
        "owner/a.git",
    )
    said = call(tmp_path, server.url, *names)
    assert said[0] == (
        "there is no folder and no public repository owner/nothing; for a private one log in with hf auth login"
    )
    assert said[1] == said[0].replace("nothing", "private")
    assert said[2] == "owner/model has no revision v9"
    assert said[3] == "owner/gated is gated: accept its terms on the hub, then log in with hf auth login"
    assert said[4].startswith("there is no folder owner/broken, and the hub") and ADVICE in said[4] and "500" in said[4]
    for name, sentence in zip(names[5:], said[5:], strict=True):
        assert sentence == f"there is no model folder {name}, and no repository on the hub can have that name"


def test_no_network_is_one_sentence(tmp_path):
    (said,) = call(tmp_path, "http://127.0.0.1:9", "owner/model")
    assert said.startswith("there is no folder owner/model, and the hub cannot be reached") and ADVICE in said


@pytest.mark.parametrize("short", download.SHORT_NAMES)
def test_short_names_are_repositories(short, monkeypatch, tmp_path):
    """A revision stays; a folder of that name goes before."""
    import huggingface_hub

    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, revision, **_: asked.append((name, revision))
    )
    for name in (short, f"{short}@v1"):
        with pytest.raises(TypeError):  # there is no folder of None
            download.find(name)
    (tmp_path / short).mkdir()
    assert download.find(short) == Path(short)
    repository = download.SHORT_NAMES[short]
    assert asked == [(repository, None), (repository, "v1")] and re.fullmatch(r"[\w.-]+/[\w.-]+", repository)


def test_a_name_that_is_no_repository(tmp_path):
    for name in ("nowhere", "a/b/c", str(tmp_path / "gone"), "owner/na me"):
        with pytest.raises(
            ValueError, match=r"there is no model folder .*, and no repository on the hub can have that"
        ):
            download.find(name)
    with pytest.raises(ValueError, match=r"have that name; short names are smollm2, smollm2-135m, .*, smolvlm2-2.2b$"):
        download.find("smollm")
