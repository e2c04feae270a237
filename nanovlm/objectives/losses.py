"""Hidden states and labels -> loss."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanovlm import distributed
from nanovlm.config import MoEConfig, pick
from nanovlm.errors import UserError


def next_token_loss(
    hidden: Tensor, labels: Tensor, head_weight: Tensor, max_logits: int | None = None, backend: str = "torch"
) -> Tensor:
    """Return the sum of cross-entropies over N trained positions, in nats, fp32 scalar.

    `hidden` [N, D], `labels` int64[N], `head_weight` [V, D]. If N is 0, the sum and all
    gradients are 0. Logits are computed in chunks of at most `max_logits`, by default a size that suits the `backend`,
    a key of CROSS_ENTROPY; so those of a large vocabulary are never all in memory.
    """
    return next_token_losses(hidden, labels, head_weight, max_logits, backend)[0]


def next_token_losses(
    hidden: Tensor, labels: Tensor, head_weight: Tensor, max_logits: int | None = None, backend: str = "torch"
) -> tuple[Tensor, Tensor]:
    """Return what next_token_loss does, and the cross-entropy of each position, fp32[N], which has no gradient."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return pick(CROSS_ENTROPY, backend, "decoder.cross_entropy")(hidden, head_weight, labels, dtype, max_logits)


# A backend computes products in `dtype`: (hidden [N, D], weight [V, D], labels int64[N], dtype, max_logits) -> the sum,
# fp32, and the losses that it is of, fp32[N].
def cross_entropy_torch(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, max_logits: int | None):
    """torch, with at most 64 MiB of fp32 logits at once unless `max_logits` is given."""
    return LinearCrossEntropy.apply(hidden, weight, labels, dtype, max(1, (max_logits or 2**24) // len(weight)))


class LinearCrossEntropy(torch.autograd.Function):
    """sum of -log softmax(hidden @ weight.T)[label], whose gradients are computed with it, chunk by chunk.

    The gradient of the logits is softmax - one-hot; the gradients of `hidden` and `weight` that follow are kept, and
    scaled by the incoming gradient in the backward pass (as in Hsu et al. 2024, arXiv 2410.10989). Products are
    computed in `dtype`; the gradient of the weights is summed in fp32.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, chunk: int):
        total, losses = torch.zeros((), device=hidden.device), torch.empty(len(labels), device=hidden.device)
        hidden_grad, weight_grad = torch.empty_like(hidden), None
        matrix = weight.to(dtype)
        parts = (part.split(chunk) for part in (hidden, labels, hidden_grad, losses))
        for x, y, x_grad, loss in zip(*parts, strict=True):
            x = x.to(dtype)
            logits = (x @ matrix.T).float()
            log_sum = logits.logsumexp(-1, keepdim=True)
            loss.copy_(each := (log_sum - logits.gather(-1, y[:, None]))[:, 0])
            total += each.sum()
            grad = logits.sub_(log_sum).exp_().scatter_add_(-1, y[:, None], torch.full_like(log_sum, -1.0)).to(dtype)
            del logits  # the next chunk's would be beside them
            x_grad.copy_(grad @ matrix)
            if ctx.needs_input_grad[1]:
                part = grad.T @ x
                weight_grad = part.float() if weight_grad is None else weight_grad.add_(part)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _losses_grad):
        hidden_grad, weight_grad = ctx.saved_tensors
        weight_grad = None if weight_grad is None else (weight_grad * grad).to(ctx.weight_dtype)
        return (hidden_grad.float() * grad).to(hidden_grad.dtype), weight_grad, None, None, None


def cross_entropy_triton(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, max_logits: int | None):
    """Our own kernel from logits to their gradient, both in the dtype of `hidden`."""
    try:
        from nanovlm.kernels.cross_entropy import CHUNK, linear_cross_entropies
    except ImportError as error:
        raise UserError(f"decoder.cross_entropy = 'triton' needs the package triton: {error}") from error
    chunk = max(1, max_logits // len(weight)) if max_logits else CHUNK
    return linear_cross_entropies(hidden.to(dtype), weight.to(dtype), labels, chunk=chunk)


def load_balancing_loss(shares: Tensor, is_token: Tensor, load: Tensor, num_tokens: Tensor) -> Tensor:
    """E * sum over experts of f P, smallest (k) when all are equal (Fedus et al. 2021, arXiv 2101.03961, eq. 4).

    f is the load [E] divided by num_tokens, a constant; P is the mean over tokens of the router's shares fp32[R, E].
    With the load of a whole step instead of one micro-batch, experts can specialise within a batch (arXiv 2501.11873).
    """
    mean_shares = (shares * is_token[:, None]).sum(0) / is_token.sum().clamp(min=1)
    return len(load) * (load / num_tokens.clamp(min=1) * mean_shares).sum()


def router_z_loss(logits: Tensor, is_token: Tensor) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of router logits fp32[R, E] (Zoph et al. 2022, arXiv 2202.08906)."""
    return (logits.logsumexp(-1).square() * is_token).sum() / is_token.sum().clamp(min=1)


def router_loss(extras, is_token: Tensor, config: MoEConfig) -> Tensor:
    """Mean over layers of the balance loss and z-loss with their weights; `is_token` bool[B, T] is False on padding.

    `extras` holds the routing of this micro-batch; its load [L, E] and num_tokens are summed over the micro-batches of
    a step. The global loss sums them over all ranks too.
    """
    is_token = is_token.flatten()
    loads = torch.stack([r.load for r in extras.routing])
    extras.load = extras.load + loads
    extras.num_tokens = extras.num_tokens + is_token.sum()
    if config.balance == "global_loss":
        loads, num_tokens = (distributed.add_up_tensor(x) for x in (extras.load, extras.num_tokens))
    else:
        num_tokens = is_token.sum()
    total = torch.zeros((), device=is_token.device)
    for routing, load in zip(extras.routing, loads, strict=True):
        if config.balance in ("loss", "global_loss"):
            total = total + config.balance_weight * load_balancing_loss(routing.shares, is_token, load, num_tokens)
        if config.z_weight:
            total = total + config.z_weight * router_z_loss(routing.logits, is_token)
    return total / len(loads)


CROSS_ENTROPY = {"torch": cross_entropy_torch, "triton": cross_entropy_triton}
