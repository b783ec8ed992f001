#!/usr/bin/env bash
# GRPO on a laptop with a real model: SmolLM2-135M-Instruct learns two-digit sums that are asked in
# words. The last line is the share of right held-out answers (sampled at temperature 1, and greedy)
# before and after.
#
#     hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir SmolLM2-135M-Instruct
#     bash runs/smollm2.sh SmolLM2-135M-Instruct
#
# More flags may follow the model: --dry_run checks everything first. Writes to out/smollm2/grpo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -x .venv/bin/python ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
if [ $# = 0 ]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "runs/${0##*/}"
    exit 2
fi
model=$1
shift
out=out/smollm2

python runs/smollm2_sums.py $out

python train_grpo.py --model "$model" --out $out/grpo \
    --data $out/train.jsonl --eval_data $out/held_out.jsonl --eval_rows 100 --reward gsm8k \
    --steps 80 --prompts 8 --group 8 --minibatches 1 --max_new_tokens 16 \
    --lr 1e-5 --warmup 0 --eval_every 20 --save_every 10 "$@"
