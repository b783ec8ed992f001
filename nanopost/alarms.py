"""Alarms: illnesses of a run, seen in its metrics, each in one sentence.

An alarm is a pure function of the metrics so far: Metrics -> (since which step, sentence) or None,
where the step is that at which the illness began, or the first of the steps that show it (BEGUN).
Numbers are means over WINDOW steps, so that noise is no alarm, and "the reward stands" means that
it has not risen by more than that noise. What gets better while the reward rises is no illness: as
a task is solved, rewards, entropy and answers of a group become alike. Each look costs O(WINDOW),
however long the run.
"""

import math
from array import array
from bisect import bisect_right
from statistics import fmean, median

WINDOW = 10  # steps: a mean of as many is steady at 64 prompts a step
BACK = 50  # steps, to see what creeps by a percent each
REST = 20  # steps without an illness, after which it counts as a new one
SURE = 2.0  # standard errors by which two windows differ: one in twenty by chance
STILL = 0.05  # a reward that rises by this share of itself still stands
HUGE = 1e100  # a number beyond it counts as that, so that its square is finite
GAIN = 0.25  # of the spread of rewards in a group: the run has learnt something


class Metrics:
    """The metrics so far, a column each: what metrics.jsonl holds, read by name."""

    def __init__(self):
        self.step = -1
        self.columns = {}  # name -> (steps, finite values)
        self.extremes = {}  # name -> (lowest, highest) of all its finite values
        self.broken = {}  # name -> value that is not finite, of the last line

    def add(self, line: dict):
        """The next line of metrics.jsonl."""
        self.step, self.broken = line["step"], {}
        for name, value in line.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if isinstance(value, float) and not math.isfinite(value):
                self.broken[name] = value
                continue
            value = float(max(-HUGE, min(HUGE, value)))  # an int may be too large for a float
            steps, values = self.columns.setdefault(name, (array("q"), array("d")))
            steps.append(self.step)
            values.append(value)
            low, high = self.extremes.get(name, (value, value))
            self.extremes[name] = min(low, value), max(high, value)

    def count(self, name: str) -> int:
        return len(self._column(name)[0])

    def first(self, name: str, n: int = WINDOW) -> list[float]:
        return list(self._column(name)[1][:n])

    def last(self, name: str, n: int = WINDOW, skip: int = 0) -> list[float]:
        """n values, before the last `skip`; fewer where there are no more."""
        _, values = self._column(name)
        end = max(0, len(values) - skip)
        return list(values[max(0, end - n) : end])

    def since(self, name: str, n: int = WINDOW) -> int:
        """The step of the first of the last n values; that of the last line without any."""
        steps, _ = self._column(name)
        return steps[max(0, len(steps) - n)] if steps else self.step

    def until(self, name: str, step: int, n: int = WINDOW) -> list[float]:
        """The last n values that are not later than a step."""
        steps, values = self._column(name)
        end = bisect_right(steps, step)
        return list(values[max(0, end - n) : end])

    def _column(self, name):
        return self.columns.get(name, ((), ()))

    def named(self, *names: str) -> str | None:
        """The first of the names that there are."""
        return next((name for name in names if name in self.columns), None)


# ------------------------------------------------------------------------------------------ notions
def error(values: list[float]) -> float:
    """The standard error of their mean."""
    n, mean = len(values), fmean(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / max(1, n - 1) / n)


def differ(then: list[float], now: list[float]) -> float:
    """By how much `now` is above `then` beyond noise: 0 within SURE standard errors."""
    change = fmean(now) - fmean(then)
    return change if abs(change) > SURE * math.hypot(error(then), error(now)) else 0.0


def reward_name(m: Metrics) -> str | None:
    return m.named("reward", "objective/scores")


def stands(m: Metrics, then: list[float], now: list[float]) -> bool:
    """Whether the reward has not risen, but for noise and STILL."""
    return differ(then, now) <= STILL * abs(fmean(then))


def distils(m: Metrics) -> bool:
    """Whether a student learns from a teacher: its divergence tells, and no reward."""
    return m.named("divergence") is not None


def learnt(m: Metrics) -> bool:
    """Whether the reward is higher than in the first steps, by GAIN of the spread in a group, or of
    itself where no spread is logged; or a student's divergence lower, by GAIN of itself."""
    name = reward_name(m)
    if distils(m):
        first = m.first("divergence")
        return differ(first, m.last("divergence")) < -GAIN * fmean(first)
    if not name:
        return False
    first = m.first(name)
    spread = fmean(m.first("reward_std")) if m.named("reward_std") else abs(fmean(first))
    return differ(first, m.last(name)) > GAIN * spread


