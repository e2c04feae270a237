"""Model and processor -> GGUF files, which llama.cpp serves as they are.

```
decoder, tokenizer, chat template ------> model-TYPE.gguf
image encoder, projector, image settings -> mmproj-TYPE.gguf     (of a model that sees)
```

    python -m nanovlm.hub.export runs/mine OUT_DIR --format gguf --dtype q8_0
    llama-server -m OUT_DIR/model-Q8_0.gguf --mmproj OUT_DIR/mmproj-F16.gguf

llama.cpp wants what its own converter writes (convert_hf_to_gguf.py): names of tensors and fields, experts stacked, and
in the families of Llama the two numbers of a rotated pair side by side. The mmproj file has Idefics3's projector, which
goes with every decoder below. What llama.cpp has fixed in its source is refused where our config says otherwise.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nanovlm.config import DecoderConfig, RopeScalingConfig, VLMConfig
from nanovlm.data.chat import Processor
from nanovlm.data.tilings import FAKE
from nanovlm.errors import UserError
from nanovlm.hub.families import find_family
from nanovlm.hub.gguf import CONTROL, FIELDS, NAMES, USER_DEFINED
from nanovlm.infer.sampling import find_never, find_stops
from nanovlm.model.decoder import ROPE_SCALING
from nanovlm.model.vlm import VLM

NORMAL, UNUSED = 1, 5  # of tokenizer.ggml.token_type, beside those of gguf.py
# --dtype -> the name of the type; those with a number of bits have blocks of 32 numbers and a scale (and a minimum).
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TYPES |= {name.lower(): name for name in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")}
BLOCK = 32

# Our names -> theirs, {} for the number of a block.
TEXT_NAMES = {ours: theirs for theirs, ours in NAMES.items()} | {
    "layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "layers.{}.mlp.router": "blk.{}.ffn_gate_inp",
}
EXPERTS = {f"layers.{{}}.mlp.{x}_proj": f"blk.{{}}.ffn_{x}_exps" for x in ("gate", "up", "down")}
VISION_NAMES = {
    "patch_embedding": "v.patch_embd",
    "position_embedding": "v.position_embd",
    "layers.{}.layer_norm1": "v.blk.{}.ln1",
    "layers.{}.self_attn.q_proj": "v.blk.{}.attn_q",
    "layers.{}.self_attn.k_proj": "v.blk.{}.attn_k",
    "layers.{}.self_attn.v_proj": "v.blk.{}.attn_v",
    "layers.{}.self_attn.out_proj": "v.blk.{}.attn_out",
    "layers.{}.layer_norm2": "v.blk.{}.ln2",
    "layers.{}.mlp.fc1": "v.blk.{}.ffn_up",
    "layers.{}.mlp.fc2": "v.blk.{}.ffn_down",
    "post_layernorm": "v.post_ln",
}
PROJECTOR_NAMES = {"proj": "mm.model.fc"}
# These are read as fp32 whatever the rest is, as by llama.cpp's converter; vectors are, too.
ALWAYS_F32 = ("v.patch_embd.", "v.position_embd.", "ffn_gate_inp.", "rope_freqs.")

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
# How a tokenizer normalises, how it cuts text, and whether whole words go before merges -> llama.cpp's name for it.
PRE_TOKENIZERS = {
    (None, ("digits", "gpt2"), False): "smollm",
    (None, ("gpt2",), False): "gpt-2",
    ("NFC", ("gpt2",), False): "olmo",
    (None, (LLAMA3_SPLIT, "bytes"), True): "llama-bpe",
    ("NFC", (QWEN2_SPLIT, "bytes"), False): "qwen2",
}


class Architecture(NamedTuple):
    """A decoder of llama.cpp: its name, and what its source has fixed."""

    name: str
    swaps_pairs: bool = False  # the two numbers of a rotated pair side by side
    qkv_bias: bool = True
    o_bias: bool = False
    can_tie: bool = True
    norm_topk_prob: bool = True


def check_gguf(processor: Processor, dtype: str):
    """Raise UserError for what llama.cpp has no place for; export.check_exportable has refused the rest."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError('GGUF files need the package gguf: pip install -e ".[gguf]"') from error
    if dtype != "auto" and dtype not in TYPES:
        raise UserError(
            f"dtype = {dtype!r} is no type that is written to GGUF files; there are {', '.join(TYPES)}; for k-quants "
            "(q4_k_m, ...) write float32 and let llama.cpp's llama-quantize make them"
        )
    check_decoder(processor.config.decoder)
    tokenizer_fields(processor)
    if processor.config.vision is None:
        return
    if processor.config.projector.scale_factor == 1:
        raise UserError("projector.scale_factor = 1 aborts llama.cpp at the first picture; it needs 2 or more")
    for token in (FAKE, "<global-img>", "\n", "\n\n"):
        if len(processor.tokenizer.encode(token, add_special_tokens=False).ids) != 1:
            raise UserError(f"the tokenizer has no single token for {token!r}, which llama.cpp puts beside pictures")


