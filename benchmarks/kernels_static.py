"""Estimate the kernels on shapes of real models without a GPU: compile, and run inner loops on a model of an SM.

    python benchmarks/kernels_static.py                                    all, in about a minute on one core
    python benchmarks/kernels_static.py --only attention --capability 90
    python benchmarks/kernels_static.py --table                            what was written last, as Markdown
    python benchmarks/kernels_static.py --try backward_kv --head 128 --mask runs --blocks 32,64,4,3 64,64,4,3

The last one tries blocks BM,BN,warps,stages[,registers] of an attention kernel and writes nothing. Every number is an
estimate, as good as sm_model.py says, and replaces no measurement: benchmarks/kernels.py measures on a GPU.

A line of benchmarks/results/kernels_static.jsonl has the clocks of an SM for a unit of work: a thousand pairs of query
and key, weights, slots of a cache or logits in the inner loop alone, or a whole tile of an expert; of attention also
those of the blocks that take a mask. Of its units, the busiest (`bound`) is what limits it where its share is high;
where it is low, the kernel waits. `tensor_cores` is the share of what they could do in these clocks, of products that
are needed, `bandwidth` the share of device memory. Kernels that merge and add up parts are left out: they stream.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import triton
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.sm_model import BANDWIDTH, L2_BANDWIDTH, L2_LATENCY, MEMORY_LATENCY, TENSOR, simulate
from nanovlm import cli
from nanovlm.config import pick
from nanovlm.environment import git_commit
from nanovlm.errors import UserError
from nanovlm.kernels.attention import Runs, attention
from nanovlm.kernels.cache_attention import LEAST_PART, attend_blocks, count_parts
from nanovlm.kernels.cross_entropy import linear_cross_entropy
from nanovlm.kernels.grouped_gemm import grouped_experts
from tests.kernels.compile_cases import multiply
from tests.kernels.compiling import Compiled, compile_case
from tests.kernels.sass import Instruction, find_loops, follow, read_sass

RESULTS = Path(__file__).resolve().parent / "results" / "kernels_static.jsonl"


@dataclass(frozen=True)
class StaticConfig:
    # Families to estimate: attention, decode, dequant_matmul, experts, cross_entropy; none for all.
    only: tuple[str, ...] = ()
    capability: int = 90
    # Print the table of docs/kernels.md from the file of results, and do nothing else.
    table: bool = False
    # An attention kernel, forward, backward_q or backward_kv, to try blocks of.
    kernel: Annotated[str, tyro.conf.arg(name="try")] = ""
    head: int = 128
    # What a query sees: none, causal or runs.
    mask: str = "none"
    # Blocks to try, each BM,BN,warps,stages[,registers]; without any, 54 of them.
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What one iteration of an inner loop does, or a whole program where the number of iterations is known."""

    unit: str
    amount: float  # of units
    flops: float = 0.0  # that are needed, not those of padding
    num_bytes: float = 0.0  # of device memory
    # How often the inner loops run; None: they alone count, 0: there is no loop.
    iterations: float | None = None
    latency: float = L2_LATENCY
    near: float = 0.0
    copied: float = 0.0  # bytes that descriptors (TMA) bring, which the instructions do not say


# --- what is estimated ---------------------------------------------------------------------------------------


def empty(*shape, dtype=torch.bfloat16, learns=False):
    return torch.empty(shape, dtype=dtype, requires_grad=learns)


def attend(H: int, N: int, K: int, T: int, mask: str):
    q, k, v = (empty(2, T, heads, H, learns=True) for heads in (N, K, K))
    runs = Runs(*(empty(2, T, dtype=torch.int32) for _ in range(6))) if mask == "runs" else None
    attention(q, k, v, runs, causal=mask == "causal")[0].sum().backward()


