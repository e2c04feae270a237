"""What a server counts, in the text form that Prometheus reads."""

import resource
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Count:
    """A counter, one number for each combination of labels."""

    kind = "counter"

    def __init__(self, *labels: str):
        self.labels = labels
        self.values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, amount: float = 1, *values: str):
        self.values[values] = self.values.get(values, 0) + amount

    def lines(self, name: str):
        for values, amount in sorted(self.values.items()):
            yield f"{name}{_labels(zip(self.labels, values, strict=True))} {amount}"


class Gauge:
    """A number of now, which a function returns."""

    kind = "gauge"

    def __init__(self, read: Callable[[], float]):
        self.read = read

    def lines(self, name: str):
        yield f"{name} {self.read()}"


class Histogram:
    """Counts of values up to each bound, their number and sum."""

    kind = "histogram"

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float):
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str):
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f"{name}_bucket{_labels([('le', bound)])} {total}"
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {total}"


def _labels(pairs) -> str:
    shown = ",".join(f'{name}="{_escape(str(value))}"' for name, value in pairs)
    return f"{{{shown}}}" if shown else ""


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def exposition(metrics: dict[str, tuple[str, Count | Gauge | Histogram]]) -> str:
    """Write metrics, given as name -> (what it says, metric)."""
    lines = []
    for name, (about, metric) in metrics.items():
        lines += [f"# HELP {name} {about}", f"# TYPE {name} {metric.kind}", *metric.lines(name)]
    return "\n".join(lines) + "\n"


def resident_bytes() -> int:
    """Return the memory of this process; where the system does not tell, the most that it had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
