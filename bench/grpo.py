"""GRPO of a random Qwen2.5-1.5B, end to end on one GPU -> bench/results/grpo.json.

    python -m bench.grpo                          # one GPU, bf16
    python -m bench.grpo --try                    # anywhere, a tiny model: does the script work?

A step: 32 prompts of 256 tokens, 8 completions each of up to 512 new ones, one optimizer step on
all of them. Tokens per second are sampled tokens over the whole step: rollout, training and sync.
Ours samples with the native engine, TRL with transformers' generate and with its continuous
batching; both compute in bf16 over fp32 weights, without recomputation. The model is random: it
draws from all ids, and nearly every completion has its full length. The reward is the number of
characters modulo 7, so advantages vary (frac_reward_zero_std says in how many groups they do not).
Steps count from the second on.
"""

import json
import random
import tempfile
from pathlib import Path

from bench import train_step
from bench.train_step import FULL, TINY

WARM = 1


def write_prompts(folder: Path, tokens: int, count: int = 200):
    """Prompts of so many tokens: a byte per token, and one for each role."""
    draw = random.Random(1)
    lines = []
    for _ in range(count):
        text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=tokens - 2))
        lines.append(json.dumps({"prompt": [{"role": "user", "content": text}]}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def our_jobs(folder: Path, tiny: bool) -> dict[str, list]:
    sizes = TINY if tiny else FULL
    own = train_step.ours(
        folder,
        tiny,
        data=folder / "prompts.jsonl",
        prompts=sizes["prompts"],
        group=8,
        max_new_tokens=sizes["completion"],
        minibatches=1,
        reward=train_step.REWARD,
    )
    return {"nanopost": ["train_grpo.py", *own]}


def trl_jobs(folder: Path, tiny: bool) -> dict[str, list]:
    sizes = TINY if tiny else FULL
    own = train_step.trls(
        folder,
        tiny,
        data=folder / "prompts.jsonl",
        group=8,
        max_new_tokens=sizes["completion"],
        batch=16,
        accumulate=sizes["prompts"] // 2,
    )
    grpo = ["bench/trl_grpo.py", *own]
    return {"trl": grpo, "trl, continuous batching": [*grpo, "--continuous"]}


def main():
    args = train_step.arguments(__doc__, 3, 120)
    result, device = train_step.start(args)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        longest = 200 if args.tiny else 4000
        train_step.write_inputs(folder, train_step.shape(args.tiny), longest, device)
        write_prompts(folder, 16 if args.tiny else 256)
        jobs = train_step.with_trl(our_jobs(folder, args.tiny), trl_jobs(folder, args.tiny))
        train_step.measure("grpo", jobs, folder, args, result, warm=WARM)


if __name__ == "__main__":
    main()
