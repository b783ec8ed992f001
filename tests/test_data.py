"""data.py: files and their mistakes, the order of rows, packing, and the one place that shifts."""

import gzip
import itertools
import json
import random
import time
from collections import Counter

import numpy as np
import pytest
import torch

from nanopost import InputError, hf, packing
from nanopost.batch import Example, batch_of
from nanopost.rows import check_prompt_row, check_sft_row, read_rows
from nanopost.rows import load as load_rows
from runs import toy


def examples_of(lengths, seed=0, **columns):
    """Random examples; columns: name -> f(T) that gives an array or a number."""
    rng = np.random.default_rng(seed)
    return [
        Example(
            rng.integers(0, 1000, n), rng.random(n) < 0.6, {k: f(n) for k, f in columns.items()}
        )
        for n in lengths
    ]


def skewed(n, longest, seed=0):
    """Lengths as those of chat logs: many short, few long."""
    return np.clip(np.random.default_rng(seed).lognormal(5, 1, n), 2, longest).astype(int).tolist()


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --------------------------------------------------------------------------------------------------------- batch_of
def test_batch_of_equals_a_golden_token_by_token():
    batch = batch_of(
        [
            Example(
                [10, 11, 12, 13],
                [False, False, True, True],
                {"old_logp": [0.1, 0.2, 0.3, 0.4], "adv": 2.0},
            ),
            Example([20], [True], {"old_logp": [0.5], "adv": -1.0}),
            Example(
                [30, 31, 32],
                [True, True, False],
                {"old_logp": np.float64([0.6, 0.7, 0.8]), "adv": np.float32(3)},
            ),
        ]
    )
    assert batch.token_N.tolist() == [10, 11, 12, 13, 20, 30, 31, 32]
    assert batch.position_N.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert batch.target_N.tolist() == [-100, 12, 13, -100, -100, 31, -100, -100]
    assert batch.mask_N.tolist() == [False, True, True, False, False, True, False, False]
    assert batch.seq_N.tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 8]
    assert (batch.max_seqlen, batch.num_sequences, batch.dummy) == (4, 3, False)
    torch.testing.assert_close(
        batch["old_logp"], torch.tensor([0.2, 0.3, 0.4, 0, 0, 0.7, 0.8, 0]), rtol=0, atol=0
    )
    assert batch["adv"].tolist() == [2.0, -1.0, 3.0]


def test_batch_has_the_stated_types_and_moves_as_a_whole():
    batch = batch_of(examples_of([3, 5], old_logp=np.zeros, adv=float))
    kinds = {
        name: getattr(batch, name).dtype
        for name in ("token_N", "position_N", "target_N", "seq_N", "mask_N", "cu_seqlens")
    }
    assert kinds == {
        "token_N": torch.int64,
        "position_N": torch.int64,
        "target_N": torch.int64,
        "seq_N": torch.int64,
        "mask_N": torch.bool,
        "cu_seqlens": torch.int32,
    }
    assert {c.dtype for c in batch.columns.values()} == {torch.float32}
    moved = batch.to("meta")
    tensors = [
        moved.token_N,
        moved.position_N,
        moved.target_N,
        moved.mask_N,
        moved.cu_seqlens,
        *moved.columns.values(),
    ]
    assert {t.device.type for t in tensors} == {
        "meta"
    } and moved.columns.keys() == batch.columns.keys()
    assert moved.max_seqlen == 5 and batch.token_N.device.type == "cpu"


def test_every_target_is_the_next_token_of_the_same_sequence():
    examples = examples_of(np.random.default_rng(1).integers(1, 9, 50))
    batch = batch_of(examples)
    for s, e in enumerate(examples):
        begin, end = batch.cu_seqlens[s : s + 2].tolist()
        assert batch.token_N[begin:end].tolist() == e.ids.tolist()
        want = [int(t) if m else -100 for t, m in zip(e.ids[1:], e.mask[1:])] + [-100]
        assert batch.target_N[begin:end].tolist() == want
    assert torch.equal(batch.mask_N, batch.target_N != -100)


