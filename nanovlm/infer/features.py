"""Tiles -> image features, each tile encoded once: features are kept by the digest of the tile, up to a limit."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from nanovlm.model.vlm import VLM


class ImageFeatures:
    """Features [P, D] of tiles, P image tokens of D numbers; the least recently used go first."""

    def __init__(self, model: VLM, most_bytes: int):
        self.model, self.most_bytes, self.num_bytes = model, most_bytes, 0
        self.kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self.num_encoded = 0

    def has(self, digest: bytes) -> bool:
        return digest in self.kept

    def get(self, digests: Sequence[bytes], tiles: Sequence[Tensor]) -> list[Tensor]:
        """Return the features of each tile [C, H, W]; those that are not there are encoded as one batch."""
        missing = {digest: i for i, digest in enumerate(digests) if digest not in self.kept}
        new = {}
        if missing:
            device = self.model.decoder.embed_tokens.weight.device
            pixel_values = torch.stack([tiles[i] for i in missing.values()]).to(device, non_blocking=True)
            # Copies, as a view would keep the whole batch in memory.
            new = {digest: x.clone() for digest, x in zip(missing, self.model.encode(pixel_values), strict=True)}
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
