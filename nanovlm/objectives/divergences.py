"""Hidden states of a student and of its teacher -> how far their next-token distributions are apart.

A divergence is summed over the trained tokens. Neither pass ever holds the logits of all of them: they are computed in
chunks, and once more in the backward pass. Legend: N trained tokens, D hidden, V vocabulary, K stored tokens.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanovlm.objectives.logprobs import MOST_LOGITS, compute_logits

# (positions, the student's log-probabilities [n, V]) -> the teacher's [n, V] and its likeliest tokens int64[n].
Teach = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


def divergences(
    hidden: Tensor,
    head_weight: Tensor,
    teach: Teach,
    names: Sequence[str],
    beta: float = 0.5,
    temperature: float = 1.0,
    max_logits: int = MOST_LOGITS,
) -> tuple[Tensor, Tensor]:
    """Return the sum of each named divergence over N tokens, fp32[len(names)], and at how many both agree most, fp32.

    `hidden` [N, D] and `head_weight` [V, D] are the student's. Both sides' logits are divided by the temperature, and
    the divergences multiplied by its square, so that gradients keep their size (Hinton et al. 2015, arXiv 1503.02531).
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    chunk = max(1, max_logits // len(head_weight))
    settings = [DIVERGENCES[name] for name in names], beta, temperature, dtype, chunk
    return Divergences.apply(hidden, head_weight, teach, *settings)  # pyright: ignore[reportReturnType]


def teach_by_model(hidden: Tensor, head_weight: Tensor, temperature: float = 1.0) -> Teach:
    """The teacher's hidden states [N, D] and head [V, D], whose products are computed as those of the student."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, matrix, nothing = hidden.detach(), head_weight.detach().to(dtype), hidden.new_zeros(0, dtype=torch.int64)

    def teach(positions: slice, ours: Tensor) -> tuple[Tensor, Tensor]:
        logits = compute_logits(hidden[positions], matrix, nothing)
        return logits.div_(temperature).log_softmax(-1), logits.argmax(-1)

    return teach


def teach_by_top_k(ids: Tensor, logprobs: Tensor) -> Teach:
    """The K likeliest tokens that a teacher gave, likeliest first: int64[N, K] and their log-probabilities fp32[N, K].

    What is left of its probability is spread as the student spreads its own over the other tokens. So a divergence is
    that between K + 1 outcomes, each of these tokens and any other, and so is its gradient: nothing is made up about
    the tokens that were not stored, and the divergence is never more than that of the whole distributions.
    """

    def teach(positions: slice, ours: Tensor) -> tuple[Tensor, Tensor]:
        chosen, theirs = ids[positions], logprobs[positions].to(ours.dtype)
        our_rest = ours.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
        rest = torch.log1p(-theirs.exp().sum(-1, keepdim=True).clamp(max=1 - torch.finfo(ours.dtype).eps))
        return (ours - our_rest + rest).scatter_(-1, chosen, theirs), chosen[:, 0]

    return teach


class Divergences(torch.autograd.Function):
    """Keeps the hidden states alone; each divergence knows its own gradient for the student's logits."""

    @staticmethod
    def forward(ctx, hidden, weight, teach: Teach, kinds, beta, temperature, dtype, chunk):
        ctx.save_for_backward(hidden, weight)
        ctx.settings = teach, kinds, beta, temperature, dtype, chunk
        matrix, nothing = weight.to(dtype), hidden.new_zeros(0, dtype=torch.int64)
        totals, agreed = [], []
        for start in range(0, len(hidden), chunk):
            positions = slice(start, start + chunk)
            ours = compute_logits(hidden[positions], matrix, nothing).div_(temperature).log_softmax(-1)
            theirs, likeliest = teach(positions, ours)
            totals.append(torch.stack([kind(ours, theirs, beta)[0].sum() for kind in kinds]))
            agreed.append((ours.argmax(-1) == likeliest).sum())
        fp = torch.float64 if dtype == torch.float64 else torch.float32
        total = torch.stack([hidden.new_zeros(len(kinds), dtype=fp), *totals]).sum(0) * temperature**2
        count = torch.stack([hidden.new_zeros((), dtype=torch.int64), *agreed]).sum().to(fp)
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _grad_of_count):
        hidden, weight = ctx.saved_tensors
        teach, kinds, beta, temperature, dtype, chunk = ctx.settings
        matrix, nothing = weight.to(dtype), hidden.new_zeros(0, dtype=torch.int64)
        hidden_grad, weight_grad = torch.empty_like(hidden), None
        for start in range(0, len(hidden), chunk):
            positions = slice(start, start + chunk)
            ours = compute_logits(hidden[positions], matrix, nothing).div_(temperature).log_softmax(-1)
            theirs, _likeliest = teach(positions, ours)
            parts = [kind(ours, theirs, beta)[1] * scale for kind, scale in zip(kinds, grad * temperature, strict=True)]
            logits_grad = sum(parts[1:], parts[0]).to(dtype)
            hidden_grad[positions] = (logits_grad @ matrix).to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                part = logits_grad.T @ hidden[positions].to(dtype)
                part = part.double() if part.dtype == torch.float64 else part.float()
                weight_grad = part if weight_grad is None else weight_grad.add_(part)
        if ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight) if weight_grad is None else weight_grad.to(weight.dtype)
        return hidden_grad, weight_grad, *[None] * 6


# A divergence: (log-probabilities of the student [n, V], those of the teacher [n, V], beta) -> its value [n], and its
# gradient for the student's logits [n, V], which is q (g - sum of q g) where it has derivatives g for probabilities q.


def forward_kl(ours: Tensor, theirs: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL of the student from the teacher: the student covers all that the teacher does (arXiv 1503.02531)."""
    p = theirs.exp()
    return (p * (theirs - ours)).sum(-1), ours.exp() - p


def reverse_kl(ours: Tensor, theirs: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL of the teacher from the student: the student keeps to what the teacher finds likely (arXiv 2306.08543)."""
    q, gap = ours.exp(), ours - theirs
    value = (q * gap).sum(-1)
    return value, q * (gap - value[:, None])


def jensen_shannon(ours: Tensor, theirs: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m), where m = beta p + (1 - beta) q: generalised, as in arXiv 2306.13649."""
    p, q = theirs.exp(), ours.exp()
    mixture = torch.logaddexp(theirs + math.log(beta), ours + math.log1p(-beta))
    from_mixture = ours - mixture
    own = (q * from_mixture).sum(-1)
    value = beta * (p * (theirs - mixture)).sum(-1) + (1 - beta) * own
    return value, (1 - beta) * q * (from_mixture - own[:, None])


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jensen_shannon": jensen_shannon}