def test_a_batch_is_its_examples_one_after_the_other():
    examples = examples_of([4, 1, 7], logp=lambda n: np.arange(n) + 0.5, adv=float)
    together, alone = batch_of(examples), [batch_of([e]) for e in examples]
    for name in ("token_N", "position_N", "target_N", "mask_N"):
        assert torch.equal(getattr(together, name), torch.cat([getattr(b, name) for b in alone]))
    for name in ("logp", "adv"):
        assert torch.equal(together[name], torch.cat([b[name] for b in alone]))


def test_no_examples_give_a_dummy_that_trains_nothing_and_has_every_column():
    batch = batch_of([])
    assert (
        batch.dummy
        and batch.to("meta").dummy
        and not batch.mask_N.any()
        and (batch.target_N == -100).all()
    )
    assert len(batch.token_N) == batch.num_sequences == 2 and batch.cu_seqlens.tolist() == [0, 1, 2]
    assert batch["old_logp"].tolist() == batch["adv"][batch.seq_N].tolist() == [0, 0]


def test_a_dummy_runs_forward_and_backward_with_zero_gradients(tmp_path):
    toy.write_model(tmp_path)
    model = hf.load_model(tmp_path)
    logp_N, _ = model(batch_of([]))
    logp_N.sum().backward()
    assert logp_N.tolist() == [0, 0]
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda: Example([1, 2], [True]), "2 tokens and a mask of 1"),
        (lambda: Example([], []), "0 tokens"),
        (
            lambda: batch_of([Example([1], [True], {"a": 1.0}), Example([1], [True])]),
            "columns a and none",
        ),
        (
            lambda: batch_of([Example([1], [True]), Example([1], [True], {"a": 1.0})]),
            "columns none and a",
        ),
        # As many values as tokens in total, but one example's reach into the next.
        (
            lambda: batch_of(
                [Example([1, 2], [True] * 2, {"a": [0.0]}), Example([3], [True], {"a": [0.0, 0.0]})]
            ),
            "column a",
        ),
    ],
)
def test_what_would_misalign_a_batch_is_refused(build, said):
    with pytest.raises(InputError, match=said):
        build()


def test_batch_of_512_short_sequences_takes_milliseconds():
    examples = examples_of(
        np.random.default_rng(0).integers(20, 60, 512), old_logp=np.zeros, adv=float
    )
    times = []
    for _ in range(10):
        began = time.perf_counter()
        batch_of(examples).seq_N  # noqa: B018
        times.append(time.perf_counter() - began)
    assert min(times) < 0.02  # 1.5 ms on the machine where it was written


# ------------------------------------------------------------------------------------------------------------ order
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


# ---------------------------------------------------------------------------------------------------------- packing
def best_possible(lengths, budget):
    """The least number of bins, by trying: place each length into every bin that differs in room."""
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


# ----------------------------------------------------------------------------------------------------- micro-batches
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


def test_few_rows_on_many_ranks_leave_empty_micro_batches():
    assert packing.micro_batches([7, 9], 16, ranks=4) == [[1], [0], [], []]
    assert packing.micro_batches([], 16) == []


# ------------------------------------------------------------------------------------------------ an optimizer step
@pytest.mark.parametrize("how, count", [(packing.by_rows, 24), (packing.by_bins, 3)])
def test_a_step_is_the_same_on_any_number_of_ranks_and_at_any_resumption(how, count):
    lengths = skewed(90, 200)
    per_epoch, of_step = how(lengths, 256, 11)
    for consumed in range(0, 3 * per_epoch, count):
        want = Counter(itertools.chain(*of_step(consumed, count)))
        for size in (2, 5):
            _, resumed = how(lengths, 256, 11)
            parts = [resumed(consumed, count, rank, size) for rank in range(size)]
            assert len({len(p) for p in parts}) == 1
            assert all(sum(lengths[i] for i in b) <= 256 for p in parts for b in p)
            assert Counter(i for p in parts for b in p for i in b) == want


