#!/usr/bin/env bash
# Writes the toy and teaches its model two-digit addition by SFT on noisy answers, on a CPU.
#
#     bash runs/toy_sft.sh [SEED]
#
# Writes to out/toy, or to out/toy-SEED if a seed is given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -x .venv/bin/python ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
seed=${1:-0}
out=out/toy${1:+-$1}

python runs/toy.py "$out"

python train_sft.py --model "$out/model" --out "$out/sft" --overwrite \
    --data "$out/sft.jsonl" --eval_data "$out/sft_heldout.jsonl" --device cpu --seed "$seed" \
    --steps 700 --rows 64 --lr 3e-3 --warmup 20 --eval_every 100
