"""The settings of the optimizer: its rate over the steps, its moments, and which parameters it updates how."""

import re
from dataclasses import dataclass
from typing import Literal

from nanovlm.config.fields import check
from nanovlm.errors import UserError


@dataclass(frozen=True)
class ParamRule:
    # Regular expression searched in the parameter's name.
    pattern: str
    # Factor that optim.lr is multiplied by; null (None) freezes the parameter.
    lr_scale: float | None = 1.0
    # Decoupled weight decay.
    weight_decay: float = 0.0
    # Which optimizer updates it; muon takes matrices only.
    optimizer: Literal["adamw", "muon"] = "adamw"


@dataclass(frozen=True)
class OptimConfig:
    # Peak learning rate.
    lr: float = 1e-3
    # Optimizer steps of the whole run.
    steps: int = 1000
    # Steps of linear warm-up.
    warmup_steps: int = 20
    # How the rate falls after the warm-up: cosine, or wsd, which holds the peak and then falls linearly.
    schedule: Literal["cosine", "wsd"] = "cosine"
    # wsd: where the linear fall begins, as a fraction of the steps after the warm-up.
    decay_start: float = 0.8
    # The rate ends at this fraction of the peak.
    min_lr_ratio: float = 0.02
    # Gradients are scaled down to this global norm.
    max_grad_norm: float = 1.0
    # Micro-batches of a step, divided evenly among the ranks; 0 for one on each rank.
    micro_batches: int = 0
    # Steps whose loss or gradient is not finite change nothing; more of them than this stop the run.
    max_skipped_steps: int = 10
    # AdamW: decay of the first and second moments.
    betas: tuple[float, float] = (0.9, 0.99)
    # AdamW: precision of the moments. bf16 saves half of their memory; betas must then be at most 0.98.
    moments: Literal["fp32", "bf16"] = "fp32"
    # Muon: momentum.
    momentum: float = 0.95
    # Patterns: a parameter is frozen when one of them is found in its name, whatever the rules say.
    freeze: tuple[str, ...] = ()
    # Pairs of a pattern and a learning-rate factor, on top of that of the rules: the first match applies.
    lr_scales: tuple[tuple[str, float], ...] = ()
    # Parameter groups: the first rule whose pattern is found in a parameter's name applies.
    rules: tuple[ParamRule, ...] = (
        ParamRule(r"(norm|embed|embedding|bias)", weight_decay=0.0),
        ParamRule(r"", weight_decay=0.01),
    )

    def validate(self):
        """Raise UserError with the value of the first contradiction."""
        check(self.lr > 0, f"optim.lr = {self.lr} must be positive")
        check(0 <= self.decay_start < 1, f"optim.decay_start = {self.decay_start} must be at least 0 and below 1")
        check(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio = {self.min_lr_ratio} must be between 0 and 1")
        for name, value in (*(("optim.betas", beta) for beta in self.betas), ("optim.momentum", self.momentum)):
            check(0 <= value < 1, f"{name} = {value} must be at least 0 and below 1")
        check(
            self.moments == "fp32" or max(self.betas) <= 0.98,
            f"optim.moments = bf16 needs optim.betas of at most 0.98, not {max(self.betas)}: it loses smaller changes",
        )
        for rule in self.rules:
            check(rule.weight_decay >= 0, f"the weight_decay {rule.weight_decay} of {rule.pattern!r} is negative")
        for pattern, scale in self.lr_scales:
            check(scale > 0, f"optim.lr_scales: {scale} of {pattern!r} must be positive; freeze what should not learn")
        for name, patterns in (
            ("rules", [rule.pattern for rule in self.rules]),
            ("freeze", self.freeze),
            ("lr_scales", [pattern for pattern, _ in self.lr_scales]),
        ):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"optim.{name}: {pattern!r} is no regular expression: {error}") from error
        check(self.max_grad_norm > 0, f"optim.max_grad_norm = {self.max_grad_norm} must be positive")
