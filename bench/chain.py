"""SFT, reward model and DPO on real chats and pairs, on a CPU, from a random model of a few million
parameters.

    python -m bench.chain CHATS PAIRS TOKENIZER OUT [--chat_template FILE]

CHATS: rows {"messages"}. PAIRS: rows {"prompt", "chosen", "rejected"}, whose prompts may have
several turns. TOKENIZER: a folder with tokenizer.json and a chat template. A model of this size
learns to write words, not sense. The point is that real files pass through the whole chain, and
that every stage lowers its own held-out loss.
"""

from pathlib import Path

from bench import common, random_model


def train(script, out, **values):
    """Run a script -> {held-out metric: (before, after)}."""
    values = {"save_every": 0, "eval_every": 0, "overwrite": True, **values}
    common.run([script, *common.flags(out=out, **values)])
    before, *_, after = common.metrics(out)
    return {name: (before[name], after[name]) for name in before if name.startswith("eval/")}


def main():
    parser = common.parser(__doc__)
    for name in ("chats", "pairs", "tokenizer", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--chat_template")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    base, sft, rm, dpo = (args.out / name for name in ("base", "sft", "rm", "dpo"))
    random_model.write(base, args.tokenizer, width=96, layers=2)
    shared = {
        "rows": 8,
        "tokens": 1024,
        "max_length": 320,
        "holdout": 60,
        "steps": args.steps,
        "chat_template": args.chat_template,
    }
    stages = {
        "sft": train("train_sft.py", sft, model=base, data=args.chats, lr=3e-3, **shared),
        "rm": train("train_rm.py", rm, model=sft, data=args.pairs, lr=3e-4, **shared),
        "dpo": train("train_dpo.py", dpo, model=sft, data=args.pairs, lr=3e-5, **shared),
    }
    for stage, changes in stages.items():
        texts = [f"{name} {old:.3f} -> {new:.3f}" for name, (old, new) in changes.items()]
        print(stage, "  ".join(texts))


if __name__ == "__main__":
    main()
