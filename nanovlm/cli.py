"""Command lines: which device, and a user's mistakes as one sentence."""

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
OURS = ("nanovlm", "eval", "kernels", "benchmarks", "train.py", "generate.py")  # what in PROJECT is our own code


def find_device(name: str) -> torch.device:
    """Turn cpu, cuda, cuda:1 or auto into a device that is there. Raises ValueError that names what is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    present = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    present += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in present:
        raise ValueError(f"device = {name!r} is not here; there are auto, {', '.join(present)}")
    return torch.device(name)


@contextlib.contextmanager
def watch_signals():
    """Yield a list that receives the signals by which a scheduler announces the end, SIGTERM and SIGUSR1.

    None of them ends the process: torchrun repeats to its ranks what a scheduler may have sent them as well.
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

    An error from anywhere else is a bug, and keeps its traceback. What the terminal has no letters for is written as
    an escape.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raised_in = Path(last.filename).resolve()
        is_ours = raised_in.is_relative_to(PROJECT) and raised_in.relative_to(PROJECT).parts[0] in OURS
        if not is_ours or not (last.line.startswith("raise ") or isinstance(error, OSError)):
            raise
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"{rank}error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
