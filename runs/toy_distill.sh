#!/usr/bin/env bash
# On-policy distillation on the toy, on a CPU: the SFT model learns from what GRPO made of it. The
# last line has the held-out divergence and exact match before and after: the teacher's own are at
# the end of its run.
#
#     bash runs/toy_distill.sh [SEED]
#
# Starts from the models of runs/toy.sh, which runs first if there are none. Reads and writes
# out/toy, or out/toy-SEED if a seed is given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -x .venv/bin/python ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
seed=${1:-0}
out=out/toy${1:+-$1}

if [ ! -f "$out/grpo/config.json" ]; then
    bash runs/toy.sh "$@"
fi
echo "starts from $out/sft; its teacher is $out/grpo"

python train_distill.py --model "$out/sft" --teacher "$out/grpo" --out "$out/distill" --overwrite \
    --data "$out/prompts.jsonl" --eval_data "$out/prompts_heldout.jsonl" \
    --device cpu --seed "$seed" --reward exact --max_new_tokens 8 \
    --steps 80 --prompts 256 --lr 1e-3 --warmup 5 --eval_every 20
