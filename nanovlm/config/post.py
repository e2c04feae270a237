"""The settings of post-training: adapters, preferences, groups of the model's own answers, distillation."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from nanovlm.config.fields import check
from nanovlm.errors import UserError


@dataclass(frozen=True)
class AdapterConfig:
    # Rank of the two matrices that learn in place of each weight matrix; 0 for no adapters: all weights learn.
    rank: int = 0
    # The change of a weight is alpha / rank times the product of the two matrices.
    alpha: float = 16.0
    # alpha / sqrt(rank) in place of alpha / rank (rsLoRA), for high ranks.
    use_rslora: bool = False
    # Also learn how long each row of a changed weight is (DoRA).
    use_dora: bool = False
    # Share of an adapter's inputs that are dropped in training.
    dropout: float = 0.0
    # First values: kaiming and gaussian begin with no change at all, orthogonal with a small one; pissa takes the
    # largest singular values out of the weight.
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa"] = "kaiming"
    # Linear layers and stacked experts in whose names this regular expression is found.
    target: str = r"^decoder\..*\.(q|k|v|o|gate|up|down)_proj$"
    # Patterns of other parameters that learn beside the adapters, such as ^projector\.
    train: tuple[str, ...] = ()
    # Round the decoder's linear layers to this format when the run starts (QLoRA); if empty, they stay as stored.
    base: Literal["", "int8", "int4", "nf4"] = ""

    @property
    def scale(self) -> float:
        """Factor of B A: rsLoRA's is that of Kalajdzievski 2023, arXiv 2312.03732."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def validate(self) -> "AdapterConfig":
        """Return self, or raise UserError with the value of the first contradiction."""
        check(self.rank >= 0, f"adapter.rank = {self.rank} must be at least 0")
        check(self.alpha > 0, f"adapter.alpha = {self.alpha} must be positive")
        check(0 <= self.dropout < 1, f"adapter.dropout = {self.dropout} must be at least 0 and below 1")
        check(
            self.init != "orthogonal" or self.rank % 2 == 0,
            f"adapter.init = orthogonal needs an even adapter.rank, not {self.rank}",
        )
        for name, patterns in (("target", (self.target,)), ("train", self.train)):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"adapter.{name}: {pattern!r} is no regular expression: {error}") from error
        for name, value in (("base", self.base), ("train", self.train)):
            check(self.rank or not value, f"adapter.{name} = {value!r} needs adapters: give adapter.rank, such as 8")
        return self


@dataclass(frozen=True)
class PreferenceConfig:
    # How much a change of log-probability counts against the reference.
    beta: float = 0.1

    def validate(self):
        pass


@dataclass(frozen=True)
class GroupConfig:
    # Answers to each question.
    num_answers: int = 8

    def validate(self):
        pass


@dataclass(frozen=True)
class DistillConfig:
    # The model to learn from: a folder, a repository of the hub, a .gguf file or smollm2.
    teacher: str = ""

    def validate(self):
        pass
