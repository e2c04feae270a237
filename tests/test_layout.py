"""Who imports whom, what is needed to import, and what the README shows."""

import ast
import fnmatch
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = [p for folder in ("nanovlm", "eval", "kernels") for p in (ROOT / folder).rglob("*.py")] + [
    ROOT / "train.py",
    ROOT / "generate.py",
]
# Which lmms-eval and vLLM import, and nothing of ours.
PLUG_INS = [ROOT / "eval" / "lmms.py", ROOT / "nanovlm" / "hub" / "vllm_model.py"]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_in(module, prefix):
    return module == prefix or module.startswith(prefix + ".")


def test_the_contracts_of_imports_hold():
    """Floors, no circle, and who touches what: see tool.importlinter in pyproject.toml."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_model_knows_no_process_group():
    for path in (ROOT / "nanovlm" / "model").glob("*.py"):
        assert not any(is_in(name, "torch.distributed") for name in imports(path)), path


def test_optional_packages_are_imported_where_they_are_used():
    for path in (path for path in FILES if path not in PLUG_INS):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        top = [n for n in body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {alias.name for n in top if isinstance(n, ast.Import) for alias in n.names}
        names |= {n.module for n in top if isinstance(n, ast.ImportFrom)}
        optional = {"wandb", "datasets", "gguf", "transformers", "uvicorn", "onnx_ir", "onnxscript", "av", "ray"}
        assert not names & optional, path


def test_nothing_but_the_kernels_needs_triton():
    files = [path for path in FILES if path.parent.name != "kernels" and path not in PLUG_INS]
    names = [path.relative_to(ROOT).with_suffix("").parts for path in files]
    modules = [".".join(("nanovlm", *parts) if parts[0] == "eval" else parts) for parts in names]
    code = f"import sys; sys.modules['triton'] = None; import {', '.join(modules)}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_readme_shows_the_committed_results():
    from benchmarks.scenes import format_results, format_runs, read_lines

    results = json.loads((ROOT / "benchmarks" / "results" / "scenes.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert format_results(results) in readme and format_runs(read_lines()) in readme


def test_the_page_of_data_shows_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # of which one imports another as the script beside it
    from benchmarks import drawn, features, funnel, pages, shards

    found = {(name, "funnel.py"): table for name, table in funnel.tables(pages.read_lines(funnel.RESULTS)).items()}
    for benchmark in (features, shards):
        name = benchmark.RESULTS.stem
        found[name, f"{name}.py"] = benchmark.format_table(pages.read_lines(benchmark.RESULTS))
    found |= {(name, "drawn.py"): table for name, table in drawn.tables(pages.read_lines(drawn.RESULTS)).items()}
    page = " ".join((ROOT / "docs" / "data.md").read_text("utf-8").replace("\\\n", "").split())
    assert all(f"python train.py {command} " in page for command in drawn.COMMANDS.values())
    assert found == {key: pages.find(ROOT / "docs" / "data.md", *key)[1] for key in found}


def test_every_test_file_is_collected(pytestconfig):
    skipped = pytestconfig.getini("norecursedirs")
    folders = {folder for path in (ROOT / "tests").rglob("test_*.py") for folder in path.relative_to(ROOT).parts[:-1]}
    assert "build" in folders and not [x for x in folders if any(fnmatch.fnmatch(x, pattern) for pattern in skipped)]
