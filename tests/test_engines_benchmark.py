"""Every engine of benchmarks/engines.py gives our answer; its page says what was measured.

    make engines                                                             those that pip installs beside each other
    ENGINES="llama.cpp=DIR vLLM=.../bin/python" python -m pytest -m engines  DIR is of pip install --target DIR

A place is a folder of packages or the Python of an environment, named by the first word of an engine's name; after
`transformers=` it may be empty, for the one of the tests.
"""

import os
import re

import pytest

from benchmarks.engines import (
    ENGINES,
    LIMITS,
    NUM_TOKENS,
    PAGE,
    find_place,
    find_version,
    is_ours,
    make_page,
    read_rows,
)
from benchmarks.engines_models import MODELS, write_model

WHERE = dict(entry.split("=", 1) for entry in os.environ.get("ENGINES", "").split())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Models on disk; each is written when it is first asked for."""
    found = {}

    def find(name):
        if name not in found:
            found[name] = write_model(tmp_path_factory.mktemp("models"), name)
        return found[name]

    return find


@pytest.mark.engines
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_gives_our_answer(written, name):
    engine, place = ENGINES[name], find_place(name, WHERE, patience=900)
    if re.split("[, ]", name)[0] not in WHERE or find_version(engine, place) is None:
        pytest.skip(f"needs the package {engine.package} in a place that the environment variable ENGINES names")
    result = engine.ask(written(engine.model), place, list(engine.options))
    assert is_ours(result), result


def test_the_page_is_what_was_measured():
    assert PAGE.read_text() == make_page(read_rows()), "run python benchmarks/engines.py"


def test_another_answer_is_no_yes():
    near, far = LIMITS["log-probabilities"] / 2, LIMITS["log-probabilities"] * 2
    answer = {"same text": True, "of": "log-probabilities"}
    environment = {"date": "2026-01-01", "commit": None}
    for row, word in (
        (answer | {"difference": near}, "| yes | 1.0e-02 of log-probabilities |"),
        (answer | {"difference": far}, "| **no** | 4.0e-02 of log-probabilities |"),
        (answer | {"difference": near, "same text": False}, "| **no** | 1.0e-02 of log-probabilities |"),
        ({"same text": True}, "| yes | the server tells none |"),
        ({"failed": "a | b"}, "| **no** | fails: a / b |"),
    ):
        row = row | {"package": "x 1", "environment": environment}
        assert word in make_page({"llama.cpp": row})


@pytest.mark.parametrize("name", [name for name in MODELS if name != "Qwen3-MoE"])
def test_models_are_written(tmp_path, name):
    written = write_model(tmp_path, name)
    assert len(written.tokens) == NUM_TOKENS and written.text.strip() and (tmp_path / "hub" / "config.json").is_file()
    assert (tmp_path / "gguf").exists() == (name == "Llama")
    assert (tmp_path / "adapter").exists() == (name == "Llama with an adapter")
