"""The order of rows, and how they fill packed micro-batches.

What an optimizer step holds depends only on the seed and on how much was consumed before it, so one
number is enough to resume the data. There are two ways to fill a step:

by_rows  a fixed number of rows, shuffled in each epoch and packed within the step. The gradient is
         that of exactly these rows, whatever --tokens and the number of ranks. The better default.
by_bins  a fixed number of bins from a best-fit packing of the whole epoch. Bins are as full as
         possible, so a step is a nearly constant number of tokens from a varying number of rows.
"""

import heapq
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import chain

import numpy as np

from nanopost import InputError, dist
from nanopost.batch import Example

CHUNK = 8  # prompts that are sampled and rewarded at once with --reproducible
# A token of a sequence of L costs 24 D^2 operations a layer in its matrices and 2 L D in causal
# attention, so a sequence costs L + L^2 / (12 D) tokens. This is 12 D of a 1B model, D = 2048.
ATTENTION = 12 * 2048


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n rows in an epoch -> int64 [n]."""
    return _random(seed, epoch).permutation(n)


def take(n: int, seed: int, consumed: int, count: int) -> list[int]:
    """The `count` row indices that follow the first `consumed`, epoch after epoch."""
    if count < 1:
        raise InputError(f"a step of {count} rows: give --rows or --prompts 1 or more.")
    epochs = {e: order(n, seed, e) for e in range(consumed // n, (consumed + count - 1) // n + 1)}
    return [int(epochs[i // n][i % n]) for i in range(consumed, consumed + count)]


def share(n: int, seed: int, consumed: int, count: int, world) -> tuple[list[int], list[int]]:
    """A rank's share of the next `count` rows -> (row indices, serial numbers).

    A serial counts the rows drawn since the run began: it seeds what is sampled for the row, so the
    samples do not depend on the number of ranks. Serial i is of rank i % world.size, wherever the
    count begins; with --reproducible see part.
    """
    indices = take(n, seed, consumed, count)
    mine = part(count, world, consumed)
    return [indices[i] for i in mine], [consumed + i for i in mine]


def part(count: int, world, first: int = 0) -> list[int]:
    """Which of `count` things, 0 to count - 1, are a rank's: i if first + i is rank modulo size.

    With --reproducible it is whole chunks of CHUNK, the last of all perhaps less: what is computed
    in such chunks is the same on any number of ranks.
    """
    if dist.reproducible:
        return [i for i in range(count) if i // CHUNK % world.size == world.rank]
    return list(range((world.rank - first) % world.size, count, world.size))


def pack(lengths, budget: int) -> list[list[int]]:
    """Best-fit decreasing (2404.10830): each length, longest first, into the fullest bin that has
    room for it.

    -> the indices in each bin. Over all lengths at once, in O(n log n). InputError if one is above
    the budget.
    """
    lengths = np.asarray(lengths).tolist()
    if max(lengths, default=0) > budget:
        raise InputError(
            f"a sequence of {max(lengths)} tokens does not fit into --tokens {budget}: raise "
            "--tokens, or shorten the sequences (--max_length, --max_new_tokens)."
        )
    bins = []
    rooms = []  # sorted: the numbers of free slots that bins have
    bins_with = defaultdict(list)  # number of free slots -> bins
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

    Only rows of equal length trade places from epoch to epoch, so all epochs have the same number
    of bins.
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

    As few as best fit finds, rounded up to a multiple of ranks; filled evenly if that fits, which
    lowers peak memory. InputError if one length is above `tokens`.
    """
    bins = pack(lengths, tokens)
    bins += [[] for _ in range(-len(bins) % ranks)]
    even = [[] for _ in bins]
    filled = [(0, b) for b in range(len(bins))]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, b = filled[0]
        even[b].append(i)
        heapq.heapreplace(filled, (total + lengths[i], b))
    fits = max(filled, default=(0,))[0] <= tokens
    return [sorted(b) for b in (even if fits else bins)]


def cost(tokens: int, before: int = 0) -> float:
    """The cost of tokens that follow `before` others of their sequence, in tokens."""
    return tokens + tokens * (tokens + 2 * before) / ATTENTION


