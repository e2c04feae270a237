"""One small random model through every installed engine -> benchmarks/results/engines.jsonl and docs/engines.md.

    python benchmarks/engines.py                                      those of this environment
    python benchmarks/engines.py --where llama.cpp=DIR mlx-vlm=DIR    packages that `pip install --target DIR` put there
    python benchmarks/engines.py --where vLLM=.../bin/python          or an environment of its own
    python benchmarks/engines.py --where transformers.js=DIR          npm install --prefix DIR @huggingface/transformers

The model is written by our own export, sees a picture of several tiles, and its greedy answer must be that of
`nanovlm.generate`. An engine with a server is asked over HTTP as anyone would; a library computes the logits of the
prompt. An engine that is not installed keeps the line that it has in the page. tests/test_engines_benchmark.py asks
the same of every engine, and says which answer is right.
"""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.engines_models import NUM_TOKENS, QUESTION, Written, write_model
from nanovlm import cli
from nanovlm.environment import describe_environment, short_commit
from nanovlm.errors import UserError
from nanovlm.files import write_file
from nanovlm.hub import export

RESULTS = Path(__file__).resolve().parent / "results" / "engines.jsonl"
PAGE = cli.PROJECT / "docs" / "engines.md"


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
    # What a user does with OUT_DIR, the folder of an export; a key of MODELS; options of the server.
    use: str
    model: str = "Llama"
    options: tuple[str, ...] = ()


class Place(NamedTuple):
    python: str
    path: str  # PYTHONPATH
    patience: float


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
GRAPHS = """
import numpy as np, nanovlm
config = nanovlm.load("model")[1].config
inputs = dict(np.load("inputs.npz"))
ids, pixels, decoder = inputs["input_ids"], inputs["pixel_values"], config.decoder
shown = np.ones((1, pixels.shape[1], *pixels.shape[3:]), bool)
features = run("vision_encoder", "image_features", {"pixel_values": pixels, "pixel_attention_mask": shown})
embeds = np.array(run("embed_tokens", "inputs_embeds", {"input_ids": ids}))
embeds[ids == config.image_token_id] = features.reshape(-1, features.shape[-1])
empty = np.zeros((1, decoder.num_key_value_heads, 0, decoder.head_dim), np.float32)
names = [f"past_key_values.{i}.{part}" for i in range(decoder.num_hidden_layers) for part in ("key", "value")]
places = {"attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
others = {"inputs_embeds": embeds, **places, "num_logits_to_keep": np.array(1)}
np.save("logits.npy", run("decoder_model_merged", "logits", others | dict.fromkeys(names, empty))[0, -1])
"""
ONNXRUNTIME = """
import onnxruntime
def run(name, output, inputs):
    return onnxruntime.InferenceSession(f"graphs/onnx/{name}.onnx").run([output], inputs)[0]
"""
OPENVINO = """
import openvino
def run(name, output, inputs):
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(f"graphs/onnx/{name}.onnx", "CPU", options)(inputs)[output]
"""


