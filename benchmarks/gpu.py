"""The parts of benchmarks/gpu.sh: the tests, the kernels, the models, each within its minutes.

The standard library and torch suffice here. Whatever uses the GPU has a process of its own, which may hang, crash or
lose the GPU without harm to the others, and results are in the folder as soon as they are known.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / "benchmarks" / "carried"
KERNEL_TESTS = "tests/kernels/test_{}.py"
# Tests by what they are of: their files, and what part of the processors they get, as compiling takes them longest.
TESTS = {
    "attention": ([KERNEL_TESTS.format("attention"), KERNEL_TESTS.format("cache_attention")], 6),
    "grouped_gemm": ([KERNEL_TESTS.format("grouped_gemm")], 4),
    "dequant_matmul": ([KERNEL_TESTS.format("dequant_matmul"), KERNEL_TESTS.format("quantized_experts")], 3),
    "cross_entropy": ([KERNEL_TESTS.format("cross_entropy")], 1),
    "models": (
        [
            KERNEL_TESTS.format("register"),
            *("tests/test_gpu.py", "tests/model/test_vlm.py", "tests/model/test_quantized.py"),
        ],
        2,
    ),
}
TINY_TESTS = {"cross_entropy": "test_chunks and float32", "models": "same_bits or through_the_kernels and int8"}
LAST_S = 30  # for tests that are interrupted to write their report


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sh benchmarks/gpu.sh", description="The first minutes on a GPU.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("--minutes", type=float, help="8 or 9 minutes, as the part needs, where nothing is said")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few tests, interpreted without a GPU")
    given = parser.parse_args(args)
    part, minutes = PARTS[given.part]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell turns off for what runs in the background
    end = time.monotonic() + 60 * (given.minutes or minutes)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not given.tiny:
        parser.error("there is no GPU here; --tiny shows whether all of it runs")
    given.folder.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *install(CARRIED, ROOT / "benchmarks" / "gpu_wheels.txt"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TRITON_INTERPRET": "0" if has_gpu else "1",
    }
    machine = json.dumps(describe_machine())
    print(machine)
    (given.folder / "machine.json").write_text(machine + "\n")
    return part(given.folder.resolve(), end, given.tiny, environment)


def describe_machine() -> dict:
    """Say what is measured on what; the commit is that of the file carried/commit where git is not there to say it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty=+"]
    carried = CARRIED / "commit"
    if carried.exists():
        commit = carried.read_text().strip()
    else:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton") if is_installed(name)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    cores = len(os.sched_getaffinity(0))
    return {"commit": commit, "device": device, "cores": cores, "python": platform.python_version()} | versions


