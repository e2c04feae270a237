"""Inputs of a layer -> scales that move their outliers into weights, or the other way, without a change of the model.

```
y = W x = (W s) (x / s)        s is multiplied into the columns of W, and x / s comes from what was before: a norm's
                               weight or the rows of a linear layer
```

AWQ (arXiv 2306.00978): weights that meet large inputs are scaled up, so that they are rounded more finely.
SmoothQuant (arXiv 2211.10438): inputs with large outliers are scaled down, so that they can be rounded to int8, too.
Legend: N outputs, K inputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovlm.config import QuantizationConfig
from nanovlm.kernels.quantized_weight import dequantize_ref
from nanovlm.model.decoder import DecoderBlock, RMSNorm
from nanovlm.model.moe import MoE
from nanovlm.model.quantized import quantize_weight

STEPS = 20  # exponents that AWQ tries, from 0 on below 1
SMOOTHNESS = 0.5  # SmoothQuant's exponent


class Stage(NamedTuple):
    """Linear layers that read the same input, and what computes it, if a scale can be folded into that."""

    readers: tuple[nn.Module, ...]
    before: nn.Module | None
    # Heads of the input, [K / H, heads that share a row of `before`, H], for the value of grouped queries.
    heads: tuple[int, int] | None = None


def list_stages(block: DecoderBlock) -> list[Stage]:
    """Return the stages of a block in the order in which they compute. The experts of a mixture have none."""
    attention, mlp = block.self_attn, block.mlp
    shared = attention.q_proj.out_features // attention.k_proj.out_features
    stages = [
        Stage((attention.q_proj, attention.k_proj, attention.v_proj), block.input_layernorm),
        Stage((attention.o_proj,), attention.v_proj, (shared, attention.head_dim)),
    ]
    if isinstance(mlp, MoE):  # whose router and experts read the norm's output too
        before, mlp = None, mlp.shared
    else:
        before = block.post_attention_layernorm
    if mlp is not None:
        stages += [Stage((mlp.gate_proj, mlp.up_proj), before), Stage((mlp.down_proj,), mlp.up_proj)]
    return stages


class Seen:
    """What the readers of a stage have read: sums over tokens."""

    def __init__(self, num_inputs: int, device: torch.device):
        self.gram = torch.zeros(num_inputs, num_inputs, device=device)
        self.size = torch.zeros(num_inputs, device=device)  # sum of |x|
        self.most = torch.zeros(num_inputs, device=device)  # largest |x|
        self.num = 0

    def add(self, x: Tensor):
        """Add inputs [R, K]."""
        x = x.float()
        self.gram += x.t() @ x
        self.size += x.abs().sum(0)
        self.most = torch.maximum(self.most, x.abs().amax(0))
        self.num += len(x)

    def divide(self, scales: Tensor):
        """Make it what is read once the scales are folded."""
        self.gram /= scales[:, None] * scales
        self.size /= scales
        self.most /= scales


def fold(stage: Stage, scales: Tensor):
    """Multiply the columns of the readers by scales [K] and divide what comes before; the outputs stay the same."""
    assert stage.before is not None
    for reader in stage.readers:
        reader.weight.mul_(scales)  # pyright: ignore[reportCallIssue]
    rows = scales if stage.heads is None else scales.unflatten(0, (-1, *stage.heads))[:, 0].flatten()
    before = stage.before
    if isinstance(before, RMSNorm):  # whose factor is offset + weight
        before.weight.add_(before.offset).div_(rows).sub_(before.offset)
        return
    assert isinstance(before, nn.Linear)
    before.weight.div_(rows[:, None])
    if before.bias is not None:
        before.bias.div_(rows)


def share_heads(stage: Stage, x: Tensor) -> Tensor:
    """Return x [K] with the mean of the query heads that share a key and value head for each of them.

    So what is found from shared numbers alone is one scale for a row of `before`.
    """
    if stage.heads is None:
        return x
    x = x.unflatten(0, (-1, *stage.heads))
    return x.mean(1, keepdim=True).expand_as(x).flatten()


def find_awq_scales(stage: Stage, weights: Sequence[Tensor], seen: Seen, config: QuantizationConfig) -> Tensor:
    """Return size**a for the a in [0, 1) that leaves the least error of the outputs of weights [N, K] when rounded."""
    size = share_heads(stage, seen.size)
    size = (size / size.mean()).clamp(min=1e-4)
    w_NK = torch.cat([weight.float() for weight in weights])
    best, least = torch.ones_like(size), float("inf")
    for step in range(STEPS):
        scales = size ** (step / STEPS)
        scales = scales / (scales.amax() * scales.amin()).sqrt()
        rounded = dequantize_ref(quantize_weight(w_NK * scales, config.format, config.group_size, search=False))
        error_NK = rounded / scales - w_NK
        error = float((error_NK @ seen.gram * error_NK).sum(dtype=torch.float64))
        if error < least:
            best, least = scales, error
    return best


def find_smooth_scales(stage: Stage, weights: Sequence[Tensor], seen: Seen, config: QuantizationConfig) -> Tensor:
    """Return sqrt(largest input / largest weight) [K]."""
    most = share_heads(stage, seen.most).clamp(min=1e-5)
    largest = share_heads(stage, torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0))
    scales = (most**SMOOTHNESS / largest.clamp(min=1e-5) ** (1 - SMOOTHNESS)).clamp(1e-4, 1e4)
    return scales / (scales.amax() * scales.amin()).sqrt()
