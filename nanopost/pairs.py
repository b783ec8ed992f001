"""Pairs of examples, a chosen and a rejected one: what a preference loss needs of them before it is computed.

Shapes: P pairs, S = 2 P sequences, of which 2p is the chosen one of pair p and 2p + 1 the rejected one.
"""

import numpy as np
import torch

from nanopost import InputError
from nanopost.batch import Example
from nanopost.packing import order, overlong
from nanopost.rows import check_unpaired_row, unpaired


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
        emptied = not all(e.num_targets for e in pair)
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
