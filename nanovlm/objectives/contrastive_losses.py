"""Embeddings of pairs -> contrastive losses over the pairs of all ranks, chunk by chunk.

A rank has n of all N pairs of an image and its text, x_i and y_i, rows of [n, D], normalised. With the logits
l_ij = scale x_i . y_j + bias of every image and every text,

    softmax   sum_i  (log sum_j exp(l_ij) + log sum_j exp(l_ji)) / 2 - l_ii        (CLIP, arXiv 2103.00020)
    sigmoid   sum_ij log(1 + exp(-z_ij l_ij)),  z_ii = 1, other z_ij = -1          (SigLIP, arXiv 2303.15343)

are the losses of all pairs; both papers divide them by N. Each rank gets its part of the sum, and once all ranks have
called backward, each has the gradients of the whole sum with respect to its own embeddings; those with respect to scale
and bias are the part's own, and add up over the ranks as those of any weight do.

Images stay where they are. Texts travel round the ranks, with them what is added to their gradients on the way:

             rank 0   rank 1   rank 2
    hop 0    y0       y1       y2           a rank's own texts: its pairs are the diagonal of the logits
    hop 1    y2       y0       y1
    hop 2    y1       y2       y0           after the next hop each is home, its gradient complete

So no rank ever holds the texts of two ranks, nor logits of more than `chunk` images. Gradients are computed with the
loss, as in losses.py, and scaled by the incoming gradient, which must be the same on all ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**25  # 128 MiB in fp32, at most so many at once unless `chunk` is given


def softmax_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    group: dist.ProcessGroup | None = None,
    chunk: int | None = None,
    numbers: Tensor | None = None,
) -> Tensor:
    """Return this rank's part of the softmax loss, a scalar: the sum over its pairs, among those of all ranks.

    `images` and `texts` float[n, D], where n may differ between ranks and be 0; `scale` is exp(logit_scale). The ranks
    are those of `group`, by default all. Logits are computed for `chunk` images at a time. Texts whose `numbers`
    int64[n], from 0 to 2**24 - 1, are equal say the same: none of them is a wrong answer for an image of another, and
    such logits are left out.
    """
    return _run(Softmax, images, texts, scale, group, chunk, numbers)


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    group: dist.ProcessGroup | None = None,
    chunk: int | None = None,
    numbers: Tensor | None = None,
) -> Tensor:
    """Return this rank's part of the sigmoid loss, a scalar: its images beside the texts of all ranks.

    The arguments are those of `softmax_loss`; `bias` is added to every logit.
    """
    return _run(Sigmoid, images, texts, scale, group, chunk, numbers, bias)


def cached_loss(
    embed: Callable[[Any], tuple[Tensor, ...]], parts: Sequence[Any], loss: Callable[..., Tensor]
) -> Tensor:
    """Return loss(images, texts) of all parts together, while the activations of one part alone are in memory.

    `embed` maps a part to the embeddings of its pairs, such as (images [n, D], texts [n, D]). What it computes on the
    way is discarded; the backward pass goes from the loss to the embeddings and then, part by part, computes it again,
    with the random numbers of the first time (Gao et al. 2021, arXiv 2101.06983). With DistributedDataParallel, call
    this inside the forward pass of the wrapped module, so that the wrapper sees one pass.
    """
    if len(parts) == 1:
        return loss(*embed(parts[0]))
    embedded = [checkpoint(embed, part, use_reentrant=False) for part in parts]
    return loss(*map(torch.cat, zip(*embedded, strict=True)))


def _run(function, images: Tensor, texts: Tensor, scale, group, chunk: int | None, numbers, *bias) -> Tensor:
    assert images.shape == texts.shape, (images.shape, texts.shape)
    dtype = torch.promote_types(images.dtype, torch.float32)
    images, texts, scale, *bias = (
        torch.as_tensor(x, device=images.device).to(dtype) for x in (images, texts, scale, *bias)
    )
    # They travel with the texts, as numbers that fp32 has exactly; a width of 0 where there are none.
    numbers = texts.detach()[:, :0] if numbers is None else numbers.to(dtype)[:, None]
    with torch.autocast(images.device.type, enabled=False):
        return function.apply(images, texts, scale, *bias, numbers, group, chunk, torch.is_grad_enabled())


class Softmax(torch.autograd.Function):
    """The log-sums over all texts of an image and over all images of a text take one round, gradients another.

    Logits are relative to that of the image's or the text's own pair, l_ij - l_ii and l_ij - l_jj, so that small losses
    and their gradients are not lost to rounding.
    """

    @staticmethod
    def forward(ctx, images: Tensor, texts: Tensor, scale: Tensor, numbers, group, chunk, needs_grad: bool) -> Tensor:
        width = texts.shape[1]
        pairs = (images * texts).sum(1, keepdim=True)
        row_sums = torch.zeros_like(pairs)  # of the pairs themselves: exp(l_ii - l_ii) = 1
        own = torch.cat([texts, numbers, pairs, torch.zeros_like(pairs)], 1)
        for travelling, is_own in go_round(own, group):
            y, text_numbers, text_pairs, column_sums = travelling.split([width, numbers.shape[1], 1, 1], 1)
            for rows in chunks(images, y, chunk):
                dots = images[rows] @ y.T
                by_row, by_column = scale * (dots - pairs[rows]), scale * (dots - text_pairs.T)
                for x in (by_row, by_column):
                    if numbers.shape[1]:
                        x.masked_fill_(numbers[rows] == text_numbers.T, -torch.inf)
                    if is_own:
                        x.diagonal(rows.start).fill_(-torch.inf)
                row_sums[rows] = row_sums[rows].logaddexp(by_row.logsumexp(1, keepdim=True))
                column_sums.copy_(column_sums.logaddexp(by_column.logsumexp(0)[:, None]))
        total = (row_sums + own[:, -1:]).sum() / 2
        if not needs_grad:
            return total
        grad_x, grad_scale = torch.zeros_like(images), torch.zeros_like(total)
        own = torch.cat([own, torch.zeros_like(texts)], 1)
        for travelling, is_own in go_round(own, group):
            y, text_numbers, *sums, grad_y = travelling.split([width, numbers.shape[1], 1, 1, width], 1)
            text_pairs, column_sums = sums
            for rows in chunks(images, y, chunk):
                x = images[rows]
                dots = x @ y.T
                by_row, by_column = dots - pairs[rows], dots - text_pairs.T
                of_row = (scale * by_row - row_sums[rows]).exp()
                of_column = (scale * by_column - column_sums.T).exp()
                if numbers.shape[1]:
                    for x_of in (of_row, of_column):
                        x_of.masked_fill_(numbers[rows] == text_numbers.T, 0)
                if is_own:  # the gradient of the diagonal is softmax - 1
                    of_row.diagonal(rows.start).copy_((-row_sums[rows, 0]).expm1())
                    of_column.diagonal(rows.start).copy_((-column_sums[rows, 0]).expm1())
                grad_scale += (of_row * by_row + of_column * by_column).sum() / 2
                grad = scale * (of_row + of_column) / 2
                grad_x[rows] += grad @ y
                grad_y += grad.T @ x
        ctx.save_for_backward(grad_x, own[:, -width:], grad_scale.view_as(scale))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *(grad * x for x in ctx.saved_tensors), None, None, None, None


class Sigmoid(torch.autograd.Function):
    """Every pair is by itself, so that one round is enough for the loss and its gradients."""

    @staticmethod
    def forward(ctx, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, numbers, group, chunk, needs_grad):
        width, others = texts.shape[1], texts.shape[1] + numbers.shape[1]
        grad_x = torch.zeros_like(images)
        total, grad_scale, grad_bias = images.new_zeros(3)
        own = torch.cat([texts, numbers, *([torch.zeros_like(texts)] if needs_grad else [])], 1)
        for travelling, is_own in go_round(own, group):
            y, text_numbers, grad_y = travelling[:, :width], travelling[:, width:others], travelling[:, others:]
            for rows in chunks(images, y, chunk):
                x = images[rows]
                dots = x @ y.T
                logits = scale * dots + bias
                own_logits = logits.diagonal(rows.start).neg() if is_own else None  # now -z l
                if numbers.shape[1]:
                    logits.masked_fill_(numbers[rows] == text_numbers.T, -torch.inf)
                if own_logits is not None:
                    logits.diagonal(rows.start).copy_(own_logits)
                total -= F.logsigmoid(-logits).sum()
                if not needs_grad:
                    continue
                grad = logits.sigmoid_()
                if is_own:
                    grad.diagonal(rows.start).neg_()
                grad_scale += (grad * dots).sum()
                grad_bias += grad.sum()
                grad *= scale
                grad_x[rows] += grad @ y
                grad_y += grad.T @ x
        if needs_grad:
            ctx.save_for_backward(grad_x, own[:, others:], grad_scale.view_as(scale), grad_bias.view_as(bias))
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *(grad * x for x in ctx.saved_tensors), None, None, None, None


def chunks(images: Tensor, texts: Tensor, size: int | None) -> Iterator[slice]:
    """Yield the rows of images whose logits with all the texts are computed at once."""
    size = size or max(1, MAX_LOGITS // max(1, len(texts)))
    for start in range(0, len(images), size):
        yield slice(start, start + size)


def go_round(own: Tensor, group: dist.ProcessGroup | None) -> Iterator[tuple[Tensor, bool]]:
    """Yield `own` [n, W] of every rank of the group, this rank's first, and whether it is this rank's.

    What is written into a tensor while it is here travels on with it; at the end `own` holds what all ranks wrote.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        yield own, True
        return
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    lengths = [0] * num_ranks
    dist.all_gather_object(lengths, len(own), group)
    travelling = own
    for hop in range(num_ranks):
        yield travelling, hop == 0
        arriving = own.new_empty(lengths[rank - hop - 1], own.shape[1])
        messages = []
        if len(travelling):
            messages.append(dist.P2POp(dist.isend, travelling, group=group, group_peer=(rank + 1) % num_ranks))
        if len(arriving):
            messages.append(dist.P2POp(dist.irecv, arriving, group=group, group_peer=(rank - 1) % num_ranks))
        for request in dist.batch_isend_irecv(messages) if messages else []:
            request.wait()
        travelling = arriving
    own.copy_(travelling)
