"""Read the SASS of a cubin, which is what a GPU runs: instructions with control codes, loops, kinds, programs an SM.

    for span in find_loops(code := read_sass(cubin)): print(count_kinds(follow(code, span)))

nvdisasm of Triton's wheel prints every instruction with its 128 bits. From sm_70 on ptxas, and not the GPU, says how
long an instruction waits (Jia et al. 2018, arXiv 1804.06826): of the upper 64 bits

    41..44 stall, clocks until the warp's next instruction     52..57 waits, a mask of scoreboards to be released before
    46..48 writes, the scoreboard released with the result     49..51 reads, the one released when operands are read
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Device(NamedTuple):
    """What a multiprocessor (SM) has; CUDA Programming Guide, technical specifications by compute capability."""

    shared: int  # bytes of an SM, of which every program takes 1 KiB more than it asks for
    most_shared: int  # bytes that a program can have
    warps: int
    programs: int
    processors: int  # SMs of one GPU of this kind
    l2_cache: int  # bytes


DEVICES = {
    80: Device(164 * 1024, 163 * 1024, 64, 32, 108, 40 * 2**20),  # A100
    86: Device(100 * 1024, 99 * 1024, 48, 16, 84, 6 * 2**20),  # RTX A6000
    89: Device(100 * 1024, 99 * 1024, 48, 24, 142, 96 * 2**20),  # L40S
    90: Device(228 * 1024, 227 * 1024, 64, 32, 132, 50 * 2**20),  # H100
    942: Device(64 * 1024, 64 * 1024, 32, 32, 304, 4 * 2**20),  # MI300, which runs no SASS
    120: Device(100 * 1024, 99 * 1024, 48, 24, 188, 128 * 2**20),  # RTX PRO 6000
}
REGISTERS = 65536  # of an SM, in four equal parts

# What an instruction is for, by the first part of its name. "multiply" runs in the pipe of "float".
KINDS = {
    "tensor": "HGMMA IGMMA QGMMA HMMA IMMA QMMA OMMA",
    "special": "MUFU I2F F2I F2F FRND I2I",
    "float": "FFMA FFMA2 FMUL FMUL2 FADD FADD2 HFMA2 HADD2 HMUL2 FFMA32I FADD32I FMUL32I",
    "multiply": "IMAD IMUL IDP",
    "logic": "FMNMX FMNMX3 FSETP FSEL FSET IADD3 IADD LOP3 LOP SHF SHL SHR ISETP SEL LEA PRMT VIADD IABS IMNMX VIMNMX "
    "VIMNMX3 VIADDMNMX VHMNMX PLOP3 P2R R2P MOV F2FP I2FP SGXT BMSK FCHK HMNMX2 HSETP2 HSET2 VOTE VOTEU FLO POPC "
    "VABSDIFF FSWZADD ISCADD PSETP R2UR",
    "shared": "LDS STS LDSM STSM ATOMS",
    "shuffle": "SHFL MATCH REDUX",
    "global": "LDG LD LDGSTS STG ST RED REDG ATOM ATOMG",
    "spill": "LDL STL",
    "copy": "UTMALDG UTMASTG UTMAREDG UBLKCP",
    "constant": "S2R S2UR CS2R LDC LDCU ULDC LEPC B2R I2UR",
    "control": "BAR MEMBAR FENCE DEPBAR LDGDEPBAR ARRIVES SYNCS WARPSYNC BSSY BSYNC NOP ELECT WARPGROUP WARPGROUPSET "
    "BRA EXIT CCTL ERRBAR BREAK YIELD CALL RET NANOSLEEP USETMAXREG UTMACMDFLUSH UTMACCTL UTMAPF BRX BPT KILL RPCMOV "
    "UCGABAR_ARV UCGABAR_WAIT ENDCOLLECTIVE PREEXIT ACQBULK BMOV",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


@dataclass
class Instruction:
    address: int  # bytes
    text: str
    guard: str = ""  # the predicate under which it is done, as @!P0
    stall: int = 1
    writes: int = 7  # 7: none
    reads: int = 7
    waits: int = 0
    target: int | None = None  # the address that a branch goes to

    def __post_init__(self):
        self.name = self.text.split()[0].rstrip(",")
        self.root = self.name.split(".")[0]
        is_uniform = self.root.startswith("U")  # for all lanes of a warp at once
        self.kind = KIND_OF.get(self.root) or ("uniform" if is_uniform else "unknown")


class Span(NamedTuple):
    first: int
    last: int


LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@\S+)\s+)?(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
UPPER = re.compile(r"^\s*/\* (0x[0-9a-f]{16}) \*/")
LABEL = re.compile(r"^(\.L_x_\d+):")


def read_sass(cubin: bytes) -> list[Instruction]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "nvdisasm", "-hex", "-c", file.name]
        return parse_sass(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def parse_sass(text: str) -> list[Instruction]:
    code, labels, new = [], {}, []
    for line in text.splitlines():
        if found := LABEL.match(line):
            new.append(found[1])
        elif found := LINE.search(line):
            code.append(Instruction(int(found[1], 16), found[3], found[2] or ""))
            labels |= dict.fromkeys(new, code[-1].address)
            new = []
        elif (found := UPPER.match(line)) and code:
            bits, i = int(found[1], 16), code[-1]
            i.stall, i.writes, i.reads, i.waits = bits >> 41 & 15, bits >> 46 & 7, bits >> 49 & 7, bits >> 52 & 63
    for i in code:
        if found := re.search(r"`\((\.L_x_\d+)\)", i.text):
            i.target = labels.get(found[1])
    return code


def find_loops(code: list[Instruction], least: int = 8) -> list[Span]:
    """Return the innermost loops, in order: what a backward branch jumps over, if no other loop is in it.

    A loop of fewer than `least` instructions only waits; one branch to itself is behind the end of every program.
    """
    index = {i.address: n for n, i in enumerate(code)}
    ends = {}
    for n, i in enumerate(code):
        if i.root == "BRA" and i.target in index and n - index[i.target] >= least - 1:
            ends[index[i.target]] = n  # of two branches to one instruction, the later one
    spans = [Span(*span) for span in sorted(ends.items())]
    return [a for a in spans if not any(b != a and a.first <= b.first and b.last <= a.last for b in spans)]


def find_repeated(code: list[Instruction]) -> set[int]:
    """Return the indices of instructions from which branches lead back to them: those in loops, outer ones too."""
    index = {i.address: n for n, i in enumerate(code)}
    starts = {0} | {n + 1 for n, i in enumerate(code) if i.root in ("BRA", "EXIT", "BRX", "RET")}
    starts = sorted((starts | {index[i.target] for i in code if i.target in index}) & set(range(len(code))))
    follows = {}  # from the first instruction of a block to those that can come next
    for first, end in zip(starts, [*starts[1:], len(code)], strict=True):
        i = code[end - 1]
        goes_on = not (i.root in ("BRA", "EXIT", "RET") and not i.guard and not re.search(r"BRA\S* !?U?P\d", i.text))
        next_ones = [end] if goes_on and end < len(code) else []
        follows[first] = (end, next_ones + ([index[i.target]] if i.root == "BRA" and i.target in index else []))
    repeated = set()
    for first in starts:
        seen, rest = set(), list(follows[first][1])
        while rest and first not in seen:
            if (block := rest.pop()) not in seen:
                seen.add(block)
                rest += follows[block][1]
        if first in seen and not (code[first].root == "BRA" and code[first].target == code[first].address):
            repeated |= set(range(first, follows[first][0]))
    return repeated


def follow(code: list[Instruction], span: Span, rare: int = 60) -> list[Instruction]:
    """Return the path of an ordinary iteration: it jumps over more than `rare` instructions where it can.

    What is jumped over is what few iterations do, as the end of a tile in a loop over all tiles.
    """
    index = {i.address: n for n, i in enumerate(code)}
    path, n = [], span.first
    while n <= span.last:
        i = code[n]
        path.append(i)
        to = index.get(i.target, -1) if i.root == "BRA" else -1
        n = to if n < to <= span.last and (not i.guard or to - n > rare) else n + 1
    return path


def count_kinds(code: list[Instruction]) -> Counter:
    return Counter(i.kind for i in code)


def count_programs(registers: int, warps: int, shared: int, device: Device) -> int:
    """Return how many programs an SM holds at a time, given registers a thread, and bytes of shared memory."""
    of_warp = (registers * 32 + 255) // 256 * 256  # registers are given to a warp in units of 256
    by_registers = REGISTERS // 4 // of_warp * 4 // warps if registers else device.programs
    return min(by_registers, device.shared // (shared + 1024), device.warps // warps, device.programs)
