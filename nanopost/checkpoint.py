"""Checkpoints of a run, which can be killed at any moment and resumes from the newest one.

OUT/checkpoints/step-000120/ holds weights (of a model with adapters: those that train) and
optimizer state (torch.distributed.checkpoint: any number of processes can load them), the random
state of each rank, state.json, and the checksum of each of these files. The folder is written under
a temporary name and renamed once it is complete. Loading one runs no code from it.
"""

import hashlib
import json
import pickle
import random
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, StorageMeta

from nanopost import InputError, lora
from nanopost.dist import gather
from nanopost.save import to_disk
from nanopost.storage import read_json

OURS = re.compile(r"step-\d{6,}(\.tmp|\.damaged)?")  # other folders beside them are left alone
SUMS = "checksums.json"


def save(
    out,
    step: int,
    model,
    optimizer,
    state: dict,
    keep: int = 1,
    drawn: dict | None = None,
    **others,
):
    """Write the checkpoint of `step`, then delete all but the last `keep`. A collective: every rank
    calls it.

    state: what else the run needs to continue, as JSON. drawn: what random_state() returned at that
    step; default: the state now. others: further models whose weights change over the run, each
    stored under its name.
    """
    folder = Path(out) / "checkpoints"
    final = folder / f"step-{step:06d}"
    if final in complete(out):  # a step is saved once: nothing has changed since
        return
    unfinished = folder / f"step-{step:06d}.tmp"
    first = dist.get_rank() == 0
    if first:
        for path in (unfinished, final):
            shutil.rmtree(path, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    weights = _weights(model=model, **others)  # first: it reshards what an error left gathered
    moments = _optimizer_state(model, optimizer)
    tensors = {key: x for key, x in moments.items() if isinstance(x, torch.Tensor)}
    numbers = {key: x for key, x in moments.items() if key not in tensors}
    try:
        dcp.save(weights | tensors, checkpoint_id=unfinished)
    except dcp.api.CheckpointException as error:
        raise InputError(
            f"{unfinished} cannot be written ({_cause(error)}); the previous checkpoint is intact: "
            "free some disk space, then --resume."
        ) from error
    _write_json(unfinished / f"random-{dist.get_rank()}.json", drawn or random_state())
    if first:
        ranks = dist.get_world_size()
        _write_json(
            unfinished / "state.json", {**state, "step": step, "ranks": ranks, "numbers": numbers}
        )
    dist.barrier()
    sums = dict(gather(_my_sums(unfinished, sorted(path.name for path in unfinished.iterdir()))))
    if first:
        _write_json(unfinished / SUMS, sums)
        for path in unfinished.iterdir():
            to_disk(path)
        unfinished.rename(final)
        to_disk(folder)
        _delete_old(out, final, keep)
    dist.barrier()


def complete(out) -> list[Path]:
    """The checkpoints under OUT that a save completed, oldest first."""
    folder = Path(out) / "checkpoints"
    named = [path for path in folder.glob("step-*") if OURS.fullmatch(path.name)]
    whole = [path for path in named if not path.suffix and (path / "state.json").exists()]
    return sorted(whole, key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def latest(out) -> Path | None:
    """The newest complete checkpoint under OUT, or None."""
    return next(reversed(complete(out)), None)


def damage(path: Path) -> str:
    """What is wrong with the files of a checkpoint, or "". A collective: each rank reads a part."""
    try:
        sums = json.loads((path / SUMS).read_text(encoding="utf-8"))
        names = sorted({*sums, "state.json", ".metadata"})
    except (OSError, ValueError, TypeError):
        return f"its {SUMS} is missing or damaged"
    bad = []
    for name, found in _my_sums(path, names):
        if found is None:
            bad.append(f"{name} is missing")
        elif found != sums.get(name):
            bad.append(f"{name} is not as it was written")
    return next(iter(gather(bad)), "")


def delete(out):
    """Delete the checkpoints under OUT, complete or not. Other files there stay."""
    folder = Path(out) / "checkpoints"
    for path in folder.glob("step-*"):
        if OURS.fullmatch(path.name):
            _delete(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def load(path: Path, model, optimizer, **others) -> dict:
    """Fill the models and the optimizer, restore the random state -> the content of state.json.

    A collective. The optimizer keeps its hyperparameters; a parameter that had no state when saved
    has none after loading. The random state is restored only if the number of ranks is the same.
    """
    state = read_json(path / "state.json")
    tensors = _weights(model=model, **others)
    try:
        reader = _Reader(path)
        stored = reader.read_metadata().state_dict_metadata
        if any(isinstance(metadata, BytesStorageMetadata) for metadata in stored.values()):
            raise InputError(f"{path} holds pickled objects, which no script here has written.")
        for name in ("model", *others):
            _check_names(path, name, tensors, stored)
        tensors |= _empty_optimizer_state(path, model, optimizer, stored)
        dcp.load(tensors, storage_reader=reader)  # in place: the models' own tensors
    except dcp.api.CheckpointException as error:
        raise InputError(
            f"{path} does not fit this model or is damaged ({_cause(error)}): resume with the "
            "model that the run started with, or remove this checkpoint."
        ) from error
    _set_optimizer_state(model, optimizer, tensors | state.pop("numbers"))
    if state["ranks"] == dist.get_world_size():
        _set_random_state(read_json(path / f"random-{dist.get_rank()}.json"))
    return state


METADATA = {  # what torch.distributed.checkpoint's metadata consists of
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


class _Unpickler(pickle.Unpickler):
    """Makes what is named in METADATA, and dtypes, and nothing else."""

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name not in METADATA.get(module, ()) and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise InputError(
                f"{path} is damaged, or was written by no script here: {error}."
            ) from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


# ------------------------------------------------------------------------------------------- models
def _weights(**models):
    """{"model.lm_head.weight": the model's own tensor or its shard, a DTensor, ...}. The base that
    adapters leave untouched is not among them: it is loaded from --model."""
    weights = {}
    for name, model in models.items():
        adapted = bool(lora.layers(model))
        for key, tensor in model.state_dict().items():
            if adapted and not lora.is_trained(key):
                continue
            weights[f"{name}.{key}"] = tensor
    return weights


def _check_names(path, name, here, stored):
    here = {key for key in here if key.startswith(f"{name}.")}
    there = {key for key in stored if key.startswith(f"{name}.")}
    if here != there:
        raise InputError(
            f"{path} belongs to another {name} ({len(there)} tensors there, {len(here)} here): "
            "resume with the --model (and --value_model, --lora) that the run started with."
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
        if metadata.size == p.shape:
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
def _my_sums(folder, names) -> list[tuple[str, str | None]]:
    """(name, SHA-256) of this rank's part of the files; None for one that cannot be read."""
    sums = []
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        try:
            with open(folder / name, "rb") as file:
                sums.append((name, hashlib.file_digest(file, "sha256").hexdigest()))
        except OSError:
            sums.append((name, None))
    return sums


def _delete_old(out, newest, keep):
    """Keep the last `keep` checkpoints up to `newest`. What an interrupted save or deletion left
    goes too."""
    kept = [path for path in complete(out) if step_of(path) <= step_of(newest)][-keep:]
    for path in newest.parent.glob("step-*"):
        if OURS.fullmatch(path.name) and path.suffix != ".damaged" and path not in kept:
            _delete(path)


def _delete(path):
    (path / "state.json").unlink(missing_ok=True)  # first: a kill leaves no half of a checkpoint
    shutil.rmtree(path)


def _write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def _cause(error):
    """The first of the failures on several ranks."""
    return next(iter(error.failures.values()))[0]


def random_state() -> dict:
    """The random state of this process, as JSON: python, numpy, torch, and this rank's GPU."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
        "cuda": None,
    }
    if torch.cuda.is_available():
        state["cuda"] = _hex(torch.cuda.get_rng_state())
    return state


def _set_random_state(state):
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _hex(state):
    return state.numpy().tobytes().hex()


def _bytes(text):
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
