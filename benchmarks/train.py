"""Training steps of real shapes with random weights and made-up rows: tokens a second, MFU, peak memory.

    python benchmarks/train.py                            scenes, 222m and 460m; on a GPU 460m in many ways
    python benchmarks/train.py --shapes 460m --rows 4 --row-length 4096
    python benchmarks/train.py --shapes tiny              does all of it run? in a minute, and nothing is written

On a CPU every shape is trained in two ways: ours, and the plain reading of the same model, which makes logits at every
position; both attend with the same dense mask. On a GPU: with and without compiled blocks, with each way of computing
again, and with the largest batch that fits. Each way runs in a process of its own, and its loss must be that
of the plain reading. On a CPU, whose speed changes with what else runs there, the process of ours, once its memory
is read, takes both kinds of step in turn; `times_plain` is the ratio. MFU is against the data sheet of a GPU, or
else against a large matrix product that is timed before all. Appends lines to benchmarks/results/train.jsonl.
"""

import dataclasses
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from benchmarks import arguments
from nanovlm import cli
from nanovlm.config import (
    DecoderConfig,
    OptimConfig,
    ParallelConfig,
    ParamRule,
    ProjectorConfig,
    TrainConfig,
    VisionConfig,
    VLMConfig,
)
from nanovlm.data.loader import collate
from nanovlm.data.types import IGNORE, Batch, Row
from nanovlm.environment import describe_environment, find_device
from nanovlm.errors import UserError
from nanovlm.model.vlm import VLM, Extras
from nanovlm.objectives import NextToken
from nanovlm.presets import SMOLVLM_256M, scenes
from nanovlm.train.counting import count_flops, peak_flops
from nanovlm.train.optim import make_optimizers
from nanovlm.train.parallel import parallelize

RESULTS = Path(__file__).resolve().parent / "results" / "train.jsonl"
SIGLIP_B = SMOLVLM_256M.vision
SMOLLM2_135M = SMOLVLM_256M.decoder
SMOLLM2_360M = dataclasses.replace(
    SMOLLM2_135M, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
    num_key_value_heads=5,
)  # fmt: skip
SHAPES = {
    "scenes": scenes().model,
    "222m": dataclasses.replace(
        SMOLVLM_256M, vision=dataclasses.replace(SIGLIP_B, image_size=224), projector=ProjectorConfig(scale_factor=2)
    ),
    "460m": dataclasses.replace(SMOLVLM_256M, decoder=SMOLLM2_360M),
    "tiny": VLMConfig(
        vision=VisionConfig(image_size=32, patch_size=8, hidden_size=64, intermediate_size=128, num_hidden_layers=2),
        decoder=DecoderConfig(
            vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32,
        ),
    ),
}  # fmt: skip
BACKENDS = {  # of attention in image encoder and decoder, and of the output head with its loss
    "torch": ("sdpa", "torch"),
    "kernels": ("triton", "triton"),
}
# Rows and tokens a row of a batch on a CPU.
CPU_BATCH = {"scenes": (12, 192), "222m": (1, 1024), "460m": (1, 1024), "tiny": (2, 256)}


@dataclass(frozen=True)
class TrainBenchmarkConfig:
    # Which shapes: scenes, 222m (SigLIP-B/16-224 and SmolLM2-135M), 460m (512 px and SmolLM2-360M), tiny.
    shapes: tuple[str, ...] = ("scenes", "222m", "460m")
    # Rows of a batch; 0 for what suits the device.
    rows: int = 0
    # Tokens a row; 0 for what suits the device.
    row_length: int = 0
    # CPU threads.
    threads: int = 2
    # Timed steps, after two that are not.
    repeats: int = 5
    # Set by the benchmark itself: measure one way and print its line.
    only: str = ""


def main(config: TrainBenchmarkConfig):
    if config.only:
        print(json.dumps(measure(config, **json.loads(config.only))))
        return
    device = find_device("auto")
    peak = peak_flops(device) or matmul_rate(device, config.threads)
    jobs = [job | {"peak": peak} for shape in config.shapes for job in list_jobs(shape, config)]
    for job in tqdm(jobs, unit="run"):
        line = run(config, job)
        tqdm.write(json.dumps(line))
        if job["shape"] != "tiny":
            with open(RESULTS, "a") as file:
                file.write(json.dumps(line) + "\n")


