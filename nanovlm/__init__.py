"""nanovlm: build and study vision-language models in plain PyTorch.

`model, processor = nanovlm.load("runs/scenes/model")` reads a trained model, `nanovlm.load("owner/name")` one of the
hub, and `nanovlm.generate(model, processor(messages, images), max_new_tokens=32)` returns the tokens of an answer.
"""

__all__ = ["generate", "load"]


def __getattr__(name):
    """Import what is asked for when it is first asked for: a command that needs no model starts without one."""
    if name == "load":
        from nanovlm.hub.read import load

        return load
    if name == "generate":
        from nanovlm.infer.sampling import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
