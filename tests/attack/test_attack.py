"""Some of the damaged inputs of attack.py, those of its first seeds."""

import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ["jsonl", "tar", "parquet", "images", "templates", "models", "gguf", "runs"]


def attack(kind, num=200, seed=0):
    command = [sys.executable, "-m", "tests.attack.attack", kind, "--num", str(num), "--seed", str(seed)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and "0 inputs broke something" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_are_read_or_named(kind):
    attack(kind)


@pytest.mark.parametrize("seed", [1463, 2569])
def test_a_tokenizer_at_which_the_library_panics_or_that_it_cannot_read_again_is_named(seed):
    attack("models", num=1, seed=seed)
