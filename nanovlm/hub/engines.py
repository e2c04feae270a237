"""What other programs make of an exported model: the versions that were seen right, and the models they do not take.

A fault is a predicate over the config and the dtype of the weights, and the reason. `check.py` prints the faults of a
model, and its card (`card.py`) has a line for each program. What is not in this file is not known, good or bad.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from nanovlm.config import DecoderConfig, VLMConfig
from nanovlm.hub.families import find_family

# Program -> versions that gave our answers with small random models of this layout, and where that can be seen.
SEEN = {
    "transformers": "4.54.1, 5.20.0, 5.23.0, in nanovlm's tests",
    "llama.cpp": "xllamacpp 2026.10.11549, in nanovlm's tests",
    "vLLM": "0.32.0 on a CPU, in nanovlm's tests",
    "mlx-vlm": "0.7.10 on a CPU, in nanovlm's tests",
}
SEEN_WITHOUT_PICTURES = {"transformers": "4.54.1, 4.57.6, 5.20.0, 5.23.0, in nanovlm's tests"}

VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
# Patches a side, up to 128, for which transformers 4.56 to 5.20 gives every patch its own position in half precision,
# in which it computes the patch's fraction of the side; and those for which 4.54, which rounds otherwise, does not.
HALF_PRECISION_GRIDS = {
    torch.bfloat16: (1, 2, 3, 4, 5, 8, 15, 16, 17, 32, 51, 64, 85, 128),
    torch.float16: (1, 2, 4, 8, 16, 23, 32, 64, 89, 128),
}
TRANSFORMERS_4_54_BAD_GRIDS = (52, 75, 79, 96, 104, 112, 114, 125)


class Fault(NamedTuple):
    """A reason why a program refuses some models or computes something else; `{}` in it is what `value` returns."""

    engine: str
    why: str
    applies: Callable[[VLMConfig, torch.dtype], bool]
    value: Callable[[VLMConfig], object] = lambda config: None


def find_faults(config: VLMConfig, dtype: torch.dtype) -> list[tuple[str, str]]:
    """List (program, why it does not take a model with these weights)."""
    faults = VISION_FAULTS + FAULTS if config.vision is not None else FAULTS
    return [(f.engine, f.why.format(f.value(config))) for f in faults if f.applies(config, dtype)]


def find_seen(config: VLMConfig) -> dict[str, str]:
    """Return program -> versions that were seen to give our answers with models of this layout."""
    return SEEN_WITHOUT_PICTURES if config.vision is None else SEEN


def describe_engines(config: VLMConfig, dtype: torch.dtype, layout: str = "hub") -> list[str]:
    """Return a Markdown table: programs, the versions that were seen right, and what is known against this model."""
    faults: dict[str, list[str]] = {}
    for engine, why in find_faults(config, dtype):
        if layout == "hub" or engine == "llama.cpp":
            faults.setdefault(engine, []).append(why)
    seen = find_seen(config) if layout == "hub" else {"llama.cpp": SEEN["llama.cpp"]}
    lines = ["| program | versions seen to give the same answers | known against this model |", "|---|---|---|"]
    for engine in dict.fromkeys((*seen, *faults)):
        lines.append(f"| {engine} | {seen.get(engine, 'none')} | {'; '.join(faults.get(engine, [])) or '-'} |")
    return lines


def _grid(config: VLMConfig) -> int:
    assert config.vision is not None
    return config.vision.grid_size


def _exceptions(config):
    """Say in which dtypes transformers 4.56 and 4.57 give every patch its own position."""
    right = [str(d).removeprefix("torch.") for d, grids in HALF_PRECISION_GRIDS.items() if _grid(config) in grids]
    return f", but for 4.56 and 4.57 in {' and '.join(right)}" if right else ""


def _is_llama(decoder: DecoderConfig) -> bool:
    return find_family(decoder) == "llama"


def _other_decoder(engine: str, what: str) -> Fault:
    """A program that reads an Idefics3 with a llama only; `what` says so, or more."""
    return Fault(
        engine,
        f"the decoder is a {{}}: {what}",
        lambda c, _: not _is_llama(c.decoder),
        lambda c: find_family(c.decoder),
    )


FAULTS = (
    Fault(
        "vLLM",
        "on a CPU it has no attention for decoder.head_dim = {}; it has " + ", ".join(map(str, VLLM_CPU_HEAD_SIZES)),
        lambda c, _: c.decoder.head_dim not in VLLM_CPU_HEAD_SIZES,
        lambda c: c.decoder.head_dim,
    ),
)
# Of models that see. Faults of mlx-vlm, llama.cpp and transformers were seen with small random models of each kind;
# those of vLLM and SGLang with a mixture, and in the source.
VISION_FAULTS = (
    Fault(
        "transformers",
        "4.55 to 4.57 give a patch the position of its neighbour (huggingface/transformers#41190){}: use 5 or 4.54",
        lambda c, _: _grid(c) > 1,
        _exceptions,
    ),
    Fault(
        "transformers",
        "5.0 to 5.20 give some of {} patches a side the position of a neighbour in half precision: "
        "use 5.21, or load it in float32",
        lambda c, dtype: dtype in HALF_PRECISION_GRIDS and _grid(c) not in HALF_PRECISION_GRIDS[dtype],
        _grid,
    ),
    Fault(
        "transformers",
        "4.54 and older give some of {} patches a side the position of a neighbour",
        lambda c, _: _grid(c) in TRANSFORMERS_4_54_BAD_GRIDS,
        _grid,
    ),
    Fault(
        "llama.cpp",
        "projector.scale_factor = 1 aborts it at the first picture",
        lambda c, _: c.projector.scale_factor == 1,
    ),
    Fault(
        "llama.cpp",
        "tiling.longest_edge = {} makes every picture one tile, which it shows twice, as a grid of one and as a whole "
        "(xllamacpp 2026.10.11549)",
        lambda c, _: c.vision is not None and c.tiling.longest_edge <= c.vision.image_size,
        lambda c: c.tiling.longest_edge,
    ),
    _other_decoder("vLLM", "it reads an Idefics3 with a llama only, others with --model-impl transformers"),
    _other_decoder("SGLang", "its Idefics3 has a llama only (read in its source, not run)"),
    _other_decoder("mlx-vlm", "it reads an Idefics3 with a llama only"),
    Fault(
        "mlx-vlm",
        "decoder.num_attention_heads x head_dim = {} must be decoder.hidden_size",
        lambda c, _: c.decoder.num_attention_heads * c.decoder.head_dim != c.decoder.hidden_size,
        lambda c: f"{c.decoder.num_attention_heads} x {c.decoder.head_dim}",
    ),
    Fault(
        "mlx-vlm",
        "decoder.tie_word_embeddings = True: it expects a head of its own",
        lambda c, _: c.decoder.tie_word_embeddings,
    ),
    Fault(
        "mlx-vlm",
        "decoder.qkv_bias and o_bias: it has no biases in attention",
        lambda c, _: _is_llama(c.decoder) and c.decoder.qkv_bias,
    ),
    Fault(
        "mlx-vlm",
        "decoder.rope_scaling.type = {} is ignored: it computes other logits",
        lambda c, _: c.decoder.rope_scaling.type != "none",
        lambda c: c.decoder.rope_scaling.type,
    ),
)
