"""The experts of a mixture: out[r] = sum over j of weights[r, j] * down[e] (silu(gate[e] x[r]) * up[e] x[r]).

e = choice[r, j]. A token and one of its k experts make a *row*. Rows are sorted by expert and cut into tiles of at most
BM rows of one expert; a matrix product takes a tile and BN columns. `order` says which row stands where: order[p] =
r k + j, so that order[p] // k is the token.

    forward    g, u = x gate^T, x up^T;  a = silu(g) u          the rows of x are gathered while they are read
               y = a down^T                                     every row is written to its place r k + j
               out[r] = sum over j of weights[r, j] y[r k + j]
    backward   da = dout down                                   gathered too
               dweights = <da, a>                               so y is not kept
               dg, du = weights da u silu'(g), weights da silu(g)
               dx[r] = sum over j of dg gate + du up
               dgate, dup, ddown = dg^T x, du^T x, dout^T (weights a), over the rows of each expert

Kept for the backward pass: x, g and u. a is recomputed from them; recomputing g and u too would take 2 more products
beside 9. To save their memory (2 R k W numbers), checkpoint the whole block instead. Nothing is added atomically
and tile sizes follow from shapes and dtype, not from timings, so equal inputs give equal bits, also after a restart.
The host never waits: how many tiles there are stays on the device; a bound on it is launched, and programs beyond
return. The order of work is that of SonicMoE (arXiv 2512.14080).

Legend: R tokens, k experts a token, P = R k rows, D hidden, W width of an expert, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanovlm.kernels.gpu import device_class
from nanovlm.kernels.register import DTYPES, autocast, is_interpreted, operator


def grouped_experts_ref(x: Tensor, choice: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The formula above, one expert after the other."""
    out = torch.zeros_like(x)
    for e in range(len(gate)):
        r, j = (choice == e).nonzero(as_tuple=True)
        a = F.silu(x[r] @ gate[e].T) * (x[r] @ up[e].T)
        out = out.index_add(0, r, (weights[r, j, None] * (a @ down[e].T)).to(x.dtype))
    return out


# --- forward kernels -----------------------------------------------------------------------------------------


@triton.jit
def load(p_block, m_block, MASKED: tl.constexpr):
    """Load the block at some pointers, with zeros where the mask is False; if not MASKED, ignore the mask."""
    if MASKED:
        return tl.load(p_block, mask=m_block, other=0.0)
    else:
        return tl.load(p_block)


