"""Rollouts that run ahead: which prompts, when, with which weights; errors and ends."""

import random
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from inprocess import run_here
from scripts import ENVIRONMENT, metrics
from test_loops import SAMPLING, flags, place

import forks
from nanopost import InputError, checkpoint, packing
from nanopost.ahead import Ahead
from nanopost.engine import Engine, Sampling
from nanopost.rollout import Rollout

__all__ = ["place"]  # a fixture: a toy model, prompts, and a reward that varies
SAMPLING_OF_ALL = Sampling(8)
ROWS = 7  # of the data: an epoch


class Slow:
    """An engine that says when it begins what, and takes as long as `wait` does."""

    def __init__(self, wait=lambda: None):
        self.wait, self.version, self.calls, self.threads = wait, 0, [], set()

    def generate(self, prompts, n, sampling, seeds):
        self.calls.append(seeds)
        self.threads.add(threading.current_thread())
        version = self.version
        self.wait()
        return [
            [Rollout(prompt, [seed, i], np.zeros(2, np.float32), "stop", version) for i in range(n)]
            for prompt, seed in zip(prompts, seeds)
        ]

    def sync_weights(self, named_tensors, version):
        self.version = version

    def close(self):
        pass


def request(indices, serials):
    """The seed of a prompt is its serial here."""
    return [[i] for i in indices], 2, SAMPLING_OF_ALL, serials


def ahead_of(engine, staleness, steps=5, prompts=4, rank=0, size=1):
    world = SimpleNamespace(rank=rank, size=size)
    share = partial(packing.share, ROWS, 3, world=world)
    return Ahead(engine, share, request, steps, prompts, staleness)


def take(ahead, first, count):
    """What a loop gets for the next prompts -> (serials, groups)."""
    indices, serials = ahead.share(first, count)
    return serials, ahead.generate(*request(indices, serials))


def when_idle(ahead):
    deadline = time.monotonic() + 10
    while ahead.thread is not None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


# -------------------------------------------------------------------------------------- admission
def test_at_staleness_0_there_is_no_thread():
    engine = Slow()
    ahead = ahead_of(engine, 0)
    for first in (0, 4):
        take(ahead, first, 4)
    assert engine.calls == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert engine.threads == {threading.main_thread()}


def test_the_prompts_of_the_next_steps_begin_and_no_more():
    engine = Slow()
    ahead = ahead_of(engine, 2)
    begun = []
    for step in range(1, 6):
        take(ahead, 4 * (step - 1), 4)
        when_idle(ahead)
        begun.append(sum(map(len, engine.calls)))
        ahead.sync_weights((), step)
    assert begun == [12, 16, 20, 20, 20]  # the run has five steps of four
    assert engine.calls == [list(range(i, i + 4)) for i in range(0, 20, 4)]
    assert threading.main_thread() not in engine.threads


def test_extra_rounds_take_what_has_begun_for_later_steps():
    """As --resample draws them, on the second of two ranks."""
    engine = Slow()
    ahead = ahead_of(engine, 1, rank=1, size=2)
    taken = [
        serial for first, count in ((0, 4), (4, 3), (7, 1)) for serial in drawn(ahead, first, count)
    ]
    assert taken == [1, 3, 5, 7]
    ahead.sync_weights((), 1)
    assert drawn(ahead, 8, 4) == [9, 11]
    when_idle(ahead)
    assert sum(engine.calls, []) == [1, 3, 5, 7, 9, 11, 13, 15]


def drawn(ahead, first, count):
    serials, groups = take(ahead, first, count)
    assert [group[0].ids[0] for group in groups] == serials
    return serials


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_no_rollout_is_older_than_it_may_be_and_groups_come_in_order(staleness):
    """Whatever waits for whatever, and however many rounds a step has."""
    draw = random.Random(staleness)
    engine = Slow(lambda: time.sleep(draw.choice((0, 0, 0.002, 0.01))))
    ahead = ahead_of(engine, staleness, steps=40)
    consumed, oldest = 0, 0
    for step in range(1, 41):
        for count in (4, *draw.choice(((), (), (3,), (2, 1)))):
            serials, groups = take(ahead, consumed, count)
            consumed += count
            expected = packing.take(ROWS, 3, consumed - count, count)
            for group, serial, index in zip(groups, serials, expected, strict=True):
                assert [r.ids for r in group] == [[serial, 0], [serial, 1]]
                assert group[0].prompt == [index]
                age = step - 1 - group[0].version
                assert 0 <= age <= staleness
                oldest = max(oldest, age)
        time.sleep(draw.choice((0, 0.005)))
        ahead.sync_weights((), step)
    assert oldest == staleness
    assert sorted(serial for call in engine.calls for serial in call)[:consumed] == [
        *range(consumed)
    ]