def list_jobs(shape: str, config: TrainBenchmarkConfig) -> list[dict]:
    on_gpu = torch.cuda.is_available()
    rows, row_length = (4, 4096) if on_gpu and shape != "tiny" else CPU_BATCH[shape]
    job = {
        "shape": shape,
        "rows": config.rows or rows,
        "row_length": config.row_length or row_length,
        "precision": "bf16" if on_gpu or shape != "tiny" else "fp32",
        "way": "ours",
        "parallel": {},
    }
    jobs = [job | {"way": "plain"}, job]
    if on_gpu or shape == "tiny":
        ways = [{"compile": c, "checkpointing": way} for c in (False, True) for way in ("none", "selective", "full")]
        jobs += [job | {"parallel": way} for way in ways[1:]]
    if on_gpu:
        jobs += [job | {"rows": rows * 2**n, "parallel": {"compile": True}} for n in range(1, 6)]
    return jobs


def run(config: TrainBenchmarkConfig, job: dict) -> dict:
    """Measure one way in a process of its own; what does not fit into memory says so in its line."""
    options = {"threads": config.threads, "repeats": config.repeats, "only": json.dumps(job)}
    done = subprocess.run([sys.executable, __file__, "--json", json.dumps(options)], capture_output=True, text=True)
    if done.returncode:
        if "OutOfMemoryError" in done.stderr:
            return job | {"result": "out of memory"}
        raise UserError(f"{job} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    config: TrainBenchmarkConfig,
    shape,
    rows,
    row_length,
    precision,
    way,
    parallel: dict,
    peak: float = 0,
    backends: str = "torch",
    profile: str = "",
) -> dict:
    """Check the loss of the first step against the plain reading, then time whole steps.

    `peak` in FLOP/s is found here where it is 0; a profile of one more step is written to the file `profile`.
    """
    torch.set_num_threads(config.threads)
    device = find_device("auto")
    peak = peak or peak_flops(device) or matmul_rate(device, config.threads)
    if backends == "kernels" and device.type == "cpu":
        interpret_kernels()
    torch.manual_seed(0)
    model = VLM(with_backends(SHAPES[shape], backends)).to(device)
    batch = make_batch(model.config, rows, row_length)
    optim = OptimConfig(rules=(ParamRule("norm|bias|embed"), ParamRule("", weight_decay=0.01)))
    recipe, ways = TrainConfig(model=model.config, optim=optim), {"ours": NextToken(), "plain": PlainNextToken()}
    if device.type == "cuda":
        batch = batch.pin_memory()  # as the loader does
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        expected = ways["plain"].loss(model, batch.to(device), Extras()).item() / len(batch.trained)
    # Only now, so that blocks are not compiled for the plain reading too.
    replica = parallelize(model, ParallelConfig(**parallel), device, precision)
    state = train.TrainState(model, replica, make_optimizers(model, optim, precision), [], config.threads, precision)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step(way: str) -> tuple[float, float, float]:
        """Return the loss, the seconds and the CPU seconds of a step."""
        start, cpu_start = time.perf_counter(), time.process_time()
        state.objective = ways[way]
        loss = train.train_step(state, [batch], len(batch.trained), recipe)["loss"].item()
        return loss, time.perf_counter() - start, time.process_time() - cpu_start

    loss = step(way)[0]
    if abs(loss - expected) > 0.01 * expected:
        raise UserError(f"the loss is {loss}, the plain reading's {expected}: not timed")
    step(way)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    turns = ("plain", "ours") if way == "ours" and device.type == "cpu" else (way,)
    seconds, cpu_seconds = {}, {}
    for name in turns * config.repeats:
        _, wall, cpu = step(name)
        seconds.setdefault(name, []).append(wall)
        cpu_seconds.setdefault(name, []).append(cpu)
    if profile:
        profile_step(lambda: step(way), device, Path(profile))
    seconds, cpu_seconds = ({k: statistics.median(v) for k, v in x.items()} for x in (seconds, cpu_seconds))
    step_s, num_tokens = seconds[way], int((batch.doc_ids >= 0).sum())
    flops = count_flops(model.config, batch, {"vision": True, "projector": True, "decoder": True})
    return {
        "shape": shape,
        "way": way,
        "backends": backends,
        **parallel,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rows": rows,
        "row_length": row_length,
        "tiles": len(batch.pixel_values),
        "step_s": round(step_s, 3),
        "cpu_s": round(cpu_seconds[way], 3),
        **({"times_plain": round(seconds["plain"] / step_s, 3)} if len(turns) == 2 else {}),
        "tokens_per_second": round(num_tokens / step_s, 1),
        "trained_tokens_per_second": round(len(batch.trained) / step_s, 1),
        "image_tokens_per_second": round(int((batch.input_ids == model.config.image_token_id).sum()) / step_s, 1),
        "tflops": round(flops / step_s / 1e12, 4),
        "mfu": round(flops / step_s / peak, 4),
        "peak_memory_gb": round(memory / 1e9, 3),
        **describe_environment(device, config.threads, precision),
    }


