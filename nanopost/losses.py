"""SFT, policy and value losses: pure functions of tensors and scalars -> (sum, metrics).

Shapes: N packed tokens of a micro-batch, S its sequences. `sequences` is a batch.Sequences.

A loss is a sum, so that micro-batches and ranks add up. The loop divides it by a count of the whole
optimizer step: tokens, sequences, or sequences x max_new_tokens (see divisor). Metrics are sums
over tokens, detached, for Meter.add(trained tokens, ...).

Masked positions hold 0 in logp_N, old_logp_N, ref_logp_N and adv_N, and contribute exactly 0 to
sums and gradients. Each sequence lies in a single micro-batch.
"""

import torch

from nanopost import InputError


# --------------------------------------------------------------------------- supervised fine-tuning
def sft_nll(logp_N, mask_N):
    """- sum_t log p(y_t | x, y_<t); divide by the trained tokens. mask_N: bool."""
    return -masked(logp_N, mask_N).sum()


def sft_dft(logp_N, mask_N):
    """Dynamic fine-tuning, 2508.05629: - sum_t sg[p_t] log p_t, where sg stops the gradient.

    The factor p cancels the 1/p that makes nll a policy gradient with unbounded weight on unlikely
    tokens.
    """
    logp_N = masked(logp_N, mask_N)
    return -(logp_N.detach().exp() * logp_N).sum()


# -------------------------------------------------------------------------------------- aggregation
def token_weights(sequences, how: str):
    """The weights w_it of the sum over tokens -> weight_N (default dtype), 0 where masked.

    how           weight   divisor of the step's sum (see divisor)   objective
    sequence      1/|y_i|  sequences                                 GRPO 2402.03300 eq. 3
    token         1        trained tokens                            DAPO 2503.14476 eq. 8
    constant      1        sequences x max_new_tokens                Dr. GRPO 2503.20783
    sequence_sum  1        sequences                                 LUSPO 2602.05261
    """
    if how not in ("sequence", "token", "constant", "sequence_sum"):
        raise InputError(
            f"aggregation {how!r} is not one of token, sequence, sequence_sum and constant."
        )
    weight_N = sequences.mask_N.to(torch.get_default_dtype())
    if how == "sequence":
        return weight_N / sequences.spread(sequences.length_S())
    return weight_N


def divisor(how: str, tokens: float, sequences: float, max_new_tokens: int) -> float:
    """What a loop divides its summed loss by, at least 1. tokens (trained ones) and sequences count
    the whole optimizer step, over all ranks and micro-batches."""
    counts = {
        "token": tokens,
        "sequence": sequences,
        "sequence_sum": sequences,
        "constant": sequences * max_new_tokens,
    }
    if how not in counts:
        raise InputError(f"aggregation {how!r} is not one of {', '.join(counts)}.")
    return max(1, counts[how])


# --------------------------------------------------------------------------------- policy gradients
def log_ratio(logp_N, old_logp_N, sequences, level: str):
    """Log of the importance ratio policy / old policy at each token -> log_ratio_N, 0 where masked.

    token         log pi_t - log pi_old,t
    sequence      their mean over the sequence, the same at all its tokens: GSPO 2507.18071 eq. 7
    sequence_sum  their sum, the true ratio of the whole completion: RLOO 2402.14740
    The gradient of a sequence-level ratio reaches all tokens; with the weights "sequence", each
    sequence counts once. Capped at 80: e^89 is infinite in fp32, and its clipped gradient would be
    NaN.
    """
    log_ratio_N = masked(logp_N - old_logp_N, sequences.mask_N)
    if level == "token":
        return log_ratio_N.clamp(max=80.0)
    if level not in ("sequence", "sequence_sum"):
        raise InputError(f"ratio {level!r} is not one of token, sequence and sequence_sum.")
    sum_N = masked(sequences.spread(sequences.sum(log_ratio_N)), sequences.mask_N)
    if level == "sequence":
        return sum_N / sequences.spread(sequences.length_S())
    return sum_N.clamp(max=80.0)


