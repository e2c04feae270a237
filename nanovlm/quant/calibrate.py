"""Model and batches -> the model quantised by what its layers read, one block of the decoder after the other.

```
batches --encoder, embeddings--> x --block 0--> x --block 1--> x ...         x [B, T, D] of all batches are kept
                                      |  what its layers read: gram = sum of x x^T
                                      |  method: codes and scales of its layers
                                      +--block 0, quantised--> the x of block 1
```

So a block is calibrated on what it reads in the quantised model, and beside the inputs of one block only that block's
grams are in memory.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanovlm.config import QuantizationConfig
from nanovlm.data.types import Batch
from nanovlm.errors import UserError
from nanovlm.kernels.quantized_weight import QuantizedWeight
from nanovlm.model.decoder import DecoderBlock, rope_table
from nanovlm.model.fusion import Between
from nanovlm.model.quantized import (
    QuantizedLinear,
    find_layers,
    find_mixtures,
    quantize_weight,
    replace_layer,
    round_experts,
)
from nanovlm.model.vlm import VLM
from nanovlm.quant.gptq import round_in_order
from nanovlm.quant.scales import Seen, Stage, find_awq_scales, find_smooth_scales, fold, list_stages


class Inputs(NamedTuple):
    """What a block reads of a batch."""

    x: Tensor
    # That of fusion's layers.
    dtype: torch.dtype
    between: Between | None
    rope: tuple[Tensor, Tensor]
    # Of each block.
    masks: Sequence[object]
    is_token: Tensor


@torch.no_grad()
def calibrate(
    model: VLM, config: QuantizationConfig, method: str, batches: Iterable[Batch], search: bool = True
) -> VLM:
    """Quantise the layers that the config names, in place, by one of METHODS; the model stays on its device.

    Raises UserError as `find_layers` does, for layers outside the decoder's blocks and for weights that are not finite.
    """
    layers = find_layers(model, config)
    blocks = [block for block in model.decoder.layers if isinstance(block, DecoderBlock)]
    if outside := [name for name in layers if not name.startswith("decoder.layers.")]:
        raise UserError(
            f"quantization.layers = {config.layers!r} names {outside[0]}, but method {method} calibrates the decoder's "
            r"blocks alone: give --layers '^decoder\.', or --method round"
        )
    for name, linear in layers.items():
        if not linear.weight.isfinite().all():
            raise UserError(f"{name} cannot be quantised: it has weights that are not finite")
    names = {module: name for name, module in layers.items()}
    mixtures = {module: name for name, module in find_mixtures(model, config).items()}
    kept = [read(model, batch) for batch in batches]
    for index, block in enumerate(tqdm(blocks, desc=method, unit="block", disable=None)):
        dtype = block.input_layernorm.weight.dtype
        block.float()
        for i, inputs in enumerate(kept):
            kept[i] = inputs._replace(x=before(inputs, index))
        stages = [s for s in list_stages(block) if any(reader in names for reader in s.readers)]
        for linear, w in METHODS[method](stages, names, observe(block, stages, kept), config, search):
            replace_layer(model, names[linear], QuantizedLinear(linear, config, w=w))
        if block.mlp in mixtures:  # rounded to nearest
            round_experts(mixtures[block.mlp], block.mlp, config, search)
        for i, inputs in enumerate(kept):  # one at a time, as each is as large as what it replaces
            kept[i] = inputs._replace(x=run(block, inputs))
        block.to(dtype)
    model.config = dataclasses.replace(model.config, quantization=config)
    return model


def read(model: VLM, batch: Batch) -> Inputs:
    """Compute what the first block reads of a batch."""
    d = model.config.decoder
    batch = batch.to(model.decoder.embed_tokens.weight.device)
    masks, rope = model.make_masks(batch), rope_table(model.place(batch), d)
    x_BTD, between = model.fuse(batch)
    by_block = [masks[size] for size in d.windows]
    return Inputs(x_BTD.float(), x_BTD.dtype, between, rope, by_block, batch.doc_ids >= 0)


def before(inputs: Inputs, index: int) -> Tensor:
    """Return what a block reads once fusion has run before it."""
    return inputs.x if inputs.between is None else inputs.between(index, inputs.x.to(inputs.dtype)).float()


def run(block: DecoderBlock, inputs: Inputs) -> Tensor:
    return block(inputs.x, inputs.rope, inputs.masks[block.self_attn.index], None, inputs.is_token)[0]


def observe(block: DecoderBlock, stages: Sequence[Stage], kept: Sequence[Inputs]) -> list[Seen]:
    """Run a block over all inputs and return what each stage has read, padding aside."""
    seen, is_token = [], kept[0].is_token

    def note(sums):
        # A shared expert reads [B * T, K].
        return lambda _module, args: sums.add(args[0].reshape(-1, args[0].shape[-1])[is_token.flatten()])

    hooks = []
    for stage in stages:
        seen.append(Seen(stage.readers[0].in_features, kept[0].x.device))  # pyright: ignore
        hooks.append(stage.readers[0].register_forward_pre_hook(note(seen[-1])))
    for inputs in kept:
        is_token = inputs.is_token
        run(block, inputs)
    for hook in hooks:
        hook.remove()
    return seen


# --- methods: they yield the linear layers of a block that have names, each with its quantised weight ---------------

Named = dict[nn.Linear, str]
Quantised = Iterable[tuple[nn.Linear, QuantizedWeight]]


def use_gptq(stages: Sequence[Stage], names: Named, seen: Sequence[Seen], config, search: bool) -> Quantised:
    for stage, sums in zip(stages, seen, strict=True):
        for linear in chosen(stage, names):
            grid = quantize_weight(linear.weight, config.format, config.group_size, search)
            yield linear, round_in_order(linear.weight, sums.gram, grid)


def use_awq(stages: Sequence[Stage], names: Named, seen: Sequence[Seen], config, search: bool) -> Quantised:
    scale(stages, names, seen, config, find_awq_scales)
    for stage, sums in zip(stages, seen, strict=True):
        for linear in chosen(stage, names):
            yield linear, quantize_weight(linear.weight, config.format, config.group_size, search, sums.gram)


def use_smooth(stages: Sequence[Stage], names: Named, seen: Sequence[Seen], config, search: bool) -> Quantised:
    scale(stages, names, seen, config, find_smooth_scales)
    for stage in stages:
        for linear in chosen(stage, names):
            yield linear, quantize_weight(linear.weight, config.format, config.group_size, search)


def scale(stages: Sequence[Stage], names: Named, seen: Sequence[Seen], config, find: Callable):
    """Fold scales into each stage that has something before it."""
    for stage, sums in zip(stages, seen, strict=True):
        if stage.before is not None:
            scales = find(stage, [linear.weight for linear in chosen(stage, names)], sums, config)
            fold(stage, scales)
            sums.divide(scales)


def chosen(stage: Stage, names: Named) -> list[nn.Linear]:
    return [reader for reader in stage.readers if isinstance(reader, nn.Linear) and reader in names]


METHODS = {"gptq": use_gptq, "awq": use_awq, "smooth": use_smooth}
