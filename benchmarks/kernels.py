"""Every kernel on shapes of real models against what torch and others offer for them, on a GPU.

    python benchmarks/kernels.py                          all, in about eight minutes
    python benchmarks/kernels.py --only attention cross_entropy --minutes 20
    python benchmarks/kernels.py --blocks attention_before.py
    python benchmarks/kernels.py --tiny                   does all of it run? small shapes, interpreted where there
                                                          is no GPU, and nothing is written

Each family has a process of its own, so that an error after which a process cannot use the GPU ends with it, and a
share of the time; the most telling shapes come first. What time was left over goes to the families that had more to do,
and a last line of each says what was left out.

A result is checked on the timed shape before it is timed, with the rule of tests/kernels/oracle.py: outputs and
gradients against fp64, or on the largest part of the shape that fits into memory; `checked` says which. Inputs are
random and taken in turn from so many copies that they do not stay in the L2 cache, in one CUDA graph, or without where
something cannot be captured (`no_graph`). Forward is as in training, where there is a backward pass, whose time is what
both take less forward. A line of benchmarks/results/kernels.jsonl has the milliseconds, TFLOP/s, GB/s, both as shares
of a matrix product and of a copy timed at the beginning of the same process, and for each peer its time over ours:
above 1 we are faster. What a peer cannot do is said in its place. Masks are made beforehand and timed apart
(`masks_ms`).

`--blocks` takes another table of attention's block sizes, BLOCKS as JSON, or a whole kernels/attention.py of another
commit (`git show COMMIT:kernels/attention.py > attention_before.py`), and times it as a peer.
"""

import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import arguments
from nanovlm import cli
from nanovlm.config import pick
from nanovlm.environment import describe_environment, find_device
from nanovlm.errors import UserError

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.jsonl"
L2_BYTES = 200e6  # several times the cache of any GPU here
START_S = 15  # a process that begins with less time left measures nothing
GRACE_S = 60  # a shape that is begun in time may take so much longer


@dataclass(frozen=True)
class KernelsConfig:
    # Families to time, the keys of FAMILIES; none for all.
    only: tuple[str, ...] = ()
    # No new shape is begun after so many minutes.
    minutes: float = 8.0
    # Small shapes, and nothing written but to --out.
    tiny: bool = False
    # Block sizes of attention to compare with: a JSON file, or a kernels/attention.py.
    blocks: str = ""
    # File to append the results to.
    out: str = ""
    # Set by the benchmark itself: time shapes of this one family, from which on, for how long.
    family: str = ""
    first: int = 0
    seconds: float = 0.0


@dataclass
class Case:
    """One shape. Functions take the tensors of `inputs()` by name; `learns` names those that get a gradient."""

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
    # Make smaller inputs for the check where fp64 would not fit; tried in order, by what they leave.
    cuts: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = field(default_factory=dict)
    # Peers that wait for the device or compile, and so cannot be captured.
    uncaptured: tuple[str, ...] = ()
    # What makes a mask, by whose it is.
    masks: dict[str, Callable[[], object]] = field(default_factory=dict)
    # Makes `ours` of another version of kernels/attention.py.
    of_module: Callable[[types.ModuleType], Callable[..., Tensor]] | None = None


def main(config: KernelsConfig):
    if config.family:
        return time_family(config)
    device = find_device("auto")
    if device.type == "cpu" and not config.tiny:
        raise UserError("there is no GPU here, so there is nothing to time; --tiny runs small shapes all the same")
    for name in config.only:
        pick(FAMILIES, name, "only")
    if not config.out:
        config = replace(config, out=os.devnull if config.tiny else str(RESULTS))
    end = time.monotonic() + 60 * config.minutes
    left = dict.fromkeys([name for name in FAMILIES if name in (config.only or FAMILIES)], 0)  # the next shape of each
    while left and end - time.monotonic() > START_S:
        turn = list(left)
        for i, name in enumerate(turn):
            seconds = end - time.monotonic()
            if seconds < START_S:
                break
            left[name] = run_family(config, name, left[name], seconds * share(name) / sum(map(share, turn[i:])))
            if left[name] == len(shapes_of(name, config)):
                del left[name]
    for name, first in left.items():
        report(config.out, {"kernel": name, "left_out": shapes_of(name, config)[first:]})


