"""What the twins of scripts that sample share: prompts and their order, the engine, rewards, and
the held-out evaluation.

A sample is a Namespace: prompt and new (token ids), sampled (bool for each of new), logp (of each
of new, 0 where not sampled), versions (of the weights that drew each of new), kept (for each of new
the ids that a cut kept, in order; none where there was no cut), length (sampled tokens), finish,
episode_reward (of --env), rewards (one of each function, None where it does not apply).
A rollout's numbers that belong to tokens are lists, aligned with ids = prompt + new.
"""

import copy
import json
import math
import runpy
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import forks
from nanopost import plain
from runs import toy
from twins import common

RECORDED = 1e-9  # how far a number in records/ may be from the twin's
GAP = "sampling/sampling_logp_difference"
METRICS = {
    *("eval/accuracy", "eval/accuracy/scaled", "eval/accuracy/factors", "eval/accuracy/letters-2"),
    *("eval/greedy", "eval/greedy/scaled", "eval/greedy/factors", "eval/greedy/letters-2"),
    *("rewards/letters/mean", "rewards/scaled/mean", "rewards/factors/mean"),
    "rewards/letters-2/mean",
    f"{GAP}/mean",
    f"{GAP}/max",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "completions/duplicate_ratio",
    "rewards/environment/mean",
    *("completions/unrewarded", "num_tokens", "staleness/mean", "staleness/max"),
}

# ---------------------------------------------------------------------------------------- the place
REWARDS = '''
def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def letters(completions, prompts, step, **columns):
    """Has the name of another reward; reads the prompt and the step."""
    rows = zip(completions, prompts, step)
    return [(3 * len(text_of(text)) + len(x[0]) + number) % 5 / 2 for text, x, number in rows]


def factors(completions, factor, completion_ids, **columns):
    """Reads a column and the tokens; does not apply to every fourth kind of answer."""
    sums = [sum(ids) for ids in completion_ids]
    return [None if s % 4 == 0 else f * (s % 7) / 3 - 1 for s, f in zip(sums, factor)]


def rarely(completions, **columns):
    """Equal for most answers, so that groups have equal rewards; does not apply to some."""
    sums = [sum(map(ord, text_of(text))) for text in completions]
    return [None if s % 7 == 3 else float(s % 5 == 0) for s in sums]
'''


TALK = '''
class Talk:
    """Replies with the length of an answer, which also decides on the reward and the end."""

    def reset(self, row):
        self.turns = 0

    def step(self, completion):
        self.turns += 1
        length = len(completion)
        reward = None if length == 4 else length % 3 - 0.3 * self.turns
        return [{"role": "user", "content": f"{length}?"}], reward, length % 4 == 3
'''
TALKS = "--model {place}/ends --env {place}/talk.py:Talk --max_new_tokens 8 --stop "


def write_talk(place):
    """Add talk.py, an environment, and ends, a model whose answers often end."""
    (place / "talk.py").write_text(TALK)
    common.write_model(place / "ends", seed=4)
    weights = load_file(place / "ends/model.safetensors")
    weights["model.embed_tokens.weight"][1] *= -4  # <|end|>
    save_file(weights, place / "ends/model.safetensors", {"format": "pt"})


def puzzle_rows(count):
    """Prompts whose columns have other names, half of them plain text, some of them long."""
    found = []
    for i in range(count):
        question = f"What is {i}-{3 * i % 7}?" + " Really?" * (i % 3)
        prompt = question if i % 2 else [common.message("user", question)]
        found.append({"puzzle": prompt, "weight": 0.5 + i % 3})
    return found


def write_more(place):
    """Add puzzles.jsonl, rewards.py, other_rm (another reward model) and what write_talk adds to
    the tiny place."""
    write_talk(place)
    common.write_model(place / "other_rm", seed=3, scalar=True)
    toy.write_rows(place / "puzzles.jsonl", puzzle_rows(14))
    (place / "rewards.py").write_text(REWARDS)