def check_decoder(decoder: DecoderConfig):
    """Raise UserError that names a field of which llama.cpp has another value in its source."""
    family, scaling = find_family(decoder), decoder.rope_scaling
    if family not in ARCHITECTURES:
        raise UserError(f"a {family} is not written to GGUF files; there are {', '.join(ARCHITECTURES)}")
    theirs = ARCHITECTURES[family]
    wrong = [field for field in ("qkv_bias", "o_bias") if getattr(decoder, field) and not getattr(theirs, field)]
    if family in ("qwen2", "olmoe") and decoder.num_attention_heads * decoder.head_dim != decoder.hidden_size:
        wrong.append("head_dim")
    if family == "olmoe" and decoder.num_key_value_heads != decoder.num_attention_heads:
        wrong.append("num_key_value_heads")
    if decoder.moe is not None:
        if len(decoder.mixtures) < decoder.num_hidden_layers:
            wrong.append("moe.layers")
        if decoder.moe.norm_topk_prob != theirs.norm_topk_prob:
            wrong.append("moe.norm_topk_prob")
    every_fourth = tuple(range(3, decoder.num_hidden_layers, 4))
    if family == "smollm3" and decoder.layers_without_rope != every_fourth:
        wrong.append("layers_without_rope")
    if scaling.type == "llama3" and theirs.name != "llama":
        wrong.append("rope_scaling.type")
    if scaling.type == "yarn":
        default = RopeScalingConfig()
        # The first three it reads from a command line only.
        fields = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        wrong += [f"rope_scaling.{name}" for name in fields if getattr(scaling, name) != getattr(default, name)]
    if wrong:
        field, value = wrong[0], decoder
        for part in field.split("."):
            value = getattr(value, part)
        raise UserError(
            f"decoder.{field} = {value} cannot be written to GGUF files: the source of llama.cpp has another value for "
            f"{theirs.name}"
        )


def write_gguf(folder: Path, name: str, model: VLM, processor: Processor, dtype: str):
    """Write the files of a model that `check_gguf` takes; `name` is what they say that it is called."""
    if dtype == "auto":
        dtype = str(model.decoder.embed_tokens.weight.dtype).removeprefix("torch.")
    kind = TYPES[dtype]
    fields = {"general.name": name, "general.type": "model"} | decoder_fields(model.config.decoder)
    architecture = ARCHITECTURES[find_family(model.config.decoder)].name
    fields |= tokenizer_fields(processor)
    write_file(folder / f"model-{kind}.gguf", architecture, fields, text_tensors(model), kind)
    if model.config.vision is not None:
        kind = kind if kind in ("F32", "BF16") else "F16"  # pictures lose more than text, and an encoder is small
        fields = {"general.name": name, "general.type": "mmproj"} | vision_fields(model.config)
        write_file(folder / f"mmproj-{kind}.gguf", "clip", fields, vision_tensors(model), kind)


