"""pixel_values -> patches by convolutions: each stage halves the picture, so that few patches reach attention.

```
[I, 3, S, S] --> stage 1 --> stage 2 --> ... --> stage n --> [I, P, D]       patch_size = 2**n, P = (S / 2**n)**2
                    |
                    +-- convolution 2 x 2 of stride 2 --> norm --> convolution_blocks x ( + depthwise 7 x 7, norm, MLP)
```

Convolutions first are cheap where the picture is large, attention where it is small (FastViT, arXiv 2303.14189; Xiao et
al. 2021, arXiv 2106.14881). Stages and blocks are ConvNeXt's, without layer scale (Liu et al. 2022, arXiv 2201.03545).
Norms are over the channels of one place, so no picture knows of another. Legend: I tiles, y and x places, C channels.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nanovlm.config import VisionConfig

KERNEL, EXPANSION = 7, 2


def stage_widths(config: VisionConfig) -> list[int]:
    """Return the channels after each stage: the width of the encoder after the last, half of it before, at least 8."""
    num_stages = config.patch_size.bit_length() - 1
    return [max(config.hidden_size >> i, min(8, config.hidden_size)) for i in reversed(range(num_stages))]


class ConvolutionStem(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        widths = stage_widths(config)
        self.stages = nn.ModuleList(
            ConvolutionStage(before, after, config) for before, after in zip([3, *widths], widths, strict=False)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        """float[I, C, H, W] -> [I, P, D]; pixels beyond the last whole patch are unused."""
        height, width = (side // self.patch_size * self.patch_size for side in pixel_values.shape[2:])
        x_IyxC = rearrange(pixel_values[:, :, :height, :width], "I C y x -> I y x C")
        for stage in self.stages:
            x_IyxC = stage(x_IyxC)
        return x_IyxC.flatten(1, 2)


class ConvolutionStage(nn.Module):
    def __init__(self, before: int, after: int, config: VisionConfig):
        super().__init__()
        self.downsample = nn.Linear(4 * before, after)
        self.norm = nn.LayerNorm(after, config.layer_norm_eps)
        self.blocks = nn.ModuleList(ConvolutionBlock(after, config) for _ in range(config.convolution_blocks))

    def forward(self, x_IyxC: Tensor) -> Tensor:
        # A convolution whose windows do not overlap is a matrix product.
        windows_IyxF = rearrange(x_IyxC, "I (y a) (x b) C -> I y x (a b C)", a=2, b=2)
        x_IyxC = self.norm(self.downsample(windows_IyxF.to(self.downsample.weight.dtype)))
        for block in self.blocks:
            x_IyxC = block(x_IyxC)
        return x_IyxC


class ConvolutionBlock(nn.Module):
    def __init__(self, width: int, config: VisionConfig):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, KERNEL, padding=KERNEL // 2, groups=width)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.fc1, self.fc2 = nn.Linear(width, EXPANSION * width), nn.Linear(EXPANSION * width, width)

    def forward(self, x_IyxC: Tensor) -> Tensor:
        x_ICyx = rearrange(x_IyxC, "I y x C -> I C y x")  # a view, in torch's channels_last format
        y_IyxC = self.norm(rearrange(self.depthwise(x_ICyx), "I C y x -> I y x C"))
        return x_IyxC + self.fc2(F.gelu(self.fc1(y_IyxC)))


def count_multiplications(config: VisionConfig) -> tuple[int, int]:
    """Count the multiplications of one tile: those of pixels, and all that come after."""
    side, before, counts = config.grid_size * config.patch_size, 3, []
    for width in stage_widths(config):
        side //= 2
        block = KERNEL**2 * width + 2 * EXPANSION * width**2
        counts += [side**2 * 4 * before * width, side**2 * config.convolution_blocks * block]
        before = width
    return counts[0], sum(counts[1:])
