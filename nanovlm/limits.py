"""A limit on the time that data may take."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from nanovlm.errors import UserError


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise UserError that names `what` once the enclosed code has taken so many seconds.

    By SIGALRM, so only Python code is interrupted, in the main thread of a process; elsewhere there is no limit. One
    limit within another keeps the outer one.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(_number, _frame):
        raise UserError(f"{what} took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
