"""Every kernel on shapes of real models against what torch and others offer for them, on a GPU.

    python benchmarks/kernels.py                          all, in about five minutes
    python benchmarks/kernels.py --only attention cross_entropy --minutes 20
    python benchmarks/kernels.py --tiny                   does all of it run? small shapes, interpreted where there
                                                          is no GPU, and nothing is written

A result is checked on the timed shape before it is timed, with the rule of tests/kernels/oracle.py: outputs and
gradients against fp64, of attention for the heads of one key/value head. Inputs are random and taken in turn from so
many copies that they do not stay in the L2 cache, in one CUDA graph, or without where something cannot be captured
(`no_graph`). A line of benchmarks/results/kernels.jsonl has the milliseconds, TFLOP/s, GB/s, both as shares of a
matrix product and of a copy timed at the beginning of the same run, and for each peer its time over ours: above 1 we
are faster. What a peer cannot do is said in its place.
"""

import functools
import importlib
import inspect
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nanovlm import cli
from nanovlm.config import pick
from nanovlm.environment import describe_environment, find_device
from nanovlm.errors import UserError

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.jsonl"
L2_BYTES = 200e6  # several times the cache of any GPU here


@dataclass(frozen=True)
class KernelsConfig:
    # Families to time: attention, packed, decode, dequant_matmul, experts, cross_entropy; none for all.
    only: tuple[str, ...] = ()
    # No new shape is begun after so many minutes.
    minutes: float = 5.0
    # Small shapes, and nothing written.
    tiny: bool = False


@dataclass
class Case:
    """One shape. Functions take the tensors of `inputs()` by name; `gradient` names those that learn."""

    kernel: str
    shape: dict
    inputs: Callable[[], dict[str, Tensor]]
    ours: Callable[..., Tensor]
    # The same in plain torch, which is right in fp64, and how good 16 bits can be.
    plain: Callable[..., Tensor]
    peers: dict[str, Callable[..., Tensor]]
    flops: float
    num_bytes: float
    learns: tuple[str, ...] = ()
    # Makes smaller inputs for the check where fp64 would not fit.
    cut: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda inputs: inputs
    # Peers that wait for the device or compile, and so cannot be captured.
    uncaptured: tuple[str, ...] = field(default=())


