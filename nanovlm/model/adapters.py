"""A model -> the same model with small matrices that learn in place of its weights (adapted.py has the layers).

`adapt(model, config, name)` replaces the layers that the config names, from outside and in place, once the model is
quantised, if it is to be, and before it is sharded. What the layers of a model share, which adapters there are and
which are on, is one object, `model.adapters`:

```
activate(model, "a", "b")           all tokens use the sum of these
with for_tokens(model, index):      each token of a pass its own, int64[B, T], by the order of names, -1 for none
with disabled(model):               the base, to the bit
merge(model), unmerge(model)        plain layers with the changed weights, and back to the very same ones
```
"""

import contextlib
import copy
import math
import re
from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn

from nanovlm.config import AdapterConfig
from nanovlm.errors import UserError
from nanovlm.model.adapted import (
    ADAPTED,
    STACKS,
    AdaptedLinear,
    AdaptedMoE,
    AdaptedQuantizedLinear,
    Adapter,
    Adapters,
    stack_layer,
    widen,
    with_adapters,
)
from nanovlm.model.moe import MoE
from nanovlm.model.quantized import QuantizedLinear
from nanovlm.model.quantized_experts import QuantizedStack
from nanovlm.model.vlm import VLM

DEFAULT = "default"  # the name of the adapter that a run trains, as in PEFT


def adapt(model: VLM, config: AdapterConfig, name: str = DEFAULT) -> VLM:
    """Give a model one more adapter, in place and active from now on; its values are yet to be drawn or loaded.

    Quantise before. Raises UserError for a target that no layer has or that cannot have adapters.
    """
    if not re.fullmatch(r"\w[\w-]*", name):
        raise UserError(f"an adapter cannot be called {name!r}: use letters, digits, _ and -")
    if name in dir(nn.ModuleDict()):
        raise UserError(f"an adapter cannot be called {name}, a word of torch's own: choose another name")
    shared = model.adapters or Adapters()
    if name in shared.configs or shared.merged:
        state = "merged: unmerge it first" if shared.merged else f"adapted already, by one called {name}"
        raise UserError(f"the model is {state}")
    targets = find_targets(model, config)
    model.adapters = shared
    for path, stack in targets:
        layer = model.get_submodule(path)
        if type(layer) in ADAPTED:
            layer = as_class(layer, ADAPTED[type(layer)])
            layer.adapters, layer.switch = nn.ModuleDict(), shared  # pyright: ignore
            replace(model, path, layer)
        device = next(layer.buffers() if isinstance(layer, QuantizedLinear) else layer.parameters()).device

        def make(shape, device=device):
            return Adapter(
                shape, config, torch.promote_types(model.decoder.embed_tokens.weight.dtype, torch.float32), device
            )

        if isinstance(layer, AdaptedMoE):
            if name not in layer.adapters:
                layer.adapters[name] = nn.ModuleDict()
            layer.adapters[name][stack] = make(getattr(layer, stack).shape)  # pyright: ignore[reportIndexIssue]
        else:
            layer.adapters[name] = make(weight_shape(layer))  # pyright: ignore
    shared.configs[name] = config
    shared.active = (name,)
    shared.num_made += 1
    shared.numbers[name], shared.is_stacked = shared.num_made, False
    shared.is_by_token = is_by_token(model)
    return model


def remove(model: VLM, name: str):
    """Take an adapter away; a layer that had no other is a plain one again."""
    shared = model.adapters
    assert not shared.merged, "a merged model must be unmerged first"
    for path, layer in adapted_layers(model):
        if name in layer.adapters:  # pyright: ignore
            del layer.adapters[name]  # pyright: ignore
        if not layer.adapters:
            plain = as_class(layer, next(cls for cls, adapted in ADAPTED.items() if type(layer) is adapted))
            del plain.adapters, plain.switch
            vars(plain).pop("stacked", None)
            replace(model, path, plain)
    del shared.configs[name], shared.numbers[name]
    shared.is_stacked, shared.is_by_token = False, is_by_token(model)
    shared.active = tuple(other for other in shared.active if other != name)


def is_by_token(model: VLM) -> bool:
    """Return whether tokens can use adapters of their own at no more than the price of one for all."""
    layers = adapted_layers(model)
    return all(path.startswith("decoder.") and not isinstance(layer, AdaptedMoE) for path, layer in layers)