@pytest.mark.parametrize("how", [packing.by_rows, packing.by_bins])
def test_an_epoch_of_steps_visits_every_row_once(how):
    lengths = skewed(90, 200)
    per_epoch, of_step = how(lengths, 256, 11)
    steps = [of_step(consumed, 1) for consumed in range(2 * per_epoch)]
    first, second = (
        [i for step in part for b in step for i in b]
        for part in (steps[:per_epoch], steps[per_epoch:])
    )
    assert sorted(first) == sorted(second) == list(range(90)) and first != second


def test_by_rows_takes_the_stated_number_of_rows_in_order():
    lengths = skewed(90, 200)
    per_epoch, of_step = packing.by_rows(lengths, 256, 11)
    assert per_epoch == 90
    assert sorted(itertools.chain(*of_step(80, 24))) == sorted(packing.take(90, 11, 80, 24))
    assert {
        tuple(sorted(itertools.chain(*packing.by_rows(lengths, tokens, 11)[1](48, 24))))
        for tokens in (200, 999)
    } == {tuple(sorted(packing.take(90, 11, 48, 24)))}  # whatever --tokens
    with pytest.raises(InputError, match="a step of 0 rows"):
        of_step(0, 0)


def test_a_negative_seed_is_refused():
    for f in (lambda: packing.order(5, -1, 0), lambda: packing.packed_epoch([1], 5, -1, 0)):
        with pytest.raises(InputError, match="--seed -1"):
            f()


# --------------------------------------------------------------------------------------------------------- overlong
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
    got, count = packing.overlong(examples, 4, how)
    assert [e.ids.tolist() for e in got] == kept
    assert count == counts | {"overlong": 3, "untrained_before": 1}


def test_overlong_cuts_columns_with_their_tokens():
    pieces, _ = packing.overlong(overlong_examples()[1:2], 4, "split")
    assert [p.columns["logp"].tolist() for p in pieces] == [[6, 7, 8, 9]]
    assert [p.mask.tolist() for p in pieces] == [[False, True, True, True]]
    assert [p.columns["adv"] for p in pieces] == [1.0]


def test_overlong_leaves_what_fits_as_it_is():
    examples = overlong_examples()[:3]
    for how in ("truncate", "split", "drop"):
        got, counts = packing.overlong(examples, 10, how)
        assert all(a is b for a, b in zip(got, examples, strict=True)) and not any(counts.values())


def test_overlong_refuses_to_leave_nothing():
    with pytest.raises(
        InputError, match=r"none of 1 examples .*--max_length 4 \(--overlong truncate\), and 0 had"
    ):
        packing.overlong(overlong_examples()[1:2], 4, "truncate")
    with pytest.raises(InputError, match="--max_length 1: give 2 or more"):
        packing.overlong(overlong_examples(), 1, "split")
    assert packing.overlong([], 4, "drop")[0] == []


# ------------------------------------------------------------------------------------------------------------ files
GOOD = b'{"prompt": "a", "n": 1}\n\n{"prompt": "\xc3\xa9\xe2\x80\xa8x", "n": 2}'  # a blank line; U+2028 ends no line
ZIPPED = gzip.compress(
    GOOD, mtime=0
)  # the time would be in a test's name, and two workers' names have to agree
WANT = [{"prompt": "a", "n": 1}, {"prompt": "é\u2028x", "n": 2}]


def bare(rows):
    return [{k: v for k, v in row.items() if k != "__line__"} for row in rows]