@triton.jit
def add_product(
    b_acc, p_rows, p_matrix, s_k, s_n, o_n, K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """b_acc [BM, BN] + rows [BM, K] @ columns o_n of a matrix [K, N]; p_rows [BM, 1] points at the rows' beginnings."""
    MASKED: tl.constexpr = N % BN + K % BK != 0
    for i in range(0, K, BK):
        o_k = i + tl.arange(0, BK)
        m_k = o_k < K
        b_rows = load(p_rows + o_k[None, :], m_k[None, :], K % BK != 0)  # [BM, BK]
        p_block = p_matrix + o_k[:, None] * s_k + o_n[None, :] * s_n
        b_matrix = load(p_block, m_k[:, None] & (o_n < N)[None, :], MASKED)  # [BK, BN]
        b_acc = tl.dot(b_rows, b_matrix.to(b_rows.dtype), b_acc, input_precision="ieee")
    return b_acc


@triton.jit
def read_tile(p_tiles, num_tiles, NUM_N: tl.constexpr):
    """Return this program's work: a block of columns, an expert, and the first and the end of its rows.

    Eight successive tiles take the same columns, so that the data they share is still in the cache.
    """
    i = tl.program_id(0)
    i_t, i_n = tl.swizzle2d(i // NUM_N, i % NUM_N, num_tiles, NUM_N, 8)
    p_tile = p_tiles + 3 * i_t
    return i_n, tl.load(p_tile).to(tl.int64), tl.load(p_tile + 1), tl.load(p_tile + 2)


@triton.jit
def gate_up_kernel(
    p_x, p_order, p_tiles, p_gate, p_up, p_g, p_u, p_a, s_x, num_tiles,
    k: tl.constexpr, D: tl.constexpr, W: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """g = x gate^T, u = x up^T and a = silu(g) u, for a tile of rows and BN columns of W."""
    i_n, i_e, first, end = read_tile(p_tiles, num_tiles, (W + BN - 1) // BN)
    if first >= end:
        return
    o_p = first + tl.arange(0, BM)
    # Beyond the end, read the last row again, which needs no mask.
    o_r = tl.load(p_order + tl.minimum(o_p, end - 1)) // k
    p_rows = p_x + o_r.to(tl.int64)[:, None] * s_x
    o_w = i_n * BN + tl.arange(0, BN)
    m_w = o_w < W
    b_g = tl.zeros([BM, BN], tl.float32)
    b_u = tl.zeros([BM, BN], tl.float32)
    MASKED: tl.constexpr = W % BN + D % BK != 0
    for i in range(0, D, BK):
        o_d = i + tl.arange(0, BK)
        m_d = o_d < D
        b_x = load(p_rows + o_d[None, :], m_d[None, :], D % BK != 0)  # [BM, BK]
        o_matrix = i_e * W * D + o_w[None, :] * D + o_d[:, None]  # [BK, BN]
        m_matrix = m_d[:, None] & m_w[None, :]
        b_gate = load(p_gate + o_matrix, m_matrix, MASKED).to(b_x.dtype)
        b_g = tl.dot(b_x, b_gate, b_g, input_precision="ieee")
        b_up = load(p_up + o_matrix, m_matrix, MASKED).to(b_x.dtype)
        b_u = tl.dot(b_x, b_up, b_u, input_precision="ieee")
    i_out = first.to(tl.int64) * W
    o_out = tl.arange(0, BM)[:, None] * W + o_w[None, :]
    m_out = (o_p < end)[:, None] & m_w[None, :]
    if KEEP:
        tl.store(p_g + i_out + o_out, b_g.to(p_g.dtype.element_ty), mask=m_out)
        tl.store(p_u + i_out + o_out, b_u.to(p_u.dtype.element_ty), mask=m_out)
    tl.store(p_a + i_out + o_out, (b_g * tl.sigmoid(b_g) * b_u).to(p_a.dtype.element_ty), mask=m_out)


@triton.jit
def scatter_kernel(
    p_b, p_c, p_order, p_tiles, p_b_matrix, p_c_matrix, p_out, num_tiles, s_w: tl.constexpr, s_d: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, TWO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[order[p]] = b[p] @ b_matrix[e], with TWO + c[p] @ c_matrix[e]: [P, W] and [W, D] with strides -> [P, D]."""
    i_n, i_e, first, end = read_tile(p_tiles, num_tiles, (D + BN - 1) // BN)
    if first >= end:
        return
    o_p = first + tl.arange(0, BM)
    o_last = tl.minimum(o_p, end - 1).to(tl.int64)
    o_d = i_n * BN + tl.arange(0, BN)
    b_out = tl.zeros([BM, BN], tl.float32)
    b_out = add_product(b_out, p_b + o_last[:, None] * W, p_b_matrix + i_e * W * D, s_w, s_d, o_d, W, D, BN, BK)
    if TWO:
        b_out = add_product(b_out, p_c + o_last[:, None] * W, p_c_matrix + i_e * W * D, s_w, s_d, o_d, W, D, BN, BK)
    o_out = tl.load(p_order + o_last).to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=(o_p < end)[:, None] & (o_d < D)[None, :])


@triton.jit
def combine_kernel(
    p_y, p_weights, p_out, R, k: tl.constexpr, D: tl.constexpr, WEIGHTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[r] = sum over j, in order, of y[r k + j], with WEIGHTED times weights[r, j]: [P, D] -> [R, D]."""
    o_r = tl.program_id(0) * BM + tl.arange(0, BM)
    o_d = tl.program_id(1) * BN + tl.arange(0, BN)
    m_r = o_r < R
    m_out = m_r[:, None] & (o_d < D)[None, :]
    b_out = tl.zeros([BM, BN], tl.float32)
    for j in range(k):
        o_row = o_r.to(tl.int64) * k + j
        b_y = tl.load(p_y + o_row[:, None] * D + o_d[None, :], mask=m_out, other=0.0).to(tl.float32)  # [BM, BN]
        if WEIGHTED:
            b_y *= tl.load(p_weights + o_row, mask=m_r, other=0.0).to(tl.float32)[:, None]
        b_out += b_y
    o_out = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


# --- forward, on the host ------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Where every row goes; all tensors are on the device."""

    # int32[P]: the rows r k + j sorted by expert, those of one expert in order.
    order: Tensor
    # int32[E + 1]: where the rows of each expert begin in it, and P.
    bounds: Tensor
    # int32[tiles, 3]: the expert of a tile, its first row and the end of its rows; beyond the last tile, no rows.
    tiles: Tensor
    # {kernel: constants of its launch}.
    sizes: dict


def launch_sizes(x: Tensor, num_rows: int, matrices: tuple[Tensor, ...]) -> dict:
    """Tile sizes; fewer, and at most 128 columns, on their way where matrices are fp32 beside rows of 16 bits."""
    sizes = tile_sizes(x, num_rows, *matrices[0].shape[:2])
    if all(matrix.dtype == x.dtype for matrix in matrices):
        return sizes
    smaller = {name: dict(size, BN=min(128, size["BN"]), num_stages=2) for name, size in sizes.items()}
    return smaller | {"matrix_grad": sizes["matrix_grad"]}


def tile_sizes(x: Tensor, num_rows: int, num_experts: int, W: int) -> dict:
    """Tile sizes, warps and stages of each kernel, by what compiles without spilling registers.

    Tiles have 128 rows, and fewer where an expert has fewer on average; small ones for small experts, and for fp32,
    which does without tensor cores.
    """
    mean = num_rows / num_experts
    if x.dtype == torch.float32 or min(x.shape[1], W) < 256:
        BK = 16 if x.dtype == torch.float32 else 32
        sizes = dict(BM=16 if mean <= 16 else 64, BN=32, BK=BK, num_warps=4, num_stages=2)
        return dict.fromkeys(("gate_up", "scatter", "through_down"), sizes) | {"matrix_grad": dict(sizes, BM=32)}
    if mean <= 64:
        BK = 64 if device_class(x) == "hip" else 128
        sizes = dict(BM=16 if mean <= 16 else 64, BN=64, BK=BK, num_warps=4, num_stages=3)
        large = dict(BM=128, BN=128, BK=64, num_warps=8, num_stages=3)
        return dict.fromkeys(("gate_up", "scatter", "through_down"), sizes) | {"matrix_grad": large}
    # The sums of a tile are in the registers of 256 threads, beside which mma needs some for its operands.
    half = 1 if device_class(x) == 90 else 2
    return {
        "gate_up": dict(BM=128, BN=128 // half, BK=64, num_warps=8, num_stages=3),
        "scatter": dict(BM=128, BN=256 // half, BK=64, num_warps=8, num_stages=3),
        "through_down": dict(BM=128, BN=128 // half, BK=64, num_warps=8, num_stages=3),
        "matrix_grad": dict(BM=256 // half, BN=128, BK=64, num_warps=8, num_stages=3),
    }


def plan_rows(choice: Tensor, num_experts: int, sizes: dict) -> Plan:
    """Sort the rows of choice int64[R, k] by expert and cut them into tiles."""
    num_rows, BM = choice.numel(), sizes["gate_up"]["BM"]
    # A radix sort of two-byte keys takes a quarter of the passes over eight-byte keys.
    experts, order = choice.flatten().to(torch.int16).sort(stable=True)
    bounds = torch.searchsorted(experts, torch.arange(num_experts + 1, dtype=torch.int16, device=choice.device))
    tiles_of_expert = (bounds.diff() + BM - 1) // BM
    tile_ends = tiles_of_expert.cumsum(0)
    tile = torch.arange(count_tiles(num_rows, num_experts, sizes), device=choice.device)
    expert = torch.searchsorted(tile_ends, tile, right=True).clamp(max=num_experts - 1)
    first = bounds.gather(0, expert) + (tile - (tile_ends - tiles_of_expert).gather(0, expert)) * BM
    end = torch.minimum(first + BM, bounds.gather(0, expert + 1))
    tiles = torch.stack([expert, first, end], dim=1)
    return Plan(order.to(torch.int32), bounds.to(torch.int32), tiles.to(torch.int32), sizes)


def count_tiles(num_rows: int, num_experts: int, sizes: dict) -> int:
    """Return a bound on the number of tiles."""
    return num_rows // sizes["gate_up"]["BM"] + min(num_experts, num_rows)


def check(x: Tensor, choice: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor):
    """Raise ValueError for devices, shapes and dtypes that the kernels do not support."""
    if not x.is_cuda and not is_interpreted():
        raise ValueError(f"the experts' kernels run on a GPU, but x is on {x.device}; 'grouped' experts run anywhere")
    if gate.dim() != 3 or choice.dim() != 2:
        raise ValueError(f"gate {tuple(gate.shape)} and choice {tuple(choice.shape)} must be [E, W, D] and [R, k]")
    E, W, D = gate.shape
    R, k = choice.shape
    for name, tensor, shape in (
        ("x", x, (R, D)), ("weights", weights, (R, k)), ("up", up, (E, W, D)), ("down", down, (E, D, W)),
    ):  # fmt: skip
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but gate and choice want {shape}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the experts' kernels take float32, float16 and bfloat16")
    for name, tensor in (("gate", gate), ("up", up), ("down", down)):
        if tensor.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} is {tensor.dtype}, but x is {x.dtype}; it must be the same or float32")
    if R * k >= 2**31:
        raise ValueError(f"{R} tokens with {k} experts each are {R * k} rows; there must be fewer than 2^31")


def launch_scatter(rows: tuple, matrices: tuple, strides: tuple, plan: Plan, D: int) -> Tensor:
    """[P, W] @ [E, W, D] with strides of (W, D), a sum of one or two products -> [P, D], in the order of the tokens."""
    P, W = rows[0].shape
    out, sizes = rows[0].new_empty(P, D), plan.sizes["scatter"]
    scatter_kernel[(len(plan.tiles) * triton.cdiv(D, sizes["BN"]),)](
        rows[0], rows[-1], plan.order, plan.tiles, matrices[0], matrices[-1], out, len(plan.tiles), *strides,
        D=D, W=W, TWO=len(rows) == 2, **sizes,
    )  # fmt: skip
    return out


def launch_combine(y: Tensor, weights: Tensor | None, R: int, k: int) -> Tensor:
    """[P, D] -> [R, D]: add up the rows of each token, each times its weight if there are weights [R, k]."""
    D = y.shape[1]
    out, BM, BN = y.new_empty(R, D), 16, min(256, triton.next_power_of_2(D))
    combine_kernel[(triton.cdiv(R, BM), triton.cdiv(D, BN))](
        y, y if weights is None else weights, out, R, k=k, D=D, WEIGHTED=weights is not None, BM=BM, BN=BN
    )
    return out


def forward(x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, plan: Plan, keeps: bool) -> tuple:
    """Return out [R, D], and g and u [P, W] if `keeps`, else None twice."""
    (R, k), (_, W, D), sizes = weights.shape, gate.shape, plan.sizes["gate_up"]
    a = x.new_empty(R * k, W)
    g, u = (torch.empty_like(a), torch.empty_like(a)) if keeps else (None, None)
    gate_up_kernel[(len(plan.tiles) * triton.cdiv(W, sizes["BN"]),)](
        x, plan.order, plan.tiles, gate, up, a if g is None else g, a if u is None else u, a, x.stride(0),
        len(plan.tiles), k=k, D=D, W=W, KEEP=keeps, **sizes,
    )  # fmt: skip
    y = launch_scatter((a,), (down,), (1, W), plan, D)
    return launch_combine(y, weights, R, k), g, u


# --- backward kernels ----------------------------------------------------------------------------------------


@triton.jit
def through_swiglu(
    b_da, b_weights, p_g, p_u, p_dg, p_du, p_wa, m_p, i_w, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Store dg, du and weights a of BM rows and BN columns from i_w on; return their part of dweights [BM]."""
    o_w = i_w + tl.arange(0, BN)
    o = tl.arange(0, BM)[:, None] * W + o_w[None, :]
    m = m_p[:, None] & (o_w < W)[None, :]
    b_g = tl.load(p_g + o, mask=m, other=0.0).to(tl.float32)
    b_u = tl.load(p_u + o, mask=m, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_g)
    b_silu = b_g * b_sigmoid
    b_a = b_silu * b_u
    b_dweights = tl.sum(b_da * b_a, 1)
    b_da *= b_weights
    tl.store(p_dg + o, (b_da * b_u * (b_sigmoid + b_silu * (1 - b_sigmoid))).to(p_dg.dtype.element_ty), mask=m)
    tl.store(p_du + o, (b_da * b_silu).to(p_du.dtype.element_ty), mask=m)
    tl.store(p_wa + o, (b_weights * b_a).to(p_wa.dtype.element_ty), mask=m)
    return b_dweights


@triton.jit
def through_down_kernel(
    p_dout, p_order, p_tiles, p_down, p_weights, p_g, p_u, p_dg, p_du, p_wa, p_dweights, s_dout, num_tiles, P,
    k: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """From da = dout down: dg, du, weights a, and of dweights what these BN columns of W add; [W / BN, P] in all."""
    i_n, i_e, first, end = read_tile(p_tiles, num_tiles, (W + BN - 1) // BN)
    if first >= end:
        return
    o_p = first + tl.arange(0, BM)
    o_row = tl.load(p_order + tl.minimum(o_p, end - 1)).to(tl.int64)
    o_w = i_n * BN + tl.arange(0, BN)
    b_da = tl.zeros([BM, BN], tl.float32)
    b_da = add_product(b_da, p_dout + (o_row // k)[:, None] * s_dout, p_down + i_e * D * W, W, 1, o_w, D, W, BN, BK)
    m_p = o_p < end
    b_weights = tl.load(p_weights + o_row).to(tl.float32)[:, None]
    i_out = first.to(tl.int64) * W
    p_g, p_u, p_dg, p_du, p_wa = p_g + i_out, p_u + i_out, p_dg + i_out, p_du + i_out, p_wa + i_out
    # In two halves, so that each fits in registers.
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_da, [BM, 2, BN // 2]), [0, 2, 1]))  # [BM, BN / 2]
    i_w = i_n * BN
    b_dweights = through_swiglu(b_left, b_weights, p_g, p_u, p_dg, p_du, p_wa, m_p, i_w, W, BM, BN // 2)
    i_w += BN // 2
    b_dweights += through_swiglu(b_right, b_weights, p_g, p_u, p_dg, p_du, p_wa, m_p, i_w, W, BM, BN // 2)
    tl.store(p_dweights + i_n.to(tl.int64) * P + o_row, b_dweights, mask=m_p)


@triton.jit
def matrix_grad_kernel(
    p_rows, p_tokens, p_order, p_bounds, p_out, s_tokens, s_w: tl.constexpr, s_d: tl.constexpr,
    k: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[e] = rows^T tokens over the rows of expert e: [P, W], gathered [R, D] -> [E, W, D] with strides of (W, D).

    One program sums all rows of an expert for its BM x BN numbers, and writes zeros if there are none.
    """
    NUM_M: tl.constexpr = (W + BM - 1) // BM
    NUM_N: tl.constexpr = (D + BN - 1) // BN
    i = tl.program_id(0)
    i_e = i // (NUM_M * NUM_N)
    o_w = i // NUM_N % NUM_M * BM + tl.arange(0, BM)
    o_d = i % NUM_N * BN + tl.arange(0, BN)
    first, end = tl.load(p_bounds + i_e), tl.load(p_bounds + i_e + 1)
    b_out = tl.zeros([BM, BN], tl.float32)
    # Which rows of tokens come next is read a step ahead, as their address has to wait for it.
    o_first = first + tl.arange(0, BK)
    o_next = tl.load(p_order + o_first, mask=o_first < end, other=0) // k
    for p in range(first, end, BK):
        o_p = p + tl.arange(0, BK)
        m_p = o_p < end
        o_r = o_next.to(tl.int64)
        o_next = tl.load(p_order + o_p + BK, mask=o_p + BK < end, other=0) // k
        p_block = p_rows + o_p.to(tl.int64)[None, :] * W + o_w[:, None]
        b_rows = tl.load(p_block, mask=m_p[None, :] & (o_w < W)[:, None], other=0.0)  # [BM, BK]
        p_block = p_tokens + o_r[:, None] * s_tokens + o_d[None, :]
        b_tokens = tl.load(p_block, mask=m_p[:, None] & (o_d < D)[None, :], other=0.0)  # [BK, BN]
        b_out = tl.dot(b_rows, b_tokens, b_out, input_precision="ieee")
    o_out = i_e.to(tl.int64) * W * D + o_w[:, None] * s_w + o_d[None, :] * s_d
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=(o_w < W)[:, None] & (o_d < D)[None, :])


# --- backward, on the host -----------------------------------------------------------------------------------


def matrix_grad(rows: Tensor, tokens: Tensor, like: Tensor, strides: tuple, plan: Plan, k: int) -> Tensor:
    """The gradient of one of the three matrices, in its shape and with its strides of (W, D)."""
    W, D, sizes = rows.shape[1], tokens.shape[1], plan.sizes["matrix_grad"]
    out = torch.empty_like(like)
    matrix_grad_kernel[(len(like) * triton.cdiv(W, sizes["BM"]) * triton.cdiv(D, sizes["BN"]),)](
        rows, tokens, plan.order, plan.bounds, out, tokens.stride(0), *strides, k=k, D=D, W=W, **sizes,
    )  # fmt: skip
    return out


def backward(
    dout: Tensor, x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, g: Tensor, u: Tensor, plan: Plan,
    wanted: tuple,
) -> tuple:  # fmt: skip
    """Gradients of x, weights, gate, up and down; None for those that are not wanted."""
    (R, k), (_, W, D), sizes = weights.shape, gate.shape, plan.sizes["through_down"]
    blocks = triton.cdiv(W, sizes["BN"])
    dg, du, wa = (torch.empty_like(g) for _ in range(3))
    dweights = torch.empty(blocks, R * k, dtype=torch.float32, device=x.device)
    through_down_kernel[(len(plan.tiles) * blocks,)](
        dout, plan.order, plan.tiles, down, weights, g, u, dg, du, wa, dweights, dout.stride(0), len(plan.tiles), R * k,
        k=k, D=D, W=W, **sizes,
    )  # fmt: skip
    return (
        launch_combine(launch_scatter((dg, du), (gate, up), (D, 1), plan, D), None, R, k) if wanted[0] else None,
        dweights.sum(0).view(R, k).to(weights.dtype) if wanted[1] else None,
        matrix_grad(dg, x, gate, (D, 1), plan, k) if wanted[2] else None,
        matrix_grad(du, x, up, (D, 1), plan, k) if wanted[3] else None,
        matrix_grad(wa, dout, down, (1, W), plan, k) if wanted[4] else None,
    )


# --- operators, and their autograd ---------------------------------------------------------------------------


def fake_forward(x, choice, weights, gate, up, down, keeps):
    (R, k), (E, W, _D) = choice.shape, gate.shape
    a = x.new_empty(R * k, W) if keeps else x.new_empty(0)
    num_tiles = count_tiles(R * k, E, launch_sizes(x, R * k, (gate, up, down)))
    plan = (choice.new_empty(shape, dtype=torch.int32) for shape in (R * k, E + 1, (num_tiles, 3)))
    return x.new_empty(x.shape), a, torch.empty_like(a), *plan


@operator("grouped_experts", fake_forward)
def run_forward(
    x: Tensor, choice: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, keeps: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = plan_rows(choice, len(gate), launch_sizes(x, choice.numel(), (gate, up, down)))
    out, g, u = forward(x, weights, gate, up, down, plan, keeps)
    return out, *(x.new_empty(0) if kept is None else kept for kept in (g, u)), *plan[:3]


def fake_backward(dout, x, weights, gate, up, down, g, u, order, bounds, tiles, wanted):
    inputs = (x, weights, gate, up, down)
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip(inputs, wanted, strict=True))


@operator("grouped_experts_backward", fake_backward)
def run_backward(
    dout: Tensor, x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, g: Tensor, u: Tensor,
    order: Tensor, bounds: Tensor, tiles: Tensor, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan = Plan(order, bounds, tiles, launch_sizes(x, len(order), (gate, up, down)))
    grads = backward(with_whole_rows(dout), x, weights, gate, up, down, g, u, plan, tuple(wanted))
    dx, dweights, dgate, dup, ddown = (x.new_empty(0) if grad is None else grad for grad in grads)
    return dx, dweights, dgate, dup, ddown


def save(ctx, inputs, output):
    x, _choice, weights, gate, up, down, _keeps = inputs
    ctx.save_for_backward(x, weights, gate, up, down, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def differentiate(ctx, dout, *_):
    needs = ctx.needs_input_grad
    wanted = [needs[0], *needs[2:6]]
    dx, *grads = (
        t if want else None for t, want in zip(run_backward(dout, *ctx.saved_tensors, wanted), wanted, strict=True)
    )
    return dx, None, *grads, None


run_forward.register_autograd(differentiate, setup_context=save)


# --- the function to call ------------------------------------------------------------------------------------


def with_whole_rows(x: Tensor) -> Tensor:
    """Return x [R, D], or a copy if the numbers within a row are not contiguous; the row stride is free."""
    return x if x.stride(1) == 1 else x.contiguous()


def grouped_experts(x: Tensor, choice: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """x [R, D], choice int64[R, k], weights [R, k], gate and up [E, W, D], down [E, D, W] -> [R, D] in the dtype of x.

    x is fp32, fp16 or bf16, and so are gate, up and down, or they are fp32 beside an x of 16 bits: then every number is
    cast where it is read, without a copy, and has its gradient in fp32. Sums are fp32. Under autocast x is cast to its
    dtype, which is that of the result. `choice` must be in 0 .. E - 1, which is not checked: that would wait for the
    GPU. Raises ValueError for other shapes and dtypes, and for tensors on the CPU.
    """
    (x,) = autocast(x)
    gate, up, down = (m if m.dtype == torch.float32 else autocast(m)[0] for m in (gate, up, down))
    check(x, choice, weights, gate, up, down)
    tensors = (x, weights, gate, up, down)
    keeps = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    weights, gate, up, down = (t.contiguous() for t in tensors[1:])
    return run_forward(with_whole_rows(x), choice, weights, gate, up, down, keeps)[0]
