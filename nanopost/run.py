"""A run's folder: run.json, metrics.jsonl, samples.jsonl, checkpoints/, records/, and the trained
model.

A Run never calls the loop and reads no flag by name. It writes only on rank 0, so no call site
asks for the rank.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from nanopost import InputError, checkpoint, dist, hf
from nanopost.batch import Example
from nanopost.terminal import printable
from nanopost.tokenizer import FILES

WRITTEN = ("value", "checkpoints", "records", "metrics.jsonl", "samples.jsonl", "run.json")
NOT_COMPARED = ("resume", "overwrite")


class Run:
    def __init__(self, out, world, steps: int, arguments: dict, show: list[str]):
        """arguments: all flags and values, for run.json. show: metrics for the printed line."""
        self.out = Path(out)
        self.rank, self.writes = world.rank, world.rank == 0
        self.steps, self.arguments, self.show = steps, arguments, show
        self.resumed = False
        self.clock = None  # (time, step) of the first line logged

    # ------------------------------------------------------------------------------------- start
    def start(
        self, model, optimizer, state: dict, resume: bool, overwrite: bool, about: dict, **others
    ) -> dict:
        """Begin a run, or resume one -> the state to begin from. A collective.

        state: {"step": 0, ...}, what a fresh run begins with. about: more for run.json. others:
        further models whose weights change over the run. An existing run is replaced only with
        overwrite, or if it was killed before its first checkpoint. Files that no script wrote, or
        that this run reads, are never replaced.
        """
        found = None
        if resume:
            if overwrite:
                raise InputError(
                    "--resume continues and --overwrite starts over: choose one of them."
                )
            found = self._to_resume()
        if found:
            state = state | checkpoint.load(found, model, optimizer, **others)
            self.resumed = True
        if self.writes:
            ended = (self.out / "config.json").exists()
            killed_early = resume and not ended and bool(starts_of(self.out))
            self._open(state["step"] if found else None, overwrite or killed_early, about)
        if resume and not found:
            self.say(f"--resume: no checkpoint in {self.out}, so the run starts from the beginning")
        if found:
            self.say(f"resumed at step {state['step']}")
        for change in changed_arguments(state.pop("args", self.arguments), self.arguments):
            self.say(f"resumed with a different {change}")
        return state

    def _to_resume(self) -> Path | None:
        """The newest checkpoint; None if the run was killed before its first. InputError if the run
        ended, went past its steps, or is another script's."""
        found = checkpoint.latest(self.out)
        last = {"step": 0, **(starts_of(self.out) or [{}])[-1]}
        if found:
            last = json.loads((found / "state.json").read_text(encoding="utf-8"))
        foreign = sorted(last.get("args", {}).keys() - self.arguments.keys())
        if foreign:
            raise InputError(
                f"--resume: {found or self.out} is another script's (with --{', --'.join(foreign)})"
                ": choose another --out."
            )
        if last["step"] > self.steps:
            raise InputError(
                f"--resume: {found} is past --steps {self.steps}: give {last['step']} or more."
            )
        if found is None and (self.out / "config.json").exists():
            raise InputError(
                f"--resume: {self.out} holds a run that ended and left no checkpoint "
                f"(--save_every): continue with --model {self.out} and another --out, or "
                "--overwrite it."
            )
        return found

    def _open(self, resumed_at: int | None, replace: bool, about: dict):
        """Prepare the folder. Lines logged after the checkpoint are removed, since they will be
        logged again."""
        self._check_free()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--out {self.out}: cannot make the folder ({error.strerror}); choose another."
            ) from error
        logs = [self.out / "metrics.jsonl", self.out / "samples.jsonl"]
        if resumed_at is None:
            if any(path.exists() for path in logs) and not replace:
                raise InputError(
                    f"{self.out} already holds a run: add --resume to continue it, --overwrite to "
                    "replace it, or choose another --out."
                )
            # What is left of the run that this one replaces would pass for its own.
            for folder in ("checkpoints", "records", "value"):
                shutil.rmtree(self.out / folder, ignore_errors=True)
            for path in (*logs, self.out / "config.json"):
                path.unlink(missing_ok=True)
        earlier = starts_of(self.out) if resumed_at is not None else []
        start = {
            "command": " ".join(sys.argv),
            "resumed_at": resumed_at,
            "git": _git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "args": self.arguments,
            **about,
        }
        # Renamed once complete: a folder without run.json is not ours.
        temporary = self.out / "run.json.tmp"
        text = json.dumps([*earlier, start], indent=1, default=str) + "\n"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.out / "run.json")
        for path in logs:
            lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
            kept = [line + "\n" for line in lines if _step_of(line) <= resumed_at]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(path)

    def _check_free(self):
        """InputError if the folder holds files that this run reads, or that no script wrote."""
        out = self.out.resolve()
        for path in _paths_read(self.arguments, self.out, starts_of(self.out)):
            read = Path(path).resolve()
            if read == out or any(read.is_relative_to(out / name) for name in WRITTEN):
                raise InputError(
                    f"--out {self.out}: this run reads {path}, which would be overwritten: choose "
                    "another --out."
                )
        signs = (*WRITTEN, *FILES, "config.json", "chat_template.jinja", "*.safetensors")
        if not starts_of(self.out) and any(any(self.out.glob(sign)) for sign in signs):
            raise InputError(
                f"--out {self.out} holds files that no run of these scripts wrote: choose another "
                "--out."
            )

    # ------------------------------------------------------------------------------- in the loop
    def due(self, step: int, every: int) -> bool:
        """Whether `step` is a multiple of `every` (0: never) or the last step."""
        return step == self.steps or (every > 0 and step % every == 0)

    def say(self, text: str):
        if self.writes and text:
            print(printable(text), flush=True)

    def log(self, step: int, metrics: dict[str, float]):
        """Write one object per step to metrics.jsonl, and one line with the time left to stdout."""
        if not self.writes:
            return
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        now = time.monotonic()
        left = ""
        if self.clock is None:
            self.clock = now, step
        else:
            per_step = (now - self.clock[0]) / max(1, step - self.clock[1])
            left = f"  left {_duration(per_step * (self.steps - step))}"
        evaluated = [name for name in metrics if name.startswith("eval/")]
        shown = [name for name in dict.fromkeys(self.show + evaluated) if name in metrics]
        text = "  ".join(f"{name} {_number(metrics[name])}" for name in shown)
        print(printable(f"step {step}/{self.steps}  {text}{left}"), flush=True)

    def samples(self, step: int, records: list[dict]):
        """Write decoded text and numbers about it to samples.jsonl, one object per line."""
        if self.writes:
            with open(self.out / "samples.jsonl", "a", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps({"step": step, **record}, ensure_ascii=False) + "\n")

    def record(self, step: int, examples: list[Example], about: dict, **columns: Iterable):
        """Write what a step was made of to records/, one file a step. A collective.

        The first line holds `about`, such as divisors. Then follows a line per example, rank by
        rank: ids, mask (1: trained), the example's own columns (aligned with its ids, or one
        number), and `columns`, one value per example. Floats are written with all their digits.
        """
        lines = []
        for i, e in enumerate(examples):
            line = {"rank": self.rank, "ids": e.ids.tolist(), "mask": e.mask.astype(int).tolist()}
            line |= {name: np.asarray(value).tolist() for name, value in e.columns.items()}
            lines.append(line | {name: values[i] for name, values in columns.items()})
        lines = [{"step": step, **about}, *dist.gather(lines)]
        if self.writes:
            path = self.out / "records" / f"{step:06d}.jsonl"
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_suffix(".tmp")
            text = "".join(json.dumps(line) + "\n" for line in lines)
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)

    def save(self, step: int, model, optimizer, state: dict, **others):
        """Write a checkpoint to resume from, and delete the one before it. A collective.

        Does nothing at the last step, when the trained model itself is written.
        """
        if step < self.steps:
            state = {**state, "args": self.arguments}
            checkpoint.save(self.out, step, model, optimizer, state, **others)

    # --------------------------------------------------------------------------------------- end
    def export(self, named_tensors, config, files: dict, part: str = ""):
        """Write a model for transformers and vLLM to the folder, or its subfolder `part`. A
        collective.

        named_tensors, config, files: see hf.save_model.
        """
        hf.save_model(self.out / part, named_tensors, config, files, write=self.writes)
        self.say(f"the model is in {self.out / part}")

    def finish(self):
        """Print the held-out metrics before and after, and leave the process group."""
        if self.writes:
            text = (self.out / "metrics.jsonl").read_text(encoding="utf-8")
            lines = [json.loads(x) for x in text.splitlines()]
            evaluated = [x for x in lines if any(name.startswith("eval/") for name in x)]
            if len(evaluated) > 1:
                first, last = evaluated[0], evaluated[-1]
                names = [n for n in first if n.startswith("eval/") and n in last]
                change = [f"{name} {first[name]:.3f} -> {last[name]:.3f}" for name in names]
                self.say(f"held out, before and after: {', '.join(change)}")
        dist.finish()


