"""Losses of pairs: a chosen answer above a rejected one.

Shapes: P pairs, S = 2 P sequences, of which 2p is the chosen one of pair p and 2p + 1 the rejected one."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanopost import InputError, dist
from nanopost.batch import Example
from nanopost.forward import logprobs
from nanopost.losses import per_sequence


# ------------------------------------------------------------------------------------------------- preferences
@dataclass
class Pairs:
    """P pairs as a preference loss sees them. Sequences 2p and 2p + 1 of a batch are the chosen and the rejected one.

    logp_S, ref_logp_S: log-probs summed over the completion, under policy and reference (0 without one).
    length_S: tokens of that completion. nll_S: - log-probs summed over all trained tokens, which for orpo are those of
    the prompt too. nll_tokens: trained tokens of the chosen sequences, a mean over the pairs of the optimizer step.
    KTO has no pairs: there the first is a row's completion, the second that of another row, label_P: the first is good.
    """

    logp_S: torch.Tensor
    ref_logp_S: torch.Tensor
    length_S: torch.Tensor
    nll_S: torch.Tensor | None = None
    nll_tokens: float = 1.0
    label_P: torch.Tensor | None = None
    divergence: str = "reverse_kl"
    alpha: float = 1.0

    @property
    def ratio_2P(self):
        """Log-ratios policy / reference of the chosen, of the rejected -> [2, P]."""
        return (self.logp_S - self.ref_logp_S).view(-1, 2).T

    @property
    def mean_logp_2P(self):
        return (self.logp_S / self.length_S.clamp(min=1)).view(-1, 2).T

    @property
    def score_2P(self):
        """f'(ratio) of the f-divergence that stands for the KL (2309.16240): the log-ratio for the reverse KL."""
        return f_score(self.ratio_2P, self.divergence, self.alpha)

    @property
    def margin_P(self):
        chosen_P, rejected_P = self.score_2P
        return chosen_P - rejected_P

    @property
    def mean_margin_P(self):
        """The same with each score divided by the length of its completion."""
        chosen_P, rejected_P = self.score_2P / self.length_S.clamp(min=1).view(-1, 2).T
        return chosen_P - rejected_P


def f_score(log_ratio, divergence: str, alpha: float):
    """f'(t) at log t, up to a constant: reverse_kl log t; forward_kl - 1/t; js log(2t / (1 + t)); alpha
    (t^(alpha - 1) - 1) / (alpha - 1), as in TRL: 2309.16240 calls 1 - alpha what is alpha here. Exponents end at 80."""
    if divergence == "reverse_kl" or divergence == "alpha" and alpha == 1:
        return log_ratio
    if divergence == "forward_kl":
        return 1 - torch.exp((-log_ratio).clamp(max=80))
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    if divergence == "alpha":
        return torch.expm1(((alpha - 1) * log_ratio).clamp(max=80)) / (alpha - 1)
    raise InputError(f"Divergence {divergence!r} is none of reverse_kl, forward_kl, js and alpha.")


# Each takes Pairs, beta and smoothing (the share of pairs thought to be swapped, where the loss knows that) and gives
# loss_P. The loop sums it and divides by the pairs of the optimizer step.
def pair_sigmoid(p: Pairs, beta: float, smoothing: float = 0.0):
    """DPO, 2305.18290 eq. 7; with smoothing cDPO (ericmitchell.ai/cdpo.pdf), the cross-entropy to 1 - smoothing."""
    return smoothed_sigmoid(beta * p.margin_P, smoothing)


def pair_sigmoid_norm(p: Pairs, beta: float, smoothing: float = 0.0):
    """The same with log-ratios divided by length (length-normalised DPO, 2411.15124)."""
    return smoothed_sigmoid(beta * p.mean_margin_P, smoothing)


def pair_ipo(p: Pairs, beta: float, smoothing: float = 0.0):
    """IPO 2310.12036 eq. 17, with log-ratios divided by length, as in the authors' code (the paper sums)."""
    return (p.mean_margin_P - 1 / (2 * beta)).square()


def pair_hinge(p: Pairs, beta: float, smoothing: float = 0.0):
    """SLiC 2305.10425: relu(1 - beta margin)."""
    return torch.relu(1 - beta * p.margin_P)


