"""TRL's DPOTrainer or RewardTrainer on a folder and pairs, like train_dpo.py and train_rm.py; prints one JSON line.

    python -m bench.trl_preference dpo --model DIR --data PAIRS.jsonl --batch 2 --accumulate 4
    python -m bench.trl_preference reward --model DIR --data PAIRS.jsonl --batch 8

Pairs are taken in the file's order. The reference is a frozen copy, or its log-probs computed once (--precompute).
"""

import json

from transformers import Qwen3ForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from bench.trl_sft import Recorder, load, parser, rows_of, settings


def dpo_trainer(args, more):
    model, tokenizer = load(args.model)
    config = DPOConfig(
        **settings(args, max_length=args.max_length, train_sampling_strategy="sequential"),
        beta=0.1,
        precompute_ref_log_probs=args.precompute,
    )
    return DPOTrainer(
        model=model,
        ref_model=None if args.precompute else load(args.model)[0],
        args=config,
        train_dataset=rows_of(args.data),
        processing_class=tokenizer,
        **more,
    )


def reward_trainer(args, more):
    _, tokenizer = load(args.model)
    model = Qwen3ForSequenceClassification.from_pretrained(args.model, num_labels=1).float()
    config = RewardConfig(
        **settings(args, max_length=args.max_length, train_sampling_strategy="sequential")
    )
    rows = rows_of(args.data).map(
        lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")},
        remove_columns=["prompt"],
    )
    return RewardTrainer(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, **more
    )


def main():
    p = parser(__doc__)
    p.add_argument("trainer", choices=["dpo", "reward"])
    p.add_argument("--precompute", action="store_true")
    args = p.parse_args()
    recorder = Recorder()
    {"dpo": dpo_trainer, "reward": reward_trainer}[args.trainer](
        args, {"callbacks": [recorder]}
    ).train()
    steps = [log for log in recorder.logs if "loss" in log]
    seen = [log["num_tokens"] for log in steps]
    names = [
        name
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies")
        if name in steps[0]
    ]
    print(
        json.dumps(
            {
                "seconds": recorder.seconds,
                "tokens": [b - a for a, b in zip([0, *seen], seen)],
                **{name: [log[name] for log in steps] for name in names},
            }
        )
    )


if __name__ == "__main__":
    main()
