"""Our scripts beside TRL on the same model, rows and optimizer -> bench/results/cpu_*.json.

    python -m bench.side_by_side                  # all of it, on two threads of a CPU
    python -m bench.side_by_side --work dpo reward --rounds 3
    python -m bench.side_by_side --try --work sft        # one short round: does the script work?

A job is a command line. All jobs take turns, --rounds times, because a machine's speed drifts: only
the ratios mean something, and each is printed with its aim (AIMS), met or missed. All compute in
fp32, but for sft_bf16. A step counts from its third on. Peak memory is the largest resident size of
the process, less that of the same command with --help, which ends after the imports.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import common
from bench.common import flags

THREADS, WARM = 2, 2
RECOMPUTE = ["--checkpointing", "full"]
WORK = ["sft", "sft_bf16", "dpo", "reward", "equal", "ragged"]
# Work -> what is compared, and how many times better ours should be.
AIMS = {
    "sft": {"tokens_per_second": 2.0, "peak": 2.0},
    "sft_bf16": {"tokens_per_second": 3.0, "peak": 2.0},
    "dpo": {
        "step, frozen": 2.5,
        "peak, frozen": 2.0,
        "step, precomputed": 2.5,
        "peak, precomputed": 2.0,
    },
    "reward": {"step": 2.5, "peak": 2.0},
    "equal": {"step": 3.0, "peak": 2.0},
    "ragged": {"step": 4.0, "peak": 2.0},
}
# A process of its own writes the inputs: a child's resident size begins with its parent's, so this
# one imports no library.
MAKE = """
import sys
from bench import assets
from nanopost import packing

folder, name = sys.argv[1:]
changes = {}
if name in ("dpo", "reward"):
    changes = {"template": assets.TIGHT}
elif name == "equal":
    changes = {"endless": True}
elif name == "ragged":
    changes = {"stop_ids": assets.random_stops()}
tokenizer = assets.make_model(f"{folder}/{name}", **changes)
if name in ("sft", "sft_bf16"):
    rows = assets.chat_rows(tokenizer, 700)
elif name in ("dpo", "reward"):
    rows = assets.pair_rows(tokenizer, 256)
else:
    rows = assets.prompt_rows(tokenizer, 256)
