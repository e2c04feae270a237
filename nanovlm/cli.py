"""Command lines: choose the device, and report a user's mistake in one sentence."""

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parent.parent  # the checkout; site-packages where the wheel is installed
OURS = ("nanovlm", "eval", "kernels", "benchmarks", "train.py", "generate.py")  # our own code in PROJECT


def find_device(name: str) -> torch.device:
    """Turn cpu, cuda, cuda:1 or auto into an available device. Raises ValueError that names a missing one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    present = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    present += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in present:
        raise ValueError(f"device = {name!r} is not here; there are auto, {', '.join(present)}")
    return torch.device(name)


@contextlib.contextmanager
def watch_signals():
    """Yield a list of the received SIGTERM and SIGUSR1, by which a scheduler announces the end of a job.

    Neither ends the process, as each may arrive twice: from the scheduler, and once more from torchrun.
    """
    seen, numbers = [], (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _frame: seen.append(number)) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(main: Callable):
    """Call main. A mistake that our own code reports is printed as one sentence and exits with status 2.

    An error from anywhere else is a bug and keeps its traceback. Characters that the terminal cannot encode are printed
    as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:  # the reader of our output has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raised_in = Path(last.filename).resolve()
        is_ours = raised_in.is_relative_to(PROJECT) and raised_in.relative_to(PROJECT).parts[0] in OURS
        if not is_ours or not ((last.line or "").startswith("raise ") or isinstance(error, OSError)):
            raise
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"{rank}error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