def decode(B: int, S: int, T: int):
    cache, table = empty(B * S, 8, 128), empty(B, S // 16, dtype=torch.int32)
    attend_blocks(empty(B, T, 32, 128), cache, cache, table, empty(B, T, dtype=torch.int64))


def few_bits(format: str, M: int, N: int, K: int):
    multiply(format, M, N, K, group=64 if format == "nf4" else 128)


def experts(R: int, k: int, E: int, D: int, W: int):
    shapes = (R, D), (R, k), (E, W, D), (E, W, D), (E, D, W)
    x, *tensors = (empty(*shape, learns=True) for shape in shapes)
    grouped_experts(x, empty(R, k, dtype=torch.int64), *tensors).sum().backward()


def head(N: int, D: int, V: int):
    hidden, weight = (empty(rows, D, learns=True) for rows in (N, V))
    linear_cross_entropy(hidden, weight, empty(N, dtype=torch.long)).backward()


# {family: (what calls the kernel, the names of its shape, shapes)}
FAMILIES = {
    "attention": (
        attend,
        ("head", "heads", "kv_heads", "tokens", "mask"),
        [
            *((128, 32, 8, 4096, mask) for mask in ("none", "causal", "runs")),
            (96, 32, 32, 4096, "runs"),
            (72, 16, 16, 1024, "none"),
            (64, 12, 12, 1024, "none"),
            (64, 9, 3, 4096, "runs"),
        ],
    ),
    "decode": (decode, ("rows", "slots", "tokens"), [(1, 4096, 1), (16, 32768, 1), (1, 8192, 512)]),
    "dequant_matmul": (
        few_bits,
        ("format", "rows", "outputs", "inputs"),
        [(format, M, 8192, 8192) for format in ("int4", "nf4", "int8") for M in (1, 16, 64, 256, 512)],
    ),
    "experts": (
        experts,
        ("tokens", "top_k", "num_experts", "hidden_size", "intermediate_size"),
        [(8192, 8, 128, 2048, 768), (8192, 2, 8, 4096, 14336)],
    ),
    "cross_entropy": (head, ("tokens", "hidden_size", "vocabulary"), [(8192, 2048, 151936)]),
}


# --- what a kernel does, given its constants c and the shape s ----------------------------------------------


def of_pairs(products: int) -> Callable:
    def work(c, s):
        copied = 2 * c["BN"] * c["H"] * 2  # keys and values of 16 bits
        return Work("1,000 pairs", c["BM"] * c["BN"] / 1000, 2 * products * c["H"] * c["BM"] * c["BN"], copied=copied)

    return work


def of_slots(c, s):
    if s["tokens"] > 1:
        return of_pairs(2)(c, s)
    most, _ = count_parts(torch.empty(0), 8, s["slots"], 1)
    slots = max(LEAST_PART.value, triton.cdiv(triton.cdiv(s["slots"], most), c["BN"]) * c["BN"])
    num_bytes = 4 * slots * c["H"]
    return Work("1,000 slots", slots / 1000, 0, num_bytes, slots / c["BN"], MEMORY_LATENCY)


def of_weights(c, num: int, rows: int, whole: bool = False):
    bits = {"int4": 4 + 32 / c["GROUP"], "nf4": 4 + 8 / 64 + 32 / 64 / 256, "int8": 8}[c["FORMAT"]]
    num_bytes = num * (bits / 8 + (2 if whole else 0))
    flops = 2 * num * rows if rows > 1 else 0
    # One row loads nothing ahead of itself, and its x is in the first cache.
    latency, near = (MEMORY_LATENCY, 120.0) if rows == 1 else (L2_LATENCY, 0.0)
    return Work("1,000 weights", num / 1000, flops, num_bytes, 0 if whole else None, latency, near)


def of_tile(products: Callable) -> Callable:
    """`products(c, s)`: how many there are, and their length."""

    def work(c, s):
        number, length = products(c, s)
        return Work("tile", 1, 2 * number * c["BM"] * c["BN"] * length, 0, length / c["BK"])

    return work


WORK = {
    "forward_kernel": of_pairs(2),
    "backward_q_kernel": of_pairs(3),
    "backward_kv_kernel": of_pairs(4),
    "blocks_kernel": of_slots,
    "gemv_kernel": lambda c, s: of_weights(c, c["BN"] * c["BT"] * c["RUN"] * 32 // c["BITS"], 1),
    "matmul_kernel": lambda c, s: of_weights(c, c["BN"] * c["BW"] * 32 // c["BITS"], c["BM"]),
    "dequantize_kernel": lambda c, s: of_weights(c, c["BN"] * c["BT"] * c["RUN"] * 32 // c["BITS"], 0, whole=True),
    "gate_up_kernel": of_tile(lambda c, s: (2, c["D"])),
    "scatter_kernel": of_tile(lambda c, s: (1 + c["TWO"], c["W"])),
    "through_down_kernel": of_tile(lambda c, s: (1, c["D"])),
    "matrix_grad_kernel": of_tile(lambda c, s: (1, s["tokens"] * s["top_k"] / s["num_experts"])),
    # One loop reads a logit of 2 bytes, the other reads and writes it.
    "cross_entropy_kernel": lambda c, s: Work("1,000 logits", c["BV"] / 1000, 0, 6 * c["BV"], latency=MEMORY_LATENCY),
}


# --- the estimate --------------------------------------------------------------------------------------------


def estimate(code: list[Instruction], record: Compiled, work: Work) -> dict:
    """Return clocks for a unit of work, what they are bound by, and shares of tensor cores and of bandwidth."""

    def run(body):
        clocks, busy = simulate(
            body, record.warps, max(1, record.programs), record.capability, 12, work.latency, work.near
        )
        if any(i.root == "UTMALDG" for i in body):
            busy["L2"] += work.copied / L2_BANDWIDTH
        return max(clocks, busy["shared"], busy["L2"]), busy

    spans = find_loops(code)
    bodies = [follow(code, span) for span in spans]
    with_products = [body for body in bodies if any(i.kind == "tensor" for i in body)]
    loops, masked = [run(body) for body in with_products or bodies], None
    if work.iterations is not None:
        end = max(n for n, i in enumerate(code) if i.root == "EXIT")
        inside = {n for span in spans for n in range(span.first, span.last + 1)}
        parts = [(1, *run([i for n, i in enumerate(code[: end + 1]) if n not in inside]))]
        loops = loops[:1] if work.unit == "1,000 slots" else loops  # the other takes a mask, once at the end
        parts += [(work.iterations, *loop) for loop in loops]
    elif work.unit == "1,000 logits":
        parts = [(1, *loop) for loop in loops]
    else:
        parts = [(1, *loops[0])]  # of attention that of full blocks, before the one that takes a mask
        if work.unit == "1,000 pairs" and len(loops) > 1:
            masked, _ = loops[-1]
    clocks, busy = sum(number * clocks for number, clocks, _ in parts), Counter()
    for number, _, of_part in parts:
        busy.update({unit: number * n for unit, n in of_part.items()})
    capability = record.capability
    busy["memory"] = work.num_bytes / BANDWIDTH[capability]
    busy["tensor"] = max(busy["tensor"], work.flops / TENSOR[capability])
    clocks = max(clocks, busy["memory"])
    units = ("tensor", "shared", "special", "issue", "logic", "float", "L2", "memory")
    bound = max(units, key=lambda unit: busy[unit])
    return {
        "unit": work.unit,
        "clocks": round(clocks / work.amount, 1),
        **({"clocks_masked": round(masked / work.amount, 1)} if masked else {}),
        "bound": bound,
        "busy": round(busy[bound] / clocks, 2),
        **({"tensor_cores": round(work.flops / TENSOR[capability] / clocks, 2)} if work.flops else {}),
        **({"bandwidth": round(busy["memory"] / clocks, 2)} if work.num_bytes else {}),
    }


def estimate_case(family: str, shape: tuple, capability: int) -> list[dict]:
    call, names, _ = FAMILIES[family]
    lines, named = [], dict(zip(names, shape, strict=True))

    def look(kernel, record):
        if record.kernel in WORK:
            lines.append({"family": family, "kernel": record.kernel} | named | describe(kernel, record, named))

    records = compile_case(family, lambda: call(*shape), capability, look)
    return lines + [{"family": family, "kernel": r.kernel} | named | {"error": r.error} for r in records if r.error]


def describe(kernel, record: Compiled, shape: dict) -> dict:
    names = ("BM", "BN", "BK", "BW", "BT", "BV")
    config = {name: record.config[name] for name in names if name in record.config}
    found = {
        "blocks": config | {"warps": record.warps, "stages": kernel.metadata.num_stages},
        "registers": record.registers,
        "shared": record.shared,
        "programs": record.programs,
        "spills": [record.spills_in_inner_loops, record.spills_in_outer_loops, record.spills],
    }
    if not record.programs:
        return found | {"error": f"{record.shared} bytes of shared memory, {record.registers} registers: does not fit"}
    work = WORK[record.kernel](record.config, shape)
    return found | estimate(read_sass(kernel.asm["cubin"]), record, work)


def try_blocks(config: StaticConfig):
    """Print a line for each of the blocks, the best last."""
    chosen = [tuple(map(int, text.split(","))) for text in config.blocks]
    chosen = chosen or list(product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)))
    from nanovlm.kernels import attention as module

    stock, lines = module.choose_blocks, []
    shape = {"head": config.head, "heads": 32, "kv_heads": 8, "tokens": 4096, "mask": config.mask}
    for BM, BN, warps, stages, *registers in tqdm(chosen, unit="blocks"):
        options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers[0] if registers else None}

        def choose(by_class, q, blocks=(BM, BN, options)):
            return blocks if by_class is module.BLOCKS[config.kernel] else stock(by_class, q)

        with mock.patch.object(module, "choose_blocks", choose):
            for line in estimate_case("attention", tuple(shape.values()), config.capability):
                if line["kernel"] == f"{config.kernel}_kernel":
                    lines.append(line | {"blocks": ",".join(map(str, (BM, BN, warps, stages, *registers)))})
    for line in sorted(lines, key=lambda line: -line.get("clocks", float("inf"))):
        print(json.dumps({name: value for name, value in line.items() if name not in (*shape, "family", "kernel")}))


# --- the table -----------------------------------------------------------------------------------------------


def format_table(lines: list[dict]) -> str:
    """Markdown for docs/kernels.md; every line says that it is an estimate."""
    columns = ("kernel", "shape", "blocks", "clocks", "busiest", "tensor cores, memory", "registers", "spills")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for line in lines:
        names = FAMILIES[line["family"]][1]
        start = f"| {line['kernel'].removesuffix('_kernel')} | {' '.join(str(line[name]) for name in names)} | "
        if "clocks" not in line:
            rows.append(f"{start} | {line['error'][:40]} | | | | |")
            continue
        blocks = " ".join(map(str, line["blocks"].values()))
        masked = f" ({line['clocks_masked']:,.0f})" if "clocks_masked" in line else ""
        shares = [f"{100 * line[name]:.0f} %" if name in line else "-" for name in ("tensor_cores", "bandwidth")]
        inner, outer, total = line["spills"]
        spills = f"{inner} + {outer} + {total - inner - outer}" if total else "0"
        rows.append(
            f"{start}{blocks} | estimate {line['clocks']:,.0f}{masked} | {line['bound']} {100 * line['busy']:.0f} % | "
            f"{', '.join(shares)} | {line['registers']} x {line['programs']} | {spills} |"
        )
    return "\n".join(rows)


def read_results() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def main(config: StaticConfig):
    if config.table:
        print(format_table([line for line in read_results() if line["capability"] == config.capability]))
        return
    if config.capability not in TENSOR:
        raise UserError(f"capability = {config.capability} is not one of {', '.join(map(str, TENSOR))}")
    if config.kernel:
        pick({"forward": 1, "backward_q": 1, "backward_kv": 1}, config.kernel, "try")
        try_blocks(config)
        return
    families = [name for name in FAMILIES if name in config.only] or list(FAMILIES)
    for family in config.only:
        pick(FAMILIES, family, "only")
    about = {
        "commit": git_commit(),
        "triton": triton.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "capability": config.capability,
    }
    lines = []
    jobs = [(family, shape) for family in families for shape in FAMILIES[family][2]]
    for name, shape in tqdm(jobs, unit="shape"):
        for line in estimate_case(name, shape, config.capability):
            tqdm.write(json.dumps(line))
            lines.append(about | line)
    # What was estimated for other families and GPUs stays.
    lines += [x for x in read_results() if x["capability"] != config.capability or x["family"] not in families]
    lines.sort(key=lambda line: (-line["capability"], list(FAMILIES).index(line["family"])))
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(StaticConfig, description=__doc__)))