def find_targets(model: VLM, config: AdapterConfig) -> list[tuple[str, str]]:
    """Return the layers that the config names, and for a mixture the stack, else ""."""
    pattern, found, unfit = re.compile(config.target), [], []
    for path, module in model.named_modules():
        own = path.rpartition(".")[2]
        if isinstance(module, MoE):
            found += [(path, stack) for stack in STACKS if pattern.search(f"{path}.{stack}")]
        elif own in ("lm_head", "router") or isinstance(module, nn.Embedding | nn.Conv2d):
            others = f"{path.removesuffix(own)}other"  # named on purpose, not just among all of the decoder
            unfit += [path] if pattern.search(path) and not pattern.search(others) else []
        elif isinstance(module, nn.Linear | QuantizedLinear) and pattern.search(path):
            found.append((path, ""))
    what = f"adapter.target = {config.target!r}"
    if unfit:
        raise UserError(
            f"{what} names {unfit[0]}, which cannot have an adapter, as embeddings, heads, routers and convolutions "
            "cannot: let it learn whole, by adapter.train, or leave it out"
        )
    if not found:
        raise UserError(f"{what} is found in the name of no linear layer and of no stacked experts")
    stacked = next((path for path, stack in found if stack), None)
    if config.dropout and stacked:
        raise UserError(
            f"adapter.dropout = {config.dropout} cannot be applied to {stacked}, stacked experts: set it to 0"
        )
    quantized = next(
        (
            path
            for path, stack in found
            if is_coded(model.get_submodule(path)) or (stack and is_coded(getattr(model.get_submodule(path), stack)))
        ),
        None,
    )
    if config.init == "pissa" and quantized:
        raise UserError(f"adapter.init = pissa changes the base, but {quantized} is quantised: choose another init")
    for path, stack in found if config.init == "pissa" else ():
        layer = model.get_submodule(path)
        smaller = min((getattr(layer, stack) if stack else layer.weight).shape[-2:])  # pyright: ignore
        if config.rank > smaller:
            raise UserError(
                f"adapter.init = pissa takes adapter.rank = {config.rank} singular values, and {path} has {smaller}: "
                "lower the rank or choose another init"
            )
    return found


