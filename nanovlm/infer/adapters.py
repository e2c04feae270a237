"""Requests that name adapters -> which of them each token of a pass uses (model/adapters.py)."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch

from nanovlm.errors import UserError
from nanovlm.model.adapters import activate, adapted_layers, merge, stack_adapters
from nanovlm.model.vlm import VLM


def check_adapter(model: VLM, name: str | None):
    """Raise UserError unless a request may name this adapter; None takes the model as it is."""
    if name is None:
        return
    shared = model.adapters
    if shared is None or name not in shared.configs:
        there = f"there are {', '.join(shared.configs)}" if shared and shared.configs else "the model has none"
        raise UserError(f"there is no adapter {name}: {there}")
    if shared.merged:
        raise UserError(f"the model is merged, so a request cannot choose adapter {name}: unmerge it")
    for path, layer in adapted_layers(model):
        if not path.startswith("decoder."):
            own = next(iter(layer.adapters))  # pyright: ignore
            raise UserError(f"adapter {own} changes {path}, which sees no tokens, so no request can choose: merge it")
    if len(shared.active) > 1:
        raise UserError(
            f"a request cannot choose adapter {name} while {' and '.join(shared.active)} are active together"
        )


def settle(model: VLM) -> str | None:
    """Make the adapter of a model that `load` or `attach` returned fast: merge it where the base is not quantised.

    Else return its name, for requests to name it.
    """
    if model.adapters is None:
        return None
    if model.config.quantization is None:
        merge(model).adapters = None  # nor is the base kept
        return None
    (name,) = model.adapters.active
    return name if all(path.startswith("decoder.") for path, _ in adapted_layers(model)) else None


def names_used(model: VLM, name: str | None) -> tuple[str, ...]:
    """Return the adapters that a request uses: the one that it names, or those that are active."""
    shared = model.adapters
    if shared is None or not shared.is_enabled or shared.merged:
        return ()
    return shared.active if name is None else (name,)


def key_of(model: VLM, name: str | None, parts: tuple[str, ...] = ("",)) -> bytes:
    """Return what must stand in a key of what these parts of the model compute for a request; b"" for the base.

    An adapter that is removed and read again has another key.
    """
    used = names_used(model, name)
    layers = [layer for path, layer in adapted_layers(model) if path.startswith(parts)] if used else []
    numbers = [model.adapters.numbers[own] for own in used if any(own in layer.adapters for layer in layers)]  # pyright: ignore
    return hashlib.sha256(str(numbers).encode()).digest() if numbers else b""


@contextlib.contextmanager
def alone(model: VLM, name: str | None) -> Iterator[None]:
    """Let all passes within use one adapter; None leaves those that are active."""
    before = names_used(model, None)
    if name is not None:
        activate(model, name)
    try:
        yield
    finally:
        if name is not None:
            activate(model, *before)


@contextlib.contextmanager
def choosing(model: VLM, names: Sequence[str | None], counts: Sequence[int]) -> Iterator[None]:
    """Let the tokens of one row of a batch use these adapters: the first counts[0] tokens names[0], and so on.

    The one that is active for all is used so too, where it can: DoRA's norms are then computed once.
    """
    active = names_used(model, None)
    if len(active) == 1 and model.adapters.is_by_token:
        names = [name or active[0] for name in names]
    if not any(names):
        yield
        return
    shared = model.adapters
    order = {name: number for number, name in enumerate(shared.configs)}
    used = [names_used(model, name) for name in names]
    numbers = torch.tensor([order[own[0]] if own else -1 for own in used])
    index = numbers.repeat_interleave(torch.tensor(counts))[None]
    if not shared.is_stacked:
        stack_adapters(model)
    shared.index = index.to(model.decoder.embed_tokens.weight.device, non_blocking=True)
    try:
        yield
    finally:
        shared.index = None
