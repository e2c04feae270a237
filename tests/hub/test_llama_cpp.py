"""GGUF files that export writes, served by llama.cpp, give the answers that we give.

    pip install --no-deps --target llama_cpp xllamacpp==2026.10.11549
    PYTHONPATH=llama_cpp python -m pytest tests/hub/test_llama_cpp.py

One test compares the files with those of llama.cpp's converter, convert_hf_to_gguf.py, where LLAMA_CPP_DIR has it: the
source distribution of llama-cpp-python does, in vendor/llama.cpp (`pip download --no-deps --no-binary llama-cpp-python
llama-cpp-python==0.3.36`).
"""

import base64
import contextlib
import dataclasses
import http.client
import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import nanovlm
from nanovlm.config import DecoderConfig, ProjectorConfig, TilingConfig, VisionConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.hub import check, engines, export
from nanovlm.hub.gguf_export import TYPES, write_gguf
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from tests.hub.test_gguf_export import DECODERS, decoder, read

CONVERTER = Path(os.environ.get("LLAMA_CPP_DIR", "/nowhere"))
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp"
)

CONFIG = VLMConfig(
    vision=VisionConfig(
        image_size=32, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ),
    tiling=TilingConfig(policy="idefics3", longest_edge=64),
    decoder=DecoderConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=False,
    ),
)
QUESTION = "what color is the 2nd circle?"

CONVERT = """\
import runpy, sys
folder, source, out = sys.argv[1:]
sys.path[:0] = [folder, folder + "/gguf-py"]
from conversion import base
# The converter knows by a hash of its tokens how a tokenizer splits text; ours does it as SmolLM's.
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
def no_sentencepiece(self):
    raise FileNotFoundError
base.TextModel._create_vocab_sentencepiece = no_sentencepiece
for name, options in (("text", []), ("mmproj", ["--mmproj"])):
    sys.argv = ["convert", source, "--outfile", f"{out}/{name}.gguf", "--outtype", "f32", *options]
    runpy.run_path(folder + "/convert_hf_to_gguf.py", run_name="__main__")
"""
SERVE = """\
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
if len(sys.argv) > 3:
    params.mmproj.path = sys.argv[3]
params.hostnames, params.port = ["127.0.0.1"], int(sys.argv[2])
params.n_ctx, params.n_parallel, params.warmup, params.use_jinja = 1024, 1, False, True
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.mmproj_use_gpu = False
params.no_extra_bufts = True  # Q4_0 repacked for the processor rounds otherwise
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def make_model(config):
    """A random model whose likeliest tokens are words: llama.cpp reports halves of characters as one token."""
    torch.manual_seed(0)
    size = config.decoder.vocab_size
    tokenizer = train_tokenizer(sample_texts(Scenes("train"), 50), size, marker_tokens(config))
    model = VLM(config.validate()).eval()
    is_word = [bool(re.fullmatch(r"Ġ?[a-z]+", tokenizer.id_to_token(i) or "")) for i in range(size)]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms, which begin as 0 and 1
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.decoder.head_weight.mul_(0.1 + 20 * torch.tensor(is_word)[:, None])
    return model, Processor(tokenizer, CHAT_TEMPLATE, config)


def answer(model, processor, images):
    """Our greedy answer: the number of prompt tokens, the new tokens, and the log-probability of each."""
    document = processor.prompt([{"role": "user", "content": QUESTION}], images)
    length = len(document)
    tokens = nanovlm.generate(model, processor.batch([document]), max_new_tokens=8)[0]
    document.input_ids = document.labels = torch.cat((document.input_ids, torch.tensor(tokens)))
    document.branch_ids = torch.zeros(len(document.input_ids), dtype=torch.int32)
    with torch.no_grad():
        logits = model.logits(processor.batch([document]))[0, length - 1 : -1]
    return length, tokens, logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]


def ask(address, images):
    """The same from an OpenAI-compatible endpoint."""
    content = []
    for image in images:
        png = io.BytesIO()
        image.save(png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": QUESTION})
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0, "logprobs": True}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    reply = json.loads(urllib.request.urlopen(request, timeout=60).read())
    tokens = reply["choices"][0]["logprobs"]["content"]
    return reply["usage"]["prompt_tokens"], [t["id"] for t in tokens], torch.tensor([t["logprob"] for t in tokens])


@contextlib.contextmanager
def serve(folder, config=CONFIG, dtype="float32"):
    """Export and serve a random model; yield it, its processor, the address and the server's process."""
    model, processor = make_model(config)
    (folder / "gguf").mkdir()
    write_gguf(folder / "gguf", "tiny", model, processor, dtype)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text, pictures = (sorted((folder / "gguf").glob(f"{which}-*")) for which in ("model", "mmproj"))
    with open(folder / "server.log", "w") as log:
        command = [sys.executable, "-c", SERVE, *map(str, (*text, port, *pictures))]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    yield model, processor, server.stdout.readline().strip(), server
    server.stdin.close()
    server.wait(30)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("llama_cpp")) as (model, processor, address, _):
        yield model, processor, address


