"""A pytest plugin for a GPU that is lent for minutes: what is known of every test is kept, whatever becomes of the run.

    python -m pytest -p benchmarks.gpu_report --lines tests.jsonl -n 4 tests/kernels

Each test is a line of JSON when it begins and one when it ends, so that a test that hangs is known too. A process that
an error has cut off from the GPU fails all tests that follow; here it ends, and pytest-xdist starts another.
"""

import json
import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--lines", help="file to append a line of JSON to for each test")
    parser.addoption("--only-gpu", action="store_true", help="only tests that use a GPU where there is one")


def pytest_collection_modifyitems(config, items):
    if config.option.only_gpu:
        items[:] = [x for x in items if "device" in x.fixturenames or x.get_closest_marker("gpu")]


def pytest_runtest_logstart(nodeid):
    write({"test": nodeid, "outcome": "begun"})


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        write(line | ({"reason": shorten(report)} if not report.passed else {}))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if report.failed and is_worker() and is_cut_off():
        line = {"test": item.nodeid, "outcome": "failed", "reason": shorten(report)}
        write(line | {"process": "cut off from the GPU, so it ends"}, item.config)
        os._exit(1)
    return report


def is_cut_off() -> bool:
    """Return whether this process has lost the GPU: after an illegal access, every call fails."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def is_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def shorten(report) -> str:
    """Return the last line of what a test failed with, or why it was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr))[:500]


LINES = None


def pytest_configure(config):
    global LINES
    LINES = None if is_worker() else config.option.lines  # xdist reports to the process that started the others


def write(line: dict, config=None):
    path = config.option.lines if config else LINES
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
