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

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.kernels.quantized_weight import NUM_BITS, QuantizedWeight, unpack
from nanovlm.model.decoder import Decoder
from nanovlm.model.moe import MoE
from nanovlm.model.quantized import QuantizedLinear, quantize_weight
from nanovlm.model.vlm import VLM


class VisionPart(nn.Module):
    def __init__(self, model: VLM):
        super().__init__()
        self.model = model

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
        if self.is_quantized:
            weight = quantize_weight(self.table, "int8", search=False)
            self.register_buffer("codes", (unpack(weight)[:, : weight.shape[1]] - 128).to(torch.int8))
            self.register_buffer("scales", weight.scales)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.is_quantized:
            return self.codes[input_ids].float() * self.scales[input_ids]
        return F.embedding(input_ids, self.table)


class DecoderPart(nn.Module):
    def __init__(self, decoder: Decoder, format: str | None):
        super().__init__()
        self.decoder = decoder
        self.head = make_linear(decoder.head_weight)
        if format is not None:
            self.head = FewBits(quantize_weight(self.head.weight, "int8", search=False), None)

    def forward(self, inputs_embeds, attention_mask, position_ids, num_logits_to_keep, *past) -> tuple[Tensor, ...]:
        """[B, T, D], int64[B, S], int64[B, T], int64[], keys and values [B, K, P, H] of each layer -> logits and these.

        Logits [B, T, V] are those of the last `num_logits_to_keep` tokens, of all where it is 0. `attention_mask` is 0
        on padding, which no token sees but itself, as it sees something.
        """
        T, S = inputs_embeds.shape[1], attention_mask.shape[1]
        key, query = torch.arange(S), torch.arange(T)[:, None] + (S - T)
        is_visible = (key == query) | ((key < query) & (attention_mask[:, None] > 0))
        cache = Past(is_visible[:, None], past)
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
        self.experts = nn.ModuleList(nn.ModuleList(map(make_linear, own)) for own in zip(*stacks, strict=True))

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
    """Keys and values as inputs and outputs of the graph, in the place of a CachePass of kv_cache.py."""

    def __init__(self, is_visible: Tensor, past: Sequence[Tensor]):
        self.is_visible, self.past, self.present = is_visible, past, []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_BNTH, k_BKTH, v_BKTH = (x.transpose(1, 2) for x in (q, k, v))
        k_BKSH = torch.cat((self.past[2 * layer], k_BKTH), dim=2)
        v_BKSH = torch.cat((self.past[2 * layer + 1], v_BKTH), dim=2)
        self.present += [k_BKSH, v_BKSH]
        grouped = q_BNTH.shape[1] != k_BKSH.shape[1]
        out_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BKSH, v_BKSH, self.is_visible, enable_gqa=grouped)
        return out_BNTH.transpose(1, 2)


def make_linear(weight: Tensor) -> nn.Linear:
    """Return a layer without bias of a weight [N, K], which it shares."""
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
        (N, K), bits = w.shape, NUM_BITS[w.format]
        block = w.group if w.format == "int4" else next(size for size in (128, 64, 32) if K % size == 0 or size == 32)
        num_blocks = -(K // -block)
        codes = F.pad(unpack(w)[:, :K], (0, num_blocks * block - K)).view(N, num_blocks, block)
        self.attributes = {"K": K, "N": N, "bits": bits, "block_size": block}
        self.register_buffer("codes", (pair(codes) if bits == 4 else codes).to(torch.uint8))
        scales, zeros = w.scales.expand(N, num_blocks), None  # codes of int8 are around 128, as without zero points
        if w.format == "int4":
            scales, zeros = (w.scales & -65536).view(torch.float32), pair(w.scales & 15).to(torch.uint8).flatten()
        self.register_buffer("scales", scales.flatten().contiguous())
        self.register_buffer("zeros", zeros)
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

    int4 is for the decoder's; those of the encoder and the projector are in int8 then. Routers stay. Experts are
    layers of their own from here on.
    """
    for mixture in [module for module in model.modules() if isinstance(module, MoE)]:
        mixture.run_experts = Experts(mixture)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            weight = module.weight()
        elif format is not None and isinstance(module, nn.Linear) and not name.endswith("router"):
            weight = quantize_weight(module.weight, format if "decoder." in name else "int8")
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, FewBits(weight, module.bias))
