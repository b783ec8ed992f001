"""Alarms: each illness is found within a stated number of steps, and a healthy run has none.

Series are what a run of each script logs, with its noise, drawn anew for each seed; real runs are
at the end, and in bench/alarms.py.
"""

import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from inprocess import run_here
from scripts import SCRIPTS, metrics, parser_of
from small import small_config

from nanopost import alarms
from nanopost.alarms import ALARMS, REST, Alarms, Metrics, differ, learnt
from nanopost.model import CausalLM
from nanopost.save import save_model
from runs import toy

SEEDS = range(12)


# ------------------------------------------------------------------------------------------ series
def ramp(first, last, steps=60):
    """From the first to the last value in so many steps, then constant."""
    return lambda s: first + (last - first) * min(1.0, s / steps)


def noisy(rng, value, share):
    return value * (1 + share * rng.gauss(0, 1))


def evaluated(line, step, **values):
    return line | {f"eval/{k}": v for k, v in values.items()} if step % 20 == 0 else line


def grpo_line(rng, step):
    """A run that gets from 0.3 to 0.9 right, as on the toy: what varies then varies less."""
    solved = ramp(0.3, 0.9)(step)
    line = {
        "step": step,
        "reward": noisy(rng, solved, 0.06),
        "reward_std": noisy(rng, 0.05 + solved * (1 - solved), 0.1),
        "frac_reward_zero_std": min(1.0, abs(rng.gauss(max(0.05, 1.6 * solved - 0.9), 0.05))),
        "kl": noisy(rng, ramp(0.001, 0.12)(step), 0.3),
        "entropy": noisy(rng, ramp(0.4, 0.02)(step), 0.05),
        "loss": rng.gauss(0, 0.01),
        "grad_norm": rng.lognormvariate(0, 0.5),
        "completions/mean_length": noisy(rng, 200, 0.03),
        "completions/clipped_ratio": abs(rng.gauss(0.02, 0.02)),
        "completions/duplicate_ratio": noisy(rng, ramp(0.3, 0.8)(step), 0.05),
        "completions/unrewarded": 0.0,
        "clip_ratio/region_mean": abs(rng.gauss(0.02, 0.01)),
        "sampling/sampling_logp_difference/mean": noisy(rng, 0.004, 0.2),
        "staleness/max": 0,
    }
    greedy = 0.95 + rng.gauss(0, 0.02)
    return evaluated(line, step, accuracy=solved + rng.gauss(0, 0.02), greedy=greedy)


def ppo_line(rng, step):
    of_grpo = grpo_line(rng, step)
    names = ("completions/mean_length", "completions/clipped_ratio", "grad_norm", "eval/accuracy")
    return {name: of_grpo[name] for name in ("step", *names) if name in of_grpo} | {
        "objective/scores": of_grpo["reward"],
        "objective/kl": 200 * of_grpo["kl"],
        "policy/entropy_avg": of_grpo["entropy"],
        "policy/clipfrac_avg": of_grpo["clip_ratio/region_mean"],
        "policy/approxkl_avg": abs(rng.gauss(0.006, 0.004)),
        "val/explained_variance": -2.0 / step**1.5 + rng.gauss(0, 0.05),
        "completions/unrewarded": 0.0,
    }


def dpo_line(rng, step):
    chosen, rejected = ramp(0, -0.3)(step), ramp(0, -2.5)(step)
    line = {
        "step": step,
        "loss": noisy(rng, ramp(0.69, 0.3)(step), 0.1),
        "rewards/chosen": chosen + rng.gauss(0, 0.1),
        "rewards/rejected": rejected + rng.gauss(0, 0.2),
        "rewards/accuracies": min(1.0, ramp(0.5, 0.85)(step) + rng.gauss(0, 0.05)),
        "entropy": noisy(rng, ramp(0.4, 0.3)(step), 0.05),
        "grad_norm": rng.lognormvariate(0, 0.5),
    }
    loss = ramp(0.69, 0.4)(step) + rng.gauss(0, 0.005)
    return evaluated(line, step, loss=loss, **{"rewards/accuracies": ramp(0.5, 0.8)(step)})


