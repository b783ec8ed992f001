"""Every loss, a pure function: tensors and scalars in, (sum, metrics) out.

Shapes: N packed tokens of a micro-batch, S sequences in it.

A loss is a sum, so that micro-batches and ranks add up. The loop divides it by a count of the whole optimizer
step: tokens, sequences, or sequences x max_new_tokens, as token_weights says. Metrics are sums over tokens,
0-dim and detached; the loop divides those by the trained tokens of the step, whatever the aggregation.

Masked positions hold 0 in logp_N, old_logp_N, ref_logp_N and adv_N, and give exactly 0 to sums and gradients.
A sequence lies whole in one micro-batch.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanopost import InputError


# ------------------------------------------------------------------------------------- supervised fine-tuning
def sft_nll(logp_N, mask_N):
    """- sum_t log p(y_t | x, y_<t) -> (sum, {}); divide by the trained tokens. mask_N: bool."""
    return -masked(logp_N, mask_N).sum(), {}


def sft_dft(logp_N, mask_N):
    """Dynamic fine-tuning, 2508.05629: - sum_t sg[p_t] log p_t, sg: stop-gradient -> (sum, {}).

    The factor p cancels the 1/p which makes nll a policy gradient with unbounded weight on unlikely tokens.
    """
    logp_N = masked(logp_N, mask_N)
    return -(logp_N.detach().exp() * logp_N).sum(), {}


# ------------------------------------------------------------------------------------------- policy gradients
def token_weights(mask_N, seq_N, num_sequences: int, how: str):
    """w_it of the sum over tokens -> weight_N (default dtype), 0 where masked.

    how      weight   the loop divides the summed loss by            objective
    sequence 1/|y_i|  sequences of the optimizer step                GRPO 2402.03300 eq. 3
    token    1        trained tokens of the optimizer step           DAPO 2503.14476 eq. 8
    constant 1        sequences of the step x max_new_tokens         Dr. GRPO 2503.20783
    sequence_sum 1    sequences of the optimizer step                LUSPO 2602.05261
    """
    if how not in ("sequence", "token", "constant", "sequence_sum"):
        raise InputError(
            f"Aggregation {how!r} is none of sequence, token, constant and sequence_sum."
        )
    weight_N = mask_N.to(torch.get_default_dtype())
    return (
        weight_N / sequence_length(mask_N, seq_N, num_sequences) if how == "sequence" else weight_N
    )


def log_ratio(logp_N, old_logp_N, mask_N, seq_N, num_sequences: int, level: str):
    """Log of the importance ratio policy / old policy at each token -> log_ratio_N, 0 where masked.

    token         log pi_t - log pi_old,t
    sequence      the mean of those over the sequence, the same at all its tokens: GSPO 2507.18071 eq. 7
    sequence_sum  their sum, the true ratio of the whole completion: RLOO 2402.14740
    The gradient of a sequence level reaches all tokens; under the weights "sequence" a sequence counts once. At 80 it
    ends: e^89 is infinite in fp32, and what clipping leaves of its gradient would be NaN.
    """
    log_ratio_N = masked(logp_N - old_logp_N, mask_N)
    if level == "token":
        return log_ratio_N.clamp(max=80.0)
    if level not in ("sequence", "sequence_sum"):
        raise InputError(f"Ratio {level!r} is none of token, sequence and sequence_sum.")
    sum_N = masked(sequence_sum(log_ratio_N, seq_N, num_sequences), mask_N)
    return (
        sum_N / sequence_length(mask_N, seq_N, num_sequences)
        if level == "sequence"
        else sum_N.clamp(max=80.0)
    )


def policy_loss_clip(log_ratio_N, adv_N, weight_N, clip_low: float, clip_high: float, delta=None):
    """- sum_t w_t min(min(r_t, delta) A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) -> (sum, metrics)

    PPO's objective (1707.06347 eq. 7) as in GRPO; a low and a high end: DAPO 2503.14476 eq. 8. delta,
    above 1 + clip_high, bounds the ratio where A < 0 and the clip does not (two-sided, 2505.07291).
    metrics clip_ratio/{low,high,region}_mean: tokens where the clip cuts the gradient off.
    """
    if delta is not None and delta < 1:
        raise InputError(
            f"--delta {delta} would cut on-policy ratios, which are 1: give more than 1 + --clip_high."
        )
    ratio_N = log_ratio_N.exp()
    capped_N = ratio_N if delta is None else ratio_N.clamp(max=delta)
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = -torch.min(capped_N * adv_N, clipped_N * adv_N)
    low = ((ratio_N < 1 - clip_low) & (adv_N < 0)).sum()
    high = ((ratio_N > 1 + clip_high) & (adv_N > 0)).sum()
    return (weight_N * loss_N).sum(), {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
    }


def policy_loss_cispo(log_ratio_N, logp_N, adv_N, weight_N, cap: float):
    """- sum_t w_t sg[min(r_t, cap)] A_t log pi_t -> (sum, metrics): CISPO 2506.13585 eq. 4 and 5.

    cap bounds the RATIO: it is the paper's 1 + eps_high. (TRL compares its epsilon_high with the ratio too;
    its default 0.2 cuts nearly all.) No token loses its gradient here, as rare ones do under the clip of PPO.
    metrics cispo_clip_ratio: tokens of positive advantage with a ratio above the cap.
    """
    if cap < 1:
        raise InputError(
            f"The CISPO cap {cap} would cut on-policy ratios, which are 1: it bounds the ratio, "
            f"so the paper's eps_high = {cap} is a cap of {1 + cap}."
        )
    ratio_N = log_ratio_N.detach().exp()
    loss_N = -ratio_N.clamp(max=cap) * adv_N * logp_N
    return (weight_N * loss_N).sum(), {"cispo_clip_ratio": ((ratio_N > cap) & (adv_N > 0)).sum()}


def policy_loss_sapo(log_ratio_N, adv_N, weight_N, tau_positive: float, tau_negative: float):
    """- sum_t w_t A_t (4 / tau) sigmoid(tau (r_t - 1)) -> (sum, {}): SAPO 2511.20347, a soft gate instead of a clip.

    tau: one for A > 0, one for the rest. At r = 1 its slope is that of r; further away on both sides it fades.
    """
    if min(tau_positive, tau_negative) <= 0:
        raise InputError(f"--sapo_tau {tau_positive} {tau_negative}: give two numbers above 0.")
    tau_N = torch.where(adv_N > 0, tau_positive, tau_negative)
    return (
        weight_N * -adv_N * torch.sigmoid(tau_N * torch.expm1(log_ratio_N)) * 4 / tau_N
    ).sum(), {}


def off_policy_mask(
    logp_N, engine_logp_N, adv_N, mask_N, seq_N, num_sequences: int, threshold: float
):
    """Which tokens stay: all but those of sequences with A < 0 whose mean log-prob has fallen by more than `threshold`
    since they were sampled (DeepSeek-V3.2 2512.02556, off-policy sequence masking) -> keep_N bool."""
    fallen_N = log_ratio(engine_logp_N, logp_N.detach(), mask_N, seq_N, num_sequences, "sequence")
    return (adv_N >= 0) | (fallen_N <= threshold)


def value_loss(value_N, old_value_N, return_N, mask_N, clip: float):
    """sum_t max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2 -> (sum, metrics)

    As in PPO's code: a value that has moved further than clip gains nothing by going on. metrics val/clipfrac_avg:
    tokens where the clipped term is the larger one.
    """
    clipped_N = value_N.clamp(
        old_value_N - clip, old_value_N + clip
    )  # exactly V where nothing is clipped
    error_N, clipped_error_N = (value_N - return_N).square(), (clipped_N - return_N).square()
    loss = masked(torch.max(error_N, clipped_error_N), mask_N).sum() / 2
    return loss, {"val/clipfrac_avg": (masked(clipped_error_N - error_N, mask_N) > 0).sum()}


def kl_estimate(logp_N, ref_logp_N, kind: str):
    """Estimate of KL(pi || ref) from the sampled token alone -> kl_N (joschu.net/blog/kl-approx.html).

    With q = ref / pi at a token drawn from pi, and KL that of the distributions after its prefix:
                        expected value     expected gradient as a loss
    k1  - log q         KL(pi || ref)      0: useless in a loss, right in a reward
    k2  (log q)^2 / 2   biased             that of KL(pi || ref), exactly
    k3  q - 1 - log q   KL(pi || ref)      that of KL(ref || pi), the forward KL; never negative
    """
    log_q_N = ref_logp_N - logp_N
    if kind == "k1":
        return -log_q_N
    if kind == "k2":
        return log_q_N.square() / 2
    if kind == "k3":
        return log_q_N.expm1() - log_q_N
    raise InputError(f"KL estimator {kind!r} is none of k1, k2 and k3.")


def importance_weight(
    trainer_logp_N,
    engine_logp_N,
    mask_N,
    seq_N,
    num_sequences: int,
    level: str,
    mode: str,
    cap: float,
):
    """Ratio trainer / engine, correcting for an engine that is not quite the trainer -> (weight_N, metrics).

    level  token: exp(trainer - engine); sequence: exp of the SUM over the sequence, at each of its tokens
    mode   truncate: min(ratio, cap) (TIS); mask: 0 above the cap (MIS)
    weight_N: detached, 0 where masked; multiply it into the weights of the policy loss (not of a KL). Metrics are sums
    over tokens of the ratios BEFORE the cap; sampling/capped counts those above it.
    """
    if level not in ("token", "sequence") or mode not in ("truncate", "mask"):
        raise InputError(
            f"Importance correction {level}-{mode}: token or sequence, and truncate or mask."
        )
    gap_N = masked(trainer_logp_N - engine_logp_N, mask_N).detach()
    ratio_N = (gap_N if level == "token" else sequence_sum(gap_N, seq_N, num_sequences)).exp()
    ratio_N = masked(ratio_N, mask_N)
    weight_N = ratio_N.clamp(max=cap) if mode == "truncate" else ratio_N.where(ratio_N <= cap, 0)
    return weight_N, {
        "sampling/sampling_logp_difference/mean": gap_N.abs().sum(),
        "sampling/importance_sampling_ratio/mean": ratio_N.sum(),
        "sampling/capped": (ratio_N > cap).sum(),
    }


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


# --------------------------------------------------------------------------------- sums over masks, sequences
def masked(x_N, mask_N):
    """x where mask, else 0: unlike a product it stops inf and NaN too, in value and in gradient."""
    return torch.where(mask_N, x_N, 0)


def per_sequence(x_N, seq_N, num_sequences: int):
    """Sum of x over each sequence -> [S]."""
    return x_N.new_zeros(num_sequences).index_add(0, seq_N, x_N)


def sequence_sum(x_N, seq_N, num_sequences: int):
    """Sum of x over the sequence of each token, at each token -> [N]."""
    return per_sequence(x_N, seq_N, num_sequences).index_select(0, seq_N)


def sequence_length(mask_N, seq_N, num_sequences: int):
    """Trained tokens in the sequence of each token, at least 1 -> [N] int64."""
    return sequence_sum(mask_N.long(), seq_N, num_sequences).clamp(min=1)