order = packing.take(len(rows), 0, 0, len(rows))
assets.write_rows(f"{folder}/{name}.jsonl", rows)
assets.write_rows(f"{folder}/{name}-ordered.jsonl", [rows[i] for i in order])
assets.write_rows(f"{folder}/{name}-held-out.jsonl", rows[:4])
"""


# ------------------------------------------------------------------------------------ command lines
def ours(folder, name, **values):
    """What our scripts get in all jobs."""
    return flags(
        eval_data=f"{folder}/{name}-held-out.jsonl",
        out=f"{folder}/out",
        overwrite=True,
        warmup=0,
        save_every=0,
        eval_every=0,
        **values,
    )


def sft_jobs(folder, name, steps):
    """Steps of about 4,096 tokens: TRL's in 8 bins of 512, ours in bins of --tokens.

    sft_bf16: both compute in bf16 over fp32 weights. By default TRL recomputes activations in the
    backward pass, which is slower and takes less memory: "recompute", which ours does with
    --checkpointing full.
    """
    shared = flags(model=f"{folder}/{name}", data=f"{folder}/{name}.jsonl", steps=steps, lr=1e-4)
    if name == "sft_bf16":
        shared += flags(dtype="bf16")
    theirs = ["-m", "bench.trl_sft", *shared, "--packing"]
    whole = [*theirs, *flags(batch=8)]
    one = [*theirs, *flags(batch=1, accumulate=8)]
    jobs = {
        "trl packed 8 x 512, recompute": [*whole, "--recompute"],
        "trl packed 8 x 512": whole,
        "trl packed 1 x 512 x 8": one,
        "trl packed 1 x 512 x 8, recompute": [*one, "--recompute"],
    }
    for tokens in (512, 1024, 2048):
        own = ours(folder, name, tokens=tokens, bins=4096 // tokens, max_length=512)
        jobs[f"nanopost --tokens {tokens}"] = ["train_sft.py", *shared, *own]
    jobs["nanopost --tokens 512, recompute"] = [*jobs["nanopost --tokens 512"], *RECOMPUTE]
    return jobs


def dpo_jobs(folder, steps):
    """8 pairs a step; the reference is a frozen copy, or its log-probs, computed before step 1."""
    shared = flags(model=f"{folder}/dpo", steps=steps, lr=1e-5)
    data = flags(data=f"{folder}/dpo-ordered.jsonl")
    theirs = ["-m", "bench.trl_preference", "dpo", *shared, *data]
    jobs = {}
    for batch in (2, 1):
        name = f"trl {batch} x {8 // batch}"
        jobs[name] = [*theirs, *flags(batch=batch, accumulate=8 // batch)]
        jobs[f"{name}, precomputed"] = [*jobs[name], "--precompute"]
    for tokens in (1024, 2048):
        for reference, suffix in (("frozen", ""), ("precomputed", ", precomputed")):
            own = ours(
                folder,
                "dpo",
                data=f"{folder}/dpo.jsonl",
                rows=8,
                reference=reference,
                cache=f"{folder}/cache",
                tokens=tokens,
            )
            jobs[f"nanopost --tokens {tokens}{suffix}"] = ["train_dpo.py", *shared, *own]
    jobs["trl 1 x 8, recompute"] = [*jobs["trl 1 x 8"], "--recompute"]
    jobs["nanopost --tokens 1024, recompute"] = [*jobs["nanopost --tokens 1024"], *RECOMPUTE]
    return jobs


def reward_jobs(folder, steps):
    """8 pairs a step."""
    shared = flags(model=f"{folder}/reward", steps=steps, lr=1e-5)
    data = flags(data=f"{folder}/reward-ordered.jsonl")
    theirs = ["-m", "bench.trl_preference", "reward", *shared, *data]
    jobs = {}
    for batch in (2, 1):
        size = flags(batch=batch, accumulate=8 // batch)
        jobs[f"trl {batch} x {8 // batch}"] = [*theirs, *size]
    jobs["trl 1 x 8, recompute"] = [*jobs["trl 1 x 8"], "--recompute"]
    for tokens in (1024, 2048):
        own = ours(folder, "reward", data=f"{folder}/reward.jsonl", rows=8, tokens=tokens)
        jobs[f"nanopost --tokens {tokens}"] = ["train_rm.py", *shared, *own]
    jobs["nanopost --tokens 1024, recompute"] = [*jobs["nanopost --tokens 1024"], *RECOMPUTE]
    return jobs


def grpo_jobs(folder, name, steps):
    """8 prompts x 8 completions of up to 128 tokens, one optimizer step on them."""
    shared = flags(
        model=f"{folder}/{name}",
        data=f"{folder}/{name}.jsonl",
        steps=steps,
        lr=1e-5,
        weight_decay=0.0,
        group=8,
        max_new_tokens=128,
    )
    theirs = ["-m", "bench.trl_grpo", *shared]
    jobs = {
        "trl 16 x 4": [*theirs, *flags(batch=16, accumulate=4)],
        "trl 8 x 8": [*theirs, *flags(batch=8, accumulate=8)],
        "trl 8 x 8, recompute": [*theirs, *flags(batch=8, accumulate=8), "--recompute"],
    }
    reward = common.ROOT / "bench/reward.py:length_modulo_7"
    for tokens in (1024, 2048):
        own = ours(folder, name, prompts=8, minibatches=1, tokens=tokens, reward=reward)
        jobs[f"nanopost --tokens {tokens}"] = ["train_grpo.py", *shared, *own]
    jobs["nanopost --tokens 1024, recompute"] = [*jobs["nanopost --tokens 1024"], *RECOMPUTE]
    return jobs


def jobs_of(name, folder, steps, grpo_steps):
    """{job: command line}: those of ours begin with nanopost, the others with trl."""
    if name in ("sft", "sft_bf16"):
        return sft_jobs(folder, name, steps)
    if name == "dpo":
        return dpo_jobs(folder, steps)
    if name == "reward":
        return reward_jobs(folder, steps)
    return grpo_jobs(folder, name, grpo_steps)


# ---------------------------------------------------------------------------------------- measuring
def run(command) -> tuple[str, float]:
    """Run python with this command line -> (stdout, largest resident size in MB)."""
    environment = os.environ | common.OFFLINE | {"OMP_NUM_THREADS": str(THREADS)}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=common.ROOT,
            env=environment,
            stdout=out,
            stderr=errors,
            text=True,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{errors.read()[-3000:]}")
        return out.read(), usage.ru_maxrss / 1024


def imports_mb(command) -> float:
    script = command[:2] if command[0] == "-m" else command[:1]
    _, peak = run([*script, "--help"])
    return peak


def value_of(command, flag) -> str:
    return command[command.index(flag) + 1]


def measure(command) -> dict:
    """One run -> seconds and tokens of each step after the warm-up, its parts, and peak memory."""
    if "--cache" in command:  # like TRL, each run computes its own reference
        shutil.rmtree(value_of(command, "--cache"), ignore_errors=True)
    stdout, peak = run(command)
    if command[0] == "-m":
        result = json.loads(stdout.splitlines()[-1])
        names = [name for name in ("seconds", "tokens", "generate_seconds") if name in result]
        steps = {name: result[name] for name in names}
    else:
        steps = our_steps(value_of(command, "--out"))
    return {**{name: values[WARM:] for name, values in steps.items()}, "peak_mb": peak}


def our_steps(out) -> dict[str, list[float]]:
    logged = common.metrics(out)[1:]
    seen = [0, *(m["num_tokens"] for m in logged)]
    tokens = [after - before for before, after in zip(seen, seen[1:])]
    seconds = [n / m["tokens_per_second"] for n, m in zip(tokens, logged)]
    steps = {"seconds": seconds, "tokens": tokens}
    if "time/rollout" in logged[0]:
        steps["generate_seconds"] = [m["time/rollout"] for m in logged]
    return steps


def summary(rounds: list[dict], imports: float) -> dict:
    """Medians over the rounds: of the median step, of tokens over seconds, and of the peak."""
    median = statistics.median
    steps = [median(r["seconds"]) for r in rounds]
    speeds = [sum(r["tokens"]) / sum(r["seconds"]) for r in rounds]
    sizes = [statistics.mean(r["tokens"]) for r in rounds]
    result = {
        "step_seconds": median(steps),
        "tokens_per_second": median(speeds),
        "tokens_per_step": median(sizes),
        "peak_mb": median([r["peak_mb"] for r in rounds]) - imports,
        "imports_mb": imports,
        "rounds": rounds,
    }
    if "generate_seconds" in rounds[0]:
        result["generate_seconds"] = median([median(r["generate_seconds"]) for r in rounds])
    return result


def interleaved(jobs: dict, rounds: int) -> dict[str, dict]:
    """Run every job once a round, each round starting with another one -> {job: summary}."""
    names = list(jobs)
    runs = {name: [] for name in names}
    for k in range(rounds):
        first = k % len(names)
        for name in names[first:] + names[:first]:
            measured = measure(jobs[name])
            runs[name].append(measured)
            step = statistics.median(measured["seconds"])
            print(f"  round {k + 1}  {name:34s} {step:.3f} s", flush=True)
    return {name: summary(runs[name], imports_mb(jobs[name])) for name in names}


# ------------------------------------------------------------------------------------------- ratios
def ratio(jobs: dict, key: str, best=min) -> dict:
    """The best of ours against the best of TRL's; above 1: ours is better."""
    values = {name: job[key] for name, job in jobs.items()}
    mine = best((name for name in values if name.startswith("nanopost")), key=values.get)
    other = best((name for name in values if name.startswith("trl")), key=values.get)
    better_by = values[mine] / values[other]
    if best is min:
        better_by = 1 / better_by
    return {"ours": mine, "theirs": other, "better_by": better_by}


