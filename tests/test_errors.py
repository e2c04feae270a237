"""What data wrote is shown, and obeyed by no terminal; data that take too long are stopped."""

import contextlib
import time

import pytest

from nanovlm.errors import UserError, printable
from nanovlm.limits import time_limit


def test_what_a_terminal_would_obey_is_escaped():
    assert printable("naïve 日本 🙂") == "naïve 日本 🙂"
    assert printable("a\x1b]0;title\x07b\r\n\u202e\ud800") == r"a\x1b]0;title\x07b\r\n\u202e\ud800"
    assert printable(printable("\x1b[2J")) == r"\x1b[2J"
    long = printable("x" * 5000 + "end", most=20)
    assert long == "xxxxxxxxxx ... xxxxxxxend"
    assert str(UserError("the key \x1b[31m is unknown")) == r"the key \x1b[31m is unknown"


def test_a_limit_ends_what_takes_too_long():
    with pytest.raises(UserError, match=r"the template took more than 0\.1 s"), time_limit(0.1, "the template"):
        while True:
            pass
    with pytest.raises(UserError, match="outer"), time_limit(0.2, "outer"), time_limit(0.01, "inner"):
        while True:
            with contextlib.suppress(Exception):  # what catches every error does not catch the limit
                sum(range(1000))
    with time_limit(0.05, "waiting"):
        time.sleep(0.5)  # costs no computing
    begin = time.process_time()
    while time.process_time() < begin + 0.2:  # the limit before does not strike later
        pass
