"""Memory that loading a checkpoint of the hub's layout needs, against the size of its files.

    python benchmarks/memory.py              print, and append to benchmarks/results/memory.jsonl; 5 GB of disk
    python benchmarks/memory.py --peer       transformers too

Random weights in the shape of SmolVLM-Instruct (2.2 billion parameters, bf16) are written to a temporary folder,
as one file and in shards, and loaded by processes of their own. Counted is the most resident memory of the process
until every weight was looked at, mapped files included, less what it had just before loading. Tensors of every part
are compared with what was written.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.speed import append_lines
from nanovlm import cli
from nanovlm.environment import describe_environment
from nanovlm.hub import configs, families, weights
from nanovlm.model.build import empty_model
from nanovlm.model.vlm import VLM

RESULTS = Path(__file__).resolve().parent / "results" / "memory.jsonl"

SMOLVLM = {
    "model_type": "idefics3",
    "image_token_id": 49153,
    "scale_factor": 3,
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "idefics3_vision",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49155,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 16384,
        "rope_theta": 273768.0,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 2,
        "eos_token_id": 49154,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class MemoryConfig:
    # Most bytes of one file, in GB; the weights are written and loaded once for each.
    file_gb: tuple[float, ...] = (5.0, 1.0)
    # Loadings of each; the line has the worst memory and the median time.
    repeats: int = 3
    # Also measure transformers.
    peer: bool = False
    # Where the temporary folder is made; empty for the system's place.
    folder: str = ""


def main(config: MemoryConfig):
    lines = []
    for file_gb in config.file_gb:
        with tempfile.TemporaryDirectory(dir=config.folder or None) as folder:
            parameters, files = write_checkpoint(Path(folder), int(1e9 * file_gb))
            size = sum(path.stat().st_size for path in files)
            for loader in ("nanovlm", "transformers") if config.peer else ("nanovlm",):
                lines.append({"what": "loading", "loader": loader, "parameters": parameters, "files": len(files)})
                lines[-1] |= measure(loader, folder, config.repeats, size)
    append_lines(RESULTS, lines, describe_environment(torch.device("cpu"), torch.get_num_threads()))


def write_checkpoint(folder: Path, most: int) -> tuple[int, list[Path]]:
    """Write config and weights, one shard in memory at a time; return the number of parameters and the files."""
    (folder / "config.json").write_text(json.dumps(SMOLVLM))
    shards, left = [], 0
    for name, shape in tensor_shapes(folder).items():
        size = 2 * shape.numel()
        if size > left:
            shards.append({})
            left = most
        shards[-1][name] = shape
        left -= size
    paths = [folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        save_file({name: make_tensor(name, shape) for name, shape in shard.items()}, path, {"format": "pt"})
    parameters = sum(shape.numel() for shard in shards for shape in shard.values())
    weight_map = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters, paths


def tensor_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return the names of the tensors on disk and their shapes."""
    with torch.device("meta"):
        model = VLM(configs.read_config(folder))
    destinations = weights.destinations(model.state_dict(), families.IDEFICS3_NAMES)
    return {name: torch.cat(parts).shape for name, parts in destinations.items()}


def make_tensor(name: str, shape: torch.Size) -> torch.Tensor:
    """Draw the tensor of this name, the same one each time."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator)


def measure(loader: str, folder: str, repeats: int, size: int) -> dict:
    """Load in fresh processes; return the memory of the worst and the median time."""
    peaks, seconds = [], []
    for _ in range(repeats):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peak, elapsed = pool.submit(load, loader, Path(folder)).result()
        peaks.append(peak)
        seconds.append(elapsed)
    return {
        "file_gb": round(size / 1e9, 3),
        "memory_gb": round(max(peaks) / 1e9, 3),
        "ratio": round(max(peaks) / size, 3),
        "seconds": round(statistics.median(seconds), 2),
    }


def load(loader: str, folder: Path) -> tuple[int, float]:
    """Load a model and check it; return the bytes of memory and the seconds until all its weights were there."""
    if loader == "transformers":
        from transformers import Idefics3ForConditionalGeneration

    before, start = resident("VmRSS"), time.perf_counter()
    if loader == "nanovlm":
        config = configs.read_config(folder)
        dtype, fill = weights.open_weights(folder, config)
        model = empty_model(config, "cpu", dtype)
        fill(model.state_dict())
    else:
        model = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    for tensor in model.state_dict().values():
        tensor.view(-1)[::1024].sum()  # a number of each page: a weight that is only mapped yet is not loaded
    peak, elapsed = resident("VmHWM") - before, time.perf_counter() - start
    tensors = {name: [tensor] for name, tensor in model.state_dict().items()}
    tensors = weights.destinations(model.state_dict(), families.IDEFICS3_NAMES) if loader == "nanovlm" else tensors
    for name in [*list(tensors)[::100], list(tensors)[-1]]:
        found = torch.cat(tensors[name])
        if not torch.equal(found, make_tensor(name, found.shape)):
            raise SystemExit(f"{loader} loads {name} wrong: its memory does not count")
    return peak, elapsed


def resident(field: str) -> int:
    """Return the process's resident memory in bytes as Linux counts it: VmRSS now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(MemoryConfig, description=__doc__)))
