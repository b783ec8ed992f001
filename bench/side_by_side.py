"""Our scripts beside TRL on the same model, rows and optimizer, interleaved -> ratios in bench/results/cpu_*.json.

    python -m bench.side_by_side                        # all of it, on two threads of a CPU, in fp32
    python -m bench.side_by_side --work dpo reward --rounds 3

Each job is a command line, run --rounds times in turn with the others, because a machine's speed drifts: only the
ratios mean something. A step counts from its third on. Peak memory is the process's largest resident size, less that
of the same command with --help, which stops behind the imports. This file imports no library: a child's resident size
begins with its parent's.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THREADS, WARM = 2, 2
WORK = ["sft", "dpo", "reward", "equal", "ragged"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": str(THREADS),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
MAKE = """
import sys
from bench import assets
from nanopost import data
folder, name = sys.argv[1:]
changes = {"dpo": {"template": assets.TIGHT}, "reward": {"template": assets.TIGHT}, "equal": {"endless": True},
           "ragged": {"stop_ids": assets.random_stops()}}.get(name, {})
tokenizer = assets.make_model(f"{folder}/{name}", **changes)
make = {"sft": assets.chat_rows, "dpo": assets.pair_rows, "reward": assets.pair_rows}.get(name, assets.prompt_rows)
rows = make(tokenizer, 700 if name == "sft" else 256)
assets.write_rows(f"{folder}/{name}.jsonl", rows)
assets.write_rows(f"{folder}/{name}-ordered.jsonl", [rows[i] for i in data.take(len(rows), 0, 0, len(rows))])
assets.write_rows(f"{folder}/{name}-held-out.jsonl", rows[:4])
"""


# ------------------------------------------------------------------------------------------------------------- commands
def sft_jobs(folder, steps):
    """Steps of about 4,096 tokens: TRL's in 8 bins of 512, ours in bins of `tokens`. As it comes, TRL recomputes
    activations in the backward pass, which is slower and smaller: "recompute", which ours does with --checkpointing."""
    common = [
        "--model",
        f"{folder}/sft",
        "--data",
        f"{folder}/sft.jsonl",
        "--steps",
        steps,
        "--lr",
        1e-4,
    ]
    theirs = ["-m", "bench.trl_sft", *common]
    one = [*theirs, "--packing", "--batch", 1, "--accumulate", 8]
    jobs = {
        "trl packed 8 x 512, recompute": [*theirs, "--packing", "--batch", 8, "--recompute"],
        "trl packed 8 x 512": [*theirs, "--packing", "--batch", 8],
        "trl packed 1 x 512 x 8": one,
        "trl packed 1 x 512 x 8, recompute": [*one, "--recompute"],
    }
    mine = {
        n: [
            "train_sft.py",
            *common,
            *ours(folder, "sft"),
            "--tokens",
            n,
            "--bins",
            4096 // n,
            "--max_length",
            512,
        ]
        for n in (512, 1024, 2048)
    }
    return {
        **jobs,
        **{f"nanopost --tokens {n}": job for n, job in mine.items()},
        "nanopost --tokens 512, recompute": [*mine[512], "--checkpointing"],
    }


def dpo_jobs(folder, steps):
    """8 pairs a step, the reference a frozen copy, or its log-probs computed before the first step."""
    common = [
        "--model",
        f"{folder}/dpo",
        "--data",
        f"{folder}/dpo.jsonl",
        "--steps",
        steps,
        "--lr",
        1e-5,
    ]
    theirs = ["-m", "bench.trl_preference", "dpo", *common, "--data", f"{folder}/dpo-ordered.jsonl"]
    mine = [
        "train_dpo.py",
        *common,
        *ours(folder, "dpo"),
        "--rows",
        8,
        "--cache",
        f"{folder}/cache",
        "--reference",
    ]
    jobs = {}
    for batch in (2, 1):
        size = ["--batch", batch, "--accumulate", 8 // batch]
        jobs[f"trl {batch} x {8 // batch}"] = theirs + size
        jobs[f"trl {batch} x {8 // batch}, precomputed"] = [*theirs, *size, "--precompute"]
    for tokens in (1024, 2048):
        jobs[f"nanopost --tokens {tokens}"] = [*mine, "frozen", "--tokens", tokens]
        jobs[f"nanopost --tokens {tokens}, precomputed"] = [
            *mine,
            "precomputed",
            "--tokens",
            tokens,
        ]
    jobs["trl 1 x 8, recompute"] = [*jobs["trl 1 x 8"], "--recompute"]
    jobs["nanopost --tokens 1024, recompute"] = [*jobs["nanopost --tokens 1024"], "--checkpointing"]
    return jobs


def reward_jobs(folder, steps):
    """8 pairs a step."""
    common = [
        "--model",
        f"{folder}/reward",
        "--data",
        f"{folder}/reward.jsonl",
        "--steps",
        steps,
        "--lr",
        1e-5,
    ]
    theirs = [
        "-m",
        "bench.trl_preference",
        "reward",
        *common,
        "--data",
        f"{folder}/reward-ordered.jsonl",
    ]
    jobs = {
        f"trl {batch} x {8 // batch}": [*theirs, "--batch", batch, "--accumulate", 8 // batch]
        for batch in (2, 1)
    }
    jobs["trl 1 x 8, recompute"] = [*jobs["trl 1 x 8"], "--recompute"]
    for tokens in (1024, 2048):
        jobs[f"nanopost --tokens {tokens}"] = [
            "train_rm.py",
            *common,
            *ours(folder, "reward"),
            "--rows",
            8,
            "--tokens",
            tokens,
        ]
    jobs["nanopost --tokens 1024, recompute"] = [*jobs["nanopost --tokens 1024"], "--checkpointing"]
    return jobs


def grpo_jobs(folder, name, steps):
    """8 prompts x 8 completions of up to 128 tokens, one optimizer step on them."""
    common = [
        "--model",
        f"{folder}/{name}",
        "--data",
        f"{folder}/{name}.jsonl",
        "--steps",
        steps,
        "--lr",
        1e-5,
        "--weight_decay",
        0.0,
        "--group",
        8,
        "--max_new_tokens",
        128,
    ]
    theirs = ["-m", "bench.trl_grpo", *common]
    jobs = {
        "trl 16 x 4": [*theirs, "--batch", 16, "--accumulate", 4],
        "trl 8 x 8": [*theirs, "--batch", 8, "--accumulate", 8],
        "trl 8 x 8, recompute": [*theirs, "--batch", 8, "--accumulate", 8, "--recompute"],
    }
    for tokens in (1024, 2048):
        jobs[f"nanopost --tokens {tokens}"] = [
            "train_grpo.py",
            *common,
            *ours(folder, name),
            "--prompts",
            8,
            "--minibatches",
            1,
            "--tokens",
            tokens,
            "--reward",
            ROOT / "bench/reward.py:length_modulo_7",
        ]
    jobs["nanopost --tokens 1024, recompute"] = [*jobs["nanopost --tokens 1024"], "--checkpointing"]
    return jobs


def ours(folder, name):
    return [
        "--eval_data",
        f"{folder}/{name}-held-out.jsonl",
        "--out",
        f"{folder}/out",
        "--overwrite",
        "--schedule",
        "constant",
        "--warmup",
        0,
        "--save_every",
        0,
        "--eval_every",
        1000,
    ]


# ---------------------------------------------------------------------------------------------------------- measuring
def run(command):
    """-> (stdout, largest resident size in MB) of a Python command line."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=out,
            stderr=errors,
            text=True,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{errors.read()[-3000:]}")
        return out.read(), usage.ru_maxrss / 1024


