"""Recipes: one function a preset, returning a TrainConfig. The command line picks one and overrides fields."""

from nanovlm.config import TrainConfig


def scenes() -> TrainConfig:
    """Learn to see from the drawn scenes, in minutes on two CPU cores."""
    return TrainConfig()


PRESETS = {"scenes": scenes}
