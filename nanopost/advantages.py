"""From rewards to advantages: group baselines, GAE, whitening.

Shapes: P prompts, G samples of each; B sequences of at most T sampled tokens.
"""

import torch

from nanopost import InputError, dist


# ---------------------------------------------------------------------------------- group baselines
# How much better a sample is than the others of its group: reward_PG -> adv_PG. A NaN, where no
# reward applies, is in no mean and no std, and its advantage is 0.
def group(reward_PG):
    """(R - mean) / (std + 1e-4), both over the group, std with n - 1: GRPO 2402.03300."""
    return centred(reward_PG) / (std(reward_PG)[:, None] + 1e-4)


def mean(reward_PG):
    """R - mean: hard and easy prompts keep their own scale, Dr. GRPO 2503.20783."""
    return centred(reward_PG)


def leave_one_out(reward_PG):
    """R - mean of the OTHERS = (R - mean) G / (G - 1): an unbiased baseline, RLOO 2402.14740."""
    num_samples_P1 = (~reward_PG.isnan()).sum(1, keepdim=True)
    return centred(reward_PG) * (num_samples_P1 / (num_samples_P1 - 1).clamp(min=1))


def batch(reward_PG):
    """(R - mean of the group) / (std + 1e-4), std of all rewards of all ranks. A collective."""
    _, std = dist.mean_and_std(reward_PG[~reward_PG.isnan()])
    return centred(reward_PG) / (std + 1e-4)


def centred(reward_PG):
    """R - mean of the group; 0 for a NaN."""
    num_samples = reward_PG.shape[1]
    if num_samples < 2:
        raise InputError(
            f"--group {num_samples} leaves nothing to compare a sample with: give 2 or more."
        )
    return (reward_PG - reward_PG.nanmean(1, keepdim=True)).nan_to_num(0)


def std(reward_PG):
    """The std of each group, with n - 1 -> std_P; 0 if fewer than two rewards apply."""
    deviation_PG = reward_PG - reward_PG.nanmean(1, keepdim=True)
    count_P = (~reward_PG.isnan()).sum(1)
    return (deviation_PG.square().nansum(1) / (count_P - 1).clamp(min=1)).sqrt()


# ------------------------------------------------------------------------------------ per token
def gae(reward_BT, value_BT, gamma: float, lam: float):
    """Generalised advantage estimation, 1506.02438 eq. 16 -> (adv_BT, ret_BT = adv + value).

        delta_t = r_t + gamma V_t+1 - V_t         adv_t = delta_t + gamma lam adv_t+1

    A row holds only sampled tokens, then zeros: the state after the last token is worth 0, as is
    every padded one, so padding changes nothing. lam 1 gives Monte-Carlo returns, lam 0 one-step
    targets.
    """
    adv_BT = torch.zeros_like(value_BT)
    next_value_B = next_adv_B = value_BT.new_zeros(len(value_BT))
    for t in reversed(range(value_BT.shape[1])):
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        next_adv_B = delta_B + gamma * lam * next_adv_B
        next_value_B = value_BT[:, t]
        adv_BT[:, t] = next_adv_B
    return adv_BT, adv_BT + value_BT


def whiten(x_BT, mask_BT, shift_mean: bool = True):
    """(x - mean) / std, both over the masked tokens of all ranks; without shift_mean the mean is
    added back -> x_BT, not masked. A collective."""
    mean, std = dist.mean_and_std(x_BT[mask_BT])
    whitened_BT = (x_BT - mean) / (std + 1e-8)
    if shift_mean:
        return whitened_BT
    return whitened_BT + mean


def running_std(sums: tuple, score_B) -> tuple[tuple, float]:
    """Add the scores of all ranks to (count, sum, sum of squares) -> (the new sums, the std with n
    of all scores so far; 1 if there is none or all are equal: they have no scale). A
    collective."""
    new = dist.all_sums(len(score_B), score_B, score_B.square())
    count, total, squares = sums = tuple(a + b for a, b in zip(sums, new))
    if not count:
        return sums, 1.0
    mean = total / count
    std = max(0.0, squares / count - mean**2) ** 0.5
    if std <= 1e-6 * (1 + abs(mean)):
        return sums, 1.0
    return sums, std


def explained_variance(ret_BT, value_BT, mask_BT) -> float:
    """1 - Var(return - value) / Var(return) over the tokens of all ranks; 0 if all returns
    are equal. A collective."""
    _, spread = dist.mean_and_std(ret_BT[mask_BT])
    _, left = dist.mean_and_std((ret_BT - value_BT)[mask_BT])
    if spread <= 1e-6:
        return 0.0
    return 1 - (left / spread) ** 2
