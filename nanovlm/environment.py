"""Choose the device, threads and precision of a run, and describe what a result was measured on."""

import ctypes
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from nanovlm import cli
from nanovlm.errors import UserError


def find_device(name: str) -> torch.device:
    """Turn cpu, cuda, cuda:1 or auto into an available device. Raises UserError that names a missing one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    present = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    present += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in present:
        raise UserError(f"device = {name!r} is not here; there are auto, {', '.join(present)}")
    return torch.device(name)


def choose_threads(device: torch.device) -> int:
    """Return the number of CPU threads: the physical cores that this process may use, divided by the machine's ranks.

    With a GPU it is 1, as the CPU then only launches kernels.
    """
    if device.type != "cpu":
        return 1
    return max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def count_cores() -> int:
    """Count the physical cores that this process may run on; without that information, its processors."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = set()
    for number in allowed:
        try:
            topology = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
            siblings.add(topology.read_text())
        except OSError:  # another system, or not shown in a container
            siblings.add(number)
    return int(min(len(siblings), cpu_quota()))


def cpu_quota() -> float:
    """Return how many processors the control group of a container allows, at least 1; infinity without a limit."""
    new, old = Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu")
    try:
        if new.exists():
            quota, period = new.read_text().split()
        else:
            quota, period = ((old / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return float("inf")
    return float("inf") if quota in ("max", "-1") else max(1, int(quota) // int(period))


def choose_precision(device: torch.device) -> str:
    """Return bf16 on a GPU and on a CPU with bf16 instructions, else fp32: without the instructions bf16 is slower.

    The instructions are AVX512_BF16 and AMX of x86; ATEN_CPU_CAPABILITY can keep torch from using them.
    """
    if device.type != "cpu":
        return "bf16"
    flags = set(processor_field("flags").split())
    native = flags & {"avx512_bf16", "amx_bf16"} and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return "bf16" if native else "fp32"


def keep_freed_memory():
    """Tell glibc to keep freed memory; by default it unmaps every large tensor, and the next one is paged in anew.

    Large tensors get no mapping of their own, nothing is returned to the system, and the heap grows by 64 MiB more than
    needed (mallopt(3), option numbers from malloc.h). Does nothing on a system without glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "gnu_get_libc_version"):
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_top_pad, 2**26)):
            libc.mallopt(option, value)


def processor_field(name: str) -> str:
    """Return a field of the first processor, such as "model name", or "" where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == name), "")


def git_commit() -> str | None:
    """Return the commit of this checkout, followed by + if files are changed; None outside a checkout."""

    def git(*command):
        return subprocess.run(
            ["git", *command], cwd=cli.PROJECT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != cli.PROJECT:  # installed into somebody else's repository
            return None
        return git("describe", "--always", "--abbrev=40", "--dirty=+")
    except (OSError, subprocess.CalledProcessError):
        return None


def short_commit(commit: str) -> str:
    """Return seven digits of what `git_commit` returned, and its `+`."""
    return commit[:7] + "+" * commit.endswith("+")


def describe_environment(device: torch.device, threads: int, precision: str | None = None) -> dict:
    """Describe what a result was measured on; leave out `precision` where no model was run."""
    return {
        "commit": git_commit(),
        "device": device_name(device),
        **({"instructions": torch.backends.cpu.get_cpu_capability()} if device.type == "cpu" else {}),
        "threads": threads,
        **({"precision": precision} if precision else {}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor where the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_field("model name") or platform.processor() or platform.machine()