def imports_mb(command):
    script = command[:2] if command[0] == "-m" else command[:1]
    return run([*script, "--help"])[1]


def measure(command):
    """One run -> seconds and tokens of each step behind the warm-up, its parts, and peak memory."""
    if "--cache" in command:  # as TRL does, each run computes its reference itself
        shutil.rmtree(command[command.index("--cache") + 1], ignore_errors=True)
    stdout, peak = run(command)
    if command[0] == "-m":
        steps = json.loads(stdout.splitlines()[-1])
        keys = ("seconds", "tokens", "generate_seconds")
        found = {key: steps[key] for key in keys if key in steps}
    else:
        out = Path(command[command.index("--out") + 1])
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
        seen = [0, *(m["num_tokens"] for m in steps)]
        tokens = [b - a for a, b in zip(seen, seen[1:])]
        found = {
            "seconds": [n / m["tokens_per_second"] for n, m in zip(tokens, steps)],
            "tokens": tokens,
        }
        if "time/rollout" in steps[0]:
            found["generate_seconds"] = [m["time/rollout"] for m in steps]
    return {**{key: values[WARM:] for key, values in found.items()}, "peak_mb": peak}


def summary(rounds, imports):
    """Medians over the rounds: of each round the median step, tokens over seconds, and peak above the imports."""

    def median(of_round):
        return statistics.median(of_round(r) for r in rounds)

    found = {
        "step_seconds": median(lambda r: statistics.median(r["seconds"])),
        "tokens_per_second": median(lambda r: sum(r["tokens"]) / sum(r["seconds"])),
        "tokens_per_step": median(lambda r: statistics.mean(r["tokens"])),
        "peak_mb": median(lambda r: r["peak_mb"]) - imports,
    }
    if "generate_seconds" in rounds[0]:
        found["generate_seconds"] = median(lambda r: statistics.median(r["generate_seconds"]))
    return {**found, "imports_mb": imports, "rounds": rounds}


