"""How an image is cut: its plan, where it lies on a canvas of tiles, and the markers of places in a grid."""

from typing import NamedTuple

from nanovlm.config import VLMConfig
from nanovlm.data.types import Grid


class TilePlan(NamedTuple):
    """How an image is cut: its size on the canvas of rows x cols tiles, and whether a view of the whole is added."""

    width: int
    height: int
    rows: int
    cols: int
    has_global: bool
    # anyres: rows and columns of the features that show the image.
    kept: tuple[int, ...] = ()

    @property
    def num_tiles(self) -> int:
        return self.rows * self.cols + self.has_global


class View(NamedTuple):
    """Where an image lies on a canvas of rows x cols tiles: its left upper corner and its size, in pixels."""

    rows: int
    cols: int
    left: int
    top: int
    width: int
    height: int


def find_grid(plan: TilePlan) -> Grid:
    return (plan.rows, plan.cols, *plan.kept)


def stretch(rows: int, cols: int, config: VLMConfig) -> View:
    return View(rows, cols, 0, 0, cols * config.tile_size, rows * config.tile_size)


def centre(rows: int, cols: int, width: int, height: int, side: int) -> View:
    return View(rows, cols, (cols * side - width) // 2, (rows * side - height) // 2, width, height)


def find_scale(width: int, height: int, rows: int, cols: int, side: int) -> float:
    """Return the factor at which an image just fits into a grid of tiles."""
    return min(cols * side / width, rows * side / height)


def write_place(row: int, col: int) -> str:
    return f"<row_{row}_col_{col}>"


def write_grid(plan: TilePlan, image: str) -> str:
    """Write the tiles of a grid, each after its position marker."""
    places = [(r, c) for r in range(1, plan.rows + 1) for c in range(1, plan.cols + 1)]
    return "".join(f"{write_place(r, c)}{image}" for r, c in places)
