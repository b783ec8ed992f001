"""A run's folder: run.json, metrics.jsonl, samples.jsonl, alarms.jsonl, checkpoints/, records/, and
the trained model.

A Run never calls the loop and reads no flag by name. It writes only on rank 0, so no call site
asks for the rank.
"""

import copy
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch

from nanopost import InputError, checkpoint, dist, hf, lora, manifest, moe, recording
from nanopost.alarms import Alarms
from nanopost.batch import Example
from nanopost.boards import Boards
from nanopost.save import carried_hash, save_adapter, save_model, to_disk
from nanopost.storage import read_json
from nanopost.tape import Tape
from nanopost.terminal import printable
from nanopost.tokenizer import FILES

LOGS = ("metrics.jsonl", "samples.jsonl", "alarms.jsonl")
WRITTEN = (
    "value",
    "adapter",
    "checkpoints",
    "records",
    "tensorboard",
    "wandb",
    *LOGS,
    "run.json",
)
MODEL = (*FILES, "config.json", "nanopost.json", "chat_template.jinja", "*.safetensors")
NOT_COMPARED = ("resume", "overwrite")
AGAIN_AFTER = 2.0  # seconds: an earlier signal is the same one
SEEN_WITHIN = 10.0  # seconds until what rank 0 writes is seen by all ranks
WIDTH = 100  # columns of a printed step, at most
PACES = 50  # steps whose mean pace tells the time left
ALARM = 1000  # why a run stops, where it is no signal
ALARMED = 3  # the exit status then, of which torchrun makes 1


class Clock:
    """The seconds of a step's parts: lap after lap, from when it is made."""

    def __init__(self):
        self.began = self.last = time.perf_counter()
        self.seconds = {}

    def lap(self, name: str):
        """The part that ends here."""
        now = time.perf_counter()
        self.seconds[f"time/{name}"] = now - self.last
        self.last = now

    def metrics(self, tokens: float) -> dict[str, float]:
        """time/* of the laps and of the step so far, in which there were so many tokens."""
        seconds = time.perf_counter() - self.began
        return {**self.seconds, "time/step": seconds, "tokens_per_second": tokens / seconds}


