"""Each part of bench/gpu_day.sh works, tiny and on a CPU: a GPU's time is for results."""

import subprocess
import sys
from pathlib import Path

import pytest
from scripts import ENVIRONMENT, ROOT

EXPECTED = {
    "correctness": [
        *("kernel, stored (33, 265, 72) d_weight:", "attention 14/2x64 window 64 torch.bfloat16,"),
        *("grpo judged, bf16: step 3 engine and trainer:", "sft, bf16: grad_norm"),
        "decoding, bfloat16, sampled: rollouts that a graph changes: 0.00e+00",
    ],
    "blocks": [
        *("blocks, qwen3_moe, bfloat16: gradients:", "deltanet, ragged documents: nanopost"),
        "experts: transformers, grouped",
    ],
    "resume": ["resume, grpo: killed and resumed: 0.00e+00"],
    "kernels": [
        "(64, 257, 32) peaked nanopost kernel, stored {'forward_ms'",
        "target: times as fast as liger-kernel: not measured",
    ],
    "mfu": ["nanopost --checkpointing full {'tokens_per_second'", "full: "],
    "grpo": ["nanopost {'tokens_per_second'", "'time/rollout'", "'time/train'", "'time/sync'"],
    "decode": ["large, ", "'tokens_per_second'", "'shares'"],
    "prefixes": ["8 completions, 1 : 4: time "],
    "steps": ["rm {'tokens_per_second'", "policy loss of 8,192 tokens"],
}
SHORT = {
    "kernels": ["--repeats", "1"],
    "mfu": ["--only", "nanopost --checkpointing full"],
    "grpo": ["--only", "nanopost"],
    "decode": ["--work", "large"],
    "steps": ["--only", "rm", "--profile"],
}


LONG = ("resume", "kernels", "steps")


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=pytest.mark.long if part in LONG else ()) for part in EXPECTED],
)
def test_each_part_of_a_gpu_day_works(part, tmp_path):
    short = SHORT.get(part, [])
    path = f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / "bench/gpu_day.sh", part, "--try", "--out", tmp_path, *short],
        env={**ENVIRONMENT, "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for said in EXPECTED[part]:
        assert said in done.stdout, done.stdout[-3000:]
    assert "FAIL" not in done.stdout and not list(tmp_path.iterdir())


def test_a_part_that_there_is_not_is_refused(tmp_path):
    done = subprocess.run(
        ["bash", ROOT / "bench/gpu_day.sh", "all"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "correctness|blocks|resume|kernels|mfu|grpo|" in done.stderr
