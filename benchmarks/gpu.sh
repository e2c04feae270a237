#!/bin/sh
# On a machine with a GPU, in under nine minutes: the kernels' tests, compiled, each family in a process of its own for
# four minutes at most, then every kernel's time. Needs nothing but torch, triton, numpy, pytest and hypothesis.
#
#     sh benchmarks/gpu.sh FOLDER
#
# FOLDER receives the tests' reports, and kernels.jsonl as benchmarks/results has it.
out=${1:?name a folder for the reports}
mkdir -p "$out"
for family in attention cross_entropy dequant_matmul grouped_gemm; do
  timeout 240 python -m pytest -q "tests/kernels/test_$family.py" > "$out/test_$family.txt" 2>&1 &
done
timeout 240 python -m pytest -q -m gpu tests > "$out/test_gpu.txt" 2>&1 &
wait
tail -n 2 "$out"/test_*.txt
python benchmarks/kernels.py --minutes 4
cp benchmarks/results/kernels.jsonl "$out"
