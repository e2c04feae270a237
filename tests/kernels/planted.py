"""Kernels with the faults that the compile check must find, and one without."""

import torch
import triton
import triton.language as tl


@triton.jit
def matmul_kernel(p_a, p_b, p_c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    b_c = tl.zeros((BM, BN), tl.float32)
    for i_k in range(0, K, BK):
        b_a = tl.load(p_a + o_m[:, None] * K + i_k + o_k[None, :])
        b_b = tl.load(p_b + o_n[None, :] * K + i_k + o_k[:, None])
        b_c = tl.dot(b_a, b_b, b_c, input_precision="ieee")
    tl.store(p_c + o_m[:, None] * BN + o_n[None, :], b_c)


@triton.jit
def outside_kernel(p_x, p_y, K, BIG: tl.constexpr, SMALL: tl.constexpr):
    """More numbers than registers, which are kept on the stack during a loop that has no use for them."""
    o = tl.arange(0, BIG)
    b_x = tl.load(p_x + o)
    b_sum = tl.zeros([SMALL, SMALL], tl.float32)
    o_s = tl.arange(0, SMALL)
    for i in range(K):
        b_y = tl.load(p_y + i * SMALL + o_s)
        b_sum += tl.exp2(b_y[:, None] * b_sum + b_y[None, :])
    tl.store(p_x + o, b_x * tl.sum(tl.sum(b_sum, 0), 0))


@triton.jit
def modifier_kernel(p_x):
    x = tl.load(p_x + tl.arange(0, 128), cache_modifier=".cg", eviction_policy="evict_first")
    tl.store(p_x + tl.arange(0, 128), x)


@triton.autotune([triton.Config({}, num_warps=warps, num_stages=1) for warps in (4, 8)], key=["K"])
@triton.heuristics({"EVEN": lambda args: args["K"] % 64 == 0})
@triton.jit
def tuned_kernel(p_x, K, EVEN: tl.constexpr):
    tl.store(p_x + tl.arange(0, 64), EVEN)


@triton.jit
def narrow_kernel(p_words, p_x):
    """A naive decoder: words one by one, and integers converted."""
    b_words = tl.load(p_words + 2 * tl.arange(0, 512))
    tl.store(p_x + tl.arange(0, 512), (b_words & 15).to(tl.float32))


def matmul(BM, BN, BK, dtype=torch.bfloat16, **options):
    K = 1024
    a, b, c = torch.empty(BM, K, dtype=dtype), torch.empty(BN, K, dtype=dtype), torch.empty(BM, BN)
    matmul_kernel[(1,)](a, b, c, K, BM, BN, BK, **options)


def autotuned():
    x = torch.empty(65)
    tuned_kernel[(1,)](x, 64)
    tuned_kernel[(1,)](x[1:], 65)


CASES = {
    "good": lambda: matmul(64, 64, 64, num_warps=4, num_stages=3),
    "spills": lambda: matmul(128, 256, 32, num_warps=4, num_stages=1),
    "spills_outside": lambda: outside_kernel[(1,)](torch.empty(8192), torch.empty(99), 9, 8192, 32, num_warps=1),
    "narrow_products": lambda: matmul(64, 64, 64, num_warps=16, num_stages=3),
    "shared": lambda: matmul(128, 64, 128, num_warps=4, num_stages=6),
    "shared_of_99": lambda: matmul(128, 64, 128, num_warps=8, num_stages=4),
    "no_tensor_cores": lambda: matmul(16, 16, 16, torch.float32, num_warps=1),
    "modifier": lambda: modifier_kernel[(1,)](torch.empty(128)),
    "autotuned": autotuned,
    "narrow": lambda: narrow_kernel[(1,)](torch.empty(1024, dtype=torch.int32), torch.empty(512)),
    "host_reads": lambda: torch.empty(2).tolist(),
}
