"""Safetensors files in a hub layout -> our weights, tensor by tensor, by the name tables of families.py."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from nanovlm.config import DecoderConfig, VLMConfig
from nanovlm.errors import UserError
from nanovlm.files import read_json
from nanovlm.hub import published
from nanovlm.hub.download import find_weights
from nanovlm.hub.families import HEAD, find_names
from nanovlm.model.quantized import is_quantized
from nanovlm.model.vlm import VLM
from nanovlm.sharded import Places, Rows
from nanovlm.tensor_files import copy_tensors, file_dtype, open_tensors

Place = TypeVar("Place", bound=torch.Tensor | Rows)


def open_weights(folder: Path, config: VLMConfig) -> tuple[torch.dtype, Callable[[Places], None]]:
    """Return the dtype of the weights in a hub layout, and a function that copies them (see stored.py)."""
    files = find_weights(folder)
    data = read_json(folder / "config.json")
    family = (data if config.vision is None else data.get("text_config") or {}).get("model_type", "llama")
    names = find_names(family, config.vision is not None)
    if any("embed_tokens.weight" in tensor_names(path) for path in files):  # a model of embeddings, saved without head
        names = {theirs.removeprefix("model."): ours for theirs, ours in names.items()}
    is_ignored, settings = _ignore(config.decoder), data.get("quantization_config")
    is_other = is_ignored if settings is None else lambda name: is_ignored(name) or published.is_part(name)
    is_gpt_oss = config.decoder.moe is not None and config.decoder.moe.has_bias

    def fill(places):
        found, spare = destinations(places, names), set()
        if is_gpt_oss:
            found = join_experts(places, found, config.decoder.num_hidden_layers)
        if settings is not None:
            quantized = {name: found.pop(name) for name in list(found) if is_quantized(name)}
            published.fill_quantized(quantized, files, settings)
            spare = published.find_zero_biases(quantized, found, files)
        copy_tensors(found, files, lambda name: is_other(name) or name in spare)
        check_tied_head(config.decoder, places, files, HEAD)

    return file_dtype(files, is_other), fill


def _ignore(config):
    """Return a predicate for names of tensors to skip: the head if it is tied, and rotary frequencies."""
    return lambda name: (config.tie_word_embeddings and name == HEAD) or name.endswith("rotary_emb.inv_freq")


def destinations(places: dict[str, Place], names: dict[str, str | tuple[str, ...]]) -> dict[str, list[Place]]:
    """Map each of their tensor names to the model tensors that hold its rows: import fills them, export reads them.

    `places` are our tensors by name: the model's state dict, or this rank's shards of it. Those that the table does
    not cover are left out (see `unknown_tensors`). Prefixes of stacked experts are for tensors with three dimensions: a
    dense layer has matrices of the same names.
    """
    prefixes = _find_prefixes(names)
    found = {}
    for name, tensor in places.items():
        is_stack = tensor is not None and tensor.ndim == 3
        fitting = [
            (match, theirs, part, is_stacked)
            for prefix, theirs, part in prefixes
            if (match := prefix.match(name))
            # One more number: the expert's.
            and ((is_stacked := theirs.count("{}") > prefix.groups) <= is_stack)
        ]
        if fitting:
            # The longest of our prefixes decides.
            match, theirs, part, is_stacked = max(fitting, key=lambda fit: fit[0].end())
            for *number, slice in [(e, x) for e, x in enumerate(tensor)] if is_stacked else [(tensor,)]:
                full = theirs.format(*match.groups(), *number) + name[match.end() :]
                found.setdefault(full, {})[part] = slice
    return {name: [parts[part] for part in sorted(parts)] for name, parts in found.items()}


class Converted:
    """A destination for a tensor of a file in another layout: `convert` makes of it what each of our places holds.

    It has the tensor methods that are needed to fill it (see Rows).
    """

    def __init__(self, places: list, shape: tuple[int, ...], convert: Callable):
        self.places, self.shape, self.convert = places, torch.Size(shape), convert
        self.ndim, self.dtype, self.is_meta = len(shape), places[0].dtype, places[0].is_meta

    def __len__(self) -> int:
        return self.shape[0]

    def is_floating_point(self) -> bool:
        return True

    def copy_(self, whole: torch.Tensor):
        for place, part in zip(self.places, self.convert(whole), strict=True):
            place.copy_(part)


def join_experts(places: Places, wanted: dict, num_layers: int) -> dict:
    """Return the destinations of gpt-oss: gate and up take turns in one tensor, and matrices are transposed."""
    ours = ("gate_proj", "up_proj", "gate_bias", "up_bias", "down_proj")
    wanted = {name: parts for name, parts in wanted.items() if not name.split(".mlp.")[-1].startswith(ours)}
    for i in range(num_layers):
        theirs = f"model.layers.{i}.mlp.experts."
        gate, up, gate_bias, up_bias, down = (places[f"decoder.layers.{i}.mlp.{name}"] for name in ours)
        E, W, D = gate.shape
        wanted |= {
            f"{theirs}gate_up_proj": [
                Converted([gate, up], (E, D, 2 * W), lambda x: (x[..., ::2].mT, x[..., 1::2].mT))
            ],
            f"{theirs}gate_up_proj_bias": [
                Converted([gate_bias, up_bias], (E, 2 * W), lambda x: (x[:, ::2], x[:, 1::2]))
            ],
            f"{theirs}down_proj": [Converted([down], (E, W, D), lambda x: (x.mT,))],
        }
    return wanted


def unknown_tensors(model: VLM, names: dict[str, str | tuple[str, ...]]) -> list[str]:
    """List the model's tensors that the table does not cover."""
    prefixes = [prefix for prefix, _theirs, _part in _find_prefixes(names)]
    return [name for name in model.state_dict() if not any(prefix.match(name) for prefix in prefixes)]


def _find_prefixes(names):
    """Return, for each of our prefixes: its regular expression, their prefix, and which part of their rows it is."""
    return [
        (re.compile(re.escape(prefix).replace(r"\{\}", r"(\d+)")), theirs, part)
        for theirs, ours in names.items()
        for part, prefix in enumerate([ours] if isinstance(ours, str) else ours)
    ]


def tensor_names(path):
    with open_tensors(path) as file:
        return list(file.keys())


def check_tied_head(config: DecoderConfig, places: Places, files: list[Path], head: str):
    """Raise UserError if a file has a head that differs from the embedding that the config ties it to."""
    embedding = places["decoder.embed_tokens.weight"]
    if embedding.is_meta or not config.tie_word_embeddings:
        return
    for path in files:
        with open_tensors(path) as file:
            if head in file.keys() and not embedding.equal(file.get_tensor(head).to(embedding.device, embedding.dtype)):
                raise UserError(f"{path} has a {head} of its own, but the config says tie_word_embeddings = true")
