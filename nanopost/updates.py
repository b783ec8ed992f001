"""What replay.py compares from the first update of a step on: passes, losses, gradients, weights.

Each is computed from what comes before it as the run recorded it; weights between two optimizer
steps, which no run records, are those of the optimizer steps so far.

Shapes: T tokens of one sequence.
"""

import math
from argparse import Namespace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from nanopost import plain
from nanopost.links import (
    FP32,
    Line,
    at_token,
    column,
    compared,
    counted,
    gap,
    groups_of,
    other_weights,
    temperature_of,
    under,
)
from nanopost.retrace import divergences, leaking, passed, value_rate, values

MARGIN = 8  # an allowance over the difference of two replays, of which one is disturbed
CLEAR = 0.01  # a weight is compared if two replays are closer, as a share of its move
IN_ORDER = "grpo", "distill"  # minibatches by serial, each with a learning rate of its own


# ------------------------------------------------------------------------------- optimizer steps
class Part(NamedTuple):
    """An optimizer step: what it trains, in units whose losses add up; what its divisor counts; the
    divisor."""

    units: list[tuple]
    counts: dict[str, float]
    divisor: float
    recorded_divisor: float


def optimizer_steps(run, step) -> list[Part]:
    f, about = step.flags, step.about
    if run.kind in ("grpo", "ppo", "distill"):
        return _minibatches(run, step)
    examples = [e for e in step.examples if e.minibatch]
    units = [(e,) for e in examples]
    tokens = sum(len(e.at) for e in examples)
    counts = {"trained tokens": tokens, "all tokens": sum(len(e.ids) for e in examples)}
    if run.kind in ("dpo", "kto"):
        counts |= {"rows": len(step.examples) / 2, "sequences": len(step.examples)}
    if run.kind == "dpo":
        units = list(zip(step.examples[0::2], step.examples[1::2]))
    if run.kind == "online_dpo":
        units = _ranked(step)
        counts |= {"pairs": len(units), "prompts": len(groups_of(step))}
    divisor = {
        "sft": tokens,
        "dpo": f.rows if run.kind == "dpo" else 0,
        "kto": f.rows if run.kind == "kto" else 0,
        "online_dpo": len(units),
    }[run.kind]
    return [Part(units, counts, max(1, divisor), about["divisor"])]


def of_count(step, parts: list[Part]) -> Line:
    """Optimizer steps: as many as the flags ask for."""
    found, asked = len(step.about["updates"]), len(parts)
    where = f"the record has {found} optimizer steps, and the flags ask for {asked}"
    return Line("optimizer steps", found, asked, abs(found - asked), 0.0, where)


def _ranked(step):
    """(best, worst) of each group that gave a pair."""
    units = []
    for group in groups_of(step).values():
        rewarded = [e for e in group if e.reward == e.reward]
        if not rewarded:
            continue
        best = max(rewarded, key=lambda e: e.reward)
        worst = min(rewarded, key=lambda e: e.reward)
        if best.reward > worst.reward and best.ids != worst.ids:
            units.append((best, worst))
    return units


def _minibatches(run, step):
    f, groups = step.flags, groups_of(step)
    serials = sorted(groups)
    if run.kind in IN_ORDER:
        cuts = np.array_split(serials, f.minibatches)
    else:
        cuts = []
        for epoch in range(f.ppo_epochs):
            seed = f.seed, step.number, epoch
            cuts += np.array_split(np.random.default_rng(seed).permutation(serials), f.minibatches)
    parts = []
    for cut, recorded in zip(cuts, step.about["divisors"]):
        examples = [e for serial in cut.tolist() for e in groups[serial]]
        lengths = [len(e.at) for e in examples]
        counts = {
            "trained tokens": sum(lengths),
            "sequences": len(examples),
            "prompts": len(cut),
            "sequences x --max_new_tokens": len(examples) * f.max_new_tokens,
            "all tokens, with those of the prompts": sum(len(e.ids) for e in examples),
            "trained tokens of the whole rollout batch": sum(len(e.at) for e in step.examples),
            "sequences of the whole rollout batch": len(step.examples),
            "1": 1,
        }
        if run.kind == "grpo":
            divisor = plain.divisor(f.agg, lengths, f.max_new_tokens)
            if not f.beta:
                examples = [e for e in examples if any(e.adv)]
        else:
            divisor = max(1, sum(lengths))
            examples = [e for e in examples if e.at]
        parts.append(Part([(e,) for e in examples], counts, divisor, recorded))
    return parts


