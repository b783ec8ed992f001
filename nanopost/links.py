"""What replay.py compares before a step's first update: rows, masks, log-probs, values, advantages.

Each is computed from what comes before it as the run recorded it.

Shapes: T tokens of one sequence.
"""

import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch

from nanopost import hf, plain
from nanopost.engine import prompt_seed
from nanopost.retrace import Recorded, Step, hidden, logps, values

FP32, BF16 = 2.0**-24, 2.0**-9  # half the distance of two numbers around 1
Causes = Iterable[tuple[str, Callable[[], list[float]]]]


class Line(NamedTuple):
    """A row of the table."""

    what: str
    recorded: float = 0.0  # where the two differ most
    recomputed: float = 0.0
    difference: float = 0.0
    tolerance: float = 0.0
    where: str = ""
    cause: str = ""
    note: str = ""  # why it was not checked

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance


def gap(a, b) -> float:
    return math.inf if math.isnan(a) or math.isnan(b) else abs(a - b)


def compared(what, recorded, recomputed, tolerance, causes: Causes = (), where=None) -> Line:
    """Two lists of numbers, at the place where they differ most. tolerance: one number, or a list.
    where: index -> text."""
    if not recorded:
        return Line(what, note="there is nothing to compare")
    allowed = tolerance if isinstance(tolerance, list) else [tolerance] * len(recorded)
    gaps = [gap(a, b) for a, b in zip(recorded, recomputed, strict=True)]
    worst = max(range(len(gaps)), key=lambda i: gaps[i] - allowed[i])
    over = sum(x > most for x, most in zip(gaps, allowed))
    cause = ""
    for sentence, other in causes if over else ():
        found = other()
        if found and all(gap(a, b) <= 2 * c for a, b, c in zip(recorded, found, allowed)):
            cause = sentence
            break
    place = f"{over} of {len(gaps)} numbers differ"
    if where and over:
        place += f", most at {where(worst)}"
    numbers = recorded[worst], recomputed[worst], gaps[worst], allowed[worst]
    return Line(what, *map(float, numbers), place, cause)


def counted(what, wrong: list[str], of: int, causes: Causes = ()) -> Line:
    """A line of things that have to be equal. wrong: where they are not."""
    cause = ""
    for sentence, fits in causes if wrong else ():
        if fits():
            cause = sentence
            break
    where = f"{len(wrong)} of {of} differ, the first: {wrong[0]}" if wrong else ""
    return Line(what, of, of - len(wrong), len(wrong), 0.0, where, cause)


def at_token(examples) -> Callable[[int], str]:
    """index of a trained token, over all examples -> its place in words."""

    def where(i):
        for e in examples:
            if i < len(e.at):
                return f"token {e.at[i]} of example {e.index}"
            i -= len(e.at)
        return "?"

    return where


# -------------------------------------------------------------------------------------- tolerances
class Rounding(NamedTuple):
    """How far a run's numbers may be from float64's. A product of matrices in fp32 is off by
    sqrt(width) roundings, each of the 2 x layers additions to the residual stream in the run's
    dtype by one, and errors add up like random ones: relative = 4 sqrt(2 layers) (eps of the dtype
    + sqrt(width) eps of fp32). A log-prob is off by that share of the logits."""

    relative: float  # of hidden states, and so of a gradient
    logp: float  # absolute, of a log-prob
    dtype: str


def rounding(run: Recorded, step: Step) -> Rounding:
    f = step.flags
    dtype = f.dtype
    if dtype == "auto":
        cuda = run.starts[-1]["cuda"] and f.device != "cpu"
        dtype = "bf16" if cuda else "fp32"
    config = hf.read_config(f.model)
    eps = {"fp32": FP32, "bf16": BF16}[dtype]
    relative = 4 * math.sqrt(2 * config.layers) * (eps + math.sqrt(config.width) * FP32)
    return Rounding(relative, relative * _largest_logit(run, step), dtype)