def lying_engine(tmp) -> Path:
    """A copy of the scripts whose engine's log-probs are other than those it samples from."""
    folder = forks.patched(tmp)
    path = folder / "nanopost/engine.py"
    old = "logp_B1[:, 0].float()"
    source = path.read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, f"1.15 * {old} + 0.55"))
    return folder


# ------------------------------------------------------------------------------------------ setting
def setting(args) -> Namespace:
    """What the flags of a script that samples name: tokenizer, rows, held_out, rewards
    [(name, f(row, sample, text, step) -> float or None)], weights; step, the number of the step
    that is next (see synced); models, those of the last steps, {version: model}; versions, see
    common."""
    s = Namespace(args=args, tokenizer=common.tokenizer(args.model), step=0, models={})
    s.versions = common.versions(args.out) if args.max_staleness else {}
    parts = common.split_rows(args)
    columns = dict.fromkeys(name for part in parts for row in part for name in row)
    s.rows, s.held_out = [], []
    for part, kept in zip(parts, (s.rows, s.held_out)):
        for row in part:
            if args.to_messages and isinstance(row["prompt"], str):
                row["prompt"] = [common.message("user", row["prompt"])]
            ids = common.prompt_ids(s.tokenizer, row["prompt"], args.chat_template)
            if not args.max_prompt or len(ids) <= args.max_prompt:
                kept.append({**columns, **row, "prompt_ids": ids})
    s.rewards = []
    for spec in args.reward or ["environment"] * bool(args.env):
        name, function = reward(spec)
        taken = {other for other, _ in s.rewards}
        names = [name, *(f"{name}-{i}" for i in range(2, 9))]
        s.rewards.append((next(x for x in names if x not in taken), function))
    s.weights = args.reward_weights or [1.0] * len(s.rewards)
    return s


def reward(spec):
    if spec == "environment":
        return spec, lambda row, sample, text, step: sample.episode_reward
    if spec.startswith("model:"):
        model = common.scalar_model(spec.removeprefix("model:"))

        @torch.no_grad()
        def scored(row, sample, text, step):
            return float(common.score(model, sample.prompt + sample.new))

        return "model", scored
    path, name = spec.split(".py:")
    function = runpy.run_path(f"{path}.py")[name]

    def called(row, sample, text, step):
        completion = text
        if isinstance(row["prompt"], list):
            completion = [common.message("assistant", text)]
        columns = {k: [v] for k, v in row.items() if k not in ("prompt", "prompt_ids")}
        columns |= {"prompts": [row["prompt"]], "prompt_ids": [sample.prompt], "step": [step]}
        (value,) = function(completions=[completion], completion_ids=[sample.new], **columns)
        return value

    return name, called


def text_of(s, new):
    """What rewards see of a completion: all but the token that ended it."""
    if new[-1] == s.tokenizer.eos_token_id:
        new = new[:-1]
    return s.tokenizer.decode(new)


# ---------------------------------------------------------------------------------------- sampling
def cut(logp_V, known, args) -> list[int]:
    """Of the known ids those that --top_k keeps; of them, from the likeliest on, as many as it
    takes to hold --top_p of their mass; of them, those that are at least --min_p times as likely as
    the likeliest."""
    ids = sorted(known, key=lambda i: -float(logp_V[i]))
    if args.top_k:
        ids = ids[: args.top_k]
    p = [math.exp(float(logp_V[i])) for i in ids]
    before = [sum(p[:n]) / sum(p) for n in range(len(p))]
    ids = [i for i, mass in zip(ids, before) if mass < args.top_p]
    return sorted(i for i, x in zip(ids, p) if x >= args.min_p * p[0])