def sft_line(rng, step):
    loss = 2 + 4 * math.exp(-step / 20)
    line = {
        "step": step,
        "loss": noisy(rng, loss, 0.05),
        "entropy": noisy(rng, loss, 0.05),
        "grad_norm": rng.lognormvariate(0, 0.5),
    }
    return evaluated(line, step, loss=loss + rng.gauss(0, 0.01))


def distill_line(rng, step):
    """A student that becomes as sure as its teacher, in answers that were mostly cut off before."""
    divergence = ramp(0.4, 0.02)(step)
    line = {
        "step": step,
        "divergence": noisy(rng, divergence, 0.1),
        "loss": noisy(rng, divergence, 0.1),
        "entropy": noisy(rng, ramp(0.5, 0.02)(step), 0.05),
        "grad_norm": rng.lognormvariate(0, 0.5),
        "completions/mean_length": noisy(rng, 200, 0.03),
        "completions/clipped_ratio": abs(rng.gauss(0.7, 0.02)),
    }
    greedy = {"accuracy": ramp(0.2, 0.5)(step), "greedy": 0.9}  # so is the teacher
    return evaluated(line, step, divergence=noisy(rng, divergence, 0.02), **greedy)


LINES = {
    "grpo": grpo_line,
    "ppo": ppo_line,
    "dpo": dpo_line,
    "sft": sft_line,
    "distill": distill_line,
}


def series(kind, seed, steps=120, start=0, changes=None):
    """A run of `steps` steps. changes: {metric: f(steps since start, healthy value) -> value} from
    the step `start` on; None removes it."""
    rng, lines = random.Random(f"{kind} {seed}"), []
    for step in range(1, steps + 1):
        line = LINES[kind](rng, step)
        for name, change in (changes or {}).items():
            if step > start and (name in line or not name.startswith("eval/")):
                line[name] = change(step - start, line.get(name))
        lines.append({name: value for name, value in line.items() if value is not None})
    return lines


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", LINES)
def test_a_healthy_run_has_no_alarm(kind, seed):
    assert alarms.of(series(kind, seed, steps=200)) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_answers_that_get_longer_as_they_get_better_are_healthy(seed):
    lines = series("grpo", seed)
    for line in lines:
        line["completions/mean_length"] *= 1.01 ** min(60, line["step"])
    assert alarms.of(lines) == []


def still(value):
    """A reward that stands where it is, with its noise."""
    return lambda s, x: value + 0.05 * (x - 0.6)


