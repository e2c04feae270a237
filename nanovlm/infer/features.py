"""Pictures -> what fusion needs of them, each encoded once: it is kept by the digest of the picture, up to a limit."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanovlm.data.places import count_places
from nanovlm.data.types import Grid
from nanovlm.model.vlm import VLM


class Picture(NamedTuple):
    """What the encoder reads at once: a tile [1, C, H, W], or the tiles [n, C, H, W] of a picture with a grid."""

    tiles: Tensor
    grid: Grid | None


class ImageFeatures:
    """What fusion keeps of pictures: features [P, D], P image tokens of D numbers, or keys and values of its layers.

    The least recently used go first.
    """

    def __init__(self, model: VLM, most_bytes: int):
        self.model, self.most_bytes, self.num_bytes = model, most_bytes, 0
        self.kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self.num_encoded = 0

    def has(self, digest: bytes) -> bool:
        return digest in self.kept

    def get(self, digests: Sequence[bytes], pictures: Sequence[Picture]) -> list[Tensor]:
        """Return the features of each picture; those that are not there are encoded as one batch."""
        missing = {digest: i for i, digest in enumerate(digests) if digest not in self.kept}
        new = {}
        if missing:
            device = self.model.decoder.embed_tokens.weight.device
            asked = [pictures[i] for i in missing.values()]
            pixel_values = torch.cat([picture.tiles for picture in asked]).to(device, non_blocking=True)
            grids = [picture.grid for picture in asked if picture.grid]
            x_IPD = self.model.encode(pixel_values, grids)
            # Copies, as a view would keep the whole batch in memory.
            sizes = count_places(self.model.config, grids) if grids else [len(picture.tiles) for picture in asked]
            kept = self.model.fusion.keep(x_IPD).split(sizes)
            new = {digest: x.flatten(0, 1).clone() for digest, x in zip(missing, kept, strict=True)}
        self.num_encoded += len(missing)
        found = [new[digest] if digest in new else self.kept[digest] for digest in digests]
        for digest, features in zip(digests, found, strict=True):
            self._keep(digest, features)
        return found

    def _keep(self, digest, features):
        if features.nbytes > self.most_bytes:
            return
        if digest not in self.kept:
            self.num_bytes += features.nbytes
        self.kept[digest] = features
        self.kept.move_to_end(digest)
        while self.num_bytes > self.most_bytes:
            _, oldest = self.kept.popitem(last=False)
            self.num_bytes -= oldest.nbytes