def share(name: str) -> float:
    return FAMILIES[name][3]


def shapes_of(name: str, config: KernelsConfig) -> list[tuple]:
    _, shapes, tiny, _ = FAMILIES[name]
    return tiny if config.tiny else shapes


def report(out: str, line: dict):
    """Print a line and append it to the results."""
    text = json.dumps(line)
    print(text, flush=True)
    with open(out, "a") as file:
        file.write(text + "\n")


def run_family(config: KernelsConfig, name: str, first: int, seconds: float) -> int:
    """Time shapes of a family in a process of its own; return which shape comes next.

    A process that ends early, or does not end, has its last shape reported as not timed.
    """
    given = json.dumps(asdict(replace(config, family=name, first=first, seconds=seconds)))
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        command = [sys.executable, __file__, "--json", given]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        begun, ended = first, False
        stopped = threading.Timer(seconds + GRACE_S, worker.kill)
        stopped.start()
        for text in worker.stdout:
            line = json.loads(text)
            begun, ended = line.get("begun", begun), line.get("ended", False)
            if "begun" not in line:
                print(text, end="", flush=True)
        status = worker.wait()
        stopped.cancel()
        if status == 0 and ended:
            return begun
        log.seek(0)
        last = (log.read().strip().splitlines() or ["it printed no error"])[-1]
    why = f"the process ended with {status}: {last[:300]}"
    report(config.out, {"kernel": name, "arguments": shapes_of(name, config)[begun], "result": f"not timed: {why}"})
    return begun + 1


# --- in the process of a family -------------------------------------------------------------------------------


def time_family(config: KernelsConfig):
    """Time shapes from `first` on, one at least, until `seconds` are over; print the index of each before it begins."""
    end, device = time.monotonic() + config.seconds, find_device("auto")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        importlib.import_module("tests.kernels.interpreter")
    else:
        torch._dynamo.config.recompile_limit = 64  # what is compiled holds for one shape
        # The processes that it compiles in would outlive this one where it is killed.
        importlib.import_module("torch._inductor.config").compile_threads = 1
    torch.manual_seed(0)
    before = load_attention(Path(config.blocks)) if config.blocks else None
    ceilings = measure_ceilings(device, config.tiny)
    environment = describe_environment(device, torch.get_num_threads()) | ceilings
    make, shapes = FAMILIES[config.family][0], shapes_of(config.family, config)
    comes_next = config.first
    while comes_next < len(shapes) and (comes_next == config.first or time.monotonic() < end):
        print(json.dumps({"begun": comes_next}), flush=True)
        case = make(device, *shapes[comes_next])
        if before and case.of_module:
            case.peers[f"blocks of {Path(config.blocks).name}"] = case.of_module(before)
        for line in time_case(case, device, ceilings):
            report(config.out, environment | line)
        comes_next += 1
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises where an error has cut this process off: another goes on
            torch.cuda.empty_cache()
    print(json.dumps({"begun": comes_next, "ended": True}), flush=True)


def load_attention(path: Path) -> types.ModuleType:
    """Load another kernels/attention.py, or ours a second time with the table of block sizes of a JSON file.

    Its operators have names of their own: under ours they would take the place of what is compared with them.
    """
    from nanovlm.kernels import register

    operator = register.operator
    ours = Path(__file__).resolve().parent.parent / "kernels" / "attention.py"
    spec = importlib.util.spec_from_file_location("attention_before", path if path.suffix == ".py" else ours)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with mock.patch.object(register, "operator", lambda name, fake: operator(f"{name}_before", fake)):
        spec.loader.exec_module(module)
    if path.suffix != ".py":
        module.BLOCKS = read_table(json.loads(path.read_text()))
    return module


