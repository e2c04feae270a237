"""Some of the damaged inputs of attack.py, those of its first seeds."""

import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ["jsonl", "tar", "parquet", "images", "templates", "models", "gguf", "runs"]


def attack(kind, num=200):
    command = [sys.executable, "-m", "tests.attack.attack", kind, "--num", str(num)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and "0 inputs broke something" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_are_read_or_named(kind):
    attack(kind)
