"""nanovlm: build and study vision-language models in plain PyTorch.

`model, processor = nanovlm.load("runs/scenes/model")` reads a trained model.
"""

from nanovlm.checkpoint import load

__all__ = ["load"]
