"""The experts of a mixture on weights of 8 or 4 bits.

    out[r] = sum over j of weights[r, j] * down[e] (silu(gate[e] x[r]) * up[e] x[r])        e = choice[r, j]

Rows, tiles and their order are those of grouped_gemm.py, the formats and how a code becomes a float those of
quantized_weight.py and dequant_matmul.py. How the rows are multiplied depends on their mean number an expert alone:

    up to 64     a tile of a matrix is decoded where it is multiplied, the left operand as in dequant_matmul.py
    above, fp8   the matrices are written out once in the dtype of x for the kernels of grouped_gemm.py

The backward pass keeps x and its products g and u, and writes the matrices out again for grouped_gemm.py's kernels;
codes have no gradients. Measured on a GPU: not yet.

Legend: R tokens, k experts a token, P = R k rows, D hidden, W width of an expert, E experts; a matrix has N outputs and
K inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanovlm.kernels import grouped_gemm
from nanovlm.kernels.dequant_matmul import _layout, decode, dequantize, load_group
from nanovlm.kernels.grouped_gemm import (
    grouped_experts_ref,
    launch_combine,
    plan_rows,
    read_tile,
    with_whole_rows,
)
from nanovlm.kernels.quantized_weight import QuantizedWeight, dequantize_ref, make_tables
from nanovlm.kernels.register import DTYPES, autocast, is_interpreted, operator

MOST_FUSED_ROWS = 64  # of an expert, on average


def quantized_experts_ref(x: Tensor, choice: Tensor, weights: Tensor, *stacks: QuantizedWeight) -> Tensor:
    """The formula above, on matrices that are written out."""
    written = (torch.stack([dequantize_ref(one(stack, e)) for e in range(len(stack.codes))]) for stack in stacks)
    return grouped_experts_ref(x, choice, weights, *(matrices.to(x.dtype) for matrices in written))


def one(stack: QuantizedWeight, e: int) -> QuantizedWeight:
    """Return the matrix of an expert of a stack, whose tensors have a first dimension of E more."""
    tensors = ("codes", "scales", "nested_scales", "nested_offset")
    return stack._replace(**{name: x[e] for name in tensors if (x := getattr(stack, name)) is not None})


# --- forward kernels -----------------------------------------------------------------------------------------


@triton.jit
def add_decoded(
    acc, p_rows, codes, scales, nested_scales, nested_offset, dynamic, b_table, i_e, o_n, N, K: tl.constexpr,
    NESTED: tl.constexpr, TILES: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    FORMAT: tl.constexpr, BITS: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """acc [BN, BM] + rows o_n of an expert's matrix [N, K] @ rows^T; p_rows [1, BM] points at the rows' beginnings.

    acc must be zeros for int8, whose scales multiply the sum.
    """
    DTYPE: tl.constexpr = p_rows.dtype.element_ty
    PLANES: tl.constexpr = 32 // BITS
    o_row = tl.minimum(o_n, N - 1).to(tl.int64)[:, None]
    codes += i_e * N * (TILES * RUN)
    scales += i_e * N * GROUPS
    if FORMAT == "nf4":
        nested_scales += i_e * NESTED
        nested_offset += i_e
    for step in range(0, (TILES * RUN + BW - 1) // BW):
        o_word = step * BW + tl.arange(0, BW)
        m_word = (o_word < TILES * RUN)[None, :]
        b_words = tl.load(codes + o_row * (TILES * RUN) + o_word[None, :], mask=m_word, other=0)  # [BN, BW]
        # Of one tile, the words of a row share their groups.
        o_tile = tl.full([1, 1], step, tl.int32) if BW == RUN else tl.minimum(o_word // RUN, TILES - 1)[None, :]
        for i in tl.static_range(PLANES):
            if i == 0 or i * RUN % GROUP == 0:
                o_group = o_row * GROUPS + (o_tile * (PLANES * RUN) + i * RUN) // GROUP
                b_scale, b_zero = load_group(scales, nested_scales, nested_offset, dynamic, o_group, FORMAT)
            o_k = o_word // RUN * (PLANES * RUN) + i * RUN + o_word % RUN
            b_x = tl.load(p_rows + o_k[:, None], mask=(o_k < K)[:, None], other=0.0)  # [BW, BM]
            b_w = decode(b_words, b_zero, b_table, i, FORMAT, BITS)
            b_w *= b_scale if FORMAT == "nf4" else b_scale * 2.0 ** -(i * BITS % 12)
            acc = tl.dot(b_w.to(DTYPE), b_x, acc, input_precision="ieee")
    if FORMAT == "int8":
        acc *= tl.load(scales + o_row)
    return acc


@triton.jit
def decoded_gate_up_kernel(
    p_x, p_order, p_tiles, g_codes, g_scales, g_nested, g_offset, u_codes, u_scales, u_nested, u_offset, dynamic, table,
    p_g, p_u, p_a, s_x, num_tiles, k: tl.constexpr, D: tl.constexpr, W: tl.constexpr, KEEP: tl.constexpr,
    NESTED: tl.constexpr, TILES: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    FORMAT: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """g = x gate^T, u = x up^T and a = silu(g) u, for a tile of rows and BN columns of W."""
    i_n, i_e, first, end = read_tile(p_tiles, num_tiles, (W + BN - 1) // BN)
    if first >= end:
        return
    o_p = first + tl.arange(0, BM)
    o_r = tl.load(p_order + tl.minimum(o_p, end - 1)) // k  # beyond the end, the last row again
    p_rows = p_x + o_r.to(tl.int64)[None, :] * s_x
    o_w = i_n * BN + tl.arange(0, BN)
    b_table = tl.load(table + tl.arange(0, 16)) if FORMAT == "nf4" else 0
    b_g = add_decoded(
        tl.zeros([BN, BM], tl.float32), p_rows, g_codes, g_scales, g_nested, g_offset, dynamic, b_table, i_e, o_w, W, D,
        NESTED, TILES, RUN, GROUP, GROUPS, FORMAT, BITS, BW,
    )  # fmt: skip
    b_u = add_decoded(
        tl.zeros([BN, BM], tl.float32), p_rows, u_codes, u_scales, u_nested, u_offset, dynamic, b_table, i_e, o_w, W, D,
        NESTED, TILES, RUN, GROUP, GROUPS, FORMAT, BITS, BW,
    )  # fmt: skip
    o_out = o_p.to(tl.int64)[None, :] * W + o_w[:, None]
    m_out = (o_p < end)[None, :] & (o_w < W)[:, None]
    if KEEP:
        tl.store(p_g + o_out, b_g.to(p_g.dtype.element_ty), mask=m_out)
        tl.store(p_u + o_out, b_u.to(p_u.dtype.element_ty), mask=m_out)
    tl.store(p_a + o_out, (b_g * tl.sigmoid(b_g) * b_u).to(p_a.dtype.element_ty), mask=m_out)


@triton.jit
def decoded_scatter_kernel(
    p_a, p_order, p_tiles, codes, scales, nested_scales, nested_offset, dynamic, table, p_out, num_tiles,
    D: tl.constexpr, W: tl.constexpr, NESTED: tl.constexpr, TILES: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, FORMAT: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """out[order[p]] = a[p] @ down^T: [P, W] -> [P, D]."""
    i_n, i_e, first, end = read_tile(p_tiles, num_tiles, (D + BN - 1) // BN)
    if first >= end:
        return
    o_p = first + tl.arange(0, BM)
    o_last = tl.minimum(o_p, end - 1).to(tl.int64)
    o_d = i_n * BN + tl.arange(0, BN)
    b_table = tl.load(table + tl.arange(0, 16)) if FORMAT == "nf4" else 0
    b_out = add_decoded(
        tl.zeros([BN, BM], tl.float32), p_a + o_last[None, :] * W, codes, scales, nested_scales, nested_offset, dynamic,
        b_table, i_e, o_d, D, W, NESTED, TILES, RUN, GROUP, GROUPS, FORMAT, BITS, BW,
    )  # fmt: skip
    o_out = tl.load(p_order + o_last).to(tl.int64)[None, :] * D + o_d[:, None]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=(o_p < end)[None, :] & (o_d < D)[:, None])


# --- on the host ---------------------------------------------------------------------------------------------


def write_out(stack: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Dequantise a stack, [E, N, K]."""
    return torch.stack([dequantize(one(stack, e), dtype) for e in range(len(stack.codes))])