def fitting_count(part, wanted) -> str:
    """What, other than the right thing, there is `wanted` of."""
    for name, count in part.counts.items():
        if count != part.divisor and abs(count - wanted) <= 1e-3 * max(1, wanted):
            return f"{count:g} {name}"
    return ""


def of_divisors(step, parts) -> list[Line]:
    given = [max(1, part.recorded_divisor) for part in parts]
    expected = [part.divisor for part in parts]
    line = compared("divisor", given, expected, 0.0, where="optimizer step {}".format)
    if not line.holds:
        name = fitting_count(parts[given.index(line.recorded)], line.recorded)
        if name:
            line = line._replace(
                cause=f"the loss is divided by {name}, and not by {line.recomputed:g}"
            )
    return [line]


def of_passes(step) -> list[Line]:
    """Has everything been through the model that is trained? And which tokens gave a log-prob?"""
    lost, which = [], {}
    trained = [e for e in step.examples if e.minibatch]
    for e in trained:
        for k, at in zip(e.minibatch, e.micro_batch):
            if at is None:
                lost.append(f"example {e.index} in optimizer step {k}")
                which[k] = which.get(k, 0) + 1
    found = ", ".join(f"{n} examples of optimizer step {k}" for k, n in which.items())
    said = f"a micro-batch was dropped: {found} never went through the model"
    lines = [counted("forward passes", lost, len(trained), [(said, lambda: True)])]
    passed_through = [e for e in trained if e.logp]
    wrong = []
    for e in passed_through:
        if not set(have_numbers(e)) <= set(e.at):
            wrong.append(f"example {e.index}")

    def shifted(by):
        for e in passed_through:
            if not set(have_numbers(e)) <= {0, *(t + by for t in e.at)}:
                return False
        return True

    causes = [
        ("targets are made of a mask shifted by one token to the right", partial(shifted, 1)),
        ("targets are made of a mask shifted by one token to the left", partial(shifted, -1)),
    ]
    return [*lines, counted("trained tokens", wrong, len(passed_through), causes)]


def have_numbers(e) -> list[int]:
    """The tokens that have a log-prob or an entropy: of a target that is certain one may be 0."""
    return [t for t in range(len(e.ids)) if e.logp[t] or e.entropy[t]]


# ------------------------------------------------------------------------------------------- losses
# loss of a unit: (flags, unit, log-probs of each example's trained tokens, values or divergences)
# -> tensor
def sft_loss(f, unit, logps_of, values_of):
    loss = 0.0
    for logp in logps_of[0]:
        weight = logp.exp().item() if f.loss == "dft" else 1.0
        loss = loss - weight * logp
    return loss


def grpo_loss(f, unit, logps_of, values_of):
    (e,), (logp,) = unit, logps_of
    old = [e.old_logp[t] for t in e.at]
    engine = [e.engine_logp[t] for t in e.at]
    weight = 1 / len(e.at) if f.agg == "sequence" else 1.0
    kl_weight = 1 / len(e.at) if getattr(f, "kl_agg", f.agg) == "sequence" else 1.0
    ratios = plain.log_ratios(f.ratio, logp, old)
    loss = 0.0
    for i, (t, (factor, _)) in enumerate(zip(e.at, plain.corrections(f, old, engine))):
        policy, _ = plain.policy_loss(f, ratios[i], logp[i], e.adv[t])
        loss = loss + weight * factor * policy
        if f.beta:
            at = t - getattr(f, "shift", 0)
            ref = e.ref_logp[at] if at < len(e.ids) else 0.0
            loss = loss + f.beta * kl_weight * plain.kl_estimate(f.kl, logp[i], ref)
    return loss