def decoder_fields(decoder: DecoderConfig) -> dict:
    """Return the fields of a decoder, in its architecture's namespace."""
    d, name = decoder, ARCHITECTURES[find_family(decoder)].name
    fields = {theirs: getattr(d, ours) for ours, theirs in FIELDS.items()} | {
        "llama.attention.value_length": d.head_dim,
        "llama.rope.dimension_count": d.head_dim,
        "llama.vocab_size": d.vocab_size,
    }
    if d.moe is not None:
        fields |= {
            "llama.expert_count": d.moe.num_experts,
            "llama.expert_used_count": d.moe.num_experts_per_tok,
            "llama.expert_feed_forward_length": d.moe.intermediate_size,
            # Mixtral's experts, and OLMoE's, have the width that is read for a dense layer.
            "llama.feed_forward_length": d.moe.intermediate_size,
        }
    if d.rope_scaling.type in ("linear", "yarn"):
        fields |= {"llama.rope.scaling.type": d.rope_scaling.type, "llama.rope.scaling.factor": d.rope_scaling.factor}
    if d.rope_scaling.type == "yarn":
        fields["llama.rope.scaling.original_context_length"] = d.rope_scaling.original_max_position_embeddings
    return {re.sub("^llama", name, field): value for field, value in fields.items()}


def tokenizer_fields(processor: Processor) -> dict:
    """Return the fields of tokenizer, special tokens and chat template."""
    config, tokenizer = processor.config, processor.tokenizer
    data = json.loads(tokenizer.to_str())
    pre = find_pre_tokenizer(data)
    added = tokenizer.get_added_tokens_decoder()
    tokens, kinds = [], []
    for i in range(config.decoder.vocab_size):
        token = tokenizer.id_to_token(i)
        tokens.append(f"[PAD{i}]" if token is None else token)
        known = NORMAL if i not in added else CONTROL if added[i].special else USER_DEFINED
        kinds.append(UNUSED if token is None else known)
    if cut := [token.content for token in added.values() if token.lstrip or token.rstrip or token.single_word]:
        raise UserError(
            f"the token {cut[0]!r} takes spaces beside it, or stands only between words, which llama.cpp does not know"
        )
    if len(set(tokens)) < len(tokens):
        raise UserError("the tokenizer has two tokens of one name, which llama.cpp does not take")
    eos, *others = find_stops(config)
    if len(others) > 2:
        raise UserError(f"stop_token_ids = {config.stop_token_ids} are more than the 2 that GGUF files have beside eos")
    special = {"eos": eos, "padding": config.pad_token_id, "bos": config.bos_token_id}
    special |= dict(zip(("eot", "eom"), others, strict=False))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in data["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        **{f"tokenizer.ggml.{which}_token_id": i for which, i in special.items() if i is not None},
        "tokenizer.ggml.suppress_tokens": sorted(find_never(config)),
        # The template writes every token of a prompt; in llama.cpp, too.
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": processor.chat_template,
    }


def find_pre_tokenizer(data: dict) -> str:
    """Return llama.cpp's name for how the tokenizer of a tokenizer.json cuts text. Raises UserError if it has none."""
    model, steps = data["model"], data.get("pre_tokenizer") or {}
    kinds = tuple(_describe_step(step) for step in steps.get("pretokenizers", [steps]))
    normalizer = (data.get("normalizer") or {}).get("type")
    key = (normalizer, kinds, bool(model.get("ignore_merges")))
    is_bytes = model.get("type") == "BPE" and not model.get("byte_fallback") and not model.get("unk_token")
    if not is_bytes or key not in PRE_TOKENIZERS:
        raise UserError(
            f"llama.cpp has no name for this tokenizer, a {model.get('type')} with normalizer = {normalizer}, "
            f"pre_tokenizer = {', '.join(map(str, kinds))}, ignore_merges = {key[2]}; it has "
            f"{', '.join(PRE_TOKENIZERS.values())}"
        )
    return PRE_TOKENIZERS[key]


def _describe_step(step):
    """Return a word or the regular expression of a step of a pre-tokenizer; what is not known keeps its type."""
    match step:
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "gpt2" if step.get("use_regex", True) else "bytes"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern
    return step.get("type")