class Run:
    def __init__(
        self,
        out,
        world,
        steps: int,
        arguments: dict,
        show: list[str],
        keep: int = 2,
        alarms: str = "warn",
        boards: Boards | None = None,
    ):
        """arguments: all flags and values, for run.json. show: metrics for the printed line, the
        most important first. keep: checkpoints to keep. alarms: warn, stop or off. boards: where
        metrics are shown, too."""
        self.out, self.world = Path(out), world
        self.rank, self.writes = world.rank, world.rank == 0
        self.steps, self.arguments, self.show, self.keep = steps, arguments, show, keep
        self.resumed = False
        self.logged = deque(maxlen=PACES)  # (time, step) of the last lines
        self.began = self.saved_at = time.monotonic()
        self.signal = 0  # that this process has got
        self.stop = 0  # the signal that all ranks have agreed to stop for, or ALARM
        self.on_alarm, self.alarms = alarms, Alarms()
        self.alarmed = 0  # ALARM, if one is to stop the run
        self.boards = boards or Boards(out)
        self.hashes = {}  # of the files that flags name
        self.bases = {}  # of the folders whose weights adapters leave untouched
        self.carried = {}  # of what models carry from the folders that they were loaded from
        self.model = None  # the model
        self.state = None  # the loop's own, which it changes
        self.boundary = None  # (step, state, random state) while the weights are as of that step

    # ------------------------------------------------------------------------------------- start
    def start(
        self, model, optimizer, state: dict, resume: bool, overwrite: bool, about: dict, **others
    ) -> dict:
        """Begin a run, or resume one -> the state to begin from. A collective.

        state: {"step": 0, ...}, what a fresh run begins with. about: more for run.json. others:
        further models whose weights change over the run. An existing run is replaced only with
        overwrite, if it was killed before its first checkpoint, or if it trained nothing. Files
        that no script wrote, or that this run reads, are never replaced. A dry run, on the meta
        device, begins nothing.
        """
        if resume and overwrite:
            raise InputError("--resume continues and --overwrite starts over: choose one of them.")
        if self.world.device.type == "meta":  # a dry run: nothing is written
            self._check_free()
            return state
        if self.writes:
            self._check_free()
            self._lock()
        self._check_seen()
        found = self._to_resume() if resume else None
        hashes = manifest.file_hashes(self.arguments) if self.writes else {}
        bases = _bases(model) if self.writes else {}
        carried = _carried(model) if self.writes else {}
        meaning = lora.meaning(model)
        if found:
            saved = read_json(found / "state.json").get("adapters", meaning)
            if changed := changed_arguments(saved, meaning):
                raise InputError(
                    f"--resume: adapters go on as they began, but {'; '.join(changed)}: give the "
                    "flags of the run, or --overwrite it."
                )
            state = state | checkpoint.load(found, model, optimizer, **others)
            self.resumed = True
        saved_hashes = state.pop("hashes", hashes)
        saved_arguments = state.pop("args", self.arguments)
        state.pop("adapters", None)
        saved_bases = state.pop("bases", bases)
        saved_carried = state.pop("carried", carried)
        if self.writes and sorted(saved_bases.values()) != sorted(bases.values()):
            raise InputError(
                f"--resume: the checkpoints hold adapters alone; {' and '.join(bases)} no longer "
                f"has the weights that they belong to (then: {' and '.join(saved_bases)}): restore "
                "that folder, or --overwrite the run."
            )
        if self.writes and sorted(saved_carried.values()) != sorted(carried.values()):
            raise InputError(
                f"--resume: the weights beside the language model, which are saved with it, are "
                f"not those that the run began with ({' and '.join(saved_carried or carried)}): "
                "restore that folder, or --overwrite the run."
            )
        logged_step = -1
        if self.writes:
            ended = (self.out / "config.json").exists()
            killed_early = resume and not ended and bool(starts_of(self.out))
            replace = overwrite or killed_early or self._trained_nothing()
            resumed_at = state["step"] if found else None
            if not found and not replace:
                self._check_new()
            logged_step = _last_step(self.out / "metrics.jsonl")
            self.boards.connect(self.arguments, bool(found))
            self._open(resumed_at, {"hashes": hashes, **about})
            self.hashing = threading.Thread(target=self._hash_models, args=(bases,), daemon=True)
            self.hashing.start()
            logged = read_log(self.out / "metrics.jsonl")
            for line in logged if self.on_alarm != "off" else []:
                self.alarms.add(line)  # said already
            failed = self.boards.start(logged, read_log(self.out / "alarms.jsonl"))
            self.say(self._header(model, self.boards.where))
            self.say(failed)
        if resume and not found:
            self.say(f"--resume: no checkpoint in {self.out}, so the run starts from the beginning")
        if found:
            again = ""
            if logged_step > state["step"]:
                again = f"; what was logged after it, to step {logged_step}, is done again"
            self.say(f"resumed at step {state['step']}{again}")
        for change in changed_arguments(saved_arguments, self.arguments):
            self.say(f"resumed with a different {change}")
        for path in hashes:
            if saved_hashes.get(path, hashes[path]) != hashes[path]:
                self.say(f"WARNING: {path} has changed since the run started")
        self.hashes, self.bases, self.carried = hashes, bases, carried
        self.model = model
        self.say(lora.summary(model))
        self.say(moe.no_auxiliary_loss(model))
        self._watch(model, optimizer, state, others)
        return state

    def _header(self, model, shown) -> str:
        """What trains, and what is written where."""
        size = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        folders = {m.folder: 0 for m in model.modules() if getattr(m, "folder", "")}
        part = "all of them" if trained == size else f"{trained:,} of them"
        dtype = str(self.world.dtype).removeprefix("torch.")
        where = f"{self.world.size} rank{'s' * (self.world.size > 1)} on {self.world.device.type}"
        memory = _memory_in_use(self.world.device) / 2**30
        lines = [
            f"{' and '.join(folders) or 'model'}: {size:,} parameters, {part} trained, in {dtype} "
            f"on {where}; {memory:,.1f} GiB in use",
            f"writes to {self.out}: metrics, samples and alarms (.jsonl), checkpoints/, the model",
        ]
        if shown:
            lines.append(f"shows it in {shown}")
        return "\n".join(lines)

    def _lock(self):
        """Lock OUT/.lock until this process ends, however it ends. InputError if another has it."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "a+", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"--out {self.out}: cannot make the folder ({error.strerror}); choose another."
            ) from error
        try:
            # Not flock: a process that a reward forks would inherit that lock. This one is lost
            # when the process closes the file, so it is opened once.
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.lock.seek(0)
            raise InputError(
                f"--out {self.out}: {self.lock.read() or 'another process'} is running in it: wait "
                "for it, stop it, or choose another --out."
            ) from error
        except OSError as error:
            self.say(f"{self.out} cannot be locked ({error.strerror}): start no second run in it")
        self.holder = f"process {os.getpid()} on {platform.node()}, since {time.ctime()},"
        self.lock.truncate(0)
        self.lock.write(self.holder)
        self.lock.flush()

    def _check_seen(self):
        """InputError on all ranks if one does not see what rank 0 has written. A collective."""
        lock = self.out / ".lock"
        written = "".join(dist.gather([self.holder] if self.writes else []))
        deadline = time.monotonic() + SEEN_WITHIN
        seen = self.writes or not written or _is_text(lock, written)
        while not seen and time.monotonic() < deadline:
            time.sleep(0.1)
            seen = _is_text(lock, written)
        blind = dist.gather([] if seen else [f"rank {self.rank} on {platform.node()}"])
        if blind:
            raise InputError(
                f"--out {self.out}: {', '.join(blind)} cannot see what rank 0 writes there: choose "
                "a folder on a disk that all nodes share."
            )

    def _to_resume(self) -> Path | None:
        """The newest sound checkpoint; None if the run was killed before its first. InputError if
        the run ended, went past its steps, or is another script's. A collective."""
        found, damaged = None, []
        for path in reversed(checkpoint.complete(self.out)):
            damage = checkpoint.damage(path)
            if not damage:
                found = path
                break
            self.say(f"WARNING: --resume skips {path}: {damage}")
            damaged.append(path)
        if damaged and not found:
            raise InputError(
                f"--resume: every checkpoint in {self.out} is damaged: --overwrite starts over."
            )
        last = {"step": 0, **(starts_of(self.out) or [{}])[-1]}
        if found:
            last = read_json(found / "state.json")
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
        for path in damaged if self.writes else []:  # these steps will be saved again
            shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
            path.rename(path.with_suffix(".damaged"))
        return found

    def _trained_nothing(self) -> bool:
        """Whether the run in the folder failed in its first step, with nothing to lose."""
        started = bool(starts_of(self.out))
        kept = checkpoint.latest(self.out) or (self.out / "config.json").exists()
        return started and not kept and _last_step(self.out / "metrics.jsonl") < 1

    def _check_new(self):
        """InputError if the folder holds a run."""
        if any((self.out / name).exists() for name in LOGS):
            raise InputError(
                f"{self.out} already holds a run: add --resume to continue it, --overwrite to "
                "replace it, or choose another --out."
            )

    def _open(self, resumed_at: int | None, about: dict):
        """Prepare the folder. Lines logged after the checkpoint are removed, since they will be
        logged again."""
        logs = [self.out / name for name in LOGS]
        if resumed_at is None:
            # What is left of the run that this one replaces would pass for its own.
            checkpoint.delete(self.out)
            for folder in ("records", "value", "adapter", "tensorboard", "wandb"):
                if folder not in self.boards.folders:
                    shutil.rmtree(self.out / folder, ignore_errors=True)
            for path in (*logs, self.out / "config.json"):
                path.unlink(missing_ok=True)
        earlier = starts_of(self.out) if resumed_at is not None else []
        if resumed_at is not None and not earlier:
            self.say(f"{self.out}/run.json is missing or cut off: a new one starts here")
        threads = (earlier or [{}])[-1].get("threads", torch.get_num_threads())
        if threads != torch.get_num_threads():
            self.say(
                f"WARNING: resumed with {torch.get_num_threads()} threads per rank, not {threads}: "
                f"rounding differs (OMP_NUM_THREADS={threads} for the same bytes)"
            )
        start = {"resumed_at": resumed_at, **manifest.manifest(self.arguments), **about}
        # Renamed once complete: a folder without run.json is not ours.
        _replace(self.out / "run.json", json.dumps([*earlier, start], indent=1, default=str) + "\n")
        for path in logs:
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            lines = text.split("\n") if resumed_at is not None else []
            kept = [line + "\n" for line in lines if _number_of(line, "step") <= resumed_at]
            _replace(path, "".join(kept))
            if kept and path == logs[0]:
                self.began -= _number_of(kept[-1], "time/elapsed", 0.0)

    def _hash_models(self, bases):
        """Add hashes of the models that flags name to run.json. In a thread, since many GB take a
        minute."""
        hashes = manifest.model_hashes(self.arguments, self.out, bases)
        starts = starts_of(self.out)
        if starts and hashes:
            starts[-1]["hashes"] |= hashes
            _replace(self.out / "run.json", json.dumps(starts, indent=1, default=str) + "\n")

    def _check_free(self):
        """InputError if the folder holds files that this run reads, or that no script wrote."""
        out = self.out.resolve()
        paths = _paths_read(self.arguments, self.out, starts_of(self.out))
        for path in [*paths, *(lora.base_folder(path) for path in paths)]:  # of an adapter
            read = Path(path).resolve()
            in_model = read.parent == out and any(read.match(name) for name in MODEL)
            written = any(read.is_relative_to(out / name) for name in WRITTEN)
            if read == out or written or in_model:
                raise InputError(
                    f"--out {self.out}: this run reads {path}, which would be overwritten: choose "
                    "another --out."
                )
        ours = starts_of(self.out) or checkpoint.complete(self.out)  # run.json may be cut off
        if not ours and any(any(self.out.glob(sign)) for sign in (*WRITTEN, *MODEL)):
            raise InputError(
                f"--out {self.out} holds files that no run of these scripts wrote: choose another "
                "--out."
            )

    # -------------------------------------------------------------------------- signals and errors
    def _watch(self, model, optimizer, state, others):
        """From here on, SIGTERM and SIGINT (Ctrl-C) save and stop after a step, and an error saves
        what it can."""
        self.trained, self.state = (model, optimizer, others), state
        optimizer.register_step_pre_hook(self._weights_change)
        self._mark(state["step"])
        self.saved_at = time.monotonic()
        dist.last_words = self._last_words
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._on_signal)
            os.register_at_fork(after_in_child=_forget_the_run)

    def _mark(self, step):
        """The weights are as of the end of `step`. What else a checkpoint needs is copied, since
        the next step changes it at once."""
        self.boundary = step, copy.deepcopy(self.state), checkpoint.random_state()

    def _weights_change(self, *_):
        self.boundary = None

    def _on_signal(self, number, _):
        if self.signal and time.monotonic() - self.signal_at < AGAIN_AFTER:
            return  # one event, told by terminal and launcher
        if self.signal:
            raise KeyboardInterrupt
        self.signal_at = time.monotonic()
        self.signal = number
        if self.writes:  # no print: it may be what the signal has interrupted
            name = signal.Signals(number).name
            os.write(2, f"{name}: saves and stops after this step; again: stops now\n".encode())

    def _last_words(self) -> str:
        """What --resume continues from after an error."""
        said = self._save_the_last_step()
        try:
            self.boards.close(failed=True)  # may take long, so after what must not be lost
        except KeyboardInterrupt:
            pass
        return said

    def _save_the_last_step(self) -> str:
        """If the weights are still as of the end of a step, and no other rank is needed -> what
        --resume continues from."""
        failed = ""
        if self.boundary and self.boundary[0] > 0 and torch.distributed.get_world_size() == 1:
            step, state, drawn = self.boundary
            try:
                self._save(step, state, drawn)
            except Exception as error:
                failed = f"step {step} could not be saved ({error}); "
        newest = checkpoint.latest(self.out)
        if newest:
            return f"{failed}--resume continues after step {checkpoint.step_of(newest)}"
        if self._trained_nothing():
            return f"{failed}nothing was trained yet: correct it, then run the same command again"
        return f"{failed}no checkpoint was written yet: --resume starts from the beginning"

    def _save(self, step, state, drawn=None):
        model, optimizer, others = self.trained
        record = {**state, "args": self.arguments, "hashes": self.hashes}
        record |= {"bases": self.bases, "carried": self.carried, "adapters": lora.meaning(model)}
        checkpoint.save(self.out, step, model, optimizer, record, self.keep, drawn, **others)

    # ------------------------------------------------------------------------------- in the loop
    def due(self, step: int, every: int) -> bool:
        """Whether `step` is a multiple of `every` (0: never) or the last step."""
        return step == self.steps or (every > 0 and step % every == 0)

    def due_save(self, step: int, every: int, minutes: float) -> bool:
        """Whether to save after `step`: it is due, the last save is `minutes` ago (0: no limit),
        a rank has been told to stop, or an alarm stops the run. A collective: all ranks get the
        same answer."""
        self._mark(step)
        late = 0 < 60 * minutes < time.monotonic() - self.saved_at
        late, self.stop = map(int, dist.all_max(late, self.signal or self.alarmed))
        return self.due(step, every) or bool(late or self.stop)

    def say(self, text: str):
        if self.writes and text:
            print(printable(text), flush=True)

    def log(self, step: int, metrics: dict[str, float]):
        """Write one object per step to metrics.jsonl, and one line with the time left to stdout.

        time/elapsed: seconds since the run began; what a resumed run spent before its checkpoint
        counts. A model with experts adds moe.load_metrics of its training since the last line. A
        collective then.
        """
        if self.model is not None:
            metrics = metrics | moe.load_metrics(self.model)
        if not self.writes:
            return
        now = time.monotonic()
        record = {"step": step, **metrics, "time/elapsed": round(now - self.began, 3)}
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        left = ""
        if self.logged:  # a mean: evaluations and saves count as often as they come
            began, first = self.logged[0]
            pace = (now - began) / max(1, step - first)
            left = f"left {_duration(pace * (self.steps - step))}"
        if step > 0:  # from the end of this process's first step, whose warm-up is left out
            self.logged.append((now, step))
        shown = [f"{name} {_number(metrics[name])}" for name in self.show if name in metrics]
        evaluated = [name for name in metrics if name.startswith("eval/") and name not in self.show]
        held_out = [f"{name} {_number(metrics[name])}" for name in evaluated]
        number = f"step {step:{len(str(self.steps))}}/{self.steps}"
        print(printable(step_text(number, shown, held_out, left)), flush=True)
        self.say(self.boards.log(step, record))
        for alarm in self.alarms.add(record) if self.on_alarm != "off" else []:
            self._sound(alarm)

    def _sound(self, alarm):
        """Say an alarm, write it to alarms.jsonl, and stop after this step if alarms do."""
        with open(self.out / "alarms.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(alarm) + "\n")
        self.say(f"ALARM {alarm['alarm']}, step {alarm['step']}: {alarm['message']}")
        self.say(self.boards.alarm(alarm["step"], alarm["alarm"], alarm["message"]))
        if self.on_alarm == "stop":
            self.alarmed = ALARM

    def samples(self, step: int, records: list[dict]):
        """Write decoded text and numbers about it to samples.jsonl, one object per line."""
        if self.writes:
            with open(self.out / "samples.jsonl", "a", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps({"step": step, **record}, ensure_ascii=False) + "\n")

    def record(self, step: int, examples: list[Example], about: dict, tape: Tape, **columns):
        """Write what a step was made of to records/, one file a step. A collective.

        The first line holds `about`, such as divisors, and updates, an entry per optimizer step of
        the tape. Then follows a line per example, rank by rank: ids, mask (1: trained), kept (a
        list for each id, of the ids that a cut kept; only if there was a cut), routes (the experts
        of each id, see recording.encoded; only if the engine named them), the example's own columns
        and the tape's (aligned with its ids, or one number; see Tape.take), and `columns`,
        one value per example. Floats are written with all their digits.
        """
        updates, passed = tape.take(examples)
        lines = []
        for i, e in enumerate(examples):
            line = {"rank": self.rank, "ids": e.ids.tolist(), "mask": e.mask.astype(int).tolist()}
            if e.kept is not None:
                line["kept"] = [ids.tolist() for ids in e.kept]
            if e.routes is not None:
                line["routes"] = recording.encoded(e.routes)
            line |= {name: np.asarray(value).tolist() for name, value in e.columns.items()}
            for name, value in passed[i].items():
                line[name] = value.tolist() if isinstance(value, np.ndarray) else value
            for name, values in columns.items():
                line[name] = values[i * len(values) // len(examples)]
            lines.append(line)
        lines = [{"step": step, **about, "updates": updates}, *dist.gather(lines)]
        if self.writes:
            path = self.out / "records" / f"{step:06d}.jsonl"
            path.parent.mkdir(exist_ok=True)
            _replace(path, "".join(json.dumps(line) + "\n" for line in lines))

    def save(self, step: int, model, optimizer, state: dict, **others):
        """Write a checkpoint to resume from, and delete the oldest. A collective. If the run has
        been told to stop, it ends here.

        Does nothing at the last step, when the trained model itself is written.
        """
        if step >= self.steps:
            return
        self.boundary = None  # if this fails, an error does not try again
        self.trained = model, optimizer, others
        self._save(step, state)
        self.saved_at = time.monotonic()
        if self.stop:
            alarmed = self.stop == ALARM
            name = "an alarm (--alarms stop)" if alarmed else signal.Signals(self.stop).name
            self.say(f"stopped by {name}: --resume continues after step {step}")
            self.say(self.boards.close(failed=alarmed))
            dist.finish(ALARMED if alarmed else 128 + self.stop)

    # --------------------------------------------------------------------------------------- end
    def export(self, named_tensors, config, files: dict, dtype: str = "fp32", part: str = ""):
        """Write a model for transformers and vLLM to the folder, or its subfolder `part`. A
        collective. Adapters are merged, and also written by themselves, to `adapter` in it.

        named_tensors, config, files: see save_model. dtype: fp32, bf16, or auto, which is that
        of the folder from which the model was loaded.
        """
        adapted = getattr(named_tensors, "adapted", False)
        if adapted:
            self._export_adapter(named_tensors, self.out / part / "adapter", files)
        read = config.dtype
        written = {"fp32": torch.float32, "bf16": torch.bfloat16, "auto": read}[dtype]
        folder = self.out / part
        carried = self.carried.get(config.carried.folder, "") if config.carried else ""
        save_model(
            folder, named_tensors, config, files, written, write=self.writes, carried=carried
        )
        note = ""
        if torch.float32 not in (read, written):
            note = f" in {written}, rounded from fp32 (--save_dtype fp32 keeps it)"
        elif read != written:
            note = f" in {written}, though it was read in {read} (--save_dtype auto keeps that)"
        whole = ", its adapters merged," if adapted else ""
        self.say(f"the model{whole} is in {folder}{note.replace('torch.', '')}")
        if config.carried:
            count, source = len(config.carried.names), config.carried.folder
            self.say(f"with it {count} tensors beside the language model, as they are in {source}")

    def _export_adapter(self, weights, folder, files):
        if lora.is_adapter_folder(weights.root.folder):
            self.say(
                f"{folder} is not written: the base of its adapters, {weights.root.folder} merged, "
                "is no folder"
            )
            return
        if weights.root.config.scalar and hf.read_config(weights.root.folder).is_inside:
            self.say(
                f"{folder} is not written: its base, {weights.root.folder}, has images beside the "
                "text, and peft would not find its layers in that"
            )
            return
        config, nf4 = lora.peft_config(weights.root), lora.is_quantized(weights.root)
        about = json.loads(files[lora.ABOUT]) if files.get(lora.ABOUT) else {}
        about |= {"base": self.bases.get(weights.root.folder, ""), "base_nf4": nf4}
        files = {**files, lora.ABOUT: json.dumps(about, indent=1) + "\n"}
        save_adapter(folder, weights.trained(), config, files, write=self.writes)
        note = ""
        if nf4:
            note = " in NF4 (for peft: load_in_4bit, nf4, bnb_4bit_use_double_quant)"
        self.say(f"the adapters alone are in {folder}, for peft, with {weights.root.folder}{note}")

    def finish(self):
        """Print the held-out metrics before and after, and leave the process group."""
        dist.last_words = None
        if self.writes:
            self.hashing.join()
            self.say(self.boards.close())
            alarms = len(read_log(self.out / "alarms.jsonl"))
            if alarms:
                self.say(f"{alarms} alarm{'s' * (alarms > 1)}: {self.out / 'alarms.jsonl'}")
            self.say(f"curves: python -m nanopost.plot {self.out}")
            lines = read_log(self.out / "metrics.jsonl")
            evaluated = [x for x in lines if any(name.startswith("eval/") for name in x)]
            if len(evaluated) > 1:
                first, last = evaluated[0], evaluated[-1]
                names = [n for n in first if n.startswith("eval/") and n in last]
                change = [f"{name} {first[name]:.3f} -> {last[name]:.3f}" for name in names]
                self.say(f"held out, before and after: {', '.join(change)}")
        dist.finish()


def _forget_the_run():
    """In a process that a reward has forked: it ends when it is told to, and saves nothing."""
    dist.last_words = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def step_text(number: str, shown: list[str], held_out: list[str], left: str) -> str:
    """A step for a person, no line longer than WIDTH: of `shown`, whose most important texts come
    first, as many as fit between the number of the step and the time left; then all of `held_out`,
    on as many lines as they take. A text that is longer than a line loses its middle."""
    lines, room = [[number]], WIDTH - len(left) - 2
    for text in shown:
        if len("  ".join([*lines[0], text])) <= room:
            lines[0].append(text)
    for text in held_out:
        if len(text) > WIDTH - 4:
            text = f"{text[:40]}...{text[-40:]}"
        if len("  ".join([*lines[-1], text])) > room:
            lines.append([])
            room = WIDTH - 4
        lines[-1].append(text)
    lines[0].append(left)
    return "\n    ".join("  ".join(filter(None, line)) for line in lines)


def read_log(path) -> list[dict]:
    """The lines of a log, without one that a kill cut short."""
    lines = []
    for text in Path(path).read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


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
    old = manifest.texts(value for name, value in arguments.items() if value == known.get(name))
    new = manifest.texts(value for name, value in arguments.items() if value != known.get(name))
    if not any(Path(text) == out for text in old):
        itself = next((text for text in new if Path(text) == out), None)
        if itself is not None:
            new.remove(itself)  # the flag that names the folder; a second one is something read
    return [text for text in new if os.path.exists(text)]


def _memory_in_use(device) -> int:
    """Bytes: of the GPU; on a CPU the most that this process has had."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _bases(model) -> dict[str, str]:
    """{folder that adapters change the weights of: hash of its content}."""
    folders = {module.folder for module in model.modules() if hasattr(module, "folder")}
    if not lora.layers(model):
        folders = set()
    return {folder: hf.content_hash(folder) for folder in sorted(folders - {""})}


def _carried(model) -> dict[str, str]:
    """{folder from which a model carries weights: hash of these}."""
    configs = [module.config for module in model.modules() if hasattr(module, "folder")]
    return {c.carried.folder: carried_hash(c) for c in configs if c.carried}


def _is_text(path, text) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False


def _replace(path, text):
    """Write a file so that a kill leaves the old one or the new one, whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    to_disk(temporary)
    temporary.replace(path)


def _number_of(line, name, default=float("inf")):
    """A number in a line of a log; `default` for a line that a kill cut short, or without it."""
    try:
        return json.loads(line).get(name, default)
    except (ValueError, AttributeError):
        return default


def _last_step(path) -> int:
    """The last step in a log; -1 without a whole line."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return max((_number_of(line, "step", -1) for line in text.split("\n")), default=-1)


def _number(x):
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.3g}" if abs(x) < 1e-2 else f"{x:.3f}"


def _duration(seconds):
    hours, rest = divmod(int(seconds), 3600)
    if hours:
        return f"{hours}h{rest // 60:02d}m"
    return f"{rest // 60}m{rest % 60:02d}s"
