"""Parameter groups, optimizers and the schedule."""

import dataclasses
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nanovlm.config import AdapterConfig, OptimConfig, ParamRule
from nanovlm.errors import UserError
from nanovlm.model.adapters import learns
from nanovlm.train.adamw import AdamW, local_part

# Scales, gates, sinks and biases of experts, which decay would draw to numbers that mean nothing, and single tokens: no
# matrices for Muon, even where several are stacked.
ALWAYS_ADAMW = re.compile(
    r"\.magnitude$|_gate$|layer_scale\d$|^logit_(scale|bias)$|class_embedding$|registers$|\.probe$"
    r"|\.(latents|queries)(\.weight)?$|newline$|\.sinks$|\.(gate|up|down)_bias$"
)


def assign_rules(
    model: nn.Module, config: OptimConfig, adapter: AdapterConfig = AdapterConfig()
) -> dict[ParamRule, list[nn.Parameter]]:
    """Give every parameter to the first rule whose pattern its name contains; freeze where lr_scale is None.

    With adapters, all else is frozen but what `adapter.train` names. What ALWAYS_ADAMW names never is Muon's and does
    not decay, nor is a vector.

    `freeze` and `lr_scales` of the config change the lr_scale of the rules that are returned. Raises UserError for a
    parameter without a rule, and for a pattern without a parameter.
    """
    groups, used = {}, set()
    for name, parameter in model.named_parameters():
        rule = next((rule for rule in config.rules if re.search(rule.pattern, name)), None)
        if rule is None:
            raise UserError(f"no rule of optim.rules matches the parameter {name}")
        if ALWAYS_ADAMW.search(name) or (rule.optimizer == "muon" and parameter.ndim < 2):
            rule = dataclasses.replace(rule, optimizer="adamw", weight_decay=0.0)
        frozen = [pattern for pattern in config.freeze if re.search(pattern, name)]
        scaled = [(pattern, scale) for pattern, scale in config.lr_scales if re.search(pattern, name)][:1]
        used |= {("rules", rule.pattern), *(("freeze", p) for p in frozen), *(("lr_scales", p) for p, _ in scaled)}
        if frozen or not learns(name, adapter):
            rule = dataclasses.replace(rule, lr_scale=None)
        elif scaled and rule.lr_scale is not None:
            rule = dataclasses.replace(rule, lr_scale=rule.lr_scale * scaled[0][1])
        parameter.requires_grad_(rule.lr_scale is not None)
        groups.setdefault(rule, []).append(parameter)
    given = [("rules", rule.pattern) for rule in config.rules] + [("freeze", pattern) for pattern in config.freeze]
    for field, pattern in given + [("lr_scales", pattern) for pattern, _ in config.lr_scales]:
        if (field, pattern) not in used:
            raise UserError(f"optim.{field} has a pattern {pattern!r} that holds for no parameter")
    return groups


def make_optimizers(
    model: nn.Module,
    config: OptimConfig,
    precision: str = "bf16",
    adapter: AdapterConfig = AdapterConfig(),
    state: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers that have parameters, by name. Raises UserError as `assign_rules` does.

    Parameters in the `state` of an objective learn too, by AdamW at optim.lr, whatever the rules say.
    `precision` is that of the run. Muon multiplies in bf16, except in an fp32 run on a CPU: without bf16 instructions
    that would take twenty times as long. Setting an optimizer's `found_inf` to a tensor of 1 makes it skip a step
    without waiting for the device.
    """
    rules = assign_rules(model, config, adapter)

    def of(optimizer):
        groups = []
        for rule, parameters in rules.items():
            if rule.optimizer == optimizer and rule.lr_scale is not None:
                by_mesh = {}  # parameters of different meshes need different groups
                for parameter in parameters:
                    by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
                settings = {"lr_scale": rule.lr_scale, "weight_decay": rule.weight_decay}
                groups += [{"params": parameters, **settings} for parameters in by_mesh.values()]
        return groups

    optimizers = {}
    adamw = of("adamw")
    if beside := {name: x for name, x in state.items() if isinstance(x, nn.Parameter)}:
        named = {"params": list(beside.values()), "names": [f"objective.{name}" for name in beside]}
        adamw.append(named | {"lr_scale": 1.0, "weight_decay": 0.0})
    if adamw:
        if config.moments == "bf16":
            optimizers["adamw"] = AdamW(adamw, lr=config.lr, betas=config.betas, dtype=torch.bfloat16)
        else:
            optimizers["adamw"] = fused_adamw(adamw, config)
    if muon := of("muon"):
        is_slow = precision == "fp32" and next(model.parameters()).device.type == "cpu"
        dtype = torch.float32 if is_slow else torch.bfloat16
        optimizers["muon"] = Muon(muon, lr=config.lr, momentum=config.momentum, dtype=dtype)
    if not optimizers:
        raise UserError(
            "optim.rules freeze every parameter, with optim.freeze, so nothing would learn: leave one lr_scale a number"
        )
    return optimizers


def fused_adamw(groups: list[dict], config: OptimConfig) -> torch.optim.AdamW:
    """Return torch's AdamW with its moments in memory; by itself it makes them in the first step, all over the heap."""
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    optimizer.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
    for group in groups:
        for parameter in group["params"]:
            averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **averages}
    return optimizer


