"""From rewards to advantages: several rewards into one, and the baseline of a group.

Shapes: P prompts, G samples of each, F reward functions; B sequences of at most T sampled tokens.
"""

import numpy as np
import torch

from nanopost import InputError


def group_advantage(reward_PG, how: str, batch_std: float | None = None):
    """How much better a sample is than the others of its prompt -> adv_PG.

    group  (R - mean) / (std + 1e-4), mean and std (n - 1) of the group                 GRPO 2402.03300
    mean   R - mean: hard and easy prompts keep their own scale                         Dr. GRPO 2503.20783
    loo    R - mean of the OTHERS = (R - mean) G / (G - 1): an unbiased baseline        RLOO 2402.14740
    batch  (R - mean) / (std + 1e-4), mean of the group, std (n - 1) of all rewards: batch_std, which the loop
           takes over all ranks, or that of reward_PG
    """
    num_samples = _check_group(reward_PG)
    centred_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    if how == "group":
        return centred_PG / (reward_PG.std(1, keepdim=True) + 1e-4)
    if how == "mean":
        return centred_PG
    if how == "loo":
        return centred_PG * (num_samples / (num_samples - 1))
    if how == "batch":
        return centred_PG / ((reward_PG.std() if batch_std is None else batch_std) + 1e-4)
    raise InputError(f"Advantage {how!r} is none of group, mean, loo and batch.")


def _check_group(reward_PG):
    num_samples = reward_PG.shape[1]
    if num_samples < 2:
        raise InputError(f"--group {num_samples} has nothing to compare a sample with: 2 or more.")
    return num_samples


def normalised_sum(reward_FPG, weights):
    """GDPO 2601.05242: each reward z-scored in its group, then their weighted sum -> sum_PG, which the loop z-scores
    over the batch. NaN (does not apply) adds nothing. So a reward of small spread is heard beside one of large."""
    total_PG = torch.zeros_like(reward_FPG[0])
    _check_group(total_PG)
    for weight, reward_PG in zip(weights, reward_FPG):
        centred_PG = reward_PG - reward_PG.nanmean(1, keepdim=True)
        count_P = (~reward_PG.isnan()).sum(1, keepdim=True)
        std_P = (centred_PG.square().nansum(1, keepdim=True) / (count_P - 1).clamp(min=1)).sqrt()
        total_PG += weight * (centred_PG / (std_P + 1e-4)).nan_to_num()
    return total_PG


def most_uncertain(
    entropies: list, masks: list, share: float, gather=lambda values: values
) -> list:
    """Whether a trained token is among the `share` of highest entropy (the 80/20 rule, 2506.01939) -> one bool array
    for each sequence. gather brings the entropies of all ranks together: the quantile is that of the whole batch."""
    every = gather(
        [h for entropy, mask in zip(entropies, masks) for h in entropy[mask].tolist()]
    ) or [0.0]
    return [
        mask & (entropy >= np.quantile(every, 1 - share)) for entropy, mask in zip(entropies, masks)
    ]


def gae(reward_BT, value_BT, gamma: float, lam: float):
    """Generalised advantage estimation, 1506.02438 eq. 16 -> (adv_BT, return_BT = adv + value).

        delta_t = r_t + gamma V_t+1 - V_t         adv_t = delta_t + gamma lam adv_t+1

    Rows are the sampled tokens alone, with zeros behind shorter ones: the state after the last token is worth 0, as is
    every padded one, so that padding changes nothing. lam 1 gives Monte-Carlo returns, lam 0 one-step targets.
    """
    adv_BT, later_B = torch.zeros_like(value_BT), torch.zeros_like(value_BT[:, 0])
    next_B = later_B
    for t in reversed(range(value_BT.shape[1])):
        later_B = reward_BT[:, t] + gamma * next_B - value_BT[:, t] + gamma * lam * later_B
        next_B, adv_BT[:, t] = value_BT[:, t], later_B
    return adv_BT, adv_BT + value_BT


def adapted(beta: float, kl: float, target: float) -> float:
    """The next weight of a KL that should be `target`: a tenth of the relative error, cut at 20 % (1909.08593, 2.2)."""
    return beta * (1 + 0.1 * min(0.2, max(-0.2, kl / target - 1)))
