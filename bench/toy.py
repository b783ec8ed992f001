"""Every algorithm on the toy task, short runs over several seeds -> tables and plots in bench/results.

    python -m bench.toy models          # SFT and reward model of each seed, which the others start from
    python -m bench.toy preference      # each loss of train_dpo.py, and --online
    python -m bench.toy grpo            # each variant of train_grpo.py
    python -m bench.toy ppo             # with the exact reward, and with the reward model's; explained variance

A run is one process of one thread; --jobs runs go side by side; those that --runs already holds are not repeated. A
cell is the median over the seeds, or the worst of them. Held-out exact match, sampled at temperature 1 and greedy, is
on 821 problems that no run trains on.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from nanopost.preference import PREFERENCE

ROOT = Path(__file__).resolve().parents[1]
PREFERENCES = {
    **{name: ["--loss", name] for name in PREFERENCE if name != "sft"},
    **{
        name: ["--loss", name, "--smoothing", "0.001" if name == "exo" else "0.05"]
        for name in ("exo", "robust")
    },
    "simpo": ["--loss", "simpo", "--beta", "2", "--gamma", "1"],
    "ipo": ["--loss", "ipo", "--beta", "0.1"],
    "cpo": ["--loss", "cpo", "sft", "--loss_weights", "1", "0.2"],
    "sigmoid + 0.2 sft (RPO)": ["--loss", "sigmoid", "sft", "--loss_weights", "1", "0.2"],
    "sigmoid, beta 0.1": ["--beta", "0.1"],
    "sigmoid, reference follows": ["--reference", "follow"],
    "online": ["--online"],
}
GRPO = {
    "GRPO (token)": [],
    "GRPO (sequence)": ["--agg", "sequence"],
    "Dr. GRPO": ["--adv", "mean", "--agg", "constant"],
    "DAPO": ["--clip_high", "0.28", "--resample", "2"],
    "RLOO": [
        "--adv",
        "loo",
        "--ratio",
        "sequence_sum",
        "--agg",
        "sequence",
        "--beta",
        "0.01",
        "--kl",
        "k1",
        "--kl_in",
        "reward",
    ],
    "GSPO": [
        "--ratio",
        "sequence",
        "--agg",
        "sequence",
        "--clip_low",
        "0.03",
        "--clip_high",
        "0.04",
    ],
    "LUSPO": [
        "--ratio",
        "sequence",
        "--agg",
        "sequence_sum",
        "--clip_low",
        "0.03",
        "--clip_high",
        "0.04",
    ],
    "CISPO": ["--loss", "cispo"],
    "SAPO": ["--loss", "sapo", "--agg", "sequence"],
    "GDPO": ["--adv", "gdpo", "--reward", "exact", "regex:<answer>\\d+</answer>"],
    "two-sided clip": ["--delta", "2"],
    "batch std": ["--adv", "batch"],
    "entropy bonus": ["--entropy_coef", "0.003"],
    "KL 0.01": ["--beta", "0.01"],
    "half of the tokens": ["--top_entropy", "0.5"],
    "a fifth of the tokens": ["--top_entropy", "0.2"],
    "8 minibatches": ["--minibatches", "8"],
    "8 minibatches, off-policy mask": ["--minibatches", "8", "--off_policy_mask", "0.05"],
    "GRPO, half the rate": ["--lr", "5e-4"],
    "CISPO, half the rate": ["--loss", "cispo", "--lr", "5e-4"],
    "SAPO, half the rate": ["--loss", "sapo", "--agg", "sequence", "--lr", "5e-4"],
}
FROM_REWARD_MODEL = ["--reward", "exact", "model:{rm}", "--reward_weights", "0", "1"]
PPO = {
    "exact reward": [],
    "exact reward, head on the policy": ["--value_model", "head"],
    "reward model": [*FROM_REWARD_MODEL, "--score_scale", "--beta", "0.4"],
    "reward model, no KL": FROM_REWARD_MODEL,
}


def run(command, log):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: see {log}")


def models(out, seed):
    run(
        [
            "train_sft.py",
            "--seed",
            seed,
            "--out",
            out / f"sft{seed}",
            "--overwrite",
            "--save_every",
            0,
        ],
        out / f"sft{seed}.log",
    )
    run(
        [
            "train_rm.py",
            "--seed",
            seed,
            "--model",
            out / f"sft{seed}",
            "--out",
            out / f"rm{seed}",
            "--overwrite",
            "--save_every",
            0,
        ],
        out / f"rm{seed}.log",
    )


def trained(out, script, name, flags, seed, steps, eval_every):
    """One run -> its lines of metrics, those of step 0 first."""
    folder = out / script.removesuffix(".py") / f"{name.replace(' ', '_').replace('/', '_')}-{seed}"
    flags = [flag.format(rm=out / f"rm{seed}") for flag in flags]
    if not (folder / "config.json").exists():  # else the run is there already, whole
        run(
            [
                script,
                "--model",
                out / f"sft{seed}",
                "--seed",
                seed,
                "--out",
                folder,
                "--overwrite",
                "--save_every",
                0,
                "--steps",
                steps,
                "--eval_every",
                eval_every,
                *flags,
            ],
            folder.with_suffix(".log"),
        )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    print(
        f"  {name}, seed {seed}: sampled {lines[0]['eval/accuracy']:.3f} -> {lines[-1]['eval/accuracy']:.3f}, "
        f"greedy {lines[0]['eval/greedy']:.3f} -> {lines[-1]['eval/greedy']:.3f}",
        flush=True,
    )
    return lines


def steps_to(lines, level=0.8):
    """The first step whose rollouts are that good, over five steps. Infinite: none, or rollouts that were selected."""
    rewards = [
        m["rewards/exact/mean"] for m in lines[1:] if m.get("groups") == m.get("prompts_drawn")
    ]
    return next(
        (k + 1 for k in range(4, len(rewards)) if statistics.mean(rewards[k - 4 : k + 1]) >= level),
        math.inf,
    )


def summary(runs):
    """{seed: lines} -> the numbers of a row of the table."""
    first, last = ([lines[k] for lines in runs.values()] for k in (0, -1))
    rise = [b["eval/accuracy"] - a["eval/accuracy"] for a, b in zip(first, last)]
    found = {
        "sampled before": statistics.median(m["eval/accuracy"] for m in first),
        "sampled": statistics.median(m["eval/accuracy"] for m in last),
        "worst rise": min(rise),
        "greedy before": statistics.median(m["eval/greedy"] for m in first),
        "greedy": statistics.median(m["eval/greedy"] for m in last),
    }
    for name, key in (("pairs right", "eval/rewards/accuracies"), ("kl", "eval/kl")):
        if key in last[0]:
            found[name] = statistics.median(m[key] for m in last)
    if "rewards/exact/mean" in last[0]:
        steps = statistics.median(steps_to(lines) for lines in runs.values())
        found["steps to 0.8"] = steps if steps < math.inf else None
    if "val/explained_variance" in last[0]:
        found["explained variance"] = statistics.median(
            statistics.mean(m["val/explained_variance"] for m in lines[-10:])
            for lines in runs.values()
        )
    return found


def table(rows):
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for name, row in rows.items():
        cells = [
            "-"
            if row.get(n) is None
            else f"{row[n]:.3f}"
            if n != "steps to 0.8"
            else f"{row[n]:.0f}"
            for n in names
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs, path):
    """Reward of the rollouts over the steps, a panel for each variant, a line for each seed."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        -(-len(runs) // 4),
        4,
        figsize=(14, 2.4 * -(-len(runs) // 4)),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat[len(runs) :]:
        axis.axis("off")
    for axis, (name, of_seed) in zip(axes.flat, runs.items()):
        for lines in of_seed.values():
            axis.plot(
                [m["step"] for m in lines[1:]],
                [m["rewards/exact/mean"] for m in lines[1:]],
                linewidth=1,
            )
        axis.axhline(0.8, color="gray", linewidth=0.5, linestyle="--")
        axis.set_title(name, fontsize=9)
    figure.supxlabel("step"), figure.supylabel("right sums among the rollouts")
    figure.savefig(path, dpi=75)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["models", "preference", "grpo", "ppo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants and no others")
    parser.add_argument(
        "--steps", type=int, help="default: 120 for preference, 60 for grpo, 80 for ppo"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--runs", default=ROOT / "out/toy", type=Path, help="folder for the runs themselves"
    )
    parser.add_argument("--out", default=ROOT / "bench/results", type=Path)
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        if args.what == "models":
            return list(pool.map(lambda seed: models(args.runs, seed), args.seeds))
        script, variants, steps = {
            "preference": ("train_dpo.py", PREFERENCES, 120),
            "grpo": ("train_grpo.py", GRPO, 60),
            "ppo": ("train_ppo.py", PPO, 80),
        }[args.what]
        steps = args.steps or steps
        names = args.only or list(variants)
        if not variants.keys() >= {*names}:
            parser.error(f"--only: the variants are {', '.join(map(repr, variants))}")
        cells = [(name, seed) for seed in args.seeds for name in names]
        lines = pool.map(
            lambda c: trained(args.runs, script, c[0], variants[c[0]], c[1], steps, 0), cells
        )
        runs = {name: {} for name in names}
        for (name, seed), found in zip(cells, lines):
            runs[name][seed] = found
    rows = {name: summary(of_seed) for name, of_seed in runs.items()}
    print(table(rows))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    result = {
        "torch": version("torch"),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "steps": steps,
        "seeds": args.seeds,
        "flags": {name: variants[name] for name in names},
        "table": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"toy_{args.what}.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / f"toy_{args.what}.md").write_text(table(rows) + "\n")
    if args.what != "preference":
        plot(runs, args.out / f"toy_{args.what}.png")


if __name__ == "__main__":
    main()
