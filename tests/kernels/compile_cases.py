"""What is shipped: for each kernel family, functions that call the ordinary wrappers as a model does.

test_compiling.py compiles all that they launch, for sm_80 and sm_90. Tensors are fake: they have no contents, lie on
the CPU and say is_cuda. Choose large shapes as a model has, but few: a compiled config takes a second or two.
"""

import torch


def cross_entropy():
    from nanovlm.kernels.cross_entropy import linear_cross_entropy

    for V, dtype in ((151936, torch.bfloat16), (49152, torch.bfloat16), (640, torch.float16), (32001, torch.float32)):
        hidden, weight = (torch.empty(rows, 1024, dtype=dtype, requires_grad=True) for rows in (4096, V))
        labels = torch.empty(4096, dtype=torch.long)
        linear_cross_entropy(hidden, weight, labels, ignore_index=-100 if V == 49152 else None).backward()


def grouped_gemm():
    from nanovlm.kernels.grouped_gemm import grouped_experts

    # Mixtral; Qwen3-MoE with many, some and few tokens for an expert, and so with experts in fp32 under autocast; a
    # small mixture in fp32.
    for R, k, E, D, W, dtype, weight_dtype in (
        (8192, 2, 8, 4096, 14336, torch.bfloat16, torch.bfloat16),
        (8192, 8, 128, 2048, 768, torch.bfloat16, torch.bfloat16),
        (512, 8, 128, 2048, 768, torch.bfloat16, torch.bfloat16),
        (4, 8, 128, 2048, 768, torch.bfloat16, torch.bfloat16),
        (8192, 8, 128, 2048, 768, torch.bfloat16, torch.float32),
        (512, 8, 128, 2048, 768, torch.bfloat16, torch.float32),
        (4, 8, 128, 2048, 768, torch.bfloat16, torch.float32),
        (4096, 2, 8, 192, 144, torch.float32, torch.float32),
        (4, 2, 8, 192, 144, torch.float32, torch.float32),
    ):
        dtypes = (dtype, dtype, *[weight_dtype] * 3)
        shapes = (R, D), (R, k), (E, W, D), (E, W, D), (E, D, W)
        x, *tensors = (
            torch.empty(shape, dtype=dtype, requires_grad=True) for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        grouped_experts(x, torch.empty(R, k, dtype=torch.int64), *tensors).sum().backward()


def multiply(format, M, N, K, dtype=torch.bfloat16, group=64):
    """Multiply x [M, K] with a weight [N, K] of few bits."""
    from nanovlm.kernels.dequant_matmul import dequant_matmul

    dequant_matmul(torch.empty(M, K, dtype=dtype), make_weight(format, N, K, group))


def make_weight(format, N, K, group=64, *experts):
    """A weight [N, K] of few bits, or a stack of them; nf4 has groups of 64."""
    from nanovlm.kernels.quantized_weight import NUM_BITS, QuantizedWeight

    num_groups = 1 if format == "int8" else (K + group - 1) // group
    scale = {"int8": torch.float32, "int4": torch.int32, "nf4": torch.uint8}[format]
    codes = torch.empty(*experts, N, (K + 31) // 32 * NUM_BITS[format], dtype=torch.int32)
    nested = ()
    if format == "nf4":
        nested = torch.empty(*experts, (N * num_groups + 255) // 256), torch.empty(experts)
    scales = torch.empty(*experts, N, num_groups, dtype=scale)
    return QuantizedWeight(format, (N, K), group, codes, scales, *nested)


def quantized_experts():
    from nanovlm.kernels.quantized_experts import quantized_experts

    # Qwen3-MoE with few and some tokens for an expert; a small mixture in fp32.
    for R, k, E, D, W, formats, dtype in (
        (4, 8, 128, 2048, 768, ("int4",), torch.bfloat16),
        (512, 8, 128, 2048, 768, ("int8", "int4", "nf4"), torch.bfloat16),
        (4, 2, 8, 192, 144, ("nf4",), torch.float32),
    ):
        for format in formats:
            gate, up, down = (make_weight(format, N, K, 64, E) for N, K in ((W, D), (W, D), (D, W)))
            x, weights = torch.empty(R, D, dtype=dtype, requires_grad=True), torch.empty(R, k, dtype=dtype)
            quantized_experts(x, torch.empty(R, k, dtype=torch.int64), weights, gate, up, down)


def dequant_matmul():
    for format in ("int8", "int4", "nf4"):
        multiply(format, 1, 4096, 4096)
        multiply(format, 16, 4096, 4096)
        multiply(format, 64, 4096, 14336, torch.float16)
    multiply("int4", 1, 4096, 14336, torch.float16, group=128)
    multiply("nf4", 512, 4096, 4096)
    multiply("int4", 4, 96, 288, torch.float32)  # the scenes
    multiply("int4", 64, 4096, 4096, torch.float32)


def attention():
    from nanovlm.kernels.attention import Runs, attention

    # Decoders of SmolVLM-256M, Phi-3 mini, Llama 3 and Gemma, whose documents are packed; with all that a layer may
    # have besides, as those of gpt-oss, Mistral and Gemma-3; SigLIP So400m; the scenes.
    for H, N, K, T, mask, dtype in (
        (64, 9, 3, 4096, "runs", torch.bfloat16),
        (96, 32, 32, 4096, "runs", torch.bfloat16),
        (128, 32, 8, 4096, "runs", torch.bfloat16),
        (256, 8, 1, 4096, "runs", torch.bfloat16),
        (64, 64, 8, 4096, "runs, spans, window, sinks", torch.bfloat16),
        (128, 32, 8, 4096, "runs, spans, window, sinks", torch.bfloat16),
        (256, 8, 4, 4096, "runs, spans, window, sinks", torch.bfloat16),
        (72, 16, 16, 729, "none", torch.bfloat16),
        (32, 4, 4, 192, "runs", torch.float16),
        (32, 4, 4, 192, "runs", torch.float32),
        (32, 4, 4, 192, "runs, spans, window, sinks", torch.float32),
        (128, 32, 8, 4096, "runs", torch.float32),
        (256, 8, 1, 4096, "runs", torch.float32),
    ):
        q, k, v = (torch.empty(2, T, heads, H, dtype=dtype, requires_grad=True) for heads in (N, K, K))
        names = (
            ["first", "shared", "own", "until"] + ["last", "since"] * ("spans" in mask) + ["near"] * ("window" in mask)
        )
        tensors = {name: torch.empty(2, T, dtype=torch.int32) for name in names}
        runs = Runs(**tensors, window=1024 * ("window" in mask)) if "runs" in mask else None
        sinks = torch.empty(N, dtype=dtype, requires_grad=True) if "sinks" in mask else None
        attention(q, k, v, runs, sinks=sinks)[0].sum().backward()


def cache_attention():
    from nanovlm.kernels.cache_attention import attend_blocks

    # Decoding, checking of drafted tokens, whose number is no multiple of 16, and a chunk of a prompt: of Llama 3,
    # Gemma and SmolVLM-256M, of heads in two parts, and of the scenes. A cache of 32,768 slots, tables for 8,192
    # positions.
    for N, K, H, dtype in (
        (32, 8, 128, torch.bfloat16),
        (8, 1, 256, torch.bfloat16),
        (9, 3, 64, torch.bfloat16),
        (32, 32, 96, torch.bfloat16),
        (4, 4, 32, torch.float16),
        (4, 4, 32, torch.float32),
        (32, 8, 128, torch.float32),
        (8, 1, 256, torch.float32),
    ):
        cache, table = torch.empty(32768, K, H, dtype=dtype), torch.empty(2, 512, dtype=torch.int32)
        for T in (1, 8, 512) if H == 128 else (1, 512):
            attend_blocks(
                torch.empty(2, T, N, H, dtype=dtype), cache, cache, table, torch.empty(2, T, dtype=torch.int64)
            )
    # Codes of 4 bits: Llama 3 and Gemma. Windows: gpt-oss with its sinks, and Gemma-3 with codes of 8 bits.
    for N, K, H, num_bits, has_window, has_sinks in (
        (32, 8, 128, 4, False, False),
        (8, 1, 256, 4, False, False),
        (64, 8, 64, 0, True, True),
        (8, 4, 256, 8, True, False),
    ):
        cache, scales = torch.empty(32768, K, H, dtype=torch.bfloat16), None
        if num_bits:
            cache = torch.empty(32768, K, H * num_bits // 8, dtype=torch.uint8)
            scales = [torch.empty(32768, K, 2, dtype=torch.bfloat16)] * 2
        for T in (1, 512):
            q, last = torch.empty(2, T, N, H, dtype=torch.bfloat16), torch.empty(2, T, dtype=torch.int64)
            first, sinks = last if has_window else None, torch.empty(N) if has_sinks else None
            attend_blocks(q, cache, cache, table, last, first=first, sinks=sinks, scales=scales)


CASES = {
    "attention": attention,
    "cache_attention": cache_attention,
    "cross_entropy": cross_entropy,
    "grouped_gemm": grouped_gemm,
    "dequant_matmul": dequant_matmul,
    "quantized_experts": quantized_experts,
}

# Kernels whose matrix products are meant for the tensor cores, by name: how many columns wgmma should have at least, 0
# for those not meant for them. compiled.config has the constexprs and num_warps, compiled.dtypes the dtypes of tensor
# arguments, by name.


def width(*sides: int) -> int:
    """Return the least N that is wanted of products with such sides: 32, or as far as a shorter side goes."""
    return min(32, *sides)


def of_64_rows(*sides):
    """In 16 bits: tiles of 64 rows or more are for the tensor cores of sm_90, those of 16 for the ones before."""

    def columns(compiled):
        is_meant = compiled.config["BM"] >= 64 and "torch.float32" not in compiled.dtypes.values()
        return width(*(compiled.config[side] for side in sides)) if is_meant else 0

    return columns


def of_backward_kv(compiled):
    is_fp32 = "torch.float32" in (compiled.dtypes["p_q"], compiled.dtypes["p_k"])
    if is_fp32:
        return 0
    # With heads above 128 wider products leave too few registers: all blocks tried spill in the inner loop.
    return 16 if compiled.config["HA"] > 128 else width(compiled.config["BM"], compiled.config["HA"])


TENSOR_CORES = {
    **dict.fromkeys(("forward_kernel", "backward_q_kernel", "blocks_kernel"), of_64_rows("BN", "HA")),
    "backward_kv_kernel": of_backward_kv,
    **dict.fromkeys(
        ("gate_up_kernel", "scatter_kernel", "through_down_kernel", "matrix_grad_kernel"), of_64_rows("BN")
    ),
    **dict.fromkeys(
        ("decoded_gate_up_kernel", "decoded_scatter_kernel"),
        lambda compiled: 0 if compiled.config["BN"] < 64 else width(compiled.config["BM"]),
    ),
    "matmul_kernel": lambda compiled: 0 if compiled.dtypes["x"] == "torch.float32" else width(compiled.config["BM"]),
}