@torch.no_grad()
def _largest_logit(run, step) -> float:
    """Among those of the longest example, by the newest weights at hand; at least 1."""
    newest = max((s for s in (0, *run.saved) if s < step.number), default=0)
    model, _ = run.model(newest)
    policy = getattr(model, "policy", model)
    if not hasattr(policy, "head_weight"):
        return 1.0
    e = max(step.examples, key=lambda e: len(e.ids))
    logits_TV = hidden(policy.model, e) @ policy.head_weight.T
    return max(1.0, float(logits_TV.abs().max()) / getattr(step.flags, "temperature", 1.0))


# -------------------------------------------------------------------------------------------- rows
def of_rows(run, step) -> list[Line]:
    """Are the ids and masks those of the data?"""
    if run.kind in ("grpo", "ppo", "online_dpo", "distill"):
        return _sampled_rows(run, step)
    if run.changed:
        return [Line("rows and mask", note=run.changed)]
    if run.kind in ("sft", "dpo"):
        return _stored_rows(run, step)
    return [Line("rows and mask", note=f"replay renders no rows of train_{run.kind}.py")]


def _stored_rows(run, step):
    given, ids, pairs = run.rows, [], []
    for i, e in enumerate(step.examples):
        expected_ids, mask = [], []
        if e.row < len(given):
            expected_ids, mask = run.trained(e.row) if run.kind == "sft" else given[e.row][i % 2]
        if e.ids != expected_ids:
            ids.append(f"example {e.index}, row {e.row} of --data")
        else:
            pairs.append((e, [int(x) for x in mask]))
    return [counted("rows", ids, len(step.examples)), _masks(pairs)]


def _masks(pairs) -> Line:
    """pairs: (example, the mask that it should have)."""
    wrong = []
    for e, mask in pairs:
        wrong += [
            f"token {t} of example {e.index}" for t in range(len(mask)) if e.mask[t] != mask[t]
        ]

    differ = [(e, mask) for e, mask in pairs if e.mask != mask]

    def by(change):
        return lambda: all(e.mask == change(e, mask) for e, mask in differ)

    causes = [
        ("it is shifted by one token to the right", by(lambda e, m: [0, *m[: len(m) - 1]])),
        ("it is shifted by one token to the left", by(lambda e, m: [*m[1 : len(m)], 0])),
        ("every token is trained, the prompt too", by(lambda e, m: [1] * len(m))),
        (
            "it trains what it should not, and the other way round",
            by(lambda e, m: [1 - x for x in m]),
        ),
        ("the last token of an answer, which ends it, is not trained", by(_without_last)),
    ]
    return counted("mask", wrong, sum(len(mask) for _, mask in pairs), causes)


def _without_last(e, mask):
    return [int(x and t + 1 < len(mask) and mask[t + 1]) for t, x in enumerate(mask)]


def _sampled_rows(run, step):
    """Prompts by the data, completions and masks by what the engine answered."""
    f, prompts, ids, pairs = step.flags, [], [], []
    answers = run.answers(step.number)
    for serial, group in groups_of(step).items():
        seed = prompt_seed(f.seed, serial)
        if not run.changed and not f.env:
            prompt = run.rows[run.row_of(serial)]["prompt_ids"]
            wrong = [e for e in group if e.ids[: len(prompt)] != prompt]
            prompts += [f"example {e.index} of prompt {serial}" for e in wrong]
        if group[0].finish == "row" and not run.changed:
            expected, mask = run.completed(serial)
            if group[0].ids != expected:
                ids.append(f"example {group[0].index}, the answer of the row of prompt {serial}")
            else:
                pairs.append((group[0], [int(x) for x in mask]))
        for j, e in enumerate(group):
            expected, mask = _conversation(answers, seed, j, f.group)
            if expected is None:
                continue
            if e.ids != expected:
                ids.append(f"example {e.index} of prompt {serial}")
                continue
            if run.kind == "ppo" and not plain.there(e.rewards):
                mask = [0] * len(mask)
            if run.kind == "online_dpo" and "orpo" in f.loss and e.minibatch:
                mask = [1] * len(mask)
            pairs.append((e, mask))
    lines = [counted("prompts", prompts, len(step.examples))]
    if run.changed:
        lines = [Line("prompts", note=run.changed)]
    if f.env:
        lines = [Line("prompts", note="replay starts no environment, which may add to them")]
    if not pairs and not ids:
        return [*lines, Line("mask", note="records/ has no rollouts of this step")]
    return [*lines, counted("completions", ids, len(step.examples)), _masks(pairs)]


