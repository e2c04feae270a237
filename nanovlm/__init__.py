"""nanovlm: build and study vision-language models in plain PyTorch.

`model, processor = nanovlm.load("runs/scenes/model")` reads a trained model,
`nanovlm.load("owner/name")` one of the hub.
"""

__all__ = ["load"]


def __getattr__(name):
    """Import `load` when it is first asked for, so that `python -m nanovlm.hf` runs a module that is not there yet."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nanovlm.hf import load

    return load
