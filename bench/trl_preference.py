"""TRL's DPOTrainer or RewardTrainer with a command line like ours; prints one line of JSON.

    python -m bench.trl_preference dpo --model DIR --data PAIRS.jsonl --batch 2 --accumulate 4
    python -m bench.trl_preference reward --model DIR --data PAIRS.jsonl --batch 8

Pairs are taken in the file's order. The reference is a frozen copy, or, with --precompute, its
log-probs, which are computed once.
"""

import json

from transformers import Qwen3ForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from bench.trl_sft import Recorder, adapters, load, parser, rows_of, settings


def dpo_trainer(args, recorder):
    model, tokenizer = load(args.model, args.quantize)
    reference = None
    if not args.precompute and not args.lora:  # with adapters it is the model without them
        reference, _ = load(args.model)
    config = DPOConfig(
        **settings(args),
        max_length=args.max_length,
        train_sampling_strategy="sequential",
        beta=0.1,
        precompute_ref_log_probs=args.precompute,
    )
    return DPOTrainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=rows_of(args.data),
        processing_class=tokenizer,
        callbacks=[recorder],
        peft_config=adapters(args),
    )


def reward_trainer(args, recorder):
    _, tokenizer = load(args.model)
    model = Qwen3ForSequenceClassification.from_pretrained(args.model, num_labels=1).float()
    config = RewardConfig(
        **settings(args), max_length=args.max_length, train_sampling_strategy="sequential"
    )
    return RewardTrainer(
        model=model,
        args=config,
        train_dataset=rows_of(args.data).map(with_prompt, remove_columns=["prompt"]),
        processing_class=tokenizer,
        callbacks=[recorder],
    )


def with_prompt(row):
    """RewardTrainer wants whole conversations."""
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


def main():
    p = parser(__doc__)
    p.add_argument("trainer", choices=["dpo", "reward"])
    p.add_argument("--precompute", action="store_true")
    args = p.parse_args()
    recorder = Recorder()
    make = {"dpo": dpo_trainer, "reward": reward_trainer}[args.trainer]
    make(args, recorder).train()
    names = ["loss", "grad_norm", "rewards/margins", "rewards/accuracies", "learning_rate"]
    print(json.dumps(recorder.result(names)))


if __name__ == "__main__":
    main()
