"""Losses over pairs: raise a chosen answer above a rejected one. Pure functions -> loss_P.

Shapes: P pairs, S = 2 P sequences: 2p is the chosen one of pair p, 2p + 1 the rejected one.

The parameter names of a loss say what it reads; `weighted` passes it exactly that:

    chosen_logp_P     log-prob of the answer, summed over its tokens; likewise rejected_logp_P, ...
    chosen_ratio_P    log-ratio policy / reference: logp - ref_logp
    chosen_score_P    f'(ratio) of the f-divergence in place of the KL: the log-ratio for reverse KL
    chosen_length_P   tokens of the answer
    chosen_nll_P      - log-prob summed over all targets (for orpo the prompt's too)
    nll_tokens        targets per chosen sequence, a mean over the optimizer step
    beta, smoothing, gamma, ...    scalars: smoothing is the assumed share of swapped pairs

A loss that reads no ratio and no score needs no reference. The loop sums loss_P and divides by the
pairs of the optimizer step.
"""

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanopost import InputError


def sigmoid(chosen_score_P, rejected_score_P, beta, smoothing):
    """DPO, 2305.18290 eq. 7: - log sigmoid(beta (c - r)). With smoothing cDPO
    (ericmitchell.ai/cdpo.pdf): the cross-entropy to 1 - smoothing."""
    return _smoothed(beta * (chosen_score_P - rejected_score_P), smoothing)


def sigmoid_norm(
    chosen_score_P, rejected_score_P, chosen_length_P, rejected_length_P, beta, smoothing
):
    """Length-normalised DPO, 2411.15124: - log sigmoid(beta (c / |c| - r / |r|))."""
    margin_P = chosen_score_P / chosen_length_P - rejected_score_P / rejected_length_P
    return _smoothed(beta * margin_P, smoothing)


def ipo(chosen_score_P, rejected_score_P, chosen_length_P, rejected_length_P, beta):
    """IPO, 2310.12036 eq. 17: (c / |c| - r / |r| - 1 / (2 beta))^2, with log-ratios divided by
    length as in the authors' code (the paper sums)."""
    margin_P = chosen_score_P / chosen_length_P - rejected_score_P / rejected_length_P
    return (margin_P - 1 / (2 * beta)).square()


def hinge(chosen_score_P, rejected_score_P, beta):
    """SLiC, 2305.10425: relu(1 - beta (c - r))."""
    return torch.relu(1 - beta * (chosen_score_P - rejected_score_P))


def robust(chosen_score_P, rejected_score_P, beta, smoothing):
    """Robust DPO, 2403.00409: an unbiased loss if a share `smoothing` < 1/2 of the pairs is
    swapped.

    (- (1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e),  z = beta (c - r)
    """
    if not 0 <= smoothing < 0.5:
        raise InputError(
            f"--smoothing {smoothing}: robust needs the share of swapped pairs, 0 to below 0.5."
        )
    z_P = beta * (chosen_score_P - rejected_score_P)
    swapped_P = smoothing * F.logsigmoid(-z_P)
    return (swapped_P - (1 - smoothing) * F.logsigmoid(z_P)) / (1 - 2 * smoothing)


def exo(chosen_score_P, rejected_score_P, beta, smoothing):
    """EXO, 2402.00856 eq. 16: KL((q, 1 - q) || (1 - e, e)), q = sigmoid(beta (c - r)), e:
    smoothing."""
    if not 0 < smoothing < 0.5:
        raise InputError(
            f"--smoothing {smoothing}: exo needs more than 0 (such as 1e-3) and less than 0.5."
        )
    z_P = beta * (chosen_score_P - rejected_score_P)
    log_q_P, log_not_q_P = F.logsigmoid(z_P), F.logsigmoid(-z_P)
    return log_q_P.exp() * (log_q_P - math.log1p(-smoothing)) + log_not_q_P.exp() * (
        log_not_q_P - math.log(smoothing)
    )


def discopop(chosen_score_P, rejected_score_P, beta):
    """DiscoPOP, 2406.08414 eq. 5, found by search: (1 - m) (- log sigmoid(z)) + m e^-z,
    m = sigmoid(z / tau), z = beta (c - r); tau = 0.05 is the paper's."""
    z_P = beta * (chosen_score_P - rejected_score_P)
    log_m_P = F.logsigmoid(z_P / 0.05)
    # m e^-z as the exponential of a sum: neither factor overflows at a very low margin
    return (log_m_P - z_P).exp() - (1 - torch.sigmoid(z_P / 0.05)) * F.logsigmoid(z_P)


