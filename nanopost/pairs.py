"""Pairs of examples, a chosen and a rejected one: what a preference loss needs of them before it is computed.

Shapes: P pairs, S = 2 P sequences, of which 2p is the chosen one of pair p and 2p + 1 the rejected one.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from nanopost import InputError, dist
from nanopost.data import Example, check_pair_row, check_unpaired_row, order, overlong, split_prompt
from nanopost.logprob import logprobs_of
from nanopost.losses import Pairs, per_sequence


def unpaired(rows: list[dict]) -> list[dict]:
    """Rows {"prompt", "chosen", "rejected"} as two each, {"prompt", "completion", "label"}; others as they are."""
    out = []
    for row in rows:
        if "chosen" not in row:
            out.append(row)
            continue
        check_pair_row(row)
        row = split_prompt(row)
        rest = {k: v for k, v in row.items() if k not in ("chosen", "rejected")}
        out += [
            {**rest, "completion": row["chosen"], "label": True},
            {**rest, "completion": row["rejected"], "label": False},
        ]
    return out


def fit(pairs: list[tuple[Example, Example]], max_length: int, how: str):
    """Bring both sides of every pair to at most max_length tokens -> (pairs, counts for the log).

    how: truncate (cut the end off) or drop. Left out and counted too: pairs of which a side has no trained token
    (emptied: perhaps by the cut) and pairs whose sides are alike. swapped: kept, but the same two completions occur the
    other way round as well, so one of these pairs is wrong. InputError if nothing is left.
    """
    kept, counts = [], dict.fromkeys(("overlong", "truncated", "emptied", "alike", "swapped"), 0)
    for pair in pairs:
        too_long = max(map(len, pair)) > max_length
        counts["overlong"] += too_long
        if too_long and how == "drop":
            continue
        pair = tuple(e[:max_length] for e in pair)
        emptied = not all(e.mask[1:].any() for e in pair)
        alike = not emptied and pair[0].ids.tolist() == pair[1].ids.tolist()
        counts["emptied"] += emptied
        counts["alike"] += alike
        if not emptied and not alike:
            counts["truncated"] += too_long
            kept.append(pair)
    seen = {tuple(e.ids.tobytes() for e in pair) for pair in kept}
    counts["swapped"] = sum((b, a) in seen for a, b in seen)
    if pairs and not kept:
        raise InputError(
            f"none of {len(pairs)} pairs is left within --max_length {max_length} (--overlong {how}): "
            f"{', '.join(f'{n} {name}' for name, n in counts.items())}."
        )
    return kept, counts


def labelled(tokenizer, rows: list[dict], max_length: int, how: str):
    """Rows for KTO, {"prompt", "completion", "label"} or pairs taken apart -> (mismatched pairs, counts)."""
    examples = []
    for row in unpaired(rows):
        check_unpaired_row(row)
        examples.append(tokenizer.example(row, "completion"))
        examples[-1].columns["label"] = float(row["label"])
    examples, counts = overlong(examples, max_length, how)
    return mismatched(examples, max_length), counts


def mismatched(examples: list[Example], max_length: int) -> list[tuple[Example, Example]]:
    """Each example beside its prompt with the completion of another one: KTO's estimate of the KL (2402.01306).

    Which one is drawn once, so that reference log-probs can be computed once. Columns that are numbers stay.
    """
    if len(examples) == 1:
        raise InputError("kto compares a completion with that of another row: give 2 rows or more.")
    drawn, pairs = order(len(examples), 0, 0), {}
    for i, j in zip(drawn, np.roll(drawn, -1)):
        a, b = examples[i], examples[j]
        ids = np.concatenate([a.ids[: a.mask.argmax()], b.ids[b.mask.argmax() :]])
        mask = np.concatenate([a.mask[: a.mask.argmax()], b.mask[b.mask.argmax() :]])
        pairs[i] = a, Example(ids, mask, dict(a.columns))[:max_length]
    return [pairs[i] for i in range(len(examples))]


def best_and_worst(groups: list[list], reward_PG: torch.Tensor) -> list[tuple[Example, Example]]:
    """Of each prompt's rollouts the one of highest and the one of lowest reward. A group where these are equal gives
    none, nor does one where both are the same tokens: a reward model's scores of these differ in the last digits."""
    best = [
        (group[int(reward_G.argmax())], group[int(reward_G.argmin())])
        for group, reward_G in zip(groups, reward_PG)
        if reward_G.max() > reward_G.min()
    ]
    return [
        (chosen.example(), rejected.example())
        for chosen, rejected in best
        if chosen.ids != rejected.ids
    ]