IMAGES = {
    "no image": ([], 1e-4),
    "one color": ([Image.new("RGB", (100, 64), (200, 40, 90))], 5.5e-3),
    "wide": ([check._gradient(100, 64)], 5.5e-3),
    "high": ([check._gradient(48, 130)], 5.5e-3),
    "two": ([check._gradient(64, 64), check._gradient(30, 20)], 5.5e-3),
}


def compare(name, model, processor, address, images):
    """Ask both; return the largest difference of a log-probability. The tokens must be the same."""
    length, tokens, logprobs = answer(model, processor, images)
    their_length, their_tokens, their_logprobs = ask(address, images)
    assert their_length == length and their_tokens == tokens and len(tokens) == 8
    difference = (logprobs - their_logprobs).abs().max().item()
    print(f"{name}: {difference:.1e}")
    return difference


@needs_llama_cpp
@pytest.mark.parametrize("name", IMAGES)
def test_llama_cpp_answers_the_same(served, name):
    """The same tokens, and log-probabilities within what was seen before on another model (5.5e-3)."""
    images, bound = IMAGES[name]
    assert compare(name, *served, images) <= bound


@needs_llama_cpp
@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_answers_the_same(tmp_path, name):
    config = decoder(vocab_size=512, **DECODERS[name])
    with serve(tmp_path, config) as (model, processor, address, _):
        assert compare(name, model, processor, address, []) <= 1e-4


@needs_llama_cpp
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2"])
def test_other_decoders_see(tmp_path, name):
    """Idefics3's encoder and projector beside a decoder that llama.cpp's converter has no Idefics3 with."""
    config = dataclasses.replace(CONFIG, decoder=decoder(vocab_size=512, **DECODERS[name]).decoder)
    with serve(tmp_path, config) as (model, processor, address, _):
        assert compare(name, model, processor, address, IMAGES["high"][0]) <= IMAGES["high"][1]


def round_inputs(model, dtype):
    """Make a model round what is multiplied with its weights as llama.cpp does on a CPU (`vec_dot_type` in ggml-cpu.c).

    Beside weights of 16 bits to these 16 bits, beside all quantised ones to 8 bits, in blocks of 32 with a scale of 16
    bits (Q8_0). Where weights have a minimum, the sum of a block that it is multiplied with is rounded for itself, to
    16 bits (Q8_1). The inputs of the head, of Q8_0, are the outputs of the last norm.
    """

    def to_8_bits(x):
        blocks = x.unflatten(-1, (-1, 32))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        return (blocks / scale.clamp(min=1e-30)).round(), scale

    def round_one(x):
        if not dtype.startswith("q"):
            return x.to(getattr(torch, dtype)).float()
        codes, scale = to_8_bits(x)
        return (codes * scale.half().float()).flatten(-2)

    def multiply(layer, inputs, _output):
        y = F.linear(round_one(inputs[0]), layer.weight)
        if dtype.endswith("_1"):
            (codes, scale), least = to_8_bits(inputs[0]), layer.weight.unflatten(-1, (-1, 32)).amin(-1)
            sums = codes.sum(-1, keepdim=True)
            y = y + F.linear(((scale * sums).half().float() - scale.half().float() * sums)[..., 0], least)
        return y

    for module in model.decoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(multiply)
    model.decoder.norm.register_forward_hook(lambda _module, _inputs, output: round_one(output))


