"""A process that kills itself, as a machine that dies would."""

import os
import signal
from collections.abc import Callable


def run_until_killed(job: Callable[[], object]) -> bool:
    """Run a job in a process of its own; tell whether it was killed."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1] == signal.SIGKILL
    try:
        job()
    finally:
        os._exit(0)


def kill_before(function: Callable, number: int) -> Callable:
    """Return the function, whose call of this number, from 0 on, kills the process in its place."""
    calls = iter(range(number))

    def wrapped(*args):
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return wrapped
