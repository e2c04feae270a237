"""All kernel tests see poison in memory that nobody wrote."""

import pytest

from tests.kernels.oracle import PoisonEmpty


@pytest.fixture(autouse=True)
def poison_empty():
    with PoisonEmpty():
        yield
