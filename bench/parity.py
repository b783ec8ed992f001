"""50 steps beside TRL's trainer: the same weights, rows, order and AdamW in fp32, step by step.

    python -m bench.parity sft                          # writes bench/results/sft_parity.json and .png
    python -m bench.parity dpo

TRL pads its rows and gets them in the order in which our script takes them; ours are packed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from transformers import AutoTokenizer

from bench import assets
from nanopost import packing

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROWS, SEED, TOKENS = 8, 0, 2048
SFT = dict(
    script="train_sft.py",
    theirs=("bench.trl_sft",),
    rows=assets.chat_rows,
    template=assets.CHATML,
    lr=1e-3,
    names=("loss", "grad_norm", "entropy"),
)
DPO = dict(
    script="train_dpo.py",
    theirs=("bench.trl_preference", "dpo"),
    rows=assets.pair_rows,
    template=assets.TIGHT,
    lr=1e-4,
    names=("loss", "rewards/margins", "grad_norm"),
)


def run(*command) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def both(folder, kind: dict, steps: int, lr: float) -> dict:
    """Train on both sides -> name: {"ours", "theirs"}, one number a step."""
    assets.make_model(f"{folder}/model", template=kind["template"])
    rows = kind["rows"](AutoTokenizer.from_pretrained(f"{folder}/model"), 300)
    order = [i for k in range(steps) for i in packing.take(len(rows), SEED, k * ROWS, ROWS)]
    assets.write_rows(f"{folder}/rows.jsonl", rows)
    assets.write_rows(f"{folder}/ordered.jsonl", [rows[i] for i in order])
    common = ("--model", f"{folder}/model", "--steps", steps, "--lr", lr, "--weight_decay", 0.1)
    theirs = json.loads(
        run(
            "-m", *kind["theirs"], *common, "--data", f"{folder}/ordered.jsonl", "--batch", ROWS
        ).splitlines()[-1]
    )
    run(
        kind["script"],
        *common,
        "--data",
        f"{folder}/rows.jsonl",
        "--eval_data",
        f"{folder}/rows.jsonl",
        "--out",
        f"{folder}/out",
        "--rows",
        ROWS,
        "--seed",
        SEED,
        "--tokens",
        TOKENS,
        "--schedule",
        "constant",
        "--warmup",
        0,
        "--eval_every",
        10 * steps,
        "--save_every",
        0,
    )
    ours = [
        json.loads(line) for line in Path(folder, "out/metrics.jsonl").read_text().splitlines()[1:]
    ]
    return {
        name: {"ours": [m[name] for m in ours], "theirs": theirs[name]} for name in kind["names"]
    }


def plot(curves: dict, labels, path):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, 2, figsize=(10, 5.5), sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    for (name, curve), (top, bottom) in zip(curves.items(), axes.T):
        steps = range(1, len(curve["ours"]) + 1)
        top.plot(
            steps, curve["theirs"], color="tab:orange", linewidth=5, alpha=0.5, label=labels[0]
        )
        top.plot(steps, curve["ours"], color="tab:blue", linewidth=1.5, label=labels[1])
        top.set_title(name)
        top.legend()
        gaps = [max(abs(a - b), 1e-9) for a, b in zip(curve["ours"], curve["theirs"])]
        bottom.semilogy(steps, gaps, ".", color="black")
        bottom.axhline(1e-3, color="tab:red", linewidth=1, linestyle="--")
        bottom.set(xlabel="step", ylabel="|difference|", ylim=(1e-8, 1e-2))
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["sft", "dpo"])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, help="default: 1e-3 for sft, 1e-4 for dpo")
    parser.add_argument("--out", help="path without its suffix; default: bench/results/KIND_parity")
    args = parser.parse_args()
    kind = {"sft": SFT, "dpo": DPO}[args.kind]
    args.lr, args.out = (
        args.lr or kind["lr"],
        args.out or ROOT / f"bench/results/{args.kind}_parity",
    )
    with tempfile.TemporaryDirectory() as folder:
        curves = both(folder, kind, args.steps, args.lr)
    gaps = {
        name: max(abs(a - b) for a, b in zip(c["ours"], c["theirs"])) for name, c in curves.items()
    }
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    result = {
        "versions": {n: version(n) for n in ("torch", "transformers", "trl")},
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "settings": {
            "model": "Qwen3, 4 layers, 256 wide, vocabulary 4,096, random weights",
            "precision": "fp32",
            "steps": args.steps,
            "rows": ROWS,
            "lr": args.lr,
            "weight_decay": 0.1,
            "tokens": TOKENS,
        },
        "largest_difference": gaps,
        **curves,
    }
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(
        curves,
        (f"TRL {args.kind.upper()}Trainer, padded", f"{kind['script']}, packed"),
        f"{args.out}.png",
    )
    print("largest differences:  " + "   ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()))


if __name__ == "__main__":
    main()
