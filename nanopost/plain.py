"""The formulas of the training scripts once more, in plain loops: one token, one sequence or one
group at a time, on Python's floats and on float64 tensors of one number, which have a gradient.

The slow twins (tests/twins) and replay.py compute with them what the loops compute on packed
tensors. Nothing here is shared with that code. `flags`: those of a run, as its script names them.

Shapes: T tokens of one sequence, V vocabulary. None stands for a reward that does not apply.
"""

import math

import torch


# -------------------------------------------------------------------------------------- statistics
def there(values) -> list[float]:
    """What is not None."""
    return [x for x in values if x is not None]


def std(values) -> float:
    """With n - 1, of what is not None; 0 of less than two."""
    values = there(values)
    if not values:
        return 0.0
    mean = sum(values) / len(values)
    return (sum((x - mean) ** 2 for x in values) / max(1, len(values) - 1)) ** 0.5


def mean_and_std(lists) -> tuple[float, float]:
    """Of the numbers of all lists."""
    flat = [x for values in lists for x in values]
    return sum(flat) / max(1, len(flat)), std(flat)


def scale_of(scores) -> float:
    """The std, with n, of all scores so far."""
    mean = sum(scores) / len(scores)
    return (sum((x - mean) ** 2 for x in scores) / len(scores)) ** 0.5


# -------------------------------------------------------------------------------------- log-probs
def logp_and_entropy(logits_TV, ids, temperature=1.0, kept=None):
    """Log-prob of each token, and the entropy of the whole distribution before it -> two [T], 0 for
    the first token. logits_TV: entry t is of the token AFTER t. kept: for each token the ids among
    which it was drawn (none: all), over which its log-prob is renormalised."""
    logp_TV = (logits_TV / temperature).log_softmax(-1)
    logp_T, entropy_T = torch.zeros(2, len(ids), dtype=torch.float64).unbind()
    logp_T = [logp_T[0]] + [logp_TV[t - 1, ids[t]] for t in range(1, len(ids))]
    for t in range(1, len(ids)):
        if kept is not None and kept[t]:
            assert ids[t] in kept[t]
            logp_T[t] = logp_T[t] - torch.log(sum(logp_TV[t - 1, i].exp() for i in kept[t]))
    rows = [logp_TV[t - 1] for t in range(1, len(ids))]
    entropy_T = [entropy_T[0]] + [-(row.exp() * row).sum() for row in rows]
    return torch.stack(logp_T), torch.stack(entropy_T)


def kl_estimate(kind, logp, ref_logp):
    """Of the KL, from a token of these log-probs; floats or tensors."""
    x = logp - ref_logp
    if kind == "k1":
        return x
    if kind == "k2":
        return x * x / 2
    return (torch.exp(-x) if isinstance(x, torch.Tensor) else math.exp(-x)) - 1 + x


# -------------------------------------------------------------------------------------- advantages
def total(rewards, weights) -> float | None:
    """The weighted sum of the rewards that apply; None if none does."""
    found = [w * r for w, r in zip(weights, rewards) if r is not None]
    return sum(found) if found else None


def advantages(kind, totals) -> list[list[float]]:
    """GRPO's. totals: the rewards of each group -> an advantage each, group by group."""
    whole = std([reward for group in totals for reward in group])
    found = []
    for group in totals:
        scores = there(group)
        found.append([])
        for reward in group:
            if reward is None:
                found[-1].append(0.0)
                continue
            centred = reward - sum(scores) / len(scores)
            adv = {
                "group": centred / (std(scores) + 1e-4),
                "mean": centred,
                "loo": centred * len(scores) / max(1, len(scores) - 1),
                "batch": centred / (whole + 1e-4),
            }
            found[-1].append(adv[kind])
    return found


def gae(rewards, values, gamma, lam) -> list[float]:
    """The sum of (gamma lam)^k delta_t+k, for each t."""
    steps = range(len(values))
    after = [values[t + 1] if t + 1 < len(values) else 0.0 for t in steps]
    deltas = [r + gamma * w - v for r, w, v in zip(rewards, after, values)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in steps if k >= t) for t in steps]


def returns(rewards, gamma) -> list[float]:
    """Discounted sums of what is still to come."""
    steps = range(len(rewards))
    return [sum(gamma ** (k - t) * rewards[k] for k in steps if k >= t) for t in steps]


# ----------------------------------------------------------------------------------------- policy
def log_ratios(kind, logps, old_logps) -> list:
    """log pi / pi_old at each trained token of a sequence."""
    each = [logp - old for logp, old in zip(logps, old_logps)]
    if kind == "sequence":
        return [sum(each) / len(each)] * len(each)
    if kind == "sequence_sum":
        return [sum(each)] * len(each)
    return each


