#!/usr/bin/env bash
# What only a GPU can show, most valuable first; each part runs alone, in three minutes on an H100.
#
#     bash bench/gpu_day.sh PART [--try] [--out DIR]
#
#     correctness  every kernel and script against the CPU
#     blocks       linear attention, windows and experts against the CPU; their time beside
#                  transformers', and flash-linear-attention's if that is installed
#     resume       runs killed with -9
#     kernels      log-probs beside Liger, Cut Cross-Entropy and compiled torch, and the targets
#     mfu          SFT of a 1.5B shape: share of the matmul rate, beside TRL
#     grpo         GRPO of a 1.5B shape, end to end: tokens/s, beside TRL
#     decode       the native engine alone
#     prefixes     prompts computed once for all their completions: time and memory of a step
#     steps        whole steps of every script
#
# --try: anywhere, tiny, writes no results: does the part work? Results go to bench/results/*.json,
# with the device, versions, date and commit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
parts="correctness|blocks|resume|kernels|mfu|grpo|decode|prefixes|steps"
part=${1:-}
shift || true
if [[ " $* " == *" --try "* ]]; then
    export TRITON_INTERPRET=1
fi
case $part in
    correctness)
        OMP_NUM_THREADS=1 python -m bench.gpu_correctness --only kernels attention decoding scripts "$@"
        ;;
    blocks)
        OMP_NUM_THREADS=1 python -m bench.gpu_correctness --only blocks "$@"
        python -m bench.blocks "$@"
        ;;
    resume) OMP_NUM_THREADS=1 python -m bench.gpu_correctness --only resume "$@" ;;
    kernels) python -m bench.kernels "$@" ;;
    mfu) TMPDIR=/dev/shm python -m bench.mfu "$@" ;;
    grpo) TMPDIR=/dev/shm python -m bench.grpo "$@" ;;
    decode) python -m bench.decode "$@" ;;
    prefixes) python -m bench.prefixes "$@" ;;
    steps) TMPDIR=/dev/shm python -m bench.train_step --steps 4 --seconds 150 --profile dpo "$@" ;;
    *)
        echo "usage: bash bench/gpu_day.sh $parts [--try] [--out DIR]" >&2
        exit 2
        ;;
esac
