"""One small random model through every installed engine -> benchmarks/results/engines.jsonl and docs/engines.md.

    python benchmarks/engines.py                                      those of this environment
    python benchmarks/engines.py --where llama.cpp=DIR mlx-vlm=DIR    packages that `pip install --target DIR` put there
    python benchmarks/engines.py --where vLLM=.../bin/python          or an environment of its own
    python benchmarks/engines.py --where transformers.js=DIR          npm install --prefix DIR @huggingface/transformers

The model is written by our own export, sees a picture of several tiles, and its greedy answer must be that of
`nanovlm.generate`. An engine with a server is asked over HTTP as anyone would; a library computes the logits of the
prompt. An engine that is not installed keeps the line that it has in the page.
"""

import base64
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import nanovlm
from nanovlm import cli
from nanovlm.config import DecoderConfig, MoEConfig, ProjectorConfig, TilingConfig, VisionConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.environment import describe_environment, short_commit
from nanovlm.errors import UserError
from nanovlm.files import write_file
from nanovlm.hub import export
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vision import normalize
from nanovlm.model.vlm import VLM

RESULTS = Path(__file__).resolve().parent / "results" / "engines.jsonl"
PAGE = cli.PROJECT / "docs" / "engines.md"
QUESTION, NUM_TOKENS = "what color is the 2nd circle?", 8
LLAMA = DecoderConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=False,
)
MIXTURE = MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=96)


@dataclass(frozen=True)
class EnginesConfig:
    """Ask every engine that is installed, and write the page."""

    # Engines to ask; all by default.
    engines: tuple[str, ...] = ()
    # ENGINE=PLACE: a folder of packages, or the Python of an environment.
    where: tuple[str, ...] = ()
    # Seconds to wait for a server.
    patience: float = field(default=900.0)


class Engine(NamedTuple):
    """`package` is what pip calls it. `ask` takes a folder with all that was written, and the command's environment."""

    package: str
    ask: Callable[["Written", "Place", list[str]], dict]
    # Options of the server, or none; and which decoder the model has.
    options: tuple[str, ...] = ()
    decoder: str = "llama"


class Place(NamedTuple):
    python: str
    path: str  # PYTHONPATH
    patience: float


class Written(NamedTuple):
    """A model in all formats, a picture and a question, and what we answer."""

    folder: Path
    inputs: dict[str, np.ndarray]
    logits: np.ndarray  # [V], of the last token of the prompt
    tokens: list[int]
    text: str
    logprobs: np.ndarray


def write_model(folder: Path, config: VLMConfig) -> Written:
    """Write a random model whose likeliest tokens are words: some engines report halves of characters as one token."""
    torch.manual_seed(0)
    size = config.decoder.vocab_size
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), size, marker_tokens(config))
    model = VLM(config.validate()).eval()
    is_word = [bool(re.fullmatch(r"Ġ?[a-z]+", tokenizer.id_to_token(i) or "")) for i in range(size)]
    with torch.no_grad():
        model.decoder.head_weight.mul_(20 * torch.tensor(is_word)[:, None])
    processor = Processor(tokenizer, CHAT_TEMPLATE, config)
    save_model(folder / "model", model, processor)
    export.export(folder / "model", folder / "hub")
    export.export(folder / "model", folder / "gguf", format="gguf")
    row, col = np.mgrid[0:100, 0:64]
    image = Image.fromarray(np.stack((2 * row, 3 * col, row + col), -1).clip(0, 255).astype(np.uint8))
    image.save(folder / "picture.png")
    document = processor.prompt([{"role": "user", "content": QUESTION}], [image])
    batch, length = processor.batch([document]), len(document)
    tokens = nanovlm.generate(model, batch, max_new_tokens=NUM_TOKENS)[0]
    with torch.no_grad():
        logits = model.logits(batch)[0, -1]
        document.input_ids = document.labels = torch.cat((document.input_ids, torch.tensor(tokens)))
        document.branch_ids = torch.zeros(len(document.input_ids), dtype=torch.int32)
        found = model.logits(processor.batch([document]))[0, length - 1 : -1].log_softmax(-1)
    inputs = {"input_ids": batch.input_ids.numpy(), "pixel_values": normalize(batch.pixel_values)[None].numpy()}
    np.savez(folder / "inputs.npz", **inputs)
    logprobs = found[torch.arange(len(tokens)), tokens].numpy()
    return Written(folder, inputs, logits.numpy(), tokens, processor.decode(tokens), logprobs)