def nca(chosen_ratio_P, rejected_ratio_P, beta):
    """NCA, 2402.05369: raises the chosen answer itself, not only its margin over the rejected one.

    - log sigmoid(beta c) - (log sigmoid(- beta c) + log sigmoid(- beta r)) / 2
    """
    c_P, r_P = beta * chosen_ratio_P, beta * rejected_ratio_P
    return -F.logsigmoid(c_P) - 0.5 * F.logsigmoid(-c_P) - 0.5 * F.logsigmoid(-r_P)


def sppo(chosen_ratio_P, rejected_ratio_P, beta):
    """SPPO, 2405.00675 eq. 4.7 with hard labels: (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2."""
    return (chosen_ratio_P - 0.5 / beta).square() + (rejected_ratio_P + 0.5 / beta).square()


def apo_zero(chosen_ratio_P, rejected_ratio_P, beta):
    """APO-zero, 2408.06266 eq. 7: chosen up, rejected down; for chosen answers better than the
    model's own. sigmoid(- beta c) + sigmoid(beta r)"""
    return torch.sigmoid(-(beta * chosen_ratio_P)) + torch.sigmoid(beta * rejected_ratio_P)


def apo_down(chosen_ratio_P, rejected_ratio_P, beta):
    """APO-down, eq. 8: both down, the rejected further; for chosen answers worse than the model's
    own. sigmoid(beta c) + sigmoid(beta (r - c))"""
    c_P, r_P = beta * chosen_ratio_P, beta * rejected_ratio_P
    return torch.sigmoid(c_P) + torch.sigmoid(r_P - c_P)


def simpo(
    chosen_logp_P, rejected_logp_P, chosen_length_P, rejected_length_P, beta, gamma, smoothing
):
    """SimPO, 2405.14734 eq. 6: - log sigmoid(beta (logp_c / |c| - logp_r / |r|) - gamma); gamma is
    a target margin."""
    c_P = beta * (chosen_logp_P / chosen_length_P)
    r_P = beta * (rejected_logp_P / rejected_length_P)
    return _smoothed(c_P - r_P - gamma, smoothing)


def sft(chosen_nll_P, nll_tokens):
    """nll of the chosen answer, per token of the step; added to another loss: RPO 2404.19733."""
    return chosen_nll_P / nll_tokens


def cpo(chosen_logp_P, rejected_logp_P, chosen_nll_P, nll_tokens, beta, smoothing):
    """CPO, 2401.08417 eq. 3: DPO with a uniform reference, and the nll of the chosen answer."""
    z_P = beta * chosen_logp_P - beta * rejected_logp_P
    return _smoothed(z_P, smoothing) + chosen_nll_P / nll_tokens


def orpo(
    chosen_logp_P,
    rejected_logp_P,
    chosen_length_P,
    rejected_length_P,
    chosen_nll_P,
    nll_tokens,
    beta,
):
    """ORPO, 2403.07691 eq. 6: nll of prompt and chosen answer, and the log odds ratio of mean
    log-probs m: - beta log sigmoid(log_odds(m_c) - log_odds(m_r)), log_odds(m) = m - log(1 -
    e^m)."""
    mean_c_P = chosen_logp_P / chosen_length_P
    mean_r_P = rejected_logp_P / rejected_length_P
    log_odds_c_P = mean_c_P - log1mexp(mean_c_P)
    log_odds_r_P = mean_r_P - log1mexp(mean_r_P)
    return chosen_nll_P / nll_tokens - beta * F.logsigmoid(log_odds_c_P - log_odds_r_P)


# Losses in which a pair depends on the other pairs of the optimizer step: train_kto.py.
def bco(chosen_ratio_P, rejected_ratio_P, beta, shift):
    """BCO, 2404.04656: a classifier of good and bad, - log sigmoid(beta c - d) - log sigmoid(d -
    beta r). d, the boundary between them, is `shift`: the running mean of all rewards."""
    c_P, r_P = beta * chosen_ratio_P, beta * rejected_ratio_P
    return -F.logsigmoid(c_P - shift) - F.logsigmoid(shift - r_P)


