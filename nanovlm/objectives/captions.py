"""Features of pictures and their captions -> the loss of each caption, told token by token from its picture.

```
features of the patches [J, P, D] --------> connector ----------------------+
                                                                            v cross-attention
begin, a, red, star --> token table --> + positions --> causal self-attention --> norm, head --> a, red, star, <end>
```

A contrastive loss asks which text is a picture's, this one asks for each word of it, which the patches have to show
(CoCa, Yu et al. 2022, arXiv 2205.01917; SigLIP 2, Tschannen et al. 2025, arXiv 2502.14786). CoCa's text tower is the
lower half of its decoder. Here the decoder begins with plain token embeddings, because a text tower whose tokens see
those behind them would give the answers away; it reads and writes with the text tower's table of tokens.
Legend: J captions, each of one picture, L tokens, P patches, D hidden, V vocabulary.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovlm.config import DecoderConfig, DualConfig
from nanovlm.data.types import IGNORE, Batch
from nanovlm.model.dual import as_vision
from nanovlm.model.fusion import CrossBlock, KeysValues
from nanovlm.model.vision import VisionBlock
from nanovlm.objectives.logprobs import token_logprobs


class CaptionDecoder(nn.Module):
    def __init__(self, config: DualConfig, num_layers: int, seed: int):
        """Draw the weights with a generator of their own, so that those of the model are as in any run."""
        super().__init__()
        t = config.text
        D, N = t.hidden_size, t.num_attention_heads
        to_tokens = dataclasses.replace(as_vision(t), attention="sdpa")
        to_patches = DecoderConfig(
            hidden_size=D,
            intermediate_size=t.intermediate_size,
            num_attention_heads=N,
            num_key_value_heads=N,
            head_dim=D // N,
            rms_norm_eps=t.layer_norm_eps,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.begin = nn.Parameter(torch.randn(D))
            self.positions = nn.Parameter(0.5 * torch.randn(t.max_position_embeddings, D))
            self.connector = nn.Linear(config.vision.hidden_size, D)
            self.layers = nn.ModuleList(VisionBlock(to_tokens) for _ in range(num_layers))
            self.keys_values = nn.ModuleList(KeysValues(to_patches) for _ in range(num_layers))
            self.cross_layers = nn.ModuleList(CrossBlock(to_patches) for _ in range(num_layers))
            self.norm = nn.LayerNorm(D, t.layer_norm_eps)
            self.head = nn.Linear(D, D)  # to what the table has for the next token, not the last one
        for name, gate in self.cross_layers.named_parameters():
            if name.endswith("_gate"):  # open, as there is no language model here that pictures could spoil
                nn.init.ones_(gate)

    def forward(self, features: Tensor, captions: Tensor, table: Tensor) -> Tensor:
        """Return the mean over each caption's tokens of -log p(token | picture, tokens before), fp32[J].

        `features` [J, P, D] of the pictures; `captions` int64[J, L], IGNORE behind their ends; token `table` [V, D].
        """
        is_token, L = captions != IGNORE, captions.shape[1]
        before = F.embedding(captions[:, :-1].clamp(min=0), table)
        # Any table fits: its tokens come in with variance 1, and logits begin with about as much.
        x_JLD = torch.cat((self.begin.expand(len(captions), 1, -1), F.layer_norm(before, before.shape[-1:])), 1)
        scale = table.detach().float().square().sum(1).mean().rsqrt()
        x_JLD = x_JLD + self.positions[:L]
        causal = torch.ones(L, L, dtype=torch.bool, device=captions.device).tril()[None, None]
        sees, features = is_token.new_ones(1, 1, 1), self.connector(features)
        for layer, keys_values, cross_layer in zip(self.layers, self.keys_values, self.cross_layers, strict=True):
            x_JLD = cross_layer(layer(x_JLD, None, causal), *keys_values(features), None, sees)
        hidden = self.head(self.norm(x_JLD[is_token])) * scale
        losses = -token_logprobs(hidden, captions[is_token], table)
        sums = losses.new_zeros(len(captions)).index_add(0, is_token.nonzero()[:, 0], losses)
        return sums / is_token.sum(1).clamp(min=1)


def find_captions(batch: Batch) -> Tensor:
    """Return the tokens of each document, int64[J, L], with IGNORE behind them; an empty one where there is none."""
    is_there = batch.doc_ids >= 0
    lengths = batch.doc_ids[is_there].long().bincount().tolist()
    if not lengths:
        return torch.full((1, 1), IGNORE, device=batch.input_ids.device)
    return nn.utils.rnn.pad_sequence(
        list(batch.input_ids[is_there].split(lengths)), batch_first=True, padding_value=IGNORE
    )
