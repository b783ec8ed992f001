#!/usr/bin/env bash
# The toy from start to finish, in two to four minutes on two CPU cores: SFT on noisy answers, then
# GRPO, which brings out what the model knows. The last line is held-out exact match (sampled
# at temperature 1, and greedy) before and after GRPO.
#
#     bash runs/toy.sh [SEED]
#
# Writes to out/toy, or to out/toy-SEED if a seed is given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -x .venv/bin/python ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
seed=${1:-0}
out=out/toy${1:+-$1}

bash runs/toy_sft.sh "$@"

torchrun --standalone --nproc_per_node 1 train_grpo.py --model "$out/sft" --out "$out/grpo" \
    --data "$out/prompts.jsonl" --eval_data "$out/prompts_heldout.jsonl" --overwrite \
    --device cpu --seed "$seed" --reward exact --max_new_tokens 8 \
    --steps 100 --prompts 64 --group 8 --minibatches 2 --lr 1e-3 --warmup 10 --eval_every 50
