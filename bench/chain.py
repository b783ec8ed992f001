"""SFT, reward model and DPO on real chats and pairs, from a random model of a few million parameters, on a CPU.

    python -m bench.chain CHATS PAIRS TOKENIZER OUT [--chat_template FILE]

CHATS: rows {"messages"}. PAIRS: rows {"prompt", "chosen", "rejected"}, whose prompts may have several turns. TOKENIZER:
a folder with tokenizer.json and a chat template. A model of this size learns to write words and no sense; what is to be
seen is that real files pass through the whole chain, and that every stage lowers its own held-out loss.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bench import random_model

ROOT = Path(__file__).parents[1]


def run(script, out, *arguments):
    subprocess.run(
        [
            sys.executable,
            ROOT / script,
            "--out",
            out,
            "--overwrite",
            "--save_every",
            "0",
            "--eval_every",
            "0",
            *map(str, arguments),
        ],
        check=True,
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        name: (lines[0][name], lines[-1][name]) for name in lines[0] if name.startswith("eval/")
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chats"), parser.add_argument("pairs"), parser.add_argument("tokenizer")
    parser.add_argument("out", type=Path)
    parser.add_argument("--chat_template")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    random_model.write(args.out / "base", args.tokenizer, width=96, layers=2)
    template = ["--chat_template", args.chat_template] if args.chat_template else []
    common = [
        "--tokens",
        1024,
        "--max_length",
        320,
        "--holdout",
        60,
        "--steps",
        args.steps,
        *template,
    ]
    found = {
        "sft": run(
            "train_sft.py",
            args.out / "sft",
            "--model",
            args.out / "base",
            "--data",
            args.chats,
            "--rows",
            8,
            "--lr",
            3e-3,
            *common,
        ),
        "rm": run(
            "train_rm.py",
            args.out / "rm",
            "--model",
            args.out / "sft",
            "--data",
            args.pairs,
            "--rows",
            8,
            "--lr",
            3e-4,
            *common,
        ),
        "dpo": run(
            "train_dpo.py",
            args.out / "dpo",
            "--model",
            args.out / "sft",
            "--data",
            args.pairs,
            "--rows",
            8,
            "--lr",
            3e-5,
            *common,
        ),
    }
    for stage, metrics in found.items():
        print(
            stage,
            "  ".join(
                f"{name} {before:.3f} -> {after:.3f}" for name, (before, after) in metrics.items()
            ),
        )


if __name__ == "__main__":
    main()
