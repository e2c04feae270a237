"""Files and models on disk, so that a kill at any moment loses nothing that was saved.

A folder is written under a temporary name, flushed to the disk and renamed; what has its final name is
whole. Tensors are safetensors, everything else is JSON.

```
run_dir/model/            config.json  model.safetensors  tokenizer.json  chat_template.jinja
```
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nanovlm.config import VLMConfig, from_dict
from nanovlm.data.chat import Processor
from nanovlm.model.vlm import VLM
from nanovlm.quant import is_quantized

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {torch.int32: "I32", torch.uint8: "U8"}


@contextlib.contextmanager
def new_folder(path: Path):
    """Yield a temporary folder to fill; it becomes `path` when all is well and is removed when not.

    Raises OSError that names `path` when the disk is full or cannot be written.
    """
    temporary, replaced = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        restore(path)
        shutil.rmtree(replaced, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            flush(file)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        flush(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def restore(path: Path):
    """Put back the folder that `new_folder` was replacing when it was killed between its two renames."""
    replaced = path.with_name(f".{path.name}.old")
    if replaced.exists() and not path.exists():
        replaced.rename(path)


@contextlib.contextmanager
def lock(folder: Path):
    """Make a folder, if need be, and keep it to this process; a new one that stays empty is removed again.

    Raises ValueError while another process has the folder (a killed one has let go), and where it cannot be made.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made a folder: {error}") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}: wait for it, or use another folder") from None
        yield folder
    finally:
        os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def write_file(path: Path, data: str | bytes):
    """Write a file under a temporary name, flush it and rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        flush(temporary)
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}") from error


def read_json(path: Path) -> dict:
    """Read a JSON file. Raises ValueError that names the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


# --- models ----------------------------------------------------------------------------------------------


def save_model(folder: Path, model: VLM, processor: Processor, tensors: dict[str, torch.Tensor] | None = None):
    """Write a model folder: all that `load` and generate.py need; `tensors` are the model's, if others than it has."""
    with new_folder(folder) as temporary:
        (temporary / "config.json").write_text(json.dumps(dataclasses.asdict(model.config), indent=2))
        save_file(model.state_dict() if tensors is None else tensors, temporary / "model.safetensors")
        processor.save(temporary)


def load(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[VLM, Processor]:
    """Read a model folder; the model is in evaluation mode, in the dtype of its file unless another is given.

    Raises ValueError that names what is missing, unknown, cut off or of another shape.
    """
    folder = Path(folder)
    restore(folder.resolve())
    if not folder.is_dir():
        raise ValueError(f"there is no model folder {folder}")
    if (folder / "model" / "config.json").exists():
        raise ValueError(f"{folder} is the folder of a run; its model is {folder / 'model'}")
    data = read_json(folder / "config.json")
    try:
        config = from_dict(VLMConfig, data).validate()
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    processor = Processor.load(folder, config)
    file = folder / "model.safetensors"
    model = empty_model(config, device, dtype or file_dtype([file], is_quantized))
    load_weights(model, file)
    return model.eval(), processor


def empty_model(config: VLMConfig, device: str | torch.device, dtype: torch.dtype) -> VLM:
    """Make a model whose weights are memory that nothing was written to yet."""
    with torch.device("meta"):
        model = VLM(config)
    return model.to(dtype).to_empty(device=device)


def load_weights(model: VLM, path: Path):
    """Copy a safetensors file into the model; every tensor must be there with its shape, and no other."""
    copy_tensors({name: [tensor] for name, tensor in model.state_dict().items()}, [path])


def file_dtype(files: list[Path], is_ignored=lambda name: False) -> torch.dtype:
    """Return the smallest dtype that holds the tensors of all files exactly, but for names that are ignored.

    Raises ValueError that names a tensor of another dtype than those of DTYPES.
    """
    found = {}
    for path in files:
        with open_tensors(path) as file:
            names = [name for name in file.keys() if not is_ignored(name)]
            found |= {file.get_slice(name).get_dtype(): f"{name} in {path}" for name in names}
    for dtype, where in found.items():
        if dtype not in DTYPES:
            raise ValueError(f"{where} has dtype {dtype}; only {', '.join(DTYPES)} are read")
    return functools.reduce(torch.promote_types, [DTYPES[dtype] for dtype in found] or [torch.float32])


@torch.no_grad()
def copy_tensors(destinations: dict[str, list[torch.Tensor]], files: list[Path], is_ignored=lambda name: False):
    """Copy safetensors files tensor by tensor into memory that is there already.

    `destinations` says, for each name in the files, which tensors its rows fill, one after the other. Names for which
    `is_ignored` holds are left out. Raises ValueError that lists what is missing, unknown, or of another shape
    or dtype, before anything is copied.
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
                        problems.append(f"{name} has shape {tensor.get_shape()}, the config says {shape}")
                    dtypes = DTYPES if parts[0].is_floating_point() else [INTEGERS[parts[0].dtype]]
                    if tensor.get_dtype() not in dtypes:
                        problems.append(f"{name} has dtype {tensor.get_dtype()}; only {', '.join(dtypes)} are read")
    problems += [f"{name} is missing" for name in merge_numbers(destinations.keys() - where.keys())]
    problems += [f"{name} is unknown" for name in merge_numbers(where.keys() - destinations.keys())]
    if problems:
        file = files[0] if len(files) == 1 else files[0].parent
        raise ValueError(f"{file} does not fit the config: {'; '.join(sorted(problems))}")
    for name, parts in destinations.items():
        # A file is opened anew for each tensor: what was read of an open one stays in memory.
        with open_tensors(where[name]) as file:
            tensor = file.get_tensor(name)
        for part, rows in zip(parts, tensor.split([len(p) for p in parts]) if tensor.ndim else [tensor], strict=True):
            part.copy_(rows)


def merge_numbers(names) -> list[str]:
    """Write names that differ only in numbers as one: layers.{0-29}.norm.weight."""
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
    """Open a safetensors file, of which tensors are then read one by one. Raises ValueError that names it."""
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises ValueError that names a missing or damaged one."""
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error


def flush(path: Path):
    """Ask the system to put a file or a folder on the disk now; some shared file systems can do so for files alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
