"""Ranks and micro-batches: any split of uneven data gives the gradient of one batch on one process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import small_model

from nanopost import dist

WORKER = Path(__file__).parent / "dist_worker.py"


def run(ranks, out, tokens, mode="step", timeout=120):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[1])}
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
    ]
    return subprocess.run(
        [*start, str(WORKER), str(out), str(tokens), mode],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(ranks, tokens of a micro-batch) -> what the worker saved."""
    folder, found = tmp_path_factory.mktemp("dist"), {}
    for ranks, tokens in ((1, 1000), (1, 40), (2, 1000), (2, 40), (4, 45)):
        out = folder / f"{ranks}-{tokens}.pt"
        done = run(ranks, out, tokens)
        assert done.returncode == 0, done.stderr
        found[ranks, tokens] = torch.load(out)
    return found


def largest_difference(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def test_micro_batches_do_not_change_the_gradient(results):
    one, split = results[1, 1000], results[1, 40]
    assert largest_difference(one["gradient"], split["gradient"]) <= 1e-6
    assert one["loss"] == pytest.approx(split["loss"], abs=1e-6)


@pytest.mark.parametrize("ranks, tokens", [(2, 1000), (2, 40), (4, 45)])
def test_ranks_do_not_change_the_gradient(results, ranks, tokens):
    one, many = results[1, 1000], results[ranks, tokens]
    assert largest_difference(one["gradient"], many["gradient"]) <= 1e-5
    assert one["loss"] == pytest.approx(many["loss"], abs=1e-5)
    assert one["norm"] == pytest.approx(many["norm"], abs=1e-5)


@pytest.mark.parametrize("ranks, tokens", [(2, 1000), (4, 45)])
def test_weights_out_of_the_shards_are_those_of_one_process(results, ranks, tokens):
    one, many = results[1, 1000]["weights"], results[ranks, tokens]["weights"]
    assert one.keys() == many.keys() == dict(small_model().named_parameters()).keys()
    # Adam's first step is the sign of the gradient: where that is nothing but rounding, so is the sign.
    gradient = results[1, 1000]["gradient"]
    for n in one:
        clear = gradient[n].abs() > 1e-5
        assert float(((one[n] - many[n]).abs() * clear).max()) <= 1e-5


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_head_is_neither_a_shard_nor_stale(results, ranks):
    """No-grad forwards before the first step and after an update see whole, current weights."""
    one, many = results[1, 1000], results[ranks, {2: 1000, 4: 45}[ranks]]
    for when in ("before", "after"):
        for a, b in zip(one[when], many[when]):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=2e-4, rtol=0)
    change = max(abs(x - y) for a, b in zip(one["before"], one["after"]) for x, y in zip(a, b))
    assert change > 0.05


def test_an_error_on_one_rank_ends_all_of_them_promptly(tmp_path):
    start = time.monotonic()
    done = run(2, tmp_path / "x.pt", 1000, "fail", timeout=60)
    assert done.returncode != 0 and "error: the last rank has had enough." in done.stderr
    assert "Traceback" not in done.stderr.split("error: the last rank")[0]
    assert time.monotonic() - start < 45


def test_a_mean_of_nothing_is_no_metric(monkeypatch):
    monkeypatch.setattr(dist, "all_sum", lambda *values: list(map(float, values)))  # of one rank
    assert dist.means({"a": (1, 2), "of nothing": (0, 0), "zero": (0, 4)}) == {
        "a": 0.5,
        "zero": 0.0,
    }