@needs_llama_cpp
@pytest.mark.parametrize("dtype", [dtype for dtype in TYPES if dtype != "float32"])
def test_packed_weights_answer_the_same(tmp_path, dtype):
    """As our model does with the same numbers, when it also rounds what is multiplied with them as llama.cpp does.

    Without that rounding within 0.02 in 16 bits, and in 8 bits and fewer within 0.1. Measured with xllamacpp
    2026.10.11549: 9.9e-3 in bfloat16, 2.4e-2 to 5.1e-2 in 8 bits and fewer, and with the rounding at most 2e-6 there.
    """
    with serve(tmp_path, decoder(vocab_size=512), dtype) as (_, processor, address, _):
        unpacked, _ = nanovlm.load(tmp_path / "gguf" / f"model-{TYPES[dtype]}.gguf")
        is_quantised = dtype.startswith("q")
        assert compare(dtype, unpacked, processor, address, []) <= (0.1 if is_quantised else 0.02)
        round_inputs(unpacked, dtype)
        rounded = compare(f"{dtype}, inputs rounded", unpacked, processor, address, [])
        assert rounded <= (1e-4 if is_quantised else 1e-3)


@needs_llama_cpp
def test_a_picture_of_one_tile_is_shown_twice(tmp_path):
    """As a grid of one and as a whole, as engines.py says: one tile and its two markers more, and two blank lines."""
    config = dataclasses.replace(CONFIG, tiling=TilingConfig(policy="idefics3", longest_edge=32))
    faults = [why for engine, why in engines.find_faults(config, torch.float32) if engine == "llama.cpp"]
    assert len(faults) == 1 and "which it shows twice" in faults[0]
    with serve(tmp_path, config) as (model, processor, address, _):
        image = IMAGES["wide"][0]
        assert compare("text", model, processor, address, []) <= 1e-4
        markers = processor.tokenizer.encode("<fake_token_around_image><row_1_col_1>\n\n").ids
        length = len(processor.prompt([{"role": "user", "content": QUESTION}], image))
        assert ask(address, image)[0] == length + config.num_image_tokens + len(markers)


@needs_llama_cpp
def test_a_model_without_pixel_shuffle_aborts_it(tmp_path):
    """At the first picture, as engines.py says; text is answered. Export refuses such a model."""
    vision = dataclasses.replace(CONFIG.vision, image_size=16)
    config = dataclasses.replace(CONFIG, vision=vision, projector=ProjectorConfig(scale_factor=1))
    assert [engine for engine, _ in engines.find_faults(config, torch.float32) if engine == "llama.cpp"]
    with serve(tmp_path, config) as (model, processor, address, server):
        assert ask(address, [])[:2] == answer(model, processor, [])[:2]
        with pytest.raises(http.client.RemoteDisconnected):
            ask(address, [check._gradient(100, 64)])
        assert server.wait(30) != 0
    assert "GGML_ASSERT(scale_factor > 1) failed" in (tmp_path / "server.log").read_text()


@pytest.mark.skipif(
    not (CONVERTER / "convert_hf_to_gguf.py").is_file(), reason="needs llama.cpp's converter in LLAMA_CPP_DIR"
)
def test_the_converter_writes_the_same(tmp_path):
    """Every tensor bit for bit, and every field but the names and tags of the model."""
    model, processor = make_model(CONFIG)
    save_model(tmp_path / "model", model, processor)
    export.export(tmp_path / "model", tmp_path / "hub")
    export.export(tmp_path / "model", tmp_path / "gguf", format="gguf")
    command = [sys.executable, "-c", CONVERT, str(CONVERTER), str(tmp_path / "hub"), str(tmp_path)]
    converted = subprocess.run(command, capture_output=True, text=True)
    assert converted.returncode == 0, converted.stderr
    for which, ours in (("text", "model-F32.gguf"), ("mmproj", "mmproj-F32.gguf")):
        tensors, fields = read(tmp_path / f"{which}.gguf")
        our_tensors, our_fields = read(tmp_path / "gguf" / ours)
        assert tensors.keys() == our_tensors.keys()
        assert all(torch.equal(our_tensors[name], tensor) for name, tensor in tensors.items())
        different = {name for name in fields if our_fields.get(name) != fields[name]}
        assert different <= {"general.name", "general.size_label", "general.tags", "GGUF.kv_count"}
        # What no answer contains, in the text model; and our templates write all of a prompt.
        more = {"tokenizer.ggml.suppress_tokens", "tokenizer.ggml.add_bos_token"}
        assert our_fields.keys() - fields.keys() == (more if which == "text" else set())