def install(carried: Path, listed: Path) -> list[str]:
    """Install the listed packages that are missing here from carried wheels; return the folders to import them from."""
    wheels = []
    for line in listed.read_text().splitlines():
        name = line.partition("==")[0].strip()
        if name and not name.startswith("#") and not is_installed(name):
            found = sorted(carried.glob(f"{name.replace('-', '_')}-*.whl"))[-1:]
            print(f"{name} is missing here" + (f": {found[0].name}" if found else ", and no wheel was carried"))
            wheels += found
    if not wheels:
        return []
    folder = tempfile.mkdtemp(prefix="carried-")  # site-packages may be read-only
    options = ["-q", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target", folder]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels])
    return [folder]


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def start(command: list, environment: dict, log) -> subprocess.Popen:
    """Start Python in a process group of its own, so that the processes that it starts end with it.

    It can be interrupted, which a shell's background jobs and all that they start ignore otherwise.
    """
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        process_group=0, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait(process: subprocess.Popen, end: float) -> bool:
    """Wait for a process until `end`; return whether it was there, in which case all of its group is ended."""
    try:
        process.wait(max(0, end - time.monotonic()))
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


# --- the tests -------------------------------------------------------------------------------------------------


def run_tests(folder: Path, end: float, tiny: bool, environment: dict) -> int:
    """Write FAMILY.xml and tests.jsonl, which have a line of each test as it ends, and tests.txt with what failed."""
    lines, logs, running = folder / "tests.jsonl", {}, {}
    cores, total = len(os.sched_getaffinity(0)), sum(part for _, part in TESTS.values())
    for family, (files, part) in TESTS.items():
        if tiny and family not in TINY_TESTS:
            continue
        workers = 1 if tiny else max(1, round(cores * part / total))
        command = ["-m", "pytest", "-q", "--tb=short", "-p", "benchmarks.gpu_report", "-p", "no:cacheprovider"]
        command += ["--lines", lines, "--junitxml", folder / f"{family}.xml", "-n", workers, "--dist", "worksteal"]
        command += ["--max-worker-restart", 1000, "--continue-on-collection-errors", *files]
        command += ["--only-gpu"] if family == "models" else []
        command += ["-k", TINY_TESTS[family]] if tiny else []
        logs[family] = tempfile.TemporaryFile("w+")
        running[family] = start(command, environment | {"OMP_NUM_THREADS": "1"}, logs[family])
    while any(process.poll() is None for process in running.values()) and time.monotonic() < end:
        time.sleep(0.2)
    for process in running.values():
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    end, failed = time.monotonic() + LAST_S, False
    with open(folder / "tests.txt", "w") as out:
        for family, process in running.items():
            stopped = wait(process, end)
            logs[family].seek(0)
            out.write(f"==== {family}: {'killed' if stopped else f'status {process.returncode}'} ====\n")
            out.writelines(logs[family].readlines()[-400:])
            failed |= stopped or process.returncode != 0
    print(summarize(lines))
    return int(failed)


def summarize(path: Path) -> str:
    """Count outcomes by file, and name the tests that failed or did not end."""
    outcomes, reasons = {}, {}
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if outcomes.get(line["test"]) != "failed":  # a test that failed may still be torn down
            outcomes[line["test"]] = line["outcome"].replace("begun", "not ended")
            reasons[line["test"]] = line.get("reason", "").strip().partition("\n")[0]
    counts = {}
    for test, outcome in outcomes.items():
        file = counts.setdefault(test.partition("::")[0], {})
        file[outcome] = file.get(outcome, 0) + 1
    text = [f"{file}: " + ", ".join(f"{x[name]} {name}" for name in sorted(x)) for file, x in counts.items()]
    bad = [test for test, outcome in outcomes.items() if outcome in ("failed", "not ended")]
    text += [f"{outcomes[test]}: {test}: {reasons[test][:160]}" for test in bad[:60]]
    return "\n".join([*text, *([f"and {len(bad) - 60} more"] if len(bad) > 60 else [])])


# --- the kernels -----------------------------------------------------------------------------------------------


def time_kernels(folder: Path, end: float, tiny: bool, environment: dict) -> int:
    """Write kernels.jsonl; carried attention_before.py or .json has the blocks to compare with."""
    before = sorted(CARRIED.glob("attention_before.*"))[:1]
    minutes = (end - time.monotonic() - 75) / 60  # the last shape may take a minute longer
    config = {"minutes": max(minutes, 1), "tiny": tiny, "out": str(folder / "kernels.jsonl")}
    config |= {"blocks": str(before[0])} if before else {}
    process = start(["benchmarks/kernels.py", "--json", json.dumps(config)], environment, None)
    return int(wait(process, end) or process.returncode != 0)


# --- the models ------------------------------------------------------------------------------------------------


def list_jobs(folder: Path, tiny: bool) -> dict[str, list]:
    """Return the commands to run in order, by name, the most telling first."""

    def train(shape, backends, compile=False, rows=4, row_length=4096, **more):
        job = {"shape": shape, "rows": rows, "row_length": row_length, "precision": "fp32" if tiny else "bf16"}
        job |= {"way": "ours", "parallel": {"compile": compile}, "backends": backends} | more
        config = {"threads": 1, "repeats": 1 if tiny else 10, "only": json.dumps(job)}
        return ["benchmarks/train.py", "--json", json.dumps(config)]

    def decode(shape, backends, **more):
        return ["benchmarks/decode.py", "--json", json.dumps({"shapes": [shape], "backends": [backends]} | more)]

    if tiny:
        few = {"batch_sizes": [2], "text_tokens": 5, "new_tokens": 2, "repeats": 1}
        profile = str(folder / "profile_tiny.txt")
        return {
            "train tiny, kernels": train("tiny", "kernels", rows=1, row_length=64, profile=profile),
            "decode tiny, kernels": decode("tiny", "kernels", **few),
        }
    jobs = {}
    for shape in ("460m", "222m"):
        for compile in (False, True):
            for backends in ("kernels", "torch"):
                words = f"train {shape}, {backends}" + (", compiled" if compile else "")
                jobs[words] = train(shape, backends, compile)
        for backends in ("kernels", "torch"):
            jobs[f"decode {shape}, {backends}"] = decode(shape, backends)
    jobs["train 460m, kernels, compiled, 16 rows"] = train("460m", "kernels", True, rows=16)
    for backends in ("kernels", "torch"):
        profile = str(folder / f"profile_460m_{backends}.txt")
        jobs[f"profile 460m, {backends}"] = train("460m", backends, profile=profile)
    return jobs


def time_models(folder: Path, end: float, tiny: bool, environment: dict) -> int:
    """Write models.jsonl, with the lines of benchmarks/train.py and decode.py, and profiles."""
    failed = False
    for name, command in list_jobs(folder, tiny).items():
        if end - time.monotonic() < 20:
            lines = [{"result": "left out: no time was left"}]
        else:
            lines = run_job(command, environment, min(end, time.monotonic() + 150))
        failed |= any("result" in line for line in lines)
        with open(folder / "models.jsonl", "a") as file:
            for line in lines:
                text = json.dumps({"job": name} | line)
                file.write(text + "\n")
                print(text)
    return int(failed)


def run_job(command: list, environment: dict, end: float) -> list[dict]:
    """Return the lines of JSON that a command prints, and why it failed where it did."""
    with tempfile.TemporaryFile("w+") as log:
        process = start(command, environment, log)
        stopped = wait(process, end)
        log.seek(0)
        printed = log.read().splitlines()
    lines = [json.loads(text) for text in printed if text.startswith("{")]
    if stopped:
        return [*lines, {"result": "stopped: it took too long"}]
    if process.returncode:
        return [*lines, {"result": f"failed: {' '.join(printed[-2:])[-600:]}"}]
    return lines


PARTS = {"correctness": (run_tests, 8), "kernels": (time_kernels, 9), "models": (time_models, 8)}


if __name__ == "__main__":
    sys.exit(main())
