"""What the pages name is there: links, pictures, files, commands and presets; the five lines of the README run."""

import functools
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from nanovlm.data.layouts import table
from nanovlm.hub.model_folder import save_model
from nanovlm.model.vlm import VLM
from nanovlm.presets import PRESETS
from tests.conftest import TINY, noise

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a page may name before it is there: a command writes it.
CARRIED = {"benchmarks/carried", "benchmarks/carried/commit", "benchmarks/carried/attention_before.py"}
WRITTEN = {"benchmarks/results/kernels.jsonl", *CARRIED}
# Pages that tell of the past or of other projects name what is not here.
ELSEWHERE = {"CHANGELOG.md", "log.md", "neighbours.md"}


@functools.cache
def read(page):
    return page.read_text(encoding="utf-8")


def find_links(text):
    """Yield the targets of Markdown links, link definitions and HTML attributes, outside of code."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    yield from re.findall(r"\]\(([^)\s]+)\)", prose)
    yield from re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, flags=re.M)
    yield from re.findall(r'(?:src|href)="([^"]+)"', prose)


def find_code(text):
    """Yield every line of a code block and every piece of inline code, with lines that end in a backslash joined."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.S)
    for block in blocks:
        yield from block.replace("\\\n", " ").splitlines()
    for inline in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
        yield " ".join(inline.split())


def find_anchors(text):
    """Return the anchors that a forge makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_links(page, text):
    for link in find_links(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield link
        elif anchor and anchor not in find_anchors(read(target) if path else text):
            yield link


def missing_commands(text):
    """Yield what a command would not find: a script, a module or a preset."""
    for line in find_code(text):
        for script in re.findall(r"(?:\bpython|\bsh|\btorchrun\b[^#|]*?) ([\w./]+\.(?:py|sh))\b", line):
            if not (ROOT / script).is_file():
                yield f"{script} in {line!r}"
        for module in re.findall(r"\bpython -m ([\w.]+)", line):
            if not is_module(module):
                yield f"{module} in {line!r}"
        for preset in re.findall(r"\btrain\.py ([a-z]\w*)", line):
            if preset not in PRESETS:
                yield f"the preset {preset} in {line!r}"


def is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def missing_files(text):
    """Yield the paths of this repository that are named in full and not there."""
    for code in find_code(text):
        for path in re.findall(r"(?<![\w/.-])(?:benchmarks|docs|eval|examples|kernels|nanovlm|tests)/[\w./<>-]*", code):
            if "<" not in path and path not in WRITTEN and not (ROOT / path).exists():
                yield path


def names(pages):
    return [page.name for page in pages]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_and_pictures_are_there(page):
    assert not list(missing_links(page, read(page)))


@pytest.mark.parametrize("page", CURRENT := [page for page in PAGES if page.name not in ELSEWHERE], ids=names(CURRENT))
def test_commands_and_files_are_there(page):
    assert not [*missing_commands(read(page)), *missing_files(read(page))]


def test_what_is_missing_is_noticed():
    """Each of the searches above finds something, so that none of them passes for want of a match."""
    page = ROOT / "docs" / "page.md"
    text = (
        "[a](none.md) ![b](none.png) [c](road.md) [d](road.md#none) [e](road.md#the-road) [f](https://example.org)\n"
        '<img src="none.svg"> `[no](link.md)`\n\n[g]: none.txt\n\n'
        "```\npython none.py\npython train.py none\npython -m nanovlm.none\npython -m none.none\n"
        "torchrun --nproc-per-node 8 other.py scenes\nsh benchmarks/none.sh X\npython train.py scenes --run-dir \\\n"
        "  runs/x\n```\nand `python -m\nnanovlm.cli_none` of `tests/none.py`, `docs/road.md`, `runs/none`"
    )
    assert list(missing_links(page, text)) == ["none.md", "none.png", "road.md#none", "none.txt", "none.svg"]
    found = [problem.split(" in ")[0] for problem in missing_commands(text)]
    assert found == [
        "none.py",
        "the preset none",
        "nanovlm.none",
        "none.none",
        "other.py",
        "benchmarks/none.sh",
        "nanovlm.cli_none",
    ]
    assert list(missing_files(text)) == ["benchmarks/none.sh", "tests/none.py"]


def test_the_lines_of_the_readme_run(tmp_path, monkeypatch, capsys, processor):
    """With a tiny model in the place of the demo's."""
    (code,) = re.findall(r"```python\n(.*?)```", read(ROOT / "README.md"), flags=re.S)
    assert len(list(filter(None, code.splitlines()))) == 5
    save_model(tmp_path / "runs" / "demo" / "model", VLM(TINY), processor)
    (tmp_path / "runs" / "demo" / "images").mkdir()
    noise(0).save(tmp_path / "runs" / "demo" / "images" / "0.png")
    monkeypatch.chdir(tmp_path)
    results = {}
    exec(code, results)  # prints the answer, which of a random model may be empty
    assert results["batch"].pixel_values.shape[0] == 1
    assert capsys.readouterr().out.endswith("\n")