@pytest.mark.parametrize(
    "name, content",
    [
        ("rows.jsonl", GOOD),
        ("crlf.jsonl", GOOD.replace(b"\n", b"\r\n")),
        ("bom.jsonl", b"\xef\xbb\xbf" + GOOD),
        ("rows.jsonl.gz", ZIPPED),
        ("gzip_without_its_name.jsonl", ZIPPED),
        ("plain_with_its_name.jsonl.gz", GOOD),
        ("list.json", json.dumps(WANT, indent=1).encode()),
        ("list.json.gz", gzip.compress(b"\xef\xbb\xbf " + json.dumps(WANT).encode(), mtime=0)),
    ],
)
def test_every_kind_of_file_gives_the_same_rows_with_their_places(tmp_path, name, content):
    rows = read_rows(write(tmp_path / name, content))
    assert bare(rows) == WANT
    places = (": row 1", ": row 2") if name.startswith("list") else (":1", ":3")
    assert [r["__line__"] for r in rows] == [f"{tmp_path / name}{p}" for p in places]


def test_parquet_gives_the_rows_that_were_written(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    chats = [
        {
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
            "id": i,
        }
        for i in range(3)
    ]
    parquet.write_table(pa.Table.from_pylist(chats), tmp_path / "chats.parquet")
    rows = read_rows(tmp_path / "chats.parquet")
    assert bare(rows) == chats and rows[2]["__line__"].endswith("chats.parquet: row 3")
    for row in rows:
        check_sft_row(row)
    write(tmp_path / "cut.parquet", (tmp_path / "chats.parquet").read_bytes()[:-9])
    with pytest.raises(InputError, match="cut.parquet: a damaged Parquet file"):
        read_rows(tmp_path / "cut.parquet")


BAD_FILES = [
    (
        "cut.jsonl",
        b'{"a": 1}\n\n{"a": 2',
        r":3: not valid JSON .*column \d+\): write one object a line",
    ),
    ("cut_within.jsonl", b'{"a": 1}\n{"a": 2\n{"a": 3}', r":2: not valid JSON"),
    ("comma.jsonl", b'{"a": 1},\n{"a": 2}', ":1: not valid JSON"),
    ("pretty.json", b'{\n "a": 1\n}', ":1: not valid JSON"),
    ("list.json", b'[{"a": 1},\n {"a": 2},\n {"a" 3}]', ":3: not valid JSON"),
    ("number.jsonl", b'{"a": 1}\n17', ":2: a row is 17: make it an object"),
    ("strings.json", b'[{"a": 1}, "b"]', ": row 2: a row is 'b'"),
    ("empty.jsonl", b"", ": no rows in it"),
    ("blank.jsonl", b"\n \n", ": no rows in it"),
    ("empty_list.json", b"[]", ": no rows in it"),
    ("empty.jsonl.gz", gzip.compress(b"", mtime=0), ": no rows in it"),
    ("cut.jsonl.gz", ZIPPED[:-5], ": a damaged gzip file"),
    ("damaged.jsonl.gz", ZIPPED[:14] + b"\x00" + ZIPPED[15:], ": a damaged gzip file"),
    ("only_two_bytes.gz", b"\x1f\x8b\x00\x00", ": a damaged gzip file"),
    ("binary.jsonl", b'{"a": 1}\n\x80\x81\xff', ":2: not UTF-8"),
    (
        "latin1.jsonl.gz",
        gzip.compress('{"a": 1}\n{"a": 2}\n{"a": "é"}'.encode("latin-1"), mtime=0),
        ":3: not UTF-8",
    ),
    ("latin1.json", '[{"a": 1},\n{"a": "é"}]'.encode("latin-1"), ":2: not UTF-8"),
    (
        "half.jsonl",
        rb'{"a": "\ud83d\ude00"}' + b"\n" + rb'{"a": ["\ud83d"]}',
        r":2: text with half a character, '\\ud83d'",
    ),
]


@pytest.mark.parametrize("name, content, said", BAD_FILES, ids=[b[0] for b in BAD_FILES])
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, said):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    caught.match(f"{name}{said}")


