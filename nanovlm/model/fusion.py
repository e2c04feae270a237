"""Image features -> what the decoder sees of pictures: in the sequence of tokens, or beside it.

```
sequence          [ the | <f1> | <f2> | <f3> | circle | is | red ]     features stand where their placeholders stood

cross_attention   [ the | <tile> | circle | is | red ]    a placeholder a tile; between the decoder's blocks:
                            |        |      |     |
                  f1 f2 f3  +--------+------+-----+--> x += tanh(a) * attention(x, features)
                                                       x += tanh(b) * feed_forward(x)
```

In cross-attention (Alayrac et al. 2022, arXiv 2204.14198; norms of queries and keys as in Llama 3.2 Vision) a token
sees the features of a tile where it could see the tile's placeholder: in its own document, in the prefix or its own
branch, not behind it. With `only_latest` it sees the last of these pictures alone. The gates a and b begin at 0, so
that a new model computes what its language model does, to the bit; and a token that sees no picture is never changed.

A fusion is a module that takes the config of the model. A new one is a class like these and an entry of FUSION:

- `layers`: the blocks that it adds; they are sharded and computed again as those of the decoder are
- `forward(x, features, batch, places)`: the embeddings of whole rows -> those with features, and `between(index, x)`,
  which runs before each block of the decoder, or None. `places` int64[placeholders] are flat, in the order of tiles;
  where there are none, features are those of a blank tile that no token sees, so that all ranks run the same layers
- `keep(features [I, P, D]) -> [I, ...]`: in inference, what is computed once of each tile and kept
- `looks_back`: whether tokens behind the placeholders need what is kept, too
- `see(x, views)`: as `forward`, for some new tokens of rows in a pass over a cache

Parameters and persistent buffers that are not of a linear, norm or convolution layer get their first values from a
method `initial_weights` of the module that has them (vlm.py: Drawn). Each but `sequence` has one token a tile in the
text. `train/counting.py` counts the operations of those above.

Legend: B rows, T tokens, I tiles, M tiles of a row, P features of a tile, S features that are seen, D hidden, N query
heads, K key/value heads, H head size, L layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nanovlm.config import DecoderConfig, VLMConfig
from nanovlm.data.types import Batch
from nanovlm.model.attention import attend_sdpa
from nanovlm.model.decoder import RMSNorm
from nanovlm.model.kv_cache import cache_dtype
from nanovlm.model.moe import MLP

Between = Callable[[int, Tensor], Tensor]


class View(NamedTuple):
    """New tokens of a row in a pass over a cache, with what they see.

    They are [offset, offset + num) of the pass and [start, start + num) of the row. `places` are the positions of the
    placeholders of each picture of the row; `kept` has pictures by their index: those with placeholders among these
    tokens, and where tokens look back, those with placeholders before them. A picture is a tile, or a native one.
    """

    offset: int
    start: int
    num: int
    places: Sequence[Sequence[int]]
    kept: Mapping[int, Tensor]


class Fusion(Protocol):
    """What a model calls; see above."""

    layers: nn.ModuleList
    looks_back: bool

    def __call__(self, x: Tensor, features: Tensor, batch: Batch, places: Tensor) -> tuple[Tensor, Between | None]: ...

    def keep(self, features: Tensor) -> Tensor: ...

    def see(self, x: Tensor, views: Sequence[View]) -> tuple[Tensor, Between | None]: ...


# --- sequence -------------------------------------------------------------------------------------------------


class SequenceFusion(nn.Module):
    """Features replace the embeddings of their placeholders (LLaVA, Idefics3). It has no weights.

    Of features that are several times as wide as the decoder (projector.deepstack_layers), the first part does so, and
    each other one is added behind a block of the decoder, the first of them behind the first block.
    """

    looks_back = False

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.layers = nn.ModuleList()

    def forward(self, x_BTD: Tensor, features: Tensor, batch: Batch, places: Tensor) -> tuple[Tensor, Between | None]:
        if not len(places):
            return x_BTD + 0 * features.sum(), None
        features, *levels = features.flatten(0, 1).to(x_BTD.dtype).split(x_BTD.shape[-1], dim=-1)
        x_BTD = x_BTD.flatten(0, 1).index_copy(0, places, features).view_as(x_BTD)
        return x_BTD, self.between(levels, places)

    def between(self, levels: Sequence[Tensor], places: Tensor) -> Between | None:
        def run(index: int, x_BTD: Tensor) -> Tensor:
            if not 1 <= index <= len(levels):
                return x_BTD
            return x_BTD.flatten(0, 1).index_add(0, places, levels[index - 1].to(x_BTD.dtype)).view_as(x_BTD)

        return run if levels else None

    def keep(self, features: Tensor) -> Tensor:
        return features

    def see(self, x_BTD: Tensor, views: Sequence[View]) -> tuple[Tensor, Between | None]:
        places, features = [], []
        for view in views:
            for picture, kept in view.kept.items():
                own = view.places[picture]
                inside = [j for j, position in enumerate(own) if view.start <= position < view.start + view.num]
                places += [view.offset + own[j] - view.start for j in inside]
                features.append(kept[inside[0] : inside[-1] + 1])
        index = torch.tensor(places).to(x_BTD.device, non_blocking=True)
        shown, *levels = torch.cat(features).to(x_BTD.dtype).split(x_BTD.shape[-1], dim=-1)
        x_BTD[0].index_copy_(0, index, shown)
        return x_BTD, self.between(levels, index)


# --- cross-attention ------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Gated layers between the blocks of the decoder, before each `fusion.every`-th of them."""

    looks_back = True

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.every, self.only_latest = config.fusion.every, config.fusion.only_latest
        num = config.decoder.num_hidden_layers // self.every
        self.layers = nn.ModuleList(CrossBlock(config.decoder) for _ in range(num))
        # Not in the blocks, as an engine calls these alone: a sharded block is gathered for its own forward pass.
        self.keys_values = nn.ModuleList(KeysValues(config.decoder) for _ in range(num))

    def forward(self, x_BTD: Tensor, features: Tensor, batch: Batch, places: Tensor) -> tuple[Tensor, Between]:
        tiles_BM, P = batch.row_tiles.clamp(min=0), features.shape[1]
        if not len(places):
            tiles_BM = tiles_BM.new_zeros(len(tiles_BM), 1)
        visible_BTM = find_visible(batch, places, self.only_latest)
        sees_BT1 = visible_BTM.any(-1, keepdim=True)
        # Who sees nothing looks at everything, as no row of a mask may be empty; what comes of it is not used.
        mask = (visible_BTM | ~sees_BT1).repeat_interleave(P, dim=2)[:, None]

        def run_layer(number, x_BTD):
            k, v = (x[tiles_BM].flatten(1, 2) for x in self.keys_values[number](features))
            return self.layers[number](x_BTD, k, v, mask, sees_BT1)

        return x_BTD, self.between(run_layer)

    def keep(self, features: Tensor) -> Tensor:
        """[I, P, D] -> the keys and values of all layers, [I, L, 2, P, K, H]."""
        found = torch.stack([torch.stack(layer(features), dim=1) for layer in self.keys_values], dim=1)
        return found.to(cache_dtype(found.device, found.dtype))

    def see(self, x_BTD: Tensor, views: Sequence[View]) -> tuple[Tensor, Between]:
        rows, sees_T = [], torch.zeros(x_BTD.shape[1], dtype=torch.bool)
        for view in views:
            visible_TM = self.find_visible_of(view)
            tiles = [tile for tile, is_seen in zip(view.kept, visible_TM.any(0).tolist(), strict=True) if is_seen]
            if not tiles:
                continue
            kept, visible_TM = [view.kept[tile] for tile in tiles], visible_TM[:, visible_TM.any(0)]
            sees = visible_TM.any(-1, keepdim=True)
            sees_T[view.offset : view.offset + view.num] = sees[:, 0]
            mask = None
            if not visible_TM.all():
                mask = (visible_TM | ~sees).repeat_interleave(kept[0].shape[2], dim=1)[None, None].to(x_BTD.device)
            whole = kept[0] if len(kept) == 1 else torch.cat(kept, dim=2)  # [L, 2, S, K, H]
            rows.append((slice(view.offset, view.offset + view.num), whole, mask))
        sees_BT1 = sees_T[None, :, None].to(x_BTD.device, non_blocking=True)

        def run_layer(number, x_BTD):
            k, v = ([whole[number, i][None] for _, whole, _ in rows] for i in (0, 1))
            return self.layers[number](x_BTD, k, v, [(own, mask) for own, _, mask in rows], sees_BT1)

        return x_BTD, self.between(run_layer)

    def between(self, run_layer: Callable[[int, Tensor], Tensor]) -> Between:
        def run(index: int, x_BTD: Tensor) -> Tensor:
            number, rest = divmod(index + 1, self.every)
            return x_BTD if rest else run_layer(number - 1, x_BTD)

        return run

    def find_visible_of(self, view: View) -> Tensor:
        """bool[num, tiles in `kept`]: which tiles the new tokens of a row see."""
        places = torch.tensor([view.places[tile][0] for tile in view.kept], dtype=torch.int64)
        visible = places <= torch.arange(view.start, view.start + view.num)[:, None]
        return keep_latest(visible, places) if self.only_latest and len(places) else visible