def main(config: KernelsConfig):
    device = find_device("auto")
    if device.type == "cpu" and not config.tiny:
        raise UserError("there is no GPU here, so there is nothing to time; --tiny runs small shapes all the same")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        importlib.import_module("tests.kernels.interpreter")
    chosen = {name: pick(FAMILIES, name, "only") for name in config.only or FAMILIES}
    torch.manual_seed(0)
    begin, ceilings = time.perf_counter(), measure_ceilings(device, config.tiny)
    environment = describe_environment(device, torch.get_num_threads()) | ceilings
    print(json.dumps(environment))
    # In turn, so that every family has had its first shapes when the time is over.
    families = [
        [(make, shape) for shape in (tiny if config.tiny else shapes)] for make, shapes, tiny in chosen.values()
    ]
    jobs = [job for turn in itertools.zip_longest(*families) for job in turn if job]
    for make, shape in tqdm(jobs, unit="shape"):
        if time.perf_counter() - begin > 60 * config.minutes:
            print(f"{config.minutes:g} minutes are over; what is missing comes with --only or more --minutes")
            break
        for line in time_case(make(device, *shape), device, ceilings):
            tqdm.write(json.dumps(line))
            if not config.tiny:
                with open(RESULTS, "a") as file:
                    file.write(json.dumps(environment | line) + "\n")
        torch._dynamo.reset()  # what is compiled holds for one shape, and there is a limit to how many
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_ceilings(device: torch.device, tiny: bool) -> dict:
    """Time a bf16 matrix product and a copy: what the machine gives today."""
    size, num = (256, 2**20) if tiny else (8192, 2**29)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    source = torch.randn(num, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    product = time_call(lambda **_: a @ b, [{}], device)
    copy = time_call(lambda **_: target.copy_(source), [{}], device)
    return {"matmul_tflops": round(2 * size**3 / product / 1e9, 2), "copy_gbs": round(4 * num / copy / 1e6, 1)}


def time_case(case: Case, device: torch.device, ceilings: dict) -> Iterator[dict]:
    """Check a case, then time it forward, and where it learns forward and backward; yield a line of each."""
    inputs = case.inputs()
    wrong = check_case(case, case.cut(inputs))
    size = sum(x.numel() * x.element_size() for x in inputs.values())
    num_more = min(31, math.ceil(L2_BYTES / max(1, size))) if device.type == "cuda" else 0
    copies = [inputs, *(case.inputs() for _ in range(num_more))]
    for learns in ((), case.learns) if case.learns else ((),):
        line = {"kernel": case.kernel, **case.shape, "pass": "forward and backward" if learns else "forward"}
        if wrong:
            yield line | {"result": f"not timed: {wrong}"}
            continue
        ours = time_call(with_backward(case.ours, learns), copies, device)
        # The backward pass of matrix products and attention has twice the operations, and 2.5 times where scores are
        # computed again.
        factor = (3.5 if case.kernel.startswith("attention") else 3) if learns else 1
        tflops, gbs = factor * case.flops / ours / 1e9, case.num_bytes / ours / 1e6
        line |= {"ms": round(ours, 4), "tflops": round(tflops, 1)}
        line["of_matmul"] = round(tflops / ceilings["matmul_tflops"], 3)
        if not learns:
            line |= {"gbs": round(gbs, 1), "of_copy": round(gbs / ceilings["copy_gbs"], 3)}
        line["peer_over_ours"] = ratios = {}
        for name, peer in case.peers.items():
            try:
                captured = name not in case.uncaptured
                ratios[name] = round(time_call(with_backward(peer, learns), copies, device, captured) / ours, 3)
            except Exception as error:  # a peer's limits, whatever they raise, are a result
                ratios[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
        yield line | {"no_graph": list(case.uncaptured)}


def check_case(case: Case, inputs: dict[str, Tensor]) -> str:
    """Return what is wrong with our result on these inputs, or why that is not known, or nothing."""
    from tests.kernels.oracle import check, check_gradients

    fixed = {name: x for name, x in inputs.items() if name not in case.learns}
    learning = {name: x for name, x in inputs.items() if name in case.learns}

    def exact(**tensors):
        return case.plain(**{n: x.double() if x.is_floating_point() else x for n, x in (fixed | tensors).items()})

    try:
        if not learning:
            check(case.ours(**fixed), case.plain(**fixed), exact)
            return ""
        with torch.no_grad():
            gradient = torch.randn_like(case.ours(**inputs))
        functions = (functools.partial(case.ours, **fixed), functools.partial(case.plain, **fixed), exact)
        check_gradients(*functions, learning, gradient)
    except AssertionError as error:
        return f"wrong: {error}"
    except torch.OutOfMemoryError as error:
        return f"not checked: {str(error).partition(chr(10))[0]}"
    return ""


def with_backward(function: Callable[..., Tensor], learns: tuple[str, ...]) -> Callable[..., object]:
    """Return a function that goes back too, to the inputs named; without names, forward without gradients."""

    def forward(**inputs):
        with torch.no_grad():
            return function(**inputs)

    def both(**inputs):
        leaves = {name: inputs[name].detach().requires_grad_() for name in learns}
        out = function(**inputs | leaves)
        return torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    return both if learns else forward


def time_call(call: Callable, copies: list[dict], device: torch.device, captured: bool = True) -> float:
    """Return the median of the milliseconds of a call, over copies of its inputs."""

    def all_copies():
        for inputs in copies:
            call(**inputs)

    if device.type == "cpu":
        all_copies()
        start = time.perf_counter()
        all_copies()
        return 1e3 * (time.perf_counter() - start) / len(copies)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles
            all_copies()
    torch.cuda.synchronize()
    replay = all_copies
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_copies()
        replay = graph.replay
    replay()
    torch.cuda.synchronize()
    times, begin = [], time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < 0.25 and len(times) < 100):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(copies))
    return statistics.median(times)


