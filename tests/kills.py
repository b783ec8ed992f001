"""Kills runs of all scripts at random moments, resumes them, and compares what they leave with runs
that were never killed, byte by byte.

    python tests/kills.py --kills 200 --seed 0       # about ten seconds a kill on two cores
    python tests/kills.py --kills 20 --arch qwen3_5  # of another architecture of the toy

Each run is on one or two ranks, or with --reproducible on one, two or four, drawn anew after each
kill. It trains all weights or adapters (--lora), and is killed up to four times, by SIGKILL,
SIGTERM or SIGINT, to the launcher or to one of its workers. After each kill no process of the run
may be left within a minute. Exits with 1 at the first difference.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts import ENVIRONMENT, SCRIPTS, command, metrics, weights  # noqa: E402

from runs import toy  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SHARED = ("--steps", 12, "--warmup", 0, "--lr", 1e-3, "--eval_every", 5, "--device", "cpu")
SAVES = ("--save_every", 3, "--keep", 2)
SAMPLES = ("--max_new_tokens", 6, "--prompts", 8)
REWARD = """
def ids(completions, completion_ids, **columns):
    return [sum(ids) % 10 / 10 for ids in completion_ids]
"""
OWN = {
    "train_sft.py": ("--rows", 16),
    "train_rm.py": ("--rows", 8),
    "train_dpo.py": ("--rows", 8, "--loss", "sigmoid", "sft"),
    "train_kto.py": ("--rows", 8),
    "train_online_dpo.py": (*SAMPLES, "--group", 2),
    "train_grpo.py": (*SAMPLES, "--group", 4, "--resample", 1, "--beta", 0.05),
    "train_ppo.py": (*SAMPLES, "--group", 2, "--score_scale", "--beta", 0.05),
    "train_distill.py": (*SAMPLES, "--beta", 0.4),
}


def write_data(folder, arch):
    toy.write_model(folder / "model", arch=arch)
    toy.write_model(folder / "teacher", seed=1, arch=arch)
    prompts = toy.prompt_rows(held_out=False)[:64]
    said = [{"role": "assistant", "content": row["answer"]} for row in prompts]
    wrong = [{"role": "assistant", "content": row["answer"] + "7"} for row in prompts]
    chats = [{"messages": [*row["prompt"], answer]} for row, answer in zip(prompts, said)]
    pairs = [
        {"prompt": row["prompt"], "chosen": [right], "rejected": [other]}
        for row, right, other in zip(prompts, said, wrong)
    ]
    labelled = [
        {"prompt": row["prompt"], "completion": [answer], "label": i % 2 == 0}
        for i, (row, answer) in enumerate(zip(prompts, said))
    ]
    for name, rows in (("prompts", prompts), ("chats", chats), ("pairs", pairs)):
        toy.write_rows(folder / f"{name}.jsonl", rows)
    toy.write_rows(folder / "labelled.jsonl", labelled)
    (folder / "reward.py").write_text(REWARD)


def data_of(script):
    special = {"train_sft.py": "chats", "train_rm.py": "pairs", "train_dpo.py": "pairs"}
    return {**special, "train_kto.py": "labelled"}.get(script, "prompts")


def start(folder, script, ranks, out, *more):
    flags = ("--model", folder / "model", "--data", folder / f"{data_of(script)}.jsonl")
    flags += ("--holdout", 8, "--out", out, *SHARED, *OWN[script], *SAVES, *more)
    if OWN[script][: len(SAMPLES)] == SAMPLES:
        flags += ("--reward", f"{folder}/reward.py:ids")
    if script == "train_distill.py":
        flags += ("--teacher", folder / "teacher")
    log = open(f"{out}.log", "a")
    return subprocess.Popen(
        command(script, *flags, ranks=0 if ranks == 1 else ranks),
        env=ENVIRONMENT,
        stdout=log,
        stderr=log,
    )


def workers(out) -> list[int]:
    """Process ids of the run in `out`, without its launcher."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(out).encode() in words and b"torch.distributed.run" not in words:
            found.append(int(path.parent.name))
    return sorted(found)


def remains(out):
    """What a run leaves, but for what a clock measures."""
    lines = metrics(out)
    for line in lines:
        for name in [n for n in line if n.startswith("time/") or n == "tokens_per_second"]:
            del line[name]
    samples = (out / "samples.jsonl").read_text()
    return {"weights": weights(out), "metrics": json.dumps(lines), "samples": samples}


def start_of(out):
    """Changes when a run in `out` begins to train."""
    path = out / "run.json"
    return path.stat().st_mtime_ns if path.exists() else None


def wait(process, seconds):
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def wait_until_gone(process, out, where):
    process.wait(90)
    deadline = time.monotonic() + 60
    while left := workers(out):
        assert time.monotonic() < deadline, f"{where}: processes are left: {left}"
        time.sleep(0.05)


def main(kills, seed, names, arch="qwen3"):
    draw, done, references = random.Random(seed), 0, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_data(folder, arch)
        for number in itertools.count():
            if done >= kills:
                break
            script, rank = draw.choice(names), draw.choice((0, 4))
            ranks = draw.choice(((1,), (2,), (1, 2, 4)))
            flags = ["--lora", rank]
            if len(ranks) > 1:
                flags += ["--reproducible"]
                # Two chunks of prompts, so that two ranks sample.
                flags += ["--prompts", 16] if "--prompts" in OWN[script] else []
            if (script, ranks, rank) not in references:
                out, began = folder / f"{script}-{len(references)}", time.monotonic()
                status = start(folder, script, ranks[-1], out, *flags).wait()
                assert status == 0, Path(f"{out}.log").read_text()[-3000:]
                trained = metrics(out)[-1]["time/elapsed"]
                whole = time.monotonic() - began
                references[script, ranks, rank] = remains(out), trained, whole
            expected, trained, whole = references[script, ranks, rank]
            out = folder / f"run-{number}"
            for _ in range(min(draw.randint(1, 4), kills - done)):
                before, now = start_of(out), draw.choice(ranks)
                process = start(folder, script, now, out, *flags, "--resume")
                if draw.random() < 0.8:  # while it trains
                    while start_of(out) == before and process.poll() is None:
                        time.sleep(0.01)
                    wait(process, 1.2 * draw.random() * trained)
                else:
                    wait(process, draw.random() * whole)
                which, whom = draw.choice(SIGNALS), draw.choice(("launcher", "worker"))
                targets = [process.pid] if whom == "launcher" else workers(out)[-1:]
                for pid in targets:
                    try:
                        signal.pidfd_send_signal(os.pidfd_open(pid), which)
                    except ProcessLookupError:
                        pass
                where = f"{script} {' '.join(map(str, flags))} on {now}, run {number}"
                where += f", {which.name} to its {whom}"
                wait_until_gone(process, out, where)
                done += 1
                step = metrics(out)[-1:] if (out / "metrics.jsonl").exists() else []
                print(f"{done}: {where}, after step {step[0]['step'] if step else '-'}", flush=True)
            status = start(folder, script, draw.choice(ranks), out, *flags, "--resume").wait()
            log = Path(f"{out}.log").read_text()
            assert status == 0, f"{where}: {log[-3000:]}"
            for name, content in remains(out).items():
                assert content == expected[name], f"{where}: other {name}"
    print(f"{done} kills, no difference")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS)
    parser.add_argument("--arch", default="qwen3", choices=toy.ARCHITECTURES)
    args = parser.parse_args()
    main(args.kills, args.seed, args.scripts, args.arch)