def interleaved(jobs, rounds):
    """Every job once a round, beginning with another one each time -> name: summary."""
    names, runs = list(jobs), {name: [] for name in jobs}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            runs[name].append(measure(jobs[name]))
            print(
                f"  round {k + 1}  {name:34s} {statistics.median(runs[name][-1]['seconds']):.3f} s",
                flush=True,
            )
    return {name: summary(runs[name], imports_mb(jobs[name])) for name in names}


# ------------------------------------------------------------------------------------------------------------- ratios
def ratios(found, key, best):
    """The best of ours against the best of TRL's -> a dictionary that names both."""
    ours, theirs = (
        {n: v[key] for n, v in found.items() if n.startswith(side)} for side in ("nanopost", "trl")
    )
    mine, other = best(ours, key=ours.get), best(theirs, key=theirs.get)
    high, low = max(ours[mine], theirs[other]), min(ours[mine], theirs[other])
    better = ours[mine] == best(ours[mine], theirs[other])
    return {"ours": mine, "theirs": other, "better_by": high / low if better else low / high}


def compared(name, found):
    if name == "dpo":
        parts = [
            {n: v for n, v in found.items() if ("precomputed" in n) == precomputed}
            for precomputed in (False, True)
        ]
        return {
            f"{what}, {reference}": ratios(part, key, min)
            for reference, part in zip(("frozen", "precomputed"), parts)
            for what, key in (("step", "step_seconds"), ("peak", "peak_mb"))
        }
    if name == "reward":
        return {"step": ratios(found, "step_seconds", min), "peak": ratios(found, "peak_mb", min)}
    if name != "sft":
        return {
            "step": ratios(found, "step_seconds", min),
            "generation": ratios(found, "generate_seconds", min),
            "peak": ratios(found, "peak_mb", min),
        }
    default = {
        n: v
        for n, v in found.items()
        if n.startswith("nanopost") or n == "trl packed 8 x 512, recompute"
    }
    return {
        "tokens_per_second": ratios(found, "tokens_per_second", max),
        "peak": ratios(found, "peak_mb", min),
        "tokens_per_second, TRL as it comes": ratios(default, "tokens_per_second", max),
        "peak, TRL as it comes": ratios(default, "peak_mb", min),
    }


def table(found):
    for name, v in found.items():
        generate = f"  generate {v['generate_seconds']:.2f} s" if "generate_seconds" in v else ""
        print(
            f"  {name:34s} {v['tokens_per_second']:7,.0f} tokens/s  step {v['step_seconds']:.3f} s{generate}  "
            f"peak {v['peak_mb']:5,.0f} MB"
        )


def versions():
    names = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers")
    code = f"import importlib.metadata as m; print({{n: m.version(n) for n in {names}}})"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "python": platform.python_version(),
        **eval(run(["-c", code])[0]),
        "commit": commit.stdout.strip(),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", default=WORK, choices=WORK)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--grpo_steps", type=int, default=5)
    parser.add_argument("--out", default=ROOT / "bench/results", help="folder")
    args = parser.parse_args()
    common = {
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "settings": {
            "model": "Qwen3, 4 layers, 256 wide, vocabulary 4,096, random weights",
            "device": "cpu",
            "threads": THREADS,
            "cores": os.cpu_count(),
            "precision": "fp32",
            "optimizer": "AdamW (fused), gradient clipped at 1",
            "rounds": args.rounds,
            "warm-up steps": WARM,
            "steps": args.steps,
            "grpo_steps": args.grpo_steps,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in args.work:
            print(name, flush=True)
            run(["-c", MAKE, folder, name])
            make = {"sft": sft_jobs, "dpo": dpo_jobs, "reward": reward_jobs}.get(name)
            jobs = make(folder, args.steps) if make else grpo_jobs(folder, name, args.grpo_steps)
            found = interleaved(jobs, args.rounds)
            table(found)
            found_ratios = compared(name, found)
            for what, ratio in found_ratios.items():
                print(
                    f"  {what}: {ratio['better_by']:.2f} x better  ({ratio['ours']}; {ratio['theirs']})"
                )
            Path(args.out).mkdir(parents=True, exist_ok=True)
            text = json.dumps({**common, "ratios": found_ratios, "jobs": found}, indent=1)
            Path(args.out, f"cpu_{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
