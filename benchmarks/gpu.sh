#!/bin/sh
# On a machine with a GPU, in under nine minutes: the kernels' tests, compiled, then every kernel's time. The tests run
# in 16 processes for four minutes at most, as compiling takes them longest. Needs what nanovlm itself needs, pytest and
# hypothesis.
#
#     sh benchmarks/gpu.sh FOLDER
#
# FOLDER receives the tests' reports, and kernels.jsonl as benchmarks/results has it.
out=${1:?name a folder for the reports}
mkdir -p "$out"
reports=$(mktemp -d)
for family in attention cross_entropy dequant_matmul grouped_gemm; do
  for names in float32 "float16 and not bfloat16" bfloat16 "not float"; do
    timeout 240 python -m pytest -q "tests/kernels/test_$family.py" -k "$names" > "$reports/$family, $names" 2>&1 &
  done
done
timeout 240 python -m pytest -q -m gpu tests > "$reports/gpu" 2>&1 &
wait
tail -n 1000 "$reports"/* > "$out/tests.txt"
tail -n 1 "$reports"/*
timeout 285 python benchmarks/kernels.py --minutes 4
cp benchmarks/results/kernels.jsonl "$out"
