#!/usr/bin/env bash
# PPO on the toy, rewarded for the right sum, on a CPU. The last line is held-out exact match before
# and after.
#
#     bash runs/toy_ppo.sh [SEED]
#
# Starts from the SFT model of runs/toy_sft.sh, which runs first if there is none. Reads and writes
# out/toy, or out/toy-SEED if a seed is given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -x .venv/bin/python ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
seed=${1:-0}
out=out/toy${1:+-$1}

if [ ! -f "$out/sft/config.json" ]; then
    bash runs/toy_sft.sh "$@"
fi
echo "starts from $out/sft"

python train_ppo.py --model "$out/sft" --out "$out/ppo" --overwrite \
    --data "$out/prompts.jsonl" --eval_data "$out/prompts_heldout.jsonl" \
    --device cpu --seed "$seed" --reward exact --max_new_tokens 8 \
    --steps 80 --prompts 256 --group 1 --ppo_epochs 2 --minibatches 2 --lr 5e-4 --warmup 10 \
    --eval_every 50
