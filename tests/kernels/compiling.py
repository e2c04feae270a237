"""Compile what ordinary wrapper calls launch, for GPUs that are not there, and read what came out.

    python -m tests.kernels.compiling 90 tests.kernels.compile_cases        one JSON line a kernel compiled for sm_90

Tensors without contents run through the wrapper, backward passes too; every launch compiles instead of running, in
every config that autotuning would try, with the very types, strides and alignments of the call. The compiler, ptxas and
cuobjdump are in Triton's wheel. Must run without TRITON_INTERPRET, so in a process of its own (test_compiling.py). A
wrapper that looks at the contents of a tensor on the host fails here: that would wait for the GPU.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import torch
import triton
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Compute capability: shared memory that one block can have, in bytes, and multiprocessors (A100, H100).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
MULTIPROCESSORS = {80: 108, 90: 132}
L2_CACHE = {80: 40 * 2**20, 90: 50 * 2**20}


@dataclasses.dataclass
class Compiled:
    case: str
    kernel: str
    capability: int  # 80 or 90
    config: dict  # constexprs, num_warps, num_stages
    dtypes: dict  # of the tensor arguments
    error: str = ""
    registers: int = 0
    spilled: int = 0  # bytes of stack that a thread needs beside its registers
    shared: int = 0  # bytes
    wgmma: int = 0  # instructions for the tensor cores of sm_90
    mma: int = 0  # those of sm_80
    wide_loads: int = 0  # instructions that bring a thread 128 bits of global memory
    conversions: int = 0  # of integers to floats

    def faults(self, tensor_cores: bool) -> list[str]:
        """Say what is wrong with it; `tensor_cores`, its matrix products are meant for them."""
        if self.error:
            return [self.error]
        faults = []
        if self.spilled:
            faults.append(f"spills {self.spilled} bytes beside {self.registers} registers")
        if self.shared > SHARED_MEMORY[self.capability]:
            faults.append(f"{self.shared} bytes of shared memory are above {SHARED_MEMORY[self.capability]}")
        if tensor_cores and self.capability == 90 and not self.wgmma:
            faults.append("no wgmma")
        if tensor_cores and self.capability == 80 and not self.mma:
            faults.append("no mma")
        return faults


# What torch calls of an operator whose tensors have no contents: of ours the host function, not what tells the shapes.
HOST_FUNCTION = property(
    lambda self: self._init_fn if self._namespace == "nanovlm" else vars(self)["_abstract_fn"],
    lambda self, fake: vars(self).update(_abstract_fn=fake),
)


class Driver:
    """As much of a GPU driver as compiling asks for."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device):
        return 0


def compile_case(case: str, function, capability: int) -> list[Compiled]:
    """Call `function()` with fake tensors and return what its launches compile to.

    They lie on the CPU, since a CPU build of torch can neither slice nor differentiate fake CUDA tensors, and say
    is_cuda, so that is what a wrapper must ask.
    """
    seen, compiled = set(), []

    def run(self, *args, grid, warmup, stock=JITFunction.run, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        record = Compiled(
            case,
            self.fn.__name__,
            capability,
            {
                k: v
                for k, v in arguments.items()
                if k not in self.arg_names or self.params[self.arg_names.index(k)].is_constexpr
            },
            {k: str(v.dtype) for k, v in arguments.items() if isinstance(v, torch.Tensor)},
        )
        try:
            kernel = stock(self, *args, grid=(1,), warmup=True, **kwargs)
        except Exception as error:  # whatever the compiler says, and on to the next config
            record.error = f"{type(error).__name__}: {str(error).strip()[:2000]}"
            compiled.append(record)
            return
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            measure(kernel, record)
            compiled.append(record)

    def run_all_configs(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    def data_ptr(self):  # aligned as the allocator aligns, then as the view lies
        return 2**21 + self.storage_offset() * self.element_size()

    properties = types.SimpleNamespace(
        multi_processor_count=MULTIPROCESSORS[capability],
        shared_memory_per_block_optin=SHARED_MEMORY[capability],
        L2_cache_size=L2_CACHE[capability],
    )
    triton.runtime.driver.set_active(Driver(capability))
    with (
        mock.patch.object(CustomOpDef, "_abstract_fn", HOST_FUNCTION, create=True),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(Autotuner, "run", run_all_configs),
        mock.patch.object(FakeTensor, "data_ptr", data_ptr),
        mock.patch.object(FakeTensor, "is_cuda", True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(capability, 10)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        contextlib.redirect_stdout(io.StringIO()),  # ptxas errors come with the whole program
        FakeTensorMode(),
    ):
        function()
    return compiled


def measure(kernel, record: Compiled):
    """Fill in the resources of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    record.registers, record.spilled = int(registers), int(stack) + int(local)
    record.shared = kernel.metadata.shared
    record.wgmma = kernel.asm["ptx"].count("wgmma.mma_async")
    record.mma = kernel.asm["ptx"].count("mma.sync")
    record.wide_loads = len(
        re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global.*, 0x10,", kernel.asm["ptx"])
    )
    record.conversions = len(re.findall(r"cvt\.r[nz]\.b?f\d+\.[su]\d+", kernel.asm["ptx"]))


if __name__ == "__main__":
    capability = int(sys.argv[1])
    for module in sys.argv[2:]:
        for case, function in importlib.import_module(module).CASES.items():
            try:
                records = compile_case(case, function, capability)
            except Exception as error:
                records = [Compiled(case, "", capability, {}, {}, error=f"{type(error).__name__}: {error}")]
            for record in records:
                print(json.dumps(dataclasses.asdict(record), default=str), flush=True)