def as_class(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Return a module of another class with the same parameters, buffers and children."""
    new = cls.__new__(cls)
    vars(new).update({name: copy.copy(x) if isinstance(x, dict) else x for name, x in vars(module).items()})
    return new


def is_coded(module) -> TypeGuard[QuantizedLinear | QuantizedStack]:
    """Whether weights, of a layer or of stacked experts, are quantised."""
    return isinstance(module, QuantizedLinear | QuantizedStack)


def weight_shape(layer: AdaptedLinear | AdaptedQuantizedLinear) -> tuple[int, int]:
    return layer.shape if isinstance(layer, QuantizedLinear) else (layer.out_features, layer.in_features)


def replace(model: nn.Module, path: str, layer: nn.Module):
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def activate(model: VLM, *names: str):
    """Let every token use the sum of these adapters; of none, the base."""
    if unknown := set(names) - model.adapters.configs.keys():
        raise UserError(f"there is no adapter {min(unknown)}; there are {', '.join(model.adapters.configs)}")
    model.adapters.active = names


@contextlib.contextmanager
def disabled(model: VLM) -> Iterator[None]:
    """Compute as the base does, such as a reference model; a model without adapters is its own base."""
    shared = model.adapters or Adapters()
    assert not shared.merged, "the base of a merged model is not there: unmerge it"
    before, shared.is_enabled = shared.is_enabled, False
    try:
        yield
    finally:
        shared.is_enabled = before


@contextlib.contextmanager
def for_tokens(model: VLM, index: Tensor) -> Iterator[None]:
    """Let each token of the passes within use its own adapter, or none: int64[B, T] counts names from 0, -1 is none.

    Raises UserError for adapters of other parts than the decoder, where there is no token.
    """
    shared = model.adapters
    if outside := next((path for path, _ in adapted_layers(model) if not path.startswith("decoder.")), None):
        raise UserError(f"{outside} has an adapter and sees no tokens, so these cannot choose: merge it")
    assert not shared.merged, "a merged model has one adapter for all: unmerge it"
    before, shared.index = shared.index, index
    try:
        yield
    finally:
        shared.index = before


@torch.no_grad()
def stack_adapters(model: VLM):
    """Compute once what `for_tokens` needs of the adapters alone, for inference: they must not learn meanwhile."""
    for _, layer in adapted_layers(model):
        if not isinstance(layer, AdaptedMoE):
            layer.stacked = stack_layer(layer, model.decoder.embed_tokens.weight.dtype)  # pyright: ignore
    model.adapters.is_stacked = True


def adapted_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers that have adapters, with their names."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, tuple(ADAPTED.values()))]


def find_adapters(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, Adapter]]:
    """Yield, for each weight that this adapter changes: the layer, the weight's name in it, and its matrices."""
    for _path, layer in adapted_layers(model):
        for key, adapter in layer.named_modules():
            if isinstance(adapter, Adapter) and key.split(".")[1] == name:
                yield layer, key.split(".")[2] if isinstance(layer, AdaptedMoE) else "weight", adapter


def learns(name: str, config: AdapterConfig) -> bool:
    """Return whether a parameter learns in a run: all do without adapters, else these, those of `train`, and scores."""
    is_score = name == "score.weight"  # which starts at 0
    return not config.rank or is_adapter(name) or is_score or any(re.search(pattern, name) for pattern in config.train)


def is_adapter(name: str) -> bool:
    """Return whether a tensor of this name is an adapter's."""
    return ".adapters." in name


def count(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters learn, and how many there are, with quantised weights."""
    parameters = list(model.parameters())
    quantized = [math.prod(module.shape) for module in model.modules() if is_coded(module)]
    learning = sum(p.numel() for p in parameters if p.requires_grad)
    return learning, sum(p.numel() for p in parameters) + sum(quantized)


# --- merge ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(model: VLM) -> VLM:
    """Replace adapted layers, in place, by plain ones whose weights have the active adapters in them.

    The adapted layers are kept, with the base's weights, for `unmerge`. Raises UserError for a quantised base.
    """
    shared, layers = model.adapters, adapted_layers(model)
    if not layers:  # merged already, or never adapted
        return model
    tensors = merged_tensors(model)
    for path, layer in layers:
        cls = nn.Linear if isinstance(layer, AdaptedLinear) else MoE
        plain = as_class(layer, cls)
        del plain.adapters, plain.switch
        vars(plain).pop("stacked", None)
        for name in ("weight",) if cls is nn.Linear else STACKS:
            weight = nn.Parameter(tensors[f"{path}.{name}"], requires_grad=getattr(layer, name).requires_grad)
            setattr(plain, name, weight)
        replace(model, path, plain)
    shared.merged = dict(layers)
    return model


def unmerge(model: VLM) -> VLM:
    """Put the layers back that `merge` replaced: the same ones, so the base is the same to the bit."""
    shared = model.adapters
    for path, layer in shared.merged.items():
        replace(model, path, layer.to(model.decoder.embed_tokens.weight.device))
    shared.merged = {}
    return model


@torch.no_grad()
def merged_tensors(model: VLM, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the state dict of the merged model. `tensors`, if given, replace the model's own, which may be sharded."""
    tensors = dict(model.state_dict() if tensors is None else tensors)
    for path, layer in adapted_layers(model):
        if isinstance(layer, AdaptedQuantizedLinear) or is_coded(getattr(layer, STACKS[0], None)):
            raise UserError(f"{path} is quantised: merged, it would be rounded again; keep the adapter beside it")
        for stack in ("weight",) if isinstance(layer, AdaptedLinear) else STACKS:
            weight, adapters = tensors[f"{path}.{stack}"], []
            for name in model.adapters.active:
                prefix = f"{path}.adapters.{name}." + ("" if stack == "weight" else f"{stack}.")
                if f"{prefix}lora_A" in tensors:
                    adapter = Adapter(weight.shape, model.adapters.configs[name], widen(weight).dtype, "meta")
                    own = {field: widen(tensors[prefix + field]) for field in adapter.state_dict()}
                    adapter.load_state_dict(own, assign=True)
                    adapters.append(adapter)
            tensors[f"{path}.{stack}"] = with_adapters(widen(weight), adapters).to(weight.dtype)
    return {name: x for name, x in tensors.items() if not is_adapter(name)}


def adapter_tensors(model: VLM, name: str = DEFAULT, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return an adapter's tensors, named without it: decoder.layers.0.self_attn.q_proj.lora_A.

    `tensors`, if given, replace the model's own, which may be sharded.
    """
    inner = f".adapters.{name}."
    tensors = model.state_dict() if tensors is None else tensors
    return {key.replace(inner, "."): x for key, x in tensors.items() if inner in key}


def load_adapter(model: VLM, tensors: dict[str, Tensor], name: str = DEFAULT):
    """Copy what `adapter_tensors` returned into a model's adapter. Raises UserError that names what does not fit."""
    model.adapters.is_stacked, own = False, adapter_tensors(model, name)
    if wrong := own.keys() ^ tensors.keys():
        raise UserError(f"adapter {name}: {min(wrong)} is {'missing' if min(wrong) in own else 'unknown'}")
    for key, x in own.items():
        if x.shape != tensors[key].shape:
            raise UserError(f"adapter {name}: {key} has shape {list(tensors[key].shape)}, not {list(x.shape)}")
        x.copy_(tensors[key])
