"""Saving a run so that it can be killed at any instant, and taking it up again.

OUT/checkpoints/step-000120/ holds the shards of weights and optimizer (torch.distributed.checkpoint: another number of
processes may load them), each rank's random state, and state.json (step, rows or prompts consumed, arguments). It is
written beside its name and renamed when whole: what bears the name is complete.
"""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from nanopost import InputError
from nanopost.cli import refuse
from nanopost.run import starts_of


def save(out, step: int, model, optimizer, state: dict, reference=None):
    """Write the checkpoint of `step`, then delete the others. A collective: every rank calls it.

    reference: a second model whose weights change over the run.
    """
    folder = Path(out) / "checkpoints"
    final, beside = folder / f"step-{step:06d}", folder / f"step-{step:06d}.tmp"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    for p in (
        p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state
    ):
        optimizer.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }  # of what has not learnt yet: AdamW's beginning
    weights, moments = get_state_dict(model, optimizer)
    try:
        dcp.save(
            {"model": weights, "optimizer": moments, **_weights_of(reference)}, checkpoint_id=beside
        )
    except dcp.api.CheckpointException as error:
        raise InputError(
            f"{beside} cannot be written ({_cause(error)}); the checkpoint before it stays: make room, "
            "then --resume."
        ) from error
    torch.save(_random_state(), beside / f"random-{dist.get_rank()}.pt")
    dist.barrier()
    if first:
        (beside / "state.json").write_text(
            json.dumps({**state, "step": step, "ranks": dist.get_world_size()})
        )
        for path in beside.iterdir():
            _to_disk(path)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        _to_disk(folder)
        for old in _complete(folder):
            if old != final:
                shutil.rmtree(old)
    dist.barrier()


def to_resume(args) -> Path | None:
    """The newest complete checkpoint under --out; None if the run was killed before its first. InputError if it ended,
    went past --steps, or is another script's."""
    out, found = args.out, latest(args.out)
    started = {"step": 0, **(starts_of(out) or [{}])[-1]}
    saved = json.loads((found / "state.json").read_text()) if found else started
    foreign = sorted(saved.get("args", {}).keys() - vars(args).keys())
    refuse(
        (args.overwrite, "--resume goes on and --overwrite begins anew: give one of them."),
        (
            foreign,
            f"--resume: {found or out} is of another script (with --{', --'.join(foreign)}): choose another "
            "--out.",
        ),
        (
            saved["step"] > args.steps,
            f"--resume: {found} is past --steps {args.steps}: give {saved['step']} or more.",
        ),
        (
            found is None and Path(out, "config.json").exists(),
            f"--resume: {out} holds a run that ended and left no checkpoint (--save_every): go on with --model {out} "
            "and another --out, or --overwrite it.",
        ),
    )
    return found


def latest(out) -> Path | None:
    """The newest complete checkpoint under OUT, or None."""
    return next(reversed(_complete(Path(out) / "checkpoints")), None)


def load(path: Path, model, optimizer, reference=None) -> dict:
    """Fill model and optimizer from a checkpoint and restore the random state -> its state.json.

    Of the optimizer the moments: weight decay, betas and rates are those of the flags of now.
    """
    state = json.loads((path / "state.json").read_text())
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    weights, moments = get_state_dict(model, optimizer)
    stored = {"model": weights, "optimizer": moments, **_weights_of(reference)}  # filled in place
    try:
        names = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        here, there = (
            {f"model.{name}" for name in weights},
            {name for name in names if name.startswith("model.")},
        )
        if here != there:
            raise InputError(
                f"{path} is of another model ({len(there)} tensors there, {len(here)} here): resume with "
                "the --model (and --value_model) that the run began with."
            )
        dcp.load(stored, checkpoint_id=path)
    except dcp.api.CheckpointException as error:
        raise InputError(
            f"{path} does not fit this model or is damaged; remove it to start from the one before it, "
            f"or anew ({_cause(error)})."
        ) from error
    set_state_dict(
        model, optimizer, model_state_dict=stored["model"], optim_state_dict=stored["optimizer"]
    )
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)
    if state["ranks"] == dist.get_world_size():
        _set_random_state(torch.load(path / f"random-{dist.get_rank()}.pt", weights_only=False))
    return state


def changed_arguments(saved: dict, now: dict) -> list[str]:
    """What a resumed run was told differently: ["lr: 0.001 -> 0.002", ...]."""
    names = [k for k in {**saved, **now} if k not in ("resume", "overwrite", "verbose")]
    return [f"{k}: {saved.get(k)} -> {now.get(k)}" for k in names if saved.get(k) != now.get(k)]


def _cause(error):
    return next(iter(error.failures.values()))[0]


def _weights_of(reference):
    return {"reference": get_model_state_dict(reference)} if reference is not None else {}


def _complete(folder):
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".tmp")


def _random_state():
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _set_random_state(state):
    (
        random.setstate(state["python"]),
        np.random.set_state(state["numpy"]),
        torch.set_rng_state(state["torch"]),
    )
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _to_disk(path):
    """Files and folder entries reach the disk before the name that vouches for them does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