def aot(chosen_logp_P, rejected_logp_P, chosen_ref_logp_P, rejected_ref_logp_P, beta, smoothing):
    """AOT, 2406.05882, paired: margins of the policy above those of the reference, quantile by
    quantile of the step."""
    policy_P = (chosen_logp_P - rejected_logp_P).sort().values
    reference_P = (chosen_ref_logp_P - rejected_ref_logp_P).sort().values
    return _smoothed(beta * (policy_P - reference_P), smoothing)


def aot_unpaired(chosen_ratio_P, rejected_ratio_P, beta, smoothing):
    """AOT, unpaired: log-ratios of chosen answers above those of rejected ones, quantile by
    quantile."""
    c_P, r_P = chosen_ratio_P.sort().values, rejected_ratio_P.sort().values
    return _smoothed(beta * (c_P - r_P), smoothing)


def kto(chosen_ratio_P, rejected_ratio_P, label_P, beta, label_weights):
    """KTO, 2402.01306 eq. 8, on unpaired rows: the "chosen" one is the row's completion, the
    "rejected" one another row's completion after the same prompt, from which the KL is estimated.

    desirable (label 1):  w_d sigmoid(beta (kl - ratio))     kl = max(0, mean of mismatched ratios)
    undesirable:          w_u sigmoid(beta (ratio - kl))
    """
    kl = rejected_ratio_P.detach().mean().clamp(min=0)
    desirable, undesirable = label_weights
    return torch.where(
        label_P > 0,
        desirable * torch.sigmoid(beta * (kl - chosen_ratio_P)),
        undesirable * torch.sigmoid(beta * (chosen_ratio_P - kl)),
    )


# To add a loss, write a function above and add it here.
PAIRED = (sigmoid, sigmoid_norm, ipo, hinge, robust, exo, discopop, nca, sppo, apo_zero, apo_down)
WITHOUT_REFERENCE = (simpo, sft, cpo, orpo)
LOSSES = {loss.__name__: loss for loss in PAIRED + WITHOUT_REFERENCE}
COUPLED = {loss.__name__: loss for loss in (kto, bco, aot, aot_unpaired)}


# ----------------------------------------------------------------------------- choosing and calling
def parameters(loss: Callable) -> list[str]:
    return list(inspect.signature(loss).parameters)


def any_reads(losses: list[Callable], ending: str) -> bool:
    """Whether a loss has a parameter with this ending, such as "_score_P"."""
    return any(name.endswith(ending) for loss in losses for name in parameters(loss))


def needs_reference(losses: list[Callable]) -> bool:
    return any(any_reads(losses, end) for end in ("_ratio_P", "_score_P", "_ref_logp_P"))


def weighted(losses: list[Callable], weights: list[float], pairs: dict, **scalars):
    """sum_k w_k loss_k -> loss_P. A loss gets what its parameters name, from pairs and scalars."""
    given = pairs | scalars
    total_P = 0
    for loss, weight in zip(losses, weights):
        total_P = total_P + weight * loss(**{name: given[name] for name in parameters(loss)})
    return total_P


# --------------------------------------------------------------------------------- what losses read
def read_pairs(sequences: dict, f_score: Callable = lambda log_ratio: log_ratio) -> dict:
    """{"logp", "ref_logp", "length", "nll": numbers [S] of sequences, chosen and rejected in turn}
    -> {"chosen_logp_P": ..., ...}, everything that losses read of pairs."""
    ratio_S = sequences["logp"] - sequences["ref_logp"]
    columns = {
        "logp": sequences["logp"],
        "ref_logp": sequences["ref_logp"],
        "ratio": ratio_S,
        "score": f_score(ratio_S),
        "length": sequences["length"].clamp(min=1),
        "nll": sequences["nll"],
    }
    pairs = {}
    for name, x_S in columns.items():
        pairs[f"chosen_{name}_P"], pairs[f"rejected_{name}_P"] = x_S.view(-1, 2).T
    return pairs


def no_pairs() -> dict:
    """Zero pairs, to try a loss on: it rejects bad flags before it computes anything."""
    return read_pairs({name: torch.zeros(0) for name in ("logp", "ref_logp", "length", "nll")})


