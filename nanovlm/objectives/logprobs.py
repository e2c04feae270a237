"""Hidden states and labels -> the log-probability of every trained token, and sums of them over branches.

A branch is what is compared with others: an answer of a pair or of a group, or all of a document without branches.
Legend: N trained tokens, D hidden, V vocabulary, G branches, J documents.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanovlm.data.types import Batch
from nanovlm.model.vlm import VLM, Extras

MOST_LOGITS = 2**25  # fp32 logits at once: 128 MiB


def batch_logprobs(
    model: VLM, batch: Batch, extras: Extras | None = None, never: tuple[int, ...] = (), temperature: float = 1.0
) -> Tensor:
    """Return the natural log-probability of every trained token of a batch, fp32[N]; `never` as in `token_logprobs`.

    It is that of sampling at a temperature, by which the logits are divided.
    """
    hidden = model(batch, extras=extras).flatten(0, 1)[batch.trained] / temperature
    return token_logprobs(hidden, batch.labels.flatten()[batch.trained], model.decoder.head_weight, never)


def token_logprobs(
    hidden: Tensor, labels: Tensor, head_weight: Tensor, never: tuple[int, ...] = (), max_logits: int = MOST_LOGITS
) -> Tensor:
    """Return log softmax(hidden @ head_weight.T)[label] of each position, fp32[N] (fp64 for fp64).

    `hidden` [N, D], `labels` int64[N], `head_weight` [V, D]. Tokens of `never`, which are never sampled, are left
    out of the softmax. At most `max_logits` logits are there at once; the backward pass computes them once more.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    left_out = find_ids(never, hidden.device)
    chunk = max(1, max_logits // len(head_weight))
    return TokenLogprobs.apply(hidden, head_weight, labels, left_out, dtype, chunk)  # pyright: ignore[reportReturnType]


@functools.cache
@torch.inference_mode(False)  # whose tensors could not be kept for a backward pass
def find_ids(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """int64[n] on a device, copied there once, as a GPU waits for a copy."""
    return torch.tensor(ids, dtype=torch.int64, device=device)


class TokenLogprobs(torch.autograd.Function):
    """Keeps hidden states and one log-sum a token; the gradient of the logits is (one-hot - softmax) times that."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, never: Tensor, dtype: torch.dtype, chunk: int):
        log_sums, chosen, matrix = [], [], weight.to(dtype)
        for x, y in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            logits = compute_logits(x, matrix, never)
            log_sums.append(logits.logsumexp(-1))
            chosen.append(logits.gather(-1, y[:, None])[:, 0])
        log_sum = torch.cat(log_sums)
        ctx.save_for_backward(hidden, weight, labels, never, log_sum)
        ctx.dtype, ctx.chunk = dtype, chunk
        return torch.cat(chosen) - log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, weight, labels, never, log_sum = ctx.saved_tensors
        matrix = weight.to(ctx.dtype)
        hidden_grad, weight_grad = torch.empty_like(hidden), None
        parts = (x.split(ctx.chunk) for x in (hidden, labels, log_sum, grad, hidden_grad))
        for x, y, total, g, x_grad in zip(*parts, strict=True):
            shares = compute_logits(x, matrix, never).sub_(total[:, None]).exp_()
            logits_grad = shares.mul_(-g[:, None]).scatter_add_(-1, y[:, None], g[:, None]).to(ctx.dtype)
            x_grad.copy_(logits_grad @ matrix)
            if ctx.needs_input_grad[1]:
                part = logits_grad.T @ x.to(ctx.dtype)
                part = part.double() if part.dtype == torch.float64 else part.float()
                weight_grad = part if weight_grad is None else weight_grad.add_(part)
        return hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype), None, None, None, None


def compute_logits(hidden: Tensor, matrix: Tensor, never: Tensor) -> Tensor:
    """Return logits [N, V] in fp32, or fp64 for an fp64 matrix, with -inf for the tokens of `never`."""
    logits = hidden.to(matrix.dtype) @ matrix.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.index_fill_(-1, never, -torch.inf)


class Branches(NamedTuple):
    """The branches of a batch that have trained tokens, in order."""

    # int64[N]: the branch of each trained token, 0 to G - 1.
    index: Tensor
    # int64[G]: the document of each branch, 0 to J - 1.
    document: Tensor
    # int64[G]: the trained tokens of each branch.
    lengths: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums of [N] values over the branches, [G]."""
        return values.new_zeros(len(self.lengths)).index_add(0, self.index, values)

    def mean(self, values: Tensor) -> Tensor:
        """Return the means of [N] values over the branches, [G]."""
        return self.sum(values) / self.lengths


def find_branches(batch: Batch) -> Branches:
    """Return the branches of a batch, in the order in which its rows have them."""
    documents = batch.doc_ids.flatten()[batch.trained].long()
    branches = batch.branch_ids.flatten()[batch.trained].long()
    if not len(documents):
        nothing = batch.trained.new_zeros(0)
        return Branches(nothing, nothing, nothing)
    # Both ascend within a row, and documents from row to row, so the pairs are sorted.
    pairs, index, lengths = torch.unique_consecutive(
        torch.stack((documents, branches), dim=1), dim=0, return_inverse=True, return_counts=True
    )
    _, document = torch.unique_consecutive(pairs[:, 0], return_inverse=True)
    return Branches(index, document, lengths)