# --- attention -----------------------------------------------------------------------------------------------


def draw(device: torch.device, *shapes, dtype=torch.bfloat16) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def sdpa(backend: SDPBackend | None = None, causal: bool = False, mask: Tensor | None = None):
    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend) if backend else sdpa_kernel(list(BACKENDS.values())):
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return attend


BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def flex(causal: bool, device: torch.device, length: int):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    mask = create_block_mask(lambda b, n, t, s: s <= t, None, None, length, length, device=device) if causal else None

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return run


def cut_heads(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep the first row and the query heads of the first key/value head."""
    group = inputs["q"].shape[2] // inputs["k"].shape[2]
    heads = {"q": group, "k": 1, "v": 1}
    return {name: x[:1, :, : heads[name]] if name in heads else x[:1] for name, x in inputs.items()}


def attention(device: torch.device, B: int, S: int, N: int, K: int, H: int, causal: bool) -> Case:
    """Causal, as a decoder attends in training, and full, as a vision encoder does."""
    from kernels.attention import attention as ours

    backends = {name: sdpa(backend, causal) for name, backend in BACKENDS.items() if name != "sdpa math"}
    peers = {"sdpa": sdpa(None, causal)} if device.type == "cpu" else backends | {"flex": flex(causal, device, S)}
    pairs = S * (S + 1) / 2 if causal else S * S
    return Case(
        "attention, causal" if causal else "attention, full",
        {"rows": B, "tokens": S, "heads": N, "kv_heads": K, "head_dim": H},
        lambda: dict(zip("qkv", draw(device, (B, S, N, H), (B, S, K, H), (B, S, K, H)), strict=True)),
        lambda q, k, v: ours(q, k, v, causal=causal)[0],
        sdpa(SDPBackend.MATH, causal),
        peers,
        flops=4 * B * N * H * pairs,
        num_bytes=2 * B * S * H * (2 * N + 2 * K),
        learns=("q", "k", "v"),
        cut=cut_heads,
    )


def packed(device: torch.device, T: int, N: int, K: int, H: int, least: int = 16) -> Case:
    """Documents of all lengths in one row, which do not see each other; masks are made in the time that counts."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from kernels.attention import attention as ours
    from kernels.attention import find_runs
    from nanovlm.model.attention import make_mask

    lengths = draw_lengths(T, least, T // 4)
    doc_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int().to(device)
    branch_ids = torch.zeros_like(doc_ids)
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)
    dense = make_mask(doc_ids, branch_ids)
    compiled = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def run_flex(q, k, v):
        def visible(b, _n, t, s):
            return (doc_ids[0, t] == doc_ids[0, s]) & (s <= t)

        mask = create_block_mask(visible, None, None, T, T, device=device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=N != K).transpose(1, 2)

    def run_varlen(q, k, v):
        from torch.nn.attention.varlen import varlen_attn

        names = inspect.signature(varlen_attn).parameters
        options = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
        if "enable_gqa" in names:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(N // K, dim=2) for x in (k, v))
        return varlen_attn(q[0], k[0], v[0], ends, ends, max(lengths), max(lengths), **options)[None]

    peers = {"flex": run_flex, "sdpa with a mask": sdpa(None, mask=dense)}
    return Case(
        "attention, packed",
        {"tokens": T, "documents": len(lengths), "heads": N, "kv_heads": K, "head_dim": H},
        lambda: dict(zip("qkv", draw(device, (1, T, N, H), (1, T, K, H), (1, T, K, H)), strict=True)),
        lambda q, k, v: ours(q, k, v, find_runs(doc_ids, branch_ids))[0],
        sdpa(SDPBackend.MATH, mask=dense),
        peers | ({"varlen_attn": run_varlen} if device.type == "cuda" else {}),
        flops=4 * N * H * sum(n * (n + 1) / 2 for n in lengths),
        num_bytes=2 * T * H * (2 * N + 2 * K),
        learns=("q", "k", "v"),
        cut=cut_heads,
        uncaptured=("flex",),
    )


def draw_lengths(total: int, least: int, most: int) -> list[int]:
    """Draw lengths of documents from a Zipf distribution until they fill a row."""
    lengths, weights = [], 1 / torch.arange(least, most + 1).float()
    while sum(lengths) < total:
        lengths.append(min(least + int(torch.multinomial(weights, 1)), total - sum(lengths)))
    return lengths


def decode(device: torch.device, B: int, S: int, N: int, K: int, H: int) -> Case:
    """One new token a row over a cache that is full."""
    from kernels.attention import attend_slots

    last = torch.full((B, 1), S - 1, device=device)
    return Case(
        "attention, decode",
        {"rows": B, "slots": S, "heads": N, "kv_heads": K, "head_dim": H},
        lambda: dict(zip("qkv", draw(device, (B, 1, N, H), (B, S, K, H), (B, S, K, H)), strict=True)),
        lambda q, k, v: attend_slots(q, k, v, last[: len(q)]),
        sdpa(SDPBackend.MATH),
        {"sdpa": sdpa()},
        flops=4 * B * N * S * H,
        num_bytes=4 * B * S * K * H,
        cut=cut_heads,
    )


# --- quantised weights ---------------------------------------------------------------------------------------


def dequantised(device: torch.device, format: str, M: int, N: int, K: int, group: int = 128) -> Case:
    """A linear layer of which the weight has 8 or 4 bits; above 1 against bf16 is what quantising gains."""
    from kernels.dequant_matmul import dequant_matmul
    from kernels.quantized_weight import dequantize_ref
    from nanovlm.model.quantized import quantize_weight

    whole = torch.randn(N, K, device=device) / K**0.5
    w = quantize_weight(whole, format, group, search=False)
    dense = dequantize_ref(w)
    size = sum(x.numel() * x.element_size() for x in w if isinstance(x, Tensor))

    def inputs():
        parts = {name: part.clone() for name, part in w._asdict().items() if isinstance(part, Tensor)}
        return {"x": draw(device, (M, K))[0], **parts}

    def ours(x, **tensors):
        return dequant_matmul(x, w._replace(**tensors))

    def plain(x, **_):
        return x @ dense.to(x.dtype).T

    return Case(
        "dequant_matmul",
        {"format": format, "group": w.group, "rows": M, "outputs": N, "inputs": K},
        inputs,
        ours,
        plain,
        dequantised_peers(format, dense, group, device),
        flops=2 * M * N * K,
        num_bytes=size + 2 * M * (N + K),
    )


def dequantised_peers(format: str, dense: Tensor, group: int, device: torch.device) -> dict[str, Callable]:
    """bf16 by cuBLAS from several copies of the weight, and torch's own products of int4 and int8."""
    num = min(8, math.ceil(L2_BYTES / (2 * dense.numel()))) if device.type == "cuda" else 1
    weights = itertools.cycle([dense.bfloat16().clone() for _ in range(num)])
    peers = {"bf16": lambda x, **_: F.linear(x, next(weights))}
    if format == "int4" and device.type == "cuda":
        codes = torch.randint(0, 256, (len(dense), dense.shape[1] // 2), device=device, dtype=torch.uint8)
        scales = torch.rand(dense.shape[1] // group, len(dense), 2, device=device, dtype=torch.bfloat16)
        packs = itertools.cycle([torch._convert_weight_to_int4pack(codes, 8).clone() for _ in range(num)])
        peers["_weight_int4pack_mm"] = lambda x, **_: torch._weight_int4pack_mm(x, next(packs), group, scales)
    if format == "int8" and device.type == "cuda":
        ints = torch.randint(-127, 128, dense.shape, device=device, dtype=torch.int8)
        scale, packs = torch.rand(len(dense), device=device, dtype=torch.bfloat16), [ints.clone() for _ in range(num)]
        turns = itertools.cycle(packs)
        peers["_weight_int8pack_mm"] = lambda x, **_: torch._weight_int8pack_mm(x, next(turns), scale)
    return peers


# --- experts and the head ------------------------------------------------------------------------------------


def experts(device: torch.device, R: int, E: int, k: int, D: int, W: int) -> Case:
    """A layer of experts: Qwen3-MoE's and Mixtral's shapes."""
    from kernels.grouped_gemm import grouped_experts
    from nanovlm.model.moe import EXPERTS

    def inputs():
        x, gate, up, down = draw(device, (R, D), (E, W, D), (E, W, D), (E, D, W))
        choice = torch.rand(R, E, device=device).topk(k).indices
        weights = torch.rand(R, k, device=device).to(x.dtype)
        matrices = {"gate": gate / D**0.5, "up": up / D**0.5, "down": down / W**0.5}
        return {"x": x, "choice": choice, "weights": weights, **matrices}

    return Case(
        "experts",
        {"tokens": R, "num_experts": E, "top_k": k, "hidden_size": D, "intermediate_size": W},
        inputs,
        grouped_experts,
        EXPERTS["loop"],
        {name: EXPERTS[name] for name in ("grouped", "loop")},
        flops=6 * R * k * D * W,
        num_bytes=2 * (3 * E * D * W + 2 * R * D),
        learns=("x", "weights", "gate", "up", "down"),
        uncaptured=("loop",),
    )


def head(device: torch.device, N: int, D: int, V: int) -> Case:
    """The output head with its loss, for large vocabularies."""
    from kernels.cross_entropy import linear_cross_entropy
    from nanovlm.objectives.losses import CROSS_ENTROPY

    def plain(hidden, weight, labels):
        logits = hidden @ weight.T
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")

    def liger(hidden, weight, labels):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, labels)

    def cce(hidden, weight, labels):
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, labels, reduction="sum")

    def inputs():
        hidden, weight = draw(device, (N, D), (V, D))
        return {"hidden": hidden, "weight": weight / D**0.5, "labels": torch.randint(0, V, (N,), device=device)}

    return Case(
        "cross_entropy",
        {"tokens": N, "hidden_size": D, "vocabulary": V},
        inputs,
        linear_cross_entropy,
        plain,
        {
            "torch in chunks": lambda hidden, weight, labels: CROSS_ENTROPY["torch"](
                hidden, weight, labels, hidden.dtype, None
            ),
            "torch compiled": torch.compile(plain, dynamic=False) if device.type == "cuda" else plain,
            "liger": liger,
            "cut cross-entropy": cce,
        },
        flops=2 * N * D * V,
        num_bytes=2 * (V * D + N * D),
        learns=("hidden", "weight"),
        uncaptured=("torch compiled", "liger", "cut cross-entropy"),
    )


SIZES = ((4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192))

# What makes a case, its shapes, and a small one.
FAMILIES = {
    "attention": (
        attention,
        [
            *((16384 // S, S, 32, 8, 128, True) for S in (4096, 1024, 16384)),
            (64, 1024, 12, 12, 64, False),
            (32, 1024, 16, 16, 72, False),
            (8, 4096, 15, 5, 64, True),
            (64, 256, 12, 12, 64, False),
        ],
        [(2, 33, 2, 1, 16, True), (2, 20, 2, 2, 24, False)],
    ),
    "packed": (packed, [(16384, 32, 8, 128), (16384, 15, 5, 64)], [(40, 2, 1, 16, 3)]),
    "decode": (
        decode,
        [(B, S, 32, 8, 128) for B, S in ((1, 4096), (16, 4096), (1, 32768), (16, 32768))],
        [(2, 40, 4, 2, 16)],
    ),
    "dequant_matmul": (
        dequantised,
        [(format, M, *size) for M in (1, 16, 4, 64, 512) for format in ("int4", "nf4", "int8") for size in SIZES],
        [(format, M, 64, 96, 32) for format in ("int4", "nf4", "int8") for M in (1, 3)],
    ),
    "experts": (
        experts,
        [(8192, 128, 8, 2048, 768), (8192, 8, 2, 4096, 14336), (16, 128, 8, 2048, 768)],
        [(9, 4, 2, 16, 24)],
    ),
    "cross_entropy": (head, [(8192, 2048, 151936), (8192, 960, 49280)], [(9, 16, 70)]),
}


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(KernelsConfig, description=__doc__)))
