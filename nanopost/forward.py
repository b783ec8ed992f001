"""Log-probs, values and scores of many examples, over micro-batches and ranks.

Shapes: N packed tokens, S sequences.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from nanopost import StepError, dist
from nanopost.batch import Batch, Example, batch_of, common, shared, worth_sharing
from nanopost.dist import even, exchange, gather
from nanopost.packing import cost, deal, micro_batches, pack


def batches(model, items: list, tokens: int, device) -> Iterator[Batch]:
    """Micro-batches of at most `tokens` tokens, on the device, equally many on every rank: what
    goes through the model in one optimizer step, each with its backward pass.

    items: this rank's examples, or tuples of examples that stay together (a pair). The
    micro-batches are cut from those of all ranks, and a rank runs what others hold too, so that all
    ranks have as much to do. Items with the same prompt come together: `tokens` counts what they
    share once, as the model computes it once. At least one batch, a dummy if a rank has nothing:
    each forward and backward pass is a collective.
    """
    units = [(item,) if isinstance(item, Example) else item for item in items]
    parts = _dealt(units, tokens)
    for i, part in enumerate(parts):
        dist.before_pass(model, last=i == len(parts) - 1)
        yield batch_of([e for _, unit in part for e in unit], device)
        dist.after_pass(model)


class Unit(NamedTuple):
    """What all ranks know of examples that stay together, which one of them holds."""

    prompt: bytes  # a digest of what the first of them begins with, up to its first trained token
    digest: bytes
    rank: int
    index: int  # among those of its rank
    tokens: int  # that the model computes for it
    cost: float  # packing.cost of these
    saved: int  # tokens that it takes from a neighbour with the same prompt, or gives to one


def _unit(examples: tuple[Example, ...], rank: int, index: int) -> Unit:
    first, last, shared_S = examples[0], examples[-1], shared(examples)
    own_S = [len(e) - count for e, count in zip(examples, shared_S)]
    total = sum(map(cost, own_S, shared_S))
    length = first.prompt_length
    saved = worth_sharing(length, first)
    if common(first, last, length) < length:
        saved = 0
    prompt = first.ids[:length].tobytes()
    if first.routes is not None:
        prompt += first.routes[:length].tobytes()
    prompt = hashlib.blake2b(prompt, digest_size=16).digest()
    return Unit(prompt, digest_of(examples), rank, index, sum(own_S), total, saved)


@dataclass
class Family:
    """Units that compute their prompt once."""

    units: list[Unit]
    tokens: int
    cost: float


def _families(units: list[Unit], most: int) -> list[Family]:
    """Units in order -> families of neighbours with the same prompt. A family has at most `most`
    tokens, or one unit."""
    families = []
    for unit in units:
        family = families[-1] if families else Family([], 0, 0.0)
        tokens = family.tokens + unit.tokens - unit.saved
        if family.units and tokens <= most and _share(family.units[-1], unit):
            family.units.append(unit)
            family.tokens = tokens
            family.cost += unit.cost - cost(unit.saved)
        else:
            families.append(Family([unit], unit.tokens, unit.cost))
    return families


def _share(one, other):
    return one.prompt == other.prompt and one.saved > 0 and other.saved > 0


def _dealt(
    held: list[tuple[Example, ...]], tokens: int, once: bool = False
) -> list[list[tuple[bytes, tuple[Example, ...]]]]:
    """This rank's micro-batches of what all ranks hold, each unit with its digest: equally many on
    every rank. A collective.

    Which units share a micro-batch, and in which order, depends on what they hold and not on who
    holds them. once: units that hold the same are in it once.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    units = sorted(gather([_unit(examples, rank, i) for i, examples in enumerate(held)]))
    if once:
        units = [next(same) for _, same in groupby(units, key=lambda unit: unit.digest)]
    at_least, most = 1, tokens
    if ranks > 1 and not dist.reproducible:  # so that no rank idles in a small step
        at_least, most = ranks, sum(unit.tokens for unit in units) // (2 * ranks)
    families = _families(units, min(most, tokens))
    parts = micro_batches([family.tokens for family in families], tokens, at_least) or [[]]
    dealt = deal(parts, [family.cost for family in families], ranks)
    dealt = [[[u for i in part for u in families[i].units] for part in parts] for parts in dealt]
    sent = []
    for parts in dealt:
        here = [unit for part in parts for unit in part if unit.rank == rank]
        sent.append([(unit.digest, held[unit.index]) for unit in here])
    examples_of = dict(exchange(sent))
    return [[(u.digest, examples_of[u.digest]) for u in part] for part in dealt[rank]]


def digest_of(examples: tuple[Example, ...]) -> bytes:
    """A digest of all that the examples hold."""
    digest = hashlib.blake2b(digest_size=16)
    for e in examples:
        arrays = {"ids": e.ids, "mask": e.mask, **e.columns}
        if e.kept is not None:
            arrays |= {"sizes": [len(ids) for ids in e.kept], "kept": np.concatenate(e.kept)}
        if e.routes is not None:
            arrays["routes"] = e.routes
        for name, x in sorted(arrays.items()):
            digest.update(f"{name} {np.shape(x)} ".encode())
            digest.update(np.ascontiguousarray(x).tobytes())
    return digest.digest()


