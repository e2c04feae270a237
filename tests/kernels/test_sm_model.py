"""The model of a multiprocessor: what a loop must take at least, and what hides what."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks.kernels_static import format_table, read_results
from benchmarks.sm_model import price, simulate
from tests.kernels.sass import Instruction

PAGE = Path(__file__).parent.parent.parent / "docs" / "kernels.md"


def body(*texts, **fields):
    code = [Instruction(16 * n, text, stall=1) for n, text in enumerate(texts)]
    for name, values in fields.items():  # {position: value}
        for n, value in values.items():
            setattr(code[n], name, value)
    return code


def clocks(code, warps=4, programs=1, **options):
    return simulate(code, warps, programs, **options)[0]


def test_a_unit_limits_a_loop():
    assert clocks(body(*["FADD R0, R1, R2"] * 50)) == pytest.approx(50, abs=1)  # one instruction a clock
    assert clocks(body(*["FADD R0, R1, R2"] * 50), capability=80) == pytest.approx(100, abs=1)  # half as many lanes
    assert clocks(body(*["MUFU.EX2 R0, R1"] * 50)) == pytest.approx(400, rel=0.05)
    assert clocks(body(*["IADD3 R0, R1, R2, RZ"] * 50)) == pytest.approx(100, abs=2)
    mixed = body(*["MUFU.EX2 R0, R1", *["FADD R0, R1, R2"] * 7] * 10)
    assert clocks(mixed) == pytest.approx(80, rel=0.05)  # they go side by side


def test_a_stall_is_hidden_by_other_warps():
    code = body(*["FADD R0, R1, R2"] * 20, stall=dict.fromkeys(range(20), 4))
    alone, four = clocks(code), clocks(code, programs=4)
    assert alone == pytest.approx(80, abs=2) and four == pytest.approx(20, abs=2)


def test_a_load_is_waited_for_where_its_scoreboard_is_asked_for():
    texts = ["LDG.E R0, desc[UR4][R2.64]", *["FADD R0, R1, R2"] * 9]
    waiting = body(*texts, writes={0: 0}, waits={1: 1})
    assert 280 < clocks(waiting) < 340
    assert clocks(waiting, latency=750.0) - clocks(waiting) == pytest.approx(470, abs=5)
    assert clocks(body(*texts, writes={0: 0})) < 30


def test_wgmma_costs_what_it_multiplies_or_what_it_reads():
    def cost(shape, first="gdesc[UR4]"):
        return price(f"HGMMA.{shape}.F32.BF16", f"HGMMA.{shape}.F32.BF16 R24, {first}, gdesc[UR8], R24", "tensor", 90)

    assert cost("64x256x16").clocks == cost("64x256x16").tensor == 128
    assert cost("64x16x16").tensor == 8 and cost("64x16x16").clocks == 20  # 2 KiB and 512 bytes at 128 a clock
    assert cost("64x16x16", "R0").clocks == 8
    code = [
        Instruction(0, "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], gdesc[UR8], R24, gsb0"),
        Instruction(16, "WARPGROUP.DEPBAR.LE gsb0, 0x0"),
    ]
    assert clocks(code) > 32 + 18 and clocks(code, programs=4) == pytest.approx(32, abs=3)


def test_warps_of_a_program_meet_at_a_barrier():
    slow = body("MUFU.EX2 R0, R1", "BAR.SYNC.DEFER_BLOCKING 0x0", "FADD R0, R1, R2", stall={0: 15})
    assert 27 < clocks(slow, warps=8) < 60
    with pytest.raises(ValueError, match="barrier"):
        simulate(body("BAR.SYNC 0x0, 0x200", "FADD R0, R1, R2"), 8, 1)


def test_a_program_of_two_warps_leaves_half_of_the_sm_to_another():
    code = body(*["FADD R0, R1, R2"] * 50)
    assert clocks(code, warps=2, programs=8) == pytest.approx(clocks(code, warps=4, programs=4) / 2, rel=0.05)


def test_the_page_shows_the_committed_estimates():
    lines = [line for line in read_results() if line["capability"] == 90]
    table = format_table(lines)
    assert lines and table in PAGE.read_text(encoding="utf-8")
    assert all(len(row) <= 120 for row in table.splitlines())
    assert table.count("estimate") == len(table.splitlines()) - 2