def fused_sizes(x: Tensor, num_rows: int, num_experts: int) -> dict:
    """Rows and outputs of a tile of the fused kernels."""
    BM = 16 if num_rows <= 16 * num_experts else 32
    return dict(BM=BM, BN=32 if x.dtype == torch.float32 else 64, num_warps=4, num_stages=2)


def read_stack(stack: QuantizedWeight) -> tuple[tuple, dict]:
    """Return the tensors of a stack that kernels read, and their constants."""
    layout = _layout(one(stack, 0))
    layout["NESTED"] = 0 if stack.nested_scales is None else stack.nested_scales.shape[1]
    layout["BW"] = max(16, layout["RUN"])
    return (stack.codes, stack.scales, stack.nested_scales, stack.nested_offset), layout


def fused_forward(
    x: Tensor, choice: Tensor, weights: Tensor, gate: QuantizedWeight, up: QuantizedWeight, down: QuantizedWeight,
    keeps: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return out [R, D], and g and u [P, W] if `keeps`."""
    (R, k), E, (W, D) = choice.shape, len(gate.codes), gate.shape
    sizes = fused_sizes(x, R * k, E)
    plan = plan_rows(choice, E, {"gate_up": sizes})
    (table, dynamic), num_tiles = gate.tables or (None, None), len(plan.tiles)
    a = x.new_empty(R * k, W)
    g, u = (torch.empty_like(a), torch.empty_like(a)) if keeps else (None, None)
    (tensors, layout), (others, _) = read_stack(gate), read_stack(up)
    decoded_gate_up_kernel[(num_tiles * triton.cdiv(W, sizes["BN"]),)](
        x, plan.order, plan.tiles, *tensors, *others, dynamic, table, a if g is None else g, a if u is None else u, a,
        x.stride(0), num_tiles, k=k, D=D, W=W, KEEP=keeps, **layout, **sizes,
    )  # fmt: skip
    y, (tensors, layout) = x.new_empty(R * k, D), read_stack(down)
    decoded_scatter_kernel[(num_tiles * triton.cdiv(D, sizes["BN"]),)](
        a, plan.order, plan.tiles, *tensors, dynamic, table, y, num_tiles, D=D, W=W, **layout, **sizes
    )
    return launch_combine(y, weights, R, k), g, u


# --- operators, and their autograd ---------------------------------------------------------------------------


def take_apart(*stacks: QuantizedWeight) -> tuple[list[Tensor], str, list[int]]:
    """What an operator can take: tensors, those of the tables last, the format, and the group of each stack."""
    format, groups = stacks[0].format, [stack.group for stack in stacks]
    if format != "nf4":
        return [x for stack in stacks for x in (stack.codes, stack.scales)], format, groups
    tensors = [(stack.codes, stack.scales, stack.nested_scales, stack.nested_offset) for stack in stacks]
    return [*sum(tensors, ()), *(stacks[0].tables or make_tables(stacks[0].codes.device))], format, groups


def join(x: Tensor, tensors: list[Tensor], format: str, groups: list[int]) -> list[QuantizedWeight]:
    """Return gate, up and down."""
    num, D, W = len(tensors) // 3, x.shape[1], tensors[0].shape[1]
    tables = (tensors[-2], tensors[-1]) if format == "nf4" else None
    return [
        QuantizedWeight(format, shape, group, *tensors[i * num : (i + 1) * num])._replace(tables=tables)
        for i, (shape, group) in enumerate(zip(((W, D), (W, D), (D, W)), groups, strict=True))
    ]


def fake_forward(x, choice, weights, tensors, format, groups, keeps):
    g = x.new_empty(choice.numel(), tensors[0].shape[1]) if keeps else x.new_empty(0)
    return x.new_empty(x.shape), g, torch.empty_like(g)


@operator("quantized_experts", fake_forward)
def run_forward(
    x: Tensor, choice: Tensor, weights: Tensor, tensors: list[Tensor], format: str, groups: list[int], keeps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gate, up, down = stacks = join(x, tensors, format, groups)
    if choice.numel() <= MOST_FUSED_ROWS * len(gate.codes) and format != "fp8":
        out, g, u = fused_forward(x, choice, weights, gate, up, down, keeps)
    else:
        written = [write_out(stack, x.dtype) for stack in stacks]
        plan = plan_rows(choice, len(gate.codes), grouped_gemm.launch_sizes(x, choice.numel(), tuple(written)))
        out, g, u = grouped_gemm.forward(x, weights, *written, plan, keeps)
    return out, *(x.new_empty(0) if kept is None else kept for kept in (g, u))


def fake_backward(grad, x, choice, weights, g, u, tensors, format, groups, wanted):
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip((x, weights), wanted, strict=True))


@operator("quantized_experts_backward", fake_backward)
def run_backward(
    grad: Tensor, x: Tensor, choice: Tensor, weights: Tensor, g: Tensor, u: Tensor, tensors: list[Tensor], format: str,
    groups: list[int], wanted: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    written = tuple(write_out(stack, x.dtype) for stack in join(x, tensors, format, groups))
    # Tiles have other sizes than in the fused kernels; the order of the rows is the same.
    plan = plan_rows(choice, len(written[0]), grouped_gemm.launch_sizes(x, choice.numel(), written))
    grads = grouped_gemm.backward(
        with_whole_rows(grad), x, weights, *written, g, u, plan, (*wanted, False, False, False)
    )
    dx, dweights = (x.new_empty(0) if t is None else t for t in grads[:2])
    return dx, dweights


def save(ctx, inputs, output):
    x, choice, weights, ctx.stacks, ctx.format, ctx.groups, _keeps = inputs
    ctx.save_for_backward(x, choice, weights, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def differentiate(ctx, grad, *_):
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    dx, dweights = run_backward(grad, *ctx.saved_tensors, ctx.stacks, ctx.format, ctx.groups, wanted)
    nothing = [None] * len(ctx.stacks)
    return dx if wanted[0] else None, None, dweights if wanted[1] else None, nothing, None, None, None


run_forward.register_autograd(differentiate, setup_context=save)


# --- the function to call ------------------------------------------------------------------------------------


def quantized_experts(
    x: Tensor, choice: Tensor, weights: Tensor, gate: QuantizedWeight, up: QuantizedWeight, down: QuantizedWeight
) -> Tensor:
    """x [R, D], choice int64[R, k], weights [R, k], gate and up [E, W, D], down [E, D, W] -> [R, D] in the dtype of x.

    The tensors of a stack have a first dimension of E. x is fp32, fp16 or bf16; under autocast it is cast to its dtype.
    Differentiable in x and weights. `choice` must be in 0 .. E - 1, which is not checked. Raises ValueError for other
    shapes and dtypes, and for tensors on the CPU.
    """
    (x,) = autocast(x)
    if not x.is_cuda and not is_interpreted():
        raise ValueError(f"the experts' kernels run on a GPU, but x is on {x.device}; 'grouped' experts run anywhere")
    (W, D), E, R = gate.shape, len(gate.codes), len(x)
    if x.shape != (R, D) or up.shape != (W, D) or down.shape != (D, W) or not len(up.codes) == len(down.codes) == E:
        shapes = ", ".join(str([len(stack.codes), *stack.shape]) for stack in (gate, up, down))
        raise ValueError(f"x {list(x.shape)} and stacks {shapes} must be [R, D], [E, W, D], [E, W, D] and [E, D, W]")
    if choice.shape != weights.shape or choice.dim() != 2 or len(choice) != R:
        raise ValueError(f"choice {list(choice.shape)} and weights {list(weights.shape)} must be [{R}, k]")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the experts' kernels take float32, float16 and bfloat16")
    if len({stack.format for stack in (gate, up, down)}) > 1:
        raise ValueError(f"gate, up and down are {gate.format}, {up.format} and {down.format}: they must be alike")
    keeps = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
    return run_forward(with_whole_rows(x), choice, weights.contiguous(), *take_apart(gate, up, down), keeps)[0]
