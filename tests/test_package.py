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
# The folders of the repository, by what they are in the wheel.
PACKAGES = {"nanovlm": "nanovlm", "eval": "nanovlm/eval", "kernels": "nanovlm/kernels"}
MODULES = ("train", "generate")
# Hugging Face's distribution of the name that our folder has, without what it needs.
OTHER_KERNELS = "kernels==0.17.2"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the working tree's wheel, from a copy: a build leaves files beside the sources, and uses old ones."""
    copy = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
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
    def call(command, *args, first=installed, last=None, cwd=empty):
        command = [sys.executable] if command == "python" else [str(installed / "bin" / command)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in (first, last) if path)}
        return subprocess.run([*command, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)

    return SimpleNamespace(installed=installed, empty=empty, call=call)


def find(elsewhere, *modules, **options):
    """Return the files of modules, as an interpreter finds them that starts in an empty folder."""
    code = "import importlib.util, sys; print(*(importlib.util.find_spec(name).origin for name in sys.argv[1:]))"
    done = elsewhere.call("python", "-c", code, *modules, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def pip(*args):
    command = [sys.executable, "-m", "pip", *map(str, args), "--quiet"]
    env = os.environ | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_the_packages_and_the_scripts(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for pattern in ("*.py", "page/*")
        for file in (ROOT / folder).rglob(pattern)
    }
    assert names == files | {f"{module}.py" for module in MODULES}


def test_the_installed_files_are_imported(elsewhere):
    assert find(elsewhere, "nanovlm", "nanovlm.kernels.gpu", "nanovlm.eval.run", *MODULES) == [
        *(str(elsewhere.installed / "nanovlm" / name) for name in ("__init__.py", "kernels/gpu.py", "eval/run.py")),
        *(str(elsewhere.installed / f"{name}.py") for name in MODULES),
    ]


def test_another_package_called_kernels_stays_what_it_is(elsewhere, tmp_path):
    """Installed beside ours, or imported where ours can be: from the root of the repository."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("ours = False\n")
    code = "import kernels, nanovlm.kernels.gpu as gpu, sys; print(kernels.ours, gpu.__file__)"
    for cwd, root in ((elsewhere.empty, elsewhere.installed), (ROOT, ROOT)):
        done = elsewhere.call("python", "-c", code, first=root, last=tmp_path, cwd=cwd)
        assert done.stdout.split() == ["False", str(root / "nanovlm" / "kernels" / "gpu.py")], done.stderr


def test_that_of_the_package_index_too(elsewhere, tmp_path):
    """With it transformers imports a model from the root of the repository, where it looks for this package."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), OTHER_KERNELS]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{OTHER_KERNELS} cannot be installed: {done.stderr.strip()[-200:]}")
    assert find(elsewhere, "kernels", "nanovlm.kernels.gpu", last=tmp_path) == [
        str(tmp_path / "kernels" / "__init__.py"),
        str(elsewhere.installed / "nanovlm" / "kernels" / "gpu.py"),
    ]
    code = "from transformers import LlamaModel; import nanovlm.kernels.gpu; print(nanovlm.kernels.gpu.__file__)"
    done = elsewhere.call("python", "-c", code, first=ROOT, last=tmp_path, cwd=ROOT)
    assert done.stdout.strip() == str(ROOT / "nanovlm" / "kernels" / "gpu.py"), done.stderr


@pytest.mark.parametrize("name", ["nanovlm-train", "nanovlm-generate", "nanovlm-eval", "nanovlm-serve"])
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