def _conversation(answers, seed, sample, group):
    """A sample as the engine answered it turn by turn (see Environments.play) -> its ids and mask.
    None if the engine did not; [] if a turn's prompt does not begin with what came before it."""
    ids, mask = None, []
    first = answers.get(seed)
    if first and len(first["ids"]) > sample:
        ids = first["prompt"] + first["ids"][sample]
        mask = [0] * len(first["prompt"]) + _sampled(first, sample)
        seed += group
    while answer := answers.get(seed + sample):
        before = ids or []
        if answer["prompt"][: len(before)] != before:
            return [], []
        mask += [0] * (len(answer["prompt"]) - len(before)) + _sampled(answer, 0)
        ids = answer["prompt"] + answer["ids"][0]
        seed += group
    return ids, mask


def _sampled(answer, sample) -> list[int]:
    return [int(x) for x in answer["sampled"][sample]["values"]]


def groups_of(step) -> dict[int, list]:
    """{serial: the samples of its prompt}, in the order of the record."""
    found = {}
    for e in step.examples:
        found.setdefault(e.serial, []).append(e)
    return found


# ---------------------------------------------------------------------------------------- log-probs
def temperature_of(run, f) -> float:
    """That of the trainer's log-probs. Online DPO samples with its own."""
    return f.temperature if run.kind in ("grpo", "ppo", "distill") else 1.0


def column(examples, name) -> list[float]:
    """Of all trained tokens."""
    return [getattr(e, name)[t] for e in examples for t in e.at]


def under(model, examples, temperature, kept=True) -> list[float]:
    return [x for e in examples for x in logps(model, e, temperature, kept)]


def of_sampling(run, step, allowed) -> list[Line]:
    """engine_logp, old_logp, policy_logp and ref_logp."""
    f, n = step.flags, step.number
    examples = [e for e in step.examples if e.at]
    lines = [_by_engine(run, step, examples, allowed)]
    if run.kind in ("online_dpo", "distill"):
        return lines
    if f.old_logp == "engine":
        given = column(examples, "engine_logp")
        same = "it is the trainer's", lambda: under(run.model(n - 1)[0], examples, f.temperature)
        causes = [same] if run.has_weights(n - 1) else []
        lines.append(compared("old log-probs", column(examples, "old_logp"), given, 0.0, causes))
    for name, what in [("old_logp", "old log-probs"), ("policy_logp", "policy's log-probs")]:
        is_trainers = name == "policy_logp" or f.old_logp == "trainer"
        if is_trainers and hasattr(step.examples[0], name):
            lines.append(_by_trainer(run, step, examples, allowed, name, what))
    if f.beta:
        lines.append(_by_reference(run, step, examples, allowed))
    return lines


def other_weights(run, step, examples, kept=True) -> Causes:
    """Whose log-probs they may be instead."""
    f, n = step.flags, step.number
    t = getattr(f, "temperature", 1.0)
    for other in (n - 2, n - 3, n - 1, n):
        if other >= 0 and run.has_weights(other):
            said = f"they are those of the weights after step {other}: stale"
            if other == n - 1:
                said = "they are those of the policy itself"
            if other == n:
                said = "they are those of the weights after this step"
            yield said, lambda s=other: under(run.model(s)[0], examples, t, kept)
    newest = max(s for s in (0, *run.saved) if s < n)
    model, _ = run.model(newest)
    if t != 1.0:
        yield "the temperature was forgotten", lambda: under(model, examples, 1.0, kept)
    if any(e.kept for e in examples):
        yield (
            "they are not renormalised over what the cut kept",
            lambda: under(model, examples, t, False),
        )