def starts_of(out) -> list[dict]:
    """What run.json in `out` says about each start of its run; [] if no script wrote one."""
    try:
        starts = json.loads((Path(out) / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if isinstance(starts, list) and all(isinstance(s, dict) and "args" in s for s in starts):
        return starts
    return []


def changed_arguments(saved: dict, now: dict) -> list[str]:
    """What differs in the flags of a resumed run: ["lr: 0.001 -> 0.002", ...]."""
    names = [name for name in {**saved, **now} if name not in NOT_COMPARED]
    return [f"{n}: {saved.get(n)} -> {now.get(n)}" for n in names if saved.get(n) != now.get(n)]


def _paths_read(arguments, out: Path, starts: list[dict]) -> list[str]:
    """The values of flags that name something on disk, whatever the flag: a fork's flags too.

    A flag that the run in `out` was started with names nothing in there, even if it reads like it
    (--loss ipo --out ipo).
    """
    known = starts[-1]["args"] if starts else {}
    old = _texts(value for name, value in arguments.items() if value == known.get(name))
    new = _texts(value for name, value in arguments.items() if value != known.get(name))
    if not any(Path(text) == out for text in old):
        itself = next((text for text in new if Path(text) == out), None)
        if itself is not None:
            new.remove(itself)  # the flag that names the folder; a second one is something read
    return [text for text in new if os.path.exists(text)]


def _texts(values) -> list[str]:
    """Strings and paths among the values of flags, those in lists too, without "model:"."""
    flat = []
    for value in values:
        flat += value if isinstance(value, (list, tuple)) else [value]
    named = [str(value) for value in flat if isinstance(value, (str, Path))]
    return [text.removeprefix("model:") for text in named if text]


def _step_of(line):
    """A line's step; infinite for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


def _number(x):
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.3g}" if abs(x) < 1e-2 else f"{x:.3f}"


def _duration(seconds):
    hours, rest = divmod(int(seconds), 3600)
    if hours:
        return f"{hours}h{rest // 60:02d}m"
    return f"{rest // 60}m{rest % 60:02d}s"


def _git_commit():
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None
