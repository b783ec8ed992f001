"""What the tape keeps of a step: what each example would give alone, on any number of ranks."""

import numpy as np
import pytest
import torch
from ranks import on_ranks
from small import random_ids, small_model

from nanopost.batch import Example, batch_of
from nanopost.forward import batches
from nanopost.tape import Tape


def example(length, seed, prompt=2, **columns):
    return Example(random_ids(length, seed), np.arange(length) >= prompt, columns)


def step(model, tape, minibatches, dropped=None):
    """Optimizer steps as in a loop, without an optimizer. dropped: (k, i), a pass not made."""
    for k, minibatch in enumerate(minibatches):
        for i, batch in enumerate(batches(model, minibatch, 16, "cpu")):
            if (k, i) != dropped:
                logp_N, entropy_N = model(batch)
                tape.add(batch, logp=logp_N, entropy=entropy_N, loss=-logp_N.sum())
        tape.update(minibatch, grad_norm=1.0 + k, lr=0.1)


def test_a_line_holds_what_an_example_gives_alone(alone):
    model, tape = small_model(), Tape(True)
    first, second = [example(n, n) for n in (9, 5, 7)], [example(n, n) for n in (11, 3)]
    again = Example(first[0].ids.copy(), first[0].mask)  # alike, but never trained
    step(model, tape, [first, second, first])
    updates, lines = tape.take([*first, *second, again])
    assert [x["minibatch"] for x in lines] == [[0, 2]] * 3 + [[1]] * 2 + [[]]
    for e, line in zip(first + second, lines):
        batch = batch_of([e])
        logp_N, entropy_N = model(batch)
        (logp_T,), (entropy_T,) = batch.split(logp_N.detach()), batch.split(entropy_N.detach())
        assert line["logp"] == pytest.approx(logp_T, abs=1e-5)
        assert line["entropy"] == pytest.approx(entropy_T, abs=1e-5)
        assert not line["logp"][:2].any() and line["logp"][2:].all()
    assert lines[-1] == {"minibatch": [], "micro_batch": []}
    sums = [-sum(float(line["logp"].sum()) for line in part) for part in (lines[:3], lines[3:5])]
    assert [x["loss"] for x in updates] == pytest.approx([*sums, sums[0]], abs=1e-4)
    assert [(x["grad_norm"], x["lr"]) for x in updates] == [(1.0, 0.1), (2.0, 0.1), (3.0, 0.1)]
    assert tape.take(first) == ([], [{"minibatch": [], "micro_batch": []}] * 3)  # a new step


def test_an_example_without_a_pass_has_no_numbers(alone):
    tape, given = Tape(True), [example(n, n) for n in (12, 11, 10)]
    step(small_model(), tape, [given], dropped=(0, 1))
    _, lines = tape.take(given)
    lost = [line for line in lines if line["micro_batch"] == [None]]
    assert len(lost) == 1 and lost[0] == {"minibatch": [0], "micro_batch": [None]}
    assert sorted(line["micro_batch"][0] for line in lines if line != lost[0]) == [
        [0, 0, 0],
        [0, 1, 0],
    ]


def test_ranks_send_home_what_they_ran_for_others(tmp_path):
    every = [example(n, n) for n in (9, 5, 7, 11, 3, 8)]

    def task(rank, size):
        tape = Tape(True)
        mine = every if rank == size - 1 else []  # who holds them does not run them alone
        step(small_model(), tape, [mine[:4], mine[4:]])
        return tape.take(mine)

    ((alone, lines),) = on_ranks(1, tmp_path, task)
    (updates, nothing), (_, there) = on_ranks(2, tmp_path, task)
    assert nothing == [] and {line["micro_batch"][0][0] for line in there} == {0, 1}
    assert [x["loss"] for x in updates] == pytest.approx([x["loss"] for x in alone], abs=1e-4)
    for mine, theirs in zip(there, lines, strict=True):
        assert mine["minibatch"] == theirs["minibatch"]
        assert mine["logp"] == pytest.approx(theirs["logp"], abs=1e-5)


def test_a_tape_that_is_off_reads_nothing():
    class Untouched:
        def __getattr__(self, name):
            raise AssertionError(name)

    tape = Tape(False)
    tape.add(Untouched(), logp=Untouched())
    tape.update([Untouched()], Untouched(), Untouched())
    assert tape.take([1, 2]) == ([], [{}, {}])


def test_a_dummy_is_in_no_sum(alone):
    tape, given = Tape(True), [example(6, 1)]
    step(small_model(), tape, [given])
    (before,), _ = tape.take(given)
    step(small_model(), tape, [[]])
    dummy = batch_of([])
    tape.add(dummy, logp=dummy.token_N.float(), loss=torch.tensor(0.69))  # of an empty pair
    step(small_model(), tape, [given])
    (_, after), _ = tape.take(given)
    assert after == before
