#!/usr/bin/env bash
# A reward model on the pairs of UltraFeedback (2310.01377) for Qwen2.5-Instruct of 0.5B, 1.5B or
# 7B, on one GPU of 80 GB or eight.
#
#     hf download Qwen/Qwen2.5-1.5B-Instruct --local-dir Qwen2.5-1.5B-Instruct
#     hf download HuggingFaceH4/ultrafeedback_binarized --repo-type dataset \
#         --local-dir ultrafeedback
#     GPUS=8 bash runs/ultrafeedback_rm.sh Qwen2.5-1.5B-Instruct
#
# More flags may follow the model: --dry_run checks everything first. Writes to
# out/ultrafeedback/rm, which GRPO and PPO take as --reward model:out/ultrafeedback/rm.
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
    *7B*" on 1") how=(--lora 32 --lr 1e-4 --checkpointing full) ;;
    *7B*) how=(--lr 5e-6 --checkpointing full) ;;
esac

torchrun --standalone --nproc_per_node "$gpus" train_rm.py --model "$model" \
    --out out/ultrafeedback/rm --data ultrafeedback/data/train_prefs-*.parquet \
    --eval_data ultrafeedback/data/test_prefs-*.parquet --eval_rows 500 \
    --tokens 8192 --max_length 2048 --rows 64 --epochs 1 --centre 0.01 "${how[@]}" "$@"
