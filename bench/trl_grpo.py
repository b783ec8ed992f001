"""TRL's GRPOTrainer with a command line like train_grpo.py's; prints one line of JSON.

    python -m bench.trl_grpo --model DIR --data PROMPTS.jsonl --batch 16 --accumulate 4

A step samples --batch x --accumulate completions with transformers' generate and trains on them
once. Rows are taken in the file's order.
"""

import json
import time

from trl import GRPOConfig, GRPOTrainer

from bench.reward import length_modulo_7
from bench.trl_sft import Recorder, load, parser, rows_of, settings, synchronize
from nanopost.verify import gsm8k

REWARDS = {"length": length_modulo_7, "gsm8k": gsm8k}


def record_generation(trainer) -> tuple[list[float], list[int]]:
    """Two lists to which the trainer appends, at each generation: seconds, completion tokens."""
    seconds, tokens = [], []
    generate = trainer._generate_single_turn

    def recorded(*args, **more):
        synchronize()
        began = time.perf_counter()
        completion_ids, logp = generate(*args, **more)
        synchronize()
        seconds.append(time.perf_counter() - began)
        tokens.append(sum(map(len, completion_ids)))
        return completion_ids, logp

    trainer._generate_single_turn = recorded
    return seconds, tokens


def main():
    p = parser(__doc__)
    p.add_argument("--group", type=int, default=8)
    p.add_argument("--max_new_tokens", type=int, default=128)
    p.add_argument("--beta", type=float, default=0.0)
    p.add_argument("--reward", default="length", choices=REWARDS)
    p.add_argument("--out", help="folder for the trained model; default: it is not kept")
    p.add_argument("--continuous", action="store_true", help="transformers' continuous batching")
    args = p.parse_args()
    model, tokenizer = load(args.model, attention=args.attention)
    recorder = Recorder()
    config = GRPOConfig(
        **settings(args),
        num_generations=args.group,
        max_completion_length=args.max_new_tokens,
        temperature=1.0,
        beta=args.beta,
        loss_type="dapo",
        shuffle_dataset=False,
        use_transformers_continuous_batching=args.continuous,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=REWARDS[args.reward],
        args=config,
        train_dataset=rows_of(args.data),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    seconds, tokens = record_generation(trainer)
    trainer.train()
    if args.out:
        trainer.save_model(args.out)
    lengths = ["completions/mean_length", "completions/clipped_ratio"]
    result = recorder.result(["loss", "reward", "grad_norm", *lengths])
    print(json.dumps({**result, "generate_seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