def policy_loss(flags, log_ratio, logp, adv):
    """Of one token -> (loss, what is clipped of it)."""
    ratio = log_ratio.exp()
    if flags.loss == "cispo":
        cut = {"cispo_clip_ratio": ratio > flags.cispo_cap and adv > 0}
        return -min(ratio.item(), flags.cispo_cap) * adv * logp, cut
    if flags.loss == "sapo":
        tau = flags.sapo_tau[0] if adv > 0 else flags.sapo_tau[1]
        return -adv * 4 / tau / (1 + torch.exp(-tau * (ratio - 1))), {}
    low, high = flags.clip
    too_low, too_high = ratio < 1 - low and adv < 0, ratio > 1 + high and adv > 0
    if flags.loss == "dppo":
        moved = math.exp(logp.item()) - math.exp((logp - log_ratio).item())
        too_low, too_high = moved < -low and adv < 0, moved > high and adv > 0
    cut = {
        "clip_ratio/low_mean": too_low,
        "clip_ratio/high_mean": too_high,
        "clip_ratio/region_mean": too_low or too_high,
    }
    if flags.loss == "dppo":
        return -ratio * adv * (not (too_low or too_high)), cut
    if too_low:
        return 0 * ratio - (1 - low) * adv, cut
    if too_high:
        return 0 * ratio - (1 + high) * adv, cut
    return -ratio * adv, cut


def corrections(flags, trainer_logps, engine_logps) -> list[tuple[float, float]]:
    """Importance weight of each trained token of a sequence, trainer over engine, and the ratio
    before it was cut at the cap."""
    if flags.correct == "none":
        return [(1.0, 1.0) for _ in trainer_logps]
    level, mode = flags.correct.split("-")
    gaps = [a - b for a, b in zip(trainer_logps, engine_logps)]
    found = []
    for gap in gaps:
        ratio = math.exp(gap if level == "token" else sum(gaps))
        over = flags.correct_cap if mode == "truncate" else 0.0
        found.append((ratio if ratio <= flags.correct_cap else over, ratio))
    return found


def divisor(kind, lengths, max_new_tokens) -> int:
    """lengths: trained tokens of each sequence of an optimizer step."""
    counts = {
        "token": sum(lengths),
        "sequence": len(lengths),
        "sequence_sum": len(lengths),
        "constant": len(lengths) * max_new_tokens,
    }
    return max(1, counts[kind])


def ppo_policy_loss(clip, log_ratio, adv):
    """Of one token -> (loss, whether it is clipped)."""
    ratio = log_ratio.exp()
    clipped = min(max(ratio.item(), 1 - clip[0]), 1 + clip[1])
    cut = clipped * adv < ratio.item() * adv
    return (0 * ratio - clipped * adv if cut else -ratio * adv), cut


def value_loss(value, old, target, clip):
    """Of one token -> (loss, whether it is clipped)."""
    near = min(max(value.item(), old - clip), old + clip)
    if abs(near - target) > abs(value.item() - target):
        return 0 * value + (near - target) ** 2 / 2, True
    return (value - target) ** 2 / 2, False


# ----------------------------------------------------------------------------------- distillation
def divergence(flags, logits_V, teacher_V):
    """Of the distributions of one token, by their logits: over all tokens, or over the teacher's
    likeliest ones and the rest of them as one."""
    p = (logits_V / flags.temperature).softmax(-1)
    q = (teacher_V / flags.temperature).softmax(-1)
    if flags.teacher_top_k:
        order = q.argsort(descending=True)
        likeliest, rest = order[: flags.teacher_top_k], order[flags.teacher_top_k :]
        p = torch.cat([p[likeliest], p[rest].sum()[None]])
        q = torch.cat([q[likeliest], q[rest].sum()[None]])
    if flags.beta == 0:
        return (q * torch.log(q / p)).sum()
    if flags.beta == 1:
        return (p * torch.log(p / q)).sum()
    m = flags.beta * q + (1 - flags.beta) * p
    of_teacher = (q * torch.log(q / m)).sum()
    of_student = (p * torch.log(p / m)).sum()
    return flags.beta * of_teacher + (1 - flags.beta) * of_student


# ------------------------------------------------------------------------------------------ pairs
def log_sigmoid(z):
    return -torch.logaddexp(torch.zeros_like(z), -z)


def smoothed(z, e):
    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def robust(z, e):
    return (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)


def exo(z, e):
    """KL((q, 1 - q) || (1 - e, e))."""
    log_q, log_not_q = log_sigmoid(z), log_sigmoid(-z)
    kl = log_q.exp() * (log_q - math.log(1 - e))
    return kl + log_not_q.exp() * (log_not_q - math.log(e))


def discopop(z):
    m = torch.sigmoid(z / 0.05)
    return (1 - m) * -log_sigmoid(z) + m * torch.exp(-z)


def nca(c, r):
    return -log_sigmoid(c) - 0.5 * log_sigmoid(-c) - 0.5 * log_sigmoid(-r)