def _by_engine(run, step, examples, allowed):
    f, what = step.flags, "sampled log-probs"
    if f.vllm or f.engine != "native":
        note = "vLLM has its own precision (see sampling/sampling_logp_difference)"
        return Line(what, note=note)
    if run.kind == "online_dpo":
        if f.top_k or f.top_p < 1 or f.min_p:
            return Line(what, note="train_online_dpo.py does not record what a cut kept")
    if run.kind in ("online_dpo", "distill"):
        examples = [_as_sampled(e) for e in examples]
    versions = sorted({e.version[t] for e in examples for t in e.at})
    missing = [v for v in versions if not run.has_weights(v)]
    if missing:
        return Line(what, note=f"no checkpoint of step {missing[0]}")
    found = {v: [logps(run.model(v)[0], e, f.temperature) for e in examples] for v in versions}
    expected = []
    for i, e in enumerate(examples):
        expected += [found[e.version[t]][i][j] for j, t in enumerate(e.at)]
    given = column(examples, "engine_logp")
    causes = other_weights(run, step, examples)
    return compared(what, given, expected, allowed.logp, causes, at_token(examples))


def _as_sampled(e):
    """ORPO trains the prompt too, and distillation answers of rows."""
    return Namespace(**{**vars(e), "at": [t for t in e.at if e.version[t] >= 0]})


def _by_trainer(run, step, examples, allowed, name, what):
    n, f = step.number, step.flags
    if not run.has_weights(n - 1):
        return Line(what, note=f"no checkpoint of step {n - 1}")
    expected = under(run.model(n - 1)[0], examples, f.temperature)
    engine = column(examples, "engine_logp")
    causes = [("they are the engine's", lambda: engine), *other_weights(run, step, examples)]
    given = column(examples, name)
    return compared(what, given, expected, allowed.logp, causes, at_token(examples))


def _by_reference(run, step, examples, allowed):
    f, n = step.flags, step.number
    expected = under(run.reference, examples, f.temperature)
    causes = []
    if run.has_weights(n - 1):
        policy = partial(under, run.model(n - 1)[0], examples, f.temperature)
        causes.append(("the reference is the policy itself, so every KL is 0", policy))
    if f.temperature != 1.0:
        forgotten = partial(under, run.reference, examples, 1.0)
        causes.append(("the temperature was forgotten", forgotten))
    given = column(examples, "ref_logp")
    what = "reference's log-probs"
    return compared(what, given, expected, allowed.logp, causes, at_token(examples))


def of_pair_references(run, step, allowed) -> list[Line]:
    """ref_logp of pairs: summed over the answer."""
    examples = [e for e in step.examples if e.minibatch]
    if run.kind != "kto" and not set(step.flags.loss) - plain.WITHOUT_REFERENCE:
        return []

    def summed(model):
        found = []
        for e in examples:
            found.append(sum(e.weight[t] * x for t, x in zip(e.at, logps(model, e, 1.0))))
        return found

    causes = []
    if run.has_weights(step.number - 1):
        policy = partial(summed, run.model(step.number - 1)[0])
        causes.append(("the reference is the policy itself, so every margin is 0", policy))
    expected = summed(run.reference)
    if run.kind == "dpo":  # the two of a pair are neighbours
        swapped = [expected[i ^ 1] for i in range(len(expected))]
        causes.append(("those of chosen and rejected are swapped", lambda: swapped))
    most = [allowed.logp * math.sqrt(max(1, len(e.at))) for e in examples]
    given = [e.ref_logp for e in examples]
    return [compared("reference's log-probs", given, expected, most, causes, "number {}".format)]


