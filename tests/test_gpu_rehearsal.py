"""The minutes on a GPU, rehearsed without one: every part of benchmarks/gpu.sh, where tyro and others are missing.

Shapes are small, kernels are interpreted. Takes a minute of one core.
"""

import ast
import json
import os
import subprocess
import sys
import textwrap
import time
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import gpu, kernels
from benchmarks.gpu import TESTS, install, list_jobs, run_job, summarize
from benchmarks.kernels import FAMILIES, KernelsConfig, read_table, run_family

ROOT = Path(__file__).resolve().parent.parent
MISSING = {"tyro", "docstring_parser", "typeguard", "datasets", "wandb", "gguf", "liger_kernel", "cut_cross_entropy"}
HIDE = f"""
    import sys
    from importlib.machinery import PathFinder

    class Without(PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name.partition(".")[0] in {MISSING} else super().find_spec(name, path, target)

    sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An environment in which the packages that a lent machine lacks are missing, and no GPU is seen."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(textwrap.dedent(HIDE))
    without = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return without | {"PYTHONPATH": str(folder), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}


def call(part, folder, environment, *options):
    """Run a part; return its results as lines of JSON, and what it printed."""
    command = ["sh", str(ROOT / "benchmarks" / "gpu.sh"), part, str(folder), "--tiny", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_the_packages_are_missing(bare):
    for name in MISSING:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
        assert subprocess.run([sys.executable, "-c", code], env=bare).returncode == 0, name


def test_correctness(bare, tmp_path):
    """Two families in place of five; a report of each, a line of each test."""
    printed = call("correctness", tmp_path, bare)
    for family in ("cross_entropy", "models"):
        suite = ET.parse(tmp_path / f"{family}.xml").getroot().find("testsuite")
        assert int(suite.get("tests")) >= 2 and suite.get("errors") == suite.get("failures") == "0"
    outcomes = {line["test"]: line["outcome"] for line in read_lines(tmp_path / "tests.jsonl")}
    assert outcomes["tests/kernels/test_cross_entropy.py::test_chunks[17-4-torch.float32]"] == "passed"
    assert outcomes["tests/model/test_quantized.py::test_a_model_through_the_kernels[int8]"] == "passed"
    assert outcomes["tests/test_gpu.py::test_the_same_run_gives_the_same_bits"] == "skipped"
    assert "tests/kernels/test_cross_entropy.py: 6 passed" in printed
    assert json.loads((tmp_path / "machine.json").read_text())["torch"]
    assert len(list(tmp_path.iterdir())) == 5  # with all families 8, as many as may come back from a lent machine


def test_kernels(bare, tmp_path):
    """Every family checks and times its small shapes in a process of its own; two against other blocks of attention."""
    call("kernels", tmp_path, bare, "--minutes", "9")
    lines = read_lines(tmp_path / "kernels.jsonl")
    assert {line["kernel"].partition(",")[0] for line in lines} == {
        "attention", "dequant_matmul", "cross_entropy", "experts",
    }  # fmt: skip
    assert not [line for line in lines if "result" in line or "left_out" in line]
    assert all(line["checked"] == "all" for line in lines)
    assert all(line["ms"] > 0 for line in lines if line["pass"] != "backward")  # a difference, of times of a busy CPU
    packed = [line for line in lines if line["kernel"] == "attention, packed"]
    assert [line["pass"] for line in packed] == ["forward", "backward", "forward and backward"]
    assert packed[1]["ms"] == pytest.approx(max(0, packed[2]["ms"] - packed[0]["ms"]), abs=1e-3)
    assert set(packed[0]["masks_ms"]) == {"ours", "flex", "sdpa"}


def test_models(bare, tmp_path):
    call("models", tmp_path, bare)
    train, decode = read_lines(tmp_path / "models.jsonl")
    assert train["backends"] == decode["backends"] == "kernels"
    assert train["mfu"] > 0 and decode["tokens_per_second"] > 0 and decode["generated_per_second"] > 0
    assert "nanovlm::attention" in (tmp_path / "profile_tiny.txt").read_text()
    # Everything that a GPU will be asked for is a shape and a backend that there is.
    for name, (script, _, config) in list_jobs(tmp_path, tiny=False).items():
        given = json.loads(config)
        job = json.loads(given["only"]) if script.endswith("train.py") else given | {"shape": given["shapes"][0]}
        assert f"{job['shape']}, " in name and job["shape"] in ("222m", "460m"), name


# --- what must not be lost -----------------------------------------------------------------------------------


def test_what_no_time_was_left_for_is_listed(tmp_path):
    out = tmp_path / "kernels.jsonl"
    kernels.main(KernelsConfig(("experts", "decode"), minutes=0, tiny=True, out=str(out)))
    assert {line["kernel"]: line["left_out"] for line in read_lines(out)} == {
        name: [list(shape) for shape in FAMILIES[name][2]] for name in ("decode", "experts")
    }
    gpu.time_models(tmp_path, time.monotonic(), False, {})
    jobs = read_lines(tmp_path / "models.jsonl")
    assert len(jobs) == len(list_jobs(tmp_path, False)) and {job["result"][:8] for job in jobs} == {"left out"}


def test_the_shapes_that_tell_most_come_first():
    first = FAMILIES["dequant_matmul"][1][:12]
    assert first == [(name, M, 8192, 8192) for name in ("int4", "nf4", "int8") for M in (1, 16, 64, 256)]
    assert list(FAMILIES).index("decode") < list(FAMILIES).index("attention")


def test_a_family_whose_process_ends_goes_on_with_the_next_shape(tmp_path, monkeypatch, capsys):
    """The process of a family is played by a script that ends in the second shape, and by one that hangs."""
    script = tmp_path / "family.py"
    monkeypatch.setattr(kernels, "__file__", str(script))
    config = KernelsConfig(tiny=True, out=str(tmp_path / "out.jsonl"))
    script.write_text("""print('{"begun": 0}\\n{"kernel": "a"}\\n{"begun": 1}', flush=True)\nraise OSError("lost")""")
    assert run_family(config, "dequant_matmul", 0, 60) == 2
    assert '{"kernel": "a"}' in capsys.readouterr().out
    [line] = read_lines(tmp_path / "out.jsonl")
    assert line["arguments"] == list(FAMILIES["dequant_matmul"][2][1]) and "OSError: lost" in line["result"]
    script.write_text("""import time\nprint('{"begun": 3}', flush=True)\ntime.sleep(60)""")
    assert run_family(config, "dequant_matmul", 3, 1 - kernels.GRACE_S) == 4
    script.write_text("""print('{"begun": 6, "ended": true}')""")
    assert run_family(config, "dequant_matmul", 4, 60) == 6 and len(read_lines(tmp_path / "out.jsonl")) == 2


def test_fp64_that_does_not_fit_is_checked_in_part():
    """A part that fits is enough; one that does not fit at all, or is wrong, is not timed."""
    torch, seen = kernels.torch, []

    def plain(x):
        seen.append(len(x))
        if len(x) > limit:
            raise torch.OutOfMemoryError("no memory")
        return 2 * x

    def make(ours):
        cuts = {"4 rows": lambda inputs: {"x": inputs["x"][:4]}, "2 rows": lambda inputs: {"x": inputs["x"][:2]}}
        return kernels.Case("doubling", {}, dict, ours, plain, {}, 1, 1, cuts=cuts)

    inputs, limit = {"x": torch.ones(8)}, 2
    assert kernels.check_case(make(lambda x: 2 * x), inputs) == ("", "2 rows") and set(seen) == {8, 4, 2}
    assert kernels.check_case(make(lambda x: 3 * x), inputs)[0].startswith("AssertionError")
    limit = 0
    assert kernels.check_case(make(lambda x: 2 * x), inputs) == ("fp64 did not fit into memory", "nothing")


def test_other_blocks_of_attention(tmp_path):
    """As JSON, or a whole file of another commit; both are peers of the same run."""
    from nanovlm.kernels import attention

    (tmp_path / "table.json").write_text(json.dumps(attention.BLOCKS))
    ours = kernels.load_attention(tmp_path / "table.json")
    assert ours is not attention and ours.BLOCKS == attention.BLOCKS == read_table(json.loads(json.dumps(ours.BLOCKS)))
    (tmp_path / "before.py").write_text((ROOT / "kernels" / "attention.py").read_text())
    case = kernels.attention(kernels.torch.device("cpu"), *FAMILIES["attention"][2][0])
    inputs = case.inputs()
    for path in ("table.json", "before.py"):
        module = kernels.load_attention(tmp_path / path)
        assert case.of_module(module)(**inputs).equal(case.ours(**inputs)), path
        module.choose_blocks = None  # each has its own blocks
        case.ours(**inputs)
        with pytest.raises(TypeError):
            case.of_module(module)(**inputs)


LOST = """
    import time
    from benchmarks import gpu_report

    def test_before(): pass
    def test_loses_the_gpu(monkeypatch):
        gpu_report.is_cut_off = lambda: True
        assert False, "an illegal memory access was encountered"
    def test_after(device): assert gpu_report.is_cut_off() is False
    def test_hangs(): time.sleep(300)
