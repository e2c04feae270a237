"""Keys and values of past tokens in buffers of fixed size, allocated once."""

import torch
from torch import Tensor

from nanovlm.config import DecoderConfig
from nanovlm.model.attention import make_cache_mask


class KVCache:
    """Buffers [B, S, K, H] for each layer; `lengths` int64[B] counts the tokens that each row holds.

    Rows have their own lengths: slot s of a row holds its token at position s. Slots at or after
    `lengths` are stale but never seen, because a query sees only slots up to its own position.
    """

    def __init__(self, config: DecoderConfig, num_rows: int, max_length: int, device=None, dtype=torch.float32):
        shape = (num_rows, max_length, config.num_key_value_heads, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.max_length, self.attention = max_length, config.attention

    def update(self, layer: int, k: Tensor, v: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [B, T, K, H] at position_ids int64[B, T]; return the layer's buffers."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.keys[layer][rows, position_ids] = k.to(self.keys[layer].dtype)
        self.values[layer][rows, position_ids] = v.to(self.values[layer].dtype)
        return self.keys[layer], self.values[layer]

    def make_mask(self, position_ids: Tensor):
        """Return the attention backend's mask in which a query sees the slots up to its position."""
        return make_cache_mask(position_ids, self.max_length, self.attention)