def pair_robust(p: Pairs, beta: float, smoothing: float):
    """Robust DPO 2403.00409: an unbiased loss if a share `smoothing` < 1/2 of the pairs is swapped."""
    if not 0 <= smoothing < 0.5:
        raise InputError(
            f"--smoothing {smoothing}: robust needs the share of swapped pairs, from 0 to below 0.5."
        )
    z_P = beta * p.margin_P
    return (smoothing * F.logsigmoid(-z_P) - (1 - smoothing) * F.logsigmoid(z_P)) / (
        1 - 2 * smoothing
    )


def pair_exo(p: Pairs, beta: float, smoothing: float):
    """EXO 2402.00856 eq. 16: KL(policy's preference || (1 - smoothing, smoothing))."""
    if not 0 < smoothing < 0.5:
        raise InputError(
            f"--smoothing {smoothing}: exo needs more than 0 (such as 1e-3) and less than 0.5."
        )
    log_q_P, log_other_P = F.logsigmoid(beta * p.margin_P), F.logsigmoid(-beta * p.margin_P)
    return log_q_P.exp() * (log_q_P - math.log1p(-smoothing)) + log_other_P.exp() * (
        log_other_P - math.log(smoothing)
    )


def pair_nca(p: Pairs, beta: float, smoothing: float = 0.0):
    """NCA 2402.05369: raises the chosen in itself, not only above the rejected."""
    chosen_P, rejected_P = beta * p.ratio_2P
    return -F.logsigmoid(chosen_P) - 0.5 * F.logsigmoid(-chosen_P) - 0.5 * F.logsigmoid(-rejected_P)


def pair_bco(p: Pairs, beta: float, smoothing: float = 0.0, shift: float = 0.0):
    """BCO 2404.04656: a classifier of good and bad; shift: running mean of all rewards, the boundary between them."""
    chosen_P, rejected_P = beta * p.ratio_2P
    return -F.logsigmoid(chosen_P - shift) - F.logsigmoid(shift - rejected_P)


def pair_sppo(p: Pairs, beta: float, smoothing: float = 0.0):
    """SPPO 2405.00675 eq. 4.7 with hard labels."""
    chosen_P, rejected_P = p.ratio_2P
    return (chosen_P - 0.5 / beta).square() + (rejected_P + 0.5 / beta).square()


def pair_aot(p: Pairs, beta: float, smoothing: float = 0.0):
    """AOT 2406.05882, paired: margins of the policy above those of the reference, quantile by quantile of the step."""
    policy_P, reference_P = (
        (x_S.view(-1, 2) @ x_S.new_tensor([1.0, -1.0])) for x_S in (p.logp_S, p.ref_logp_S)
    )
    return smoothed_sigmoid(beta * (policy_P.sort().values - reference_P.sort().values), smoothing)


def pair_aot_unpaired(p: Pairs, beta: float, smoothing: float = 0.0):
    """AOT, unpaired: log-ratios of chosen completions above those of rejected ones, quantile by quantile."""
    chosen_P, rejected_P = p.ratio_2P.sort(1).values
    return smoothed_sigmoid(beta * (chosen_P - rejected_P), smoothing)


def pair_apo_zero(p: Pairs, beta: float, smoothing: float = 0.0):
    """APO-zero 2408.06266 eq. 7: chosen up, rejected down; for chosen ones better than the model's own."""
    chosen_P, rejected_P = beta * p.ratio_2P
    return torch.sigmoid(-chosen_P) + torch.sigmoid(rejected_P)


def pair_apo_down(p: Pairs, beta: float, smoothing: float = 0.0):
    """APO-down, eq. 8: both down, the rejected further; for chosen ones worse than the model's own."""
    chosen_P, rejected_P = beta * p.ratio_2P
    return torch.sigmoid(chosen_P) + torch.sigmoid(rejected_P - chosen_P)


def pair_discopop(p: Pairs, beta: float, smoothing: float = 0.0, tau: float = 0.05):
    """DiscoPOP 2406.08414 eq. 5: between a logistic and an exponential loss, found by search; tau is the paper's."""
    z_P = beta * p.margin_P
    share_P = torch.sigmoid(
        z_P / tau
    )  # times e^-z as the exponent of a sum: neither overflows at a very low margin
    return (F.logsigmoid(z_P / tau) - z_P).exp() - (1 - share_P) * F.logsigmoid(z_P)


