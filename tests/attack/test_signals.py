"""Some of the signals of attack.py; in a file of its own, so that it runs beside the other kinds."""

from tests.attack.test_attack import attack


def test_signals_at_any_moment_leave_a_run_that_goes_on():
    attack("signals", num=200)
