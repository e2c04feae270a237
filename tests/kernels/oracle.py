"""How a kernel is judged: by an fp64 reference, by how well torch does in the same dtype, and by what rounding may do.

    error <= max(2 * error of eager torch in the same dtype, error of the rounded reference) + floor

once for the largest error, with the last bit of the largest value for a floor, and once for the root mean square, with
half the last bit of the root mean square, the most that rounding to nearest can do, and another half / sqrt(n) for n
values, since eager may be lucky with a few. The first term is the rule of FlashAttention's tests. The second is
arithmetic and knows no processor: eager torch may be nearly exact by luck, in the order in which one library on one
processor happens to add, and a kernel that adds in another order is not wrong for it (`Rounded`). No tolerance is
chosen by hand. NaN and infinities must be where the reference has them.
"""

import math
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

ROUNDINGS = 4  # times that the reference is rounded, of which the largest error counts


def check(ours: Tensor, eager: Tensor, exact: Callable[[], Tensor], name: str = "output") -> dict[str, float]:
    """Judge `ours` by `eager`, torch's result in its dtype, and by the reference, which `exact` computes in fp64."""
    return judge(ours, eager, exact(), round_often(exact, ours.dtype), name)


def judge(
    ours: Tensor, eager: Tensor, exact: Tensor, rounded: Sequence[Tensor] = (), name: str = "output"
) -> dict[str, float]:
    """Raise AssertionError unless `ours` is as near to `exact` as the module says; `rounded` is what Rounded gave.

    Returns the errors: max, rms, those of eager, eager_max and eager_rms, and those of rounding, rounded_max and
    rounded_rms, which are 0 without `rounded`.
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
    rounded = [x.detach()[finite] for x in rounded]
    ours, eager, exact = ours[finite], eager[finite], exact[finite]
    assert ours.isfinite().all(), f"{name}: {(~ours.isfinite()).sum()} of {ours.numel()} values are not finite"
    assert eager.isfinite().all(), f"{name}: eager is not finite where the reference is, so it is no measure"
    if not ours.numel():
        return {f"{whose}{kind}": 0.0 for kind in ("max", "rms") for whose in ("", "eager_", "rounded_")}
    errors = {}
    for kind, norm, last_bit in (
        ("max", lambda x: x.abs().max().item(), epsilon),
        ("rms", lambda x: x.square().mean().sqrt().item(), epsilon / 2 * (1 + len(exact) ** -0.5)),
    ):
        errors[kind], errors[f"eager_{kind}"] = norm(ours - exact), norm(eager - exact)
        errors[f"rounded_{kind}"] = max((norm(x - exact) for x in rounded), default=0.0)
        limit = max(2 * errors[f"eager_{kind}"], errors[f"rounded_{kind}"]) + last_bit * norm(exact)
        assert errors[kind] <= limit, (
            f"{name}: the {kind} error {errors[kind]:.3g} is above {limit:.3g}, the larger of "
            f"2 * {errors[f'eager_{kind}']:.3g} of eager and {errors[f'rounded_{kind}']:.3g} of rounding, "
            f"+ {last_bit:.1g} * {norm(exact):.3g}"
        )
    return errors


def check_gradients(ours, eager, exact, inputs: dict[str, Tensor], gradient: Tensor) -> dict[str, dict[str, float]]:
    """Check the outputs and all gradients of three functions of the same floating-point tensors, by name.

    `exact` gets the inputs in fp64. `gradient` is that of the output. Returns the errors by name, `output` among them.
    """

    def run(function, dtype=None):
        leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
        output = function(**leaves)
        gradients = torch.autograd.grad(output, list(leaves.values()), gradient.to(output.dtype))
        return {"output": output, **dict(zip(leaves, gradients, strict=True))}

    results = run(ours), run(eager), run(exact, torch.float64)
    rounded = round_often(lambda: run(exact, torch.float64), results[0]["output"].dtype)
    return {
        name: judge(*(result[name] for result in results), [result[name] for result in rounded], name)
        for name in results[0]
    }


# --- what rounding may do ------------------------------------------------------------------------------------


def round_often(function, dtype: torch.dtype) -> list:
    """Return what `function()`, which computes in fp64, gives when everything in it is rounded as in `dtype`."""
    results = []
    for seed in range(ROUNDINGS):
        with Rounded(dtype, seed):
            results.append(function())
    return results


class Rounded(TorchDispatchMode):
    """Within it, fp64 results, those of backward passes too, are off by as much as rounding in `dtype` may make them.

    Of n products, added up in any order, the result is off by at most about

        2 * sqrt(n) * u * sum of |a| |b|,   u = eps / 2 of the dtype that sums are kept in, fp32,

    when the roundings are independent and have mean 0 (Higham & Mary 2019, "A new approach to probabilistic rounding
    error analysis", theorem 2.4 with lambda = 2; the certain bound has n in place of 2 sqrt(n)). The same holds of
    a sum, with b = 1. Here it is off by as much, up or down. Every result is rounded once more, by up to u of `dtype`
    times itself. What is drawn is drawn by a seed; the errors go through the rest of the computation as real ones do.
    """

    EXACT = """_to_copy _unsafe_view abs cat clone copy_ detach expand fill_ gather index index_put index_select
        masked_fill masked_fill_ neg new_zeros select_backward slice_backward stack where zeros zeros_like""".split()
    PRODUCTS = ("mm", "bmm", "mv", "dot", "addmm", "baddbmm")
    SUMS = ("sum", "mean", "cumsum")
    SUMS_OF_EXPONENTIALS = ("_softmax", "logsumexp")

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        super().__init__()
        self.unit, self.unit_of_sums = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = function(*args, **kwargs), function.overloadpacket.__name__
        if function.is_view or name in self.EXACT:
            return result
        sizes = tree_map_only(Tensor, lambda x: x.abs() if x.is_floating_point() else x, (args, kwargs))
        if name in self.PRODUCTS:
            terms, most = args[-1].shape[0 if args[-1].ndim == 1 else -2], function(*sizes[0], **sizes[1])
        elif name in self.SUMS:
            terms, most = args[0].numel() / max(1, result.numel()), function(*sizes[0], **sizes[1])
        elif name in self.SUMS_OF_EXPONENTIALS:
            # The exponentials are positive; an error of their sum is one of its logarithm, and of what it divides.
            dim = args[1] if isinstance(args[1], int) else args[1][0]
            terms, most = args[0].shape[dim], result.abs() if name == "_softmax" else torch.ones_like(result)
        else:
            terms, most = 0, None
        return tree_map_only(Tensor, lambda x: self._round(x, terms, most), result)

    def _round(self, x: Tensor, terms: float, most: Tensor | None) -> Tensor:
        if x.dtype != torch.float64:
            return x
        off = self.unit * x.abs() * (2 * self._draw(x) - 1)
        if most is not None:
            off += 2 * terms**0.5 * self.unit_of_sums * most * (2 * self._draw(x).round() - 1)
        return x.copy_(torch.where(x.isfinite() & off.isfinite(), x + off, x))

    def _draw(self, x: Tensor) -> Tensor:
        return torch.rand(x.shape, generator=self.generator, dtype=torch.float64).to(x.device)


# --- memory --------------------------------------------------------------------------------------------------


def surround(x: Tensor, margin: int = 3) -> Tensor:
    """Return a view equal to `x` within a larger tensor of poison: no row is contiguous with the next, none aligned.

    A kernel that reads beyond a row, or takes its length for its stride, gets NaN or a huge number.
    """
    larger = poison(torch.empty([size + 2 * margin for size in x.shape], dtype=x.dtype, device=x.device))
    inner = larger[tuple(slice(margin, margin + size) for size in x.shape)]
    return inner.copy_(x)


def reserve(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return memory of the CPU, more than the machine may have: it is there only where something is written.

    The system is asked to reserve nothing for it: by default Linux refuses more at once than there is.
    """
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # a name of Python 3.13, the number of x86 and of Arm
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


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