def pair_simpo(p: Pairs, beta: float, smoothing: float = 0.0, gamma: float = 0.5):
    """SimPO 2405.14734 eq. 6: mean log-probs, a target margin gamma, no reference."""
    chosen_P, rejected_P = beta * p.mean_logp_2P
    return smoothed_sigmoid(chosen_P - rejected_P - gamma, smoothing)


def pair_sft(p: Pairs, beta: float = 0.0, smoothing: float = 0.0):
    """nll of the chosen one per token of the step; beside another loss: RPO 2404.19733."""
    return p.nll_S[0::2] / p.nll_tokens


def pair_cpo(p: Pairs, beta: float, smoothing: float = 0.0):
    """CPO 2401.08417 eq. 3: DPO with a uniform reference, and the nll of the chosen one (beside sft: more of it)."""
    chosen_P, rejected_P = beta * p.logp_S.view(-1, 2).T
    return smoothed_sigmoid(chosen_P - rejected_P, smoothing) + pair_sft(p)


def pair_orpo(p: Pairs, beta: float, smoothing: float = 0.0):
    """ORPO 2403.07691 eq. 6: nll of prompt and chosen one, and the log odds ratio of mean log-probs; no reference."""
    log_odds_2P = p.mean_logp_2P - log1mexp(p.mean_logp_2P)
    return pair_sft(p) - beta * F.logsigmoid(log_odds_2P[0] - log_odds_2P[1])


def kto(
    p: Pairs, beta: float, smoothing: float = 0.0, desirable: float = 1.0, undesirable: float = 1.0
):
    """KTO 2402.01306 eq. 8: value of a row against the KL, estimated from the mismatched pairs of the whole step."""
    ratio_P, mismatched_P = p.ratio_2P
    kl = mismatched_P.detach().mean().clamp(min=0)
    return torch.where(
        p.label_P > 0,
        desirable * torch.sigmoid(beta * (kl - ratio_P)),
        undesirable * torch.sigmoid(beta * (ratio_P - kl)),
    )


PREFERENCE = {
    "sigmoid": pair_sigmoid,
    "sigmoid_norm": pair_sigmoid_norm,
    "ipo": pair_ipo,
    "hinge": pair_hinge,
    "robust": pair_robust,
    "exo": pair_exo,
    "nca": pair_nca,
    "bco": pair_bco,
    "sppo": pair_sppo,
    "aot": pair_aot,
    "aot_unpaired": pair_aot_unpaired,
    "apo_zero": pair_apo_zero,
    "apo_down": pair_apo_down,
    "discopop": pair_discopop,
    "simpo": pair_simpo,
    "sft": pair_sft,
    "cpo": pair_cpo,
    "orpo": pair_orpo,
    "kto": kto,
}


REFERENCE_FREE = {"simpo", "sft", "cpo", "orpo"}


OF_MARGINS = {
    "sigmoid",
    "sigmoid_norm",
    "ipo",
    "hinge",
    "robust",
    "exo",
    "discopop",
}  # know a --divergence


COUPLED = {
    "bco",
    "aot",
    "aot_unpaired",
    "kto",
}  # a pair's loss depends on the other pairs of the optimizer step


def preference_metrics(p: Pairs, loss_P, beta: float, by_label: bool = False) -> dict:
    """loss, and what TRL calls rewards/* and logps/*: {name: (sum, count)}. by_label (KTO): of rows of either label."""
    loss = {"loss": (loss_P.detach().sum(), len(loss_P))}
    chosen_P, rejected_P = beta * p.ratio_2P.detach()
    logp_2P = p.logp_S.detach().view(-1, 2).T
    if by_label:
        good_P = p.label_P > 0
        right = (
            chosen_P[good_P][:, None] > chosen_P[~good_P]
        )  # any desirable row against any undesirable one
        return (
            loss
            | {"rewards/accuracies": (right.sum(), right.numel())}
            | {
                f"{kind}/{name}": (x_P[which_P].sum(), which_P.sum())
                for kind, x_P in (("rewards", chosen_P), ("logps", logp_2P[0]))
                for name, which_P in (("chosen", good_P), ("rejected", ~good_P))
            }
        )
    values = {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margins": chosen_P - rejected_P,
        "rewards/accuracies": chosen_P > rejected_P,
        "logps/chosen": logp_2P[0],
        "logps/rejected": logp_2P[1],
    }
    return loss | {name: (x_P.sum(), len(x_P)) for name, x_P in values.items()}


