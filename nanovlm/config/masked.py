"""The settings of an image encoder that learns from masked pictures."""

from dataclasses import dataclass

from nanovlm.config.fields import check, divides


@dataclass(frozen=True)
class MaskedConfig:
    # Share of the patches that are masked, and predicted.
    ratio: float = 0.75
    # Width of the small decoder that predicts their pixels, which no model keeps.
    hidden_size: int = 64
    # Its number of transformer blocks.
    num_hidden_layers: int = 2
    # Its number of attention heads.
    num_attention_heads: int = 4

    def validate(self):
        """Raise UserError with the value of the first contradiction."""
        check(0 < self.ratio < 1, f"masked.ratio = {self.ratio} must be above 0 and below 1")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            check(getattr(self, name) >= 1, f"masked.{name} = {getattr(self, name)} must be at least 1")
        divides("masked.num_attention_heads", self.num_attention_heads, "masked.hidden_size", self.hidden_size)
        divides("4 (sines and cosines of two directions)", 4, "masked.hidden_size", self.hidden_size)

    def count(self, num_patches: int) -> int:
        """Return how many patches of a picture are masked, at least one and not all."""
        return min(max(1, round(self.ratio * num_patches)), num_patches - 1)
