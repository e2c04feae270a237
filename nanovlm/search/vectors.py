"""Vectors in mapped memory and queries -> the rows with the largest inner products, exactly.

A block of rows is read from the file, made fp32 and multiplied with the queries, so that memory holds a block and not
the vectors: what the system has cached of the file is read at the speed of memory, the rest at that of the disk. A
library of nearest neighbours does the same multiplication. Legend: N vectors,
Q queries, D their size.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024  # vectors at a time: in fp32, with 768 numbers each, they fit into the cache of a core
SCORES = 2**26  # scores that are kept at a time


def open_vectors(path: Path) -> Tensor:
    """Map a file of vectors, fp16[N, D] or fp32[N, D], into memory. Nobody may write to them."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # which torch says
        return torch.from_numpy(np.load(path, mmap_mode="r"))


def search(vectors: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest inner products of each query fp32[Q, D], fp32[Q, k], and their rows int64[Q, k].

    The largest comes first. There are fewer than k where there are fewer vectors. Products and sums are fp32.
    """
    N, found = len(vectors), []
    for some in queries.split(max(1, SCORES // max(1, N))):
        scores_QN = torch.empty(len(some), N)
        block = torch.empty(BLOCK, vectors.shape[1])
        for start in range(0, N, BLOCK):
            rows = block[: min(BLOCK, N - start)]
            rows.copy_(vectors[start : start + BLOCK])
            torch.mm(some, rows.T, out=scores_QN[:, start : start + BLOCK])
        found.append(scores_QN.topk(min(k, N)))
    return torch.cat([scores for scores, _ in found]), torch.cat([rows for _, rows in found])