def read_table(value):
    """Turn JSON into a table as Python has it: numbers that are keys, tuples."""
    if isinstance(value, dict):
        return {int(key) if key.isdigit() else key: read_table(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def measure_ceilings(device: torch.device, tiny: bool) -> dict:
    """Time a bf16 matrix product and a copy: what the machine gives today."""
    size, num = (256, 2**20) if tiny else (8192, 2**29)
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    source = torch.randn(num, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    product = time_call(lambda **_: a @ b, [{}], device)
    copy = time_call(lambda **_: target.copy_(source), [{}], device)
    rates = {"matmul_tflops": 2 * size**3 / product / 1e9, "copy_gbs": 4 * num / copy / 1e6}
    return {name: float(f"{rate:.4g}") for name, rate in rates.items()}


def time_case(case: Case, device: torch.device, ceilings: dict) -> Iterator[dict]:
    """Check a case, then time it: a line for forward and, where it learns, for backward and for both."""
    inputs = case.inputs()
    names = ("forward", "backward", "forward and backward") if case.learns else ("forward",)
    wrong, checked = check_case(case, inputs)
    if not wrong:
        size = sum(x.numel() * x.element_size() for x in inputs.values())
        num_more = min(31, math.ceil(L2_BYTES / max(1, size))) if device.type == "cuda" else 0
        copies = [inputs, *(case.inputs() for _ in range(num_more))]
        ours = time_passes(case.ours, case.learns, copies, device)
        wrong = ours if isinstance(ours, str) else ""
    if wrong:
        yield {"kernel": case.kernel, **case.shape, "checked": checked, "result": f"not timed: {wrong}"}
        return
    peers = {
        name: time_passes(peer, case.learns, copies, device, name not in case.uncaptured)
        for name, peer in case.peers.items()
    }
    masks = {name: time_passes(make, (), [{}], device, captured=False) for name, make in case.masks.items()}
    masks = {name: ms if isinstance(ms, str) else round(ms["forward"], 4) for name, ms in masks.items()}
    for name in names:
        # Backward, matrix products have twice the operations, attention 2.5 times as it computes scores again.
        back = 2.5 if case.kernel.startswith("attention") else 2
        factor = {"forward": 1, "backward": back, "forward and backward": 1 + back}[name]
        tflops, gbs = factor * case.flops / ours[name] / 1e9, case.num_bytes / ours[name] / 1e6
        line = {"kernel": case.kernel, **case.shape, "pass": name, "checked": checked, "ms": round(ours[name], 4)}
        line |= {"tflops": round(tflops, 1), "of_matmul": round(tflops / ceilings["matmul_tflops"], 3)}
        if name == "forward":
            line |= {"gbs": round(gbs, 1), "of_copy": round(gbs / ceilings["copy_gbs"], 3)}
        line["peer_over_ours"] = {
            peer: ms if isinstance(ms, str) else round(ms[name] / ours[name], 3) for peer, ms in peers.items()
        }
        yield line | {"no_graph": list(case.uncaptured)} | ({"masks_ms": masks} if masks else {})


def time_passes(
    function: Callable, learns: tuple[str, ...], copies: list[dict], device: torch.device, captured: bool = True
) -> dict[str, float] | str:
    """Return the milliseconds of each pass, or what was raised instead: the limits of a peer are a result."""
    try:
        ms = {"forward": time_call(with_passes(function, learns, backward=False), copies, device, captured)}
        if learns:
            both = time_call(with_passes(function, learns, backward=True), copies, device, captured)
            ms |= {"backward": max(both - ms["forward"], 1e-6), "forward and backward": both}
        return ms
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def check_case(case: Case, inputs: dict[str, Tensor]) -> tuple[str, str]:
    """Return what is wrong with our result on these inputs, or nothing, and how much of them was looked at."""
    for checked, cut in ({"all": lambda inputs: inputs} | case.cuts).items():
        try:
            check_part(case, cut(inputs))
            return "", checked
        except torch.OutOfMemoryError:
            pass
        except Exception as error:  # a kernel that cannot be launched on this shape is one that is wrong on it
            return f"{type(error).__name__}: {str(error)[:300]}", checked
        torch.cuda.empty_cache()
    return "fp64 did not fit into memory", "nothing"


def check_part(case: Case, inputs: dict[str, Tensor]):
    """Raise AssertionError where our result on these inputs is wrong."""
    from tests.kernels.oracle import check, check_gradients

    fixed = {name: x for name, x in inputs.items() if name not in case.learns}
    learning = {name: x for name, x in inputs.items() if name in case.learns}

    def exact(**tensors):
        return case.plain(**{n: x.double() if x.is_floating_point() else x for n, x in (fixed | tensors).items()})

    if not learning:
        check(case.ours(**fixed), case.plain(**fixed), exact)
        return
    with torch.no_grad():
        gradient = torch.randn_like(case.ours(**inputs))
    functions = (functools.partial(case.ours, **fixed), functools.partial(case.plain, **fixed), exact)
    check_gradients(*functions, learning, gradient)


def with_passes(function: Callable[..., Tensor], learns: tuple[str, ...], backward: bool) -> Callable[..., object]:
    """Return a function that goes forward, as in training if something learns, and then back to what learns."""

    def run(**inputs):
        leaves = {name: inputs[name].detach().requires_grad_() for name in learns}
        with torch.set_grad_enabled(bool(learns)):
            out = function(**inputs | leaves)
        return torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out)) if backward else out

    return run


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
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)  # which has made the inputs
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles
            all_copies()
    current.wait_stream(stream)
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


