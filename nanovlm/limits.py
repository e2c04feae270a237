"""A limit on the computing that data may cause."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from nanovlm.errors import UserError


class _TimeUp(BaseException):
    """Passes every handler of errors on its way out of the code that took too long."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise UserError that names `what` once the process has computed for so many seconds within.

    Seconds of its processors, not of the clock, so that a process that waits or is stopped runs into no limit. By
    SIGPROF, so only Python code is interrupted, in the main thread; elsewhere there is no limit. Of two limits, one
    within the other, the outer one holds.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_PROF)[0]:
        yield
        return
    is_within = True

    def stop(_number, _frame):
        if is_within:
            raise _TimeUp

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    try:
        yield
    except _TimeUp:
        raise UserError(f"{what} took more than {seconds:g} s") from None
    finally:
        is_within = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