def of_values(run, step, allowed) -> list[Line]:
    """PPO's values before the step."""
    n, examples = step.number, [e for e in step.examples if e.at]
    if not run.has_weights(n - 1):
        return [Line("values", note=f"no checkpoint of step {n - 1}")]

    @torch.no_grad()
    def of(model, shift=0):
        found = []
        for e in examples:
            value_T = values(model, e)
            found += [float(value_T[max(0, t - shift)]) for t in e.at]
        return found

    model, _ = run.model(n - 1)
    expected, given = of(model), column(examples, "value")
    causes = [
        ("each is the value of the state before the one it should be of", lambda: of(model, 1)),
    ]
    if n > 1 and run.has_weights(n - 2):
        stale = partial(of, run.model(n - 2)[0])
        causes.append((f"they are those of the weights after step {n - 2}: stale", stale))
    most = (
        allowed.relative
        * max(1.0, *map(abs, expected))
        * math.sqrt(len(model.policy.model.norm.weight))
    )
    return [compared("values", given, expected, most, causes, at_token(examples))]


# --------------------------------------------------------------------------------------- advantages
def weights_of(f) -> list[float]:
    return f.reward_weights or [1.0] * len(f.reward)


def of_group_advantages(step) -> list[Line]:
    """GRPO's, from the recorded rewards."""
    f, groups = step.flags, list(groups_of(step).values())
    if hasattr(f, "teacher"):
        return [Line("advantages", note="replay has no formula for those of forks/distill.diff")]
    if hasattr(f, "length_penalty"):
        return [Line("advantages", note="replay has no formula for forks/length_penalty.diff")]
    if f.adv not in ("group", "mean", "loo", "batch"):
        return [Line("advantages", note=f"replay has no formula for --adv {f.adv}")]
    totals = [[plain.total(e.rewards, weights_of(f)) for e in group] for group in groups]
    order = [e for group in groups for e in group if e.at]

    def spread(each):
        flat = {}
        for group, found in zip(groups, each):
            flat |= {e.index: x for e, x in zip(group, found)}
        return [flat[e.index] for e in order for _ in e.at]

    def by(kind, given=totals, factor=1.0):
        return lambda: spread([[factor * x for x in g] for g in plain.advantages(kind, given)])

    last = len(totals) - 1
    causes = [("its sign is turned", by(f.adv, factor=-1.0))]
    said = {
        "mean": "it is not divided by the standard deviation",
        "group": "it is divided by the standard deviation of the group",
        "batch": "it is divided by the standard deviation of the whole batch",
        "loo": "its baseline is the mean of the other samples alone",
    }
    causes += [(text, by(kind)) for kind, text in said.items() if kind != f.adv]
    if last:
        after, before = totals[1:] + totals[:1], [totals[last], *totals[:last]]
        causes.append(("it is that of another group's rewards (the next one's)", by(f.adv, after)))
        causes.append(
            ("it is that of another group's rewards (the one's before)", by(f.adv, before))
        )
    moved = [[*g[1 : len(g)], g[0]] for g in totals]
    back = [[g[len(g) - 1], *g[: len(g) - 1]] for g in totals]
    for other in (moved, back):
        causes.append(("it is that of another sample of the same group", by(f.adv, other)))
    plainly = [[x or 0.0 for x in g] for g in totals]
    causes.append(("it is the reward itself, without a baseline", lambda: spread(plainly)))
    expected, given = by(f.adv)(), column(order, "adv")
    most = 4 * FP32 * max(1.0, *map(abs, expected)) if expected else 0.0
    return [compared("advantages", given, expected, most, causes, at_token(order))]


