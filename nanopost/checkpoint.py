"""Checkpoints of a run, which can be killed at any moment and resumes from the newest one.

OUT/checkpoints/step-000120/ holds weights and optimizer state (torch.distributed.checkpoint: any
number of processes can load them), the random state of each rank, and state.json. The folder is
written under a temporary name and renamed once it is complete.
"""

import json
import random
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from nanopost import InputError
from nanopost.hf import read_json, to_disk


def save(out, step: int, model, optimizer, state: dict, **others):
    """Write the checkpoint of `step`, then delete the others. A collective: every rank calls it.

    state: what else the run needs to continue, as JSON. others: further models whose weights change
    over the run, each stored under its name.
    """
    folder = Path(out) / "checkpoints"
    final = folder / f"step-{step:06d}"
    if final.exists():  # a step is saved once: nothing has changed since
        return
    unfinished = folder / f"step-{step:06d}.tmp"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    tensors = _weights(model=model, **others) | _optimizer_state(model, optimizer)
    try:
        dcp.save(tensors, checkpoint_id=unfinished)
    except dcp.api.CheckpointException as error:
        raise InputError(
            f"{unfinished} cannot be written ({_cause(error)}); the previous checkpoint is intact: "
            "free some disk space, then --resume."
        ) from error
    torch.save(_random_state(), unfinished / f"random-{dist.get_rank()}.pt")
    dist.barrier()
    if first:
        record = {**state, "step": step, "ranks": dist.get_world_size()}
        (unfinished / "state.json").write_text(json.dumps(record), encoding="utf-8")
        for path in unfinished.iterdir():
            to_disk(path)
        unfinished.rename(final)
        to_disk(folder)
        for old in _complete(folder):
            if old != final:
                shutil.rmtree(old)
    dist.barrier()


def latest(out) -> Path | None:
    """The newest complete checkpoint under OUT, or None."""
    return next(reversed(_complete(Path(out) / "checkpoints")), None)


def load(path: Path, model, optimizer, **others) -> dict:
    """Fill the models and the optimizer, restore the random state -> the content of state.json.

    A collective. The optimizer keeps its hyperparameters; a parameter that had no state when saved
    has none after loading. The random state is restored only if the number of ranks is the same.
    """
    state = read_json(path / "state.json")
    tensors = _weights(model=model, **others)
    try:
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        for name in ("model", *others):
            _check_names(path, name, tensors, stored)
        tensors |= _empty_optimizer_state(path, model, optimizer, stored)
        dcp.load(tensors, checkpoint_id=path)  # in place: the models' own tensors
    except dcp.api.CheckpointException as error:
        raise InputError(
            f"{path} does not fit this model or is damaged ({_cause(error)}): resume with the "
            "model that the run started with, or remove this checkpoint."
        ) from error
    _set_optimizer_state(model, optimizer, tensors)
    if state["ranks"] == dist.get_world_size():
        _set_random_state(torch.load(path / f"random-{dist.get_rank()}.pt", weights_only=False))
    return state


# ------------------------------------------------------------------------------------------- models
def _weights(**models):
    """{"model.lm_head.weight": the model's own tensor or its shard, a DTensor, ...}."""
    weights = {}
    for name, model in models.items():
        for key, tensor in model.state_dict().items():
            weights[f"{name}.{key}"] = tensor
    return weights


def _check_names(path, name, here, stored):
    here = {key for key in here if key.startswith(f"{name}.")}
    there = {key for key in stored if key.startswith(f"{name}.")}
    if here != there:
        raise InputError(
            f"{path} belongs to another {name} ({len(there)} tensors there, {len(here)} here): "
            "resume with the --model (and --value_model) that the run started with."
        )


# ---------------------------------------------------------------------------------------- optimizer
def _optimizer_state(model, optimizer):
    """{"optimizer.lm_head.weight.exp_avg": tensor, ...} of the parameters that have state."""
    name_of = {p: name for name, p in model.named_parameters()}
    state = {}
    for p, entries in optimizer.state.items():
        for entry, value in entries.items():
            state[f"optimizer.{name_of[p]}.{entry}"] = value
    return state


def _empty_optimizer_state(path, model, optimizer, stored):
    """What _optimizer_state returned when it was stored, with room for the values.

    An entry with the shape of its parameter is sharded like it; any other is whole on every rank.
    """
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    parameter_of = {name: p for name, p in model.named_parameters() if p in trained}
    state = {}
    for key, metadata in stored.items():
        if not key.startswith("optimizer."):
            continue
        name, _ = _split(key)
        if name not in parameter_of:
            raise InputError(
                f"{path} has optimizer state for {name}, which this run does not train: resume "
                "with the flags that the run started with."
            )
        p = parameter_of[name]
        if isinstance(metadata, BytesStorageMetadata):  # a number, pickled
            state[key] = None
        elif metadata.size == p.shape:
            state[key] = torch.empty_like(p, dtype=metadata.properties.dtype)
        else:
            state[key] = torch.empty(metadata.size, dtype=metadata.properties.dtype)
    return state


def _set_optimizer_state(model, optimizer, tensors):
    state_of = defaultdict(dict)
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            name, entry = _split(key)
            state_of[name][entry] = value
    name_of = {p: name for name, p in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for i, p in enumerate(parameters):  # as torch's state_dict numbers them
        if name_of[p] in state_of:
            state[i] = state_of[name_of[p]]
    # The optimizer moves each entry to the device where it wants it.
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _split(key):
    """optimizer.NAME.ENTRY -> (NAME, ENTRY)."""
    name, _, entry = key.removeprefix("optimizer.").rpartition(".")
    return name, entry


# -------------------------------------------------------------------------------------------- files
def _complete(folder):
    whole = [path.parent for path in folder.glob("step-*/state.json")]  # a kill may cut a deletion
    return sorted(path for path in whole if path.suffix != ".tmp")


def _cause(error):
    """The first of the failures on several ranks."""
    return next(iter(error.failures.values()))[0]


def _random_state():
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": None,
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
