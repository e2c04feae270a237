"""Speed of the mixture of experts: its backends, and the dense layer of the same active width.

    python benchmarks/moe.py                 print, and append to benchmarks/results/moe.jsonl

Forward and backward over random tokens, top 2. Every backend is first checked against the loop on the timed shape, in
the timed dtype: outputs and gradients no further from fp64 than twice the loop. Every line has the median of `repeats`
alternating runs.
"""

import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.speed import append_lines
from nanovlm import cli
from nanovlm.config import MoEConfig
from nanovlm.environment import describe_environment
from nanovlm.errors import UserError
from nanovlm.model.moe import EXPERTS, MLP, MoE

RESULTS = Path(__file__).resolve().parent / "results" / "moe.jsonl"


@dataclass(frozen=True)
class BenchmarkConfig:
    # Tokens.
    tokens: int = 4096
    # Width of the residual stream.
    hidden_size: int = 256
    # Width of one expert.
    intermediate_size: int = 256
    # Numbers of experts.
    num_experts: tuple[int, ...] = (4, 8, 32, 64)
    # Timed runs of each.
    repeats: int = 5
    # CPU threads; 0 for all.
    threads: int = 0
    # float32, or bfloat16 (on a GPU always).
    dtype: str = "float32"


def main(config: BenchmarkConfig):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    dtype = torch.bfloat16 if device.type == "cuda" else getattr(torch, config.dtype)
    lines = []
    for num_experts in tqdm(config.num_experts, unit="shape"):
        lines += time_shape(num_experts, config, device, dtype)
    environment = describe_environment(device, torch.get_num_threads(), str(dtype).removeprefix("torch."))
    append_lines(RESULTS, lines, environment)


def time_shape(num_experts: int, config: BenchmarkConfig, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """Check, then time every backend and the dense layer; return a line each."""
    torch.manual_seed(0)
    D, W, k = config.hidden_size, config.intermediate_size, 2
    settings = MoEConfig(num_experts=num_experts, num_experts_per_tok=k, intermediate_size=W)
    names = [name for name in EXPERTS if name != "triton" or device.type == "cuda"]
    layers = {name: MoE(dataclasses.replace(settings, experts=name), D) for name in names}
    first = layers["loop"]
    for parameter in first.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for layer in layers.values():
        layer.load_state_dict(first.state_dict())
        layer.to(device, dtype)
    x = torch.randn(1, config.tokens, D, device=device, dtype=dtype)
    choice = first.route(x[0]).choice
    check(layers, x, choice)
    layers["dense"] = MLP(D, k * W).to(device, dtype)
    seconds = {name: [] for name in layers}
    for _ in range(config.repeats + 1):
        for name, layer in layers.items():
            start = time.perf_counter()
            run(layer, x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    shape = {"num_experts": num_experts, "top_k": k, "tokens": config.tokens, "hidden_size": D, "intermediate_size": W}
    return [
        {
            "what": name,
            **shape,
            "milliseconds": round(1e3 * medians[name], 2),
            "tokens_per_second": round(config.tokens / medians[name]),
            "times_loop": round(medians["loop"] / medians[name], 2),
            "times_dense": round(medians["dense"] / medians[name], 2),
        }
        for name in layers
    ]


def run(layer, x):
    """Forward and backward; return the output and all gradients, and forget them."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    y.float().square().sum().backward()
    gradients = [x.grad] + [p.grad for p in layer.parameters()]
    layer.zero_grad()
    return [y.detach(), *gradients]


def check(layers: dict[str, MoE], x: torch.Tensor, choice: torch.Tensor):
    """Raise ValueError where a backend is further from the loop in fp64 than twice the loop in the timed dtype."""

    def outputs(name, dtype):
        layer = layers[name]
        inputs = x[0], torch.full(choice.shape, 0.5, device=x.device)
        inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        matrices = [w.detach().to(dtype).requires_grad_() for w in (layer.gate_proj, layer.up_proj, layer.down_proj)]
        y = EXPERTS[name](inputs[0], choice, inputs[1], *matrices)
        y.float().square().sum().backward() if dtype != torch.float64 else y.square().sum().backward()
        return [y.detach(), *(tensor.grad for tensor in (*inputs, *matrices))]

    exact = outputs("loop", torch.float64)
    loop = outputs("loop", x.dtype)
    for name in layers:
        for ours, theirs, truth in zip(outputs(name, x.dtype), loop, exact, strict=True):
            floor = 4 * torch.finfo(x.dtype).eps * truth.abs().max()
            if (ours - truth).abs().max() > 2 * (theirs - truth).abs().max() + floor:
                raise UserError(f"experts = {name!r} is wrong on this shape and is not timed")


if __name__ == "__main__":
    cli.run(lambda: main(tyro.cli(BenchmarkConfig, description=__doc__)))