def of_gae(run, step) -> list[Line]:
    """PPO's, from recorded rewards, values and log-probs."""
    f, examples = step.flags, step.examples
    scale = 1.0
    if f.score_scale:
        before = _score_sums(run, step.number - 1)
        if before is None:
            note = f"--score_scale needs the checkpoint of step {step.number - 1}"
            return [Line("advantages", note=note)]
        scale = _scale(f, before, examples)
    order = [e for e in examples if e.at]

    def made(gamma=f.gamma, lam=f.lam, beta=f.beta, rolled=0, first=False, penalty=f.eos_penalty,
             bootstrapped=True, whitened=True, sign=1.0):  # fmt: skip
        totals = [plain.total(e.rewards, weights_of(f)) for e in examples]
        totals = totals[rolled:] + totals[:rolled]
        rewards, value = {}, {}
        for e, total in zip(examples, totals):
            if not e.at or total is None:
                continue
            each = [0.0] * len(e.at)
            if beta:
                each = [
                    -beta * plain.kl_estimate(f.kl, e.policy_logp[t], e.ref_logp[t]) for t in e.at
                ]
            each[0 if first else len(each) - 1] += (
                total - penalty * (e.finish == "length")
            ) / scale
            rewards[e.index], value[e.index] = each, [e.value[t] for t in e.at]
        if f.whiten_rewards:
            mean, width = plain.mean_and_std(rewards.values())
            for i, each in rewards.items():
                rewards[i] = [(r - mean) / (width + 1e-8) + mean for r in each]
        adv = {}
        for i, each in rewards.items():
            if bootstrapped:
                adv[i] = plain.gae(each, value[i], gamma, lam)
            else:  # as if each state were the last one
                deltas = [r - v for r, v in zip(each, value[i])]
                adv[i] = plain.returns(deltas, gamma * lam)
        ret = {i: [a + v for a, v in zip(adv[i], value[i])] for i in adv}
        mean, width = plain.mean_and_std(adv.values())
        if whitened:
            adv = {i: [sign * (a - mean) / (width + 1e-8) for a in x] for i, x in adv.items()}
        flat = [
            [x for e in order for x in found.get(e.index, [0.0] * len(e.at))]
            for found in (adv, ret)
        ]
        return flat[0] + flat[1]

    causes = [
        ("lambda of GAE is ignored (as if --lam 1)", lambda: made(lam=1.0)),
        ("lambda of GAE is ignored (as if --lam 0)", lambda: made(lam=0.0)),
        (
            "the value of the next state is left out (not bootstrapped)",
            lambda: made(bootstrapped=False),
        ),
        ("the discount is ignored (as if --gamma 1)", lambda: made(gamma=1.0)),
        ("its sign is turned", lambda: made(sign=-1.0)),
        ("it is not whitened", lambda: made(whitened=False)),
        ("it is that of another group's rewards (the next one's)", lambda: made(rolled=f.group)),
        ("it is that of another group's rewards (the one's before)", lambda: made(rolled=-f.group)),
        ("the score is at the first token and not at the last", lambda: made(first=True)),
        ("the penalty for answers that do not end is left out", lambda: made(penalty=0.0)),
    ]
    if f.beta:
        causes.append(("the KL is left out of the reward", lambda: made(beta=0.0)))
        causes.append(("the KL in the reward has the wrong sign", lambda: made(beta=-f.beta)))
    expected, given = made(), column(order, "adv") + column(order, "ret")
    most = 4 * FP32 * max(1.0, *map(abs, expected)) if expected else 0.0
    where = at_token(order + order)
    return [compared("advantages, returns", given, expected, most, causes, where)]


def _score_sums(run, step):
    if step == 0:
        return 0, 0.0, 0.0
    if step not in run.saved:
        return None
    state = json.loads((run.saved[step] / "state.json").read_text(encoding="utf-8"))
    return state["score_sums"]


def _scale(f, before, examples) -> float:
    scores = []
    for e in examples:
        total = plain.total(e.rewards, weights_of(f))
        if total is not None:
            scores.append(total - f.eos_penalty * (e.finish == "length"))
    count, total, squares = before
    count, total = count + len(scores), total + sum(scores)
    squares += sum(x * x for x in scores)
    if not count:
        return 1.0
    mean = total / count
    width = max(0.0, squares / count - mean * mean) ** 0.5
    return width if width > 1e-6 * (1 + abs(mean)) else 1.0