def wpo_weight(logp_N, half_logp_N, weight_N, seq_N, num_sequences: int):
    """WPO 2406.11827 with sampled alignment: exp of the mean over an answer of log p - log sum_v p_v^2, both answers'
    multiplied -> weight_P, detached.

    half_logp_N: log-probs at temperature 1/2, 2 z_y - lse(2 z); log p = z_y - lse(z) off them leaves just that.
    """
    answer_N = (weight_N > 0).to(logp_N.dtype)
    sum_S, length_S = (
        per_sequence(x_N, seq_N, num_sequences)
        for x_N in ((half_logp_N - logp_N).detach() * answer_N, answer_N)
    )
    return (sum_S / length_S.clamp(min=1)).exp().view(-1, 2).prod(1)


def reward_model_loss(score_S, margin_P, centre: float):
    """- log sigmoid(r_c - r_r - margin) + centre (r_c + r_r)^2 -> loss_P. Bradley-Terry 2203.02155 eq. 1; the margin:
    2307.09288 eq. 2; centring: 2312.09244."""
    chosen_P, rejected_P = score_S.view(-1, 2).T
    return (
        -F.logsigmoid(chosen_P - rejected_P - margin_P) + centre * (chosen_P + rejected_P).square()
    )


def smoothed_sigmoid(z, smoothing):
    return -(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)


def log1mexp(x):
    """log(1 - exp(x)) for x < 0, without cancellation; at 0, where it has no bound, its value a rounding below 0."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def gathered(model, pairs: list, tokens: int, device, **options) -> tuple[Pairs, slice]:
    """The pairs of all ranks under the model as it is -> (Pairs in float64, which of its sequences are this rank's).

    logp_S and nll_S are leaves: loss_P.sum().backward() on a loss of the whole step leaves in their .grad what each
    sequence's log-prob has to be multiplied with, and a second pass in micro-batches of any size has that gradient
    exactly. options: those of Pairs. A collective.
    """
    examples = [e for pair in pairs for e in pair]
    table = [
        [
            float(x)
            for x in (
                (logp * e.columns["weight"]).sum(),
                -logp.sum(),
                e.columns["ref_logp"],
                e.columns["length"],
                e.num_targets,
                e.columns.get("label", 1.0),
            )
        ]
        for e, logp in zip(examples, logprobs(model, examples, tokens, 1.0, device))
    ]
    before = sum(dist.gather([len(table)])[: torch.distributed.get_rank()])
    table, mine = dist.gather(table), slice(before, before + len(table))
    logp_S, nll_S, ref_S, length_S, trained_S, label_S = (
        torch.tensor(table, dtype=torch.float64).view(len(table), 6).T
    )
    return Pairs(
        logp_S.clone().requires_grad_(),
        ref_S,
        length_S,
        nll_S.clone().requires_grad_(),
        float(trained_S[0::2].mean()),
        label_S[0::2],
        **options,
    ), mine


def pulled_back(pairs: list, p: Pairs, mine: slice) -> list[tuple[Example]]:
    """After loss_P.sum().backward() on gathered pairs -> this rank's examples, each alone, with the columns slope and
    nll_slope: the second pass is (slope_S logp_S + nll_slope_S nll_S).sum(). Those with neither need no pass."""
    slopes_2S = [
        torch.zeros_like(x_S) if x_S.grad is None else x_S.grad for x_S in (p.logp_S, p.nll_S)
    ]
    examples = [e for pair in pairs for e in pair]
    for e, *slopes in zip(examples, *(x_S[mine].tolist() for x_S in slopes_2S)):
        e.columns["slope"], e.columns["nll_slope"] = slopes
    return [(e,) for e in examples if e.columns["slope"] or e.columns["nll_slope"]]


def of_batch(batch, logp_N, nll_tokens: float, **options) -> Pairs:
    """The pairs of a micro-batch; the options are those of Pairs."""
    logp_S, nll_S = (
        per_sequence(x_N, batch.seq_N, batch.num_sequences)
        for x_N in (logp_N * batch["weight"], -logp_N)
    )
    return Pairs(logp_S, batch["ref_logp"], batch["length"], nll_S, nll_tokens, **options)
