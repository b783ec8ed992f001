"""From rewards to advantages: several rewards into one, and the baseline of a group.

Shapes: P prompts, G samples of each, F reward functions.
"""
import numpy as np
import torch

from nanopost import InputError


def combine_rewards(rewards, weights):
    """Weighted sum over reward functions; None or NaN (does not apply) adds nothing -> float64 tensor [...].

    rewards: [F, ...], a tensor or nested lists; weights: F numbers. InputError names a completion that has no reward.
    """
    if len(weights) != len(rewards):
        raise InputError(f"--reward_weights has {len(weights)} values for {len(rewards)} rewards; one each.")
    rewards = np.asarray(rewards, np.float64)
    lost = np.argwhere(np.isnan(rewards).all(0))
    if len(lost):
        raise InputError(f"No reward applies to completion {', '.join(map(str, lost[0]))}, nor to {len(lost) - 1} "
                         f"others of {rewards[0].size}: all returned None; add a --reward that scores such rows.")
    return torch.from_numpy(np.tensordot(np.array(weights, np.float64), np.nan_to_num(rewards), 1))


def group_advantage(reward_PG, how: str, batch_std: float | None = None):
    """How much better a sample is than the others of its prompt -> adv_PG.

    group  (R - mean) / (std + 1e-4), mean and std (n - 1) of the group                 GRPO 2402.03300
    mean   R - mean: hard and easy prompts keep their own scale                         Dr. GRPO 2503.20783
    loo    R - mean of the OTHERS = (R - mean) G / (G - 1): an unbiased baseline        RLOO 2402.14740
    batch  (R - mean) / (std + 1e-4), mean of the group, std (n - 1) of all rewards: batch_std, which the loop
           takes over all ranks, or that of reward_PG
    """
    num_samples = reward_PG.shape[1]
    if num_samples < 2:
        raise InputError(f"--group {num_samples} has nothing to compare a sample with: 2 or more.")
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


def soft_overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """DAPO 2503.14476 eq. 13: 0 up to max_length - buffer tokens, then falling evenly to -1 at max_length."""
    if not 0 <= buffer <= max_length:
        raise InputError(f"The overlong buffer {buffer} is not between 0 and the length {max_length}.")
    over = length - (max_length - buffer)
    return -min(1.0, over / buffer if buffer else 1.0) if over > 0 else 0.0