def test_the_table_of_layouts_is_that_of_the_code():
    assert "\n".join(["", *table(), ""]) in read(ROOT / "docs" / "records.md")


def test_the_tests_of_make_quick_are_there():
    makefile = read(ROOT / "Makefile").replace("\\\n", " ")
    (quick,) = re.findall(r"^QUICK := (.+)$", makefile, flags=re.M)
    assert len(quick.split()) > 5
    for name in quick.split():
        path, _, function = name.partition("::")
        assert (ROOT / path).exists(), name
        assert not function or f"def {function}(" in read(ROOT / path), name


def test_the_targets_of_make_that_pages_name_are_there():
    targets = set(re.findall(r"^([\w/.-]+):(?!=)", read(ROOT / "Makefile"), flags=re.M))
    for page in PAGES:
        for line in find_code(read(page)):
            for target in re.findall(r"^make ([a-z][\w.-]*)", line):
                assert target in targets, f"make {target} in {page.name}"


def test_what_is_to_be_installed_can_be():
    """This distribution is on no index: from the folder alone, with extras that it has."""
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    sources = [
        *PAGES,
        ROOT / "Makefile",
        *(p for d in ("nanovlm", "benchmarks", "examples") for p in ROOT.glob(f"{d}/**/*")),
    ]
    found = []
    for path in (path for path in sources if path.suffix in (".md", ".py", ".ipynb", ".sh") or path.name == "Makefile"):
        assert not re.search(r"""pip install[^`\n&]*["' ]nanovlm\b""", read(path)), path
        found += re.findall(r'-e \\*"\.\[(\w+)\]', read(path))
    assert {"gguf", "data", "test"} <= set(found) <= extras.keys()


@pytest.mark.parametrize("name", ["CITATION.cff", ".pre-commit-config.yaml", ".github/workflows/test.yml"])
def test_files_for_other_programs_can_be_read(name):
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    data = yaml.safe_load(read(ROOT / name))
    if name == "CITATION.cff":
        assert data["cff-version"] == "1.2.0" and data["authors"] and data["title"] and data["message"]
        version = re.search(r'^version = "(.+)"$', read(ROOT / "pyproject.toml"), flags=re.M)[1]
        assert data["version"] == version
        date = re.search(rf"^## \[{re.escape(version)}\] - (\S+)$", read(ROOT / "CHANGELOG.md"), flags=re.M)[1]
        assert data["date-released"] == date
    elif name == ".pre-commit-config.yaml":
        hooks = {hook["id"]: hook for repo in data["repos"] for hook in repo["hooks"]}
        assert hooks.keys() == {"ruff-check", "ruff-format", "lint-imports", "pyright"}
        assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks.values())
    else:
        (job,) = data["jobs"].values()
        assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
