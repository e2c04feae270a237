"""Folders sent to the hub with the real client, against a server of this machine that answers as the hub does."""

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

import nanovlm
from nanovlm.config import QuantizationConfig, VLMConfig
from nanovlm.hub.model_folder import save_model
from nanovlm.hub.push import explain, make_card
from nanovlm.model.quantized import quantize
from tests.hub.test_gguf_export import BASE, SEES, save
from tests.hub.test_layouts import ROOT

TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def server():
    """Repositories owner/*: `files` has what was committed, `sent` the large files that came; `failures` more fail."""

    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, data=None, **headers):
            body = json.dumps(data).encode() if data is not None else b""
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handle_any(self):
            length = int(self.headers.get("Content-Length") or 0)
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(length)
            path = self.path.partition("?")[0]
            if path.startswith("/upload/"):
                oid = path.rpartition("/")[2]
                if running.failures:
                    running.failures -= 1
                    return self.answer(403)
                assert hashlib.sha256(body).hexdigest() == oid
                running.stored[oid] = body
                running.sent.append(oid)
                return self.answer(200)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": f"who is {self.headers.get('Authorization')}?"})
            if path == "/api/repos/create":
                data = json.loads(body)
                name = f"{data['organization']}/{data['name']}"
                if data["organization"] != "owner":
                    return self.answer(403, {"error": "not yours"})
                running.visibility[name] = data.get("visibility", "private" if data.get("private") else None)
                return self.answer(200, {"url": f"{running.url}/{name}", "name": name})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if match := re.fullmatch(r"/api/models/(owner/\w+)/preupload/main", path):
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(("safetensors", "gguf")) else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": files})
            if match := re.fullmatch(r"/(owner/\w+)\.git/info/lfs/objects/batch", path):
                objects = []
                for item in json.loads(body)["objects"]:
                    upload = {"href": f"{running.url}/upload/{item['oid']}?X-Signature=verysecret"}
                    there = item["oid"] in running.stored
                    objects.append(item | ({} if there else {"actions": {"upload": upload}}))
                return self.answer(200, {"transfer": "basic", "objects": objects})
            if match := re.fullmatch(r"/api/models/(owner/\w+)/commit/main", path):
                files = running.files.setdefault(match[1], {})
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    value = entry["value"]
                    if entry["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif entry["key"] == "lfsFile":
                        files[value["path"]] = running.stored[value["oid"]]
                url = f"{running.url}/{match[1]}/commit/{'a' * 40}"
                return self.answer(200, {"commitUrl": url, "commitOid": "a" * 40, "success": True})
            if match := re.fullmatch(r"/api/models/(owner/\w+)(/revision/main)?", path):
                names = [{"rfilename": name} for name in running.files.get(match[1], {})]
                return self.answer(200, {"id": match[1], "sha": "a" * 40, "siblings": names})
            return self.answer(404, {"error": f"no {path}"})

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        running.url = f"http://127.0.0.1:{running.server_port}"
        running.files, running.stored, running.sent, running.visibility, running.failures = {}, {}, [], {}, 0
        yield running
        running.shutdown()


RUN = """
import contextlib, importlib, io, json, os, sys
said = []
for module, arguments, token in json.load(sys.stdin):
    os.environ["HF_TOKEN"] = token
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            importlib.import_module(f"nanovlm.hub.{module}").main(arguments)
        except ValueError as error:
            print(f"error: {error}")
    said.append(out.getvalue())
print(json.dumps(said))
"""


def call(server, home, *commands):
    """Run (module, arguments, token) in a process of its own, as the hub's client reads its address once."""
    own = ("HF_", "HUGGING")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(own) and "proxy" not in k.lower()}
    env = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    tasks = json.dumps([(module, [str(argument) for argument in rest], token) for module, rest, token in commands])
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, input=tasks, capture_output=True, text=True, env=inherited | env, cwd=home)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr and "verysecret" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def run(tmp_path):
    """The folder of a run: its model, its checkpoints and what it has recorded."""
    run = tmp_path / "run"
    save(run / "model", VLMConfig(vision=None, image_token_id=None, decoder=BASE))
    sources = [f"{tmp_path}/acme/mine.jsonl", "hub:them/theirs", "scenes:color,shape", "../acme/"]
    (run / "config.json").write_text(json.dumps({"seed": 7, "data": {"sources": sources}}))
    (run / "metrics.jsonl").write_text('{"step": 30, "loss": 1.5}\n')
    (run / "checkpoints" / "30").mkdir(parents=True)
    (run / "checkpoints" / "30" / "state.safetensors").write_bytes(b"state")
    (run / ".lock").touch()
    return run


