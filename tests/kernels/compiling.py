"""Compile what ordinary wrapper calls launch, for GPUs that are not there, and read what came out.

    python -m tests.kernels.compiling 90 tests.kernels.compile_cases        one JSON line a kernel compiled for sm_90

Or for 80, 86, 89 or 120. What is no fault but worth a look, a spill outside of inner loops, goes to the standard error.

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
from collections.abc import Callable
from unittest import mock

import torch
import triton
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from tests.kernels.sass import DEVICES, TOOLS, count_programs, find_loops, find_repeated, read_sass


@dataclasses.dataclass
class Compiled:
    case: str
    kernel: str
    capability: int  # one of DEVICES
    config: dict  # constexprs, num_warps, num_stages
    dtypes: dict  # of the tensor arguments
    error: str = ""
    warps: int = 0
    registers: int = 0
    spilled: int = 0  # bytes of stack that a thread needs beside its registers
    spills: int = 0  # instructions that read or write the stack
    spills_in_outer_loops: int = 0  # those of them around an inner loop, as once a head in a loop over heads
    spills_in_inner_loops: int = 0
    shared: int = 0  # bytes
    programs: int = 0  # that a multiprocessor holds at a time
    wgmma: int = 0  # instructions for the tensor cores of sm_90
    narrowest: int = 0  # of them: see find_narrowest
    mma: int = 0  # instructions for the tensor cores of the others
    wide_loads: int = 0  # instructions that bring a thread 128 bits of global memory
    conversions: int = 0  # of integers to floats
    flushes: int = 0  # instructions that take denormal numbers for 0
    copies: int = 0  # instructions that let the copy engine (TMA) bring a block of a tensor

    def faults(self, tensor_cores: int | bool, device: int = 0) -> list[str]:
        """Say what is wrong with it, also on the GPUs of another `device`, as 86, that run the same code.

        `tensor_cores`: its matrix products are meant for them; a number says how wide wgmma could be, up to 32 columns.
        Below that the tensor cores wait for shared memory, which brings the other operand again for each instruction.
        """
        if self.error:
            return [self.error]
        device = device or self.capability
        most, faults = DEVICES[device].most_shared, []
        if self.spills_in_inner_loops:
            faults.append(f"spills in inner loops: {self.spills_in_inner_loops} instructions of {self.spills}")
        if self.shared > most:
            faults.append(f"{self.shared} bytes of shared memory are above {most} of sm_{device}")
        elif device != 942 and not count_programs(self.registers, self.warps, self.shared, DEVICES[device]):
            faults.append(f"{self.warps} warps of {self.registers} registers do not fit a multiprocessor")
        if tensor_cores and self.capability == 90:
            if not self.wgmma:
                faults.append("no wgmma")
            elif self.narrowest < tensor_cores:
                faults.append(f"wgmma with N = {self.narrowest}, though {int(tensor_cores)} is possible")
        if tensor_cores and self.capability not in (90, 942) and not self.mma:
            faults.append("no mma")
        return faults

    def notes(self) -> list[str]:
        """Say what is no fault, but may cost time."""
        if self.spills == self.spills_in_inner_loops:
            return []
        outer = f"{self.spills_in_outer_loops} in outer loops"
        inner = f"{self.spills_in_inner_loops} in inner ones"
        return [f"spills {self.spilled} bytes in {self.spills} instructions, {outer} and {inner}"]


AMD = GPUTarget("hip", "gfx942", 64)  # MI300; here by the number 942, and judged by its shared memory alone

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
        return AMD if self.capability == 942 else GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device):
        return 0


def compile_case(case: str, function, capability: int, look: Callable | None = None) -> list[Compiled]:
    """Call `function()` with fake tensors and return what its launches compile to; `look(kernel, Compiled)` sees more.

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
            if look:
                look(kernel, record)
            compiled.append(record)

    def run_all_configs(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    def data_ptr(self):  # aligned as the allocator aligns, then as the view lies
        return 2**21 + self.storage_offset() * self.element_size()

    device = DEVICES[capability]
    properties = types.SimpleNamespace(
        multi_processor_count=device.processors,
        shared_memory_per_block_optin=device.most_shared,
        L2_cache_size=device.l2_cache,
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
        mock.patch.object(torch.version, "hip", "6" if capability == 942 else None),
        contextlib.redirect_stdout(io.StringIO()),  # ptxas errors come with the whole program
        FakeTensorMode(),
    ):
        function()
    return compiled


def measure(kernel, record: Compiled):
    """Fill in the resources of a compiled kernel."""
    record.shared, record.warps = kernel.metadata.shared, kernel.metadata.num_warps
    if record.capability == 942:
        record.programs = 1
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
    record.registers, record.spilled = int(registers), int(stack) + int(local)
    if record.spilled:
        code = read_sass(kernel.asm["cubin"])
        spills = {n for n, i in enumerate(code) if i.kind == "spill"}
        inner = {n for span in find_loops(code) for n in range(span.first, span.last + 1)}
        record.spills, record.spills_in_inner_loops = len(spills), len(spills & inner)
        record.spills_in_outer_loops = len(spills & find_repeated(code) - inner)
    record.programs = count_programs(record.registers, record.warps, record.shared, DEVICES[record.capability])
    columns = [int(N) for N in re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k", kernel.asm["ptx"])]
    record.wgmma, record.narrowest = len(columns), find_narrowest(columns)
    record.mma = kernel.asm["ptx"].count("mma.sync")
    record.wide_loads = len(
        re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global.*, 0x10,", kernel.asm["ptx"])
    )
    record.copies = kernel.asm["ptx"].count("cp.async.bulk.tensor")
    record.flushes = len(re.findall(r"\b(?:add|mul|fma)\S*\.ftz", kernel.asm["ptx"]))
    record.conversions = len(re.findall(r"cvt\.r[nz]\.b?f\d+\.[su]\d+", kernel.asm["ptx"]))


def find_narrowest(columns: list[int]) -> int:
    """Return the number of columns N of wgmma below which less than a quarter of the products are made; 0 without any.

    A quarter, since a head of 72 is cut into 64 + 16 columns: a tenth of its products are narrow, and have to be.
    """
    done = 0
    for N in sorted(columns):
        done += N
        if 4 * done >= sum(columns):
            return N
    return 0


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
                for note in record.notes():
                    print(f"{case}: {record.kernel} {record.config}: {note}", file=sys.stderr)
