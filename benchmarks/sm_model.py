"""Estimate how long a loop of SASS takes on one multiprocessor (SM): a simulator, for where there is no GPU to measure.

    clocks, busy = simulate(body, warps, programs, capability)        busy["tensor"] / clocks: what the tensor cores do

An SM has four equal parts, and the model runs the warps of one of them. A warp issues its instructions in order, one a
clock and part; it waits for the stalls and scoreboards that ptxas wrote into the instructions, for barriers, copies and
units in use. A unit is held by an instruction of a warp for so many clocks:

    tensor    wgmma is a queue of two: its multiplications, or 128 bytes a clock of the operands in shared memory,
              whichever takes longer; mma.sync at 62 % of sm_90's rate, as measured (Luo et al. 2024, arXiv 2402.13499)
    special   exp2, log2, conversions: 8        float: 1, on sm_80 2        multiply, logic, uniform: 2
    shared    bytes / 128 of the SM, four parts together; a register from lane to lane counts as 128 bytes
    L2        40 bytes a clock and SM, as large matrix products reach, after `latency` clocks

Throughputs of instructions are those of the CUDA Programming Guide. Not in the model: bank conflicts, fetching of
instructions, banks of registers, clocks that sink under load, TMA. What it says of sm_90 was compared with published
times of an H100 at 1.70 GHz (2026-11-28): torch's flex_attention, forward, head 128: -1 to +4 %; Triton's tutorial 06,
head 128: +8 to +13 %; the structure of FlashAttention-3: +1 to +5 %; small tiles of 4 warps: up to +50 %. No backward
pass was compared, and no other GPU: there only ratios above 1.5 mean anything.
"""

import re
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from functools import cache

from tests.kernels.sass import Instruction

# Operations a clock of an SM's tensor cores in 16 bits, and bytes a clock and SM of device memory: data sheets of
# A100 80 GB, RTX A6000, L40S, H100 SXM (989 TFLOP/s and 3.35 TB/s at 1.83 and 1.755 GHz) and RTX PRO 6000.
TENSOR = {80: 2048, 86: 1024, 89: 1024, 90: 4096, 120: 1024}
BANDWIDTH = {80: 13.4, 86: 5.1, 89: 2.4, 90: 14.46, 120: 3.8}
L2_BANDWIDTH = 40.0
L2_LATENCY, MEMORY_LATENCY = 280.0, 750.0
# Clocks until a result is there, from when its unit takes the instruction.
LATENCY = {
    "special": 22,
    "shared": 29,
    "shuffle": 24,
    "constant": 30,
    "operands": 14,
    "wgmma": 18,
    "mma": 33,
    "copy": 6,
}


@dataclass(frozen=True)
class Cost:
    clocks: float  # for which a warp's instruction holds its unit
    unit: str = ""
    tensor: float = 0.0  # clocks of the tensor cores, without what they wait for operands
    shared: float = 0.0  # clocks of the SM's shared memory
    num_bytes: int = 0  # from or to L2, for a warp


@cache
def price(name: str, text: str, kind: str, capability: int) -> Cost:
    root = name.split(".")[0]
    width = 16 if ".128" in name else 8 if ".64" in name else 4  # bytes a lane
    if root.endswith("GMMA"):
        M, N, K = map(int, re.search(r"(\d+)x(\d+)x(\d+)", name).groups())
        size = 4 if ".TF32" in name else 2 if root == "HGMMA" else 1  # bytes
        has_a_in_registers = re.match(r"\S+ R\d+, R\d+, gdesc", text)
        shared = (N * K + (0 if has_a_in_registers else M * K)) * size / 128
        tensor = M * N * K * size / TENSOR[capability]
        return Cost(max(tensor, shared), "tensor", tensor, shared)
    if kind == "tensor":
        K = {"16816": 16, "1688": 8, "16832": 32}[re.search(r"16832|16816|1688", name)[0]]
        tensor = 2 * 16 * 8 * K * 4 / TENSOR[capability] * (0.5 if root == "IMMA" else 1)
        return Cost(tensor / 0.62 if capability == 90 else tensor, "tensor", tensor)
    if kind == "shared":
        if "RZ, [RZ]" in text:  # does nothing
            return Cost(1)
        number = int(name[-1]) if name[-1].isdigit() else 1
        shared = number if root in ("LDSM", "STSM") else width / 4
        return Cost(4 * shared, "memory", shared=shared)
    if kind == "shuffle":
        return Cost(4, "memory", shared=1)
    if kind in ("global", "spill"):
        size = 1 if re.search(r"\.[US]8", name) else 2 if re.search(r"\.([US]|BF)16", name) else width
        return Cost(max(size, 4), "memory", shared=size / 4 if root == "LDGSTS" else 0, num_bytes=32 * size)
    if kind == "float":
        return Cost(2 if capability == 80 else 1, "float")
    clocks = {"special": 8, "control": 1, "constant": 2}.get(kind, 2)
    units = {"special": "special", "multiply": "float", "uniform": "uniform", "control": "", "constant": ""}
    return Cost(clocks, units.get(kind, "logic"))


