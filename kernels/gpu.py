"""Which class of GPU a tensor is on: the kernels choose blocks, warps and stages by it.

90       Hopper: 227 KB of shared memory for a program, wgmma; and Blackwell of data centers, never compiled for
80       Ampere and Ada: 99 KB at least (sm_86, sm_89; the A100 has 163), mma
120      consumer Blackwell: 99 KB, mma
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
    major = torch.cuda.get_device_capability(x.device)[0]
    return 120 if major >= 12 else 90 if major >= 9 else 80