# f'(t) of an f-divergence at log t, up to a constant, in place of the KL's log t: 2309.16240.
# Exponents are capped at 80.
def reverse_kl(log_ratio):
    """log t."""
    return log_ratio


def forward_kl(log_ratio):
    """- 1/t, plus 1."""
    return 1 - torch.exp((-log_ratio).clamp(max=80))


def js(log_ratio):
    """log(2 t / (1 + t))."""
    return math.log(2) + F.logsigmoid(log_ratio)


def alpha_divergence(log_ratio, alpha: float):
    """(t^(alpha - 1) - 1) / (alpha - 1), as in TRL; alpha here is 1 - alpha of 2309.16240."""
    if alpha == 1:
        return log_ratio
    return torch.expm1(((alpha - 1) * log_ratio).clamp(max=80)) / (alpha - 1)


# ---------------------------------------------------------------------------------------- metrics
def pair_metrics(pairs: dict, beta: float, losses: list[Callable] = ()) -> dict[str, torch.Tensor]:
    """rewards/* and logps/* as in TRL: sums over pairs, for Meter.add(pairs, ...).

    Rewards are beta times the log-ratio, also for ipo and sigmoid_norm; beta times the log-prob per
    token if that is what the losses compare (simpo, orpo). rewards/accuracies counts a tie as
    wrong; rewards/ties counts ties, such as all pairs while policy and reference are equal.
    """
    chosen_P, rejected_P = beta * pairs["chosen_ratio_P"], beta * pairs["rejected_ratio_P"]
    if normalised(losses):
        chosen_P = chosen_P / pairs["chosen_length_P"]
        rejected_P = rejected_P / pairs["rejected_length_P"]
    return {
        "rewards/chosen": chosen_P.sum(),
        "rewards/rejected": rejected_P.sum(),
        "rewards/margins": (chosen_P - rejected_P).sum(),
        "rewards/accuracies": (chosen_P > rejected_P).sum(),
        "rewards/ties": (chosen_P == rejected_P).sum(),
        "logps/chosen": pairs["chosen_logp_P"].sum(),
        "logps/rejected": pairs["rejected_logp_P"].sum(),
    }


def normalised(losses: list[Callable]) -> bool:
    """Whether all losses that compare two answers compare their log-probs per token."""
    names = [set(parameters(loss)) for loss in losses]
    comparing = [x for x in names if any(name.startswith("rejected_") for name in x)]
    per_token = {"rejected_logp_P", "rejected_length_P"}
    return bool(comparing) and all(per_token <= x for x in comparing)


def label_metrics(pairs: dict, label_P, beta: float) -> dict[str, tuple]:
    """The same for labelled rows (KTO) -> {name: (sum, count)}: "chosen" are the rows of label 1,
    "rejected" those of label 0; accuracies and ties compare each of the former with each of the
    latter."""
    good_P = label_P > 0
    reward_P, logp_P = beta * pairs["chosen_ratio_P"].detach(), pairs["chosen_logp_P"].detach()
    right = reward_P[good_P][:, None] > reward_P[~good_P]
    tied = reward_P[good_P][:, None] == reward_P[~good_P]
    return {
        "rewards/chosen": (reward_P[good_P].sum(), good_P.sum()),
        "rewards/rejected": (reward_P[~good_P].sum(), (~good_P).sum()),
        "rewards/accuracies": (right.sum(), right.numel()),
        "rewards/ties": (tied.sum(), tied.numel()),
        "logps/chosen": (logp_P[good_P].sum(), good_P.sum()),
        "logps/rejected": (logp_P[~good_P].sum(), (~good_P).sum()),
    }


# ------------------------------------------------------------------------------------ reward models
def reward_model_loss(score_S, margin_P, centre: float):
    """- log sigmoid(r_c - r_r - margin) + centre (r_c + r_r)^2 -> loss_P. Bradley-Terry 2203.02155
    eq. 1; the margin: 2307.09288 eq. 2; centring: 2312.09244."""
    chosen_P, rejected_P = score_S.view(-1, 2).T
    preferred_P = -F.logsigmoid(chosen_P - rejected_P - margin_P)
    return preferred_P + centre * (chosen_P + rejected_P).square()


def _smoothed(z, smoothing):
    return -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)


def log1mexp(x):
    """log(1 - e^x) for x < 0, without cancellation; at 0, where it is unbounded, its value one
    rounding step below 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
