"""GGUF files that export writes: read by transformers and by us, packed, and what is refused.

That llama.cpp answers with them as we do is in test_llama_cpp.py.
"""

import dataclasses
import json
import re
import sys

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM

import nanovlm
from nanovlm.config import DecoderConfig, MoEConfig, ProjectorConfig, RopeScalingConfig, TilingConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.images import marker_tokens
from nanovlm.data.tokenizer import CHAT_TEMPLATE, train_tokenizer
from nanovlm.hub import export, gguf_export
from nanovlm.hub.gguf_export import LLAMA3_SPLIT, QWEN2_SPLIT, TYPES, find_pre_tokenizer
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from tests.conftest import TINY

gguf = pytest.importorskip("gguf")
MOE = MoEConfig(num_experts=4, num_experts_per_tok=2, intermediate_size=64)
BASE = DecoderConfig(
    vocab_size=400,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=False,
)


def scaled(**fields):
    return RopeScalingConfig(factor=4.0, original_max_position_embeddings=32, **fields)


# Family and feature -> decoder; all of them are asked in test_llama_cpp.py, too.
DECODERS = {
    "llama": {},
    "llama, tied, biases, wide heads": {"tie_word_embeddings": True, "qkv_bias": True, "o_bias": True, "head_dim": 32},
    "linear": {"rope_scaling": scaled(type="linear")},
    "llama3": {"rope_scaling": scaled(type="llama3")},
    "yarn": {"rope_scaling": scaled(type="yarn")},
    "smollm3": {"layers_without_rope": (3,)},
    "qwen2": {"qkv_bias": True},
    "qwen2, yarn, tied": {"qkv_bias": True, "tie_word_embeddings": True, "rope_scaling": scaled(type="yarn")},
    "qwen3": {"qk_norm": "head", "head_dim": 32},
    "mixtral": {"moe": MOE},
    "qwen3_moe": {"moe": MOE, "qk_norm": "head"},
    "olmoe": {
        "moe": dataclasses.replace(MOE, norm_topk_prob=False),
        "qk_norm": "all",
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "tie_word_embeddings": True,
    },
}
SEES = dataclasses.replace(TINY, tiling=TilingConfig("idefics3", longest_edge=64))


def decoder(**fields):
    return VLMConfig(vision=None, image_token_id=None, decoder=dataclasses.replace(BASE, **fields))