def ratios(name: str, jobs: dict) -> dict[str, dict]:
    if name == "dpo":
        precomputed = {n: job for n, job in jobs.items() if "precomputed" in n}
        frozen = {n: job for n, job in jobs.items() if n not in precomputed}
        return {
            "step, frozen": ratio(frozen, "step_seconds"),
            "peak, frozen": ratio(frozen, "peak_mb"),
            "step, precomputed": ratio(precomputed, "step_seconds"),
            "peak, precomputed": ratio(precomputed, "peak_mb"),
        }
    if name in ("sft", "sft_bf16"):
        default = "trl packed 8 x 512, recompute"
        against_default = {
            n: job for n, job in jobs.items() if n.startswith("nanopost") or n == default
        }
        return {
            "tokens_per_second": ratio(jobs, "tokens_per_second", max),
            "peak": ratio(jobs, "peak_mb"),
            "tokens_per_second, TRL's defaults": ratio(against_default, "tokens_per_second", max),
            "peak, TRL's defaults": ratio(against_default, "peak_mb"),
        }
    found = {"step": ratio(jobs, "step_seconds"), "peak": ratio(jobs, "peak_mb")}
    if name in ("equal", "ragged"):
        found["generation"] = ratio(jobs, "generate_seconds")
    return found


def with_aims(name: str, found: dict[str, dict]) -> dict[str, dict]:
    """The ratios of a work, those with an aim beside it."""
    result = {}
    for what, r in found.items():
        aim = AIMS[name].get(what)
        result[what] = r
        if aim is not None:
            result[what] = {**r, "aim": aim, "met": r["better_by"] >= aim}
    return result


