"""Log-probs of pairs under a reference: fresh, or cached."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from nanopost import dist
from nanopost.forward import logprobs


def add_reference(pairs: list, reference, tokens: int, device):
    """The column ref_logp: log-probs of each answer under a reference, summed with the weights; 0 if that is None.

    A collective: every rank calls it with pairs of its own.
    """
    examples = [e for pair in pairs for e in pair]
    logps = (
        logprobs(reference, examples, tokens, 1.0, device) if reference else [0.0] * len(examples)
    )
    for e, logp in zip(examples, logps):
        e.columns["ref_logp"] = float((logp * e.columns["weight"]).sum())


def add_cached_reference(pairs: list, reference, tokens: int, world, path):
    """The same for all pairs of a run, which every rank holds: shared out, computed once, kept in `path` (.npy).

    path is to name whatever the numbers depend on: see content_hash.
    """
    path = Path(path)
    if reference is None:
        return add_reference(pairs, None, tokens, world.device)
    if dist.all_sum(path.is_file())[0] == world.size:
        table = np.load(path)
    else:
        mine = range(len(pairs))[world.rank :: world.size]
        add_reference([pairs[i] for i in mine], reference, tokens, world.device)
        table = np.empty((len(pairs), 2))
        for i, *values in dist.gather(
            [(i, *(e.columns["ref_logp"] for e in pairs[i])) for i in mine]
        ):
            table[i] = values
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path.with_suffix(".tmp.npy"), table)
            path.with_suffix(".tmp.npy").rename(path)
    for pair, values in zip(pairs, table):
        for e, value in zip(pair, values.tolist()):
            e.columns["ref_logp"] = value


def content_hash(pairs: list) -> str:
    """Of ids, masks and weights, in order."""
    digest = hashlib.sha256()
    for e in (e for pair in pairs for e in pair):
        for value in (np.array([len(e)]), e.ids, e.mask, e.columns.get("weight", e.mask)):
            digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def follow(reference, model, share: float):
    """reference += share (model - reference): TR-DPO 2404.09656 eq. 5. Both are sharded alike."""
    for ours, theirs in zip(reference.parameters(), model.parameters()):
        ours.lerp_(theirs, share)
