"""The wheel holds all that the commands need, and nothing else: it works where there is no clone."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES, MODULES = ("nanovlm", "eval", "kernels"), ("train", "generate")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the working tree's wheel, from a copy: a build leaves files beside the sources, and uses old ones."""
    copy = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("train.py", "generate.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip("wheel", copy, "--no-deps", "--no-build-isolation", "--wheel-dir", copy / "dist")
    [wheel] = (copy / "dist").iterdir()
    return wheel


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, wheel):
    """Install the wheel into a folder of its own; return the folder, an empty one, and what runs a command there."""
    installed, empty = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("empty")
    pip("install", wheel, "--no-deps", "--no-index", "--target", installed)
    # Comes before what the clone itself may have installed.
    env = os.environ | {"PYTHONPATH": str(installed)}

    def call(command, *args):
        command = [sys.executable] if command == "python" else [str(installed / "bin" / command)]
        return subprocess.run([*command, *map(str, args)], cwd=empty, env=env, capture_output=True, text=True)

    return SimpleNamespace(installed=installed, empty=empty, call=call)


def pip(*args):
    command = [sys.executable, "-m", "pip", *map(str, args), "--quiet"]
    env = os.environ | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_the_packages_and_the_scripts(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {file.relative_to(ROOT).as_posix() for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    assert names == files | {f"{module}.py" for module in MODULES}


def test_the_installed_files_are_imported(elsewhere):
    code = "import importlib.util, sys; print(*(importlib.util.find_spec(name).origin for name in sys.argv[1:]))"
    done = elsewhere.call("python", "-c", code, *PACKAGES, *MODULES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *(str(elsewhere.installed / name / "__init__.py") for name in PACKAGES),
        *(str(elsewhere.installed / f"{name}.py") for name in MODULES),
    ]


@pytest.mark.parametrize("name", ["nanovlm-train", "nanovlm-generate", "nanovlm-eval"])
def test_help(elsewhere, name):
    done = elsewhere.call(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"{name} [" in done.stdout.splitlines()[0]


def test_a_user_mistake_is_one_sentence(elsewhere):
    done = elsewhere.call("nanovlm-eval", "model", "--limit", 0)
    assert (done.returncode, done.stderr) == (2, "error: --limit 0 must be at least 1\n")


def test_draw_train_and_answer(elsewhere):
    drawn = elsewhere.call("python", "-m", "nanovlm.data.scenes", "pictures", "--num", 1)
    assert drawn.returncode == 0, drawn.stderr
    options = ("--optim.steps", 2, "--data.batch-rows", 2, "--eval.tasks", "--threads", 1, "--device", "cpu")
    trained = elsewhere.call("nanovlm-train", "scenes", "--run-dir", "run", *options)
    assert trained.returncode == 0, trained.stderr
    assert json.loads((elsewhere.empty / "run" / "config.json").read_text())["commit"] is None
    question = ("--image", "pictures/0.png", "--prompt", "what?", "--max-new-tokens", 4, "--device", "cpu", "--json")
    answered = elsewhere.call("nanovlm-generate", "--model", "run/model", *question)
    assert answered.returncode == 0, answered.stderr
    assert isinstance(json.loads(answered.stdout)["text"], str)
