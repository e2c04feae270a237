"""What all kernels have in common with torch: operators, on the right GPU, and what autocast does to their inputs.

A host function that launches kernels becomes an operator, `torch.ops.nanovlm.<name>`. torch looks at operators from
outside only: torch.compile and torch.export keep each as one node, and selective checkpointing can name it. Where torch
traces, with tensors that have no contents, it calls `fake` in its place, which returns empty tensors of the right
shapes. So a host function may do what cannot be traced, such as asking for the properties of a GPU.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from triton import knobs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def operator(name: str, fake: Callable):
    """Register a host function, whose first argument is a tensor, as an operator that runs on the tensor's GPU.

    Triton launches on the current GPU, whichever the tensors are on.
    """

    def register(run: Callable) -> CustomOpDef:
        @functools.wraps(run)
        def run_on_its_gpu(x: Tensor, *args):
            with torch.cuda.device_of(x):
                return run(x, *args)

        schema = torch.library.infer_schema(run, mutates_args=())
        operator = torch.library.custom_op(f"nanovlm::{name}", run_on_its_gpu, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        return operator

    return register


@torch.compiler.assume_constant_result
def is_interpreted() -> bool:
    """Return whether kernels run on a CPU; torch.compile cannot trace how Triton asks for it."""
    return knobs.runtime.interpret


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast fp32, fp16 and bf16 to the dtype of autocast where it is on for their device, as F.linear does."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype in DTYPES else x for x in tensors)
