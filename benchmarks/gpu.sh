#!/bin/sh
# The first minutes on a GPU, in three calls of under ten minutes each, the most useful first. Each ends in time with what
# it has, and says what it left out; docs/kernels.md has what comes out. PYTHON names another python3.
#
#     sh benchmarks/gpu.sh correctness FOLDER    the tests that use a GPU: 8 minutes
#     sh benchmarks/gpu.sh kernels FOLDER        every kernel against its peers: 9 minutes
#     sh benchmarks/gpu.sh models FOLDER         training and answers of whole models: 8 minutes
#
# --minutes N gives a part another time, --tiny shows on any machine whether all of it runs. Where packages are missing,
# wheels in benchmarks/carried are used, which benchmarks/gpu_wheels.txt lists.
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -u "$root/benchmarks/gpu.py" "$@"
