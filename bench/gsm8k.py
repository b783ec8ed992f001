"""GSM8K from nothing on a CPU: a random model of 2 M parameters learns the form of the answers, by
SFT and then by GRPO.

    python -m bench.gsm8k DATA TOKENIZER OUT       # a quarter of an hour on one core

DATA: a folder with GSM8K's train.jsonl (or train.jsonl.gz) and test.jsonl. TOKENIZER: a folder with
tokenizer.json (a thousand tokens suffice). A model of this size learns no arithmetic, but it can
learn to end as the solutions do, with "#### number". The rewards are format (that form) and gsm8k
(the right number).
"""

from pathlib import Path

from bench import common, random_model


def main():
    parser = common.parser(__doc__)
    for name in ("data", "tokenizer", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--sft_steps", type=int, default=110)
    parser.add_argument("--grpo_steps", type=int, default=40)
    args = parser.parse_args()
    train = args.data / "train.jsonl"
    if not train.exists():
        train = args.data / "train.jsonl.gz"
    held_out = args.out / "eval.jsonl"
    random_model.write(args.out / "base", args.tokenizer)
    lines = (args.data / "test.jsonl").read_text().splitlines(keepends=True)
    held_out.write_text("".join(lines[:100]))

    sft = common.flags(
        model=args.out / "base",
        data=train,
        rename=["question=prompt", "answer=completion"],
        out=args.out / "sft",
        rows=16,
        steps=args.sft_steps,
        lr=3e-3,
        tokens=4096,
        max_length=512,
        save_every=0,
        overwrite=True,
    )
    grpo = common.flags(
        model=args.out / "sft",
        data=train,
        eval_data=held_out,
        rename=["question=prompt"],
        out=args.out / "grpo",
        reward=["format", "gsm8k"],
        prompts=8,
        group=8,
        minibatches=1,
        steps=args.grpo_steps,
        lr=5e-4,
        max_new_tokens=256,
        tokens=4096,
        eval_every=20,
        resample=2,
        save_every=0,
        overwrite=True,
    )
    common.run(["train_sft.py", *sft])
    common.run(["train_grpo.py", *grpo])

    before, *steps = common.metrics(args.out / "grpo")
    spread = sum(m["reward_std"] > 0 for m in steps)
    print(f"steps with reward_std above 0: {spread} of {len(steps)}")
    rates = [round(m["eval/accuracy"], 3) for m in [before, *steps] if "eval/accuracy" in m]
    print("held-out rate of the form, sampled:", rates)


if __name__ == "__main__":
    main()