"""


def test_a_process_that_lost_the_gpu_is_replaced_and_a_hang_is_known(tmp_path):
    (tmp_path / "test_lost.py").write_text(textwrap.dedent(LOST))
    (tmp_path / "conftest.py").write_text("import pytest\n@pytest.fixture\ndef device(): return 'cpu'")
    lines, report = tmp_path / "lines.jsonl", tmp_path / "report.xml"
    command = ["-m", "pytest", "-p", "benchmarks.gpu_report", "--lines", str(lines), "--junitxml", str(report)]
    command += ["-n", "1", "--dist", "worksteal", "--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    process = gpu.start(command, environment | {"PYTHONPATH": str(ROOT)}, subprocess.DEVNULL)
    end = time.monotonic() + 60
    while '"test_lost.py::test_hangs"' not in (lines.read_text() if lines.exists() else ""):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    process.send_signal(2)
    assert not gpu.wait(process, time.monotonic() + 120)
    told = summarize(lines)
    assert "test_lost.py: 1 failed, 1 not ended, 2 passed" in told
    assert "failed: test_lost.py::test_loses_the_gpu: " in told and "illegal memory access" in told
    assert "not ended: test_lost.py::test_hangs" in told
    assert "test_loses_the_gpu" in report.read_text()


def test_a_job_that_takes_too_long_or_fails_is_a_line(tmp_path):
    hang = ["-c", "import json, time; print(json.dumps({'a': 1}), flush=True); time.sleep(60)"]
    assert run_job(hang, dict(os.environ), time.monotonic() + 1) == [{"a": 1}, {"result": "stopped: it took too long"}]
    [line] = run_job(["-c", "raise ValueError('no such shape')"], dict(os.environ), time.monotonic() + 30)
    assert line["result"].startswith("failed: ") and "no such shape" in line["result"]


def test_missing_packages_come_from_carried_wheels(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "carried_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_thing.py", "answer = 42")
        for name, text in {
            "METADATA": "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.0\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }.items():
            wheel.writestr(f"carried_thing-1.0.dist-info/{name}", text)
    listed = tmp_path / "wheels.txt"
    listed.write_text("# a comment\ncarried-thing==1.0\npytest==1.0\nnot-carried==2.0\n")
    [folder] = install(tmp_path, listed)
    assert (Path(folder) / "carried_thing.py").exists()
    told = capsys.readouterr().out
    assert "not-carried is missing here, and no wheel was carried" in told and "pytest" not in told


def test_every_test_that_uses_a_gpu_is_run():
    """A file of which a test takes the fixture `device`, or that is marked, is in TESTS."""
    listed = {file for files, _ in TESTS.values() for file in files}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        takes = any(f.name.startswith("test") and any(a.arg == "device" for a in f.args.args) for f in functions)
        marked = any(ast.unparse(node) == "pytest.mark.gpu" for node in nodes if isinstance(node, ast.Attribute))
        if (takes or marked) and path.name != Path(__file__).name:
            assert str(path.relative_to(ROOT)) in listed, path


def test_carried_wheels_are_what_the_tests_here_use():
    """Versions in gpu_wheels.txt are those of constraints.txt, where that has them."""
    pins = [dict(read_pins(ROOT / name)) for name in ("constraints.txt", "benchmarks/gpu_wheels.txt")]
    assert len(pins[1]) >= 10 and {name: pins[0].get(name, version) for name, version in pins[1].items()} == pins[1]


def read_pins(path):
    for line in path.read_text().splitlines():
        name, is_pin, version = line.partition("==")
        if is_pin and not line.startswith("#"):
            yield name.lower().replace("_", "-"), version