# The policy losses share one signature, so that a loop can pick one before it starts:
# (log_ratio_N, logp_N, adv_N, weight_N) -> (sum, metrics). CISPO and DPPO read logp_N.
def policy_loss_clip(log_ratio_N, logp_N, adv_N, weight_N, low: float, high: float):
    """- sum_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t), r_t = exp(log_ratio_t).

    PPO 1707.06347 eq. 7, as in GRPO; separate low and high: DAPO 2503.14476 eq. 8. Metrics
    clip_ratio/{low,high,region}_mean: tokens where the clip cuts the gradient off.
    """
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1 - low, 1 + high)
    loss_N = -torch.min(ratio_N * adv_N, clipped_N * adv_N)
    too_low = ((ratio_N < 1 - low) & (adv_N < 0)).sum()
    too_high = ((ratio_N > 1 + high) & (adv_N > 0)).sum()
    return (weight_N * loss_N).sum(), {
        "clip_ratio/low_mean": too_low,
        "clip_ratio/high_mean": too_high,
        "clip_ratio/region_mean": too_low + too_high,
    }


def policy_loss_cispo(log_ratio_N, logp_N, adv_N, weight_N, cap: float):
    """- sum_t w_t sg[min(r_t, cap)] A_t log pi_t, CISPO 2506.13585 eq. 4 and 5; sg stops the
    gradient.

    cap bounds the RATIO: it is the paper's 1 + eps_high. (TRL compares its epsilon_high with the
    ratio too; its default 0.2 cuts nearly everything.) No token loses its gradient here, as rare
    ones do under PPO's clip. Metric cispo_clip_ratio: tokens of positive advantage with a ratio
    above cap.
    """
    if cap < 1:
        raise InputError(
            f"the CISPO cap {cap} would cut on-policy ratios, which are 1: it bounds the ratio, so "
            f"the paper's eps_high = {cap} is a cap of {1 + cap}."
        )
    ratio_N = log_ratio_N.detach().exp()
    loss_N = -ratio_N.clamp(max=cap) * adv_N * logp_N
    return (weight_N * loss_N).sum(), {"cispo_clip_ratio": ((ratio_N > cap) & (adv_N > 0)).sum()}


def policy_loss_sapo(log_ratio_N, logp_N, adv_N, weight_N, tau: tuple[float, float]):
    """- sum_t w_t A_t (4 / tau) sigmoid(tau (r_t - 1)), SAPO 2511.20347: a soft gate, not a clip.

    tau: one for A > 0, one for the rest. At r = 1 its slope is that of r, and fades on both sides.
    """
    if min(tau) <= 0:
        raise InputError(f"SAPO's tau {tau}: give two numbers above 0.")
    tau_N = torch.where(adv_N > 0, *tau)
    gate_N = torch.sigmoid(tau_N * torch.expm1(log_ratio_N))
    return (weight_N * -adv_N * gate_N * 4 / tau_N).sum(), {}


def policy_loss_dppo(log_ratio_N, logp_N, adv_N, weight_N, low: float, high: float):
    """- sum_t w_t M_t r_t A_t, DPPO 2602.04879: a trust region in probability, not in its ratio.

    M_t is 0 where the token's probability has already moved by more than high (A > 0: up) or low
    (A < 0: down), the total variation of "this token, or another", and 1 elsewhere. A rare token
    may thus become a hundred times as likely, and a sure one may not fall from 0.99 to 0.8. For
    ratios of tokens. Metrics as of policy_loss_clip.
    """
    ratio_N = log_ratio_N.exp()
    moved_N = (logp_N.exp() - (logp_N - log_ratio_N).exp()).detach()
    too_low_N = (moved_N < -low) & (adv_N < 0)
    too_high_N = (moved_N > high) & (adv_N > 0)
    loss_N = -ratio_N * adv_N * ~(too_low_N | too_high_N)
    too_low, too_high = too_low_N.sum(), too_high_N.sum()
    return (weight_N * loss_N).sum(), {
        "clip_ratio/low_mean": too_low,
        "clip_ratio/high_mean": too_high,
        "clip_ratio/region_mean": too_low + too_high,
    }