def number(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def said(name: str, now: float, then: float) -> str:
    return f"{name} is {number(now)}, and was {number(then)}"


def since_first(m: Metrics, name: str) -> str:
    """A metric's mean now, beside that of the first steps if these are others."""
    now = fmean(m.last(name))
    if m.count(name) <= WINDOW:
        return f"{name} is {number(now)}"
    return f"{said(name, now, fmean(m.first(name)))} at first"


# ------------------------------------------------------------------------------------------- alarms
STD_LEFT = 0.1  # a tenth of the spread: advantages come from rounding and rare answers


def reward_std_collapsed(m):
    if m.count("reward_std") < 2 * WINDOW or learnt(m):
        return None
    then, now = fmean(m.first("reward_std")), fmean(m.last("reward_std"))
    if now >= STD_LEFT * then:
        return None
    return m.since("reward_std"), (
        f"{said('reward_std', now, then)} at first, but the reward has not risen: the answers to a "
        "prompt have become alike; try a lower --lr, a higher --temperature, or --beta above 0"
    )


LONGER = 1.25  # times the length, over at most BACK steps
LENGTH = "completions/mean_length"


def length_creeping(m):
    reward = reward_name(m)
    if not reward or m.count(LENGTH) < 3 * WINDOW or m.count(reward) < 3 * WINDOW:
        return None
    back = min(BACK, m.count(LENGTH) - WINDOW)
    then, middle, now = (fmean(m.last(LENGTH, skip=skip)) for skip in (back, back // 2, 0))
    if not now >= LONGER * then or not then < middle < now:
        return None
    reward_then, reward_now = m.last(reward, skip=back), m.last(reward)
    if not stands(m, reward_then, reward_now):
        return None
    return m.since(LENGTH, back), (
        f"{said(LENGTH, now, then)}, but the reward stands ({number(fmean(reward_now))}, was "
        f"{number(fmean(reward_then))}): length is rewarded for itself, by the reward or by how "
        "losses are averaged; try --agg token or constant, --adv mean, or the reward "
        "length:MAX:BUFFER"
    )


# Nats per token to the reference: at 0.5 the policy gives a typical token e^0.5 = 1.6 times the
# probability. Estimated over one update: PPO's authors aim at 0.01.
KL_HIGH = {"kl": 0.5, "objective/kl": 0.5, "policy/approxkl_avg": 0.1}
KL_GROWS = (
    3.0  # times, within WINDOW steps: in a healthy run it grows as fast only while it is small
)
KL_STEPS = 5


def kl_per_token(name: str, values: list[float], lengths: list[float]) -> list[float]:
    """Step by step, as the answers may be shorter now than they were."""
    if name != "objective/kl":  # which is of whole answers
        return values
    return [kl / max(1.0, length) for kl, length in zip(values, lengths)]


def kl_exploding(m):
    for name, high in KL_HIGH.items():
        now = kl_per_token(name, m.last(name, KL_STEPS), m.last(LENGTH, KL_STEPS))
        before = kl_per_token(name, *(m.last(x, KL_STEPS, skip=WINDOW) for x in (name, LENGTH)))
        before = before or kl_per_token(name, m.first(name, 1), m.first(LENGTH, 1))
        if len(now) < KL_STEPS:
            continue
        now, then = median(now), median(before)
        if now >= high and (now >= KL_GROWS * then or now >= 10 * high):
            return m.since(name, KL_STEPS), (
                f"{said(name + ' per token', now, then)} {WINDOW} steps before: the policy runs "
                "away from where it began, and its rewards are no longer to be trusted; try a "
                "lower --lr, a higher --beta, or --grad_clip"
            )
    return None


SUNK = 0.5  # in rewards, the units of the loss's sigmoid
TOGETHER = 0.5  # of what the rejected lose, lost by the chosen: most of the loss's pull is wasted


def chosen_and_rejected_sinking(m):
    chosen, rejected = "rewards/chosen", "rewards/rejected"
    if min(m.count(chosen), m.count(rejected)) < 2 * WINDOW:
        return None
    sunk = -differ(m.first(chosen), m.last(chosen))
    sunk_too = -differ(m.first(rejected), m.last(rejected))
    if not (sunk > SUNK and sunk_too > 0 and sunk >= TOGETHER * sunk_too):
        return None
    return m.since(chosen), (
        f"{said(chosen, fmean(m.last(chosen)), fmean(m.first(chosen)))} at first, and "
        f"{said(rejected, fmean(m.last(rejected)), fmean(m.first(rejected)))}: both become "
        "unlikely, and what becomes likely is neither; try a lower --lr, a higher --beta, or "
        "--loss sigmoid sft"
    )


EQUAL = 0.8  # of the groups teach nothing


def varied_groups_collapsed(m):
    name = m.named("frac_reward_zero_std", "ties")
    if not name or m.count(name) < WINDOW or learnt(m) or reward_constant(m):
        return None
    if fmean(m.last(name)) < EQUAL:
        return None
    return m.since(name), (
        f"{since_first(m, name)}: so many groups have equal rewards and teach nothing, "
        "as prompts are too hard or too easy, or answers alike; try other --data, a larger "
        "--group, --resample, or a higher --temperature"
    )


CUT, CUT_MORE, CUT_MOST = 0.2, 0.15, 0.5  # of the answers; by how much more; from the start
CUT_OFF = "completions/clipped_ratio"


def truncated_rising(m):
    if m.count(CUT_OFF) < WINDOW:
        return None
    now, then = fmean(m.last(CUT_OFF)), fmean(m.first(CUT_OFF))
    rising = m.count(CUT_OFF) >= 2 * WINDOW and now >= CUT and now >= then + CUT_MORE
    if not rising and (now < CUT_MOST or distils(m)):  # a teacher judges fragments too
        return None
    harm = "end, so rewards judge fragments"
    reward = "a reward length:MAX:BUFFER, "
    if distils(m):
        harm, reward = "end, as a student does that repeats itself", ""
    return m.since(CUT_OFF), (
        f"{since_first(m, CUT_OFF)}: answers reach the limit of their length before they {harm}; "
        f"try a larger --max_new_tokens, {reward}or warm up with train_sft.py on answers that end"
    )


ENTROPY_LEFT = 0.1  # a tenth of the entropy: hardly a token is still a choice


def entropy_collapsed(m):
    name = m.named("policy/entropy_avg", "entropy")
    if not name or m.count(name) < 2 * WINDOW or learnt(m):
        return None
    now, then = fmean(m.last(name)), fmean(m.first(name))
    if now >= ENTROPY_LEFT * then:
        return None
    if distils(m):
        return m.since(name), (
            f"{said(name, now, then)} at first, but the divergence has not fallen: the student has "
            "settled on answers that are not its teacher's; try a lower --lr, --beta below 1, or "
            "--on_policy below 1"
        )
    if not reward_name(m):
        return None
    return m.since(name), (
        f"{said(name, now, then)} at first, but the reward has not risen: the policy has settled "
        "on answers before it found good ones; try a lower --lr, --clip 0.2 0.28, --beta above 0, "
        "or forks/entropy_bonus.diff"
    )


CLIPPED, CLIPPED_MOST = 0.4, 0.6  # of the tokens have no gradient: if that rose; in any case


def clip_fraction_rising(m):
    name = m.named("clip_ratio/region_mean", "policy/clipfrac_avg", "cispo_clip_ratio")
    if not name or m.count(name) < WINDOW:
        return None
    now, then = fmean(m.last(name)), fmean(m.first(name))
    if not (now >= CLIPPED and now >= 2 * then) and now < CLIPPED_MOST:
        return None
    return m.since(name), (
        f"{since_first(m, name)}: each step moves the policy so far that the clip cuts "
        "most of the gradient off; try a lower --lr, fewer --minibatches, or a wider --clip"
    )


GAP = "sampling/sampling_logp_difference/mean"
GAP_HIGH, GAP_GROWS = 0.01, 3.0  # nats a token: a percent of its probability; times


def mismatch_rising(m):
    """Where rollouts run ahead, trainer and engine are different policies, and should differ."""
    if m.count(GAP) < 2 * WINDOW or max(m.last("staleness/max"), default=0) > 0:
        return None
    now, then = fmean(m.last(GAP)), fmean(m.first(GAP))
    if now < GAP_HIGH or now < GAP_GROWS * then:
        return None
    return m.since(GAP), (
        f"{said(GAP, now, then)} at first: the engine samples from ever another policy than the "
        "one that trains, as its precision is too low or its weights are stale; try --old_logp "
        "trainer --correct token-truncate, or python -m nanopost.audit"
    )


LOSS_GROWS = 3.0  # times the loss before training
LOSS_STEPS = 5


def loss_exploding(m):
    """Of losses that begin above 0: those of RL are about 0 and say nothing."""
    if reward_name(m) or m.count("loss") < LOSS_STEPS:
        return None
    then = max(m.first("loss", 1) + m.first("eval/loss", 1) + m.first("eval/divergence", 1))
    now = m.last("loss", LOSS_STEPS)
    if not (then > 0 and min(now) > then and median(now) >= LOSS_GROWS * then):
        return None
    return m.since("loss", LOSS_STEPS), (
        f"{said('loss', median(now), then)} at first: training diverges; try "
        "a much lower --lr, a longer --warmup, or a lower --grad_clip"
    )


SPIKE, SPIKES = 10.0, 3  # times the median before; of the last WINDOW steps


def gradient_spikes(m):
    name = "grad_norm"
    if m.count(name) < 3 * WINDOW:
        return None
    usual = median(m.last(name, 2 * WINDOW, skip=WINDOW))
    usual = max(usual, median(m.first(name, 3 * WINDOW)) / 10)  # steps with hardly a gradient
    values = m.last(name)
    high = [x for x in values if x > SPIKE * usual]
    if usual <= 0 or len(high) < SPIKES:
        return None
    return m.since(name, WINDOW - values.index(high[0])), (
        f"{name} was up to {number(max(high))}, and {SPIKE:.0f} times the usual {number(usual)} in "
        f"{len(high)} of {WINDOW} steps: the run is becoming unstable; try a lower --lr, a longer "
        "--warmup, a lower --grad_clip, or look for odd rows in --data"
    )


WORSE = -0.2  # of the variance, over 2 WINDOW: a value model that learns is at 0 in a few steps


def value_explains_nothing(m):
    name = "val/explained_variance"
    if m.count(name) < 3 * WINDOW:
        return None
    now = median(m.last(name, 2 * WINDOW))
    if not now < WORSE:
        return None
    return m.since(name, 2 * WINDOW), (
        f"{name} is {number(now)}, and at 0 it would explain as much as a constant: advantages are "
        "mostly its errors; try another --value_lr, --value_warmup, or a --value_model that a "
        "reward model has begun"
    )


SAME, SAME_MORE = 0.45, 0.25  # of the answers: half of them is all there can be in a group of two


def duplicates_rising(m):
    name = "completions/duplicate_ratio"
    if m.count(name) < 2 * WINDOW or learnt(m):
        return None
    now, then = fmean(m.last(name)), fmean(m.first(name))
    if now < SAME or now < then + SAME_MORE:
        return None
    return m.since(name), (
        f"{said(name, now, then)} at first, but the reward has not risen: so many answers repeat "
        "another of their group, and compare nothing; try a lower --lr, a higher --temperature, or "
        "--beta above 0"
    )


def reward_constant(m):
    """Constant from the start, or at less than it was: a solved task, too, is constant, at the most
    that it has ever been. Without a spread that is 0 as well, a few equal means are chance."""
    name = reward_name(m)
    steps = WINDOW // 2 if m.named("reward_std") else WINDOW
    if not name or m.count(name) < steps:
        return None
    now, before = m.last(name, steps), m.last(name, BACK, skip=steps)
    spread = m.last("reward_std", steps)
    if max(now) - min(now) > 1e-9 or max(spread, default=0.0) > 1e-9:
        return None
    lowest, highest = m.extremes[name]
    if lowest < now[0] - 1e-9 and (highest <= now[0] + 1e-9 or learnt(m)):
        return None
    was = f", and was {number(fmean(before))}" if before and max(before) > now[0] + 1e-9 else ""
    return m.since(name, steps), (
        f"{name} is {number(now[0])} in each of {steps} steps{was}: a reward that is the same for "
        "all answers teaches nothing; look at samples.jsonl, then check --reward and --data, or "
        "raise --max_new_tokens"
    )


UNREWARDED = 0.5  # of the answers


def unrewarded(m):
    name = "completions/unrewarded"
    if m.count(name) < WINDOW or fmean(m.last(name)) < UNREWARDED:
        return None
    return m.since(name), (
        f"{since_first(m, name)}: no reward applies to so many answers, so they teach "
        "nothing; check what --reward returns None for, and --data"
    )


def not_finite(m):
    """Of any metric: none is NaN by meaning, since a mean of nothing is not logged."""
    if not m.broken:
        return None
    name, *others = m.broken
    too = f" (and {len(others)} more)" if others else ""
    return m.step, (
        f"{name} is {m.broken[name]}{too}: what it is computed from has overflowed, or a reward is "
        "no number; check --reward, or try a lower --lr and --dtype fp32"
    )


HELD_OUT = [
    ("reward", "eval/accuracy", 1),
    ("objective/scores", "eval/accuracy", 1),
    ("accuracy", "eval/accuracy", 1),
    ("rewards/accuracies", "eval/rewards/accuracies", 1),
    ("loss", "eval/loss", -1),
    ("divergence", "eval/divergence", -1),
]
FALL, FALL_SHARE = 0.08, 0.05  # of an accuracy, two standard errors of 100 rows; of a loss


def held_out_falling(m):
    """Three evaluations, each worse than the one before, while training gets better."""
    for name, held_out, sign in HELD_OUT:
        if m.count(held_out) < 3 or not m.count(name):
            continue
        one, two, three = m.last(held_out, 3)
        fall = FALL if sign > 0 else FALL_SHARE * abs(one)
        if not (sign * one > sign * two > sign * three and abs(three - one) >= fall):
            continue
        since = m.since(held_out, 3)
        then, now = m.until(name, since + WINDOW), m.last(name)
        if sign * differ(then, now) > 0:
            return since, (
                f"{said(held_out, three, one)}, while {said(name, fmean(now), fmean(then))}: the "
                "run learns its rows by heart, or what one of its rewards likes; try fewer steps "
                "or epochs, more --data, a lower --lr, --beta above 0, or other --reward_weights"
            )
    return None


APART, SHRINKS = 0.2, 0.8  # of the rewards, in 3 evaluations; to this share of the gap at first


def greedy_far_from_sampled(m):
    """At the start that is what RL begins with, as greedy answers know what samples have to learn:
    an illness only if it stays so."""
    greedy, sampled = "eval/greedy", "eval/accuracy"
    if min(m.count(greedy), m.count(sampled)) < 4 or distils(m):  # the gap may be the teacher's
        return None
    gaps = [abs(x - y) for x, y in zip(m.last(greedy, 3), m.last(sampled, 3))]
    first = abs(m.first(greedy, 1)[0] - m.first(sampled, 1)[0])
    if min(gaps) < APART or gaps[-1] < SHRINKS * first:
        return None
    return m.since(greedy, 3), (
        f"{greedy} is {number(m.last(greedy, 1)[0])}, but {sampled} is "
        f"{number(m.last(sampled, 1)[0])}, and the gap does not close: training does not reach the "
        "distribution that is sampled; try a higher --lr, --temperature 1, or no --top_p, --top_k "
        "and --min_p"
    )


ALARMS = {
    alarm.__name__: alarm
    for alarm in (
        reward_std_collapsed,
        length_creeping,
        kl_exploding,
        chosen_and_rejected_sinking,
        varied_groups_collapsed,
        truncated_rising,
        entropy_collapsed,
        clip_fraction_rising,
        mismatch_rising,
        loss_exploding,
        gradient_spikes,
        value_explains_nothing,
        duplicates_rising,
        reward_constant,
        unrewarded,
        not_finite,
        held_out_falling,
        greedy_far_from_sampled,
    )
}


# Whose first step is that of the illness: that of the others is where the window begins.
BEGUN = {
    "gradient_spikes",
    "reward_constant",
    "not_finite",
    "held_out_falling",
    "greedy_far_from_sampled",
}


class Alarms:
    """The alarms of a run, each once per illness: again after REST steps without it."""

    def __init__(self):
        self.metrics = Metrics()
        self.seen = {}  # alarm -> the last step that has it

    def add(self, line: dict) -> list[dict]:
        """The next line of metrics.jsonl -> the alarms that begin with it, as in alarms.jsonl."""
        self.metrics.add(line)
        step, begun = line["step"], []
        for name, alarm in ALARMS.items():
            found = alarm(self.metrics)
            if not found:
                continue
            since, message = found
            if step - self.seen.get(name, -math.inf) > REST:
                steps = step - since + 1
                when = f"since step {since}" if name in BEGUN else f"over the last {steps} steps"
                text = f"{when}, {message}."
                begun.append({"step": step, "alarm": name, "since": since, "message": text})
            self.seen[name] = step
        return begun


def of(lines: list[dict]) -> list[dict]:
    """The alarms of a whole metrics.jsonl."""
    alarms = Alarms()
    return [alarm for line in lines for alarm in alarms.add(line)]
