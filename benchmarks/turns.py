"""Two checkouts do the same work by turns, so that a machine that others slow down does it to both alike.

A benchmark of it is a script that main() starts twice, with `--worker FOLDER`: in each, `work` measures the code of the
checkout in that folder whenever the other side asks.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2


def compare(script: str, options: list[str], other: str, repeats: int) -> list[tuple[dict, dict]]:
    """Run a script's workers for this checkout and the one in the folder `other`; return what each turn measured.

    WARM_UP turns, in which memory and caches fill, come before the `repeats` that count. Exits where a worker fails.
    """
    commands = {tree: [sys.executable, script, "--worker", tree, *options] for tree in (str(ROOT), other)}
    return [tuple(turn.values()) for turn in alternate(commands, [""] * (WARM_UP + repeats))]


def alternate(commands: dict[Hashable, list[str]], lines: Sequence[str]) -> list[dict]:
    """Start workers by name and ask all of them each line, one after the other; return what each turn measured.

    A worker is started when it is first asked, so that one loads at a time. Exits where a worker fails.
    """
    workers, turns = {}, []
    for line in lines:
        turns.append({})
        for name, command in commands.items():
            if name not in workers:
                workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            turns[-1][name] = _ask(workers[name], line)
    for worker in workers.values():
        worker.communicate()
    return turns


def work(measure: Callable[[], dict]):
    """Answer each line of standard input with what `measure` returns, as a line of JSON."""
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


def summarize(turns: list[tuple[dict, dict]], name: str) -> dict:
    """Return the medians of a measured value here and in the other checkout, and of the ratio of neighbouring turns."""
    pairs = [(ours[name], theirs[name]) for ours, theirs in turns[WARM_UP:]]
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    return {
        name: round(statistics.median(ours for ours, _ in pairs), 4),
        f"{name}_before": round(statistics.median(theirs for _, theirs in pairs), 4),
        "ratio": round(statistics.median(ratios), 3),
        "least": round(ratios[0], 3),
        "most": round(ratios[-1], 3),
    }


@contextlib.contextmanager
def checkout(commit: str):
    """Yield a temporary folder with the files of a commit, and its full name. Exits if there is no such commit."""
    found = subprocess.run(["git", "-C", ROOT, "rev-parse", f"{commit}^{{commit}}"], capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"error: this repository has no commit {commit}: --against takes one of git log")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", folder, commit], check=True)
        try:
            yield folder, found.stdout.strip()
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder], check=True)


def _ask(worker: subprocess.Popen, line: str) -> dict:
    worker.stdin.write(f"{line}\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        sys.exit(f"error: {' '.join(worker.args)} ended")
    return json.loads(answer)