# illness: (kind, the step it begins after, the changes, the alarm, steps until it is found)
ILLNESSES = {
    "one answer to every prompt": (
        "grpo",
        30,
        {"reward": still(0.3), "reward_std": lambda s, x: 0.5 * 0.7**s},
        "reward_std_collapsed",
        20,
    ),
    "length for nothing": (
        "grpo",
        20,
        {
            "reward": still(0.3),
            "completions/mean_length": lambda s, x: x * 1.01**s,
        },
        "length_creeping",
        50,
    ),
    "length on a plateau": (
        "grpo",
        70,
        {"completions/mean_length": lambda s, x: x * 1.015**s},
        "length_creeping",
        50,
    ),
    "KL of GRPO": ("grpo", 40, {"kl": lambda s, x: 0.1 * 1.2**s}, "kl_exploding", 15),
    "KL of PPO": ("ppo", 40, {"objective/kl": lambda s, x: 20 * 1.2**s}, "kl_exploding", 15),
    "KL of a PPO without a reference": (
        "ppo",
        40,
        {"objective/kl": lambda s, x: None, "policy/approxkl_avg": lambda s, x: 0.01 * 1.25**s},
        "kl_exploding",
        16,
    ),
    "chosen sinks with rejected": (
        "dpo",
        0,
        {
            "rewards/chosen": lambda s, x: -0.06 * s,
            "rewards/rejected": lambda s, x: -0.08 * s,
        },
        "chosen_and_rejected_sinking",
        20,
    ),
    "hopeless prompts": (
        "grpo",
        0,
        {"reward": still(0.03), "frac_reward_zero_std": lambda s, x: 0.9 + x / 20},
        "varied_groups_collapsed",
        10,
    ),
    "answers without an end": (
        "grpo",
        40,
        {"completions/clipped_ratio": lambda s, x: min(1.0, 0.02 + 0.02 * s)},
        "truncated_rising",
        20,
    ),
    "answers that never ended": (
        "ppo",
        0,
        {"completions/clipped_ratio": lambda s, x: 0.7 + x},
        "truncated_rising",
        10,
    ),
    "no choice left": (
        "grpo",
        20,
        {"reward": still(0.3), "entropy": lambda s, x: 0.4 * 0.8**s},
        "entropy_collapsed",
        20,
    ),
    "steps too large": (
        "grpo",
        20,
        {"clip_ratio/region_mean": lambda s, x: min(0.6, 0.05 * s)},
        "clip_fraction_rising",
        15,
    ),
    "an engine that drifts": (
        "grpo",
        30,
        {"sampling/sampling_logp_difference/mean": lambda s, x: x + 0.002 * s},
        "mismatch_rising",
        15,
    ),
    "spikes": (
        "sft",
        40,
        {"grad_norm": lambda s, x: 100.0 if s % 3 == 0 else x},
        "gradient_spikes",
        10,
    ),
    "a value model that errs": (
        "ppo",
        0,
        {"val/explained_variance": lambda s, x: -1.0 + x / 10},
        "value_explains_nothing",
        30,
    ),
    "the same answer again": (
        "grpo",
        20,
        {"reward": still(0.3), "completions/duplicate_ratio": lambda s, x: min(0.85, 0.3 + s / 30)},
        "duplicates_rising",
        25,
    ),
    "a constant reward": (
        "grpo",
        0,
        {"reward": lambda s, x: 0.5, "reward_std": lambda s, x: 0.0},
        "reward_constant",
        5,
    ),
    "a verifier that dies": (
        "ppo",
        50,
        {"objective/scores": lambda s, x: 0.0},
        "reward_constant",
        10,
    ),
    "rewards that do not apply": (
        "grpo",
        30,
        {"completions/unrewarded": lambda s, x: 0.8},
        "unrewarded",
        10,
    ),
    "a reward that is no number": (
        "grpo",
        30,
        {"reward": lambda s, x: math.nan},
        "not_finite",
        1,
    ),
    "a loss that overflows": ("sft", 30, {"loss": lambda s, x: math.inf}, "not_finite", 1),
    "a reward that is hacked": (
        "grpo",
        39,
        {"eval/accuracy": lambda s, x: 0.6 - 0.004 * s, "reward": lambda s, x: x},
        "held_out_falling",
        45,
    ),
    "rows by heart": (
        "sft",
        39,
        {"eval/loss": lambda s, x: 2.5 + 0.01 * s, "loss": lambda s, x: 2.5 * 0.95**s},
        "held_out_falling",
        45,
    ),
    "a rate that is far too high": (
        "sft",
        1,
        {"loss": lambda s, x: 100 * x},
        "loss_exploding",
        5,
    ),
    "a student at too high a rate": (
        "distill",
        1,
        {"loss": lambda s, x: 2.0, "divergence": lambda s, x: 2.0},
        "loss_exploding",
        5,
    ),
    "a student that settles on its own answers": (
        "distill",
        20,
        {"divergence": lambda s, x: 0.3 + x / 10, "entropy": lambda s, x: 0.4 * 0.8**s},
        "entropy_collapsed",
        20,
    ),
    "a student that repeats itself": (
        "distill",
        40,
        {"completions/clipped_ratio": lambda s, x: min(1.0, 0.7 + 0.02 * s)},
        "truncated_rising",
        20,
    ),
    "prompts by heart": (
        "distill",
        39,
        {"eval/divergence": lambda s, x: 0.2 + 0.002 * s},
        "held_out_falling",
        45,
    ),
    "what greedy answers know": (
        "grpo",
        0,
        {
            "eval/accuracy": lambda s, x: 0.3 + (x - 0.6) / 50,
            "reward": lambda s, x: 0.3 + 0.001 * s + (x - 0.6) / 50,
        },
        "greedy_far_from_sampled",
        80,
    ),
}


@pytest.mark.parametrize("illness", ILLNESSES)
def test_an_illness_is_found_within_so_many_steps(illness):
    kind, start, changes, name, within = ILLNESSES[illness]
    for seed in SEEDS:
        found = alarms.of(series(kind, seed, 120, start, changes))
        first = next((alarm for alarm in found if alarm["alarm"] == name), None)
        assert first, f"seed {seed}: {[alarm['alarm'] for alarm in found]}"
        assert 0 < first["step"] - start <= within, f"seed {seed}: step {first['step']}"
        assert 0 <= first["since"] <= first["step"]
        assert all(alarm["step"] > start for alarm in found)  # nothing before there was something


