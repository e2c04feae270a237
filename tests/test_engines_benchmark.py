"""Every engine of benchmarks/engines.py gives our answer; its page says what was measured.

    make engines                                                             those that pip installs beside each other
    ENGINES="llama.cpp=DIR vLLM=.../bin/python" python -m pytest -m engines  DIR is of pip install --target DIR

A place is a folder of packages or the Python of an environment, named by the first word of an engine's name; after
`transformers=` it may be empty, for the one of the tests.
"""

import os
import re

import numpy as np
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
from benchmarks.engines_models import MODELS, Written, write_model
from nanovlm.errors import UserError

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


# In the place of node and of the library.
NODE = """#!/bin/sh
printf '{"logits": LOGITS, "tokens": TOKENS}' > outputs.json
"""


def test_the_answer_of_node_is_compared_and_shown(tmp_path, monkeypatch):
    inputs = {"input_ids": np.ones((1, 3)), "pixel_values": np.ones((1, 1, 3, 2, 2))}
    written = Written(tmp_path, inputs, np.array([2.0, -4.0]), [5, 6], "", np.empty(0))
    (tmp_path / "graphs").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    place, ask = find_place("transformers.js", {"transformers.js": str(tmp_path)}, 1), ENGINES["transformers.js"].ask
    with pytest.raises(UserError, match="node is not installed"):
        ask(written, place, [])
    (tmp_path / "bin").mkdir()
    for logits, tokens, word in (
        ("[2, -4.0002]", "[5, 6]", "| yes | 5.0e-05 of logits |"),
        ("[2, -4.02]", "[5, 6]", "| **no** | 5.0e-03 of logits |"),
        ("[2, -4]", "[5, 7]", "| **no** | 0.0e+00 of logits |"),
    ):
        (tmp_path / "bin" / "node").write_text(NODE.replace("LOGITS", logits).replace("TOKENS", tokens))
        (tmp_path / "bin" / "node").chmod(0o755)
        row = ask(written, place, []) | {"package": "x 1", "environment": {"date": "2026-01-01", "commit": None}}
        assert word in make_page({"transformers.js": row})


@pytest.mark.parametrize("name", [name for name in MODELS if name != "Qwen3-MoE"])
def test_models_are_written(tmp_path, name):
    written = write_model(tmp_path, name)
    assert len(written.tokens) == NUM_TOKENS and written.text.strip() and (tmp_path / "hub" / "config.json").is_file()
    assert (tmp_path / "gguf").exists() == (name == "Llama")
    assert (tmp_path / "adapter").exists() == (name == "Llama with an adapter")