def ppo_loss(f, unit, logps_of, values_of):
    (e,), (logp,), (value,) = unit, logps_of, values_of
    loss = 0.0
    for i, t in enumerate(e.at):
        policy, _ = plain.ppo_policy_loss(f.clip, logp[i] - e.old_logp[t], e.adv[t])
        error, _ = plain.value_loss(value[i], e.value[t], e.ret[t], f.value_clip)
        loss = loss + policy + f.value_coef * error
    return loss


def distill_loss(f, unit, logps_of, divergences_of):
    return sum(divergences_of[0])


def pair_loss(f, unit, logps_of, values_of):
    sides = []
    for e, logp in zip(unit, logps_of):
        total = sum(e.weight[t] * x for t, x in zip(e.at, logp))
        sides.append(Namespace(logp=total, nll=-sum(logp), ref_logp=e.ref_logp, length=e.length))
    f = Namespace(**{"divergence": "reverse_kl", "alpha": 0.5, **vars(f)})
    return plain.pair_loss(*sides, f.nll_tokens, f)


def kto_loss(f, unit, logps_of, values_of):
    (e,), (logp,) = unit, logps_of
    total = sum(e.weight[t] * x for t, x in zip(e.at, logp))
    return e.slope * total - e.nll_slope * sum(logp)


LOSSES = {
    "sft": sft_loss,
    "grpo": grpo_loss,
    "ppo": ppo_loss,
    "distill": distill_loss,
    "dpo": pair_loss,
    "online_dpo": pair_loss,
    "kto": kto_loss,
}


def variants(run, f) -> list[tuple[str, dict]]:
    """(what may be wrong with a loss, flags with which it would be so)."""
    found = []
    if run.kind == "sft":
        found += [(f"it is that of --loss {x}", {"loss": x}) for x in ("nll", "dft") if x != f.loss]
    if run.kind == "grpo":
        if f.beta:
            right, left = {"shift": 1}, {"shift": -1}
            found.append(("the KL is on the wrong tokens (shifted by one)", right))
            found.append(("the KL is on the wrong tokens (shifted by one)", left))
            other = "token" if f.agg == "sequence" else "sequence"
            weighed = "the KL does not have the weights of --agg"
            found.append((weighed, {"kl_agg": other}))
            found.append(("the KL is left out", {"beta": 0.0}))
            found.append(("the KL has the wrong sign", {"beta": -f.beta}))
            for kind in ("k1", "k2", "k3"):
                found.append((f"the KL is estimated as by --kl {kind}", {"kl": kind}))
        for agg in ("sequence", "token"):
            if (agg == "sequence") != (f.agg == "sequence"):
                found.append((f"it has the weights of --agg {agg}", {"agg": agg, "kl_agg": agg}))
        for ratio in ("token", "sequence", "sequence_sum"):
            if ratio != f.ratio:
                found.append((f"its ratio is that of --ratio {ratio}", {"ratio": ratio}))
        found.append(("it is not clipped", {"clip": [math.inf, math.inf]}))
        if f.correct != "none":
            found.append(("the correction is left out", {"correct": "none"}))
    if run.kind == "ppo":
        found.append(("its policy part is not clipped", {"clip": [math.inf, math.inf]}))
        found.append(("its value part is not clipped", {"value_clip": math.inf}))
        found.append(("--value_coef is ignored", {"value_coef": 1.0}))
        found.append(("the value loss is not halved", {"value_coef": 2 * f.value_coef}))
        found.append(("the value loss is left out", {"value_coef": 0.0}))
    if run.kind == "distill":
        found.append(("student and teacher are swapped", {"beta": 1 - f.beta}))
        for beta, name in ((1, "the reverse KL"), (0, "the forward KL")):
            found.append((f"it is {name}", {"beta": beta}))
        found.append(("it is over the whole vocabulary", {"teacher_top_k": 0}))
        found.append(("the temperature was forgotten", {"temperature": 1.0}))
    if run.kind in ("dpo", "online_dpo"):
        found.append(("beta is ignored", {"beta": 1.0}))
        found.append(("chosen and rejected are swapped", {"beta": -f.beta}))
        found.append(("smoothing is ignored", {"smoothing": 0.0}))
        found.append(("--loss_weights are ignored", {"loss_weights": None}))
    return found