def orpo(c, r, beta):
    """c, r: mean log-probs."""
    odds_c, odds_r = c.exp() / (1 - c.exp()), r.exp() / (1 - r.exp())
    return -beta * log_sigmoid(torch.log(odds_c / odds_r))


def score(ratio, flags):
    """f'(t) of an f-divergence, t = exp(ratio), with f'(1) = 0."""
    if flags.divergence == "forward_kl":
        return 1 - torch.exp(-ratio)
    if flags.divergence == "js":
        t = torch.exp(ratio)
        return torch.log(2 * t / (1 + t))
    if flags.divergence == "alpha":
        return (torch.exp((flags.alpha - 1) * ratio) - 1) / (flags.alpha - 1)
    return ratio


def pair_term(name, chosen, rejected, nll_tokens, flags):
    """One term of --loss. chosen, rejected: with logp, ref_logp, nll and length of a side."""
    beta, e = flags.beta, flags.smoothing
    nll = chosen.nll / nll_tokens
    c, r = chosen.logp - chosen.ref_logp, rejected.logp - rejected.ref_logp
    s_c, s_r = score(c, flags), score(r, flags)
    z = beta * (s_c - s_r)
    margin = s_c / chosen.length - s_r / rejected.length
    mean_c, mean_r = chosen.logp / chosen.length, rejected.logp / rejected.length
    return {
        "sigmoid": lambda: smoothed(z, e),
        "sigmoid_norm": lambda: smoothed(beta * margin, e),
        "ipo": lambda: (margin - 1 / (2 * beta)) ** 2,
        "hinge": lambda: max(0 * z, 1 - z),
        "robust": lambda: robust(z, e),
        "exo": lambda: exo(z, e),
        "discopop": lambda: discopop(z),
        "nca": lambda: nca(beta * c, beta * r),
        "sppo": lambda: (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r),
        "apo_down": lambda: torch.sigmoid(beta * c) + 1 - torch.sigmoid(beta * (c - r)),
        "simpo": lambda: smoothed(beta * (mean_c - mean_r) - flags.gamma, e),
        "sft": lambda: nll,
        "cpo": lambda: smoothed(beta * (chosen.logp - rejected.logp), e) + nll,
        "orpo": lambda: nll + orpo(mean_c, mean_r, beta),
    }[name]()


WITHOUT_REFERENCE = {"simpo", "sft", "cpo", "orpo"}


def pair_loss(chosen, rejected, nll_tokens, flags):
    """The weighted sum of the terms of --loss."""
    weights = flags.loss_weights or [1.0] * len(flags.loss)
    terms = [pair_term(name, chosen, rejected, nll_tokens, flags) for name in flags.loss]
    return sum(weight * term for weight, term in zip(weights, terms))


# ----------------------------------------------------------------------------------- optimization
def clip_gradients(module, max_norm) -> float:
    """Scale all gradients to a norm of at most max_norm (0: no limit) -> the norm before.

    torch adds 1e-6 to the norm that it divides by."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
    if max_norm and max_norm < norm + 1e-6:
        for g in gradients:
            g *= max_norm / (norm + 1e-6)
    return norm


def learning_rate(step, steps, peak, warmup) -> float:
    """Of step 1..steps: up to the peak in `warmup` steps, then down to 0 after the last one."""
    warmup = min(warmup, steps // 2)
    if step <= warmup:
        return peak * step / warmup
    return peak * (1 - (step - warmup - 1) / max(1, steps - warmup))


class AdamW:
    """1711.05101, with betas 0.9 and 0.95. Decays matrices alone."""

    def __init__(self, module, weight_decay):
        self.module, self.weight_decay = module, weight_decay
        self.first, self.second, self.steps = {}, {}, {}

    @torch.no_grad()
    def step(self, rate, rates=None):
        """rates: {prefix of a name: factor of the rate}. Gradients are forgotten afterwards."""
        for name, p in self.module.named_parameters():
            if p.grad is None:
                continue
            first = self.first.get(name, torch.zeros_like(p))
            second = self.second.get(name, torch.zeros_like(p))
            self.steps[name] = self.steps.get(name, 0) + 1
            self.first[name] = 0.9 * first + 0.1 * p.grad
            self.second[name] = 0.95 * second + 0.05 * p.grad * p.grad
            self.move(name, p, rate, rates)
            p.grad = None

    @torch.no_grad()
    def move(self, name, p, rate, rates=None):
        """Change a weight by its moments as they are."""
        for prefix, factor in (rates or {}).items():
            if name.startswith(prefix + "."):
                rate = rate * factor
        mean = self.first[name] / (1 - 0.9 ** self.steps[name])
        variance = self.second[name] / (1 - 0.95 ** self.steps[name])
        if p.ndim >= 2:
            p -= rate * self.weight_decay * p
        p -= rate * mean / (variance.sqrt() + 1e-8)
