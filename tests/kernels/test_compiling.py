"""All kernels compile, fit into a multiprocessor, spill in no inner loop, and use tensor cores where they are meant to.

For sm_86 nothing is compiled: with the shared memory of sm_89 and instructions like its own, it is judged by that code.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton")
import triton

from nanovlm.kernels import attention, cache_attention
from tests.kernels.compile_cases import CASES, TENSOR_CORES
from tests.kernels.compiling import Compiled, find_narrowest

IS_OLDEST = triton.__version__.startswith("3.6.")
CAPABILITIES = (90, 89) if IS_OLDEST else (90, 80, 89, 120)
AMD = 942  # MI300: it compiles, within its shared memory; with the newest Triton alone
TARGETS = CAPABILITIES if IS_OLDEST else (*CAPABILITIES, AMD)
MODULES = ("tests.kernels.compile_cases", "tests.kernels.planted")


@pytest.fixture(scope="module")
def compiled():
    """Everything that compiles, as Compiled by (case, capability)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(capability):
        modules = MODULES[:1] if capability == AMD else MODULES
        command = [sys.executable, "-m", "tests.kernels.compiling", str(capability), *modules]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout

    results = {}
    with ThreadPoolExecutor(2) as pool:  # processes at a time
        for line in "".join(pool.map(run, TARGETS)).splitlines():
            record = Compiled(**json.loads(line))
            results.setdefault((record.case, record.capability), []).append(record)
    return results


@pytest.mark.parametrize("case, capability", itertools.product(CASES, (*TARGETS, 86)))
def test_shipped_kernels_compile(compiled, case, capability):
    records = compiled[case, 89 if capability == 86 else capability]
    faults = []
    for record in records:
        columns = TENSOR_CORES.get(record.kernel, lambda compiled: 0)(record)
        for fault in record.faults(columns, device=capability):
            faults.append(f"{record.kernel} {record.config}: {fault}")
    assert records and not faults, "\n".join(faults)


@pytest.mark.parametrize("case, file", [("attention", attention), ("cache_attention", cache_attention)])
@pytest.mark.parametrize("capability", TARGETS)
def test_all_blocks_of_attention_compile(compiled, case, file, capability):
    names = {"few": "blocks_kernel", "many": "blocks_kernel"}
    seen = set()
    for record in compiled[case, capability]:
        options = (record.config.get(name) for name in ("BM", "BN", "num_warps", "num_stages"))
        seen.add((record.kernel, "torch.float32" == record.dtypes.get("p_q"), *options))
    for which, by_arch in file.BLOCKS.items():
        for arch in ("hip",) if capability == AMD else (80 if capability == 89 else capability, "fp32"):
            for blocks in by_arch.get(arch, by_arch[80]).values():
                kernel = names.get(which, f"{which.partition(',')[0]}_kernel")
                assert (kernel, arch == "fp32", *blocks) in seen, (which, arch, blocks)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_copy_engine_brings_full_blocks_of_attention_on_hopper(compiled, capability):
    """Forward, 16 bits, heads up to 128: keys and values once each a part, in the loop and so many loads before it."""
    for record in compiled["attention", capability]:
        is_meant = record.kernel == "forward_kernel" and capability == 90 and record.dtypes["p_q"] != "torch.float32"
        is_meant = is_meant and record.config["HA"] + record.config["HB"] <= 128
        assert bool(record.copies) == is_meant, record
        assert not is_meant or record.copies % (4 if record.config["HB"] else 2) == 0, record


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "case, fault",
    [
        ("good", None),
        ("spills", "spills in inner loops"),
        ("shared", "bytes of shared memory are above"),
        ("no_tensor_cores", "mma"),
        ("modifier", "ptxas"),
        ("host_reads", "DataDependent"),
    ],
)
def test_planted_faults_are_found(compiled, case, fault, capability):
    (record,) = compiled[case, capability]
    faults = record.faults(tensor_cores=True)
    assert not faults and not record.notes() if fault is None else fault in faults[0], faults


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_spill_outside_of_loops_is_noted_and_no_fault(compiled, capability):
    (record,) = compiled["spills_outside", capability]
    assert record.spilled and not record.spills_in_inner_loops and not record.faults(tensor_cores=0)
    (note,) = record.notes()
    assert (
        note == f"spills {record.spilled} bytes in {record.spills} instructions, 0 in outer loops and 0 in inner ones"
    )


def test_narrow_products_are_found(compiled):
    (record,) = compiled["narrow_products", 90]
    assert record.faults(tensor_cores=32) == ["wgmma with N = 16, though 32 is possible"]
    assert not record.faults(tensor_cores=16)
    assert compiled["good", 90][0].narrowest == 64
    # Of 64 + 16 columns the 16 are a fifth, and may be narrow.
    assert find_narrowest([64, 16]) == 64 and find_narrowest([16, 32, 16]) == 16 and find_narrowest([]) == 0


def test_shared_memory_is_judged_by_the_gpu(compiled):
    for capability in {80, 90} & set(CAPABILITIES):
        assert not compiled["shared_of_99", capability][0].faults(tensor_cores=32)
    for capability, device in {(89, 89), (89, 86), (120, 120)} & set(itertools.product(CAPABILITIES, (86, 89, 120))):
        (fault,) = compiled["shared_of_99", capability][0].faults(True, device)
        assert fault.endswith(f"bytes of shared memory are above {99 * 1024} of sm_{device}")


def test_a_program_that_no_multiprocessor_holds_is_a_fault():
    record = Compiled("", "", 89, {}, {}, registers=128, warps=16)
    assert not record.faults(0) and dataclasses.replace(record, registers=136).faults(0) == [
        "16 warps of 136 registers do not fit a multiprocessor"
    ]


def test_every_config_that_autotuning_would_try_compiles(compiled):
    # One tensor is aligned to 16 bytes and its size a multiple of 64, the other neither.
    tried = [(record.config["num_warps"], record.config["EVEN"]) for record in compiled["autotuned", 90]]
    assert sorted(tried) == [(4, False), (4, True), (8, False), (8, True)]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_packed_weights_come_128_bits_at_a_time_and_become_floats_without_conversion(compiled, capability):
    (planted,) = compiled["narrow", capability]
    assert planted.wide_loads == 0 and planted.conversions > 0
    kernels = [record for record in compiled["dequant_matmul", capability] if record.kernel != "reduce_kernel"]
    assert {record.kernel for record in kernels} == {"gemv_kernel", "matmul_kernel", "dequantize_kernel"}
    for record in kernels:
        assert record.wide_loads >= (2 if record.kernel == "dequantize_kernel" else 4), record
        assert record.conversions == 0, record
        assert record.flushes == 0, record  # codes of int4 are denormal numbers for one row
        # Nothing but the last sum goes from thread to thread: of a warp at most 4 bytes a thread.
        assert record.kernel != "gemv_kernel" or record.shared <= 128, record