def add_columns(pairs: list, ld_alpha: float = 1.0, train_prompt: bool = False):
    """Give both sides of each pair, in place, the columns by which log-probs become those of an answer.

    weight: 1 on trained tokens; ld_alpha on those past the length of the shorter side (LD-DPO 2409.06411). length:
    trained tokens. train_prompt: prompt tokens become targets too, of weight 0 (ORPO's nll).
    """
    for pair in pairs:
        shared = min(int(e.mask.sum()) for e in pair)
        for e in pair:
            weight = np.where(e.mask.cumsum() <= shared, 1.0, ld_alpha) * e.mask
            e.columns |= {"weight": weight.astype(np.float32), "length": int(e.mask.sum())}
            e.mask = e.mask | train_prompt


def add_reference(pairs: list, reference, tokens: int, device):
    """The column ref_logp: log-probs of each answer under a reference, summed with the weights; 0 if that is None.

    A collective: every rank calls it with pairs of its own.
    """
    examples = [e for pair in pairs for e in pair]
    logps = (
        logprobs_of(reference, examples, tokens, 1.0, device)
        if reference
        else [0.0] * len(examples)
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


def gathered(model, pairs: list, tokens: int, device, **options) -> tuple[Pairs, slice]:
    """The pairs of all ranks under the model as it is -> (Pairs in float64, which of its sequences are this rank's).

    logp_S and nll_S are leaves: loss_P.sum().backward() on a loss of the whole step leaves in their .grad what each
    sequence's log-prob has to be multiplied with, and a second pass in micro-batches of any size has that gradient
    exactly. options: those of Pairs. A collective.
    """
    examples = [e for pair in pairs for e in pair]
    table = [
        [
            float(x)
            for x in (
                (logp * e.columns["weight"]).sum(),
                -logp.sum(),
                e.columns["ref_logp"],
                e.columns["length"],
                e.mask[1:].sum(),
                e.columns.get("label", 1.0),
            )
        ]
        for e, logp in zip(examples, logprobs_of(model, examples, tokens, 1.0, device))
    ]
    before = sum(dist.gather([len(table)])[: torch.distributed.get_rank()])
    table, mine = dist.gather(table), slice(before, before + len(table))
    logp_S, nll_S, ref_S, length_S, trained_S, label_S = (
        torch.tensor(table, dtype=torch.float64).view(len(table), 6).T
    )
    return Pairs(
        logp_S.clone().requires_grad_(),
        ref_S,
        length_S,
        nll_S.clone().requires_grad_(),
        float(trained_S[0::2].mean()),
        label_S[0::2],
        **options,
    ), mine


def pulled_back(pairs: list, p: Pairs, mine: slice) -> list[tuple[Example]]:
    """After loss_P.sum().backward() on gathered pairs -> this rank's examples, each alone, with the columns slope and
    nll_slope: the second pass is (slope_S logp_S + nll_slope_S nll_S).sum(). Those with neither need no pass."""
    slopes_2S = [
        torch.zeros_like(x_S) if x_S.grad is None else x_S.grad for x_S in (p.logp_S, p.nll_S)
    ]
    examples = [e for pair in pairs for e in pair]
    for e, *slopes in zip(examples, *(x_S[mine].tolist() for x_S in slopes_2S)):
        e.columns["slope"], e.columns["nll_slope"] = slopes
    return [(e,) for e in examples if e.columns["slope"] or e.columns["nll_slope"]]


def of_batch(batch, logp_N, nll_tokens: float, **options) -> Pairs:
    """The pairs of a micro-batch; the options are those of Pairs."""
    logp_S, nll_S = (
        per_sequence(x_N, batch.seq_N, batch.num_sequences)
        for x_N in (logp_N * batch["weight"], -logp_N)
    )
    return Pairs(logp_S, batch["ref_logp"], batch["length"], nll_S, nll_tokens, **options)


@torch.no_grad()
def follow(reference, model, share: float):
    """reference += share (model - reference): TR-DPO 2404.09656 eq. 5. Both are sharded alike."""
    for ours, theirs in zip(reference.parameters(), model.parameters()):
        ours.lerp_(theirs, share)
