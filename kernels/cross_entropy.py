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

Why few programs, each of which takes row after row: a row is read twice, and the second time it comes from the L2 cache
if all rows that are being read fit in there. With a program for every row an H100 runs 1,056 at a time: for 152k values
in bf16 these are 321 MB, beside 50 MB of cache. Where few programs run on a processor their blocks are longer, so that
as many bytes are on their way. This is arithmetic, not measured yet.

Why chunks of 2048 rows: adding to dW moves 12 bytes for 2 operations a row, so 1600 rows take as long as their product,
and a chunk of z is smaller than dW for every D above 1024.

Legend: N rows, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch.autograd.function import once_differentiable

from nanovlm.kernels.register import autocast, is_interpreted, operator

CHUNK = 2048


def linear_cross_entropy_ref(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None = None) -> Tensor:
    """The formula above, in fp32 from the logits on."""
    if ignore_index is not None:
        hidden, labels = hidden[labels != ignore_index], labels[labels != ignore_index]
    logits = hidden @ weight.T
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


# --- forward kernel ------------------------------------------------------------------------------------------


@triton.jit
def cross_entropy_kernel(
    p_logits, p_labels, p_losses, s_n, N, V, ignore_index, GRADIENT: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """Some rows: of each its loss, and softmax - one-hot in place of the logits; zeros if its label is ignored."""
    LOG2E: tl.constexpr = 1.4426950408889634
    for i in range(tl.cdiv(N - tl.program_id(0), tl.num_programs(0))):
        i_n = tl.program_id(0) + i * tl.num_programs(0)
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
        loss = tl.log(total) + (largest - z_y)
        if ignore_index is not None:
            loss = tl.where(i_y == ignore_index, 0.0, loss)
        tl.store(p_losses + i_n, loss)
        if GRADIENT:
            for i_v in range(0, V, BV):
                o_v = i_v + tl.arange(0, BV)
                b_z = tl.load(p_row + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)  # [BV]
                b_dz = tl.exp2((b_z - largest) * LOG2E) / total
                b_dz = tl.where(o_v == i_y, b_dz - 1.0, b_dz)
                if ignore_index is not None:
                    b_dz = tl.where(i_y == ignore_index, 0.0, b_dz)
                tl.store(p_row + o_v, b_dz.to(p_logits.dtype.element_ty), mask=o_v < V)


# --- host ----------------------------------------------------------------------------------------------------


def cross_entropy_(logits: Tensor, labels: Tensor, gradient: bool = True, ignore_index: int | None = None) -> Tensor:
    """Return the loss of every row, fp32[N]; the gradient of their sum takes the place of the logits.

    `logits` fp32, fp16 or bf16 [N, V], contiguous within rows; `labels` integer[N]. A label outside the
    vocabulary has the loss NaN, but `ignore_index` has the loss 0 and the gradient 0.
    """
    N, V = logits.shape
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    programs, BV = split_work(logits)
    if N:
        cross_entropy_kernel[(min(N, programs),)](
            logits, labels.contiguous(), losses, logits.stride(0), N, V, ignore_index, gradient, BV,
            num_warps=max(1, min(16, BV // 256)),
        )  # fmt: skip
    return losses


def split_work(logits: Tensor) -> tuple[int, int]:
    """Return how many programs run at most, and the length of their blocks.

    A processor has as many as have their rows in the cache, from 1 to 8; 8 with blocks of 4096, fewer with longer ones.
    """
    processors, cache = measure_gpu(logits)
    V = logits.shape[1]
    share = max(1, min(8, cache // (processors * V * logits.element_size())))
    return processors * share, min(16384, 32768 // 2 ** (share.bit_length() - 1), triton.next_power_of_2(V))


def measure_gpu(logits: Tensor) -> tuple[int, int]:
    """Return the number of streaming multiprocessors and the bytes of L2 cache; when interpreting, those of an H100."""
    if not logits.is_cuda:
        return 132, 50 * 2**20
    properties = torch.cuda.get_device_properties(logits.device)
    return properties.multi_processor_count, properties.L2_cache_size


def forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int | None,
    chunk: int,
    has_gradients: tuple[bool, bool],
):
    """Return the loss, the gradients of hidden and weight that are asked for, else None, and the losses of the rows."""
    N = len(hidden)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    losses = total.new_empty(N)
    dx = hidden.new_empty(hidden.shape) if has_gradients[0] else None
    dw = weight.new_zeros(weight.shape) if has_gradients[1] and not N else None
    for i in range(0, N, chunk):
        x = hidden[i : i + chunk]
        if ignore_index is not None:  # 0 times NaN is NaN in the product for dw
            x = x.masked_fill((labels[i : i + chunk] == ignore_index)[:, None], 0)
        z = x @ weight.T
        losses[i : i + chunk] = each = cross_entropy_(z, labels[i : i + chunk], any(has_gradients), ignore_index)
        total += each.sum()
        if dx is not None:
            torch.mm(z, weight, out=dx[i : i + chunk])
        if has_gradients[1]:
            product = z.T @ x
            dw = product.to(torch.float32 if N > chunk else weight.dtype) if dw is None else dw.add_(product)
    return total, dx, dw, losses


# --- autograd ------------------------------------------------------------------------------------------------


def fake(hidden, weight, labels, ignore_index, chunk, needs_dx, needs_dw):
    dx = hidden.new_empty(hidden.shape if needs_dx else 0)
    dw = weight.new_empty(weight.shape if needs_dw else 0, dtype=torch.float32 if len(hidden) > chunk else weight.dtype)
    return *(hidden.new_empty(shape, dtype=torch.float32) for shape in ((), len(hidden))), dx, dw


@operator("linear_cross_entropy", fake)
def run(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None, chunk: int, needs_dx: bool, needs_dw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, dx, dw, losses = forward(hidden, weight, labels, ignore_index, chunk, (needs_dx, needs_dw))
    *_, no_dx, no_dw = fake(hidden, weight, labels, ignore_index, chunk, False, False)
    return loss, losses, no_dx if dx is None else dx, no_dw if dw is None else dw


def save(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.weight_dtype, ctx.needs = inputs[1].dtype, inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros of the sizes of dx and dw would be made for them


@once_differentiable
def differentiate(ctx, grad, *_):
    """Scale what was saved: dw in fp32 may be the largest tensor of a step, so in place.

    Not so if this graph is kept, and a second backward pass begins with the same tensors; nor when torch traces.
    """
    dx, dw = ctx.saved_tensors
    in_place = type(dw) is Tensor and not _get_current_graph_task_keep_graph()
    scale = Tensor.mul_ if in_place else Tensor.mul
    dx = scale(dx, grad) if ctx.needs[0] else None
    dw = scale(dw, grad).to(ctx.weight_dtype) if ctx.needs[1] else None
    return dx, dw, *[None] * 5


run.register_autograd(differentiate, setup_context=save)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None = None, chunk: int = CHUNK
) -> Tensor:
    """Return the sum of cross-entropies in nats, an fp32 scalar, of `hidden` [N, D] with `weight` [V, D].

    `labels` integer[N]. Rows labelled `ignore_index` have no part in the loss, whatever is in them, but are multiplied
    like others, since the host waits for nothing: where there are many, leave them out before the call. Without it
    (None) every label counts. At most `chunk` rows of logits exist at once. Under autocast the products are in its
    dtype. Raises ValueError for shapes or dtypes that do not fit, and on a CPU where Triton does not interpret.
    """
    return linear_cross_entropies(hidden, weight, labels, ignore_index, chunk)[0]


def linear_cross_entropies(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return the sum as linear_cross_entropy does, and what it is of: the loss of each row, fp32[N], no gradient."""
    hidden, weight = autocast(hidden, weight)
    if not (hidden.is_cuda or is_interpreted()):
        raise ValueError(f"hidden is on {hidden.device}; kernels run on a GPU, or interpreted with TRITON_INTERPRET=1")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; both must be one of fp32, fp16, bf16")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D] and [V, D]")
    if labels.shape != hidden.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels {labels.dtype}{tuple(labels.shape)} must be integers [N], with N = {len(hidden)}")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} must be at least 1")
    needs_dx, needs_dw = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    return run(hidden, weight, labels, ignore_index, chunk, needs_dx, needs_dw)[:2]