def logprobs(model, examples: list[Example], tokens: int, temperature: float, device):
    """Log-probs of the trained tokens under a model -> list of fp32 [T], as from per_token.

    Those of examples with kept ids are renormalised over them, whatever the model: so are both
    sides of a ratio or of a KL, which is then finite and that of the two cut distributions.
    """
    return per_token(lambda batch: model(batch, temperature)[0], examples, tokens, device)


def add_logprobs(
    examples: list[Example], name: str, model, tokens: int, temperature: float, device
):
    """Give each example a column of its log-probs under a model. A collective."""
    for e, logp in zip(examples, logprobs(model, examples, tokens, temperature, device)):
        e.columns[name] = logp


def add_values(examples: list[Example], model, tokens: int, device):
    """The column value: an ActorCritic's value of the state in which each trained token was chosen.
    A collective."""
    values = per_token(lambda batch: model(batch, value_alone=True)[2], examples, tokens, device)
    for e, value in zip(examples, values):
        e.columns["value"] = value


@torch.no_grad()
def per_token(forward: Callable, examples: list[Example], tokens: int, device) -> list[np.ndarray]:
    """forward(batch) -> x_N, 0 where there is no target; returns fp32 [T] for each example.

    A collective: see batches. Examples of the same ids, mask, kept ids and routes get the same
    numbers.
    """
    units = [(Example(e.ids, e.mask, kept=e.kept, routes=e.routes),) for e in examples]
    keys = [digest_of(unit) for unit in units]
    found = {}
    for part in _dealt(units, tokens, once=True):
        batch = batch_of([e for _, (e,) in part], device)
        for (key, _), x_T in zip(part, batch.split(forward(batch))):
            found[key] = x_T
    wanted = [[] for _ in range(torch.distributed.get_world_size())]
    for rank, key in sorted(set(gather([(torch.distributed.get_rank(), key) for key in keys]))):
        if key in found:
            wanted[rank].append((key, found[key]))
    found = dict(exchange(wanted))
    return [found[key] for key in keys]


def gather_pairs(
    model, pairs: list[tuple[Example, Example]], tokens: int, device
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Numbers for the sequences of all ranks' pairs under the current model, without gradients
    -> ({name: float64 [S]}, the indices of this rank's sequences). A collective.

    logp: log-prob summed with the column weight. nll: - log-prob summed over all targets. ref_logp,
    length, label (1 if there is none): the columns. targets: the number of targets.
    """
    rank, mine = torch.distributed.get_rank(), []
    examples = [e for pair in pairs for e in pair]
    logps = logprobs(model, examples, tokens, 1.0, device)
    for i, (e, logp) in enumerate(zip(examples, logps)):
        numbers = {
            "logp": float((logp * e.columns["weight"]).sum()),
            "nll": float(-logp.sum()),
            "ref_logp": e.columns["ref_logp"],
            "length": e.columns["length"],
            "label": e.columns.get("label", 1.0),
            "targets": e.num_targets,
        }
        mine.append((digest_of(pairs[i // 2]), rank, i, numbers))
    # In an order that does not depend on the ranks: so do sums over them.
    every = sorted(gather(mine), key=lambda row: row[:3])
    sequences = {}
    for name in every[0][3]:
        values = [numbers[name] for *_, numbers in every]
        sequences[name] = torch.tensor(values, dtype=torch.float64)
    place_of = {row[1:3]: s for s, row in enumerate(every)}
    return sequences, [place_of[rank, i] for i in range(len(mine))]


@torch.no_grad()
def scores(model, examples: list[Example], tokens: int, device) -> list[float]:
    """A reward model's score of each sequence: its number at the last token."""
    out = [0.0] * len(examples)
    tokens = max(tokens, *map(len, examples))
    families = _families(sorted(_unit((e,), 0, i) for i, e in enumerate(examples)), tokens)
    for part in pack([family.tokens for family in families], tokens):
        rows = [unit.index for i in part for unit in families[i].units]
        batch = batch_of([examples[i] for i in rows], device)
        score_S = model(batch)[batch.last_S]
        for i, score in zip(rows, score_S.tolist()):
            out[i] = score
    return out


@torch.no_grad()
def check_finite(grad_norm: float, step: int, model, examples: list[Example], decode: Callable):
    """StepError for a gradient norm that is inf or nan, before the optimizer spreads it.

    It names the first example of this optimizer step whose columns or model outputs are not finite.
    A collective if the norm, which is that of all ranks, is not finite.
    """
    if math.isfinite(grad_norm):
        return
    device = getattr(model, "runs_on", next(model.parameters()).device)
    found = []
    for part in even([[e] for e in examples]):
        batch = batch_of(part, device)
        outputs = model(batch)
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        checked = batch.columns | {"the model's output": torch.stack(outputs)}
        bad = [name for name, x in checked.items() if not x.isfinite().all()]
        if part and bad:
            found.append(f"{' and '.join(bad)} of {decode(part[0].ids)[:200]!r}")
    found = gather(found)
    cause = "no single example gives one: the loss overflows, or its backward pass does"
    if found:
        cause = f"not finite: {found[0]} (the first of {len(found)} such examples)"
    raise StepError(
        f"step {step}: the gradient norm is {grad_norm}; {cause}. The weights are still finite, "
        "as of the last optimizer step."
    )