def test_every_alarm_has_an_illness_here():
    assert {illness[3] for illness in ILLNESSES.values()} == ALARMS.keys()


def test_an_alarm_says_what_is_seen_with_both_numbers_and_which_flag_to_try():
    flags = {action.dest for script in SCRIPTS for action in parser_of(script)._actions}
    kinds = set()
    for kind, start, changes, name, _ in ILLNESSES.values():
        found = alarms.of(series(kind, 0, 120, start, changes))
        (message, *_) = [alarm["message"] for alarm in found if alarm["alarm"] == name]
        assert re.match(r"since step \d+, |over the last \d+ steps, ", message)
        assert message.endswith(".")
        assert message.count(". ") == 0 and "\n" not in message  # one sentence
        if name not in ("not_finite", "reward_constant"):  # of which there may be one alone
            compares = ", and was " in message
            assert len(re.findall(r"\d+(?:\.\d+)?", message)) >= 2 + compares, message
        named = set(re.findall(r"--(\w+)", message))
        assert named and named <= flags, message
        kinds.add(name)
    assert kinds == ALARMS.keys()


def test_both_numbers_are_those_of_the_metrics():
    kind, start, changes, name, _ = ILLNESSES["length on a plateau"]
    lines = series(kind, 3, 120, start, changes)
    (alarm,) = alarms.of(lines)
    length = [line["completions/mean_length"] for line in lines]
    at = alarm["step"]
    now, then = np.mean(length[at - 10 : at]), np.mean(length[at - 60 : at - 50])
    assert f"completions/mean_length is {now:.3g}, and was {then:.3g}," in alarm["message"]
    assert now >= 1.25 * then and alarm["since"] == at - 49


def messages(steps, **columns):
    """{alarm: its first message} of a run with these columns, each a function of the step."""
    lines = [{"step": s} | {name: f(s) for name, f in columns.items()} for s in range(1, steps)]
    return {alarm["alarm"]: alarm["message"] for alarm in reversed(alarms.of(lines))}


def of_ppo(kl, length):
    return {"objective/kl": kl, "completions/mean_length": length}


def test_the_kl_of_answers_is_one_of_tokens_however_long_they_are_then_and_now():
    """3 nats over 100 tokens, then 3.2 over 2; and 0.6 a token whatever the length becomes."""
    shorter = of_ppo(lambda s: 3.0 if s < 60 else 3.2, lambda s: 100.0 if s < 60 else 2.0)
    found = messages(120, **shorter)["kl_exploding"]
    assert found.startswith("over the last 5 steps, objective/kl per token is 1.6, and was 0.03 10")
    for length in (
        lambda s: 50 if s < 60 else 200,
        lambda s: 5 if s < 60 else 1000,
        lambda s: 1000 if s < 60 else 5,
        lambda s: 50 * 1.1 ** min(s, 40),
    ):
        assert not messages(120, **of_ppo(lambda s, length=length: 0.6 * length(s), length))
    assert not messages(120, **{"objective/kl": lambda s: 3.0 * 1.2**s})  # of who knows how long


RISES = {
    "GRPO, solved": {"reward": ramp(0.2, 1.0, 40), "reward_std": ramp(0.3, 0.0, 40)},
    "GRPO, all but solved before": {"reward": ramp(0.97, 1, 30), "reward_std": ramp(0.1, 0, 30)},
    "penalties that rise to 0": {"reward": ramp(-1.0, 0.0, 40), "reward_std": ramp(0.3, 0.0, 40)},
    "PPO, solved": {"objective/scores": ramp(0.0, 1.0, 50)},
    "PPO, better than ever but for a lucky step": {
        "objective/scores": lambda s: 0.95 if s == 20 else ramp(0.2, 0.9, 40)(s)
    },
}


@pytest.mark.parametrize("rises", RISES)
def test_a_solved_task_is_no_constant_reward_however_long_ago_it_was_solved(rises):
    assert not messages(400, **RISES[rises])