def vision_fields(config: VLMConfig) -> dict:
    """Return the fields of encoder, projector and image settings."""
    vision = config.vision
    assert vision is not None
    return {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "idefics3",
        "clip.use_gelu": True,  # with tanh
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": vision.num_hidden_layers,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": vision.layer_norm_eps,
        "clip.vision.projection_dim": config.decoder.hidden_size,
        "clip.vision.projector.scale_factor": config.projector.scale_factor,
        "clip.vision.preproc_image_size": config.tiling.longest_edge,
        "clip.vision.image_mean": list(vision.mean),
        "clip.vision.image_std": list(vision.std),
    }


def text_tensors(model: VLM) -> Iterator[tuple[str, Tensor]]:
    """Yield the decoder's tensors under their names, in our dtype."""
    config = model.config.decoder
    theirs = ARCHITECTURES[find_family(config)]
    for name, tensor in _rename(model.decoder.state_dict(), TEXT_NAMES):
        if theirs.swaps_pairs and re.search(r"attn_[qk]\.(weight|bias)$", name):
            halves = tensor.unflatten(0, (-1, 2, config.head_dim // 2))
            tensor = halves.transpose(1, 2).flatten(0, 2)
        yield name, tensor
    if config.tie_word_embeddings and not theirs.can_tie:
        yield "output.weight", model.decoder.embed_tokens.weight
    if config.rope_scaling.type == "llama3":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies = 1 / config.rope_theta**exponents
        yield "rope_freqs.weight", frequencies / ROPE_SCALING["llama3"](frequencies, config)[0]


def vision_tensors(model: VLM) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of encoder and projector under their names, in our dtype."""
    assert model.vision is not None and model.projector is not None
    yield from _rename(model.vision.state_dict(), VISION_NAMES)
    yield from _rename(model.projector.state_dict(), PROJECTOR_NAMES)


def _rename(state, names):
    """Yield (their name, tensor) of a state dict; the matrices of all experts have no .weight in ours."""
    for name, tensor in state.items():
        stem, _, part = (name, "", "weight") if tensor.ndim == 3 else name.rpartition(".")
        key = re.sub(r"(?<=layers\.)\d+", "{}", stem)
        table = EXPERTS if tensor.ndim == 3 else names
        yield f"{table[key].format(*re.findall(r'(?<=layers[.])[0-9]+', stem))}.{part}", tensor


def write_file(path: Path, architecture: str, fields: dict, tensors: Iterator[tuple[str, Tensor]], kind: str):
    """Write one file; matrices are packed as `kind`, embeddings and head in at least 8 bits, and vectors are fp32."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture, use_temp_file=True)
    file_type = gguf.LlamaFileType[f"{'ALL' if kind == 'F32' else 'MOSTLY'}_{kind}"]
    fields = {"general.file_type": int(file_type), "general.quantization_version": gguf.GGML_QUANT_VERSION} | fields
    add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string}
    for name, value in fields.items():
        if isinstance(value, list):
            if value:
                writer.add_array(name, value)
        else:
            add[type(value)](name, value)
    for name, tensor in tensors:
        packed = gguf.GGMLQuantizationType[find_type(name, tensor, kind)]
        data = gguf.quants.quantize(tensor.detach().float().contiguous().numpy(), packed)
        writer.add_tensor(name, data, raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def find_type(name: str, tensor: Tensor, kind: str) -> str:
    """Return the type in which a tensor is written."""
    if tensor.ndim == 1 or any(part in name for part in ALWAYS_F32):
        return "F32"
    if kind.startswith("Q") and tensor.shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if kind.startswith("Q") and name in ("token_embd.weight", "output.weight") else kind


# Our families -> theirs. Their Mistral is their Llama.
ARCHITECTURES = {
    "llama": Architecture("llama", swaps_pairs=True, o_bias=True),
    "mixtral": Architecture("llama", swaps_pairs=True),
    "smollm3": Architecture("smollm3", swaps_pairs=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "olmoe": Architecture("olmoe", qkv_bias=False, can_tie=False, norm_topk_prob=False),
}
