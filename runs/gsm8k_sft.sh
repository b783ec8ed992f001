#!/usr/bin/env bash
# SFT on the worked answers of GSM8K (2110.14168) for Qwen2.5 of 0.5B, 1.5B or 7B, on one GPU of
# 80 GB or eight.
#
#     hf download Qwen/Qwen2.5-1.5B --local-dir Qwen2.5-1.5B
#     hf download openai/gsm8k --repo-type dataset --local-dir gsm8k
#     GPUS=8 bash runs/gsm8k_sft.sh Qwen2.5-1.5B
#
# More flags may follow the model: --dry_run checks everything first. Writes to out/gsm8k/sft, where
# runs/gsm8k_grpo.sh can go on.
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
gpus=${GPUS:-1}

how=(--lr 1e-5)
case "$model on $gpus" in
    *1.5B*" on 1") how+=(--checkpointing full) ;;
    *7B*" on 1") how=(--lora 32 --lr 1e-4 --checkpointing full) ;;
    *7B*) how=(--lr 5e-6 --checkpointing full) ;;
esac

torchrun --standalone --nproc_per_node "$gpus" train_sft.py --model "$model" --out out/gsm8k/sft \
    --data gsm8k/main/train-*.parquet --eval_data gsm8k/main/test-*.parquet \
    --rename question=prompt answer=completion --to_messages \
    --tokens 16384 --rows 64 --epochs 2 --eval_every 50 "${how[@]}" "$@"
