"""Kills trainers and vLLM servers at random moments, and checks that no prompt is lost or doubled.

    NANOPOST_VLLM_PYTHON=PYTHON python tests/vllm_kills.py --kills 20 --seed 0  # half a minute each

Runs of train_grpo.py on one or two ranks sample on two real servers. A kill hits the trainer
(SIGKILL, SIGTERM or SIGINT, to the launcher or a worker), which is then resumed, or a server
(SIGKILL, or SIGSTOP for a while), which is then started again. The records of a run must name, step
by step, the prompts of a run that was never killed, each as often. No process of a run may be left
within a minute, no file in /dev/shm, and no server paused. Exits with 1 at the first difference.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vllm_servers  # noqa: E402
from kills import REWARD, SIGNALS, start_of, wait, wait_until_gone, workers  # noqa: E402
from scripts import ENVIRONMENT, command, metrics  # noqa: E402

from nanopost.server import Server  # noqa: E402
from runs import toy  # noqa: E402

STEPS, MAX_PAUSE = 24, 15
FLAGS = ("--steps", STEPS, "--warmup", 0, "--lr", 1e-3, "--eval_every", 0, "--device", "cpu")
FLAGS += ("--prompts", 8, "--group", 4, "--max_new_tokens", 6, "--holdout", 8, "--record")
FLAGS += ("--save_every", 1, "--keep", 2)


class Pair:
    """Two real servers of one model, each on a port of its own."""

    def __init__(self, folder, logs):
        self.folder, self.logs = folder, logs
        self.ports = [vllm_servers.free_port() for _ in range(2)]
        self.running = [None, None]
        for i in range(2):
            self.launch(i)
        for i in range(2):
            self.wait(i)

    def launch(self, i):
        flags = ("--max_pause", MAX_PAUSE)
        log = self.logs / f"server{i}.log"
        self.running[i] = vllm_servers.launch(self.folder, self.ports[i], *flags, log=log)

    def wait(self, i):
        vllm_servers.wait(self.running[i], self.ports[i], self.logs / f"server{i}.log")

    def kill(self, i):
        vllm_servers.stop(self.running[i])

    def restart(self, i):
        self.kill(i)
        self.launch(i)
        self.wait(i)

    def signal(self, i, number):
        os.killpg(self.running[i].pid, number)

    def url(self, i):
        return f"http://127.0.0.1:{self.ports[i]}"

    def direct(self, i) -> Server:
        return Server(self.url(i), 60.0)

    def wait_until_usable(self):
        """Both answer, and neither stays paused for longer than --max_pause."""
        for i in range(2):
            self.wait(i)
        deadline = time.monotonic() + MAX_PAUSE + 30
        for i in range(2):
            while self.direct(i).get("/is_paused")["is_paused"]:
                assert time.monotonic() < deadline, f"{self.url(i)} is still paused"
                time.sleep(0.2)

    def stop(self):
        for i in range(2):
            self.kill(i)


def write_data(folder):
    vllm_servers.write_model(folder / "model")
    toy.write_rows(folder / "prompts.jsonl", toy.prompt_rows(held_out=False)[:64])
    (folder / "reward.py").write_text(REWARD)


def start(folder, ranks, out, *more):
    """A run of train_grpo.py on prompts of `folder`."""
    flags = ("--model", folder / "model", "--data", folder / "prompts.jsonl", "--out", out)
    flags += ("--reward", f"{folder}/reward.py:ids", *FLAGS, *more)
    log = open(f"{out}.log", "a")
    line = command("train_grpo.py", *flags, ranks=0 if ranks == 1 else ranks)
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=log, stderr=log)


def prompts_of(out) -> list[Counter]:
    """How often each step has which prompt."""
    steps = []
    for path in sorted((out / "records").glob("[0-9]*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        steps.append(Counter(tuple(row["ids"][: row["mask"].index(1)]) for row in rows))
    return steps


def expected(folder) -> list[Counter]:
    """What prompts_of must be: that of a run with the native engine. It does not depend on ranks,
    weights or what was sampled."""
    out = folder / "native"
    if not out.exists():
        assert start(folder, 1, out).wait(600) == 0, Path(f"{out}.log").read_text()[-3000:]
    return prompts_of(out)


def check(out, prompts, log):
    assert prompts_of(out) == prompts, f"{out}: prompts are lost or doubled: {log}"
    assert [line["step"] for line in metrics(out)] == list(range(STEPS + 1)), out
    assert (out / "model.safetensors").exists()


def nothing_is_left():
    left = [path.name for path in Path("/dev/shm").iterdir() if "nanopost" in path.name]
    assert not left, f"in /dev/shm: {left}"


def main(kills, seed, folder, pair):
    draw, done, number = random.Random(seed), 0, 0
    prompts = expected(folder)
    urls = ("--vllm", *(pair.url(i) for i in range(2)), "--vllm_timeout", 8)
    while done < kills:
        ranks, out = draw.choice((1, 2)), folder / f"run-{number}"
        number += 1
        trainer, where = None, out.name
        for _ in range(min(draw.randint(1, 4), kills - done)):
            before = start_of(out)
            if trainer is None:
                pair.wait_until_usable()
                trainer = start(folder, ranks, out, *urls, "--resume")
                while start_of(out) == before and trainer.poll() is None:
                    time.sleep(0.01)
            victim = draw.choice(("launcher", "worker", "server", "server stops"))
            i = draw.choice((0, 1))
            if victim.startswith("server"):  # the trainer needs one of them
                pair.wait(1 - i)
                wait(trainer, 3)  # for a sync with it
            wait(trainer, 6 * draw.random())
            if trainer.poll() == 0:
                break
            done += 1
            step = metrics(out)[-1:] if (out / "metrics.jsonl").exists() else []
            where = f"run {number} on {ranks} ranks, after step {step[0]['step'] if step else '-'}"
            if victim in ("launcher", "worker"):
                which = draw.choice(SIGNALS)
                pids = [trainer.pid] if victim == "launcher" else workers(out)[-1:]
                for pid in pids:
                    try:
                        signal.pidfd_send_signal(os.pidfd_open(pid), which)
                    except ProcessLookupError:
                        pass
                wait_until_gone(trainer, out, where)
                nothing_is_left()
                trainer = None
            else:
                which = (signal.SIGKILL, signal.SIGSTOP)[victim == "server stops"]
                if which == signal.SIGKILL:
                    pair.kill(i)
                    pair.launch(i)
                else:
                    pair.signal(i, signal.SIGSTOP)
                    wait(trainer, 12)
                    pair.signal(i, signal.SIGCONT)
            print(f"{done}: {where}: {which.name} to {victim}", flush=True)
        for _ in range(3):
            if trainer is None:
                pair.wait_until_usable()
                trainer = start(folder, ranks, out, *urls, "--resume")
            status = trainer.wait(300)
            log = Path(f"{out}.log").read_text()
            # Both servers may have been dead, one of them until its next sync.
            if status == 0 or "error: no server of --vllm" not in log[-3000:]:
                break
            print(f"run {number}: no server was left, so it is resumed", flush=True)
            trainer = None
        assert status == 0, f"{where}: {log[-3000:]}"
        check(out, prompts, log[-3000:])
        nothing_is_left()
        pair.wait_until_usable()
    print(f"{done} kills in {number} runs, no prompt lost or doubled")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_data(folder)
        pair = Pair(folder / "model", folder)
        try:
            main(args.kills, args.seed, folder, pair)
        finally:
            pair.stop()