# ---- libraries: a few lines that read inputs.npz and write logits.npy [V] ----

TRANSFORMERS = """
import numpy as np, torch, transformers
inputs = {name: torch.tensor(value) for name, value in np.load("inputs.npz").items()}
model = transformers.AutoModelForImageTextToText.from_pretrained("hub", dtype=torch.float32)
with torch.no_grad():
    np.save("logits.npy", model(**inputs).logits[0, -1].numpy())
"""
MLX = """
import numpy as np, mlx.core as mx
from mlx_vlm.utils import load_model
from pathlib import Path
inputs = {name: mx.array(value) for name, value in np.load("inputs.npz").items()}
pixels = inputs["pixel_values"]
mask = mx.ones((1, pixels.shape[1], *pixels.shape[3:]), dtype=mx.int32)
logits = load_model(Path("hub"))(inputs["input_ids"], pixels, pixel_attention_mask=mask).logits
np.save("logits.npy", np.array(logits)[0, -1])
"""
OPENVINO = """
import dataclasses, numpy as np, openvino, torch, nanovlm
inputs = {name: torch.tensor(value) for name, value in np.load("inputs.npz").items()}
model, processor = nanovlm.load("model")
from PIL import Image
batch = processor([{"role": "user", "content": QUESTION}], [Image.open("picture.png")])
class Answer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, input_ids, pixel_values):
        return self.model.logits(dataclasses.replace(batch, input_ids=input_ids, pixel_values=pixel_values))
example = (batch.input_ids, batch.pixel_values)
with torch.no_grad():
    converted = openvino.convert_model(Answer(), example_input=example)
compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
np.save("logits.npy", compiled([x.numpy() for x in example])[0][0, -1])
"""


ONNXRUNTIME = """
import numpy as np, onnxruntime, onnxscript
from nanovlm.hub.export import export_onnx
_, processor = export_onnx("model", "graphs", ("fp32",))
inputs = dict(np.load("inputs.npz"))
sessions = [onnxruntime.InferenceSession(f"graphs/onnx/{name}.onnx") for name in GRAPHS]
ids, pixels = inputs["input_ids"], inputs["pixel_values"]
shown = np.ones((1, pixels.shape[1], *pixels.shape[3:]), bool)
features, = sessions[0].run(None, {"pixel_values": pixels, "pixel_attention_mask": shown})
embeds, = sessions[1].run(None, {"input_ids": ids})
embeds[ids == processor.config.image_token_id] = features.reshape(-1, features.shape[-1])
names = [x.name for x in sessions[2].get_inputs() if x.name.startswith("past")]
decoder = processor.config.decoder
empty = np.zeros((1, decoder.num_key_value_heads, 0, decoder.head_dim), np.float32)
places = {"attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
others = {"inputs_embeds": embeds, **places, "num_logits_to_keep": np.array(1)}
np.save("logits.npy", sessions[2].run(["logits"], others | dict.fromkeys(names, empty))[0][0, -1])
""".replace("GRAPHS", "('vision_encoder', 'embed_tokens', 'decoder_model_merged')")


