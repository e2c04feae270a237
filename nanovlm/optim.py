"""Parameter groups, optimizers and the schedule."""

import math
import re

import torch
from torch import nn

from nanovlm.config import OptimConfig


def make_optimizers(model: nn.Module, config: OptimConfig) -> dict[str, torch.optim.Optimizer]:
    """Give every parameter to the first rule whose pattern its name contains; freeze where lr_scale is None.

    Returns the optimizers that have parameters, by name. Raises ValueError for a parameter without a rule, a
    rule without a parameter, and a Muon parameter that is a vector.
    """
    groups = {rule: [] for rule in config.rules}
    for name, parameter in model.named_parameters():
        rule = next((rule for rule in config.rules if re.search(rule.pattern, name)), None)
        if rule is None:
            raise ValueError(f"no rule of optim.rules matches the parameter {name}")
        if rule.optimizer == "muon" and parameter.ndim < 2:
            raise ValueError(f"rule {rule.pattern!r} gives {name} to muon, but it is a vector, not a matrix")
        parameter.requires_grad_(rule.lr_scale is not None)
        groups[rule].append(parameter)
    for rule, parameters in groups.items():
        if not parameters:
            raise ValueError(f"optim.rules has a pattern {rule.pattern!r} that holds for no parameter")

    def of(optimizer):
        return [
            {"params": parameters, "lr_scale": rule.lr_scale, "weight_decay": rule.weight_decay}
            for rule, parameters in groups.items()
            if rule.optimizer == optimizer and rule.lr_scale is not None
        ]

    optimizers = {}
    if adamw := of("adamw"):
        optimizers["adamw"] = torch.optim.AdamW(adamw, lr=config.lr, betas=config.betas, fused=True)
    if muon := of("muon"):
        optimizers["muon"] = Muon(muon, lr=config.lr, momentum=config.momentum)
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose update is the nearest orthogonal matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Nesterov momentum, decoupled weight decay, and the update scaled to the root mean square that AdamW's has,
    0.2, so that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982). torch.optim.Muon does the same
    one matrix at a time; matrices of one shape go together here, which is faster where they are small.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    matrices = self._momentum(parameter, group["momentum"])
                    by_shape.setdefault(matrices.shape[1:], []).append((parameter, matrices))
            for shape, pairs in by_shape.items():
                parameters, matrices = zip(*pairs, strict=True)
                scale = 0.2 * max(shape) ** 0.5
                updates = orthogonalize(torch.cat(matrices)).split([len(m) for m in matrices])
                for parameter, update in zip(parameters, updates, strict=True):
                    if as_matrices(parameter).shape[1:] != shape:
                        update = update.mT
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def _momentum(self, parameter, momentum):
        """Advance the momentum; return the update, not yet orthogonal, as wide matrices: rows <= columns."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        matrices = as_matrices(parameter.grad.lerp(buffer, momentum))
        return matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT


def as_matrices(x: torch.Tensor) -> torch.Tensor:
    """View a parameter as [n, rows, columns]: stacked experts one by one, a convolution by its output channels."""
    return x if x.ndim == 3 else x.flatten(1)[None]


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Set the singular values of float[n, rows, columns] near 1 by five Newton-Schulz steps of order five, in bf16.

    Fast where rows <= columns. The coefficients are Jordan's: steep at zero, so that the values come out between
    about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram gram
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x.to(matrices.dtype)


def learning_rate(step: int, config: OptimConfig) -> float:
    """Return the rate of step 0, 1, ...: linear warm-up to the peak, then as the schedule says, never above."""
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
