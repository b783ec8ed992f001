"""Ranks and micro-batches: any split of uneven data gives the gradient of one batch on one process,
and the statistics of it."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from scripts import ENVIRONMENT, ROOT, TORCHRUN
from small import small_model

from nanopost import InputError, StepError, dist, packing

WORKER = Path(__file__).parent / "dist_worker.py"
PATHS = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(ranks, maximum tokens per micro-batch, the same after "cut " for a step over kept ids, or
    "statistics") -> what the worker saved."""
    folder, found = tmp_path_factory.mktemp("dist"), {}
    for ranks, tokens in ((1, [1000, 40]), (2, [1000, 40]), (4, [45])):
        out = folder / f"{ranks}.pt"
        done = forked.run([WORKER, out, "step", *tokens], PATHS, ranks=ranks if ranks > 1 else 0)
        assert done.returncode == 0, done.stderr
        for name, saved in torch.load(out).items():
            found[ranks, name] = saved
    return found


def largest_difference(a, b):
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.slow
def test_micro_batches_do_not_change_the_gradient(results):
    one, split = results[1, 1000], results[1, 40]
    assert largest_difference(one["gradient"], split["gradient"]) <= 1e-6
    assert one["loss"] == pytest.approx(split["loss"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, tokens", [(2, 1000), (2, 40), (4, 45)])
def test_ranks_do_not_change_the_gradient(results, ranks, tokens):
    one, many = results[1, 1000], results[ranks, tokens]
    assert largest_difference(one["gradient"], many["gradient"]) <= 1e-5
    assert one["loss"] == pytest.approx(many["loss"], abs=1e-5)
    assert one["norm"] == pytest.approx(many["norm"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, tokens", [(1, 40), (2, 1000), (2, 40), (4, 45)])
def test_over_kept_ids_neither_ranks_nor_micro_batches_change_the_gradient(results, ranks, tokens):
    one, many = results[1, "cut 1000"], results[ranks, f"cut {tokens}"]
    assert largest_difference(one["gradient"], many["gradient"]) <= 1e-5
    assert one["loss"] == pytest.approx(many["loss"], abs=1e-5)
    assert one["norm"] == pytest.approx(many["norm"], abs=1e-5)
    for a, b in zip(one["before"], many["before"]):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=2e-4, rtol=0)
    assert largest_difference(one["gradient"], results[1, 1000]["gradient"]) > 0.01


HOW = [(ranks, how) for ranks in (1, 2, 4) for how in ("reduced once", "offload", "selective")]
HOW += [(ranks, how) for ranks in (2, 4) for how in ("replicas", "replicas, reduced once")]


@pytest.mark.slow
@pytest.mark.parametrize("ranks, how", HOW)
def test_how_a_model_is_sharded_changes_no_gradient(results, ranks, how):
    """--reduce step, --offload, --checkpointing selective and, with --replicas 2, one or two shards
    each."""
    one, many = results[1, 1000], results[ranks, how]
    assert largest_difference(one["gradient"], many["gradient"]) <= 1e-5
    assert one["loss"] == pytest.approx(many["loss"], abs=1e-5)
    assert one["norm"] == pytest.approx(many["norm"], abs=1e-5)
    clear = {n: g.abs() > 1e-5 for n, g in one["gradient"].items()}
    for n, w in many["weights"].items():
        assert float(((one["weights"][n] - w).abs() * clear[n]).max()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("ranks, tokens", [(2, 1000), (4, 45)])
def test_weights_out_of_the_shards_are_those_of_one_process(results, ranks, tokens):
    one, many = results[1, 1000]["weights"], results[ranks, tokens]["weights"]
    assert one.keys() == many.keys() == dict(small_model().named_parameters()).keys()
    # Adam's first step is the sign of the gradient: where that is only rounding, so is the sign.
    gradient = results[1, 1000]["gradient"]
    for n in one:
        clear = gradient[n].abs() > 1e-5
        assert float(((one[n] - many[n]).abs() * clear).max()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_head_is_neither_a_shard_nor_stale(results, ranks):
    """No-grad forwards before the first step and after an update see whole, current weights."""
    one, many = results[1, 1000], results[ranks, {2: 1000, 4: 45}[ranks]]
    for when in ("before", "after"):
        for a, b in zip(one[when], many[when]):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=2e-4, rtol=0)
    change = max(abs(x - y) for a, b in zip(one["before"], one["after"]) for x, y in zip(a, b))
    assert change > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("when", ["fail", "late"])
def test_an_error_on_one_rank_ends_all_of_them_promptly(tmp_path, when):
    """At the start, and amid a step, while the others wait for its gradients."""
    start = time.monotonic()
    done = subprocess.run(
        [*TORCHRUN, "2", WORKER, tmp_path / "x.pt", when, "1000"],
        env=PATHS,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0 and "error: the last rank has had enough" in done.stderr
    report = done.stderr.split("Root Cause")[-1]
    assert "had enough" in report  # torchrun's own, which comes last
    assert "Traceback" not in done.stderr.split("error: the last rank")[0]
    assert time.monotonic() - start < 45


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_statistics_are_of_all_ranks(results, ranks):
    """Advantages, whitening, running deviations, means and maxima; a fourth rank has nothing."""
    one, many = results[1, "statistics"], results[ranks, "statistics"]
    assert one.keys() == many.keys()
    for name, expected in one.items():
        if name in ("batch", "whitened", "whitened, mean kept"):
            torch.testing.assert_close(torch.tensor(many[name]), torch.tensor(expected))
        else:
            assert many[name] == pytest.approx(expected), name
    assert one["means"].keys() == {"mean", "of one rank"} and one["means"]["of one rank"] == 1.5
    assert one["meter"].keys() == {"reward", "masked", "share"} and one["running std"][0] == 40


@pytest.mark.parametrize(
    "given, missing",
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "WORLD_SIZE"),
    ],
)
def test_half_of_what_torchrun_sets_is_a_sentence_and_no_wait(monkeypatch, given, missing):
    for name in dist.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    hook = sys.excepthook
    with pytest.raises(
        InputError, match=f"sets .*{[*given][0]}.* but not {missing}: start several"
    ):
        dist.init("cpu")
    sys.excepthook = hook


@pytest.mark.parametrize("alone", [{"MASTER_ADDR": "localhost"}, {"WORLD_SIZE": "1"}])
def test_a_single_process_needs_nothing_that_torchrun_sets(monkeypatch, alone):
    for name in dist.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    hook = sys.excepthook
    assert dist.init("cpu").size == 1
    dist.finish()
    sys.excepthook = hook
    torch.set_flush_denormal(False)


def test_an_error_of_a_step_is_one_sentence_and_then_what_is_saved(monkeypatch, capsys):
    monkeypatch.setattr(dist, "last_words", lambda: "--resume continues after step 3")
    dist._one_sentence(StepError, StepError("step 4: the gradient norm is nan."), None)
    said = "error: step 4: the gradient norm is nan.\n--resume continues after step 3\n"
    assert capsys.readouterr().err == said


# ------------------------------------------------------------------------------- one process's part
def test_a_mean_of_nothing_is_no_metric(alone):
    found = dist.means({"a": (1, 2), "of nothing": (0, 0), "zero": (0, 4)})
    assert found == {"a": 0.5, "zero": 0.0}


def test_a_meter_divides_each_metric_by_what_it_counts(alone):
    """Tokens, pairs and steps in one meter, from tensors and numbers, in any number of calls."""
    meter, leaf = dist.Meter(), torch.tensor(2.0, requires_grad=True)
    meter.add(10, entropy=torch.tensor(5.0))
    meter.add(30, entropy=torch.tensor(7.0), loss=leaf * 3)
    meter.add(2, **{"rewards/accuracies": torch.tensor(1), "ties": 1})
    meter.add(2, ties=2.0)
    meter.add(0, **{"of nothing": torch.tensor(0.0)})
    assert meter.means() == {
        "entropy": 12 / 40,
        "loss": 6 / 30,
        "rewards/accuracies": 0.5,
        "ties": 0.75,
    }
    assert dist.Meter().means() == {}


def test_a_meter_adds_up_in_float64(alone):
    meter = dist.Meter()
    meter.add(1, x=torch.tensor(2.0**24))
    for _ in range(5):
        meter.add(1, x=torch.tensor(1.0))  # in fp32 2^24 + 1 is 2^24
    assert meter.means()["x"] * 6 == 2**24 + 5


# ------------------------------------------------------------------------- which rank works on what
def worlds(size):
    return [dist.World(rank, size, torch.device("cpu"), torch.float32) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_out_the_rows_of_a_step_with_their_serials(size):
    """From the middle of an epoch into the next one; the serials seed what is sampled."""
    parts = [packing.share(10, 0, 7, 6, world) for world in worlds(size)]
    (whole,) = [packing.share(10, 0, 7, 6, world) for world in worlds(1)]
    assert whole == (packing.take(10, 0, 7, 6), [7, 8, 9, 10, 11, 12])
    dealt = [pair for indices, serials in parts for pair in zip(indices, serials)]
    assert sorted(dealt, key=lambda pair: pair[1]) == list(zip(*whole))
    assert max(len(i) for i, _ in parts) - min(len(i) for i, _ in parts) <= 1
    for rank, (_, serials) in enumerate(parts):  # wherever a round begins, what runs ahead is its
        assert all(serial % size == rank for serial in serials)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_out_whole_chunks_if_the_bytes_are_to_be_the_same(monkeypatch, size):
    monkeypatch.setattr(dist, "reproducible", True)
    shares = [packing.share(100, 0, 30, 50, world) for world in worlds(size)]
    dealt = sorted(pair for indices, serials in shares for pair in zip(serials, indices))
    assert dealt == list(zip(range(30, 80), packing.take(100, 0, 30, 50)))
    for _, serials in shares:  # cut in eights, they are the same chunks for any number of ranks
        cut = [serials[i : i + 8] for i in range(0, len(serials), 8)]
        assert all(part == list(range(30, 80))[part[0] - 30 :][:8] for part in cut)
        assert all((part[0] - 30) % 8 == 0 for part in cut)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_minibatches_are_whole_groups_in_order_and_nearly_equal(parts):
    items = [(group, i) for group in range(5) for i in range(3)]
    serials = [7, 9, 12, 20, 21]
    cut = packing.minibatches(items, 3, serials, serials, parts)
    assert len(cut) == parts and [item for part in cut for item in part] == items
    assert all(len(part) % 3 == 0 for part in cut)
    assert max(map(len, cut)) - min(map(len, cut)) <= 3


@pytest.mark.parametrize("dealt", [[[3, 5, 8, 9, 14]], [[14], [3, 9], [], [5, 8]]])
def test_minibatches_of_groups_do_not_depend_on_which_rank_has_them(dealt):
    """Resampling leaves unequal numbers of groups on the ranks."""
    of_all = [serial for serials in dealt for serial in serials]
    shares = []
    for serials in dealt:
        items = [(serial, i) for serial in serials for i in range(2)]
        shares.append(packing.minibatches(items, 2, serials, of_all, 2))
    first, second = [[x for share in shares for x in share[part]] for part in (0, 1)]
    assert sorted(first) == [(serial, i) for serial in (3, 5, 8) for i in (0, 1)]
    assert sorted(second) == [(serial, i) for serial in (9, 14) for i in (0, 1)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shuffled_minibatches_are_the_same_on_any_number_of_ranks(size):
    prompts, group, parts, epochs = 8, 3, 2, 3

    def drawn(size):
        """For each rank its minibatches, of items named (prompt, sample)."""
        for rank in range(size):
            mine = range(prompts)[rank::size]
            items = [(prompt, i) for prompt in mine for i in range(group)]
            given = [items, group, [5 + i for i in mine], range(5, 5 + prompts)]
            yield list(packing.shuffled_minibatches(*given, parts, epochs, (7, 1)))

    (one,) = drawn(1)
    assert len(one) == parts * epochs
    for minibatch, *shares in zip(one, *drawn(size), strict=True):
        assert sorted(item for share in shares for item in share) == sorted(minibatch)
        for share in shares:  # the samples of a prompt stay together and in order
            assert [i for _, i in share] == list(range(group)) * (len(share) // group)
    for first in range(0, parts * epochs, parts):
        epoch = [item for minibatch in one[first : first + parts] for item in minibatch]
        assert sorted(epoch) == [(prompt, i) for prompt in range(prompts) for i in range(group)]
    assert one[:parts] != one[parts : 2 * parts]  # a new order in each epoch


def test_a_meter_holds_no_tensor_of_the_cpu_beside_those_of_a_gpu():
    """Numbers of the host (rewards) and of the device (losses) are added to one meter: they cannot
    be stacked, so those of the host are numbers at once."""
    meter = dist.Meter()
    meter.add(2, reward=torch.tensor(3.0), equal=1)
    assert not meter.on_device


def test_training_that_runs_out_of_memory_names_the_flags_to_lower(capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    dist._one_sentence(type(error), error, None)
    said = "error: out of memory: lower --tokens (per micro-batch), or add --checkpointing full"
    assert capsys.readouterr().err.startswith(said)


def test_equal_numbers_have_no_spread_however_far_from_zero(alone):
    assert dist.mean_and_std(torch.full((256,), -7.3)) == (pytest.approx(-7.3), 0.0)
    far = torch.tensor([1e9, 1e9 + 2.0], dtype=torch.float64)
    assert dist.mean_and_std(far)[1] == pytest.approx(2**0.5, rel=1e-12)


def test_a_process_whose_torchrun_is_gone_does_not_wait_for_it(monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setattr(dist.time, "sleep", lambda seconds: None)
        with pytest.raises(InputError, match=f"torchrun cannot be reached at localhost:{port}"):
            dist._check_launcher()
        free.listen()
        dist._check_launcher()
