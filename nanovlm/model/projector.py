"""Patch features -> image tokens: pixel shuffle, then a map to the decoder's width.

Pixel shuffle gathers each square of scale_factor x scale_factor patches into one token, in the order of
Idefics3 (rows of the square first), so that its projector weights fit:

```
a b c d        [a b e f]  [c d g h]
e f g h   ->   [i j m n]  [k l o p]       scale_factor 2: 16 patches, 4 tokens of 4 times the width
i j k l
m n o p
```
"""

import math

from einops import rearrange
from torch import Tensor, nn

from nanovlm.config import ProjectorConfig


def pixel_shuffle(x: Tensor, scale: int) -> Tensor:
    """[I, P, D] of a square grid of patches -> [I, P / scale**2, D * scale**2]."""
    rows = math.isqrt(x.shape[1]) // scale
    return rearrange(x, "I (y a x b) D -> I (y x) (a b D)", y=rows, x=rows, a=scale, b=scale)


class LinearProjector(nn.Module):
    """One linear map without bias, as in Idefics3."""

    def __init__(self, config: ProjectorConfig, vision_size: int, decoder_size: int):
        super().__init__()
        self.scale_factor = config.scale_factor
        self.proj = nn.Linear(vision_size * config.scale_factor**2, decoder_size, bias=False)

    def forward(self, x_IPD: Tensor) -> Tensor:
        """[I, P, vision D] -> [I, image tokens, decoder D]."""
        return self.proj(pixel_shuffle(x_IPD, self.scale_factor))


# (config, width of the encoder, width of the decoder) -> module that turns P patches into P / scale_factor**2 tokens
PROJECTORS = {"linear": LinearProjector}
