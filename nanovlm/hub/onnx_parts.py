"""Parts of a model as modules from tensors to tensors, for torch.export to follow: what onnx.py makes graphs of.

```
encode               pixel_values, pixel_attention_mask -> image_features
embed                input_ids -> inputs_embeds
decode               inputs_embeds, attention_mask, position_ids, past_key_values -> logits, present
read (text alone)    input_ids, ... -> logits, present
```

They call our own modules. Only what these do with Python is done with tensors here: the cache, and the choice of
experts. In few bits a linear layer is onnxruntime's MatMulNBits, with the codes and scales of quantized.py. Legend: B
rows, T new tokens, P past tokens, S = P + T, N query heads, K key/value heads, H head size, I tiles, V vocabulary, D
hidden.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.model.attention import attend_plain, attend_sdpa
from nanovlm.model.decoder import Decoder
from nanovlm.model.moe import MoE
from nanovlm.model.quantized import QuantizedLinear, QuantizedWeight, quantize_weight, read_codes
from nanovlm.model.vision import VisionAttention
from nanovlm.model.vlm import VLM


class VisionPart(nn.Module):
    def __init__(self, model: VLM):
        super().__init__()
        self.model = model
        for module in model.vision.modules():
            if isinstance(module, VisionAttention):
                module.attend = attend_sdpa  # a graph has no kernels of ours

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor) -> Tensor:
        """float[B, I, C, H, W] and bool[B, I, H, W] -> [shown tiles, image tokens, D]; a tile of False is padding."""
        is_shown = pixel_attention_mask.flatten(0, 1).flatten(1).any(-1)
        return self.model.encode(pixel_values.flatten(0, 1))[is_shown.nonzero()[:, 0]]


class EmbedPart(nn.Module):
    """int64[B, T] -> [B, T, D]; a table in int8 has a scale for each row."""

    codes: Tensor
    scales: Tensor

    def __init__(self, decoder: Decoder, format: str | None):
        super().__init__()
        self.table, self.is_quantized = decoder.embed_tokens.weight, format is not None
        self.scale = decoder.config.embedding_scale
        if self.is_quantized:
            codes, scales, _ = read_codes(quantize_weight(self.table, "int8", search=False))
            self.register_buffer("codes", (codes - 128).to(torch.int8))
            self.register_buffer("scales", scales)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.is_quantized:
            x_BTD = self.codes[input_ids].float() * self.scales[input_ids]
        else:
            x_BTD = F.embedding(input_ids, self.table)
        return x_BTD if self.scale == 1 else x_BTD * self.scale


class DecoderPart(nn.Module):
    def __init__(self, decoder: Decoder, format: str | None):
        super().__init__()
        self.decoder = decoder
        head = decoder.head_weight
        self.head = make_linear(head if format is None else quantize_weight(head, "int8", search=False))

    def forward(self, inputs_embeds, attention_mask, position_ids, num_logits_to_keep, *past) -> tuple[Tensor, ...]:
        """[B, T, D], int64[B, S], int64[B, T], int64[], keys and values [B, K, P, H] of each layer -> logits and these.

        Logits [B, T, V] are those of the last `num_logits_to_keep` tokens, of all where it is 0. `attention_mask` is 0
        on padding, which is before a row's first token, and which no token sees but itself, as it sees something.
        """
        T, S, windows = inputs_embeds.shape[1], attention_mask.shape[1], self.decoder.config.windows
        key, query = torch.arange(S), torch.arange(T)[:, None] + (S - T)
        is_visible = ((key == query) | ((key < query) & (attention_mask[:, None] > 0)))[:, None]
        masks = {size: is_visible & (query - key < size) if size else is_visible for size in set(windows)}
        cache = Past([masks[size] for size in windows], past)
        hidden_BTD, _ = self.decoder(inputs_embeds, position_ids, None, cache)
        num_kept = torch.where(num_logits_to_keep > 0, num_logits_to_keep, T)
        last = (torch.arange(T) >= T - num_kept).nonzero()[:, 0]
        return self.head(hidden_BTD[:, last]), *cache.present


class TextPart(nn.Module):
    def __init__(self, decoder: Decoder, format: str | None):
        super().__init__()
        self.embed, self.decode = EmbedPart(decoder, format), DecoderPart(decoder, format)

    def forward(self, input_ids, attention_mask, position_ids, num_logits_to_keep, *past) -> tuple[Tensor, ...]:
        return self.decode(self.embed(input_ids), attention_mask, position_ids, num_logits_to_keep, *past)


class Experts(nn.Module):
    """What the experts of a mixture compute, one after the other, in the place of its `run_experts`.

    Rows of the experts that no token chose are empty, so a graph computes no more than the mixture does.
    """

    def __init__(self, mixture: MoE):
        super().__init__()
        stacks = mixture.gate_proj, mixture.up_proj, mixture.down_proj
        self.experts = nn.ModuleList(
            nn.ModuleList(make_linear(stack[e]) for stack in stacks) for e in range(mixture.config.num_experts)
        )

    def forward(self, x: Tensor, choice: Tensor, weights: Tensor, *_stacks: Tensor) -> Tensor:
        """As experts_loop of moe.py."""
        y_RD = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            gate, up, down = expert.children()
            row, place = (choice == number).nonzero(as_tuple=True)
            x_SD = x[row]
            y_SD = down(F.silu(gate(x_SD)) * up(x_SD))
            y_RD = y_RD.index_add(0, row, weights[row, place, None] * y_SD)
        return y_RD


class Past:
    """Keys and values as inputs and outputs of the graph, in the place of a CachePass of kv_cache.py.

    `masks` are those of the layers, bool[B, 1, T, S]; a layer with a window keeps what it no longer sees.
    """

    def __init__(self, masks: Sequence[Tensor], past: Sequence[Tensor]):
        self.masks, self.past, self.present = masks, past, []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *extra) -> Tensor:
        """Attend to past and new keys; `extra` is a softcap and sinks, as in attend_plain."""
        q_BNTH, k_BKTH, v_BKTH = (x.transpose(1, 2) for x in (q, k, v))
        k_BKSH = torch.cat((self.past[2 * layer], k_BKTH), dim=2)
        v_BKSH = torch.cat((self.past[2 * layer + 1], v_BKTH), dim=2)
        self.present += [k_BKSH, v_BKSH]
        if extra:
            return attend_plain(q, k_BKSH.transpose(1, 2), v_BKSH.transpose(1, 2), self.masks[layer], *extra)
        grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
        out_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, self.masks[layer], enable_gqa=grouped)
        return out_BNTH.transpose(1, 2)


def make_linear(weight: Tensor | QuantizedWeight) -> nn.Module:
    """Return a layer without bias of a weight [N, K], which it shares."""
    if not isinstance(weight, Tensor):
        return FewBits(weight, None)
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach())
    return linear


# ---- few bits ----


class FewBits(nn.Module):
    """x [..., K] -> [..., N] by onnxruntime's MatMulNBits with the codes of an int8 or int4 weight.

    It has a scale for each block along K: a group of int4, and in int8, where all of a row have one, as many as fit. It
    computes only in a graph.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, w: QuantizedWeight, bias: Tensor | None):
        super().__init__()
        (N, K), (codes, scales, zeros) = w.shape, read_codes(w)
        is_int4 = zeros is not None  # codes of int8 are around 128, as here without zero points
        block = w.group if is_int4 else next(size for size in (128, 64, 32) if K % size == 0 or size == 32)
        num_blocks = math.ceil(K / block)
        codes = F.pad(codes, (0, num_blocks * block - K)).view(N, num_blocks, block)
        self.attributes: dict[str, Any] = {"K": K, "N": N, "bits": 4 if is_int4 else 8, "block_size": block}
        self.register_buffer("codes", (pair(codes) if is_int4 else codes).to(torch.uint8))
        self.register_buffer("scales", scales.expand(N, num_blocks).flatten().contiguous())
        self.register_buffer("zeros", pair(zeros).to(torch.uint8).flatten() if is_int4 else None)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x, self.codes, self.scales] + ([] if self.zeros is None else [self.zeros])
        shape = (*x.shape[:-1], self.attributes["N"])
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits", inputs, self.attributes, dtype=x.dtype, shape=shape, version=1
        )
        return y if self.bias is None else y + self.bias


def pair(codes: Tensor) -> Tensor:
    """Lay two codes of 4 bits into each byte, the first in the lower half: [..., n] -> [..., n / 2 rounded up]."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2))
    return codes[..., 0] | codes[..., 1] << 4


def use_few_bits(model: nn.Module, format: str | None):
    """Replace linear layers in place by those in few bits: already quantised ones with the codes that they have.

    int4 is for the decoder's; those of the encoder and the projector are in int8 then. Routers and the head, which
    DecoderPart has, stay. Experts are layers of their own from here on.
    """
    for mixture in [module for module in model.modules() if isinstance(module, MoE)]:
        mixture.run_experts = Experts(mixture)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            weight = module.weight()
        elif format is not None and isinstance(module, nn.Linear) and not name.endswith(("router", "lm_head")):
            weight = quantize_weight(module.weight, format if "decoder." in name else "int8")
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FewBits(weight, module.bias))