def deal(parts: list[list[int]], costs, ranks: int) -> list[list[list[int]]]:
    """Micro-batches of micro_batches -> those of each rank, equally many: empty ones fill up.

    costs: of each index. Ranks wait for each other in every layer of every micro-batch, so what
    runs at the same time should cost the same: micro-batches are dealt in rounds, from the most
    expensive down.
    """

    def total(part):
        return sum(costs[i] for i in part)

    dearest_first = sorted(parts, key=total, reverse=True)
    dearest_first += [[] for _ in range(-len(parts) % ranks)]
    return [dearest_first[rank::ranks] for rank in range(ranks)]


def by_rows(n: int, seed: int):
    """-> (rows in an epoch, f(consumed, count)), f: the indices of the next `count` rows."""
    return n, partial(take, n, seed)


def by_bins(lengths, tokens: int, seed: int):
    """-> (bins in an epoch, f as in by_rows): the rows in the next `count` bins."""
    epoch_bins = lru_cache(2)(lambda epoch: packed_epoch(lengths, tokens, seed, epoch))
    num_bins = len(epoch_bins(0))

    def of_step(consumed, count):
        bins = [epoch_bins(i // num_bins)[i % num_bins] for i in range(consumed, consumed + count)]
        return list(chain(*bins))

    return num_bins, of_step


def minibatches(
    items: list, group: int, serials: list[int], all_serials: list[int], parts: int
) -> list[list]:
    """This rank's share of `parts` minibatches of whole groups, as equal as possible over all
    ranks, in the order of the groups' serials: they do not depend on the number of ranks.

    items: `group` neighbours for each of this rank's serials. all_serials: those of all ranks.
    """
    part_of = {}
    for part, cut in enumerate(np.array_split(sorted(all_serials), parts)):
        part_of |= dict.fromkeys(cut.tolist(), part)
    split = [[] for _ in range(parts)]
    for i, serial in enumerate(serials):
        split[part_of[serial]] += items[i * group : (i + 1) * group]
    return split


def shuffled_minibatches(
    items: list,
    group: int,
    serials: list[int],
    all_serials: list[int],
    parts: int,
    epochs: int,
    seed: tuple,
) -> Iterator[list]:
    """As minibatches, `epochs` times over, each in a new order of the groups, the same on all
    ranks."""
    place_of = {serial: i for i, serial in enumerate(serials)}
    for epoch in range(epochs):
        order = np.random.default_rng((*seed, epoch)).permutation(sorted(all_serials))
        for part in np.array_split(order, parts):
            mine = [place_of[serial] for serial in part.tolist() if serial in place_of]
            yield [item for i in mine for item in items[i * group : (i + 1) * group]]


def fit_to(
    examples: list[Example], max_length: int, how: str
) -> tuple[list[Example], dict[str, int]]:
    """Bring every example to at most max_length tokens -> (examples, counts for the log).

    how: truncate (cut the end off), split (into pieces, each a sequence by itself, whose first
    token repeats the last one of the piece before it, so that no target is lost) or drop. Examples
    without a target are dropped too and counted separately: those that had none before, and pieces
    that a cut left without any. InputError if nothing is left.
    """
    if max_length < 2:
        raise InputError(
            f"--max_length {max_length}: give 2 or more, since the first token is never a target."
        )
    kept = []
    counts = dict.fromkeys(
        (
            "overlong",
            "pieces",
            "tokens_cut",
            "answers_without_their_end",
            "untrained_after",
            "untrained_before",
        ),
        0,
    )
    for e in examples:
        if not e.num_targets:
            counts["untrained_before"] += 1
            continue
        pieces = _cut(e, max_length, how)
        if len(e) > max_length:
            counts["overlong"] += 1
            counts["pieces"] += len(pieces)
            if how != "split":
                counts["tokens_cut"] += len(e) - sum(map(len, pieces))
            if how == "truncate" and e.mask[max_length:].any():
                counts["answers_without_their_end"] += 1
        trained = [piece for piece in pieces if piece.num_targets]
        counts["untrained_after"] += len(pieces) - len(trained)
        kept += trained
    if examples and not kept:
        raise InputError(
            f"none of {len(examples)} examples has a trained token within --max_length "
            f"{max_length} (--overlong {how}), and {counts['untrained_before']} had none before: "
            "see --train_on."
        )
    return kept, counts


def _cut(e, max_length, how):
    if len(e) <= max_length:
        return [e]
    if how == "drop":
        return []
    if how == "truncate":
        return [e[:max_length]]
    return [e[i : i + max_length] for i in range(0, len(e) - 1, max_length - 1)]


def counted(counts: dict[str, int]) -> str:
    """The counts above zero, in words."""
    return ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items() if n) or "none"