class Muon(torch.optim.Optimizer):
    """Momentum whose update is the nearest orthogonal matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Nesterov momentum, decoupled weight decay, and the update scaled to the root mean square of AdamW's,
    0.2, so that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982). torch.optim.Muon does the same
    one matrix at a time; here matrices of one shape are batched, which is faster if they are small. `dtype` is that
    of the products.
    """

    def __init__(
        self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, dtype: torch.dtype = torch.bfloat16
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.dtype = dtype
        self.found_inf = torch.zeros(())

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    matrices = as_matrices(self._momentum(parameter, group["momentum"]))
                    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
                    by_shape.setdefault(wide.shape[1:], []).append((parameter, matrices.shape, wide))
            for shape, triples in by_shape.items():
                parameters, shapes, matrices = zip(*triples, strict=True)
                scale = 0.2 * max(shape) ** 0.5
                updates = orthogonalize(torch.cat(matrices), self.dtype).split([len(m) for m in matrices])
                for parameter, own_shape, update in zip(parameters, shapes, updates, strict=True):
                    update = update if update.shape == own_shape else update.mT
                    lr = group["lr"] * (1 - self.found_inf.to(parameter.device))
                    local = local_part(parameter)
                    local.mul_(1 - lr * group["weight_decay"])
                    local.addcmul_(part_like(update, parameter), lr, value=-scale)

    def _momentum(self, parameter, momentum):
        """Advance the momentum; return the update before orthogonalization, gathered whole if the matrix is sharded."""
        buffer = self.state[parameter]["momentum_buffer"]
        grad = torch.where(self.found_inf.to(parameter.device) > 0, buffer, parameter.grad)
        buffer.lerp_(grad, 1 - momentum)
        update = grad.lerp(buffer, momentum)
        return update.full_tensor() if is_split_matrix(update) else local_part(update)


def is_split_matrix(x: torch.Tensor) -> TypeGuard[DTensor]:
    """Return whether this rank holds only some rows of a matrix; stacked experts are split into whole experts."""
    return isinstance(x, DTensor) and x.ndim != 3


def part_like(update: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Shape an update [n, rows, columns] like the parameter, and return this rank's part of it."""
    if not is_split_matrix(parameter):
        return update.reshape(local_part(parameter).shape)
    whole = update.reshape(parameter.shape)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def as_matrices(x: torch.Tensor) -> torch.Tensor:
    """View a parameter as [n, rows, columns]: stacked experts one by one, a convolution by its output channels."""
    return x if x.ndim == 3 else x.flatten(1)[None]


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Set the singular values of float[n, rows, columns] near 1 by five Newton-Schulz steps of order five, in `dtype`.

    Fast where rows <= columns. The coefficients are Jordan's: steep at zero, so that the values come out between
    about 0.7 and 1.2. The steps map a matrix x to P x, with P a polynomial in x x^T: if there are at least
    twice as many columns as rows, P is computed first, in products of its size. In bf16 that is not exact enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if dtype != torch.bfloat16 and x.shape[2] >= 2 * x.shape[1]:
        gram = total = x @ x.mT
        for i in range(5):
            step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            step.diagonal(dim1=1, dim2=2).add_(a)  # a + b gram + c gram gram
            total = step if i == 0 else step @ total
            gram = gram if i == 4 else step @ gram @ step
        return (total @ x).to(matrices.dtype)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram gram
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x.to(matrices.dtype)


def learning_rate(step: int, config: OptimConfig) -> float:
    """Return the rate of step 0, 1, ...: linear warm-up to the peak, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    height = SCHEDULES[config.schedule](progress, config)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * height)


def cosine(progress: float, config: OptimConfig) -> float:
    """From 1 to 0 by half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def wsd(progress: float, config: OptimConfig) -> float:
    """1, then from `decay_start` on a line to 0: warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395)."""
    return min(1.0, (1 - progress) / (1 - config.decay_start))


SCHEDULES = {"cosine": cosine, "wsd": wsd}


def set_learning_rate(optimizers: dict[str, torch.optim.Optimizer], lr: float):
    """Set every group's rate to lr times its scale."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
