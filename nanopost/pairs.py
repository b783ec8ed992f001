"""Pairs of examples, (chosen, rejected): fitted to a length, matched, given columns for losses."""

import numpy as np
import torch

from nanopost import InputError
from nanopost.batch import Example
from nanopost.packing import order

Pair = tuple[Example, Example]


def fit_to(pairs: list[Pair], max_length: int, how: str) -> tuple[list[Pair], dict[str, int]]:
    """Bring both sides of every pair to at most max_length tokens -> (pairs, counts for the log).

    how: truncate (cut the end off) or drop. Also dropped and counted: pairs with a side that has
    no trained token (emptied: perhaps by the cut), with identical sides (alike), or with a side
    that the other one begins with (continued). Kept and counted: swapped, where the same two
    completions also occur the other way round, so one of the pairs is wrong. InputError if nothing
    is left.
    """
    kept = []
    names = ("overlong", "truncated", "emptied", "alike", "continued", "swapped")
    counts = dict.fromkeys(names, 0)
    for pair in pairs:
        overlong = max(map(len, pair)) > max_length
        counts["overlong"] += overlong
        if overlong and how == "drop":
            continue
        chosen, rejected = (e[:max_length] for e in pair)
        if not (chosen.num_targets and rejected.num_targets):
            counts["emptied"] += 1
        elif chosen.ids.tolist() == rejected.ids.tolist():
            counts["alike"] += 1
        elif _begins(chosen, rejected) or _begins(rejected, chosen):
            counts["continued"] += 1
        else:
            counts["truncated"] += overlong
            kept.append((chosen, rejected))
    seen = {(a.ids.tobytes(), b.ids.tobytes()) for a, b in kept}
    counts["swapped"] = sum((b, a) in seen for a, b in seen)
    if pairs and not kept:
        reasons = ", ".join(f"{n} {name}" for name, n in counts.items())
        raise InputError(
            f"none of {len(pairs)} pairs is left within --max_length {max_length} "
            f"(--overlong {how}): {reasons}."
        )
    return kept, counts


def _begins(one, other):
    return one.ids.tolist() == other.ids[: len(one)].tolist()


def mismatched(examples: list[Example], max_length: int) -> list[Pair]:
    """Pair each example with its prompt followed by another example's completion, from which KTO
    (2402.01306) estimates the KL.

    Partners are drawn once, so that reference log-probs can be computed once. Columns that are
    numbers stay.
    """
    if len(examples) == 1:
        raise InputError(
            "kto compares a completion with another row's: give 2 rows or more, for training and "
            "held out (--holdout, --eval_data)."
        )
    drawn = order(len(examples), 0, 0)
    pairs = [None] * len(examples)
    for i, j in zip(drawn, np.roll(drawn, -1)):
        row, other = examples[i], examples[j]
        prompt, answer = row.prompt_length, other.prompt_length
        ids = np.concatenate([row.ids[:prompt], other.ids[answer:]])
        mask = np.concatenate([row.mask[:prompt], other.mask[answer:]])
        pairs[i] = row, Example(ids, mask, dict(row.columns))[:max_length]
    return pairs


def best_and_worst(groups: list[list[Example]], reward_PG: torch.Tensor) -> list[Pair]:
    """The examples of highest and of lowest reward of each group.

    A group where these rewards are equal gives no pair, nor does one where both are the same
    tokens: a reward model's scores of those differ in the last digits. An example without a reward
    (NaN) is neither best nor worst.
    """
    pairs = []
    for group, reward_G in zip(groups, reward_PG):
        high_G, low_G = reward_G.nan_to_num(nan=-torch.inf), reward_G.nan_to_num(nan=torch.inf)
        best, worst = group[int(high_G.argmax())], group[int(low_G.argmin())]
        if high_G.max() > low_G.min() and not np.array_equal(best.ids, worst.ids):
            pairs.append((best, worst))
    return pairs


def add_columns(pairs: list[Pair], train_prompt: bool = False):
    """Give both sides of each pair, in place, the columns that sum log-probs over an answer.

    weight: 1 on trained tokens, 0 elsewhere. length: number of trained tokens. train_prompt: prompt
    tokens become targets too, of weight 0 (for ORPO's nll).
    """
    for e in (e for pair in pairs for e in pair):
        e.columns |= {"weight": e.mask.astype(np.float32), "length": int(e.mask.sum())}
        e.mask = e.mask | train_prompt
