"""A run's record: a line a step on stdout, metrics.jsonl, samples.jsonl, and run.json with what the run was."""

import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanopost import InputError
from nanopost.cli import refuse


def starts_of(out) -> list[dict]:
    """What run.json in `out` says of each start of its run; nothing where no run of these scripts wrote one."""
    try:
        starts = json.loads((Path(out) / "run.json").read_text())
    except (OSError, ValueError):
        return []
    return (
        starts
        if isinstance(starts, list) and all(isinstance(s, dict) and "args" in s for s in starts)
        else []
    )


class Logger:
    """Writes on rank 0 and does nothing elsewhere, so that no call site asks for the rank."""

    def __init__(self, out, rank: int, steps: int, shown: list[str], verbose: bool = False):
        """shown: names of the metrics on the printed line. verbose: say when each phase begins."""
        self.out, self.on, self.steps, self.shown, self.verbose = (
            Path(out),
            rank == 0,
            steps,
            shown,
            verbose,
        )
        self.began, self.first = None, 0

    def open(self, resumed_at: int | None, overwrite: bool, manifest: dict):
        """Begin a run, or go on from a checkpoint: what was logged after it will be logged again, so it goes.

        A run that is there is replaced only with overwrite, or if it ended before its first checkpoint. What no run of
        ours wrote, and what this run reads, is never replaced.
        """
        if not self.on:
            return
        args = manifest["args"]
        inputs = [
            args.get(name)
            for name in ("model", "reference_model", "value_model", "data", "eval_data")
        ]
        inputs += [
            spec.removeprefix("model:")
            for spec in args.get("reward") or []
            if spec.startswith("model:")
        ]
        out, names = (
            self.out.resolve(),
            ("value", "checkpoints", "metrics.jsonl", "samples.jsonl", "run.json"),
        )
        read = next(
            (
                path
                for path in filter(None, inputs)
                if (found := Path(path).resolve()) == out
                or any(found.is_relative_to(out / name) for name in names)
            ),
            None,
        )
        signs = ("checkpoints", "value", "config.json", "tokenizer.json", "*.safetensors")
        refuse(
            (
                read,
                f"--out {self.out}: this run reads {read}, which would be overwritten: choose another --out.",
            ),
            (
                not starts_of(self.out) and any(any(self.out.glob(sign)) for sign in signs),
                f"--out {self.out} holds what no run of these scripts wrote: choose another --out.",
            ),
        )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--out {self.out}: no folder can be made ({error.strerror}); choose another."
            ) from error
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.out / name
            if resumed_at is None and not overwrite and path.exists():
                raise InputError(
                    f"{self.out} already holds a run: add --resume to continue it, --overwrite to "
                    "replace it, or choose another --out."
                )
            lines = path.read_text().split("\n") if resumed_at is not None and path.exists() else []
            kept = [line for line in lines if _step(line) <= resumed_at]
            path.write_text("".join(line + "\n" for line in kept))
        if resumed_at is None and args.get("resume"):
            self.say(f"--resume: no checkpoint is in {self.out}, so the run begins anew")
        if (
            resumed_at is None
        ):  # what is left of the run that this one replaces would be taken for its own
            for folder in ("checkpoints", "value"):
                shutil.rmtree(self.out / folder, ignore_errors=True)
            (self.out / "config.json").unlink(missing_ok=True)
        else:
            self.say(f"resumed at step {resumed_at}")
        record = {
            "command": " ".join(sys.argv),
            "resumed_at": resumed_at,
            "git": _git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
            **manifest,
        }
        starts = starts_of(self.out) if resumed_at is not None else []
        beside = (
            self.out / "run.json.tmp"
        )  # renamed when whole: without run.json a folder is not ours
        beside.write_text(json.dumps([*starts, record], indent=1, default=str) + "\n")
        beside.replace(self.out / "run.json")

    def say(self, text: str):
        if self.on and text:
            print(text, flush=True)

    def phase(self, name: str, step: int):
        """With verbose, a line as each phase begins: where a hanging run hangs."""
        if self.verbose:
            self.say(f"# step {step} {name}")

    def log(self, step: int, metrics: dict[str, float]):
        """One object a step in metrics.jsonl, one line on stdout, with the time left."""
        if not self.on:
            return
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        now = time.monotonic()
        if self.began is None:
            self.began, self.first, left = now, step, ""
        else:
            left = f"  left {_duration((now - self.began) / max(1, step - self.first) * (self.steps - step))}"
        shown = [
            k
            for k in (*self.shown, *metrics)
            if k in metrics and (k in self.shown or k.startswith("eval/"))
        ]
        text = "  ".join(f"{k} {_number(metrics[k])}" for k in dict.fromkeys(shown))
        print(f"step {step}/{self.steps}  {text}{left}", flush=True)

    def say_change(self, before: dict[str, float], after: dict[str, float]):
        """What the run has made of the held-out metrics."""
        change = [
            f"{name} {value:.3f} -> {after[name]:.3f}"
            for name, value in before.items()
            if name in after
        ]
        if change:
            self.say(f"held out, before and after: {', '.join(change)}")

    def samples(self, step: int, rows: list[dict]):
        """Decoded text beside what was made of it, one object a line in samples.jsonl."""
        if self.on:
            with open(self.out / "samples.jsonl", "a") as file:
                file.writelines(
                    json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows
                )


def _step(line):
    """The step of a line, which a kill may have cut off: then it is later than any."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _number(x):
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}" if abs(x) < 1e-2 else f"{x:.3f}"


def _duration(seconds):
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}h{rest // 60:02d}m" if hours else f"{rest // 60}m{rest % 60:02d}s"


def _git_commit():
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True
    )
    return done.stdout.strip() or None