def with_backends(config: VLMConfig, backends: str) -> VLMConfig:
    """Choose who computes attention and cross-entropy, a key of BACKENDS."""
    attention, cross_entropy = BACKENDS[backends]
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, attention=attention),
        decoder=dataclasses.replace(config.decoder, attention=attention, cross_entropy=cross_entropy),
    )


def interpret_kernels():
    """Run kernels on the CPU, which shows whether all of a benchmark runs. Raises UserError if triton does not."""
    if os.environ.get("TRITON_INTERPRET") != "1":  # read when triton is imported, so it cannot be set here
        raise UserError("without a GPU the kernels run with TRITON_INTERPRET=1 in the environment only")
    importlib.import_module("tests.kernels.interpreter")


def profile_step(step: Callable[[], object], device: torch.device, path: Path):
    """Write which operators and kernels one step spends its time in."""
    with torch.profiler.profile() as profiler:
        step()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    path.write_text(profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=100))


class PlainNextToken(NextToken):
    """The plain reading: logits [B, T, V] in fp32, cross-entropy over all, ignoring what has no label."""

    def loss(self, model, batch, extras):
        logits = model.head(model(batch, extras=extras)).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")


def make_batch(config: VLMConfig, num_rows: int, row_length: int) -> Batch:
    """Make rows of documents as they come in practice: an image each, a question, an answer; a third is trained."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(num_rows):
        ids, labels, doc_ids, position_ids, num_tiles = [], [], [], [], 0
        while True:
            num_text = int(torch.randint(row_length // 16, row_length // 4, (), generator=generator))
            length = config.num_image_tokens + num_text
            if len(ids) + length > row_length:
                break
            text = torch.randint(8, 500, (num_text,), generator=generator).tolist()  # special tokens lie outside
            document = [config.image_token_id] * config.num_image_tokens + text
            shifted = [*document[1:], IGNORE]
            first_trained = config.num_image_tokens + num_text // 2
            ids += document
            labels += [IGNORE if i < first_trained else label for i, label in enumerate(shifted)]
            doc_ids += [num_tiles] * length
            position_ids += range(length)
            num_tiles += 1
        missing = row_length - len(ids)
        size = config.vision.image_size
        rows.append(
            Row(
                input_ids=torch.tensor(ids + [config.pad_token_id] * missing),
                labels=torch.tensor(labels + [IGNORE] * missing),
                doc_ids=torch.tensor(doc_ids + [-1] * missing, dtype=torch.int32),
                branch_ids=torch.zeros(row_length, dtype=torch.int32),
                position_ids=torch.tensor([*position_ids, *[0] * missing]),
                tiles=torch.randint(0, 256, (num_tiles, 3, size, size), generator=generator, dtype=torch.uint8),
                tile_doc_ids=torch.arange(num_tiles, dtype=torch.int32),
            )
        )
    return collate(rows)


def matmul_rate(device: torch.device, threads: int) -> float:
    """Time a bf16 matrix product; return operations a second, the best of twenty."""
    torch.set_num_threads(threads)
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


if __name__ == "__main__":
    cli.run(lambda: main(arguments.read(TrainBenchmarkConfig, __doc__)))