@functools.cache
def compile_flex(on_gpu: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention


def flex(mask, device: torch.device):
    attend = compile_flex(device.type == "cuda")

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return run


def cut_heads(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep the first row and the query heads of the first key/value head."""
    group = inputs["q"].shape[2] // inputs["k"].shape[2]
    return {name: x[:1, :, : group if name == "q" else 1] for name, x in inputs.items()}


def cut_to_one_head(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x[:1, :, :1] for name, x in inputs.items()}


HEADS = {"one row, one key/value head": cut_heads, "one row, one head": cut_to_one_head}


def attention(device: torch.device, B: int, S: int, N: int, K: int, H: int, causal: bool) -> Case:
    """Causal, as a decoder attends in training, and full, as a vision encoder does."""
    from torch.nn.attention.flex_attention import create_block_mask

    from nanovlm.kernels import attention as kernel

    def of_module(module):
        return lambda q, k, v: module.attention(q, k, v, causal=causal)[0]

    def make_mask():
        return create_block_mask(lambda b, n, t, s: s <= t, None, None, S, S, device=device)

    mask = make_mask() if causal else None
    backends = {name: sdpa(backend, causal) for name, backend in BACKENDS.items() if name != "sdpa math"}
    peers = {"sdpa": sdpa(None, causal)} if device.type == "cpu" else backends | {"flex": flex(mask, device)}
    pairs = S * (S + 1) / 2 if causal else S * S
    return Case(
        "attention, causal" if causal else "attention, full",
        {"rows": B, "tokens": S, "heads": N, "kv_heads": K, "head_dim": H},
        lambda: dict(zip("qkv", draw(device, (B, S, N, H), (B, S, K, H), (B, S, K, H)), strict=True)),
        of_module(kernel),
        sdpa(SDPBackend.MATH, causal),
        peers,
        flops=4 * B * N * H * pairs,
        num_bytes=2 * B * S * H * (2 * N + 2 * K),
        learns=("q", "k", "v"),
        cuts=HEADS,
        masks={"flex": make_mask} if causal and device.type == "cuda" else {},
        of_module=of_module,
    )


def packed(device: torch.device, T: int, N: int, K: int, H: int, least: int = 16) -> Case:
    """Documents of all lengths in one row, which do not see each other."""
    from torch.nn.attention.flex_attention import create_block_mask

    from nanovlm.kernels import attention as kernel
    from nanovlm.model.attention import make_dense_mask

    lengths = draw_lengths(T, least, T // 4)
    doc_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].int().to(device)
    branch_ids = torch.zeros_like(doc_ids)
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)
    dense, runs = make_dense_mask(doc_ids, branch_ids), kernel.find_runs(doc_ids, branch_ids)

    def visible(b, _n, t, s):
        return (doc_ids[0, t] == doc_ids[0, s]) & (s <= t)

    def make_block_mask(make=create_block_mask):
        return make(visible, None, None, T, T, device=device)

    def of_module(module):
        return lambda q, k, v: module.attention(q, k, v, module.Runs(*runs[:6]))[0]

    def run_varlen(q, k, v):
        from torch.nn.attention.varlen import varlen_attn

        names = inspect.signature(varlen_attn).parameters
        options = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
        if "enable_gqa" in names:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(N // K, dim=2) for x in (k, v))
        return varlen_attn(q[0], k[0], v[0], ends, ends, max(lengths), max(lengths), **options)[None]

    peers = {"flex": flex(make_block_mask(), device), "sdpa with a mask": sdpa(None, mask=dense)}
    masks = {
        "ours": lambda: kernel.find_runs(doc_ids, branch_ids),
        "flex": make_block_mask,
        "sdpa": lambda: make_dense_mask(doc_ids, branch_ids),
    }
    if device.type == "cuda":
        compiled = torch.compile(create_block_mask)
        masks["flex, compiled"] = lambda: make_block_mask(compiled)
    return Case(
        "attention, packed",
        {"tokens": T, "documents": len(lengths), "heads": N, "kv_heads": K, "head_dim": H},
        lambda: dict(zip("qkv", draw(device, (1, T, N, H), (1, T, K, H), (1, T, K, H)), strict=True)),
        of_module(kernel),
        sdpa(SDPBackend.MATH, mask=dense),
        peers | ({"varlen_attn": run_varlen} if device.type == "cuda" else {}),
        flops=4 * N * H * sum(n * (n + 1) / 2 for n in lengths),
        num_bytes=2 * T * H * (2 * N + 2 * K),
        learns=("q", "k", "v"),
        cuts=HEADS,
        masks=masks,
        of_module=of_module,
    )


def draw_lengths(total: int, least: int, most: int) -> list[int]:
    """Draw lengths of documents from a Zipf distribution until they fill a row."""
    lengths, weights = [], 1 / torch.arange(least, most + 1).float()
    while sum(lengths) < total:
        lengths.append(min(least + int(torch.multinomial(weights, 1)), total - sum(lengths)))
    return lengths


def decode(device: torch.device, B: int, S: int, T: int, N: int, K: int, H: int, shared: int = 0) -> Case:
    """T new tokens a row over a cache with its blocks in no order; the first `shared` slots are common to all rows."""
    from nanovlm.kernels.cache_attention import attend_blocks, attend_blocks_ref

    num, own = math.ceil(S / 16), math.ceil(S / 16) - shared // 16  # blocks
    order = torch.randperm(B * num, device=device, dtype=torch.int32)
    table = torch.cat([order[: num - own].expand(B, -1), order[num - own :][: B * own].view(B, own)], 1)
    last = torch.arange(S - T, S, device=device).repeat(B, 1)
    mask = torch.arange(S, device=device) <= last[0, :, None]

    def run_gathered(q, keys, values):
        k, v = (x.unflatten(0, (-1, 16))[table[: len(q)]].flatten(1, 2)[:, :S] for x in (keys, values))
        return sdpa(mask=mask if T > 1 else None)(q, k, v)

    def run_neighbours(q, keys, values):
        k, v = (x.unflatten(0, (B, -1))[:, :S] for x in (keys, values))
        return sdpa(mask=mask if T > 1 else None)(q, k, v)

    return Case(
        "attention, decode",
        {"rows": B, "slots": S, "tokens": T, "heads": N, "kv_heads": K, "head_dim": H, "shared": shared},
        lambda: dict(
            zip(
                ("q", "keys", "values"),
                draw(device, (B, T, N, H), (B * num * 16, K, H), (B * num * 16, K, H)),
                strict=True,
            )
        ),
        lambda q, keys, values: attend_blocks(q, keys, values, table[: len(q)], last[: len(q)]),
        lambda q, keys, values: attend_blocks_ref(q, keys, values, table[: len(q)], last[: len(q)]),
        {"sdpa, gathered": run_gathered, "sdpa, neighbouring slots": run_neighbours},
        flops=4 * B * T * N * S * H,
        num_bytes=4 * (shared + B * (S - shared)) * K * H,
        cuts={
            "one row, one key/value head": lambda inputs: {
                "q": inputs["q"][:1, :, : N // K],
                **{name: inputs[name][:, :1] for name in ("keys", "values")},
            }
        },
    )


# --- quantised weights ---------------------------------------------------------------------------------------


def dequantised(device: torch.device, format: str, M: int, N: int, K: int, group: int = 128) -> Case:
    """A linear layer of which the weight has 8 or 4 bits; above 1 against bf16 is what quantising gains."""
    from nanovlm.kernels.dequant_matmul import dequant_matmul

    w, dense, peers = make_weight(device, format, N, K, group)
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
        dict(peers),
        flops=2 * M * N * K,
        num_bytes=size + 2 * M * (N + K),
    )


@functools.lru_cache(maxsize=1)
def make_weight(device: torch.device, format: str, N: int, K: int, group: int):
    """Return a weight in few bits, the same written out, and the peers, which keep copies of theirs."""
    from nanovlm.kernels.quantized_weight import dequantize_ref
    from nanovlm.model.quantized import quantize_weight

    w = quantize_weight(torch.randn(N, K, device=device) / K**0.5, format, group, search=False)
    dense = dequantize_ref(w)
    return w, dense, dequantised_peers(format, dense, group, device)


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
    from nanovlm.kernels.grouped_gemm import grouped_experts
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
        cuts={"an eighth of the intermediate columns": cut_width},
        uncaptured=("loop",),
    )


def cut_width(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    width = max(16, inputs["gate"].shape[1] // 8)
    narrow = {name: inputs[name][:, :width].contiguous() for name in ("gate", "up")}
    return inputs | narrow | {"down": inputs["down"][:, :, :width].contiguous()}


def head(device: torch.device, N: int, D: int, V: int) -> Case:
    """The output head with its loss, for large vocabularies."""
    from nanovlm.kernels.cross_entropy import linear_cross_entropy
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
            )[0],
            "torch compiled": torch.compile(plain, dynamic=False) if device.type == "cuda" else plain,
            "liger": liger,
            "cut cross-entropy": cce,
        },
        flops=2 * N * D * V,
        num_bytes=2 * (V * D + N * D),
        learns=("hidden", "weight"),
        cuts={
            f"{num} tokens": lambda inputs, num=num: inputs | {x: inputs[x][:num] for x in ("hidden", "labels")}
            for num in (2500, 600)
        },
        uncaptured=("torch compiled", "liger", "cut cross-entropy"),
    )


FORMATS = ("int4", "nf4", "int8")
SIZES = ((8192, 8192), (28672, 8192), (4096, 4096), (14336, 4096))

# What makes a case, its shapes, small ones, and its share of the time.
FAMILIES = {
    "decode": (
        decode,
        [
            *((B, S, 1, 32, 8, 128) for B, S in ((16, 4096), (16, 32768), (1, 32768), (1, 4096))),
            (16, 4096, 1, 32, 8, 128, 3584),
            (16, 4096, 5, 32, 8, 128),
            (1, 4096, 512, 32, 8, 128),
        ],
        [(2, 40, 1, 4, 2, 16), (2, 40, 3, 4, 2, 16, 32)],
        1,
    ),
    "dequant_matmul": (
        dequantised,
        [
            (format, M, *size)
            for sizes, Ms in ((SIZES[:1], (1, 16, 64, 256)), (SIZES[1:], (1, 16, 64, 256)), (SIZES, (4, 512)))
            for size in sizes
            for format in FORMATS
            for M in Ms
        ],
        [(format, M, 64, 96, 32) for format in FORMATS for M in (1, 3)],
        3,
    ),
    "packed": (packed, [(16384, 32, 8, 128), (16384, 15, 5, 64)], [(40, 2, 1, 16, 3)], 2),
    "attention": (
        attention,
        [
            (4, 4096, 32, 8, 128, True),
            (32, 1024, 16, 16, 72, False),
            (1, 16384, 32, 8, 128, True),
            (64, 1024, 12, 12, 64, False),
            (8, 4096, 15, 5, 64, True),
            (16, 1024, 32, 8, 128, True),
            (64, 256, 12, 12, 64, False),
        ],
        [(2, 33, 2, 1, 16, True), (2, 20, 2, 2, 24, False)],
        5,
    ),
    "cross_entropy": (head, [(8192, 2048, 151936), (8192, 960, 49280)], [(9, 16, 70)], 2),
    "experts": (
        experts,
        [(8192, 128, 8, 2048, 768), (8192, 8, 2, 4096, 14336), (16, 128, 8, 2048, 768)],
        [(9, 4, 2, 16, 24)],
        2,
    ),
}


if __name__ == "__main__":
    cli.run(lambda: main(arguments.read(KernelsConfig, __doc__)))
