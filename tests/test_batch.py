"""batch.py: examples and batches, and the one place that shifts."""

import time

import numpy as np
import pytest
import torch

from nanopost import InputError, StepError, hf
from nanopost import batch as batch_module
from nanopost.batch import Example, batch_of
from runs import toy

pytestmark = pytest.mark.usefixtures("few")


def examples_of(lengths, seed=0, **columns):
    """Random examples; columns: name -> f(T) that gives an array or a number."""
    rng = np.random.default_rng(seed)
    return [
        Example(
            rng.integers(0, 1000, n), rng.random(n) < 0.6, {k: f(n) for k, f in columns.items()}
        )
        for n in lengths
    ]


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
    assert batch.sequences.index_N.tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert batch.sequences.count == 3 and batch.sequences.mask_N is batch.mask_N
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 8]
    assert (batch.max_seqlen, batch.num_sequences, batch.dummy) == (4, 3, False)
    torch.testing.assert_close(
        batch["old_logp"], torch.tensor([0.2, 0.3, 0.4, 0, 0, 0.7, 0.8, 0]), rtol=0, atol=0
    )
    assert batch["adv"].tolist() == [2.0, -1.0, 3.0]


def test_batch_has_the_stated_types_and_moves_as_a_whole():
    batch = batch_of(examples_of([3, 5], old_logp=np.zeros, adv=float))
    for name in ("token_N", "position_N", "target_N"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.sequences.index_N.dtype == torch.int64
    assert batch.mask_N.dtype == batch.sequences.mask_N.dtype == torch.bool
    assert batch.cu_seqlens.dtype == torch.int32
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
    assert batch["old_logp"].tolist() == batch["adv"][batch.sequences.index_N].tolist() == [0, 0]


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
        (lambda: Example([1, 2], [True] * 2, kept=[[2]]), "2 tokens and kept ids for 1"),
        (
            lambda: batch_of([Example([1], [True], kept=[[1]]), Example([1], [True])]),
            "some have kept ids and some have none",
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
        batch_of(examples).sequences.index_N  # noqa: B018
        times.append(time.perf_counter() - began)
    assert min(times) < 0.02  # 1.5 ms on the machine where it was written


# ------------------------------------------------------------------------------------- kept ids
def kept(*ids_T):
    return [np.array(ids, np.int32) for ids in ids_T]


CUT = [
    Example([10, 11, 12, 13], [False, False, True, True], {}, kept((), (), (7, 12), (13, 2, 1))),
    Example([20], [True], {}, kept((20, 21))),  # nothing predicts it
    Example([30, 31, 32], [True, True, False], {}, kept((30, 5), (31,), (9,))),
]


def test_kept_ids_are_those_of_targets_where_these_are_predicted():
    batch = batch_of(CUT)
    token_E, id_E = batch.kept
    assert token_E.dtype == id_E.dtype == torch.int32
    pairs = list(zip(token_E.tolist(), id_E.tolist()))
    assert pairs == [(1, 7), (1, 12), (2, 13), (2, 2), (2, 1), (5, 31)]
    assert {x.device.type for x in batch.to("meta").kept} == {"meta"}
    assert batch_of([]).kept is None and batch_of(examples_of([3])).kept is None
    part = CUT[0][1:3]
    assert [ids.tolist() for ids in part.kept] == [[], [7, 12]]
    assert CUT[0].ended().kept == CUT[0].kept


def test_where_nothing_is_trained_there_are_no_pairs():
    """As of an example that no reward applies to."""
    token_E, id_E = batch_of([Example([1, 2, 3], [False] * 3, {}, kept((), (4, 2), (3,)))]).kept
    assert len(token_E) == len(id_E) == 0


@pytest.mark.parametrize("ids", [(7, 11), (), (12, 12)])
def test_a_target_that_is_not_among_its_kept_ids_is_an_error(ids):
    wrong = Example([10, 11, 12], [False, False, True], {}, kept((), (), ids))
    with pytest.raises(StepError, match=f"1 sampled tokens, token 12 .*there are {len(ids)}"):
        batch_of([CUT[0], wrong])


# ----------------------------------------------------------------------------------------- prefixes
def sequences(*ids, prompt=2):
    return [Example(x, np.arange(len(x)) >= prompt) for x in ids]


def test_what_neighbours_begin_with_is_computed_once_token_by_token():
    first, second, third = [1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 5, 6]
    batch = batch_of(sequences(first, second, third, [9]))
    assert batch.token_N.tolist() == [*first, *second, *third, 9]  # all of them, as without
    index_N, first_U, target_M, cu_own, max_own = batch.prefixes
    assert target_M.tolist() == [1, 4, 5, 8, 9, 10]  # as the mask, with one for each completion
    assert index_N.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1, 3, 4, 5, 6]
    assert first_U.tolist() == [0, 1, 2, 5, 6, 11, 12]
    assert cu_own.tolist() == [0, 3, 5, 6, 7] and max_own == 3
    assert (index_N.dtype, first_U.dtype, cu_own.dtype) == (torch.int64, torch.int64, torch.int32)
    assert [x.device.type for x in batch.to("meta").prefixes[:4]] == ["meta"] * 4


@pytest.mark.parametrize(
    "ids, prompt, expected",
    {
        "two completions": ([[1, 2, 3], [1, 2, 4]], 2, [0, 2]),
        "the last token is its own": ([[1, 2, 3], [1, 2, 3]], 2, [0, 2]),
        "a sequence that the one before begins with": ([[1, 2, 3, 4], [1, 2, 3]], 1, [0, 2]),
        "nothing in common": ([[1, 2, 3], [2, 2, 3]], 2, [0, 0]),
        "only the one before counts": ([[1, 2, 3], [5, 6], [1, 2, 4]], 2, [0, 0, 0]),
        "a prompt and little more is the prompt": (
            [[*range(16), 20, 21], [*range(16), 20, 22], [*range(16), 20, 20, 20, 7]],
            16,
            [0, 16, 16],
        ),
        "a prompt and much more": ([[*range(16), 20], [*range(16), 21]], 8, [0, 16]),
        "less than a sixteenth": ([[1, *[2] * 20], [1, *[3] * 20]], 1, [0, 0]),
        "a sixteenth": ([[1, *[2] * 20], [1, *[3] * 15]], 1, [0, 1]),
        "without a prompt": ([[1, 2, 3], [1, 2, 4]], 0, [0, 2]),
    }.values(),
)
def test_how_much_a_sequence_shares(ids, prompt, expected):
    assert batch_module.shared(sequences(*ids, prompt=prompt)) == expected


@pytest.mark.parametrize("length, alike, expected", [(16, 4, 0), (16, 5, 5), (17, 5, 0)])
def test_a_few_tokens_are_not_worth_sharing(length, alike, expected, monkeypatch):
    monkeypatch.undo()  # the real FEW, not that of the fixture
    one, other = ([*[1] * alike, *[n] * (length - alike)] for n in (2, 3))
    assert batch_module.shared(sequences(one, other, prompt=1)) == [0, expected]


def test_random_trees_are_computed_once_where_each_sequence_says_so():
    draw = np.random.default_rng(0)
    for _ in range(200):
        made = []
        for _ in range(draw.integers(1, 9)):
            start = list(made[draw.integers(len(made))]) if made else []
            start = start[: draw.integers(len(start) + 1)]
            made.append([*start, *draw.integers(0, 2, draw.integers(1, 9))])
        examples = sequences(*made, prompt=int(draw.integers(4)))
        batch, shared = batch_of(examples), batch_module.shared(examples)
        if batch.prefixes is None:
            assert not any(shared)
            continue
        index_N, first_U, target_M, cu_own, max_own = batch.prefixes
        assert target_M.equal(batch.mask_N.nonzero()[:, 0])
        assert batch.token_N[first_U][index_N].equal(batch.token_N)
        assert batch.position_N[first_U][index_N].equal(batch.position_N)
        assert index_N[first_U].equal(torch.arange(len(first_U)))
        own = [len(ids) - count for ids, count in zip(made, shared)]
        assert cu_own.diff().tolist() == own and max_own == max(own) and min(own) > 0
        # What a token is computed from is what comes before it in its own sequence.
        for ids, index in zip(made, index_N.split(batch.cu_seqlens.diff().tolist())):
            history = [first_U[u] - batch.position_N[first_U[u]] for u in index]
            for t, start in enumerate(history):
                assert batch.token_N[start : start + t + 1].tolist() == ids[: t + 1]


def test_nothing_is_shared_where_that_is_switched_off(monkeypatch):
    monkeypatch.setattr(batch_module, "SHARED", 2)
    assert batch_of(sequences([1, 2, 3], [1, 2, 4])).prefixes is None