def ask_library(script: str):
    def ask(written: Written, place: Place, _options: list[str]) -> dict:
        done = subprocess.run(
            [place.python, "-c", script], cwd=written.folder, env=environment(place), capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        logits = np.load(written.folder / "logits.npy")
        difference = abs(logits - written.logits).max() / abs(written.logits).max()
        return {"difference": float(difference), "of": "logits"}

    return ask


def ask_graphs(script: str):
    """`script` has a function that runs one graph."""

    def ask(written: Written, place: Place, options: list[str]) -> dict:
        export_graphs(written)
        return ask_library(script + GRAPHS)(written, place, options)

    return ask


def export_graphs(written: Written):
    if not (written.folder / "graphs").exists():
        export.export_onnx(written.folder / "model", written.folder / "graphs", ("fp32",))


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
    if shutil.which("node") is None:
        raise UserError("node is not installed: transformers.js needs it here")
    export_graphs(written)
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
    return {"same text": found["tokens"] == written.tokens, "difference": float(difference), "of": "logits"}


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
            # `transformers serve` lists what is in the hub's cache, and fails where there is none.
            cache = written.folder / "cache"
            cache.mkdir(exist_ok=True)
            server = subprocess.Popen(
                full,
                cwd=written.folder,
                env=environment(place) | {"HF_HUB_CACHE": str(cache)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
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
            result |= {"difference": float(difference), "of": "log-probabilities"}
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
        except (OSError, ValueError, KeyError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 500:
                raise RuntimeError(f"status 500: {error.read()[:300]!r}") from error
            time.sleep(1)
            continue
        names = [m["id"] for m in models if m["id"] == "adapter"] + [m["id"] for m in models if "hub" in m["id"]]
        name = next(iter(names), "hub")
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


def ask_with_plugin(written: Written, place: Place, options: list[str]) -> dict:
    """Ask vLLM as if nanovlm were installed beside it: the package, and what pip notes of its entry points."""
    project = tomllib.loads((cli.PROJECT / "pyproject.toml").read_text())["project"]
    group = "vllm.general_plugins"
    lines = [f"{name} = {value}" for name, value in project["entry-points"][group].items()]
    notes = written.folder / "packages" / "nanovlm-0.dist-info"
    notes.mkdir(parents=True)
    (notes / "METADATA").write_text("Metadata-Version: 2.1\nName: nanovlm\nVersion: 0\n")
    (notes / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    (notes.parent / "nanovlm").symlink_to(cli.PROJECT / "nanovlm")
    return ask_server(VLLM)(written, place._replace(path=str(notes.parent)), options)


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
AUTO, SERVER = "AutoModelForImageTextToText", "llama-server -m model-F32.gguf --mmproj mmproj-F32.gguf"
OTHER_CODE = ("--model-impl", "transformers")
ADAPTER = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", "adapter=adapter")
# Name in the page -> how it is asked.
ENGINES = {
    "transformers": Engine("transformers", ask_library(TRANSFORMERS), AUTO),
    "transformers, Qwen3-MoE": Engine("transformers", ask_library(TRANSFORMERS), AUTO, "Qwen3-MoE"),
    "transformers serve": Engine("transformers", ask_server(SERVE), "transformers serve OUT_DIR"),
    "llama.cpp": Engine("xllamacpp", ask_server(["-c", LLAMA_CPP, "{port}"]), SERVER),
    "llama.cpp, Qwen3-MoE": Engine("xllamacpp", ask_server(["-c", LLAMA_CPP, "{port}"]), SERVER, "Qwen3-MoE"),
    "mlx-vlm": Engine("mlx-vlm", ask_library(MLX), "mlx_vlm.utils.load_model"),
    "onnxruntime": Engine("onnxruntime", ask_graphs(ONNXRUNTIME), "onnxruntime, --format onnx"),
    "onnxruntime, Qwen3-MoE": Engine("onnxruntime", ask_graphs(ONNXRUNTIME), "onnxruntime, --format onnx", "Qwen3-MoE"),
    "transformers.js": Engine("@huggingface/transformers", ask_node, "AutoModelForImageTextToText, --format onnx"),
    "OpenVINO": Engine("openvino", ask_graphs(OPENVINO), "openvino.Core, --format onnx"),
    "vLLM": Engine("vllm-cpu", ask_server(VLLM), "vllm serve OUT_DIR"),
    "vLLM --model-impl transformers": Engine(
        "vllm-cpu", ask_server(VLLM), "vllm serve OUT_DIR --model-impl transformers", options=OTHER_CODE
    ),
    "vLLM --model-impl transformers, Qwen3-MoE": Engine(
        "vllm-cpu", ask_server(VLLM), "vllm serve OUT_DIR --model-impl transformers", "Qwen3-MoE", OTHER_CODE
    ),
    "vLLM --lora-modules": Engine(
        "vllm-cpu",
        ask_server(VLLM),
        "vllm serve OUT_DIR --enable-lora --lora-modules NAME=RUN/adapter",
        "Llama with an adapter",
        ADAPTER,
    ),
    "vLLM with our plug-in": Engine("vllm-cpu", ask_with_plugin, "vllm serve OUT_DIR, of --format vllm", "our own"),
}
# The largest difference with which an answer counts as ours; of llama.cpp, which scales pictures with other arithmetic.
LIMITS = {"logits": 1e-4, "log-probabilities": 0.02}


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
    rows, written = {}, {}
    where_it_ran = describe_environment(torch.device("cpu"), 1, "fp32")  # before the results are changed
    with tempfile.TemporaryDirectory() as folder:
        for name, engine in ENGINES.items():
            if config.engines and name not in config.engines:
                continue
            place = find_place(name, where, config.patience)
            if (version := find_version(engine, place)) is None:
                print(f"{name}: not installed")
                continue
            if engine.model not in written:
                (Path(folder) / engine.model).mkdir()
                written[engine.model] = write_model(Path(folder) / engine.model, engine.model)
            try:
                result = engine.ask(written[engine.model], place, list(engine.options))
            except (RuntimeError, UserError) as error:
                if "ModuleNotFoundError" in str(error) or "is not installed" in str(error):
                    print(f"{name}: not installed as a whole ({error})")
                    continue
                result = {"failed": str(error)}
            rows[name] = {"engine": name, "package": f"{engine.package} {version}", **result}
            rows[name]["environment"] = where_it_ran
            print(json.dumps(rows[name]), flush=True)
            keep(rows)


def find_place(name: str, where: dict[str, str], patience: float) -> Place:
    """Return the environment of an engine, of those in `where` by the first word of its name, or ours."""
    given = where.get(re.split("[, ]", name)[0], "")
    given = given and str(Path(given).absolute())  # engines run in the folder of their model
    if Path(given).is_file():
        return Place(given, "", patience)
    return Place(sys.executable, os.pathsep.join(filter(None, (given, str(cli.PROJECT)))), patience)


def is_ours(result: dict) -> bool:
    """Whether an engine gave our answer."""
    return (
        "failed" not in result
        and result.get("same text", True)
        and result.get("difference", 0) <= LIMITS[result.get("of", "logits")]
    )


def read_rows() -> dict[str, dict]:
    """Return the lines of the results by engine."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {row["engine"]: row for row in rows if row["engine"] in ENGINES}


def keep(rows: dict[str, dict]):
    """Replace the lines of these engines in the results, and write the page."""
    rows = read_rows() | rows
    rows = {name: rows[name] for name in ENGINES if name in rows}
    write_file(RESULTS, "".join(json.dumps(row) + "\n" for row in rows.values()))
    write_file(PAGE, make_page(rows))


def make_page(rows: dict[str, dict]) -> str:
    """Return docs/engines.md."""
    lines = [
        "# Engines",
        "",
        "Written by `python benchmarks/engines.py`: small random models, exported by us, asked about one picture of",
        "several tiles in each engine that was installed, and compared with our own answer of 8 tokens. Every yes is a",
        "test, too (`tests/test_engines_benchmark.py`, which says where it finds the engines), and which models an",
        "engine does not take is in [hub.md](hub.md#which-engine-serves-it).",
        "",
        "| engine | model | used as | our answer | largest difference | package | date | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        answer = "yes" if is_ours(row) else "**no**"
        difference = f"{row['difference']:.1e} of {row['of']}" if "difference" in row else "the server tells none"
        if "failed" in row:
            answer, difference = "**no**", "fails: " + row["failed"].replace("|", "/")[:160]
        where, engine = row["environment"], ENGINES[name]
        lines.append(
            f"| {name} | {engine.model} | `{engine.use}` | {answer} | {difference} | {row['package']} | "
            f"{where['date']} | {short_commit(where['commit'] or '')} |"
        )
    limits = ", ".join(f"{limit:g} of {what}" for what, limit in LIMITS.items())
    lines += [
        "",
        "A library computes logits, whose difference is relative to the largest, and a server writes the answer. It is",
        f"ours with the same text and a difference of at most {limits}. All on a CPU, in fp32. The models",
        'are an Idefics3 with a Llama of 2 blocks, or with a mixture; "our own" has a resampler, pictures cut by',
        "`tiling.policy = fit`, a block without RoPE and a mixture with sigmoid scores and a shared expert, which no",
        "published layout has.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(EnginesConfig)))
