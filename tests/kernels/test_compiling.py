"""All kernels compile for sm_80 and sm_90, without spills, within shared memory, on the tensor cores where meant."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from kernels.attention import BLOCKS
from tests.kernels.compile_cases import CASES, TENSOR_CORES
from tests.kernels.compiling import SHARED_MEMORY, Compiled

MODULES = ("tests.kernels.compile_cases", "tests.kernels.planted")


@pytest.fixture(scope="module")
def compiled():
    """Everything that compiles, as Compiled by (case, capability)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.compiling", str(capability), *MODULES],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for capability in SHARED_MEMORY
    ]
    results = {}
    for run in runs:
        for line in run.communicate()[0].splitlines():
            record = Compiled(**json.loads(line))
            results.setdefault((record.case, record.capability), []).append(record)
    assert not any(run.returncode for run in runs)
    return results


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("case", CASES)
def test_shipped_kernels_compile(compiled, case, capability):
    records = compiled[case, capability]
    faults = []
    for record in records:
        meant = TENSOR_CORES.get(record.kernel, False)
        for fault in record.faults(meant(record) if callable(meant) else meant):
            faults.append(f"{record.kernel} {record.config}: {fault}")
    assert records and not faults, "\n".join(faults)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_all_blocks_of_attention_compile(compiled, capability):
    names = {"slots": "slots_kernel", "one_slot": "slots_kernel"}
    seen = set()
    for record in compiled["attention", capability]:
        options = (record.config.get(name) for name in ("BM", "BN", "num_warps", "num_stages"))
        seen.add((record.kernel, "torch.float32" == record.dtypes.get("p_q"), *options))
    for which, by_arch in BLOCKS.items():
        for arch in (capability, "fp32"):
            for blocks in by_arch[arch].values():
                assert (names.get(which, f"{which}_kernel"), arch == "fp32", *blocks) in seen, (which, arch, blocks)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(
    "case, fault",
    [
        ("good", None),
        ("spills", "spills"),
        ("shared", "bytes of shared memory are above"),
        ("no_tensor_cores", "mma"),
        ("modifier", "ptxas"),
        ("host_reads", "DataDependent"),
    ],
)
def test_planted_faults_are_found(compiled, case, fault, capability):
    (record,) = compiled[case, capability]
    faults = record.faults(tensor_cores=True)
    assert not faults if fault is None else fault in faults[0], faults


def test_every_config_that_autotuning_would_try_compiles(compiled):
    # One tensor is aligned to 16 bytes and its size a multiple of 64, the other neither.
    tried = [(record.config["num_warps"], record.config["EVEN"]) for record in compiled["autotuned", 90]]
    assert sorted(tried) == [(4, False), (4, True), (8, False), (8, True)]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_packed_weights_come_128_bits_at_a_time_and_become_floats_without_conversion(compiled, capability):
    (planted,) = compiled["narrow", capability]
    assert planted.wide_loads == 0 and planted.conversions > 0
    kernels = [record for record in compiled["dequant_matmul", capability] if record.kernel != "reduce_kernel"]
    assert {record.kernel for record in kernels} == {"gemv_kernel", "matmul_kernel", "dequantize_kernel"}
    for record in kernels:
        assert record.wide_loads >= (2 if record.kernel == "dequantize_kernel" else 4), record
        assert record.conversions == 0, record
        # Nothing but the last sum goes from thread to thread; tables of nf4 are 64 bytes.
        assert record.kernel != "gemv_kernel" or record.shared <= 64, record