def with_flags(f, changes) -> Namespace:
    return Namespace(**{**vars(f), **changes})


def flags_of_loss(step) -> Namespace:
    return with_flags(step.flags, {"nll_tokens": step.about.get("nll_tokens")})


def of_losses(run, step, parts) -> list[Line]:
    """From the recorded log-probs, of the optimizer steps in which all had their first pass."""
    f = flags_of_loss(step)
    updates = step.about["updates"]
    given, expected, most, first = [], [], [], []
    for k, part in enumerate(parts):
        whole = all(e.minibatch[:1] == [k] and e.logp for unit in part.units for e in unit)
        if "loss" in updates[k] and part.units and whole:
            first.append(k)
            given.append(updates[k]["loss"])
            expected.append(_from_record(run, f, part))
            most.append(8 * FP32 * _scale_of_loss(part))
    if run.kind == "kto":
        return [Line("loss", note="it couples all rows of a step; the gradient is by its slopes")]
    if not first:
        return [Line("loss", note="no optimizer step has the log-probs of all its tokens")]

    def by(changes):
        return lambda: [_from_record(run, with_flags(f, changes), parts[k]) for k in first]

    causes = [(said, by(changes)) for said, changes in variants(run, f)]

    def where(i):
        return f"optimizer step {first[i]}"

    lines = [compared("loss, summed", given, expected, most, causes, where)]
    return lines + _logged_loss(run, step, parts)


def _from_record(run, f, part) -> float:
    found = 0.0
    for unit in part.units:
        logps_of = [torch.tensor([e.logp[t] for t in e.at], dtype=torch.float64) for e in unit]
        values_of = None
        if run.kind == "ppo":
            values_of = [
                torch.tensor([e.new_value[t] for t in e.at], dtype=torch.float64) for e in unit
            ]
        if run.kind == "distill":
            values_of = [torch.tensor(column(unit, "divergence"), dtype=torch.float64)]
        found += float(LOSSES[run.kind](f, unit, logps_of, values_of))
    return found


def _scale_of_loss(part) -> float:
    """Of the numbers that a loss adds up: log-probs and advantages."""
    found = 1.0
    for unit in part.units:
        for e in unit:
            found += sum(abs(e.logp[t]) for t in e.at)
            if hasattr(e, "adv"):
                found += 4 * sum(abs(e.adv[t]) for t in e.at)
            if hasattr(e, "ret"):
                found += sum((e.ret[t] - e.value[t]) ** 2 + abs(e.ret[t]) for t in e.at)
    return found


def _logged_loss(run, step, parts):
    """metrics.jsonl's loss, from the recorded sums and the right divisors."""
    given, sums = step.metrics.get("loss"), [x.get("loss") for x in step.about["updates"]]
    if given is None or None in sums:
        return []
    expected = sum(x / part.divisor for x, part in zip(sums, parts)) / len(parts)
    most = 8 * FP32 * sum(_scale_of_loss(part) / part.divisor for part in parts if part.units)
    line = compared("loss, logged", [given], [expected], most)
    if not line.holds and given:
        name = fitting_count(parts[0], sum(sums) / given / len(parts))
        if name:
            line = line._replace(cause=f"it is divided by {name}, and not by {parts[0].divisor:g}")
    return [line]


# ------------------------------------------------------------------------------------------ updates
def rate_of(run, f, number, k, parts) -> float:
    """The learning rate of optimizer step k, of `parts` in a step; k may be out of range: nan
    before the first one of all."""
    if run.kind in IN_ORDER:
        update = (number - 1) * parts + k + 1
        if update < 1:
            return math.nan
        return plain.learning_rate(update, f.steps * parts, f.lr, f.warmup)
    if number < 1:
        return math.nan
    return plain.learning_rate(number, f.steps, f.lr, f.warmup)