class KeysValues(nn.Module):
    """Image features [I, P, D] -> keys and values [I, P, K, H] of a layer."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        size = config.num_key_value_heads * config.head_dim
        self.k_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (f(features).unflatten(-1, (-1, self.head_dim)) for f in (self.k_proj, self.v_proj))
        return self.k_norm(k), v


class CrossBlock(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        D, self.head_dim = config.hidden_size, config.head_dim
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.q_proj = nn.Linear(D, config.num_attention_heads * self.head_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, D, bias=False)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.mlp = MLP(D, config.intermediate_size)
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def initial_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from ((gate, torch.zeros(1)) for gate in (self.attn_gate, self.mlp_gate))

    def forward(self, x_BTD, k, v, mask, sees_BT1):
        """Keys, values and mask as in `look`; where sees bool[B, T, 1] is False, tokens stay as they are."""
        q_BTNH = self.q_norm(self.q_proj(self.input_layernorm(x_BTD)).unflatten(-1, (-1, self.head_dim)))
        y_BTD = self.o_proj(look(q_BTNH, k, v, mask).flatten(2))
        x_BTD = x_BTD + torch.where(sees_BT1, self.attn_gate.tanh() * y_BTD, 0)
        y_BTD = self.mlp(self.post_attention_layernorm(x_BTD))
        return x_BTD + torch.where(sees_BT1, self.mlp_gate.tanh() * y_BTD, 0)


def look(q: Tensor, k, v, mask) -> Tensor:
    """Attend from q [B, T, N, H] to k and v [B, S, K, H] under a mask bool[B, 1, T, S].

    Or, with a list of (slice of T, mask or None), from these parts of one row to one of the lists k and v each; all
    else is 0.
    """
    if not isinstance(mask, list):
        return attend_sdpa(q, k, v, mask)
    out = torch.zeros_like(q)
    for (own, own_mask), own_k, own_v in zip(mask, k, v, strict=True):
        out[:, own] = attend_sdpa(q[:, own], own_k, own_v, own_mask).to(q.dtype)
    return out


def find_visible(batch: Batch, places: Tensor, only_latest: bool) -> Tensor:
    """bool[B, T, M]: which tiles of its row a token sees; `places` int64[I] are the flat places of placeholders."""
    B, T = batch.doc_ids.shape
    if not len(places):
        return torch.zeros(B, T, 1, dtype=torch.bool, device=places.device)
    tiles_BM = batch.row_tiles.clamp(min=0)
    where_BM = places[tiles_BM] % T
    docs, branches = (ids.gather(1, where_BM)[:, None] for ids in (batch.doc_ids, batch.branch_ids))
    index = torch.arange(T, device=places.device)[:, None]
    visible = (docs == batch.doc_ids[:, :, None]) & (where_BM[:, None] <= index) & (batch.row_tiles >= 0)[:, None]
    visible &= (branches == 0) | (branches == batch.branch_ids[:, :, None])
    return keep_latest(visible, where_BM[:, None]) if only_latest else visible


def keep_latest(visible: Tensor, places: Tensor) -> Tensor:
    """Of the tiles that a token sees, bool[..., T, M], keep the one whose placeholder comes last."""
    return visible & (places == torch.where(visible, places, -1).amax(-1, keepdim=True))


FUSION = {"sequence": SequenceFusion, "cross_attention": CrossAttention}
