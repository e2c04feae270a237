"""Hidden states -> hidden states: the feed-forward layer, dense or as a mixture of experts.

```
x [R, D] --router--> choice [R, k], weights [R, k]
   |                          |
   +------dispatch: a copy of each token for each expert that it chose [R k, D]
                              |
                experts: SwiGLU, each over its own rows
                              |
   +------combine: the weighted sum of a token's k rows [R, D]
   + the shared expert, which sees every token
```

Tokens are dropped only by a capacity factor in training. A Routing holds what balancing and statistics need.
Legend: R tokens (all rows of the batch, end to end), D hidden, W width of an expert, E experts, k experts a token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanovlm.config import MoEConfig, pick
from nanovlm.errors import UserError
from nanovlm.model.joined import Joined, project


class MLP(nn.Module):
    """SwiGLU, or GEGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str = "silu"):
        super().__init__()
        self.act = pick(GATES, hidden_act, "decoder.hidden_act")
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.joined: Joined | None = None  # gate and up in one product, set by inference.prepare

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.joined, self.gate_proj, self.up_proj)
        return self.down_proj(self.act(gate, up))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    if not torch.is_grad_enabled():
        return F.silu(gate) * up
    return SwiGLU.apply(gate, up)  # pyright: ignore[reportReturnType]


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, of one shape, with the tanh form of GELU."""
    return F.gelu(gate, approximate="tanh") * up


class SwiGLU(torch.autograd.Function):
    """Keeps gate and up for the backward pass, which computes silu(gate) again: a third less memory, equal bits."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class Routing(NamedTuple):
    """What a router decided about R tokens."""

    # fp32[R, E], before softmax or sigmoid.
    logits: Tensor
    # fp32[R, E], shares that add up to 1 for each token.
    shares: Tensor
    # int64[R, k], the chosen experts, best first.
    choice: Tensor
    # fp32[R, k], the factors of their outputs.
    weights: Tensor
    # bool[R, k], False where an expert had no room for a token; its weight is then 0.
    is_kept: Tensor
    # fp32[E], the number of tokens that chose each expert, without padding.
    load: Tensor