def save(folder, config, template=CHAT_TEMPLATE):
    """Save a random model, every part of which tells on its answers; return it and its processor."""
    torch.manual_seed(0)
    model = VLM(config.validate()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    text = ["the red circle is left of the blue square, 12 of 3\n\n"] * 9
    tokenizer = train_tokenizer(text, config.decoder.vocab_size, marker_tokens(config))
    processor = Processor(tokenizer, template, config)
    save_model(folder, model, processor)
    return model, processor


def write(folder, config, dtype="float32"):
    saved = save(folder / "model", config)
    export.export(folder / "model", folder / "gguf", dtype, format="gguf")
    return *saved, folder / "gguf"


def read(path):
    """Tensors, unpacked, and fields of a file."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


# transformers reads no other of these families from GGUF files, or not the width of their experts, and ignores scaled
# positions; of Qwen3 it reads heads of 128 numbers only.
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_transformers_computes_the_same(tmp_path, name):
    heads = {"head_dim": 128} if name == "qwen3" else {}
    model, processor, folder = write(tmp_path, decoder(**DECODERS[name] | heads))
    batch = processor([{"role": "user", "content": "the red circle is left of 12"}])
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model-F32.gguf")
    expected = theirs(input_ids=batch.input_ids).logits
    assert (model.logits(batch) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_we_read_what_we_write(tmp_path):
    """Bit for bit, in the dtype of the model; and what comes after the tokens of the tokenizer stays."""
    model, processor, folder = write(tmp_path, decoder(vocab_size=410), "auto")
    assert [path.name for path in sorted(folder.iterdir())] == ["README.md", "model-F32.gguf"]
    found, other = nanovlm.load(folder / "model-F32.gguf")
    assert found.config == model.config and other.chat_template == CHAT_TEMPLATE
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    for text in ("the red 12 circles", "<|user|>é\n\n\U0001f642", ""):
        assert other.tokenizer.encode(text).ids == processor.tokenizer.encode(text).ids
    assert "llama-server -m model-F32.gguf\n" in (folder / "README.md").read_text()


@pytest.mark.parametrize("dtype", TYPES)
def test_matrices_are_packed(tmp_path, dtype):
    """Embeddings and head in 8 bits at least, rows that are no whole blocks in 16 bits, vectors in fp32."""
    config = decoder(intermediate_size=80, moe=dataclasses.replace(MOE, intermediate_size=80))
    model, _, folder = write(tmp_path, config, dtype)
    kind = TYPES[dtype]
    tensors = {t.name: t for t in gguf.GGUFReader(folder / f"model-{kind}.gguf").tensors}
    quantised = kind.startswith("Q")
    assert tensors["blk.0.attn_v.weight"].tensor_type.name == kind
    assert tensors["blk.0.ffn_gate_exps.weight"].tensor_type.name == kind
    assert tensors["blk.3.ffn_down_exps.weight"].tensor_type.name == ("F16" if quantised else kind)
    assert tensors["token_embd.weight"].tensor_type.name == ("Q8_0" if quantised else kind)
    assert {tensors[n].tensor_type.name for n in ("output_norm.weight", "blk.1.ffn_gate_inp.weight")} == {"F32"}
    weight = model.decoder.layers[1].self_attn.o_proj.weight.detach()
    packed = tensors["blk.1.attn_output.weight"]
    unpacked = torch.tensor(gguf.quants.dequantize(packed.data, packed.tensor_type))
    # Of the largest number of a block: half a step, or of those without a minimum a whole one at one end.
    most = {"Q8_0": 1 / 250, "Q5_1": 1 / 30, "Q5_0": 1 / 16, "Q4_1": 1 / 14, "Q4_0": 1 / 8}
    most |= {"F32": 0, "F16": 5e-4, "BF16": 4e-3}
    assert (unpacked - weight).abs().max() <= most[kind] * weight.abs().max()


def test_a_model_that_sees_has_two_files(tmp_path):
    model, _, folder = write(tmp_path, SEES, "q8_0")
    assert [path.name for path in sorted(folder.iterdir())] == ["README.md", "mmproj-F16.gguf", "model-Q8_0.gguf"]
    tensors, fields = read(folder / "mmproj-F16.gguf")
    assert torch.equal(tensors["v.patch_embd.weight"], model.vision.patch_embedding.weight)
    assert torch.equal(tensors["mm.model.fc.weight"], model.projector.proj.weight.half().float())
    assert len(tensors) == len(model.vision.state_dict()) + 1
    assert fields["clip.vision.preproc_image_size"] == 64 and fields["clip.projector_type"] == "idefics3"
    card = (folder / "README.md").read_text()
    assert "llama-server --mmproj mmproj-F16.gguf -m model-Q8_0.gguf\n" in card and "library_name: gguf" in card
    assert "vLLM" not in card and re.search(r"^\| llama.cpp \| xllamacpp", card, re.M)


def test_tokens(tmp_path):
    """Kinds of tokens, those that end an answer and those that no answer has."""
    config = dataclasses.replace(SEES, stop_token_ids=(5, 4), bos_token_id=3)
    _, processor, folder = write(tmp_path, dataclasses.replace(config, decoder=dataclasses.replace(TINY.decoder)))
    fields = read(folder / "model-F32.gguf")[1]
    name = "tokenizer.ggml."
    special = {which: fields[f"{name}{which}_token_id"] for which in ("eos", "eot", "eom", "bos", "padding")}
    assert special == {"eos": 2, "eot": 5, "eom": 4, "bos": 3, "padding": 0}
    assert fields[f"{name}suppress_tokens"] == [0, 1] and fields[f"{name}add_bos_token"] is False
    size = processor.tokenizer.get_vocab_size()
    kinds = fields[f"{name}token_type"]
    assert kinds[:6] == [3] * 6 and kinds[300] == 1 and fields[f"{name}tokens"][1] == "<image>"
    assert kinds[size:] == [5] * (TINY.decoder.vocab_size - size) and len(kinds) == TINY.decoder.vocab_size


def test_the_command(tmp_path, capsys):
    one_tile = dataclasses.replace(SEES, tiling=TilingConfig("idefics3", longest_edge=16))
    save(tmp_path / "model", one_tile)
    arguments = [str(tmp_path / "model"), str(tmp_path / "gguf"), "--format", "gguf", "--dtype", "q4_0"]
    export.main(arguments)
    said = capsys.readouterr().out
    assert "wrote " in said and "note: llama.cpp: tiling.longest_edge = 16 makes every picture one tile" in said
    for options, message in (
        (["--format", "gguf", "--check"], "check = True compares what format = hub writes, not gguf"),
        (["--dtype", "q4_0"], "dtype = 'q4_0' is not one of auto, float32, bfloat16, float16; others need format"),
        (["--format", "gguf", "--dtype", "q4_k_m"], "let llama.cpp's llama-quantize make them"),
    ):
        with pytest.raises(ValueError) as error:
            export.main([str(tmp_path / "model"), str(tmp_path / "other"), *options])
        assert message in str(error.value) and "\n" not in str(error.value)


def moe(**fields):
    return {"moe": dataclasses.replace(MOE, **fields)}


REFUSED = [
    (decoder(qk_norm="head", qkv_bias=True, o_bias=True), "decoder.o_bias = True"),
    (decoder(qkv_bias=True, head_dim=32), "decoder.head_dim = 32"),
    (decoder(qk_norm="head", **moe(norm_topk_prob=False)), "decoder.moe.norm_topk_prob = False"),
    (decoder(qk_norm="head", **moe(layers=(1,))), "decoder.moe.layers = (1,)"),
    (decoder(qk_norm="all", intermediate_size=64, **moe()), "decoder.num_key_value_heads = 2"),
    (decoder(layers_without_rope=(1,)), "decoder.layers_without_rope = (1,)"),
    (decoder(qk_norm="head", rope_scaling=scaled(type="llama3")), "decoder.rope_scaling.type = llama3"),
    (decoder(rope_scaling=scaled(type="yarn", beta_fast=8.0)), "decoder.rope_scaling.beta_fast = 8.0"),
    (decoder(rope_scaling=scaled(type="yarn", truncate=False)), "decoder.rope_scaling.truncate = False"),
    (dataclasses.replace(SEES, projector=ProjectorConfig(scale_factor=1)), "projector.scale_factor = 1 aborts"),
    (dataclasses.replace(SEES, stop_token_ids=(3, 4, 5)), "stop_token_ids = (3, 4, 5) are more than the 2"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_llama_cpp_does_not_know_is_named(tmp_path, config, message):
    save(tmp_path / "model", config)
    with pytest.raises(ValueError) as error:
        export.export(tmp_path / "model", tmp_path / "gguf", format="gguf")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "gguf").exists()


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


def cut(*steps, normalizer=None, ignore_merges=False):
    tokenizer = Tokenizer.from_str(train_tokenizer(["the red circle"], 280).to_str())
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
    tokenizer.normalizer = normalizer
    data = json.loads(tokenizer.to_str())
    data["model"]["ignore_merges"] = ignore_merges
    return data


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def test_pre_tokenizers_have_names():
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert find_pre_tokenizer(cut(DIGITS, whole)) == "smollm"
    assert find_pre_tokenizer(cut(whole)) == "gpt-2"
    assert find_pre_tokenizer(cut(whole, normalizer=normalizers.NFC())) == "olmo"
    assert find_pre_tokenizer(cut(split(LLAMA3_SPLIT), BYTES, ignore_merges=True)) == "llama-bpe"
    assert find_pre_tokenizer(cut(split(QWEN2_SPLIT), BYTES, normalizer=normalizers.NFC())) == "qwen2"
    others = (
        cut(whole, DIGITS),
        cut(pre_tokenizers.Digits(), whole),
        cut(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        cut(DIGITS, whole, normalizer=normalizers.Lowercase()),
        cut(split(LLAMA3_SPLIT), BYTES),
        cut(pre_tokenizers.Split(Regex(QWEN2_SPLIT), "removed"), BYTES, normalizer=normalizers.NFC()),
        cut(pre_tokenizers.Metaspace()),
    )
    for data in others:
        with pytest.raises(ValueError, match=r"llama\.cpp has no name for this tokenizer, a BPE with normalizer = "):
            find_pre_tokenizer(data)


def test_tokens_that_take_spaces_are_named(tmp_path):
    _, processor = save(tmp_path / "model", decoder())
    processor.tokenizer.add_special_tokens([AddedToken("<|user|>", special=True, lstrip=True)])
    with pytest.raises(ValueError, match=r"the token '<\|user\|>' takes spaces beside it"):
        gguf_export.tokenizer_fields(processor)


def test_the_package_is_named(tmp_path, monkeypatch):
    save(tmp_path / "model", decoder())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[gguf\]"$'):
        export.export(tmp_path / "model", tmp_path / "out", format="gguf")
