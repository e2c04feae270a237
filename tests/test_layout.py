"""Imports only point down the road: train, generate, eval -> objectives -> losses, model -> kernels."""

import ast
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scenes import format_results, format_runs, read_lines

ROOT = Path(__file__).parent.parent
FILES = [p for folder in ("nanovlm", "eval", "kernels") for p in (ROOT / folder).rglob("*.py")] + [
    ROOT / "train.py",
    ROOT / "generate.py",
]

# Who may not import what, as prefixes of module names.
FORBIDDEN = {
    "nanovlm": ("train", "generate", "eval", "tests", "benchmarks", "transformers"),
    "nanovlm.data": (
        "nanovlm.model",
        "nanovlm.losses",
        "nanovlm.objectives",
        "nanovlm.checkpoint",
        "nanovlm.hf",
        "nanovlm.export",
        "nanovlm.sampling",
    ),
    "nanovlm.model": (
        "nanovlm.losses",
        "nanovlm.objectives",
        "nanovlm.checkpoint",
        "nanovlm.hf",
        "nanovlm.export",
        "nanovlm.data.chat",
        "nanovlm.data.images",
        "nanovlm.data.loader",
        "nanovlm.data.packing",
        "nanovlm.data.scenes",
        "nanovlm.data.sources",
        "nanovlm.data.tokenizer",
        "nanovlm.optim",
        "nanovlm.cli",
        "jinja2",
        "tokenizers",
        "tyro",
        "torch.distributed",
    ),
    "nanovlm.losses": ("nanovlm.model", "nanovlm.objectives"),
    "kernels": ("nanovlm", "train", "generate", "eval", "tests", "benchmarks", "transformers"),
    "eval": ("train", "generate", "transformers"),
    "train": ("transformers",),
    "generate": ("transformers", "train"),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(module, prefix):
    return module == prefix or module.startswith(prefix + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for owner, forbidden in FORBIDDEN.items():
        if is_in(module, owner):
            bad = [name for name in imports(path) if any(is_in(name, prefix) for prefix in forbidden)]
            if module == "nanovlm.export":  # whose check compares with transformers where it is installed
                bad = [name for name in bad if name != "transformers"]
            assert not bad, f"{path} must not import {bad}"


def test_optional_packages_are_imported_where_they_are_used():
    for path in FILES:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        top = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {alias.name for n in top if isinstance(n, ast.Import) for alias in n.names}
        names |= {n.module for n in top if isinstance(n, ast.ImportFrom)}
        assert not names & {"wandb", "datasets", "gguf", "transformers"}, path


def test_kernels_are_used_in_few_places_and_nothing_needs_triton():
    for path in FILES:
        if path.parent.name != "kernels" and any(is_in(name, "kernels") for name in imports(path)):
            assert path.name in ("attention.py", "moe.py", "quant.py", "losses.py"), path
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if path.parent.name != "kernels"
    ]
    code = f"import sys; sys.modules['triton'] = None; import {', '.join(modules)}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_no_distribution_takes_the_place_of_our_kernels():
    """One of this name has a folder kernels/ too, which transformers uses, and tells from ours by the version."""
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        version = None
    assert version is None, (
        f"the distribution kernels {version} is installed beside our kernels/: pip uninstall kernels"
    )
    from transformers.utils import is_kernels_available

    import kernels

    assert kernels.__file__ == str(ROOT / "kernels" / "__init__.py")
    assert not is_kernels_available()


def test_the_readme_shows_the_committed_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "scenes.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert format_results(results) in readme and format_runs(read_lines()) in readme
