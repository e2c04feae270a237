"""How a kernel is judged: by an fp64 reference, and by how well torch does in the same dtype.

    error <= 2 * error of eager torch in the same dtype + floor

once for the largest error, with the last bit of the largest value for a floor, and once for the root mean square, with
half the last bit of the root mean square, the most that rounding to nearest can do, and another half / sqrt(n) for n
values, since eager may be lucky with a few. This is the rule of FlashAttention's tests; no tolerance is chosen by hand.
NaN and infinities must be where the reference has them.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def check(ours: Tensor, eager: Tensor, exact: Tensor, name: str = "output") -> dict[str, float]:
    """Raise AssertionError unless `ours` is as near to `exact` (fp64) as `eager`, torch's in ours' dtype, is by half.

    Returns the errors: max, rms, and those of eager, eager_max and eager_rms.
    """
    assert exact.dtype == torch.float64, f"{name}: the reference must be fp64, not {exact.dtype}"
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype} against eager's {eager.dtype}"
    assert ours.shape == eager.shape == exact.shape, f"{name}: {ours.shape}, eager {eager.shape}, exact {exact.shape}"
    epsilon = torch.finfo(ours.dtype).eps
    ours, eager, exact = (x.detach().to(exact.device, torch.float64) for x in (ours, eager, exact))
    finite = exact.isfinite()
    same = torch.where(exact.isnan(), ours.isnan(), ours == exact)
    assert same[~finite].all(), (
        f"{name}: {ours[~finite & ~same][0]} where the reference has {exact[~finite & ~same][0]}"
    )
    ours, eager, exact = ours[finite], eager[finite], exact[finite]
    assert ours.isfinite().all(), f"{name}: {(~ours.isfinite()).sum()} of {ours.numel()} values are not finite"
    assert eager.isfinite().all(), f"{name}: eager is not finite where the reference is, so it is no measure"
    if not ours.numel():
        return dict(max=0.0, rms=0.0, eager_max=0.0, eager_rms=0.0)
    errors = {}
    for kind, norm, last_bit in (
        ("max", lambda x: x.abs().max().item(), epsilon),
        ("rms", lambda x: x.square().mean().sqrt().item(), epsilon / 2 * (1 + len(exact) ** -0.5)),
    ):
        errors[kind], errors[f"eager_{kind}"] = norm(ours - exact), norm(eager - exact)
        limit = 2 * errors[f"eager_{kind}"] + last_bit * norm(exact)
        assert errors[kind] <= limit, (
            f"{name}: the {kind} error {errors[kind]:.3g} is above {limit:.3g}, "
            f"2 * {errors[f'eager_{kind}']:.3g} of eager + {last_bit:.1g} * {norm(exact):.3g}"
        )
    return errors


def check_gradients(ours, eager, exact, inputs: dict[str, Tensor], gradient: Tensor) -> dict[str, dict[str, float]]:
    """Check the outputs and all gradients of three functions of the same floating-point tensors, by name.

    `exact` gets the inputs in fp64. `gradient` is that of the output. Returns the errors by name, `output` among them.
    """
    results = []
    for function, dtype in ((ours, None), (eager, None), (exact, torch.float64)):
        leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
        output = function(**leaves)
        gradients = torch.autograd.grad(output, list(leaves.values()), gradient.to(output.dtype))
        results.append({"output": output, **dict(zip(leaves, gradients, strict=True))})
    return {name: check(*(result[name] for result in results), name=name) for name in results[0]}


def surround(x: Tensor, margin: int = 3) -> Tensor:
    """Return a view equal to `x` within a larger tensor of poison: no row is contiguous with the next, none aligned.

    A kernel that reads beyond a row, or takes its length for its stride, gets NaN or a huge number.
    """
    larger = poison(torch.empty([size + 2 * margin for size in x.shape], dtype=x.dtype, device=x.device))
    inner = larger[tuple(slice(margin, margin + size) for size in x.shape)]
    return inner.copy_(x)


def poison(x: Tensor) -> Tensor:
    """Fill with NaN, the largest integer or True, in place."""
    with torch.no_grad():
        if x.is_floating_point():
            return x.fill_(torch.nan)
        return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)


class PoisonEmpty(TorchFunctionMode):
    """Within it, what torch.empty and its relatives return is poison: what a kernel leaves out is then seen."""

    EMPTY = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return poison(out) if function in self.EMPTY else out
