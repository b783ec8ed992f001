#!/usr/bin/env bash
# The toy's GRPO with rollouts on a vLLM server, which this script starts and stops. What
# train_grpo.py takes may follow, such as --max_staleness 2.
#
#     bash runs/toy_vllm.sh PYTHON [FLAGS]
#
# PYTHON: that of an environment with vLLM; on a CPU see tests/vllm.sh. Writes to out/toy/vllm.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:?give the python of an environment with vLLM}
shift
if [ -x .venv/bin/python ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi
out=out/toy
port=${PORT:-8765}
if [ ! -e $out/sft/model.safetensors ]; then
    bash runs/toy_sft.sh
fi
mkdir -p $out
"$python" -m nanopost.vllm_worker --model $out/sft --port "$port" --max-model-len 512 \
    > $out/server.log 2>&1 &
server=$!
trap 'kill $server' EXIT
until curl -sf "http://127.0.0.1:$port/health" > /dev/null; do
    kill -0 $server || { tail -n 30 $out/server.log; exit 1; }
    sleep 1
done

torchrun --standalone --nproc_per_node 1 train_grpo.py --model $out/sft --out $out/vllm \
    --data $out/prompts.jsonl --eval_data $out/prompts_heldout.jsonl --overwrite \
    --device cpu --reward exact --max_new_tokens 8 \
    --steps 100 --prompts 64 --group 8 --minibatches 2 --lr 1e-3 --warmup 10 --eval_every 50 \
    --vllm "http://127.0.0.1:$port" "$@"
