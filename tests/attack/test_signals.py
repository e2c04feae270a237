"""Some of the signals of attack.py; 5,000 by `python -m tests.attack.attack signals`."""

import pytest

pytest.importorskip("tyro")  # of attack.py; a machine that is lent for minutes may lack it
from tests.attack.attack import Things, try_one


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    made = Things(tmp_path_factory.mktemp("things"))
    yield made
    if made.runner is not None:
        made.runner.end()


@pytest.mark.parametrize("seed", range(40))
def test_a_signal_at_any_moment_leaves_a_run_that_goes_on(seed, things):
    assert try_one("signals", seed, things) == ""
