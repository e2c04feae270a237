"""Loops, kinds, control codes and programs an SM are found in listings whose answers are known."""

import subprocess

import pytest

pytest.importorskip("triton")
from tests.kernels.sass import (
    DEVICES,
    TOOLS,
    Span,
    count_kinds,
    count_programs,
    find_loops,
    find_repeated,
    follow,
    parse_sass,
    read_sass,
)

# A loop over .L_x_0 around another over .L_x_1, and what comes before, after, and behind the end.
LISTING = """
STL [R1], R4
.L_x_0:
LDL R4, [R1]
FADD R4, R4, 1
.L_x_1:
LDL R5, [R1+0x4]
LDG.E.128 R8, desc[UR4][R2.64]
FFMA R4, R5, R8, R4
MUFU.EX2 R4, R4
IADD3 R6, R6, 0x1, RZ
ISETP.NE.AND P0, PT, R6, R7, PT
IMAD.MOV.U32 R9, RZ, RZ, R6
@P0 BRA `(.L_x_1)
@P1 BRA `(.L_x_0)
STG.E desc[UR4][R2.64], R4
LDL R4, [R1]
EXIT
.L_x_2:
BRA `(.L_x_2)
"""
PTX = """
.version 7.8
.target sm_{capability}
.address_size 64
.visible .entry sums(.param .u64 data, .param .u32 num) {{
  .reg .u64 %p; .reg .u32 %i, %n; .reg .f32 %x, %s; .reg .pred %more;
  ld.param.u64 %p, [data];
  ld.param.u32 %n, [num];
  mov.u32 %i, 0;
  mov.f32 %s, 0f00000000;
loop:
  .pragma "nounroll";
  ld.volatile.global.f32 %x, [%p];
  ex2.approx.ftz.f32 %x, %x;
  fma.rn.f32 %s, %x, %x, %s;
  ex2.approx.ftz.f32 %s, %s;
  add.u32 %i, %i, 1;
  setp.ne.u32 %more, %i, %n;
  @%more bra loop;
  st.global.f32 [%p], %s;
  ret;
}}
"""


def listing(text, upper="0x000fe20000000f00"):
    """Print instructions and labels, a line each, as nvdisasm does."""
    lines, address = [], 0
    for line in text.strip().splitlines():
        if line.startswith("."):
            lines.append(line)
            continue
        lines += [f"        /*{address:04x}*/    {line} ;   /* 0x0000000000007918 */", f"      /* {upper} */"]
        address += 16
    return parse_sass("\n".join(lines))


def test_the_inner_loop_is_found_and_its_kinds_are_counted():
    code = listing(LISTING)
    (span,) = find_loops(code)
    assert span == Span(3, 10)
    kinds = {"spill": 1, "global": 1, "float": 1, "special": 1, "logic": 2, "multiply": 1, "control": 1}
    assert count_kinds(follow(code, span)) == kinds


def test_a_short_loop_waits_and_does_not_hide_the_one_around_it():
    assert find_loops(listing(LISTING), least=9) == [Span(1, 11)]


def test_spills_are_found_in_outer_loops_too():
    code = listing(LISTING)
    assert find_repeated(code) == set(range(1, 12))
    assert [n for n, i in enumerate(code) if i.kind == "spill"] == [0, 1, 3, 13]


def test_a_branch_back_from_behind_the_end_makes_a_loop_of_what_it_repeats_alone():
    code = listing("FADD R0, R0, R1\n.L_x_0:\nFADD R0, R0, R1\n@P0 BRA `(.L_x_1)\nEXIT\n.L_x_1:\nNOP\nBRA `(.L_x_0)")
    assert find_repeated(code) == {1, 2, 4, 5}  # not the EXIT between them


def test_an_ordinary_iteration_jumps_over_what_few_iterations_do():
    few = "\n".join(["FADD R0, R0, R1"] * 70)
    code = listing(f".L_x_0:\n@P0 BRA `(.L_x_1)\n{few}\n.L_x_1:\n@P1 BRA `(.L_x_2)\nNOP\n.L_x_2:\n@P2 BRA `(.L_x_0)")
    path = follow(code, *find_loops(code))
    assert [i.name for i in path] == ["BRA", "BRA", "NOP", "BRA"] and path[1] is code[71]


def test_control_codes_are_read():
    (i,) = listing("@!P1 LDG.E R0, desc[UR4][R2.64]", f"{9 << 41 | 2 << 46 | 5 << 49 | 0b101 << 52:#018x}")
    assert (i.stall, i.writes, i.reads, i.waits) == (9, 2, 5, 0b101)
    assert (i.guard, i.name, i.root, i.kind) == ("@!P1", "LDG.E", "LDG", "global")


@pytest.mark.parametrize("capability", [capability for capability in DEVICES if capability < 942])
def test_a_compiled_loop_is_read(tmp_path, capability):
    version = "8.7" if capability == 120 else "7.8"
    (tmp_path / "sums.ptx").write_text(PTX.format(capability=capability).replace("7.8", version))
    tool = TOOLS / ("ptxas-blackwell" if capability == 120 else "ptxas")
    command = [tool, f"-arch=sm_{capability}", "sums.ptx", "-o", "sums.cubin"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    code = read_sass((tmp_path / "sums.cubin").read_bytes())
    (span,) = find_loops(code, least=4)
    kinds = count_kinds(follow(code, span))
    assert kinds["special"] == 2 and kinds["global"] == 1 and kinds["unknown"] == 0
    assert set(range(span.first, span.last + 1)) == find_repeated(code)
    (load,) = (i for i in code[span.first : span.last] if i.root in ("LDG", "LD"))
    (use,) = [i for i in code[span.first : span.last] if i.root == "MUFU"][:1]
    assert load.writes < 7 and any(i.waits >> load.writes & 1 for i in code[code.index(load) : code.index(use) + 1])


@pytest.mark.parametrize(
    "capability, warps, registers, shared, programs",
    [
        (90, 4, 128, 0, 4),  # CUDA's occupancy calculator, as the others
        (90, 4, 255, 0, 2),
        (90, 8, 255, 0, 1),
        (90, 12, 168, 0, 1),
        (90, 4, 40, 0, 12),
        (90, 4, 41, 0, 10),
        (90, 1, 16, 0, 32),
        (90, 4, 32, 75 * 1024, 3),
        (90, 4, 32, 113 * 1024, 2),
        (90, 4, 32, 114 * 1024, 1),
        (90, 4, 32, 228 * 1024, 0),
        (80, 4, 32, 81 * 1024, 2),
        (80, 4, 32, 163 * 1024, 1),
        (80, 4, 32, 164 * 1024, 0),
        (86, 1, 16, 0, 16),
        (89, 1, 16, 0, 24),
        (89, 4, 32, 0, 12),
        (89, 4, 32, 32 * 1024, 3),
        (120, 4, 32, 99 * 1024, 1),
        (120, 4, 32, 100 * 1024, 0),
        (80, 16, 136, 0, 0),
    ],
)
def test_programs_of_a_multiprocessor(capability, warps, registers, shared, programs):
    assert count_programs(registers, warps, shared, DEVICES[capability]) == programs
