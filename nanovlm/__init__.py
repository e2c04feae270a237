"""nanovlm: build and study vision-language models in plain PyTorch.

`model, processor = nanovlm.load("runs/scenes/model")` reads a trained model, `nanovlm.load("owner/name")` one from the
hub, and `nanovlm.generate(model, processor(messages, images), max_new_tokens=32)` returns the tokens of an answer.

`nanovlm.kernels` and `nanovlm.eval` are links to `kernels/` and `eval/` at the top of the repository. Neither has an
__init__.py: the package index has a package called kernels, whose place ours would take.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovlm.hub.read import load
    from nanovlm.infer.answers import generate

__all__ = ["generate", "load"]


def __getattr__(name):
    """Import a function on its first use, so that a command that needs no model does not import one."""
    if name == "load":
        from nanovlm.hub.read import load

        return load
    if name == "generate":
        from nanovlm.infer.answers import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