def test_a_verifier_that_dies_at_a_middling_reward_is_found():
    rng = random.Random(0)
    dies = {"objective/scores": lambda s: 0.5 if s > 60 else 0.5 + rng.gauss(0, 0.1)}
    found = messages(80, **dies)["reward_constant"]
    assert found.startswith("since step 61, objective/scores is 0.5 in each of 10 steps, and was")


def test_since_is_the_first_spike_and_of_a_window_the_steps_are_counted():
    spikes = {"grad_norm": lambda s: 30.0 if s > 60 and s % 3 == 0 else 1.0}
    assert messages(90, **spikes)["gradient_spikes"].startswith("since step 63, grad_norm was up")
    unrewarded = {"completions/unrewarded": lambda s: float(s > 10)}
    found = messages(40, **unrewarded)["unrewarded"]
    assert found.startswith("over the last 10 steps, completions/unrewarded is 0.5, and was 0 at")


LOGGED = ("loss/value_avg", "rewards/chosen", "eval/loss", "objective/kl", "a/metric/of/a/fork")


@pytest.mark.parametrize("name", LOGGED)
def test_any_metric_that_is_no_number_is_an_alarm(name):
    said = f"since step 7, {name} is nan: what it is computed from has overflowed"
    broken = {name: lambda s: math.nan if s == 7 else 1.0}
    assert messages(9, **broken)["not_finite"].startswith(said)
    both = broken | {"reward": lambda s: -math.inf if s == 7 else 0.01 * s}
    assert f"{name} is nan (and 1 more): " in messages(9, **both)["not_finite"]


# ----------------------------------------------------------------------------------- once and again
def test_an_alarm_sounds_once_and_again_only_after_it_was_gone():
    lines = series("sft", 1, 400)
    for line in lines:
        s = line["step"]
        if 40 < s < 120 and s % 3 == 0 or 250 < s and s % 3 == 0:
            line["grad_norm"] *= 1000
    found = [(alarm["alarm"], alarm["step"]) for alarm in alarms.of(lines)]
    assert [name for name, _ in found] == ["gradient_spikes"] * 2
    assert 40 < found[0][1] < 52 and 250 < found[1][1] < 262


def test_what_comes_and_goes_is_one_illness():
    healthy = {"step": 0, "reward": 0.3, "completions/unrewarded": 0.0}
    lines = []
    for step in range(300):
        ill = step > 20 and step % (REST + 9) < 15
        lines.append(healthy | {"step": step, "completions/unrewarded": float(ill)})
        lines[-1]["reward"] += 0.01 * (step % 7)
    assert [alarm["alarm"] for alarm in alarms.of(lines)] == ["unrewarded"]


@pytest.mark.parametrize("illness", ["a constant reward", "KL of GRPO", "rows by heart"])
def test_the_alarms_of_a_log_do_not_depend_on_where_it_was_cut(illness):
    """Those of the first lines are those that had sounded then: so a resumed run goes on."""
    kind, start, changes, *_ = ILLNESSES[illness]
    lines = series(kind, 5, 120, start, changes)
    whole = alarms.of(lines)
    assert whole
    for cut in range(0, 120, 7):
        assert alarms.of(lines[:cut]) == [alarm for alarm in whole if alarm["step"] <= cut]


def test_a_look_costs_no_more_after_many_steps():
    watched, times = Alarms(), []
    for line in series("grpo", 0, 4000):
        began = time.perf_counter()
        watched.add(line)
        times.append(time.perf_counter() - began)
    assert np.median(times[-500:]) < 3 * np.median(times[100:600])


# ------------------------------------------------------------------------------------------ notions
def test_windows_differ_by_more_than_chance_about_one_time_in_twenty():
    draw = np.random.default_rng(0)
    found = [bool(differ(*draw.normal(size=(2, 10)).tolist())) for _ in range(2000)]
    assert 0.02 < np.mean(found) < 0.1
    assert differ([1.0] * 10, [1.5] * 10) == 0.5
    assert differ([1.0], [1.0]) == 0.0


def test_a_run_has_learnt_if_its_reward_has_risen_by_a_part_of_the_spread():
    for last, expected in ((0.31, False), (0.6, True), (0.1, False)):
        m = Metrics()
        for step in range(30):
            reward = 0.3 if step < 15 else last
            m.add({"step": step, "reward": reward + 0.01 * (step % 2), "reward_std": 0.4})
        assert learnt(m) == expected


