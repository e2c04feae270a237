"""A picture -> digests and a perceptual hash; hashes -> those that differ in few bits.

The hash is pHash with 256 bits: the picture in grey at 64 x 64, its cosine transform, of which the 16 x 16 lowest
frequencies are kept, and of each whether it is above their median. It is computed in integers, so it has the same bits
on every machine.

To find all hashes that differ in at most k of 256 bits, each is cut into 16 bands of 16 bits (multi-index hashing,
arXiv 1307.2982): of two such hashes some band differs in at most k // 16 bits, so looking up each band, and those that
differ from it in so many bits, finds them all. Legend: N hashes, Q queries, W words of a hash.
"""

import functools
import hashlib
import math
import re

import numpy as np
from PIL import Image

from nanovlm.errors import UserError

SIDE, KEPT, WORDS = 64, 16, 4
MOST_BITS = 47  # three bits in a band would need 697 look-ups of each
FLATTEST = 8  # greys between the darkest and the brightest place of a picture, below which a hash says nothing
TAIL = 8192  # hashes that are compared one by one, before they are sorted
FOUND_AT_ONCE = 2**20  # candidates that are compared at a time
COSINES = np.array(
    [[round(2**20 * math.cos(math.pi * (2 * x + 1) * u / (2 * SIDE))) for x in range(SIDE)] for u in range(KEPT)]
)
# A band has one bit of each row and each column of frequencies, as bits of one column are alike in many pictures.
_ORDER = np.argsort(np.add.outer(np.arange(KEPT), np.arange(KEPT)).flatten() % KEPT, kind="stable")


def digest_pixels(image: Image.Image) -> str:
    """Return a digest of the size and the pixels of an RGB picture, whatever file they came in."""
    size = f"{image.width}x{image.height} ".encode()
    return hashlib.blake2b(size + image.tobytes(), digest_size=16).hexdigest()


def digest_text(text: str) -> str:
    """Return a digest of a text, in which neither case nor white space counts."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).hexdigest()


def hash_picture(image: Image.Image) -> str:
    """Return the perceptual hash of a picture in 64 hexadecimal digits, "" for one that is all of one grey."""
    luma = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS), dtype=np.int64)
    if int(luma.max()) - int(luma.min()) < FLATTEST:
        return ""
    low = (COSINES @ luma @ COSINES.T).flatten()  # below 2**8 * 2**12 * 2**40
    middle = np.sort(low)[KEPT * KEPT // 2 - 1 :][:2].sum()
    return np.packbits(2 * low > middle).tobytes().hex()


def parse_hashes(texts: list[str]) -> np.ndarray:
    """Return hashes as uint64[N, W]. Raises UserError for what is no hash."""
    for text in texts:
        if not re.fullmatch("[0-9a-f]{64}", text):
            raise UserError(f"{text[:80]!r} is no perceptual hash: it must have 64 hexadecimal digits")
    data = bytes.fromhex("".join(texts))
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8)).reshape(len(texts), KEPT * KEPT)
    return np.ascontiguousarray(np.packbits(bits[:, _ORDER], axis=1)).view(np.uint64)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Count the bits in which hashes differ: uint64[..., W] and uint64[..., W] -> int[...]."""
    return np.bitwise_count(a ^ b).sum(-1, dtype=np.int64)


class HashIndex:
    """Hashes in which those near to others are found. About 100 bytes a hash."""

    def __init__(self, most_bits: int):
        if not 0 <= most_bits <= MOST_BITS:
            raise UserError(f"most_bits = {most_bits} must be from 0 to {MOST_BITS}, of 256 that a hash has")
        self.most_bits, self.num, self.num_sorted = most_bits, 0, 0
        self.hashes = np.empty((TAIL, WORDS), dtype=np.uint64)
        self.bands: list[tuple[np.ndarray, np.ndarray]] = []  # of each: rows by their value, where each value starts
        masks = np.arange(2**16, dtype=np.uint16)
        self.masks = masks[np.bitwise_count(masks) <= most_bits // 16]

    def __len__(self):
        return self.num

    def add(self, hashes: np.ndarray):
        """Add hashes, uint64[N, W]; their rows go on from the last."""
        end = self.num + len(hashes)
        if end > len(self.hashes):
            grown = np.empty((max(end, 3 * len(self.hashes) // 2), WORDS), dtype=np.uint64)
            grown[: self.num] = self.hashes[: self.num]
            self.hashes = grown
        self.hashes[self.num : end] = hashes
        self.num = end
        if self.num - self.num_sorted > TAIL:
            self._sort()

    def find(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return all pairs of a query, uint64[Q, W], and a row that is near to it, by query and row."""
        found = [*self._find_in_tail(queries), *self._find_in_bands(queries)]
        pairs = np.unique(np.concatenate([np.empty((0, 2), dtype=np.int64), *found]), axis=0)
        return pairs[:, 0], pairs[:, 1]

    def _sort(self):
        hashes = self.hashes[: self.num]
        self.bands = []
        for band in hashes.view(np.uint16).T:
            starts = np.zeros(2**16 + 1, dtype=np.int64)
            np.cumsum(np.bincount(band, minlength=2**16), out=starts[1:])
            self.bands.append((np.argsort(band, kind="stable").astype(np.int32), starts))
        self.num_sorted = self.num

    def _find_in_tail(self, queries: np.ndarray):
        for start in range(self.num_sorted, self.num, 1024):
            rows = self.hashes[start : min(start + 1024, self.num)]
            differ = functools.reduce(np.add, (
                np.bitwise_count(queries[:, w, None] ^ rows[None, :, w]).astype(np.int16) for w in range(WORDS)
            ))  # fmt: skip
            pairs = np.argwhere(differ <= self.most_bits)
            yield pairs + np.array([0, start])

    def _find_in_bands(self, queries: np.ndarray):
        for own, (rows, starts) in zip(queries.view(np.uint16).T, self.bands, strict=False):
            values = (own[:, None] ^ self.masks).flatten()
            owners = np.repeat(np.arange(len(queries)), len(self.masks))
            first, counts = starts[values], starts[values.astype(np.int64) + 1] - starts[values]
            for part in np.split(
                np.arange(len(values)), np.flatnonzero(np.diff(np.cumsum(counts) // FOUND_AT_ONCE)) + 1
            ):
                num = counts[part]
                before = np.cumsum(num) - num
                places = np.arange(num.sum()) + np.repeat(first[part] - before, num)
                who, candidates = np.repeat(owners[part], num), rows[places].astype(np.int64)
                is_near = distances(queries[who], self.hashes[candidates]) <= self.most_bits
                yield np.stack([who[is_near], candidates[is_near]], axis=1)
