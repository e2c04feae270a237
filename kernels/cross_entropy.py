"""Linear plus cross-entropy: loss = sum over n of log sum over v of exp(z[n, v]) - z[n, y[n]], with z = x W^T.

    forward    for every chunk of rows n:
                   z = x W^T                        cuBLAS, in the dtype of x
                   z -> loss, dz = softmax(z) - onehot(y)    one kernel, dz written over z
                   dx = dz W;  dW += dz^T x         cuBLAS, dW in fp32 where there are several chunks
    backward   dx and dW times the gradient of the loss

Kept for the backward pass: dx and dW, computed with the loss (Hsu et al. 2024, arXiv 2410.10989). z exists for one
chunk at a time. A row's statistics are fp32 and come from one pass over it, rescaled when a larger value turns up.

Why z is written at all: fusing the product into the kernel (Wijmans et al. 2024, arXiv 2411.09009) avoids z, but then
z is computed a second time for the gradient, 8 N V D operations against 6, by our own product, which has to keep up
with cuBLAS. The kernel here moves at most 6 bytes for every 16-bit z, beside 6 D operations of the products: with D =
2048, 3 TB/s and 800 TFLOP/s an eighth of their time, and nothing to tune.

Why chunks of 2048 rows: adding to dW moves 12 bytes for 2 operations a row, so 1600 rows take as long as their product,
and a chunk of z is smaller than dW for every D above 1024.

Legend: N rows, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs

CHUNK = 2048


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None = None) -> Tensor:
    """The formula above, in fp32 from the logits on."""
    if ignore_index is not None:
        hidden, labels = hidden[labels != ignore_index], labels[labels != ignore_index]
    logits = hidden @ weight.T
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


# --- forward kernel ------------------------------------------------------------------------------------------


@triton.jit
def cross_entropy_kernel(p_logits, p_labels, p_losses, s_n, V, GRADIENT: tl.constexpr, BV: tl.constexpr):
    """One row: its loss, and softmax - one-hot in place of the logits."""
    LOG2E: tl.constexpr = 1.4426950408889634
    i_n = tl.program_id(0)
    p_row = p_logits + i_n.to(tl.int64) * s_n
    i_y = tl.load(p_labels + i_n)
    z_y = tl.load(p_row + i_y, mask=(i_y >= 0) & (i_y < V), other=float("nan")).to(tl.float32)
    largest = -3.0e38  # and not -inf, from which -inf cannot be subtracted
    total = 0.0
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        b_z = tl.load(p_row + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)  # [BV]
        larger = tl.maximum(largest, tl.max(b_z, 0))
        total = total * tl.exp2((largest - larger) * LOG2E) + tl.sum(tl.exp2((b_z - larger) * LOG2E), 0)
        largest = larger
    tl.store(p_losses + i_n, tl.log(total) + (largest - z_y))
    if GRADIENT:
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            b_z = tl.load(p_row + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)  # [BV]
            b_dz = tl.exp2((b_z - largest) * LOG2E) / total
            b_dz = tl.where(o_v == i_y, b_dz - 1.0, b_dz)
            tl.store(p_row + o_v, b_dz.to(p_logits.dtype.element_ty), mask=o_v < V)


# --- host ----------------------------------------------------------------------------------------------------


def cross_entropy_(logits: Tensor, labels: Tensor, gradient: bool = True) -> Tensor:
    """Return the loss of every row, fp32[N]; the gradient of their sum takes the place of the logits.

    `logits` fp32, fp16 or bf16 [N, V], contiguous within rows; `labels` integer[N]. A label outside the
    vocabulary has the loss NaN.
    """
    N, V = logits.shape
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    BV = min(4096, triton.next_power_of_2(V))
    if N:
        cross_entropy_kernel[(N,)](
            logits, labels.contiguous(), losses, logits.stride(0), V, gradient, BV, num_warps=max(1, min(8, BV // 256))
        )
    return losses


def forward(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, has_gradients: tuple[bool, bool]):
    """Return the loss, and the gradients of hidden and weight that are asked for, else None."""
    N = len(hidden)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    dx = torch.empty_like(hidden) if has_gradients[0] else None
    dw = torch.zeros_like(weight) if has_gradients[1] and not N else None
    for i in range(0, N, chunk):
        x = hidden[i : i + chunk]
        z = x @ weight.T
        total += cross_entropy_(z, labels[i : i + chunk], any(has_gradients)).sum()
        if dx is not None:
            torch.mm(z, weight, out=dx[i : i + chunk])
        if has_gradients[1]:
            product = z.T @ x
            dw = product.to(torch.float32 if N > chunk else weight.dtype) if dw is None else dw.add_(product)
    return total, dx, dw


# --- autograd ------------------------------------------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk):
        loss, *gradients = forward(hidden, weight, labels, chunk, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return None if dx is None else dx * grad, None if dw is None else (dw * grad).to(ctx.weight_dtype), None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None = None, chunk: int = CHUNK
) -> Tensor:
    """Return the sum of cross-entropies in nats, an fp32 scalar, of `hidden` [N, D] with `weight` [V, D].

    `labels` integer[N]. Rows labelled `ignore_index` are left out before the product, for which the host waits; without
    it (None) every label counts and the host does not wait. At most `chunk` rows of logits exist at once.
    Raises ValueError for shapes or dtypes that do not fit, and on a CPU where Triton does not interpret.
    """
    if not (hidden.is_cuda or knobs.runtime.interpret):
        raise ValueError(f"hidden is on {hidden.device}; kernels run on a GPU, or interpreted with TRITON_INTERPRET=1")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; both must be one of fp32, fp16, bf16")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D] and [V, D]")
    if labels.shape != hidden.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels {labels.dtype}{tuple(labels.shape)} must be integers [N], with N = {len(hidden)}")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} must be at least 1")
    if ignore_index is not None:
        rows = (labels != ignore_index).nonzero()[:, 0]
        hidden, labels = hidden[rows], labels[rows]
    return LinearCrossEntropy.apply(hidden, weight, labels, chunk)
