"""The settings of an answer."""

from dataclasses import dataclass

from nanovlm.errors import UserError


@dataclass(frozen=True)
class SamplingConfig:
    # Largest number of tokens to generate per prompt.
    max_new_tokens: int = 128
    # 0 always takes the likeliest token (greedy); higher is more varied.
    temperature: float = 0.0
    # Choose among this many likeliest tokens; 0 for all.
    top_k: int = 0
    # Choose among the likeliest tokens that together reach this probability.
    top_p: float = 1.0
    # Leave out tokens less likely than this fraction of the likeliest one.
    min_p: float = 0.0
    # Above 1: make tokens that occurred in the prompt or the answer less likely.
    repetition_penalty: float = 1.0
    # Seed of the random choices; every row has its own generator with this seed.
    seed: int = 0

    def validate(self) -> "SamplingConfig":
        """Return self, or raise UserError that names the value and what would be right."""
        for name, ok, right in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more, and finite"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            # Logits are fp32: times a larger number, or over a smaller one, they overflow.
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            # What a generator takes, with room for the seeds of several answers.
            ("seed", -(2**62) <= self.seed <= 2**62, "from -2**62 to 2**62"),
        ):
            if not ok:
                raise UserError(f"{name} = {getattr(self, name)} must be {right}")
        return self
