"""Log-probs of pairs under a reference model: computed each step, or once and cached on disk."""

import hashlib
from pathlib import Path

import numpy as np

from nanopost import dist, forward, hf, lora
from nanopost.pairs import Pair


def add_reference(pairs: list[Pair], reference, tokens: int, device):
    """The column ref_logp: the log-prob of each answer under a reference, summed with its weights.

    A collective: every rank calls it with its own pairs. tokens: maximum per micro-batch.
    """
    examples = [e for pair in pairs for e in pair]
    for e, logp in zip(examples, forward.logprobs(reference, examples, tokens, 1.0, device)):
        e.columns["ref_logp"] = float((logp * e.columns["weight"]).sum())


def add_no_reference(pairs: list[Pair]):
    """Set ref_logp to 0, for losses that do not read it: their metrics are then plain log-probs."""
    for e in (e for pair in pairs for e in pair):
        e.columns["ref_logp"] = 0.0


def add_cached_reference(pairs: list[Pair], reference, reference_folder, tokens: int, world, cache):
    """The same for all pairs of a run, which every rank holds: split over ranks, computed once,
    and kept in the folder `cache`, under a name made of everything that the numbers depend on. In a
    dry run they get none."""
    if world.device.type == "meta":
        return
    kind = "bf16" if "bfloat16" in str(world.dtype) else "fp32"
    if lora.is_quantized(reference):
        kind += "-nf4"
    name = f"reference-{hf.content_hash(reference_folder)}-{kind}-{content_hash(pairs)}.npy"
    path = Path(cache, name)
    if dist.all_sum(path.is_file()) == world.size:
        table = np.load(path)
    else:
        mine = range(len(pairs))[world.rank :: world.size]
        add_reference([pairs[i] for i in mine], reference, tokens, world.device)
        rows = [(i, *(e.columns["ref_logp"] for e in pairs[i])) for i in mine]
        table = np.empty((len(pairs), 2))
        for i, chosen, rejected in dist.gather(rows):
            table[i] = chosen, rejected
        if world.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path.with_suffix(".tmp.npy"), table)
            path.with_suffix(".tmp.npy").rename(path)
    for pair, values in zip(pairs, table.tolist()):
        for e, value in zip(pair, values):
            e.columns["ref_logp"] = value


def content_hash(pairs: list[Pair]) -> str:
    """A hash of ids, masks and weights, in order."""
    digest = hashlib.sha256()
    for e in (e for pair in pairs for e in pair):
        for x in (np.array([len(e)]), e.ids, e.mask, e.columns.get("weight", e.mask)):
            digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]
