"""Checkpoints in 4 bits as GPTQ and AWQ tools publish them -> our int4, code by code.

```
W[n, k] = (code - zero) * scale        zero and scale of output n and the group of input k

          qweight                      a word has the codes of             scales, qzeros
gptq      int32[K / 8, N]              8 neighbouring inputs               fp16[G, N], int32[G, N / 8], zeros less 1
awq       int32[K, N / 8]              8 neighbouring outputs, in ORDER    fp16[G, N], int32[G, N / 8], in ORDER
```

A word has its first code in its lowest bits. GPTQ's zeros are whole in checkpoint_format gptq_v2; its g_idx int32[K] is
the group of each input. Our layout has no such index, so groups must be neighbouring inputs. Groups of more than 128,
or of a whole row (group_size -1), become several with one scale.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nanovlm.config import QuantizationConfig
from nanovlm.errors import UserError
from nanovlm.model.quantized import store_int4
from nanovlm.sharded import Rows
from nanovlm.tensor_files import merge_numbers, open_tensors

PARTS = ("qweight", "qzeros", "scales", "g_idx")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs of a word of AWQ's, lowest bits first


def is_part(name: str) -> bool:
    """Whether a tensor of this name belongs to a quantised weight in these layouts."""
    return name.endswith(tuple(f".{part}" for part in PARTS))


def read_quantization(data: dict, path: Path) -> QuantizationConfig | None:
    """Read quantization_config of a config.json; None where there is none. Raises UserError for what we cannot hold."""
    settings = data.get("quantization_config")
    if settings is None:
        return None
    where = f"{path}: quantization_config"
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if not isinstance(settings, dict) or method not in [*KNOWN]:  # it may be of any type
        raise UserError(f"{where}.quant_method = {method!r} is not supported; there are {', '.join(KNOWN)}")
    for field, known in ({"bits": (4,)} | KNOWN[method]).items():  # the first is the default
        value = settings.get(field)
        value = known[0] if value is None else value
        if value not in known:
            raise UserError(f"{where}.{field} = {value!r} is not supported; it must be {' or '.join(map(repr, known))}")
    size = settings.get("group_size", 128)
    if (group := find_group(size)) is None:
        raise UserError(f"{where}.group_size = {size!r} is not supported; it must be -1 or a multiple of 32")
    return QuantizationConfig("int4", group)


def find_group(size: object) -> Literal[128, 64, 32] | None:
    """Return our largest group that groups of a size, or of a whole row, can be cut into; None where there is none."""
    for group in (128, 64, 32):
        if size == -1 or (type(size) is int and size > 0 and size % group == 0):
            return group
    return None


def fill_quantized(places: Mapping[str, Sequence[Tensor | Rows]], files: Sequence[Path], settings: dict):
    """Copy the quantised weights of files into `codes` and `scales` of our layers, by their names in the files.

    Raises UserError that names what is missing, unknown, of another shape or not to be held; for places on the meta
    device that is all.
    """
    where = {}
    for path in files:
        with open_tensors(path) as file:
            where |= {name: path for name in file.keys() if is_part(name)}
    layers = {name.removesuffix(".codes") for name in places if name.endswith(".codes")}
    needed = {f"{layer}.{part}" for layer in layers for part in ("qweight", "qzeros", "scales")}
    problems = [f"{name} is missing" for name in merge_numbers(needed - where.keys())]
    unknown = {name for name in where if name.rpartition(".")[0] not in layers}
    problems += [f"{name} is unknown" for name in merge_numbers(unknown)]
    if problems:
        raise UserError(f"{files[0].parent} does not fit the config: {'; '.join(sorted(problems))}")
    for layer in sorted(layers):
        (codes,), (scales,) = places[f"{layer}.codes"], places[f"{layer}.scales"]
        if codes.is_meta:
            continue
        parts = {}
        for name in (f"{layer}.{part}" for part in PARTS):
            if name in where:
                with open_tensors(where[name]) as file:
                    parts[name.rpartition(".")[2]] = file.get_tensor(name)
        try:
            found = store_int4(*read_layer(settings, **parts))
        except UserError as error:
            raise UserError(f"{layer} in {where[f'{layer}.qweight']} cannot be read: {error}") from error
        for place, tensor in zip((codes, scales), found, strict=True):
            if place.shape != tensor.shape:
                raise UserError(
                    f"{layer} in {where[f'{layer}.qweight']} has {list(tensor.shape)} words of "
                    f"{'codes' if place is codes else 'scales'}, the config says {list(place.shape)}"
                )
            place.copy_(tensor)


def find_zero_biases(quantized: Iterable[str], plain: Iterable[str], files: Sequence[Path]) -> set[str]:
    """Return the biases that a tool wrote for quantised layers that have none: all are 0."""
    spare, zeros = {f"{name.rpartition('.')[0]}.bias" for name in quantized}.difference(plain), set()
    for path in files:
        with open_tensors(path) as file:
            zeros |= {name for name in spare.intersection(file.keys()) if not file.get_tensor(name).any()}
    return zeros


def read_layer(
    settings: dict, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes [N, K] of a layer, scales and zero points [N, groups] of our groups."""
    if any(x.ndim != 2 for x in (qweight, qzeros, scales)) or not scales.is_floating_point():
        raise UserError("qweight, qzeros and scales must be matrices of words, words and floats")
    if {qweight.dtype, qzeros.dtype} != {torch.int32}:
        raise UserError(f"qweight is {qweight.dtype} and qzeros {qzeros.dtype}, they must be int32")
    codes_NK, zero_GN = LAYOUTS[settings["quant_method"]](qweight, qzeros)
    (N, K), size = codes_NK.shape, settings.get("group_size", 128)
    size = K if size == -1 else size
    num = math.ceil(K / size)
    if zero_GN.shape != (num, N) or scales.shape != (num, N):
        raise UserError(
            f"it has {list(zero_GN.shape)} zero points and {list(scales.shape)} scales for [{num}, {N}] groups"
        )
    if settings["quant_method"] == "gptq" and settings.get("checkpoint_format") != "gptq_v2":
        zero_GN = zero_GN + 1
    if (zero_GN > 15).any():
        raise UserError("a group has the zero point 16, and int4 has 0 to 15")
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(K) // size):
        raise UserError(
            "its groups are not of neighbouring inputs (desc_act = true), and int4 has no index: take a checkpoint "
            "with desc_act = false or static groups"
        )
    group = find_group(settings.get("group_size", 128))
    assert group is not None
    of_theirs = torch.arange(math.ceil(K / group)) * group // size
    return codes_NK, scales[of_theirs].t(), zero_GN[of_theirs].t()


def nibbles(words: Tensor) -> Tensor:
    """int32[..., W] -> [..., W, 8], lowest bits first."""
    return words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15


def read_gptq(qweight: Tensor, qzeros: Tensor) -> tuple[Tensor, Tensor]:
    return nibbles(qweight.t()).flatten(1), nibbles(qzeros).flatten(1)


def read_awq(qweight: Tensor, qzeros: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.tensor(ORDER).argsort()
    return nibbles(qweight)[..., place].flatten(1).t(), nibbles(qzeros)[..., place].flatten(1)


# What their fields must be for us to hold the weights; the first is what a missing one means.
KNOWN = {
    "gptq": {"checkpoint_format": ("gptq", "gptq_v2"), "lm_head": (False,), "dynamic": (None, {})},
    "awq": {"version": ("gemm", "GEMM"), "zero_point": (True,)},
}
LAYOUTS = {"gptq": read_gptq, "awq": read_awq}