def ask_library(script: str):
    def ask(written: Written, place: Place, _options: list[str]) -> dict:
        script_of = script.replace("QUESTION", repr(QUESTION))
        command = [place.python, "-c", script_of]
        done = subprocess.run(command, cwd=written.folder, env=environment(place), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        logits = np.load(written.folder / "logits.npy")
        difference = abs(logits - written.logits).max() / abs(written.logits).max()
        return {"difference": float(difference), "of": "logits, relative to the largest"}

    return ask


# ---- transformers.js: answers in node, in the place of a browser (tests/test_browser.py has one) ----

TRANSFORMERS_JS = """
import { readFileSync, writeFileSync } from "node:fs";
const { AutoModelForImageTextToText, Tensor, env } = await import(PACKAGE);
Object.assign(env, { localModelPath: process.cwd(), allowRemoteModels: false });
const model = await AutoModelForImageTextToText.from_pretrained("graphs", { dtype: "fp32", device: "cpu" });
const { ids, pixels, shape } = JSON.parse(readFileSync("inputs.json"));
const long = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
const [, tiles, , height, width] = shape;
const inputs = {
  input_ids: long(ids),
  attention_mask: long(ids.map(() => 1)),
  pixel_values: new Tensor("float32", Float32Array.from(pixels), shape),
  pixel_attention_mask: new Tensor("bool", new Uint8Array(tiles * height * width).fill(1), [1, tiles, height, width]),
};
const { logits } = await model(inputs);
const found = await model.generate({ ...inputs, max_new_tokens: NUM_TOKENS, do_sample: false });
const tokens = found.tolist()[0].slice(ids.length).map(Number);
writeFileSync("outputs.json", JSON.stringify({ logits: logits.slice(0, -1).tolist(), tokens }));
"""


def ask_node(written: Written, place: Place, _options: list[str]) -> dict:
    if not (written.folder / "graphs").exists():
        export.export_onnx(written.folder / "model", written.folder / "graphs", ("fp32",))
    ids, pixels = written.inputs["input_ids"], written.inputs["pixel_values"]
    inputs = {"ids": ids[0].tolist(), "pixels": pixels.flatten().tolist(), "shape": pixels.shape}
    (written.folder / "inputs.json").write_text(json.dumps(inputs))
    package = find_node_package(place, ENGINES["transformers.js"].package) / "dist" / "transformers.node.mjs"
    script = TRANSFORMERS_JS.replace("PACKAGE", repr(str(package))).replace("NUM_TOKENS", str(NUM_TOKENS))
    command = ["node", "--input-type=module", "--eval", script]
    done = subprocess.run(command, cwd=written.folder, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()  # the last is the version of node
        raise RuntimeError(next((line for line in lines if "Error" in line), lines[0]))
    found = json.loads((written.folder / "outputs.json").read_text())
    difference = abs(np.array(found["logits"]) - written.logits).max() / abs(written.logits).max()
    return {
        "same text": found["tokens"] == written.tokens,
        "difference": float(difference),
        "of": "logits, relative to the largest",
    }


def find_node_package(place: Place, name: str) -> Path:
    """Return where `npm install --prefix DIR` puts a package, DIR being the place that the command names."""
    return Path(place.path.partition(os.pathsep)[0]) / "node_modules" / name


# ---- servers: asked over HTTP ----

LLAMA_CPP = """
import sys, xllamacpp
from pathlib import Path
params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path = (str(next(Path("gguf").glob(which + "-*"))) for which in ("model", "mmproj"))
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[1])
params.n_ctx, params.n_parallel, params.warmup, params.use_jinja, params.mmproj_use_gpu = 1024, 1, False, True, False
server = xllamacpp.Server(params)
sys.stdin.read()
"""


def ask_server(command: list[str]):
    """`command` follows the Python of the environment; {port} is the port that it shall listen on."""

    def ask(written: Written, place: Place, options: list[str]) -> dict:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        full = [place.python, *(part.replace("{port}", str(port)) for part in (*command, *options))]
        with open(written.folder / "server.log", "w") as log:
            server = subprocess.Popen(
                full, cwd=written.folder, env=environment(place), stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        try:
            reply = request(f"http://127.0.0.1:{port}/v1", written.folder, server, place.patience)
        finally:
            assert server.stdin is not None
            server.stdin.close()
            server.terminate()
            server.wait(60)
        choice = reply["choices"][0]
        result = {"same text": choice["message"]["content"].strip() == written.text.strip()}
        if choice.get("logprobs"):
            found = np.array([token["logprob"] for token in choice["logprobs"]["content"]])
            difference = abs(found - written.logprobs[: len(found)]).max() if len(found) == NUM_TOKENS else np.inf
            result |= {"difference": float(difference), "of": "log-probabilities of the answer"}
        return result

    return ask


def request(address: str, folder: Path, server: subprocess.Popen, patience: float) -> dict:
    """Ask the question as soon as the server takes it. Raises RuntimeError with its last line if it ends."""
    picture = "data:image/png;base64," + base64.b64encode((folder / "picture.png").read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError((folder / "server.log").read_text().strip().splitlines()[-1])
        try:
            models = json.loads(urllib.request.urlopen(f"{address}/models", timeout=10).read())["data"]
        except (OSError, ValueError, KeyError):
            time.sleep(1)
            continue
        name = next((m["id"] for m in models if "hub" in m["id"]), str(folder / "hub"))
        body = {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": NUM_TOKENS}
        data = json.dumps(body | {"temperature": 0, "logprobs": True}).encode()
        asked = urllib.request.Request(f"{address}/chat/completions", data, {"Content-Type": "application/json"})
        try:
            return json.loads(urllib.request.urlopen(asked, timeout=patience).read())
        except urllib.error.HTTPError as error:
            if error.code == 503:  # it listens, and is still loading
                time.sleep(1)
                continue
            raise RuntimeError(f"status {error.code}: {error.read()[:300]!r}") from error
    raise RuntimeError(f"no answer in {patience:.0f} s")


def environment(place: Place) -> dict[str, str]:
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    vllm = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    inherited = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return inherited | threads | vllm | {"PYTHONPATH": place.path}


VLLM = ["-m", "vllm.entrypoints.openai.api_server", "--model", "hub", "--dtype", "float32", "--port", "{port}"]
VLLM += ["--host", "127.0.0.1", "--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "2"]
SERVE = [
    "-c",
    "from transformers.cli.transformers import main; main()",
    "serve",
    "hub",
    "--host",
    "127.0.0.1",
    "--port",
    "{port}",
]
SERVE += ["--device", "cpu", "--dtype", "float32"]
# Name in the page -> how it is asked.
ENGINES = {
    "transformers": Engine("transformers", ask_library(TRANSFORMERS)),
    "transformers, Qwen3-MoE": Engine("transformers", ask_library(TRANSFORMERS), decoder="qwen3_moe"),
    "transformers serve": Engine("transformers", ask_server(SERVE)),
    "llama.cpp": Engine("xllamacpp", ask_server(["-c", LLAMA_CPP, "{port}"])),
    "llama.cpp, Qwen3-MoE": Engine("xllamacpp", ask_server(["-c", LLAMA_CPP, "{port}"]), decoder="qwen3_moe"),
    "mlx-vlm": Engine("mlx-vlm", ask_library(MLX)),
    "onnxruntime": Engine("onnxruntime", ask_library(ONNXRUNTIME)),
    "onnxruntime, Qwen3-MoE": Engine("onnxruntime", ask_library(ONNXRUNTIME), decoder="qwen3_moe"),
    "transformers.js": Engine("@huggingface/transformers", ask_node),
    "OpenVINO": Engine("openvino", ask_library(OPENVINO)),
    "vLLM": Engine("vllm-cpu", ask_server(VLLM)),
    "vLLM --model-impl transformers": Engine("vllm-cpu", ask_server(VLLM), ("--model-impl", "transformers")),
    "vLLM --model-impl transformers, Qwen3-MoE": Engine(
        "vllm-cpu", ask_server(VLLM), ("--model-impl", "transformers"), "qwen3_moe"
    ),
}


def find_version(engine: Engine, place: Place) -> str | None:
    if engine.package.startswith("@"):
        file = find_node_package(place, engine.package) / "package.json"
        return json.loads(file.read_text())["version"] if file.is_file() else None
    script = f"import importlib.metadata as m; print(m.version({engine.package!r}))"
    done = subprocess.run([place.python, "-c", script], env=environment(place), capture_output=True, text=True)
    return done.stdout.strip() or None


def main(config: EnginesConfig):
    torch.set_num_threads(1)
    where = dict(entry.partition("=")[::2] for entry in config.where)
    configs = {
        "llama": LLAMA,
        "qwen3_moe": dataclasses.replace(LLAMA, moe=MIXTURE, qk_norm="head"),
    }
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, decoder in configs.items():
            chosen = {
                name: engine
                for name, engine in ENGINES.items()
                if engine.decoder == kind and (not config.engines or name in config.engines)
            }
            (Path(folder) / kind).mkdir()
            written = None
            for name, engine in chosen.items():
                given = where.get(name.partition(",")[0].partition(" ")[0], "")
                is_python = Path(given).is_file()
                path = os.pathsep.join(filter(None, ("" if is_python else given, str(cli.PROJECT))))
                place = Place(given if is_python else sys.executable, "" if is_python else path, config.patience)
                if (version := find_version(engine, place)) is None:
                    print(f"{name}: not installed")
                    continue
                written = written or write_model(Path(folder) / kind, make_config(decoder))
                try:
                    result = engine.ask(written, place, list(engine.options))
                except (RuntimeError, UserError) as error:
                    if "ModuleNotFoundError" in str(error) or "is not installed" in str(error):
                        print(f"{name}: not installed as a whole ({error})")
                        continue
                    result = {"failed": str(error)}
                rows[name] = {"engine": name, "package": f"{engine.package} {version}", **result}
                rows[name]["environment"] = describe_environment(torch.device("cpu"), 1, "fp32")
                print(json.dumps(rows[name]), flush=True)
                keep(rows)


def keep(rows: dict[str, dict]):
    """Replace the lines of these engines in the results, and write the page."""
    before = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    rows = {row["engine"]: row for row in before} | rows
    rows = {name: rows[name] for name in ENGINES if name in rows}
    write_file(RESULTS, "".join(json.dumps(row) + "\n" for row in rows.values()))
    write_file(PAGE, make_page(rows))


def make_config(decoder: DecoderConfig) -> VLMConfig:
    vision = VisionConfig(
        image_size=32, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    tiling = TilingConfig(policy="idefics3", longest_edge=64)
    return VLMConfig(vision=vision, projector=ProjectorConfig(scale_factor=2), tiling=tiling, decoder=decoder)


def make_page(rows: dict[str, dict]) -> str:
    """Return docs/engines.md."""
    lines = [
        "# Engines",
        "",
        "Written by `python benchmarks/engines.py`: one small random model, exported by us, asked about one picture of",
        "several tiles in each engine that was installed, and compared with our own answer of 8 tokens. Which models",
        "an engine does not take is in [hub.md](hub.md#which-engine-serves-it).",
        "",
        "| engine | package | same answer | largest difference | date | commit |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        answer = {True: "yes", False: "**no**", None: ""}[row.get("same text")]
        difference = f"{row['difference']:.1e} of {row['of']}" if "difference" in row else "the server tells none"
        if "failed" in row:
            answer, difference = "**no**", "fails: " + row["failed"].replace("|", "/")[:160]
        where = row["environment"]
        lines.append(
            f"| {name} | {row['package']} | {answer} | {difference} | {where['date']} | "
            f"{short_commit(where['commit'] or '')} |"
        )
    lines += ["", "A library computes logits and has no answer of its own. All on a CPU, in fp32."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(EnginesConfig)))