def test_a_path_that_is_no_file_says_so(tmp_path):
    with pytest.raises(InputError, match="nowhere.jsonl: no such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(InputError, match="a folder; give a file in it"):
        read_rows(tmp_path)


def test_rename_maps_their_columns_to_ours(tmp_path):
    path = write(tmp_path / "qa.jsonl", '{"question": "q", "answer": "a", "id": 7}')
    want = [{"prompt": "q", "completion": "a", "id": 7}]
    assert bare(read_rows(path, ["question=prompt", "answer=completion"])) == want
    assert bare(read_rows(path, {"question": "prompt", "answer": "completion"})) == want
    assert bare(read_rows(path, ["question=answer", "answer=question"])) == [
        {"answer": "q", "question": "a", "id": 7}
    ]
    assert read_rows(path, ["id=n"])[0]["__line__"] == f"{path}:1"


@pytest.mark.parametrize(
    "rename, said",
    [
        (["query=prompt"], "qa.jsonl:1: the columns are question, answer; --rename asks for query"),
        (["question=prompt", "answer=prompt"], "qa.jsonl:1: .* gives two of them one name"),
        (["question=answer"], "qa.jsonl:1: .* gives two of them one name"),
        (["question"], "--rename question: write it as theirs=ours"),
        (["=prompt"], "--rename =prompt: write it as theirs=ours"),
        (["extra=e"], "qa.jsonl:2: the columns are question, answer; --rename asks for extra"),
    ],
)
def test_a_rename_that_does_not_fit_names_the_columns(tmp_path, rename, said):
    first = '{"question": "q", "answer": "a"%s}\n' % (
        ', "extra": 1' if rename == ["extra=e"] else ""
    )
    path = write(tmp_path / "qa.jsonl", first + '{"question": "q", "answer": "a"}')
    with pytest.raises(InputError, match=said):
        read_rows(path, rename)


def test_load_holds_rows_out_without_losing_one(tmp_path):
    path = write(tmp_path / "rows.jsonl", "\n".join(json.dumps({"id": i}) for i in range(20)))
    ids = [[row["id"] for row in part] for part in load_rows(path, None, 6, [])]
    assert sorted(ids[0] + ids[1]) == list(range(20)) and len(ids[1]) == 6
    assert ids == [[row["id"] for row in part] for part in load_rows(path, None, 6, [])]
    assert ids[1] != list(range(6)) and ids[1] != list(range(14, 20))
    assert [len(part) for part in load_rows(path, path, 6, [])] == [20, 20]
    assert [len(part) for part in load_rows(path, None, 0, [])] == [20, 0]
    with pytest.raises(
        InputError, match="--holdout 20 of the 20 rows .* at most 19, or --eval_data"
    ):
        load_rows(path, None, 20, [])


# ------------------------------------------------------------------------------------------------------------- rows
USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": ""}, USER, BOT]},
        {"messages": [USER, CALL, {"role": "tool", "content": "3"}, BOT]},
        {"messages": [USER, CALL | {"content": None}]},
        {"prompt": "", "completion": "x"},
        {"prompt": [USER], "completion": [BOT]},
        {"text": "x", "id": 3},
    ],
)
def test_sft_rows_in_the_known_formats_are_taken(row):
    check_sft_row(row)