def of_rate(run, step) -> Line:
    f, updates = step.flags, step.about["updates"]
    parts, n = len(updates), step.number
    given = [x["lr"] for x in updates]

    def rates(number=n, shift=0, flags=f):
        if run.kind in IN_ORDER:
            return [rate_of(run, flags, number, k + shift, parts) for k in range(parts)]
        return [rate_of(run, flags, number + shift, 0, parts)] * parts

    causes = [
        ("it is that of the update before", lambda: rates(shift=-1)),
        ("it is that of the update after", lambda: rates(shift=1)),
        ("there is no warm-up", lambda: rates(flags=with_flags(f, {"warmup": 0}))),
        ("it is --lr all the time", lambda: [f.lr] * parts),
    ]
    where = "optimizer step {}".format
    return compared("learning rate", given, rates(), 1e-9 * f.lr, causes, where)


class Replica:
    """A model and its AdamW, which take a step's optimizer steps once more in float64. disturbed:
    the gradient gets random errors as large as rounding's may be, to see what they grow to."""

    def __init__(self, run, step, disturbed: float = 0.0):
        self.run, self.step, self.disturbed = run, step, disturbed
        self.model, self.adamw = run.copy(step.number - 1)
        self.f = flags_of_loss(step)
        self.logps, self.entropies = {}, {}  # index of an example -> those of its first pass
        self.steps = 0  # so far
        self.draw = torch.Generator().manual_seed(0)
        if run.kind == "ppo":
            for p in self.model.policy.parameters():
                p.requires_grad_(p.requires_grad and step.number > self.f.value_warmup)

    @property
    def trained(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def loss(self, unit, changes=None, remember=True):
        f, temperature = self.f, temperature_of(self.run, self.f)
        if changes:
            f = with_flags(f, changes)
        logps_of, values_of = [], None
        for e in unit:
            logp_T, entropy_T = passed(self.model, e, temperature)
            logps_of.append([logp_T[t] for t in e.at])
            if remember and e.minibatch[0] == self.steps:
                self.logps[e.index] = [logp_T[t].item() for t in e.at]
                self.entropies[e.index] = [entropy_T[t].item() for t in e.at]
        if self.run.kind == "ppo":
            values_of = []
            for e in unit:
                value_T = values(self.model, e)
                values_of.append([value_T[t] for t in e.at])
        if self.run.kind == "distill":
            values_of = [divergences(self.model, self.run.teacher, e, f) for e in unit]
        return LOSSES[self.run.kind](f, unit, logps_of, values_of)

    def gradients(self, units, divisor, changes=None, remember=True):
        """Of the units -> (the sum of their gradients, that of the squares, that of the norms)."""
        total = [torch.zeros_like(p) for p in self.trained]
        squares = [torch.zeros_like(p) for p in self.trained]
        norms = 0.0
        for unit in units:
            loss = self.loss(unit, changes, remember) / divisor
            if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
                continue
            found = torch.autograd.grad(loss, self.trained, allow_unused=True)
            found = [torch.zeros_like(p) if g is None else g for p, g in zip(self.trained, found)]
            for a, b, g in zip(total, squares, found):
                a += g
                b += g * g
            norms += norm_of(found)
        return total, squares, norms

    def update(self, part, lr):
        """One optimizer step -> (norm of the gradient, sum of the units' norms, factor of the
        clipping)."""
        total, squares, norms = self.gradients(part.units, part.divisor)
        self.steps += 1
        for p, g, square in zip(self.trained, total, squares):
            p.grad = g
            if self.disturbed:
                noise = torch.randn(p.shape, generator=self.draw, dtype=torch.float64)
                size = square.sqrt() + square.mean().sqrt()  # what cancels has an error too
                p.grad = g + self.disturbed * noise * size * (square > 0)
        norm = plain.clip_gradients(self.model, self.f.grad_clip)
        factor = 1.0
        if self.f.grad_clip and self.f.grad_clip < norm + 1e-6:
            factor = self.f.grad_clip / (norm + 1e-6)
        if any(e.at for unit in part.units for e in unit):
            rates = {"value": value_rate(self.f)} if self.run.kind == "ppo" else None
            self.adamw.step(lr, rates)
        return norm, norms, factor


def norm_of(tensors) -> float:
    return math.sqrt(sum(float((x * x).sum()) for x in tensors))


def of_updates(run, step, parts, allowed) -> list[Line]:
    n, updates = step.number, step.about["updates"]
    rate = of_rate(run, step)
    if not run.has_weights(n - 1):
        note = f"no checkpoint of step {n - 1}"
        return [Line("log-probs", note=note), Line("gradient norm", note=note), rate]
    replica, other = Replica(run, step), None
    if len(parts) > 1:
        other = Replica(run, step, allowed.relative)
    norms, most, moved = [], [], 0.0
    for part, update in zip(parts, updates):
        norm, sum_of_norms, factor = replica.update(part, update["lr"])
        wide = allowed.relative * sum_of_norms + 1e-12
        moved += 0.1 * wide * factor
        if other:
            disturbed, *_ = other.update(part, update["lr"])
            wide += MARGIN * abs(disturbed - norm)
        norms.append(norm)
        most.append(wide)
    given = [x["grad_norm"] for x in updates]
    norm = compared("gradient norm", given[:1], norms[:1], most[0])
    if not norm.holds:
        cause = why_gradient(run, Replica(run, step), parts[0], given[0], norms[0], most[0])
        norm = norm._replace(cause=cause)
    lines = [*_first_passes(run, step, replica, allowed), norm]
    if other:
        lines.append(_later_passes(step, replica, other, allowed))
        later = compared("gradient norms, later", given[1:], norms[1:], most[1:])
        if not later.holds:
            k = given.index(later.recorded)
            cause = same_factor(parts[k], given[k], norms[k], most[k])
            later = later._replace(cause=cause)
        lines.append(later)
    return [*lines, _logged_norm(step), rate, *_after(run, step, replica, other, moved)]


def _logged_norm(step) -> Line:
    given, expected = step.metrics.get("grad_norm"), step.about["updates"][-1]["grad_norm"]
    if given is None:
        return Line("gradient norm, logged", note="metrics.jsonl has none")
    return compared("gradient norm, logged", [given], [expected], 0.0)


def _passes(step, replica, which):
    """(examples, recorded log-probs, recomputed ones) of the first pass of each example, where that
    was in an optimizer step that `which` takes."""
    examples = [e for e in step.examples if e.logp and e.index in replica.logps]
    examples = [e for e in examples if which(e.minibatch[0])]
    return examples, column(examples, "logp"), [x for e in examples for x in replica.logps[e.index]]


def _first_passes(run, step, replica, allowed) -> list[Line]:
    """Log-probs and entropies of the first optimizer step, whose weights are known."""
    examples, given, expected = _passes(step, replica, lambda k: k == 0)
    line = compared("log-probs", given, expected, allowed.logp, (), at_token(examples))
    if not (line.note or line.holds):
        line = line._replace(cause=why_log_probs(run, step, examples, allowed))
    entropies = [x for e in examples for x in replica.entropies[e.index]]
    most = 2 * allowed.logp * max([1.0, *entropies])
    given = column(examples, "entropy")
    lines = [line, compared("entropies", given, entropies, most, (), at_token(examples))]
    return lines + (_divergences(run, step, examples, allowed) if run.kind == "distill" else [])


def _divergences(run, step, examples, allowed) -> list[Line]:
    """Those of the first optimizer step."""
    model, _ = run.model(step.number - 1)

    @torch.no_grad()
    def by(changes):
        f = with_flags(step.flags, changes)
        return [float(x) for e in examples for x in divergences(model, run.teacher, e, f)]

    given, expected = column(examples, "divergence"), by({})
    most = 4 * allowed.logp * max([1.0, *expected])
    causes = [(said, partial(by, changes)) for said, changes in variants(run, step.flags)]
    return [compared("divergences", given, expected, most, causes, at_token(examples))]


def _later_passes(step, replica, other, allowed) -> Line:
    """Those of later ones."""
    examples, given, expected = _passes(step, replica, lambda k: k > 0)
    *_, disturbed = _passes(step, other, lambda k: k > 0)
    drift = max([abs(a - b) for a, b in zip(expected, disturbed)], default=0.0)
    most = allowed.logp + MARGIN * drift
    return compared("log-probs, later", given, expected, most, (), at_token(examples))


def why_log_probs(run, step, examples, allowed) -> str:
    """Of the first optimizer step, whose weights are known."""
    model, _ = run.model(step.number - 1)
    temperature = temperature_of(run, step.flags)

    def like(found):
        given = column(examples, "logp")
        return all(gap(a, b) <= 2 * allowed.logp for a, b in zip(given, found))

    if temperature != 1.0 and like(under(model, examples, 1.0)):
        return "the trainer forgot the temperature"
    packs = {}
    for e in examples:
        rank, number, place = e.micro_batch[0]
        packs.setdefault((rank, number), []).append((place, e))
    leaked = {}
    for pack in packs.values():
        in_order = [e for _, e in sorted(pack, key=lambda pair: pair[0])]
        leaked |= leaking(model, in_order, temperature)
    if like([x for e in examples for x in leaked[e.index]]):
        return "attention reaches across the documents of a packed micro-batch (packing leak)"
    alone = [e for pack in packs.values() for place, e in pack if place == 0]
    given = column(alone, "logp")
    expected = under(model, alone, temperature)
    if all(gap(a, b) <= 2 * allowed.logp for a, b in zip(given, expected)):
        return (
            "the first sequence of each micro-batch holds and others do not: documents of a packed "
            "micro-batch see each other (packing leak)"
        )
    for said, other in other_weights(run, step, examples):
        if like(other()):
            return said
    return ""


def same_factor(part, given, norm, wide) -> str:
    """A divisor that explains the norm of a gradient."""
    for name, count in part.counts.items():
        if (
            count
            and count != part.divisor
            and gap(given, norm * part.divisor / count) <= 2 * wide * max(1, part.divisor / count)
        ):
            return f"the loss is divided by {count:g} {name}, and not by {part.divisor:g}"
    return ""


def why_gradient(run, first: Replica, part, given, norm, wide) -> str:
    """first: as before the optimizer step. Causes of another norm of its gradient."""
    if not given:
        return "there is no gradient: it was never computed, or was set to 0"
    if said := same_factor(part, given, norm, wide):
        return said
    packs = {}
    for unit in part.units:
        at = unit[0].micro_batch[0]
        packs.setdefault(tuple(at[:2]) if at else None, []).append(unit)
    each = {}
    for at, units in packs.items():
        each[at], *_ = first.gradients(units, part.divisor, remember=False)
    total = [sum(tensors) for tensors in zip(*each.values())]
    for at, one in each.items():
        rest = norm_of([a - b for a, b in zip(total, one)])
        if len(each) > 1 and gap(given, rest) <= 2 * wide:
            where = f"number {at[1]} of rank {at[0]}" if at else "the one without a forward pass"
            return f"a micro-batch was dropped ({where}): the gradient is that of the others"
    for at, one in each.items():
        if len(each) > 1 and gap(given, norm_of(one)) <= 2 * wide:
            return f"the gradient is that of one micro-batch alone (number {at[1]} of rank {at[0]})"
    for said, changes in variants(run, first.f):
        found, *_ = first.gradients(part.units, part.divisor, changes, remember=False)
        if gap(given, norm_of(found)) <= 2 * wide:
            return f"the loss is another one: {said}"
    return ""


@torch.no_grad()
def _after(run, step, replica, other, moved) -> list[Line]:
    """What the optimizer did, by the checkpoint after the step: its first moment has the gradient
    in it."""
    n, f, updates = step.number, step.flags, step.about["updates"]
    if n not in run.saved:
        note = f"no checkpoint of step {n}"
        return [Line("gradient", note=note), Line("weights", note=note)]
    model, adamw = run.model(n)
    before, at_first = run.model(n - 1)
    names = [name for name, p in model.named_parameters() if name in adamw.first]
    start = dict(before.named_parameters())
    end, mine = dict(model.named_parameters()), dict(replica.model.named_parameters())
    kept = 0.9 ** len(updates)
    if not names:
        note = "the optimizer has done nothing yet"
        return [Line("gradient", note=note), Line("weights", note=note)]

    def added(optimizer):
        found = []
        for name in names:
            old = at_first.first.get(name, torch.zeros_like(end[name])) * kept
            found.append(optimizer.first.get(name, torch.zeros_like(old)) - old)
        return found

    def apart(a, b):
        return norm_of([x - y for x, y in zip(a, b)])

    given, expected = added(adamw), added(replica.adamw)
    size = max(norm_of(expected), 1e-30)
    wide = moved + (MARGIN * apart(expected, added(other.adamw)) if other else 0.0)
    difference = apart(given, expected)
    numbers = norm_of(given), norm_of(expected), difference, wide
    where = f"by {difference / size:.2g} of its size, over all weights"
    lines = [Line("gradient", *numbers, where, "")]
    if not lines[0].holds:
        lines[0] = lines[0]._replace(cause=_why_direction(given, expected, wide, size))

    # ---- weights
    rates = {"value": value_rate(f)} if run.kind == "ppo" else None
    was, now = flat(start, names), flat(end, names)
    if other is None:  # by the recorded moments
        right = _moved(adamw, names, start, updates[0]["lr"], rates)
        each = 4 * FP32 * right.abs().max() + 1e-4 * updates[0]["lr"]
        clear = torch.ones_like(right, dtype=torch.bool)
    else:
        right, disturbed = flat(mine, names), flat(dict(other.model.named_parameters()), names)
        each = MARGIN * (right - disturbed).abs() + 4 * FP32 * right.abs()
        clear = (right - disturbed).abs() <= CLEAR * (right - was).abs()
    change, expected = (now - was)[clear], (right - was)[clear]
    if clear.sum() < CLEAR * len(clear):
        return [
            *lines,
            Line("weights", note="rounding decides where AdamW moves nearly all of them"),
        ]
    difference = (change - expected).norm()
    wide = (each * torch.ones_like(right))[clear].norm()
    where = f"over {int(clear.sum()):,} of {len(clear):,} weights, where rounding does not decide"
    numbers = [float(x) for x in (change.norm(), expected.norm(), difference, wide)]
    factor = float(change @ expected / (expected @ expected).clamp(min=1e-30))
    line = Line(
        "weights", *numbers, f"they moved {factor:.4g} times as far as they should, {where}"
    )
    if not line.holds:
        line = line._replace(cause=_why_weights(run, step, factor))
    return [*lines, line]


CLEAR = (
    0.01  # how far apart two replays may be, as a share of the move, in a weight that is compared
)


def flat(parameters, names) -> torch.Tensor:
    return torch.cat([parameters[name].flatten() for name in names])


def _moved(adamw, names, start, lr, rates):
    """The weights after a step by these moments."""
    found = {name: start[name].clone() for name in names}
    for name, p in found.items():
        adamw.move(name, p, lr, rates)
    return flat(found, names)


def _why_direction(given, expected, wide, size) -> str:
    factor = sum(float((a * b).sum()) for a, b in zip(given, expected)) / size**2
    scaled = norm_of([a - factor * b for a, b in zip(given, expected)])
    if scaled <= 2 * wide * max(1.0, abs(factor)):
        return f"it is {factor:.4g} times what it should be, in the same direction"
    return ""


def _why_weights(run, step, factor) -> str:
    """factor: how much further they moved than they should."""
    updates = step.about["updates"]
    rates = [x["lr"] for x in updates]
    for said, shift in (("before", -1), ("after", 1)):
        if run.kind in IN_ORDER:
            other = [
                rate_of(run, step.flags, step.number, k + shift, len(rates))
                for k in range(len(rates))
            ]
        else:
            other = [rate_of(run, step.flags, step.number + shift, 0, len(rates))] * len(rates)
        if (
            sum(rates)
            and abs(sum(other) / sum(rates) - factor)
            <= 0.01 * abs(sum(other) / sum(rates) - 1) + 1e-4
        ):
            return (
                f"they moved by the learning rate of the update {said}, {factor:.4g} times as far"
            )
    return ""
