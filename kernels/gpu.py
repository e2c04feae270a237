"""Which class of GPU a tensor is on: the kernels choose blocks, warps and stages by it.

    90       Hopper, and Blackwell of data centers: 227 KB of shared memory for a program; wgmma on Hopper
    80       others from Ampere on: at least 99 KB (sm_86, sm_89 and sm_120; the A100 has 163), mma
    "hip"    AMD: 64 KB
"""

import torch
from torch import Tensor


def device_class(x: Tensor) -> int | str:
    """Return the class of the GPU that x is on; when interpreting, that of an H100."""
    if not x.is_cuda:
        return 90
    if torch.version.hip:
        return "hip"
    return 90 if 9 <= torch.cuda.get_device_capability(x.device)[0] <= 11 else 80
