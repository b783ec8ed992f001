#!/usr/bin/env bash
# What only a GPU can show, most valuable first; each part runs alone, in three minutes on an H100.
#
#     bash bench/gpu_day.sh correctness|resume|kernels|steps [--try] [--out DIR]
#
# --try: anywhere, tiny, writes no results: does the part work? Results go to bench/results/*.json,
# with the device, versions, date and commit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
part=${1:-}
shift || true
if [[ " $* " == *" --try "* ]]; then
    export TRITON_INTERPRET=1
fi
case $part in
    correctness)
        OMP_NUM_THREADS=1 python -m bench.gpu_correctness --only kernels attention decoding scripts "$@"
        ;;
    resume) OMP_NUM_THREADS=1 python -m bench.gpu_correctness --only resume "$@" ;;
    kernels) python -m bench.kernels "$@" ;;
    steps) TMPDIR=/dev/shm python -m bench.train_step --steps 4 --seconds 150 --profile dpo "$@" ;;
    *)
        echo "usage: bash bench/gpu_day.sh correctness|resume|kernels|steps [--try] [--out DIR]" >&2
        exit 2
        ;;
esac
