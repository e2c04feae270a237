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
    rounded = [x for x in rounded if x.isfinite().all()]  # an exponential may overflow that the exact one does not
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

    A sum of n products is off by up to

        2 u max(sum of |a| |b|, sqrt(n) |sum of a b|),   u = eps / 2 of fp32, in which sums are kept.

    When roundings are independent and have mean 0, their error grows as the root of n, with high probability (Higham &
    Mary 2019, "A new approach to probabilistic rounding error analysis"); where the terms have mean 0 too it is a
    multiple of u times their absolute sum (the same 2020, "Sharper probabilistic backward error analysis for basic
    linear algebra kernels with random data"). Every result is rounded once more, by up to u of `dtype` times itself.
    How far and which way each value is off is drawn by a seed; the errors go through the rest of the computation as
    real ones do.
    """

    EXACT = """_to_copy _unsafe_view abs amax amin arange cat clone copy_ detach expand fill_ flip full full_like gather
        index index_select masked_fill masked_fill_ max maximum minimum neg new_zeros ones ones_like relu scalar_tensor
        select_backward slice_backward stack where zeros zeros_like""".split()

    def __init__(self, dtype: torch.dtype, seed: int = 0):
        super().__init__()
        self.unit, self.unit_of_sums = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
        self.seed, self.generators = seed, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = function(*args, **kwargs), function.overloadpacket.__name__
        if function.is_view or name in self.EXACT or (name == "index_put" and not any(args[3:4])):
            return result
        if name in SUMS:
            size = SUMS[name](function, args, kwargs, result)
            return (
                (self._round(result[0], size), *result[1:]) if isinstance(result, tuple) else self._round(result, size)
            )
        return tree_map_only(Tensor, self._round, result)

    def _round(self, x: Tensor, size: Tensor | float = 0.0) -> Tensor:
        if x.dtype != torch.float64:
            return x
        off = self.unit * x.abs() * self._draw(x) + 2 * self.unit_of_sums * size * self._draw(x)
        return x.copy_(torch.where(x.isfinite() & off.isfinite(), x + off, x))

    def _draw(self, x: Tensor) -> Tensor:
        """Numbers from -1 to 1."""
        if x.device not in self.generators:
            self.generators[x.device] = torch.Generator(x.device).manual_seed(self.seed)
        numbers = torch.rand(x.shape, generator=self.generators[x.device], dtype=torch.float64, device=x.device)
        return 2 * numbers - 1


# What adds: (function, args, kwargs, result) -> how large the error of the result's sums may be, over 2 u.


def size_of_sum(num_terms: float, function, args, kwargs, result) -> Tensor:
    absolute = tree_map_only(Tensor, lambda x: x.abs() if x.is_floating_point() else x, (args, kwargs))
    most = function(*absolute[0], **absolute[1])
    result, most = (x[0] if isinstance(x, tuple) else x for x in (result, most))
    return torch.maximum(most.abs(), num_terms**0.5 * result.abs())


def of_products(function, args, kwargs, result):
    return size_of_sum(args[-1].shape[0 if args[-1].ndim == 1 else -2], function, args, kwargs, result)


def of_elements(function, args, kwargs, result):
    return size_of_sum(args[0].numel() / max(1, result.numel()), function, args, kwargs, result)


def of_elements_so_far(function, args, kwargs, result):
    return size_of_sum(args[0].shape[args[1]], function, args, kwargs, result)


def of_labels(function, args, kwargs, result):
    return size_of_sum(args[1].numel() / max(1, result[0].numel()), function, args, kwargs, result)


def of_entries(function, args, kwargs, result):
    source = next(x for x in reversed(args) if isinstance(x, Tensor) and x.is_floating_point())
    return size_of_sum(1 + source.numel() / max(1, result.numel()), function, args, kwargs, result)


def of_softmax(function, args, kwargs, result):
    """Its sum of exponentials has only positive terms, and divides."""
    return args[0].shape[args[1]] ** 0.5 * result.abs()


def of_log_sum(function, args, kwargs, result):
    """A relative error of the sum is an absolute one of its logarithm, which is taken of what the largest left."""
    dim = args[1] if isinstance(args[1], int) else args[1][0]
    if not args[0].shape[dim]:
        return torch.zeros_like(result)
    largest = torch.where(args[0].isfinite(), args[0], 0.0).abs().amax(dim, keepdim=True)
    size = args[0].shape[dim] ** 0.5 + largest
    return size if result.ndim == size.ndim else size.squeeze(dim)


def of_softmax_backward(function, args, kwargs, result):
    """y (g - sum of g y), whose terms may cancel."""
    grad, y, dim = args[0].abs(), args[1].abs(), args[2]
    return y * (grad + (grad * y).sum(dim, keepdim=True))


def of_log_softmax_backward(function, args, kwargs, result):
    """g - exp(y) sum of g."""
    grad, y, dim = args[0].abs(), args[1], args[2]
    return grad + y.exp() * grad.sum(dim, keepdim=True)


SUMS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "addmm", "baddbmm"), of_products),
    **dict.fromkeys(("sum", "mean"), of_elements),
    "cumsum": of_elements_so_far,
    "nll_loss_forward": of_labels,
    **dict.fromkeys(("index_add", "index_put"), of_entries),
    "_softmax": of_softmax,
    **dict.fromkeys(("logsumexp", "_log_softmax"), of_log_sum),
    "_softmax_backward_data": of_softmax_backward,
    "_log_softmax_backward_data": of_log_softmax_backward,
}


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


class PoisonEmpty:
    """Within it, what torch.empty and its relatives return is poison: what a kernel leaves out is then seen.

    torch itself does so in its deterministic mode. A TorchFunctionMode does not see what an operator of ours calls.
    """

    def __enter__(self):
        assert torch.utils.deterministic.fill_uninitialized_memory
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *error):
        torch.use_deterministic_algorithms(self.before[0], warn_only=self.before[1])
