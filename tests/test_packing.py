"""packing.py: the order of rows, bins, micro-batches and maximum lengths."""

import itertools
import random

import numpy as np
import pytest

from nanopost import InputError, packing
from nanopost.batch import Example


def skewed(n, longest, seed=0):
    """Lengths as those of chat logs: many short, few long."""
    return np.clip(np.random.default_rng(seed).lognormal(5, 1, n), 2, longest).astype(int).tolist()


# -------------------------------------------------------------------------------------------- order
def test_each_epoch_is_a_permutation_of_its_own():
    for n in (1, 2, 7, 50):
        rows = packing.take(n, seed=3, consumed=0, count=4 * n)
        epochs = [rows[i : i + n] for i in range(0, 4 * n, n)]
        assert all(sorted(e) == list(range(n)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert epochs == [packing.order(50, 3, e).tolist() for e in range(4)]
    assert packing.take(50, seed=4, consumed=0, count=50) != epochs[0]


@pytest.mark.parametrize("n", [1, 3, 10])
def test_any_split_of_counts_gives_the_same_rows(n):
    whole, draw = packing.take(n, 5, 0, 60), random.Random(n)
    for _ in range(20):
        got = []
        while len(got) < 60:
            got += packing.take(n, 5, len(got), min(draw.randint(1, 25), 60 - len(got)))
        assert got == whole


def test_the_order_of_rows_is_that_of_the_checkpoints_already_written():
    assert packing.take(8, seed=0, consumed=5, count=6) == [0, 1, 7, 1, 3, 7]
    assert packing.packed_epoch([3, 3, 3, 5, 2, 1], 6, seed=1, epoch=2) == [[1, 0], [3], [2, 4, 5]]


# --------------------------------------------------------------------------------------------- bins
def best_possible(lengths, budget):
    """The least number of bins, by brute force: try each length in every bin with other room."""
    least = len(lengths)

    def place(i, rooms):
        nonlocal least
        if len(rooms) >= least:
            return
        if i == len(lengths):
            least = len(rooms)
            return
        for room in {r for r in rooms if r >= lengths[i]}:
            rest = list(rooms)
            rest.remove(room)
            place(i + 1, rest + [room - lengths[i]])
        place(i + 1, rooms + [budget - lengths[i]])

    lengths = sorted(lengths, reverse=True)
    place(0, [])
    return least


def assert_holds(bins, lengths, budget):
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= budget for b in bins)


def best_fit_decreasing(lengths, budget):
    """The definition, in O(n * bins) -> sorted fills."""
    fills = []
    for length in sorted(lengths, reverse=True):
        room = [f for f in fills if f + length <= budget]
        if room:
            fills.remove(max(room))
        fills.append(max(room, default=0) + length)
    return sorted(fills)


def test_pack_is_near_the_best_possible_packing():
    rng, optimal = np.random.default_rng(0), 0
    for _ in range(150):
        budget = int(rng.integers(5, 30))
        lengths = rng.integers(1, budget + 1, rng.integers(1, 10)).tolist()
        bins, best = packing.pack(lengths, budget), best_possible(lengths, budget)
        assert_holds(bins, lengths, budget)
        assert best <= len(bins) <= 11 / 9 * best + 6 / 9
        optimal += len(bins) == best
    assert optimal >= 145


def test_pack_is_best_fit_decreasing():
    rng = np.random.default_rng(1)
    for _ in range(50):
        budget = int(rng.integers(5, 200))
        lengths = rng.integers(1, budget + 1, 60).tolist()
        bins = packing.pack(lengths, budget)
        assert sorted(sum(lengths[i] for i in b) for b in bins) == best_fit_decreasing(
            lengths, budget
        )


@pytest.mark.parametrize("n, longest, budget", [(3000, 512, 512), (3000, 700, 2048)])
def test_pack_fills_as_many_bins_as_trl_does(n, longest, budget):
    trl, pa = pytest.importorskip("trl.data_utils"), pytest.importorskip("pyarrow")
    lengths = skewed(n, longest)
    table = pa.table({"input_ids": pa.array([[0] * length for length in lengths])})
    theirs, bins = trl._pack_bfd(table, budget), packing.pack(lengths, budget)
    assert len(bins) == len(theirs)
    assert packing.fill_rate(lengths, bins, budget) == sum(lengths) / len(theirs) / budget


def test_packing_everything_at_once_fills_more_than_packing_a_thousand_at_a_time():
    lengths, budget = skewed(20_000, 2048), 2048
    chunks = sum(len(packing.pack(lengths[i : i + 1000], budget)) for i in range(0, 20_000, 1000))
    bins = packing.pack(lengths, budget)
    assert_holds(bins, lengths, budget)
    assert len(bins) < chunks and packing.fill_rate(lengths, bins, budget) > 0.999


def test_packed_epochs_hold_every_row_with_other_neighbours():
    lengths = skewed(2000, 512)
    epochs = [packing.packed_epoch(lengths, 512, 7, e) for e in (0, 1)]
    for bins in epochs:
        assert_holds(bins, lengths, 512)
    sets = [{frozenset(b) for b in bins if len(b) > 1} for bins in epochs]
    assert len(epochs[0]) == len(epochs[1]) == len(packing.pack(lengths, 512))
    assert len(sets[0] & sets[1]) < 0.2 * len(sets[0])
    assert (
        epochs[0]
        == packing.packed_epoch(lengths, 512, 7, 0)
        != packing.packed_epoch(lengths, 512, 8, 0)
    )
    filled = [sum(lengths[i] for i in b) for b in epochs[0]]
    assert filled != sorted(filled, reverse=True)  # else the longest rows would always come first


def test_pack_refuses_a_sequence_above_the_budget_with_both_numbers():
    for pack in (packing.pack, packing.micro_batches):
        with pytest.raises(InputError, match=r"129 tokens .*--tokens 128.*--max_length"):
            pack([5, 129, 128], 128)


# ------------------------------------------------------------------------------------ micro-batches
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_micro_batches_are_few_even_and_a_multiple_of_the_ranks(ranks):
    lengths = skewed(200, 256, seed=ranks)
    parts, least = packing.micro_batches(lengths, 1024, ranks), len(packing.pack(lengths, 1024))
    assert_holds(parts, lengths, 1024)
    assert len(parts) % ranks == 0 and least <= len(parts) < least + ranks
    filled = [sum(lengths[i] for i in b) for b in parts]
    assert max(filled) - min(filled) <= max(lengths) and all(b == sorted(b) for b in parts)


def test_micro_batches_stay_as_packed_where_an_even_split_does_not_fit():
    lengths = [
        6,
        5,
        4,
        4,
        3,
        3,
        3,
        2,
    ]  # 30 tokens in three bins of 10, which longest-into-emptiest misses
    parts = packing.micro_batches(lengths, 10, ranks=4)
    assert_holds(parts, lengths, 10)
    assert len(parts) == 4
    tight = [5, 5, 4, 4, 2, 10]
    assert sorted(sum(tight[i] for i in b) for b in packing.micro_batches(tight, 10)) == [
        10,
        10,
        10,
    ]


def test_tokens_cost_themselves_and_the_keys_they_see():
    for tokens, before in ((1, 0), (5, 0), (7, 100)):
        # A token in the middle of its own key: half of that counts.
        keys = sum(before + t + 0.5 for t in range(tokens))
        assert packing.cost(tokens, before) == pytest.approx(tokens + 2 * keys / 24_576)
    parts = packing.cost(50) + packing.cost(30, 50)
    assert parts == pytest.approx(packing.cost(80))


def test_few_rows_on_many_ranks_leave_empty_micro_batches():
    assert packing.micro_batches([7, 9], 16, ranks=4) == [[1], [0], [], []]
    assert packing.micro_batches([], 16) == []


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_run_equally_many_micro_batches_of_similar_cost(ranks):
    """Some rows are long: of micro-batches of as many tokens, one long row costs more."""
    lengths = [30_000] * 3 + [15_000] * 5 + [1000] * 150
    parts = packing.micro_batches(lengths, 32_000)
    random.Random(ranks).shuffle(parts)
    dealt = packing.deal(parts, list(map(packing.cost, lengths)), ranks)
    assert {len(mine) for mine in dealt} == {-(-len(parts) // ranks)}
    assert sorted(part for mine in dealt for part in mine if part) == sorted(parts)

    def cost(part):
        return sum(lengths[i] + lengths[i] ** 2 / 24_576 for i in part)

    # Ranks wait for the slowest in each micro-batch; no other rounds make them wait for less.
    waited = [max(map(cost, at_once)) for at_once in zip(*dealt)]
    assert waited == sorted(map(cost, parts), reverse=True)[::ranks]


# ---------------------------------------------------------------------------------- optimizer steps
def steps_of(how, lengths):
    if how == "rows":
        return packing.by_rows(len(lengths), 11)
    return packing.by_bins(lengths, 256, 11)


@pytest.mark.parametrize("how", ["rows", "bins"])
def test_an_epoch_of_steps_visits_every_row_once(how):
    per_epoch, of_step = steps_of(how, skewed(90, 200))
    steps = [of_step(consumed, 1) for consumed in range(2 * per_epoch)]
    first, second = (
        list(itertools.chain(*part)) for part in (steps[:per_epoch], steps[per_epoch:])
    )
    assert sorted(first) == sorted(second) == list(range(90)) and first != second


@pytest.mark.parametrize("how", ["rows", "bins"])
def test_a_step_is_the_same_at_any_resumption(how):
    _, of_step = steps_of(how, skewed(90, 200))
    for consumed in range(0, 40, 3):
        _, resumed = steps_of(how, skewed(90, 200))
        assert resumed(consumed, 3) == of_step(consumed, 3)


def test_by_rows_takes_the_stated_number_of_rows_in_order():
    per_epoch, of_step = packing.by_rows(90, 11)
    assert per_epoch == 90
    assert of_step(80, 24) == packing.take(90, 11, 80, 24)
    with pytest.raises(InputError, match="a step of 0 rows"):
        of_step(0, 0)


def test_by_bins_takes_full_bins():
    lengths = skewed(90, 200)
    per_epoch, of_step = packing.by_bins(lengths, 256, 11)
    assert per_epoch == len(packing.pack(lengths, 256))
    filled = [sum(lengths[i] for i in of_step(consumed, 1)) for consumed in range(per_epoch)]
    assert max(filled) <= 256 and sum(filled) == sum(lengths)


def test_a_negative_seed_is_refused():
    for f in (lambda: packing.order(5, -1, 0), lambda: packing.packed_epoch([1], 5, -1, 0)):
        with pytest.raises(InputError, match="--seed -1"):
            f()


# ----------------------------------------------------------------------------------- maximum length
def overlong_examples():
    return [
        Example(np.arange(4), [False, True, True, True]),
        Example(np.arange(10), [False] * 7 + [True] * 3, {"logp": np.arange(10.0), "adv": 1.0}),
        Example(np.arange(9), [False, True] + [False] * 7, {"logp": np.arange(9.0), "adv": 2.0}),
        Example(
            np.arange(5), [True] + [False] * 4
        ),  # the first token has nothing before it to be predicted from
        Example(np.arange(9), [False] * 4 + [True] + [False] * 4),
    ]  # nor had this one, if pieces did not overlap


@pytest.mark.parametrize(
    "how, kept, counts",
    [
        (
            "truncate",
            [[0, 1, 2, 3], [0, 1, 2, 3]],
            dict(pieces=3, tokens_cut=16, answers_without_their_end=2, untrained_after=2),
        ),
        (
            "split",
            [[0, 1, 2, 3], [6, 7, 8, 9], [0, 1, 2, 3], [3, 4, 5, 6]],
            dict(pieces=9, tokens_cut=0, answers_without_their_end=0, untrained_after=6),
        ),
        (
            "drop",
            [[0, 1, 2, 3]],
            dict(pieces=0, tokens_cut=28, answers_without_their_end=0, untrained_after=0),
        ),
    ],
)
def test_overlong_cuts_and_counts(how, kept, counts):
    examples = overlong_examples()
    got, count = packing.fit_to(examples, 4, how)
    assert [e.ids.tolist() for e in got] == kept
    assert count == counts | {"overlong": 3, "untrained_before": 1}


def test_overlong_cuts_columns_with_their_tokens():
    pieces, _ = packing.fit_to(overlong_examples()[1:2], 4, "split")
    assert [p.columns["logp"].tolist() for p in pieces] == [[6, 7, 8, 9]]
    assert [p.mask.tolist() for p in pieces] == [[False, True, True, True]]
    assert [p.columns["adv"] for p in pieces] == [1.0]


def test_overlong_leaves_what_fits_as_it_is():
    examples = overlong_examples()[:3]
    for how in ("truncate", "split", "drop"):
        got, counts = packing.fit_to(examples, 10, how)
        assert all(a is b for a, b in zip(got, examples, strict=True)) and not any(counts.values())


def test_overlong_refuses_to_leave_nothing():
    with pytest.raises(
        InputError, match=r"none of 1 examples .*--max_length 4 \(--overlong truncate\), and 0 had"
    ):
        packing.fit_to(overlong_examples()[1:2], 4, "truncate")
    with pytest.raises(InputError, match="--max_length 1: give 2 or more"):
        packing.fit_to(overlong_examples(), 1, "split")
    assert packing.fit_to([], 4, "drop")[0] == []
