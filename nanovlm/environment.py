"""What a result was measured on: commit, device, versions, date."""

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from nanovlm import cli


def git_commit() -> str | None:
    """Return the commit of this checkout, with a + when files are changed; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=cli.PROJECT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_environment(device: torch.device, threads: int, precision: str | None = None) -> dict:
    """Say what a result was measured on; without a precision where no model computes."""
    return {
        "commit": git_commit(),
        "device": device_name(device),
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
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
