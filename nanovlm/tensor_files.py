"""Read safetensors files, tensor by tensor, into memory that is already allocated."""

import contextlib
import functools
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from nanovlm.errors import UserError
from nanovlm.sharded import Rows

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {torch.int32: "I32", torch.uint8: "U8"}


def file_dtype(files: list[Path], is_ignored=lambda name: False) -> torch.dtype:
    """Return the smallest dtype that holds the tensors of all files exactly; ignored names do not count.

    Raises UserError that names a tensor whose dtype is not in DTYPES.
    """
    found = {}
    for path in files:
        with open_tensors(path) as file:
            names = [name for name in file.keys() if not is_ignored(name)]
            found |= {file.get_slice(name).get_dtype(): f"{name} in {path}" for name in names}
    for dtype, where in found.items():
        if dtype not in DTYPES:
            raise UserError(f"{where} has dtype {dtype}; only {', '.join(DTYPES)} are read")
    return functools.reduce(torch.promote_types, [DTYPES[dtype] for dtype in found] or [torch.float32])


@torch.no_grad()
def copy_tensors(
    destinations: dict[str, list[torch.Tensor | Rows]],
    files: list[Path],
    is_ignored=lambda name: False,
    wanted: str = "the config",
):
    """Copy safetensors files, tensor by tensor, into memory that is already allocated.

    `destinations` lists, for each name in the files, the tensors that its rows fill, in order. Names for which
    `is_ignored` returns True are skipped; `wanted` is what says which there should be. Before anything is copied,
    raises UserError that lists missing and unknown names and wrong shapes and dtypes; for destinations on the meta
    device that is all.
    """
    where = {}
    problems = []
    for path in files:
        with open_tensors(path) as file:
            where |= {name: path for name in file.keys() if not is_ignored(name)}
            for name in file.keys():
                tensor = file.get_slice(name)
                if name in destinations:
                    parts = destinations[name]
                    shape = [sum(part.shape[0] for part in parts), *parts[0].shape[1:]] if parts[0].ndim else []
                    if tensor.get_shape() != shape:
                        problems.append(f"{name} has shape {tensor.get_shape()}, {wanted} says {shape}")
                    dtypes = DTYPES if parts[0].is_floating_point() else [INTEGERS[parts[0].dtype]]
                    if tensor.get_dtype() not in dtypes:
                        problems.append(f"{name} has dtype {tensor.get_dtype()}; only {', '.join(dtypes)} are read")
    problems += [f"{name} is missing" for name in merge_numbers(destinations.keys() - where.keys())]
    problems += [f"{name} is unknown" for name in merge_numbers(where.keys() - destinations.keys())]
    if problems:
        file = files[0] if len(files) == 1 else files[0].parent
        raise UserError(f"{file} does not fit {wanted}: {'; '.join(sorted(problems))}")
    if all(part.is_meta for parts in destinations.values() for part in parts):
        return
    for name, parts in destinations.items():
        if all(part.is_meta for part in parts):
            continue
        # Reopen the file for each tensor: whatever was read stays in memory while the file is open.
        with open_tensors(where[name]) as file:
            tensor = file.get_tensor(name)
        for part, rows in zip(parts, tensor.split([len(p) for p in parts]) if tensor.ndim else [tensor], strict=True):
            part.copy_(rows)


def merge_numbers(names) -> list[str]:
    """Merge names that differ only in numbers into one: layers.{0-29}.norm.weight."""
    groups = {}
    for name in names:
        pieces = re.split(r"(?<=\.)(\d+)(?=\.)", name)
        groups.setdefault(tuple(pieces[::2]), []).append([int(number) for number in pieces[1::2]])
    merged = []
    for texts, numbers in groups.items():
        columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
        shown = [
            f"{{{c[0]}-{c[-1]}}}"
            if c == list(range(c[0], c[-1] + 1)) and len(c) > 1
            else str(c[0])
            if len(c) == 1
            else f"{{{','.join(map(str, c))}}}"
            for c in columns
        ]
        merged.append("".join(t + n for t, n in zip(texts, [*shown, ""], strict=True)))
    return sorted(merged)


@contextlib.contextmanager
def open_tensors(path: Path):
    """Open a safetensors file to read its tensors one by one. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"there is no {path}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises UserError that names a missing or damaged one."""
    if not path.is_file():
        raise UserError(f"there is no {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from error
