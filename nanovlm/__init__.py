"""nanovlm: build and study vision-language models in plain PyTorch.

`model, processor = nanovlm.load("runs/scenes/model")` reads a trained model,
`nanovlm.load("owner/name")` one of the hub.
"""

from nanovlm.hf import load

__all__ = ["load"]
