"""GSM8K from nothing on a CPU: a random 2 M parameter model learns the form of the answers by SFT, then by GRPO.

    python -m bench.gsm8k DATA TOKENIZER OUT       # about a quarter of an hour on one core

DATA: a folder with train.jsonl(.gz) and test.jsonl of GSM8K. TOKENIZER: a folder with tokenizer.json (about a thousand
tokens suffice). A model of this size learns no arithmetic; what it can learn is to end as the solutions do, with
"#### number": the rewards are gsm8k (the right number) and format (that form).
"""

import json
import subprocess
import sys
from pathlib import Path

from bench import random_model

if len(sys.argv) != 4:
    sys.exit(__doc__)
data, source, out = map(Path, sys.argv[1:])
root = Path(__file__).parents[1]
train = next(p for p in (data / "train.jsonl", data / "train.jsonl.gz") if p.exists())
random_model.write(out / "base", source)
(out / "eval.jsonl").write_text(
    "".join((data / "test.jsonl").read_text().splitlines(keepends=True)[:100])
)


def run(script, *arguments):
    subprocess.run([sys.executable, root / script, "--overwrite", *map(str, arguments)], check=True)


run(
    "train_sft.py",
    "--model",
    out / "base",
    "--data",
    train,
    "--rename",
    "question=prompt",
    "answer=completion",
    "--out",
    out / "sft",
    "--rows",
    16,
    "--steps",
    110,
    "--lr",
    3e-3,
    "--tokens",
    4096,
    "--max_length",
    512,
    "--save_every",
    0,
)
run(
    "train_grpo.py",
    "--model",
    out / "sft",
    "--data",
    train,
    "--eval_data",
    out / "eval.jsonl",
    "--rename",
    "question=prompt",
    "--out",
    out / "grpo",
    "--reward",
    "format",
    "gsm8k",
    "--prompts",
    8,
    "--group",
    8,
    "--minibatches",
    1,
    "--steps",
    40,
    "--lr",
    5e-4,
    "--max_new_tokens",
    256,
    "--tokens",
    4096,
    "--eval_every",
    20,
    "--resample",
    2,
    "--save_every",
    0,
)
lines = [json.loads(line) for line in (out / "grpo" / "metrics.jsonl").read_text().splitlines()]
steps = lines[1:]
print(
    "steps with reward_std above zero:", sum(m["reward_std"] > 0 for m in steps), "of", len(steps)
)
print(
    "held-out format rate, sampled:",
    [round(m["eval/accuracy"], 3) for m in lines if "eval/accuracy" in m],
)
