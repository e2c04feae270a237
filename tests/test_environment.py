"""What a run computes with follows from the machine by rule."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from nanovlm import environment

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "capability", "precision"),
    [
        ("fpu avx2 avx512f avx512_bf16", "AVX512", "bf16"),
        ("fpu avx2 avx512f amx_bf16", "AVX512", "bf16"),
        ("fpu avx2 avx512f", "AVX512", "fp32"),
        ("fpu avx2", "AVX2", "fp32"),
        ("fpu avx2 avx512_bf16", "AVX2", "fp32"),  # torch was told to leave them
        ("", "DEFAULT", "fp32"),  # another system, or another make
    ],
)
def test_bf16_is_chosen_where_the_processor_multiplies_it(flags, capability, precision, monkeypatch):
    monkeypatch.setattr(environment, "processor_field", {"flags": flags}.__getitem__)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert environment.choose_precision(CPU) == precision
    assert environment.choose_precision(torch.device("cuda")) == "bf16"


def test_threads_are_the_physical_cores_shared_by_ranks(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(environment, "count_cores", lambda: 6)
    assert environment.choose_threads(CPU) == 6
    assert environment.choose_threads(torch.device("cuda")) == 1
    for ranks, threads in ((1, 6), (4, 1), (8, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert environment.choose_threads(CPU) == threads


def test_two_processors_of_a_core_are_one_and_a_container_may_have_fewer(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _pid: {0, 1, 2, 3, 9}, raising=False)
    files = {
        f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 2},{i % 2 + 2}\n" for i in range(4)
    }

    def path(name):
        return tmp_path / name.lstrip("/")

    def write(name, text):
        path(name).parent.mkdir(parents=True, exist_ok=True)
        path(name).write_text(text)

    for name, text in files.items():
        write(name, text)
    monkeypatch.setattr(environment, "Path", path)
    assert environment.count_cores() == 3  # 0 and 2, 1 and 3, and 9, of which the system says nothing
    for limit, cores in (("200000 100000\n", 2), ("max 100000\n", 3), ("50000 100000", 1), ("900000 100000", 3)):
        write("/sys/fs/cgroup/cpu.max", limit)
        assert environment.count_cores() == cores
    path("/sys/fs/cgroup/cpu.max").unlink()
    write("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")  # the older control groups
    for limit, cores in (("200000\n", 2), ("-1\n", 3)):
        write("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", limit)
        assert environment.count_cores() == cores


def test_fields_of_the_processor(tmp_path, monkeypatch):
    text = tmp_path / "cpuinfo"
    monkeypatch.setattr(environment, "Path", lambda name: text)
    assert environment.processor_field("flags") == ""  # another system has no such file
    text.write_text("processor\t: 0\nmodel name\t: A: B\nvmx flags\t: x\nflags\t\t: fpu avx2\n\nflags\t\t: none\n")
    assert environment.processor_field("flags") == "fpu avx2"
    assert environment.processor_field("model name") == environment.device_name(CPU) == "A: B"
    text.write_text("processor : 0\n")
    assert environment.processor_field("model name") == "" and environment.device_name(CPU)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
def test_memory_that_was_freed_is_used_again():
    """Steps after the first take few new pages from the system."""
    code = """
import resource, sys, torch
from nanovlm import environment
if sys.argv[1] == "keep":
    environment.keep_freed_memory()
layers = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)))
def step():
    layers(torch.ones(4096, 256)).square().mean().backward()
    layers.zero_grad()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def count_faults(word):
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUN", "LD_"))
        }
        ended = subprocess.run([sys.executable, "-c", code, word], env=env, capture_output=True, text=True, check=True)
        return int(ended.stdout)

    assert 2 * count_faults("keep") < count_faults("leave")


def test_the_commit_is_of_this_project_alone(tmp_path, monkeypatch):
    """Installed into somebody else's repository, the project does not take that one's commit for its own."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "inside").mkdir()
    (tmp_path / "a").write_text("a")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    monkeypatch.setattr(environment.cli, "PROJECT", tmp_path.resolve())
    assert len(environment.git_commit()) == 40
    monkeypatch.setattr(environment.cli, "PROJECT", tmp_path.resolve() / "inside")
    assert environment.git_commit() is None
