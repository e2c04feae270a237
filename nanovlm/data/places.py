"""Picture -> how many image tokens stand for it, where that follows from its grid.

```
native, qwen    (rows, columns)                   a token for each tile
anyres          (rows, columns, height, width)    those of the tile that shows it whole, those of the grid's tiles put
                                                  together, without the border: height x width, and an end for each row
```

The height x width features of a large anyres picture are shrunk to about as many as `tiling.max_tiles` tiles have
(LLaVA-OneVision, arXiv 2408.03326).
"""

import math
from collections.abc import Sequence

from nanovlm.config import VLMConfig
from nanovlm.data.types import Grid


def count_places(config: VLMConfig, grids: Sequence[Grid]) -> list[int]:
    """Count the image tokens of each picture."""
    if config.is_native:
        return [grid[0] * grid[1] for grid in grids]
    return [config.num_image_features + rows * (columns + 1) for rows, columns in (shrink(config, g) for g in grids)]


def shrink(config: VLMConfig, grid: Grid) -> tuple[int, int]:
    """Return height and width of the features of an anyres picture, as many as become image tokens."""
    _rows, _columns, height, width = grid
    ratio = math.sqrt(height * width / (config.tiling.max_tiles * config.num_image_features))
    if ratio <= 1.1:
        return height, width
    return max(1, int(height // ratio)), max(1, int(width // ratio))  # of a long, flat picture at least a row