@dataclass
class Warp:
    program: int
    ready: float  # the clock from which it may issue
    position: int = 0
    iteration: int = 0
    boards: dict = field(default_factory=lambda: defaultdict(list))  # {scoreboard: clocks of its releases}
    copies: deque = field(default_factory=deque)  # when each group of cp.async is there
    open_copy: float = 0.0
    products: deque = field(default_factory=deque)  # when each group of wgmma is done
    queue: deque = field(default_factory=deque)  # when each wgmma that was issued begins
    waits_at: tuple | None = None  # a barrier
    ends: list = field(default_factory=list)  # of iterations


class Part:
    """A fourth of an SM: its warps, and until when its units are in use."""

    def __init__(self, body: list[Instruction], costs: list[Cost], warps: int, programs: int, latency, near):
        self.body, self.costs, self.latency, self.near = body, costs, latency, near
        self.per_program = max(1, warps // 4)
        num_programs = max(1, programs * warps // 4 // self.per_program)
        self.warps = [Warp(p, 137.0 * p) for p in range(num_programs) for _ in range(self.per_program)]
        self.free = defaultdict(float)
        self.busy = Counter()
        self.barriers = defaultdict(list)

    def earliest(self, w: Warp) -> float:
        """Return the clock from which a warp could issue its next instruction."""
        i, cost = self.body[w.position], self.costs[w.position]
        t = w.ready
        for board in range(6):
            if i.waits >> board & 1 and w.boards[board]:
                t = max(t, *w.boards[board])
        if i.root == "DEPBAR" and "SB0" in i.text:
            allowed = int(i.text.split(",")[1].split()[0], 16) if "," in i.text else 0
            if len(w.copies) > allowed:
                t = max(t, sorted(w.copies)[-allowed - 1] + LATENCY["copy"])
        elif i.root == "WARPGROUP" and "DEPBAR" in i.name:
            allowed = int(i.text.split(",")[1], 16)
            if len(w.products) > allowed:
                t = max(t, w.products[-allowed - 1] + LATENCY["wgmma"])
        elif i.root.endswith("GMMA"):
            while w.queue and w.queue[0] <= t:
                w.queue.popleft()
            if len(w.queue) >= 2:
                t = max(t, w.queue[-2])
        # Behind special functions and memory instructions can wait.
        queue = {"": None, "special": 16, "memory": 32, "tensor": None if i.root.endswith("GMMA") else 0}
        ahead = queue.get(cost.unit, 0)
        return t if ahead is None else max(t, self.free[cost.unit] - ahead)

    def take(self, unit: str, now: float, clocks: float) -> float:
        """Use a unit from when it is free; return when that begins."""
        start = max(now, self.free[unit])
        self.free[unit] = start + clocks
        self.busy[unit] += clocks
        return start

    def issue(self, w: Warp, now: float):
        i, cost = self.body[w.position], self.costs[w.position]
        self.busy["issue"] += 1
        skipped = i.guard.startswith("@!PT")
        done = now + 4 if skipped else self.work(i, cost, w, now)
        w.ready = now + (24 if i.root == "MEMBAR" else max(1, i.stall))
        read = done if i.kind == "tensor" else min(done, now + LATENCY["operands"])
        for board, released in ((i.writes, done), (i.reads, read)):
            if board < 6 and not skipped:
                w.boards[board] = [t for t in w.boards[board] if t > now] + [released]
        if i.root == "BAR" and (".SYNC" in i.name or ".RED" in i.name):
            self.meet(i, w, now)
        w.position += 1
        if w.position == len(self.body):
            w.position, w.iteration = 0, w.iteration + 1
            w.ends.append(now)

    def work(self, i: Instruction, cost: Cost, w: Warp, now: float) -> float:
        """Do an instruction; return when its result is there, or of wgmma when it has begun."""
        if i.root.endswith("GMMA"):
            start = self.take("queue", now + 8, cost.clocks)
            self.busy["tensor"] += cost.tensor
            self.busy["shared"] += cost.shared
            w.queue.append(start)
            if "gsb0" in i.text:
                w.products.append(start + cost.clocks)
            return start
        if i.kind == "tensor":
            self.take("tensor", now, cost.clocks)
            self.busy["tensor"] += cost.tensor - cost.clocks
            return now + LATENCY["mma"]
        if cost.unit == "special":
            return self.take("special", now, cost.clocks) + LATENCY["special"]
        if cost.unit == "memory":
            start = self.take("memory", now, cost.clocks)
            self.busy["shared"] += 4 * cost.shared
            if i.kind == "spill":  # answered by the first cache
                return start + LATENCY["shared"] + cost.clocks
            if i.kind != "global":
                return start + LATENCY[i.kind] + cost.clocks
            sent = 4 * cost.num_bytes / L2_BANDWIDTH
            arrives = self.take("L2", start, sent) + sent
            arrives += self.near if self.near and ".EF" not in i.name else self.latency
            if i.root == "LDGSTS":
                w.open_copy = max(w.open_copy, arrives)
            return arrives if i.root in ("LDG", "LD", "ATOM", "ATOMG") else start + LATENCY["operands"]
        if cost.unit:
            self.take(cost.unit, now, cost.clocks)
            return now + (14 if i.root == "R2UR" else 6)
        if i.root == "LDGDEPBAR":
            w.copies.append(w.open_copy)
            w.open_copy = 0.0
        elif i.root == "DEPBAR" and "SB0" in i.text:
            w.copies = deque(t for t in w.copies if t > now)
        elif i.root == "WARPGROUP" and "DEPBAR" in i.name:
            while w.products and w.products[0] + LATENCY["wgmma"] <= now:
                w.products.popleft()
        return now + (LATENCY["constant"] if i.kind == "constant" else 4)

    def meet(self, i: Instruction, w: Warp, now: float):
        """Wait at a barrier, BAR.SYNC number[, threads], until all warps of this part are there."""
        operands = [x.strip() for x in i.text.partition(" ")[2].split(",")]
        number_of_threads = operands[1] if len(operands) > 1 else ""
        is_number = re.fullmatch(r"0x[0-9a-f]+", number_of_threads)
        expected = max(1, int(number_of_threads, 16) // 128) if is_number else self.per_program
        w.waits_at = w.program, operands[0]
        there = self.barriers[w.waits_at]
        there.append(w)
        if len(there) >= expected:
            del self.barriers[w.waits_at]
            for other in there:
                other.waits_at, other.ready = None, max(other.ready, now + 12)


def simulate(
    body: list[Instruction], warps: int, programs: int, capability: int = 90, iterations: int = 24,
    latency: float = L2_LATENCY, near: float = 0.0,
) -> tuple[float, Counter]:  # fmt: skip
    """Run a loop; return the clocks of an iteration of one program, and those for which it keeps each unit busy.

    `warps` of one program; `programs` at a time on the SM, whose iterations overlap, so that the clocks are those of
    all divided by their number. `latency` of loads from device memory or L2; `near` of those that are not marked as a
    stream (evict_first). Busy are tensor, special, float, logic, uniform, memory, issue; shared, of the SM; L2.
    """
    costs = [price(i.name, i.text, i.kind, capability) for i in body]
    part, now, last = Part(body, costs, warps, programs, latency, near), 0.0, None
    while any(w.iteration < iterations for w in part.warps):
        times = [(part.earliest(w), n) for n, w in enumerate(part.warps) if w.waits_at is None]
        if not times:
            raise ValueError("all warps wait at a barrier: this is no loop that a program goes through as a whole")
        now = max(now, min(times)[0])
        ready = [part.warps[n] for t, n in times if t <= now]
        chosen = last if last in ready else ready[0]
        if chosen.iteration > 1 + min(w.iteration for w in ready):  # nobody runs away from the others
            chosen = min(ready, key=lambda w: w.iteration)
        part.issue(chosen, now)
        now, last = now + 1, chosen
    # What ends after all warps have had a third of their iterations. A program of two warps is in half of the parts.
    begin = max(w.ends[iterations // 3] for w in part.warps)
    ended = sum(t > begin for w in part.warps for t in w.ends) / part.per_program
    total = sum(len(w.ends) for w in part.warps) / part.per_program
    share = min(1, warps / 4)
    return share * (now - begin) / ended, Counter({unit: share * n / total for unit, n in part.busy.items()})