BAD_ROWS = [
    (
        {"question": "q", "answer": "a"},
        r": the columns are question, answer; it needs messages.*--rename",
    ),
    ({"text": 5}, ": the columns are text; it needs .* text \\(a string\\)"),
    ({}, ": the columns are none;"),
    ({"prompt": "q"}, ": the columns are prompt; prompt and completion go together"),
    (
        {"prompt": "q", "completion": [BOT]},
        ": prompt is 'q': make it a list of messages, or prompt",
    ),
    ({"prompt": [USER], "completion": "a"}, ": completion is 'a': make it a list"),
    ({"prompt": "q", "completion": None}, ": prompt is 'q'"),
    ({"messages": []}, r": messages is \[\]: make it a list of messages, not empty"),
    ({"messages": "hi"}, ": messages is 'hi'"),
    ({"messages": [USER, "ho"]}, r": messages\[1\] is 'ho': make it {"),
    (
        {"messages": [{"from": "human", "value": "hi"}]},
        r": messages\[0\] is {'from': 'human'.* with a role of system",
    ),
    ({"messages": [USER, {"role": "bot", "content": "ho"}]}, r": messages\[1\] is {'role': 'bot'"),
    ({"messages": [USER, {"role": ["assistant"], "content": "ho"}]}, r": messages\[1\] is "),
    (
        {"messages": [USER, {"role": "assistant"}]},
        r": messages\[1\] has the content None: make it a string",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]},
        r": messages\[1\] has the content None",
    ),
    (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]},
        r": messages\[1\] has the content \[{'type'",
    ),
    ({"messages": [CALL | {"content": 3}]}, r": messages\[0\] has the content 3"),
]


@pytest.mark.parametrize("row, said", BAD_ROWS)
def test_a_bad_sft_row_is_named_with_file_and_line(tmp_path, row, said):
    path = write(tmp_path / "rows.jsonl", json.dumps({"text": "fine"}) + "\n" + json.dumps(row))
    good, bad = read_rows(path)
    check_sft_row(good)
    with pytest.raises(InputError) as caught:
        check_sft_row(bad)
    caught.match(f"^{path}:2{said}")
    assert "\n" not in str(caught.value) and "__line__" not in str(caught.value)


@pytest.mark.parametrize(
    "row, said",
    [
        (
            {"question": "q"},
            "row: the columns are question; it needs prompt: --rename theirs=prompt",
        ),
        ({"prompt": ""}, "row: prompt is ''"),
        ({"prompt": 3}, "row: prompt is 3"),
        ({"prompt": []}, r"prompt is \[\]"),
        ({"prompt": [{"role": "user"}]}, r"prompt\[0\] has the content None"),
    ],
)
def test_a_bad_prompt_row_is_refused(row, said):
    with pytest.raises(InputError, match=said):
        check_prompt_row(row)


def test_prompt_rows_may_be_text_or_messages():
    check_prompt_row({"prompt": "q", "answer": 3})
    check_prompt_row({"prompt": [USER, BOT, USER]})


# ------------------------------------------------------------------------------------------------------- real files
def test_real_chats_read_check_and_pack(shared):
    rows = read_rows(shared / "sft/messages.jsonl.gz")
    for row in rows:
        check_sft_row(row)
    assert len(rows) == 2051 and rows[-1]["__line__"].endswith("messages.jsonl.gz:2051")
    lengths = [2 + sum(len(m["content"]) for m in row["messages"]) // 4 for row in rows]
    fitting = [n for n in lengths if n <= 2048]
    assert packing.fill_rate(fitting, packing.pack(fitting, 2048), 2048) > 0.99


def test_real_gsm8k_reads_with_its_columns_renamed(shared):
    for name, n in (("train.jsonl.gz", 7473), ("test.jsonl", 1319)):
        rows = read_rows(shared / "gsm8k" / name, ["question=prompt", "answer=completion"])
        assert len(rows) == n and set(rows[0]) == {"prompt", "completion", "__line__"}
        for row in rows:
            check_sft_row(row), check_prompt_row(row)
    with pytest.raises(
        InputError, match=r"test.jsonl:1: the columns are question, answer; it needs messages"
    ):
        check_sft_row(read_rows(shared / "gsm8k/test.jsonl")[0])


def test_every_real_json_file_reads(shared):
    paths = [
        p
        for p in shared.rglob("*")
        if p.parent.name in ("sft", "preference", "tasks", "gsm8k") and ".json" in p.name
    ]
    assert len(paths) >= 18
    for path in paths:
        assert read_rows(path)