def test_metrics_are_read_by_name_step_and_place():
    m = Metrics()
    for step in range(5):
        m.add({"step": step, "a": step / 2} | ({"eval/b": float(step)} if step % 2 == 0 else {}))
    m.add({"step": 5, "a": math.nan, "text": "no number"})
    assert m.count("a") == 5 and m.count("missing") == 0 and m.broken.keys() == {"a"}
    assert m.first("a", 2) == [0.0, 0.5] and m.last("a", 2) == [1.5, 2.0]
    assert m.last("a", 2, skip=2) == [0.5, 1.0] and m.last("a", 2, skip=9) == []
    assert m.since("a", 2) == 3 and m.since("a", 99) == 0
    assert m.until("eval/b", 3) == [0.0, 2.0] and m.until("a", 2, 2) == [0.5, 1.0]
    assert m.named("missing", "eval/b", "a") == "eval/b" and m.named("missing") is None
    assert m.first("missing") == m.last("missing") == m.until("missing", 3) == []
    assert m.since("missing") == 5 and m.extremes["a"] == (0.0, 2.0)
    m.add({"step": 6, "a": 10**400, "eval/b": -(10**400)})  # as json reads it
    assert m.last("a", 1) == [alarms.HUGE] and m.last("eval/b", 1) == [-alarms.HUGE]


def test_no_metrics_whatever_raise():
    """In some steps or in none: what a script does not log, or an older one did not."""
    source = Path(alarms.__file__).read_text()
    names = sorted(set(re.findall(r'"([a-z_]+(?:/[a-z_/]+)?)"', source)) - {"step"})
    assert {"objective/kl", "completions/mean_length", "staleness/max", "ties"} <= set(names)
    draw = random.Random(0)
    values = [0.0, -1.0, 1e-300, 1e300, -1e300, math.nan, math.inf, -math.inf, 0.5, 3, 10**400]
    for _ in range(40):
        watched = Alarms()
        there = draw.sample(names, draw.randrange(1, len(names)))
        for step in range(70):
            given = draw.sample(there, draw.randrange(len(there) + 1))
            watched.add({"step": step} | {name: draw.choice(values) for name in given})
    for name in names:  # by itself
        messages(70, **{name: lambda s: draw.random() * s**3})


# ------------------------------------------------------------------------------------ in real runs
CONSTANT = """
def constant(completions, **columns):
    return [0.5 for _ in completions]
"""


@pytest.fixture
def flags(tmp_path):
    """Of GRPO with a constant reward, on a random model of the toy's tokens."""
    config = small_config(vocab_size=264, eos_token_id=1)
    weights = CausalLM(config).init_weights(0).state_dict()
    save_model(tmp_path / "model", weights.items(), config, toy.tokenizer_files())
    toy.write_rows(tmp_path / "prompts.jsonl", toy.prompt_rows(held_out=False)[:12])
    (tmp_path / "reward.py").write_text(CONSTANT)
    return (
        *("--model", tmp_path / "model", "--data", tmp_path / "prompts.jsonl", "--holdout", 2),
        *("--out", tmp_path / "out", "--steps", 7, "--save_every", 0, "--device", "cpu"),
        *("--prompts", 2, "--group", 2, "--max_new_tokens", 4),
        *("--reward", f"{tmp_path}/reward.py:constant"),
    )


def test_a_constant_reward_stops_a_run_which_may_go_on(flags, tmp_path, capsys):
    out, flags = tmp_path / "out", (*flags, "--alarms", "stop")
    with pytest.raises(SystemExit) as stopped:
        run_here("train_grpo.py", *flags)
    assert stopped.value.code == 3
    said = capsys.readouterr().out
    assert "ALARM reward_constant, step 5: since step 1, reward is 0.5 in each of 5 steps" in said
    assert said.endswith("stopped by an alarm (--alarms stop): --resume continues after step 5\n")
    (alarm,) = [json.loads(line) for line in (out / "alarms.jsonl").read_text().splitlines()]
    assert (alarm["step"], alarm["alarm"], alarm["since"]) == (5, "reward_constant", 1)
    run_here("train_grpo.py", *flags, "--resume")
    assert [line["step"] for line in metrics(out)] == list(range(8))
    assert (out / "alarms.jsonl").read_text().count("\n") == 1
    assert "ALARM" not in capsys.readouterr().out
