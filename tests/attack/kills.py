"""Runs that are killed, and disks that are full, at random moments: what goes on writes the same losses, bit for bit.

    python -m tests.attack.kills                     40 kills of one rank, 10 of two, 12 full disks; about 20 minutes
    python -m tests.attack.kills --kills 4 --ranks 0 --full 0 --seed 9

A kill is signal 9 to all processes of a run, a random time after its start. A full disk is a limit on the size of
files, of a random size from a random step on, under which the run ends with one sentence.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tests.test_train import comparable, metrics

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import dataclasses, os, resource, sys
sys.path.insert(0, {root!r})
import train
from nanovlm import cli
from nanovlm.config import EvalConfig, ParallelConfig
from tests.test_train import SMALL
config = dataclasses.replace(
    SMALL, run_dir={run_dir!r}, precision="fp32", eval=EvalConfig(), checkpoint_every=2,
    data=dataclasses.replace(SMALL.data, num_workers={workers}),
    optim=dataclasses.replace(SMALL.optim, micro_batches=2),
    parallel=ParallelConfig(strategy="fsdp" if {ranks} > 1 else "ddp"),
)
step = train.train_step
def train_step(state, *args):
    if state.step == {full_at}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
    return step(state, *args)
train.train_step = train_step
cli.run(lambda: train.main(config))
"""


@dataclass(frozen=True)
class KillsConfig:
    # Kills of runs on one rank, by turns without and with two workers.
    kills: int = 40
    # Kills of runs on two ranks.
    ranks: int = 10
    # Disks that are full.
    full: int = 12
    # Seed of the moments.
    seed: int = 0


def start(run_dir: Path, workers=0, ranks=1, full_at=-1, size=0) -> subprocess.Popen:
    """Start a run in processes of its own."""
    script = run_dir.parent / f"{run_dir.name}.py"
    text = RUN.format(root=str(ROOT), run_dir=str(run_dir), workers=workers, ranks=ranks, full_at=full_at, size=size)
    script.write_text(text)
    command = [sys.executable, str(script)]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    settings = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=pipe, stderr=pipe, text=True)


def finish(run_dir: Path, **options) -> tuple[list, float]:
    """Run to the end; return what must repeat, and the seconds that it took."""
    begin = time.monotonic()
    process = start(run_dir, **options)
    _out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-3000:]
    return comparable(metrics(run_dir)), time.monotonic() - begin


def family(pid: int) -> list[int]:
    """Return a process and all that it started, and they in turn: torchrun's ranks have process groups of their own."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(descendant for child in children for descendant in family(int(child)))]


def kill(rng: random.Random, run_dir: Path, seconds: float, **options) -> str:
    """Kill a run within the seconds that it would take; return when."""
    process, after = start(run_dir, **options), rng.uniform(0, seconds)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        for pid in family(process.pid):
            with contextlib.suppress(ProcessLookupError):  # it ended, or went with its parent
                os.kill(pid, signal.SIGKILL)
    process.communicate()
    return f"killed after {after:.2f} s"


def fill_disk(rng: random.Random, run_dir: Path) -> str:
    """Let a run meet a full disk; it must say so in one sentence."""
    full_at, size = rng.randrange(12), rng.choice((0, 100, 5000, 50_000, 200_000))
    process = start(run_dir, full_at=full_at, size=size)
    _out, error = process.communicate(timeout=600)
    assert "Traceback" not in error and process.returncode in (0, 2), error[-3000:]
    return f"files of at most {size} bytes from step {full_at} on, status {process.returncode}"


def main(config: KillsConfig) -> int:
    rng, wrong = random.Random(config.seed), 0
    jobs = [(kill, {"workers": 2 * (i % 2), "ranks": 1}) for i in range(config.kills)]
    jobs += [(kill, {"workers": 0, "ranks": 2})] * config.ranks
    jobs += [(fill_disk, {})] * config.full
    with tempfile.TemporaryDirectory() as folder:
        whole = {}
        for number, (attack, options) in enumerate(tqdm(jobs)):
            key = tuple(options.items())
            if key not in whole:
                whole[key] = finish(Path(folder) / f"whole{number}", **options)
            expected, seconds = whole[key]
            run_dir = Path(folder) / f"run{number}"
            what = attack(rng, run_dir, seconds, **options) if attack is kill else attack(rng, run_dir)
            found, _seconds = finish(run_dir, **options)
            if found != expected:
                wrong += 1
                print(f"job {number}, {options}: {what}: other losses", flush=True)
    print(f"{len(jobs)} runs were stopped, {wrong} went on with other losses")
    return int(wrong > 0)


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(KillsConfig, description=__doc__)))
