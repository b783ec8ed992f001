"""Files -> rows -> examples -> packed batches, in an order that can be taken up anywhere.

Shapes: N packed tokens, S sequences, T tokens of one sequence.

A row is a dict from a file, an Example one sequence of tokens, a Batch several in one stream without padding. Targets
are shifted where a Batch is built and nowhere else.

What an optimizer step holds is a function of the seed and of what was consumed before it, so a run is taken up again
from one number. There are two ways to fill a step:

by_rows  a stated number of rows, shuffled anew in each epoch, packed into micro-batches within the step. The batch is
         that many examples, and its gradient the same, whatever --tokens and the number of ranks. The better default.
by_bins  a stated number of bins out of a best-fit packing of the whole epoch. Each bin is as full as can be, so a
         step is a nearly constant number of tokens, from however many rows.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections import defaultdict
from functools import lru_cache
from itertools import chain

import numpy as np

from nanopost import InputError
from nanopost.batch import Example


# ------------------------------------------------------------------------------------------------ order and packing
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n rows in an epoch -> int64 [n]."""
    return _random(seed, epoch).permutation(n)


def take(n: int, seed: int, consumed: int, count: int) -> list[int]:
    """The `count` row indices that come after `consumed` of them, epoch after epoch."""
    if count < 1:
        raise InputError(f"a step of {count} rows: give --rows or --prompts 1 or more.")
    epochs = {e: order(n, seed, e) for e in range(consumed // n, (consumed + count - 1) // n + 1)}
    return [int(epochs[i // n][i % n]) for i in range(consumed, consumed + count)]


def pack(lengths, budget: int) -> list[list[int]]:
    """Best-fit decreasing (2404.10830): each length, longest first, into the fullest bin that has room for it.

    -> the indices in each bin. Over all lengths at once, in O(n log n). InputError if one is above the budget.
    """
    lengths = np.asarray(lengths).tolist()
    if max(lengths, default=0) > budget:
        raise InputError(
            f"a sequence of {max(lengths)} tokens does not fit into --tokens {budget}: raise --tokens, "
            "or shorten the sequences (--max_length, --max_new_tokens)."
        )
    bins, rooms, bins_with = (
        [],
        [],
        defaultdict(list),
    )  # rooms: the numbers of slots free in some bin, sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[i])
        if at == len(rooms):
            room, chosen = budget, []
            bins.append(chosen)
        else:
            room = rooms[at]
            chosen = bins_with[room].pop()
            if not bins_with[room]:
                del rooms[at]
        chosen.append(i)
        room -= lengths[i]
        if not bins_with[room]:
            insort(rooms, room)
        bins_with[room].append(chosen)
    return bins


def packed_epoch(lengths, budget: int, seed: int, epoch: int) -> list[list[int]]:
    """All rows of an epoch in bins, in random order -> the row indices in each.

    Rows of equal length trade places from epoch to epoch, so the number of bins is the same in all of them.
    """
    rng = _random(seed, epoch)
    shuffled = rng.permutation(len(lengths))
    bins = pack(np.asarray(lengths)[shuffled], budget)
    return [shuffled[bins[b]].tolist() for b in rng.permutation(len(bins))]


def _random(seed, epoch):
    if seed < 0:
        raise InputError(f"--seed {seed}: give 0 or more.")
    return np.random.default_rng((seed, epoch))


def fill_rate(lengths, bins: list[list[int]], budget: int) -> float:
    """Share of the slots of all bins that hold a token."""
    return sum(lengths[i] for i in chain(*bins)) / (len(bins) * budget)


def micro_batches(lengths, tokens: int, ranks: int = 1) -> list[list[int]]:
    """Micro-batches of at most `tokens` tokens -> the indices in each, in order; some may be empty.

    As few as best fit finds, and a multiple of ranks; filled evenly if that fits, which lowers the peak of memory and
    spares ranks waiting for each other. InputError if one length is above `tokens`.
    """
    bins = pack(lengths, tokens)
    bins += [[] for _ in range(-len(bins) % ranks)]
    even, filled = [[] for _ in bins], [(0, b) for b in range(len(bins))]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, b = filled[0]
        even[b].append(i)
        heapq.heapreplace(filled, (total + lengths[i], b))
    fits = max(filled, default=(0,))[0] <= tokens
    return [sorted(b) for b in (even if fits else bins)]


def by_rows(lengths, tokens: int, seed: int):
    """-> rows in an epoch, and f(consumed, count, rank, size): the rank's micro-batches of the next `count` rows.

    f gives lists of row indices, as many on each rank; an empty one is for batch_of([]).
    """

    def of_step(consumed, count, rank=0, size=1):
        rows = take(len(lengths), seed, consumed, count)
        bins = micro_batches([lengths[i] for i in rows], tokens, size)
        return [[rows[i] for i in b] for b in bins[rank::size]]

    return len(lengths), of_step


def by_bins(lengths, tokens: int, seed: int):
    """-> bins in an epoch, and f as that of by_rows, of the next `count` bins, of which each is a micro-batch."""
    epoch_bins = lru_cache(2)(lambda epoch: packed_epoch(lengths, tokens, seed, epoch))
    num_bins = len(epoch_bins(0))

    def of_step(consumed, count, rank=0, size=1):
        bins = [epoch_bins(i // num_bins)[i % num_bins] for i in range(consumed, consumed + count)]
        bins += [[] for _ in range(-count % size)]
        return bins[rank::size]

    return num_bins, of_step


def overlong(
    examples: list[Example], max_length: int, how: str
) -> tuple[list[Example], dict[str, int]]:
    """Bring every example to at most max_length tokens -> (examples, counts for the log).

    how: truncate (cut the end off), split (into pieces, each a sequence by itself, whose
    first token is the last of the one before: so none loses its target) or drop. What has no trained token
    is left out as well, and counted apart: examples that had none before, and pieces that have none after a cut.
    InputError if nothing is left of any.
    """
    if max_length < 2:
        raise InputError(
            f"--max_length {max_length}: give 2 or more, since the first token is nobody's target."
        )
    kept, counts = (
        [],
        dict.fromkeys(
            (
                "overlong",
                "pieces",
                "tokens_cut",
                "answers_without_their_end",
                "untrained_after",
                "untrained_before",
            ),
            0,
        ),
    )
    for e in examples:
        if not e.num_targets:
            counts["untrained_before"] += 1
            continue
        pieces = [e]
        if len(e) > max_length:
            starts = {"truncate": [0], "split": range(0, len(e) - 1, max_length - 1), "drop": []}[
                how
            ]
            pieces = [e[i : i + max_length] for i in starts]
            counts["overlong"] += 1
            counts["answers_without_their_end"] += int(
                how == "truncate" and e.mask[max_length:].any()
            )
            counts["pieces"] += len(pieces)
            counts["tokens_cut"] += 0 if how == "split" else len(e) - sum(map(len, pieces))
        trained = [p for p in pieces if p.num_targets]
        counts["untrained_after"] += len(pieces) - len(trained)
        kept += trained
    if examples and not kept:
        raise InputError(
            f"none of {len(examples)} examples has a trained token within --max_length {max_length} "
            f"(--overlong {how}), and {counts['untrained_before']} had none before: see --train_on."
        )
    return kept, counts


def check_divides(name: str, value: int, **parts: int):
    """InputError if --name does not divide into, say, 2 ranks x 3 minibatches; it names the nearest that would."""
    share = math.prod(parts.values())
    if value % share:
        fits = " or ".join(
            str(n) for n in (value // share * share, value // share * share + share) if n
        )
        into = " x ".join(f"{n} {part}" for part, n in parts.items())
        raise InputError(f"--{name} {value} does not divide into {into}: {fits} would.")


def counted(counts: dict[str, int]) -> str:
    """Counts above zero in words."""
    return ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n) or "none"