def print_ratios(found: dict[str, dict]):
    for what, r in found.items():
        verdict = ""
        if "aim" in r:
            verdict = f", aim {r['aim']:g}: {'met' if r['met'] else 'missed'}"
        pair = f"({r['ours']}; {r['theirs']})"
        print(f"  {what}: {r['better_by']:.2f} x better{verdict}  {pair}")


def print_table(jobs: dict):
    for name, job in jobs.items():
        speed, step = job["tokens_per_second"], job["step_seconds"]
        parts = [f"  {name:34s} {speed:7,.0f} tokens/s", f"step {step:.3f} s"]
        if "generate_seconds" in job:
            parts.append(f"generate {job['generate_seconds']:.2f} s")
        parts.append(f"peak {job['peak_mb']:5,.0f} MB")
        print("  ".join(parts))


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--try", action="store_true", dest="tiny", help="write no results")
    parser.add_argument("--work", nargs="+", default=WORK, choices=WORK)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--grpo_steps", type=int, default=5)
    parser.add_argument("--out", default=common.RESULTS, type=Path, help="folder")
    args = parser.parse_args()
    if args.tiny:
        args.rounds, args.steps, args.grpo_steps = 1, WARM + 1, WARM + 1
    settings = {
        "model": "Qwen3, 4 layers, 256 wide, vocabulary 4,096, random weights",
        "device": "cpu",
        "threads": THREADS,
        "cores": os.cpu_count(),
        "optimizer": "AdamW (fused), gradient clipped at 1",
        "rounds": args.rounds,
        "warm-up steps": WARM,
        "steps": args.steps,
        "grpo_steps": args.grpo_steps,
    }
    packages = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers")
    origin = common.origin(*packages)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.work:
            print(name, flush=True)
            run(["-c", MAKE, folder, name])
            jobs = interleaved(jobs_of(name, folder, args.steps, args.grpo_steps), args.rounds)
            print_table(jobs)
            found = with_aims(name, ratios(name, jobs))
            print_ratios(found)
            if not args.tiny:
                own = {"precision": "bf16 over fp32 weights" if name == "sft_bf16" else "fp32"}
                result = {**origin, "settings": settings | own, "ratios": found, "jobs": jobs}
                common.save(args.out / f"cpu_{name}.json", result)


if __name__ == "__main__":
    main()