def test_a_model_comes_back_as_it_was(server, run, tmp_path):
    """The first try fails. What has arrived is not sent again, and nobody reads the signature of an address."""
    server.failures = 1
    first = ("push", (run, "owner/mine"), TOKEN)
    failed, sent, again, _ = call(server, tmp_path, first, first, first, ("push", (run, "owner/other"), TOKEN))
    assert failed.startswith("error: owner/mine could not be written: ")
    assert sent == again == f"sent to {server.url}/owner/mine\n" and len(server.sent) == 1
    files = server.files["owner/mine"]
    assert "# owner/other" in server.files["owner/other"]["README.md"].decode()
    assert set(files) == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    card = files["README.md"].decode()
    assert 'nanovlm.load("owner/mine")' in card and "| steps | 30 |" in card and "library_name: nanovlm" in card
    assert "| data | mine.jsonl, hub:them/theirs, scenes:color,shape, acme |" in card and str(tmp_path) not in card
    assert not (run / "model" / "README.md").exists()
    (tmp_path / "back").mkdir()
    for name, data in files.items():
        (tmp_path / "back" / name).write_bytes(data)
    found, expected = (nanovlm.load(folder)[0].state_dict() for folder in (tmp_path / "back", run / "model"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_checkpoints_and_exports_are_sent(server, run, tmp_path):
    save(tmp_path / "sees", SEES)
    options = ("--format", "gguf", "--dtype", "q8_0", "--push", "owner/small")
    call(
        server,
        tmp_path,
        ("push", (run, "owner/mine", "--checkpoints", "--private"), TOKEN),
        ("export", (tmp_path / "sees", tmp_path / "out", *options), TOKEN),
    )
    assert server.visibility == {"owner/mine": "private", "owner/small": None}
    names = {name for name in server.files["owner/mine"] if "/" in name}
    assert names == {"run/config.json", "run/metrics.jsonl", "run/checkpoints/30/state.safetensors"}
    files = server.files["owner/small"]
    assert set(files) == {"README.md", "model-Q8_0.gguf", "mmproj-F16.gguf"}
    assert files["model-Q8_0.gguf"] == (tmp_path / "out" / "model-Q8_0.gguf").read_bytes()
    assert "# owner/small" in files["README.md"].decode()


def test_onnx_graphs_are_sent(server, tmp_path):
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install -e '.[onnx]'")
    save(tmp_path / "text", VLMConfig(vision=None, image_token_id=None, decoder=BASE))
    options = ("--format", "onnx", "--graphs", "q8", "--push", "owner/graphs")
    (said,) = call(server, tmp_path, ("export", (tmp_path / "text", tmp_path / "out", *options), TOKEN))
    assert f"sent to {server.url}/owner/graphs" in said
    files = server.files["owner/graphs"]
    assert files["onnx/model_quantized.onnx"] == (tmp_path / "out" / "onnx" / "model_quantized.onnx").read_bytes()
    assert 'from_pretrained("owner/graphs"' in files["README.md"].decode()


def test_mistakes_are_named(server, run, tmp_path):
    mistakes = (
        ((run, "mine"), TOKEN, "'mine' is no name of a repository; it must be OWNER/NAME"),
        ((run, "owner/mine"), "", "owner/mine could not be written: log in with hf auth login"),
        ((run, "other/mine"), TOKEN, "other/mine could not be written: the token may not write there"),
        (
            (tmp_path / "nowhere", "owner/mine"),
            TOKEN,
            "nowhere is no folder: name a run, or a folder with a model, an export or an adapter\n",
        ),
        (
            (run / "checkpoints", "owner/mine"),
            TOKEN,
            "checkpoints has no model: no *.safetensors, *.gguf or onnx/*.onnx\n",
        ),
        ((run, "../.."), TOKEN, "'../..' is no name of a repository on the hub: "),
        ((run / "model", "owner/mine", "--checkpoints"), TOKEN, "is not the folder of a run with checkpoints"),
    )
    said = call(server, tmp_path, *(("push", arguments, token) for arguments, token, _ in mistakes))
    for line, (_, _, message) in zip(said, mistakes, strict=True):
        assert line.startswith("error: ") and message in line and line.count("\n") == 1, line
    assert not server.files
    arguments = (run, tmp_path / "out", "--push", "other/mine")
    (line,) = call(server, tmp_path, ("export", arguments, TOKEN))
    assert f"out is written: send it with python -m nanovlm.hub.push {tmp_path / 'out'} other/mine\n" in line


def test_the_card_says_the_precision(tmp_path):
    save(tmp_path / "text", VLMConfig(vision=None, image_token_id=None, decoder=BASE))
    model, processor = nanovlm.load(tmp_path / "text", dtype=torch.bfloat16)
    size = f"{model.count_parameters()[0] / 1e6:.2f} M parameters"
    assert f"{size} in float32, written" in make_card(tmp_path / "text", "owner/text", None)
    save_model(tmp_path / "few", quantize(model, QuantizationConfig("int4")), processor)
    assert f"{size} in int4 and bfloat16, written" in make_card(tmp_path / "few", "owner/few", None)


def test_no_secret_is_explained():
    cause = RuntimeError("PUT https://store/x?X-Amz-Signature=abc failed for hf_abcdefgh and mytoken\nmore")
    error = ValueError("Error while uploading")
    error.__cause__ = cause
    assert explain(error, "mytoken") == "Error while uploading; PUT https://store/x failed for hf_... and ..."
    for token in ("hf_abc-secret", "abc?secret"):
        assert explain(ValueError(f"Bearer {token} is wrong"), token) == "Bearer ... is wrong"