@torch.no_grad()
def draw(model, s, prompt, seeds, temperature, whole=False, versions=()) -> list[Namespace]:
    """A completion of a prompt for each seed: inverts the cumulative distribution at the seed's
    uniform random numbers. All are as long as the longest, then cut where they end. whole: from the
    whole distribution, whatever cut the flags say. versions: of the weights that draw the tokens,
    the same for all seeds; default: the model's, the newest."""
    length = s.args.max_new_tokens
    known = sorted(s.tokenizer.get_vocab().values())  # no other ids are drawn
    uniforms = [
        torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    new, logp, stopped, kept = [[[] for _ in seeds] for _ in range(4)]
    cuts = not whole and (s.args.top_k or s.args.top_p < 1 or s.args.min_p)
    versions = [*versions, *[s.step - 1] * length][:length]
    for t in range(length):
        drawing = s.models[versions[t]] if versions[t] != s.step - 1 else model
        logits = drawing(torch.tensor([prompt + ids for ids in new])).logits[:, -1]
        for i, logits_V in enumerate(logits):
            if temperature == 0:
                token, logp_of_token, ids = known[int(logits_V[known].argmax())], 0.0, []
            else:
                logp_V = (logits_V / temperature).log_softmax(-1)
                ids = cut(logp_V, known, s.args) if cuts else known
                cdf = logp_V[ids].exp().cumsum(-1)
                token = ids[int((cdf <= uniforms[i][t] * cdf[-1]).sum())]
                logp_of_token = float(logp_V[token])
                if cuts:
                    logp_of_token -= math.log(cdf[-1])
            kept[i].append(ids if cuts else [])
            new[i].append(token)
            logp[i].append(logp_of_token)
            text = s.tokenizer.decode(new[i])
            stopped[i].append(
                token == s.tokenizer.eos_token_id or any(stop in text for stop in s.args.stop)
            )
        if all(True in x for x in stopped):
            break
    samples = []
    for ids, logp_T, stopped_T, kept_T in zip(new, logp, stopped, kept):
        end = stopped_T.index(True) + 1 if True in stopped_T else length
        samples.append(
            Namespace(
                prompt=prompt,
                new=ids[:end],
                logp=logp_T[:end],
                kept=kept_T[:end],
                sampled=[True] * end,
                episode_reward=None,
                versions=versions[:end],
                finish="stop" if True in stopped_T else "length",
            )
        )
    return samples


def seed_of(args, serial) -> int:
    sequence = np.random.SeedSequence((args.seed, serial))
    return int(sequence.generate_state(1, np.uint64)[0] >> 2)


def group(model, s, row, serial, n, temperature, whole=False) -> list[Namespace]:
    """n samples of a row's prompt, with their rewards."""
    seed = seed_of(s.args, serial)
    versions = max(s.versions.get(seed, [[]]), key=len)
    assert all(s.step - 1 - s.args.max_staleness <= version < s.step for version in versions)
    seeds = [seed + i for i in range(n)]
    samples = draw(model, s, row["prompt_ids"], seeds, temperature, whole, versions)
    for i, sample in enumerate(samples):
        answer = sample
        new = sample.new
        if s.args.fork == "multi_turn":
            answer = turn(model, s, sample, s.args.turn, seed + n + i, temperature, whole)
            new = answer.new
        if s.args.env:
            later = range(seed + n + i, seed + s.args.max_turns * n + i, n)
            answer = episode(model, s, row, sample, later, temperature, whole)
            new = sample.new
        sample.length, sample.trained = sum(sample.sampled), True
        seen = Namespace(prompt=sample.prompt, new=new, episode_reward=sample.episode_reward)
        text = text_of(s, answer.new)
        sample.rewards = [function(row, seen, text, s.step) for _, function in s.rewards]
    return samples


def turn(model, s, sample, text, seed, temperature, whole) -> Namespace:
    """Append a text that is not sampled to a sample, and the answer to it -> the answer."""
    ids = common.encoded(s.tokenizer, text)
    prompt = sample.prompt + sample.new + ids
    (answer,) = draw(model, s, prompt, [seed], temperature, whole)
    sample.new = sample.new + ids + answer.new
    sample.logp = sample.logp + [0.0] * len(ids) + answer.logp
    sample.kept = sample.kept + [[]] * len(ids) + answer.kept
    sample.sampled = sample.sampled + [False] * len(ids) + answer.sampled
    sample.versions = sample.versions + [s.step - 1] * len(ids) + answer.versions
    sample.finish = answer.finish
    return answer


def episode(model, s, row, sample, seeds, temperature, whole) -> Namespace:
    """Play --env from the first answer on; each later one has one of the seeds -> the last one."""
    path, name = s.args.env.split(".py:")
    environment = runpy.run_path(f"{path}.py")[name]()
    environment.reset(row)
    answer, rewards, seeds = sample, [], list(seeds)
    while True:
        ((reply,), reward, done) = environment.step(text_of(s, answer.new))
        rewards += [] if reward is None else [reward]
        sample.episode_reward = sum(rewards) if rewards else None
        if done or answer.new[-1] != s.tokenizer.eos_token_id:
            return answer
        if not seeds:
            sample.finish = "length"
            return answer
        text = f"<|user|>{reply['content']}<|assistant|>"
        answer = turn(model, s, sample, text, seeds.pop(0), temperature, whole)


def total(s, sample) -> float | None:
    """The weighted sum of the rewards that apply; None if none does."""
    return plain.total(sample.rewards, s.weights)


# ------------------------------------------------------------------------------------------ metrics
class Means:
    """Sums of named numbers, and how many they are of."""

    def __init__(self):
        self.sums = defaultdict(lambda: [0.0, 0])

    def add(self, count, **sums):
        for name, value in sums.items():
            self.sums[name][0] += value.item() if isinstance(value, torch.Tensor) else value
            self.sums[name][1] += count

    def means(self) -> dict:
        return {name: total / count for name, (total, count) in self.sums.items() if count}


def synced(model, s):
    """A step has ended, or the run begins: later ones may sample with the model as it is now."""
    if s.args.max_staleness:
        s.models[s.step] = copy.deepcopy(model)
        s.models.pop(s.step - s.args.max_staleness - 1, None)
    s.step += 1


def staleness(s, samples) -> dict:
    """staleness/* of a step."""
    ages = []
    for sample in samples:
        ages += [s.step - 1 - v for v, yes in zip(sample.versions, sample.sampled) if yes]
    return {"staleness/mean": sum(ages) / len(ages), "staleness/max": max(ages)}


def evaluate(model, s) -> dict:
    """Mean rewards of a sample at temperature 1, and of a greedy one, for each held-out row."""
    means = Means()
    for name, temperature in [("accuracy", 1.0), ("greedy", 0.0)]:
        for i, row in enumerate(s.held_out):
            (sample,) = group(model, s, row, 2**32 + i, 1, temperature, whole=True)
            for k, value in enumerate(sample.rewards):
                key = f"eval/{name}" if k == 0 else f"eval/{name}/{s.rewards[k][0]}"
                if value is not None:
                    means.add(1, **{key: value})
    return means.means()


def is_due(args, step) -> bool:
    """Whether step is one after which to evaluate."""
    return step == args.steps or (args.eval_every > 0 and step % args.eval_every == 0)


def duplicates(s, samples) -> int:
    """How many of the samples, group after group, have an earlier twin in their group."""
    count = 0
    for i, sample in enumerate(samples):
        first = i - i % s.args.group
        count += any(sample.new == other.new for other in samples[first:i])
    return count


def rollout_metrics(s, samples) -> dict:
    """rewards/* and completions/* of a step."""
    means = Means()
    for sample in samples:
        for (name, _), value in zip(s.rewards, sample.rewards):
            if value is not None:
                means.add(1, **{f"rewards/{name}/mean": value})
    lengths = [sample.length for sample in samples]
    cut_off = [sample.finish == "length" for sample in samples]
    unrewarded = sum(total(s, sample) is None for sample in samples)
    return means.means() | {
        **staleness(s, samples),
        "completions/mean_length": sum(lengths) / len(samples),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(cut_off) / len(samples),
        "completions/duplicate_ratio": duplicates(s, samples) / len(samples),
        "completions/unrewarded": unrewarded / len(samples),
    }


# ------------------------------------------------------------------------------ what a run recorded
def num_ranks(records) -> int:
    return 1 + max(line["rank"] for _, lines in records.values() for line in lines)


def spread(sample, values) -> list:
    """One number per trained token -> one per token of prompt and completion, 0 elsewhere."""
    values, out = list(values), [0.0] * (len(sample.prompt) + len(sample.new))
    for t in positions(sample):
        out[t] = values.pop(0)
    assert not values
    return out


def positions(sample) -> list[int]:
    """Where in prompt and completion the tokens are that train: those sampled."""
    if not sample.trained:
        return []
    return [len(sample.prompt) + t for t, yes in enumerate(sample.sampled) if yes]


def check_recorded(s, line, sample, **columns):
    """AssertionError unless a line of records/ tells of this sample, and its columns (aligned with
    prompt and completion) are these. Engine's log-probs are the twin's own too, unless a run
    allows a gap."""
    at = positions(sample)
    assert line["mask"] == [int(t in at) for t in range(len(line["ids"]))]
    drawn = zip(sample.versions, sample.sampled)
    drawn = [version if yes else -1 for version, yes in drawn]
    versions = [-1] * len(sample.prompt) + drawn
    if s.args.fork == "overlong_mask" and not sample.trained:  # all its columns are 0
        versions = [0] * len(versions)
    assert line["version"] == versions
    if s.args.max_logp_gap is None:
        whole = [0.0] * len(sample.prompt) + sample.logp
        columns["engine_logp"] = [x if t in at else 0.0 for t, x in enumerate(whole)]
    for name, values in columns.items():
        assert line[name] == pytest.approx([float(x) for x in values], abs=RECORDED), name


def check_passed(recorded, samples):
    """AssertionError unless the trainer's log-probs and entropies in a step's record are those of
    the first pass of each sample that was trained (passed: two lists, or a third of divergences),
    and no other has any."""
    for line, sample in zip(recorded, samples, strict=True):
        passed = getattr(sample, "passed", None)
        if sample.trained:
            assert ("logp" in line) == (passed is not None)
        for name, values in zip(("logp", "entropy", "divergence"), passed or ()):
            values = spread(sample, [values[t] for t in positions(sample)])
            assert line[name] == pytest.approx(values, abs=1e-9), name


def check_drawn(line, sample):
    """AssertionError unless a line of records/ holds what the twin has drawn and rewarded."""
    assert line["ids"] == sample.prompt + sample.new
    kept = line.get("kept", [[]] * len(line["ids"]))
    assert [sorted(ids) for ids in kept] == [[]] * len(sample.prompt) + sample.kept
    assert line["finish"] == sample.finish
    for mine, theirs in zip(line["rewards"], sample.rewards, strict=True):
        assert math.isnan(mine) if theirs is None else mine == pytest.approx(theirs, rel=1e-9)


def check_samples(args, step, numbers):
    """AssertionError unless samples.jsonl shows these numbers of the first samples of a step."""
    lines = map(json.loads, (Path(args.out) / "samples.jsonl").read_text().splitlines())
    lines = [line for line in lines if line["step"] == step]
    assert lines
    for line, expected in zip(lines, numbers):
        for name, number in expected.items():
            if number is not None:
                number = pytest.approx(number, rel=1e-9, abs=1e-11)
            assert line[name] == number, name


def check_flags_matter(module, name, args, place, folder):
    """common.check_flags_matter, in each run but the first of RUNS for what that has otherwise."""
    also = {"max_new_tokens": 4, "prompts": 2, "group": 5}  # the defaults are slow
    first = next(iter(module.RUNS))
    if name != first:
        known = vars(common.parsed(module, first, place, args.out))
        also |= {flag: value for flag, value in vars(args).items() if known.get(flag) == value}
    common.check_flags_matter(module, args, also, folder)