def value_loss(value_N, old_value_N, ret_N, mask_N, clip: float):
    """sum_t max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / 2 -> (sum, metrics)

    As in PPO's code: a value that has moved by more than clip gains nothing by moving on. Metric
    val/clipfrac_avg: tokens where the clipped term is the larger one.
    """
    # clamp leaves V unchanged, to the bit, where nothing is clipped
    clipped_N = value_N.clamp(old_value_N - clip, old_value_N + clip)
    error_N = (value_N - ret_N).square()
    clipped_error_N = (clipped_N - ret_N).square()
    loss = masked(torch.max(error_N, clipped_error_N), mask_N).sum() / 2
    return loss, {"val/clipfrac_avg": (masked(clipped_error_N - error_N, mask_N) > 0).sum()}


# ------------------------------------------------------------------------ KL and importance weights
# Estimates of KL(pi || ref) from the sampled token alone (joschu.net/blog/kl-approx.html). With
# q = ref / pi at a token drawn from pi, and KL between the distributions after its prefix:
#
#                         expected value     expected gradient as a loss
#     k1  - log q         KL(pi || ref)      0: useless in a loss, right in a reward
#     k2  (log q)^2 / 2   biased             that of KL(pi || ref), exactly
#     k3  q - 1 - log q   KL(pi || ref)      that of KL(ref || pi), the forward KL; never negative
def kl_k1(logp_N, ref_logp_N):
    """- log q -> kl_N."""
    return logp_N - ref_logp_N


def kl_k2(logp_N, ref_logp_N):
    """(log q)^2 / 2 -> kl_N."""
    return (ref_logp_N - logp_N).square() / 2


def kl_k3(logp_N, ref_logp_N):
    """q - 1 - log q -> kl_N."""
    log_q_N = ref_logp_N - logp_N
    return log_q_N.expm1() - log_q_N


def importance_weight(trainer_logp_N, engine_logp_N, sequences, level: str, mode: str, cap: float):
    """Ratio trainer / engine, which corrects for an engine that does not quite match the trainer.

    level  token: exp(trainer - engine); sequence: exp of its SUM over the sequence, at each token
    mode   truncate: min(ratio, cap) (TIS); mask: 0 above the cap (MIS)
    -> (weight_N, metrics). weight_N: detached, 0 where masked; multiply it into the weights of the
    policy loss, not of a KL. Metrics: the ratios BEFORE the cap, and sampling/capped, those above.
    """
    if level not in ("token", "sequence") or mode not in ("truncate", "mask"):
        raise InputError(
            f"importance correction {level}-{mode}: give token or sequence, and truncate or mask."
        )
    gap_N = masked(trainer_logp_N - engine_logp_N, sequences.mask_N).detach()
    level_gap_N = gap_N if level == "token" else sequences.spread(sequences.sum(gap_N))
    ratio_N = masked(level_gap_N.exp(), sequences.mask_N)
    if mode == "truncate":
        weight_N = ratio_N.clamp(max=cap)
    else:
        weight_N = ratio_N.where(ratio_N <= cap, 0)
    return weight_N, {
        "sampling/importance_sampling_ratio/mean": ratio_N.sum(),
        "sampling/capped": (ratio_N > cap).sum(),
    }


def no_correction(trainer_logp_N, engine_logp_N, sequences):
    """Treat the engine as equal to the trainer -> (1.0, {})."""
    return 1.0, {}


def masked(x_N, mask_N):
    """x where mask, else 0. Unlike a product, it stops inf and NaN too, in value and gradient."""
    return torch.where(mask_N, x_N, 0)
