"""Every loss, a pure function: tensors and scalars in, (sum, metrics) out.

Shapes: N packed tokens of a micro-batch, S sequences in it.

A loss is a sum, so that micro-batches and ranks add up. The loop divides it by a count of the whole optimizer
step: tokens, sequences, or sequences x max_new_tokens, as token_weights says. Metrics are sums over tokens,
0-dim and detached; the loop divides those by the trained tokens of the step, whatever the aggregation.

Masked positions hold 0 in logp_N, old_logp_N, ref_logp_N and adv_N, and give exactly 0 to sums and gradients.
A sequence lies whole in one micro-batch.
"""

import torch

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
