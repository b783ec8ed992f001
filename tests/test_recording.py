"""Recorded rollouts: all their digits, dropped with the steps that are lost, and replayed."""

import json
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
from inprocess import run_here
from kills import wait_until_gone
from scripts import ENVIRONMENT, command, metrics, run, weights
from test_loops import ROLLOUTS, flags, place

from nanopost import InputError, checkpoint
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.recording import Recording, Replay
from nanopost.rollout import Rollout

__all__ = ["place"]  # a fixture: a toy model, prompts, and a reward that varies
WORLD = SimpleNamespace(rank=0, size=1)
CUT = Sampling(8, 0.7, top_k=3, stop=("a", "b"))


def group(seed, n=2):
    """Rollouts with all kinds of digits."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(n):
        logp = draw.standard_normal(3).astype(np.float32)
        versions, sampled = np.array([1, 1, 2]), np.array([True, False, True])
        found.append(Rollout([5, seed], [7, 8, i], logp, "length", versions, sampled, seed))
    return found


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a.prompt, a.ids, a.finish, a.arrived) == (b.prompt, b.ids, b.finish, b.arrived)
        for name in ("logp", "versions", "sampled"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


def test_what_was_recorded_is_replayed_to_the_last_bit(alone, tmp_path):
    """By version, seed, n and sampling: an evaluation asks with the same seeds at every step."""
    recording = Recording(tmp_path, WORLD, 0)
    recording.add(1, 0, 2, CUT, [3, 4], [group(3), group(4)])
    recording.add(1, 1, 2, CUT, [3], [group(30)])
    recording.add(1, 1, 2, Sampling(8), [3], [group(31)])
    engine = Replay(tmp_path, WORLD)
    for first, second in zip(engine.generate([[5, 4], [5, 3]], 2, CUT, [4, 3]), (4, 3)):
        same(first, group(second))
    engine.sync_weights(None, 1)
    for sampling, seed in ((CUT, 30), (Sampling(8), 31)):
        (found,) = engine.generate([[5, seed]], 2, sampling, [3])
        same(found, group(seed))


def test_what_the_recorded_run_did_not_ask_for_is_refused_in_a_sentence(alone, tmp_path):
    Recording(tmp_path, WORLD, 0).add(1, 0, 2, CUT, [3], [group(3)])
    engine = Replay(tmp_path, WORLD)
    for given, said in (
        (([[5, 3]], 2, CUT, [4]), "after step 0 it has no 2 rollouts with seed 4 and Sampling"),
        (([[5, 3]], 3, CUT, [3]), "it has no 3 rollouts with seed 3 .*run.json has them"),
        (([[5, 3]], 2, Sampling(9), [3]), "seed 3 and Sampling.max_tokens=9"),
        (([[5, 3, 1]], 2, CUT, [3]), "has other tokens there .2, here 3.: give the --data"),
    ):
        with pytest.raises(InputError, match=f"--replay {tmp_path}: .*{said}"):
            engine.generate(*given)
    with pytest.raises(InputError, match="rollouts of 1 ranks, and this run has 2: start 1"):
        Replay(tmp_path, SimpleNamespace(rank=0, size=2))
    with pytest.raises(InputError, match=f"{tmp_path / 'other'}: it has no rollouts; --record"):
        Replay(tmp_path / "other", WORLD)


def test_a_resume_drops_what_the_lost_steps_had_taken(alone, tmp_path):
    """And a line that a kill has cut short. An evaluation belongs to the step that it follows."""
    recording = Recording(tmp_path, WORLD, 0)
    for step, version, seed in (
        (0, 0, 90),
        (1, 0, 1),
        (1, 1, 90),
        (2, 1, 2),
        (2, 2, 90),
        (3, 2, 3),
    ):
        recording.add(step, version, 2, CUT, [seed], [group(seed)])
    whole = recording.path.read_text().splitlines()
    with open(recording.path, "a") as file:
        file.write(whole[0][:50])
    assert Recording(tmp_path, WORLD, 2).path.read_text().splitlines() == whole[:5]
    assert Recording(tmp_path, WORLD, 1).path.read_text().splitlines() == whole[:3]


# ------------------------------------------------------------------------------------------ scripts
def remains(out):
    """What a run leaves, but for what a clock measures and what names its folder."""
    lines = metrics(out)
    for line in lines:
        for name in [n for n in line if n.startswith("time/") or n == "tokens_per_second"]:
            del line[name]
    return weights(out), lines, (out / "samples.jsonl").read_text()


def ahead(place, script, out, *more):
    """Flags of a run of six steps that runs ahead; of GRPO, with extra rounds."""
    own = ("--steps", 6, "--max_staleness", 2, "--eval_every", 2, "--max_new_tokens", 9)
    if script == "train_grpo.py":
        own += ("--resample", 3, "--reward", f"{place}/reward.py:odd", "--max_logp_gap", 9)
    return flags(place, script, out, *own, *more)


def seeds_taken(out) -> list[int]:
    """Of the prompts that the steps have drawn, on all ranks."""
    lines = []
    for path in (out / "records").glob("rollouts-*.jsonl"):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    return [line["seed"] for line in lines if line["step"] == line["version"] + 1]


@pytest.mark.parametrize("script", ROLLOUTS)
def test_a_run_that_ran_ahead_replays_to_the_same_bytes(
    place, tmp_path, monkeypatch, capsys, script
):
    """Without a model to sample from."""
    run_here(script, *ahead(place, script, tmp_path / "out", "--record"))
    assert max(line["staleness/max"] for line in metrics(tmp_path / "out")[1:]) > 0
    monkeypatch.setattr(Engine, "generate", None)
    run_here(script, *ahead(place, script, tmp_path / "again", "--replay", tmp_path / "out"))
    assert remains(tmp_path / "again") == remains(tmp_path / "out")
    assert "other flags" not in capsys.readouterr().out
    others = ahead(place, script, tmp_path / "other", "--replay", tmp_path / "out", "--seed", 1)
    with pytest.raises(InputError, match="after step 0 it has no"):
        run_here(script, *others)
    assert "--replay of a run with other flags: seed: 0 -> 1\n" in capsys.readouterr().out


def killed(process, out, seconds):
    """SIGKILL a run some time into its training."""
    deadline = time.monotonic() + 60
    while not checkpoint.latest(out):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    wait_until_gone(process, out, "killed")  # its workers end a moment later


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_and_resumed_loses_and_doubles_no_prompt_and_replays(
    place, tmp_path, ranks
):
    """The replay, which is killed too, ends with the bytes of the recorded run."""
    ranks = 0 if ranks == 1 else ranks
    out, again = tmp_path / "out", tmp_path / "again"
    more = ("--steps", 30, "--save_every", 3, "--lr", 3e-4, "--resume")
    for folder, own in ((out, ("--record",)), (again, ("--replay", out))):
        given = ahead(place, "train_grpo.py", folder, *own, *more)
        for seconds in (0.0, 0.15):
            process = subprocess.Popen(
                command("train_grpo.py", *given, ranks=ranks),
                env=ENVIRONMENT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            killed(process, folder, seconds)
        run("train_grpo.py", *given, ranks=ranks)
    lines = metrics(out)[1:]
    assert [line["step"] for line in lines] == [*range(1, 31)]
    assert max(line["staleness/max"] for line in lines) <= 2
    consumed = int(sum(line["prompts_drawn"] for line in lines))
    assert sorted(seeds_taken(out)) == sorted(prompt_seed(0, i) for i in range(consumed))
    assert remains(again) == remains(out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [x if x == "train_grpo.py" else pytest.param(x, marks=pytest.mark.long) for x in ROLLOUTS],
)
def test_a_run_on_two_ranks_replays_to_the_same_bytes_and_on_no_other_number(
    place, tmp_path, script
):
    out, again = tmp_path / "out", tmp_path / "again"
    run(script, *ahead(place, script, out, "--record"), ranks=2)
    run(script, *ahead(place, script, again, "--replay", out), ranks=2)
    assert remains(again) == remains(out)
    given = ahead(place, script, tmp_path / "one", "--replay", out)
    done = run(script, *given, ok=False)
    assert "the rollouts of 2 ranks, and this run has 1: start 2 processes" in done.stderr
