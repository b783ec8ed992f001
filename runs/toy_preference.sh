#!/usr/bin/env bash
# Preferences on the toy, on a CPU: pairs of the right sum and a mistake of the SFT model, then a
# reward model, DPO, KTO and online DPO. Each run ends with its held-out numbers before and after.
#
#     bash runs/toy_preference.sh [SEED]
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
python runs/toy.py "$out" --pairs "$out/sft"

python train_rm.py --model "$out/sft" --out "$out/rm" --overwrite \
    --data "$out/pairs.jsonl" --eval_data "$out/pairs_heldout.jsonl" --device cpu --seed "$seed" \
    --steps 800 --rows 64 --lr 5e-4 --warmup 20 --eval_every 100

python train_dpo.py --model "$out/sft" --out "$out/dpo" --overwrite \
    --data "$out/pairs.jsonl" --eval_data "$out/pairs_heldout.jsonl" --device cpu --seed "$seed" \
    --steps 120 --rows 64 --lr 2e-4 --warmup 20 --beta 1 --eval_every 100

python train_kto.py --model "$out/sft" --out "$out/kto" --overwrite \
    --data "$out/pairs.jsonl" --eval_data "$out/pairs_heldout.jsonl" --device cpu --seed "$seed" \
    --steps 120 --rows 64 --lr 2e-4 --warmup 20 --loss kto --beta 1 --eval_every 100

python train_online_dpo.py --model "$out/sft" --out "$out/online_dpo" --overwrite \
    --data "$out/prompts.jsonl" --eval_data "$out/prompts_heldout.jsonl" \
    --device cpu --seed "$seed" --reward exact --max_new_tokens 8 \
    --steps 120 --prompts 64 --group 4 --lr 5e-4 --warmup 20 --beta 0.1 --eval_every 100
