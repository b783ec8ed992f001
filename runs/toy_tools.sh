#!/usr/bin/env bash
# The toy with a calculator, on a CPU: products of two-digit numbers, which the model cannot compute
# itself. It writes a tool call, reads the result and answers. SFT leaves it unsure of each; GRPO and
# PPO, both from the SFT model, are rewarded for the right answer. The last line of each run is
# held-out exact match (sampled at temperature 1, and greedy) before and after.
#
#     bash runs/toy_tools.sh [SEED]
#
# Writes to out/toy_tools, or to out/toy_tools-SEED if a seed is given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -x .venv/bin/python ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
seed=${1:-0}
out=out/toy_tools${1:+-$1}

python runs/toy.py "$out" --tools

python train_sft.py --model "$out/model" --out "$out/sft" --overwrite \
    --data "$out/sft.jsonl" --eval_data "$out/sft_heldout.jsonl" --device cpu --seed "$seed" \
    --steps 300 --rows 64 --lr 3e-3 --warmup 20 --eval_every 100

python train_grpo.py --model "$out/sft" --out "$out/grpo" --overwrite \
    --data "$out/prompts.jsonl" --eval_data "$out/prompts_heldout.jsonl" --device cpu \
    --seed "$seed" --env runs/toy.py:Calculator --reward exact --max_turns 3 --max_new_tokens 20 \
    --steps 40 --prompts 64 --group 8 --minibatches 2 --lr 4e-4 --warmup 5 --eval_every 20

python train_ppo.py --model "$out/sft" --out "$out/ppo" --overwrite \
    --data "$out/prompts.jsonl" --eval_data "$out/prompts_heldout.jsonl" --device cpu \
    --seed "$seed" --env runs/toy.py:Calculator --reward exact --max_turns 3 --max_new_tokens 20 \
    --steps 20 --prompts 256 --group 1 --ppo_epochs 2 --minibatches 2 --lr 3e-4 --warmup 5 \
    --eval_every 20