def test_an_evaluation_comes_next_and_waits_for_the_call_that_runs():
    began, go = threading.Event(), threading.Event()

    def wait():
        began.set()
        assert go.wait(10)

    engine = Slow(wait)
    ahead = ahead_of(engine, 2)
    ahead.share(0, 4)
    assert began.wait(10)
    threading.Timer(0.05, go.set).start()
    ((group,), _) = ahead.generate([[1], [2]], 1, SAMPLING_OF_ALL, [77, 78])
    assert group.ids == [77, 0]
    when_idle(ahead)
    assert engine.calls == [[0, 1, 2, 3], [77, 78], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_loop_may_ask_for_other_prompts_than_those_that_began():
    """As forks/curriculum.diff: the answer is to the prompt that it asks for."""
    ahead = ahead_of(Slow(), 1)
    for step in range(1, 4):
        indices, serials = ahead.share(4 * (step - 1), 4)
        prompts, n, sampling, seeds = request([99, *indices[1:]], serials)
        groups = ahead.generate(prompts, n, sampling, seeds)
        assert [group[0].prompt for group in groups] == prompts
        ahead.sync_weights((), step)
    when_idle(ahead)
    ahead.share(12, 4)
    assert {serial for serial in ahead.begun.values()} <= set(range(12, 20))  # the rest is gone


def test_groups_come_in_the_order_of_the_request():
    ahead = ahead_of(Slow(), 1)
    ahead.share(0, 4)
    when_idle(ahead)
    indices, serials = ahead.share(0, 4)
    prompts, n, sampling, _ = request(indices[::-1], serials)
    groups = ahead.generate(prompts, n, sampling, serials[::-1])
    assert [group[0].ids[0] for group in groups] == [3, 2, 1, 0]


def test_what_is_recorded_belongs_to_the_step_that_takes_it():
    """And to the weights of then, whatever sampled it. An evaluation belongs to the step before."""
    found = []

    class Kept:
        @staticmethod
        def add(step, version, n, sampling, seeds, groups):
            found.append((step, version, seeds))

    ahead = ahead_of(Slow(), 1)
    ahead.recording = Kept
    evaluation = [[1], [2]], 1, SAMPLING_OF_ALL, [77, 78]
    ahead.sync_weights((), 0)
    ahead.generate(*evaluation)
    take(ahead, 0, 4)
    ahead.sync_weights((), 1)
    ahead.generate(*evaluation)
    take(ahead, 4, 2)
    take(ahead, 6, 1)
    expected = [(0, 0, [77, 78]), (1, 0, [0, 1, 2, 3]), (1, 1, [77, 78])]
    assert found == [*expected, (2, 1, [4, 5]), (2, 1, [6])]


def test_arrival_is_the_order_in_which_groups_finish():
    ahead = ahead_of(Slow(), 1)
    _, groups = take(ahead, 0, 4)
    assert [[r.arrived for r in group] for group in groups] == [[i, i] for i in (1, 2, 3, 4)]


# --------------------------------------------------------------------------------- errors and ends
def test_an_error_of_the_thread_is_raised_at_the_next_request():
    taken = threading.Event()

    def fails():
        if len(engine.calls) == 2:
            assert taken.wait(10)
            raise InputError("the engine has had enough.")

    engine = Slow(fails)
    ahead = ahead_of(engine, 1)
    take(ahead, 0, 4)
    taken.set()
    when_idle(ahead)
    for _ in range(2):
        with pytest.raises(InputError, match="the engine has had enough"):
            ahead.share(4, 4)
    with pytest.raises(InputError, match="the engine has had enough"):
        ahead.generate([[1]], 1, SAMPLING_OF_ALL, [9])


def test_an_error_of_the_thread_is_raised_at_once_where_the_loop_waits():
    def fails():
        raise InputError("the engine has had enough.")

    said = []

    def loop():
        try:
            take(ahead_of(Slow(fails), 1), 0, 4)
        except InputError as error:
            said.append(str(error))

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    thread.join(10)
    assert said == ["the engine has had enough."]


def test_closing_ends_the_thread_and_what_is_to_come():
    began, go = threading.Event(), threading.Event()

    def wait():
        began.set()
        assert go.wait(10)

    engine = Slow(wait)
    engine.close = go.set
    ahead = ahead_of(engine, 3)
    ahead.share(0, 4)
    assert began.wait(10)
    thread = ahead.thread
    ahead.close()
    assert not thread.is_alive() and engine.calls == [[0, 1, 2, 3]]


FAILS = """
        if self.version == 2 and rows == 8:
            raise InputError("this engine samples no more.")
"""


def test_an_engine_that_fails_in_the_thread_ends_the_run_with_its_sentence(place, tmp_path):
    """And with a checkpoint of the last whole step."""
    folder = forks.patched(tmp_path)
    path = folder / "nanopost/engine.py"
    head = "        most, total = sampling.max_tokens, len(prompts) * n\n"
    assert path.read_text().count(head) == 1
    path.write_text(
        path.read_text().replace(head, FAILS.replace("rows ==", "len(prompts) * n ==") + head)
    )
    given = flags(place, "train_grpo.py", tmp_path / "out", "--steps", 9, "--max_staleness", 1)
    command = [sys.executable, str(folder / "train_grpo.py"), *map(str, given)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    (saved,) = checkpoint.complete(tmp_path / "out")
    step = checkpoint.step_of(saved)
    assert said[-2:] == [
        "error: this engine samples no more.",
        f"--resume continues after step {step}",
    ]
    assert step in (2, 3) and metrics(tmp_path / "out")[-1]["step"] == step


# ------------------------------------------------------------------------------------------ scripts
@pytest.mark.parametrize("script", SAMPLING)
def test_a_script_samples_ahead_with_weights_of_its_own(place, tmp_path, monkeypatch, script):
    """No rollout is older than it may be, and none is left in the thread at the end."""
    threads, generate, reward = set(), Engine.generate, f"{place}/reward.py:ids"

    def watched(engine, *given):
        assert not engine.shared
        threads.add(threading.current_thread())
        return generate(engine, *given)

    monkeypatch.setattr(Engine, "generate", watched)
    more = ("--steps", 5, "--max_staleness", 2, "--reward", reward, "--eval_every", 2)
    run_here(script, *flags(place, script, tmp_path, *more))
    lines = metrics(tmp_path)[1:]
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)
    assert [0 <= line["staleness/mean"] <= line["staleness/max"] <= 2 for line in lines] == [
        True
    ] * 5
    assert max(line["staleness/mean"] for line in lines) > 0 == lines[0]["staleness/max"]
    for line in lines:
        parts = [line[f"time/{name}"] for name in ("rollout", "train", "sync")]
        assert min(parts) > 0 and sum(parts) < line["time/step"]
