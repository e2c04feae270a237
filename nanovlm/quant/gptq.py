"""A weight and what its layer reads -> codes whose rounding errors make up for each other (GPTQ, arXiv 2210.17323).

The squared error of a layer's outputs is, for each row of errors e = w - quantised w, e @ gram @ e, with gram = sum of
x x^T over what the layer reads. Weights are rounded one input after the other. What a rounding changes in the outputs
the weights that are not rounded yet take on: for the inputs F still to come,

    w_F -= (w_j - quantised w_j) / [H_F^-1]_jj * [H_F^-1]_jF          H = gram + damping

All these inverses are rows of one triangular matrix U with U^T U = H^-1. Inputs are taken in the order of their size in
gram (act-order), as the first ones are rounded with the most weights left to make up for them. The groups, their scales
and zero points are those of the weight as it was, in its own order, so the layout has no index.
Legend: N outputs, K inputs, in the order in which they are rounded.
"""

import torch
from torch import Tensor

from nanovlm.kernels.quantized_weight import QuantizedWeight
from nanovlm.model.quantized import store_int4

DAMPING = 0.01  # of the mean of gram's diagonal is added to it, as in the paper
BLOCK = 128  # inputs after which the weights behind them are updated, all at once


@torch.no_grad()
def round_in_order(weight: Tensor, gram: Tensor, grid: QuantizedWeight) -> QuantizedWeight:
    """Return `grid`, an int4 of the weight [N, K], with codes chosen by GPTQ; `gram` is float[K, K]."""
    K = weight.shape[1]
    order = gram.diagonal().argsort(descending=True, stable=True)
    u_KK = inverse_factor(gram[order][:, order])
    scale_NG, zero_NG = (grid.scales & -16).view(torch.float32), (grid.scales & 15).float()
    scale_KN, zero_KN = (x.repeat_interleave(grid.group, dim=1).t()[order] for x in (scale_NG, zero_NG))
    w_KN = weight.float().t()[order].contiguous()
    codes_KN = torch.empty_like(w_KN)
    for start in range(0, K, BLOCK):
        here = slice(start, start + BLOCK)
        u, w, errors = u_KK[here, here], w_KN[here], torch.empty_like(w_KN[here])
        for j, (scale, zero, code) in enumerate(zip(scale_KN[here], zero_KN[here], codes_KN[here], strict=True)):
            code.copy_(((w[j] / scale).round() + zero).clamp(0, 15))
            errors[j] = (w[j] - (code - zero) * scale) / u[j, j]
            w[j + 1 :] -= u[j, j + 1 :, None] * errors[j]
        w_KN[start + BLOCK :] -= u_KK[here, start + BLOCK :].t() @ errors
    codes, scales = store_int4(codes_KN[order.argsort()].t(), scale_NG, zero_NG)
    return grid._replace(codes=codes, scales=scales)


def inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper triangular U of U^T U = H^-1, fp32[K, K], for gram / its mean diagonal + damping; in fp64.

    With rows and columns in reverse, the Cholesky factor of H is the R of H = R R^T that is upper triangular.
    """
    gram = gram.double()
    mean = gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    h = eye if mean <= 0 else gram / mean + DAMPING * eye
    r = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(r, eye, upper=True).float()
