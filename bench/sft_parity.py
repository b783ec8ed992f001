"""50 steps of train_sft.py beside TRL's SFTTrainer: the same weights, rows, order and AdamW in fp32, step by step.

    python -m bench.sft_parity                          # writes bench/results/sft_parity.json and .png

TRL pads its rows and gets them in the order in which train_sft.py takes them; ours are packed.
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
from nanopost import data

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROWS, SEED, TOKENS = 8, 0, 2048


def run(*command) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE,
                          text=True, check=True)
    return done.stdout


def both(folder, steps: int, lr: float) -> dict:
    """Train on both sides -> name: {"ours", "theirs"}, one number a step."""
    assets.make_model(f"{folder}/model")
    rows = assets.chat_rows(AutoTokenizer.from_pretrained(f"{folder}/model"), 300)
    order = [i for k in range(steps) for i in data.take(len(rows), SEED, k * ROWS, ROWS)]
    assets.write_rows(f"{folder}/rows.jsonl", rows)
    assets.write_rows(f"{folder}/ordered.jsonl", [rows[i] for i in order])
    common = ("--model", f"{folder}/model", "--steps", steps, "--lr", lr, "--weight_decay", 0.1)
    theirs = json.loads(run("-m", "bench.trl_sft", *common, "--data", f"{folder}/ordered.jsonl", "--batch",
                            ROWS).splitlines()[-1])
    run("train_sft.py", *common, "--data", f"{folder}/rows.jsonl", "--eval_data", f"{folder}/rows.jsonl", "--out",
        f"{folder}/out", "--rows", ROWS, "--seed", SEED, "--tokens", TOKENS, "--schedule", "constant", "--warmup", 0,
        "--eval_every", 10 * steps, "--save_every", 0)
    ours = [json.loads(line) for line in Path(folder, "out/metrics.jsonl").read_text().splitlines()[1:]]
    names = ("loss", "grad_norm", "entropy")
    return {name: {"ours": [m[name] for m in ours], "theirs": theirs[name]} for name in names}


def plot(result: dict, path):
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.5), sharex=True, height_ratios=[2, 1], layout="constrained")
    for (name, title), (top, bottom) in zip((("loss", "loss"), ("grad_norm", "gradient norm")), axes.T):
        ours, theirs = result[name]["ours"], result[name]["theirs"]
        steps = range(1, len(ours) + 1)
        top.plot(steps, theirs, color="tab:orange", linewidth=5, alpha=0.5, label="TRL SFTTrainer, padded")
        top.plot(steps, ours, color="tab:blue", linewidth=1.5, label="train_sft.py, packed")
        top.set_title(title)
        top.legend()
        bottom.semilogy(steps, [max(abs(a - b), 1e-9) for a, b in zip(ours, theirs)], ".", color="black")
        bottom.axhline(1e-3, color="tab:red", linewidth=1, linestyle="--")
        bottom.set(xlabel="step", ylabel="|difference|", ylim=(1e-8, 1e-2))
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", default=ROOT / "bench/results/sft_parity", help="path without its suffix")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = both(folder, args.steps, args.lr)
    gaps = {name: max(abs(a - b) for a, b in zip(c["ours"], c["theirs"])) for name, c in curves.items()}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    result = {"versions": {n: version(n) for n in ("torch", "transformers", "trl")}, "date": time.strftime("%Y-%m-%d"),
              "commit": commit.stdout.strip(), "settings": {
                  "model": "Qwen3, 4 layers, 256 wide, vocabulary 4,096, random weights", "precision": "fp32",
                  "steps": args.steps, "rows": ROWS, "lr": args.lr, "weight_decay": 0.1, "tokens": TOKENS},
              "largest_difference": gaps, **curves}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, f"{args.out}.png")
    print("largest differences:  " + "   ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()))


if __name__ == "__main__":
    main()
