"""What a run's engine answered, in OUT/records/rollouts-RANK.jsonl, and an engine that answers the
same again.

A line is a group: the step that it was sampled for, the version of the weights when the loop took
it, n, sampling, seed, and each field of its rollouts. Lines are in the order in which the loop took
the groups. What ran ahead and was never taken is not written, so a resume drops exactly the lines
of the steps that were lost.
"""

import base64
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch.distributed

from nanopost import InputError
from nanopost.engine import Sampling
from nanopost.rollout import Rollout


class Recording:
    """Writes the groups that a loop takes from its engine."""

    def __init__(self, out, world, step: int):
        """out: the run's folder. step: the one after which the run begins: what was recorded after
        it is dropped. A collective, since rank 0 may have just emptied the folder."""
        torch.distributed.barrier()
        ranks = len(list(Path(out).glob("records/rollouts-*.jsonl")))
        if step and ranks not in (0, world.size):
            raise InputError(
                f"--record: the rollouts in {out} are those of {ranks} ranks, and this run has "
                f"{world.size}: resume with {ranks} processes, or without --record."
            )
        self.path = _path(out, world.rank)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(self.path) if line["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path)

    def add(
        self,
        step: int,
        version: int,
        n: int,
        sampling: Sampling,
        seeds: list[int],
        groups: list[list[Rollout]],
    ):
        """The groups of a call to generate, with all digits of their numbers."""
        asked = {"step": step, "version": version, "n": n, "sampling": asdict(sampling)}
        with open(self.path, "a", encoding="utf-8") as file:
            for seed, group in zip(seeds, groups):
                line = {**asked, "seed": seed, "prompt": group[0].prompt}
                for name in FIELDS:
                    line[name] = [_plain(getattr(rollout, name)) for rollout in group]
                file.write(json.dumps(line) + "\n")


class Replay:
    """An engine that answers as the run in a folder was answered. It has no model."""

    def __init__(self, folder, world):
        """folder: of a run with --record. InputError unless it has the rollouts of as many ranks as
        this run."""
        self.folder, self.version = folder, 0
        ranks = len(list(Path(folder).glob("records/rollouts-*.jsonl")))
        if not ranks:
            raise InputError(f"--replay {folder}: it has no rollouts; --record writes them.")
        if ranks != world.size:
            raise InputError(
                f"--replay {folder}: it has the rollouts of {ranks} ranks, and this run has "
                f"{world.size}: start {ranks} processes."
            )
        self.groups = {}
        for line in _lines(_path(folder, world.rank)):
            sampling = Sampling(**line["sampling"] | {"stop": tuple(line["sampling"]["stop"])})
            key = line["version"], line["seed"], line["n"], sampling
            self.groups[key] = json.dumps(line)  # a tenth of the memory of its numbers

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> list[list[Rollout]]:
        """What the recorded run got at this version of the weights. InputError if it asked for
        something else."""
        groups = []
        for prompt, seed in zip(prompts, seeds):
            line = self.groups.get((self.version, seed, n, sampling))
            if line is None:
                raise InputError(
                    f"--replay {self.folder}: after step {self.version} it has no {n} rollouts "
                    f"with seed {seed} and {sampling}: give the flags of that run "
                    f"({self.folder}/run.json has them), and no more steps than it had; an --env "
                    "that asks for other turns than it did cannot be replayed."
                )
            line = json.loads(line)
            if line["prompt"] != prompt:
                raise InputError(
                    f"--replay {self.folder}: after step {self.version} the prompt with seed "
                    f"{seed} has other tokens there ({len(line['prompt'])}, here {len(prompt)}): "
                    "give the --data, --chat_template and tokenizer of that run, and an --env, if "
                    "any, that says the same again."
                )
            columns = [map(_array, line[name]) for name in FIELDS]
            groups.append([Rollout(prompt, **dict(zip(FIELDS, x))) for x in zip(*columns)])
        return groups

    def sync_weights(self, named_tensors, version: int):
        """Nothing is sampled with the weights. No rank iterates over them."""
        self.version = version

    def sleep(self):
        """It has no memory to give back."""

    def close(self):
        """Nothing to release."""


LATER = ("prompt", "answer", "episode")  # prompt is recorded once, the others come after it
FIELDS = [field.name for field in fields(Rollout) if field.name not in LATER]


def _path(out, rank):
    return Path(out) / "records" / f"rollouts-{rank}.jsonl"


def _lines(path) -> Iterator[dict]:
    """Whole lines: a kill may have cut the last one short."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.split("\n")[:-1]:
        yield json.loads(line)


def encoded(array: np.ndarray) -> dict:
    """An array of many numbers as JSON."""
    text = base64.b64encode(np.ascontiguousarray(array)).decode()
    return {"dtype": array.dtype.name, "shape": array.shape, "base64": text}


def decoded(value: dict) -> np.ndarray:
    """The array that encoded was given."""
    data = base64.b64decode(value["base64"])
    return np.frombuffer(data, value["dtype"]).reshape(value["shape"])


def _plain(value):
    """As JSON, arrays with their dtype, kept ids as lists, experts in base64."""
    if isinstance(value, np.ndarray) and value.ndim > 1:
        return encoded(value)
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.name, "values": value.tolist()}
    if isinstance(value, list):
        return [_plain(x)["values"] if isinstance(x, np.ndarray) else x for x in value]
    return value


def _array(value):
    if isinstance(value, dict) and "base64" in value:
        return decoded(value)
    if isinstance(value, dict):
        return np.array(value["values"], value["dtype"])
    if isinstance(value, list) and value and isinstance(value[0], list):
        return [np.array(ids, np.int32) for ids in value]
    return value