class MoE(nn.Module):
    """Router, dispatch, experts, combine (Shazeer et al. 2017, arXiv 1701.06538)."""

    # fp32[E], if `balance` is bias.
    selection_bias: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int):
        super().__init__()
        self.config = config
        self.run_experts = pick(EXPERTS, config.experts, "decoder.moe.experts")
        if config.has_bias:
            self.run_experts = experts_biased
        E, W, D = config.num_experts, config.intermediate_size, hidden_size
        self.router = nn.Linear(D, E, bias=config.has_bias)
        self.gate_proj = nn.Parameter(torch.empty(E, W, D))
        self.up_proj = nn.Parameter(torch.empty(E, W, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, W))
        if config.has_bias:
            self.gate_bias, self.up_bias = (nn.Parameter(torch.empty(E, W)) for _ in range(2))
            self.down_bias = nn.Parameter(torch.empty(E, D))
        self.shared = MLP(D, config.num_shared_experts * W) if config.num_shared_experts else None
        if config.balance == "bias":
            self.register_buffer("selection_bias", torch.zeros(E))

    def forward(self, x: Tensor, is_token: Tensor | None = None) -> tuple[Tensor, Routing]:
        """[B, T, D] -> [B, T, D] and the routing; padding (`is_token` bool[B, T] is False) is not counted."""
        x_RD = x.flatten(0, 1)
        routing = self.route(x_RD, None if is_token is None else is_token.flatten())
        weights = routing.weights.to(x.dtype)
        y_RD = self.run(x_RD, routing.choice, weights)
        if self.shared is not None:
            y_RD = y_RD + self.shared(x_RD)
        return y_RD.view_as(x), routing

    def run(self, x: Tensor, choice: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of what each token's experts compute (see EXPERTS)."""
        return self.run_experts(x, choice, weights, self.gate_proj, self.up_proj, self.down_proj, *self.biases())

    def biases(self) -> tuple[Any, ...]:
        """Return what `experts_biased` takes behind the matrices; nothing for experts without biases."""
        c = self.config
        return (self.gate_bias, self.up_bias, self.down_bias, c.swiglu_limit) if c.has_bias else ()

    def route(self, x: Tensor, is_token: Tensor | None = None) -> Routing:
        """Choose k experts for each of x [R, D], in fp32; ties go to the expert with the lower index."""
        c = self.config
        if is_token is None:
            is_token = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        x = x.float()
        if self.training and c.jitter:
            x = x * torch.empty_like(x).uniform_(1 - c.jitter, 1 + c.jitter)
        with torch.autocast(x.device.type, enabled=False):
            bias = self.router.bias
            logits = F.linear(x, self.router.weight.float(), None if bias is None else bias.float())
        scores = logits.softmax(-1) if c.scores == "softmax" else logits.sigmoid()
        ranked = scores + self.selection_bias if c.balance == "bias" else scores
        choice = ranked.sort(dim=-1, descending=True, stable=True).indices[:, : c.num_experts_per_tok]
        weights = scores.gather(-1, choice)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * c.routed_scaling_factor
        # Only in training: in generation the capacity would depend on how many tokens are passed at once.
        has_capacity = self.training and c.capacity_factor
        is_kept = fits_capacity(choice, is_token, c) if has_capacity else torch.ones_like(choice, dtype=torch.bool)
        shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        return Routing(logits, shares, choice, weights * is_kept, is_kept, expert_load(choice, is_token, c.num_experts))

    @torch.no_grad()
    def update_bias(self, load: Tensor):
        """Make experts with less than the mean load [E] likelier to be chosen (Wang et al. 2024, arXiv 2408.15664).

        A frozen router keeps its choice.
        """
        if self.router.weight.requires_grad:
            self.selection_bias += self.config.bias_rate * (load.mean() - load).sign()


def expert_load(choice: Tensor, is_token: Tensor, num_experts: int) -> Tensor:
    """Count the tokens of each expert, fp32[E], where `is_token` bool[R] is True; choice int64[R, k]."""
    chosen = choice[..., None] == torch.arange(num_experts, device=choice.device)
    return (chosen & is_token[:, None, None]).sum((0, 1), dtype=torch.float32)


def fits_capacity(choice: Tensor, is_token: Tensor, config: MoEConfig) -> Tensor:
    """bool[R, k]: whether an expert has room for a token; first choices go before second, earlier tokens before later.

    An expert has room for capacity_factor times its fair share of the tokens (GShard, arXiv 2006.16668).
    """
    R, k = choice.shape
    # In order of precedence; padding goes to an extra expert, the last one.
    expert = torch.where(is_token, choice.T, config.num_experts).flatten()
    order = expert.argsort(stable=True)
    sizes = expert.new_zeros(config.num_experts + 1).scatter_add_(0, expert, torch.ones_like(expert))
    place = torch.empty_like(expert)  # 1, 2, ... among the rows of the same expert
    place[order] = torch.arange(1, k * R + 1, device=expert.device) - (sizes.cumsum(0) - sizes)[expert[order]]
    fits = place <= config.capacity_factor * is_token.sum() * k / config.num_experts
    return (fits | (expert == config.num_experts)).view(k, R).T


# A backend computes sum over j of weights[:, j] * expert(choice[:, j])(x):
# (x [R, D], choice int64[R, k], weights [R, k], gate [E, W, D], up [E, W, D], down [E, D, W]) -> [R, D].


def experts_loop(x: Tensor, choice: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One expert after the other: the reference."""
    y = torch.zeros_like(x)
    for e in range(len(gate)):
        row, place = (choice == e).nonzero(as_tuple=True)
        h = swiglu(x[row] @ gate[e].T, x[row] @ up[e].T)
        y = y.index_add(0, row, (weights[row, place, None] * (h @ down[e].T)).to(y.dtype))
    return y


def experts_biased(
    x: Tensor, choice: Tensor, weights: Tensor, gate: Sequence[Tensor] | Tensor, up: Sequence[Tensor] | Tensor,
    down: Sequence[Tensor] | Tensor, gate_bias: Tensor, up_bias: Tensor, down_bias: Tensor, limit: float,
) -> Tensor:  # fmt: skip
    """Do what `experts_loop` does for experts with biases [E, out] and a clamped gate (gpt-oss, arXiv 2508.10925)."""
    y = torch.zeros_like(x)
    for e in range(len(gate)):
        row, place = (choice == e).nonzero(as_tuple=True)
        g = F.linear(x[row], gate[e], gate_bias[e]).clamp(max=limit)
        u = F.linear(x[row], up[e], up_bias[e]).clamp(-limit, limit)
        out = F.linear(g * (1.702 * g).sigmoid() * (u + 1), down[e], down_bias[e])
        y = y.index_add(0, row, (weights[row, place, None] * out).to(y.dtype))
    return y


def experts_grouped(x: Tensor, choice: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sort rows by expert and use torch's grouped matrix product; row counts stay on the device."""
    dtype, k = product_dtype(x), choice.shape[1]
    order = choice.flatten().argsort(stable=True)
    place = order.argsort()
    ends = (choice.flatten()[:, None] == torch.arange(len(gate), device=x.device)).sum(0).cumsum(0, dtype=torch.int32)
    gate, up, down = (w.to(dtype).mT for w in (gate, up, down))
    rows = Permute.apply(x.to(dtype).repeat_interleave(k, dim=0), order, place)
    h = swiglu(F.grouped_mm(rows, gate, offs=ends), F.grouped_mm(rows, up, offs=ends))
    out = Permute.apply(F.grouped_mm(h, down, offs=ends), place, order)
    return (weights[..., None] * out.unflatten(0, (-1, k))).sum(1).to(x.dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype if it is on, else that of x."""
    # In bf16 the CPU compiles a product for every new number of rows: 3.7 ms each, 0.5 in fp32 (2026-11-22).
    uses_autocast = x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)
    return torch.get_autocast_dtype(x.device.type) if uses_autocast else x.dtype


class Permute(torch.autograd.Function):
    """x[order] for a permutation, whose gradient is grad[inverse] and needs no indexed sum."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None


def experts_triton(x: Tensor, choice: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Our own kernels, which make no sorted copy of x nor casts of fp32 experts, and always add in the same order."""
    try:
        from nanovlm.kernels.grouped_gemm import grouped_experts
    except ImportError as error:
        raise UserError(f"decoder.moe.experts = 'triton' needs the package triton: {error}") from error
    dtype = product_dtype(x)
    gate, up, down = (w if w.dtype == torch.float32 else w.to(dtype) for w in (gate, up, down))
    return grouped_experts(x.to(dtype), choice, weights, gate, up, down).to(x.dtype)


GATES = {"silu": swiglu, "gelu_tanh": geglu}
EXPERTS = {"loop": experts_loop, "grouped": experts_grouped, "triton": experts_triton}
