"""A model -> the same model, whose decode steps take less time, on a CPU.

```
q, k, v and gate, up     one product each instead of five (joined.py), where none has adapters
quantised weights        products that read the few bits (packed.py) instead of writing the weights out
head, if quantised       a copy in int8
fp32 weights             stored transposed, [K, N]: products with one row read them in order
norms                    one call; in bf16 rounded once less
blocks                   if asked for, one compiled graph (compiled.py), on a GPU too
```

State dicts, training and everything else stay as they were; moving or casting the model undoes all but the norms, for
`prepare` to be called again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanovlm.errors import UserError
from nanovlm.model.adapted import ADAPTED, AdaptedLinear
from nanovlm.model.adapters import adapted_layers
from nanovlm.model.compiled import compile_steps
from nanovlm.model.decoder import Attention, Decoder, RMSNorm
from nanovlm.model.joined import Joined
from nanovlm.model.moe import MLP, MoE
from nanovlm.model.packed import PACK, PackedWeight
from nanovlm.model.quantized import QuantizedLinear, quantize_weight
from nanovlm.model.quantized_experts import pack_experts
from nanovlm.model.vlm import VLM


@torch.inference_mode(False)  # in which weights would become tensors that can never be trained again
@torch.no_grad()
def prepare(model: VLM, int8_head: bool | None = None, compiles: bool = False) -> VLM:
    """Make decode steps fast, in place; what is prepared already is left as it is.

    With `compiles`, which takes half a minute and a C++ compiler, decode steps of a dense decoder run as a compiled
    graph; raises UserError where they cannot.

    With `int8_head`, by default where the model is quantised, logits come from a copy of the head in int8, in bf16:
    half the time of a head in bf16. It adds about as much error as int8 in all layers: SmolLM2-135M on 384 tokens of
    text has a divergence from fp32 of 0.0041 nats a token in int8 without it and 0.0084 with it. In 4 bits it is not
    seen: 0.308 in int4 and 0.289 to 0.291 in nf4, with and without (2026-11-29).
    """
    if model.decoder.embed_tokens.weight.device.type == "cpu":
        prepare_for_cpu(model, int8_head)
    if compiles and adapted_layers(model.decoder):
        raise UserError("a model with adapters, which may change, cannot be compiled: merge it, or leave --compile out")
    if compiles and model.config.vision is not None and model.fusion.looks_back:
        raise UserError(
            f"fusion.type = {model.config.fusion.type!r} cannot be compiled for inference: leave --compile out"
        )
    model.decoder.compiled = compile_steps(model.decoder) if compiles else None
    return model


def prepare_for_cpu(model: VLM, int8_head: bool | None):
    fusion = () if model.config.vision is None else model.fusion.modules()
    for module in (*model.decoder.modules(), *fusion):
        if isinstance(module, Attention):
            module.joined = join(module.joined, module.q_proj, module.k_proj, module.v_proj)
            join(None, module.o_proj)
        elif isinstance(module, MLP):
            module.joined = join(module.joined, module.gate_proj, module.up_proj)
            join(None, module.down_proj)
        elif isinstance(module, MoE):
            pack_experts(module)
        elif isinstance(module, RMSNorm):
            module.is_fused = True
    if int8_head is None:
        int8_head = model.config.quantization is not None
    if int8_head:
        model.decoder.joined_head = copy_head(model.decoder)
    else:
        share([model.decoder.head_weight])
        model.decoder.joined_head = None


def copy_head(decoder: Decoder) -> Joined:
    """Return a product with the head in int8."""
    if decoder.joined_head is not None and decoder.joined_head.is_current([decoder.head_layer]):
        return decoder.joined_head
    weight = quantize_weight(decoder.head_weight, "int8", search=False)
    return Joined([decoder.head_layer], [len(decoder.head_weight)], PackedWeight([weight]), None)


def join(joined: Joined | None, *layers: nn.Module) -> Joined | None:
    """Return the product for all layers, whose weights it shares, or None where there is none.

    There is none for layers of different kinds, for other modules than linear layers, and where a layer has adapters:
    each is then called for itself, the product of its base made fast where it can be.
    """
    if joined is not None and joined.is_current(layers):
        return joined
    if len(layers) > 1 and any(type(layer) in ADAPTED.values() for layer in layers):
        for layer in layers:
            join(None, layer)
        return None
    quantized = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    linear = [x for x in layers if isinstance(x, nn.Linear) and type(x) in (nn.Linear, AdaptedLinear)]
    if len(quantized) == len(layers):
        weight, sizes = pack_layers(quantized), [layer.shape[0] for layer in quantized]
    elif len(linear) == len(layers):
        weight, sizes = share([layer.weight for layer in linear]), [layer.out_features for layer in linear]
    else:
        return None
    biases = [layer.bias for layer in (*quantized, *linear) if layer.bias is not None]
    if len(layers) == 1 or weight is None or len(biases) not in (0, len(layers)):
        return None
    return Joined(layers, sizes, weight, share(biases) if biases else None)


def pack_layers(layers: list[QuantizedLinear]) -> PackedWeight | None:
    """Pack the weights of the layers together, unless they are packed already.

    Those of different formats, and fp8 and layers that round their inputs, are not packed.
    """
    if len({(layer.format, layer.group) for layer in layers}) > 1 or layers[0].format not in PACK:
        return None
    if any(layer.rounds_inputs for layer in layers):
        return None
    packed = layers[0].packed
    if packed is None or any(layer.packed is not packed for layer in layers):
        packed = PackedWeight([layer.weight() for layer in layers])
        for index, layer in enumerate(layers):
            layer.pack(packed, index)
    return packed


def share(parameters: Sequence[Tensor]) -> Tensor | None:
    """Move parameters one after the other into one tensor, of which they become parts, and return it.

    A matrix in fp32 is stored transposed. None if they are of different dtypes.
    """
    if len({parameter.dtype for parameter in parameters}) > 1:
        return None
    whole = torch.cat([x.data for x in parameters]) if len(parameters) > 1 else parameters[0].data
    if whole.ndim == 2 and whole.dtype == torch.float32:
        whole = whole.t().contiguous().t()
    for parameter, part in zip(parameters, whole.split([len(x) for x in parameters]), strict=True):
        parameter.data = part
    return whole
