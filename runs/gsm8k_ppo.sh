#!/usr/bin/env bash
# PPO on GSM8K (2110.14168) for Qwen2.5-Instruct of 0.5B, 1.5B or 7B, on one GPU of 80 GB or eight.
# The reward is the right number at the end of the answer; the value model starts from the policy.
#
#     hf download Qwen/Qwen2.5-1.5B-Instruct --local-dir Qwen2.5-1.5B-Instruct
#     hf download openai/gsm8k --repo-type dataset --local-dir gsm8k
#     GPUS=8 bash runs/gsm8k_ppo.sh Qwen2.5-1.5B-Instruct
#
# More flags may follow the model: --dry_run checks everything first, --vllm URL samples on servers.
# Writes to out/gsm8k/ppo.
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

how=(--lr 1e-6 --value_lr 5e-6)
case "$model on $gpus" in
    *1.5B*) how+=(--checkpointing full) ;;
    *7B*" on 1") how=(--lora 32 --quantize nf4 --lr 1e-5 --value_lr 5e-5 --checkpointing full) ;;
    *7B*) how+=(--checkpointing full) ;;
esac

torchrun --standalone --nproc_per_node "$gpus" train_ppo.py --model "$model" \
    --out out/gsm8k/ppo --data gsm8k/main/train-*.parquet \
    --eval_data gsm8k/main/test-*.parquet --eval_rows 500 \
    --rename question=prompt --to_messages --reward gsm8k \
    --tokens 8192 --prompts 256 --max_new_tokens 512 --value_warmup 5 --lam 1 --beta 0.001 \
    --steps 200 "${how[@]}" "$@"
