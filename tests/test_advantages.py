"""Advantages against the installed TRL's own lines, closed forms, and the enumeration of every group."""

import inspect
import textwrap
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanopost import InputError, losses
from nanopost.advantages import group_advantage, normalised_sum
from nanopost.rewards import total
from nanopost.verify import length_penalty

close = torch.testing.assert_close
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
NAN = float("nan")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)  # TRL's nanstd divides integers
    yield
    torch.set_default_dtype(torch.float32)


def rewards(seed=0, prompts=5, group=4):
    rng = torch.Generator().manual_seed(seed)
    reward_PG = torch.rand(prompts, group, generator=rng).round(decimals=1)
    reward_PG[1] = 0.1  # a group without variance
    return reward_PG


def trl_lines(method, first, last, **names):
    """Run the lines of an installed TRL method from one text to another; returns its local variables."""
    source = inspect.getsource(method)
    start = source.rindex("\n", 0, source.index(first)) + 1
    exec(textwrap.dedent(source[start : source.index(last)]), names)
    return names


def trl_grpo(reward_BF, weights, group, scale):
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    self = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards=scale,
        reward_weights=torch.tensor(weights),
    )
    return trl_lines(
        grpo.GRPOTrainer._generate_and_score_completions,
        "unscorable_mask =",
        "# Slice to keep only the local part",
        torch=torch,
        nanstd=grpo.nanstd,
        self=self,
        device="cpu",
        num_generations=group,
        rewards_per_func=reward_BF,
    )


@pytest.mark.parametrize("how, scale", [("group", "group"), ("mean", "none"), ("batch", "batch")])
def test_advantages_equal_trl(how, scale):
    reward_PG = rewards()
    theirs = trl_grpo(reward_PG.reshape(-1, 1), [1.0], 4, scale)["advantages"]
    close(group_advantage(reward_PG, how).flatten(), theirs, **TIGHT)


def test_leave_one_out_equals_trl_and_its_definition():
    rloo = pytest.importorskip("trl.trainer.rloo_trainer")
    reward_PG = rewards(1)
    theirs = trl_lines(
        rloo.RLOOTrainer._generate_and_score_completions,
        "scorable_counts =",
        "# Normalize advantages over",
        torch=torch,
        num_generations=4,
        rewards=reward_PG.flatten(),
        grouped_rewards=reward_PG,
    )["advantages"]
    ours = group_advantage(reward_PG, "loo")
    close(ours.flatten(), theirs, **TIGHT)
    for p, i in product(range(5), range(4)):
        others = [float(reward_PG[p, j]) for j in range(4) if j != i]
        assert ours[p, i].item() == pytest.approx(
            float(reward_PG[p, i]) - sum(others) / 3, abs=1e-12
        )


def test_several_rewards_with_weights_and_none_equal_trl():
    first, second = [1.0, None, 0.5, 0.0], [None, 0.25, 2.0, 1.0]
    theirs = trl_grpo(
        torch.tensor([[1.0, NAN], [NAN, 0.25], [0.5, 2.0], [0.0, 1.0]]), [1.0, 0.5], 2, "group"
    )
    ours = total([first, second], [1.0, 0.5])
    close(ours, theirs["rewards"], **TIGHT)
    assert ours.tolist() == [1.0, 0.125, 1.5, 0.5]
    by_prompt = total(torch.from_numpy(np.array([first, second], float)).view(2, 2, 2), [1.0, 0.5])
    assert by_prompt.dtype == torch.float64 and total(torch.zeros(2, 0), [1, 1]).shape == (0,)
    assert by_prompt.tolist() == [[1.0, 0.125], [1.5, 0.5]]


def test_each_reward_normalised_then_summed_equals_trl():
    """With a reward that does not apply to some, one of no variance, and one a thousand times as large."""
    first_PG, second_PG, third_PG = rewards(2), rewards(3), 1000 * rewards(4)
    second_PG[0, 1] = third_PG[2, :2] = NAN
    weights = [1.0, 0.5, 2.0]
    reward_FPG = torch.stack([first_PG, second_PG, third_PG])
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    self = SimpleNamespace(
        multi_objective_aggregation="normalize_then_sum",
        scale_rewards="group",
        reward_weights=torch.tensor(weights),
        reward_funcs=weights,
    )
    theirs = trl_lines(
        grpo.GRPOTrainer._generate_and_score_completions,
        "unscorable_mask =",
        "# Slice to keep only the local part",
        torch=torch,
        nanstd=grpo.nanstd,
        self=self,
        device="cpu",
        num_generations=4,
        rewards_per_func=reward_FPG.flatten(1).T,
    )["advantages"]
    total_PG = normalised_sum(reward_FPG, weights)
    assert float(total_PG.mean()) == pytest.approx(0, abs=1e-14)
    close((total_PG / (total_PG.std() + 1e-4)).flatten(), theirs, **TIGHT)


def test_a_group_with_equal_rewards_moves_nothing():
    for how in ("group", "mean", "loo", "batch"):
        assert group_advantage(rewards(), how)[1].abs().max() < 1e-12
        assert group_advantage(torch.full((2, 8), 0.1, dtype=torch.float32), how).abs().max() < 1e-3


def test_the_z_score_uses_bessel_and_groups_stand_alone():
    adv_PG = group_advantage(torch.tensor([[0.0, 1.0], [5.0, 5.5]]), "group")
    std_0, std_1 = 0.5**0.5, 0.125**0.5
    low, high = 0.5 / (std_0 + 1e-4), 0.25 / (std_1 + 1e-4)
    close(adv_PG, torch.tensor([[-low, low], [-high, high]]), **TIGHT)


def test_batch_std_of_all_ranks_gives_each_rank_its_part_of_the_whole():
    reward_PG = rewards(2, prompts=6)
    parts = [
        group_advantage(part, "batch", batch_std=reward_PG.std().item())
        for part in reward_PG.split([1, 2, 3])
    ]
    close(torch.cat(parts), group_advantage(reward_PG, "batch"), **TIGHT)


def expected_gradient(how, group):
    """Over every group of answers that a policy over three can draw: E[grad of the loss], and -grad E[reward]."""
    logits_V = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    reward_V = torch.tensor([1.0, 0.2, -0.5])
    logp_V = logits_V.log_softmax(0)
    loss = torch.zeros(())
    for draws in product(range(3), repeat=group):
        logp_G = logp_V[list(draws)]
        adv_G = group_advantage(reward_V[list(draws)][None], how)[0]
        total, _ = losses.policy_loss_clip(
            logp_G - logp_G.detach(), adv_G, torch.ones(group), 0.2, 0.2
        )
        loss = loss + logp_G.sum().exp().detach() * total / group
    expected_reward = (logp_V.exp() * reward_V).sum()
    return [
        torch.autograd.grad(x, logits_V, retain_graph=True)[0] for x in (loss, -expected_reward)
    ]


@pytest.mark.parametrize("group", [2, 3, 4])
def test_leave_one_out_is_an_unbiased_policy_gradient(group):
    ours, exact = expected_gradient("loo", group)
    close(ours, exact, **TIGHT)


@pytest.mark.parametrize("group", [2, 3, 4])
def test_the_mean_of_the_group_shrinks_the_gradient_by_the_sample_it_shares(group):
    ours, exact = expected_gradient("mean", group)
    close(ours, exact * (group - 1) / group, **TIGHT)


def test_the_z_score_is_biased():
    ours, exact = expected_gradient("group", 3)
    assert not torch.allclose(ours / ours.norm(), exact / exact.norm(), atol=1e-3)


@pytest.mark.parametrize("buffer", [0, 1, 20, 100])
def test_length_penalty_equals_trl_at_every_length(buffer):
    other = pytest.importorskip("trl.rewards.other_rewards")
    theirs = other.get_soft_overlong_punishment(100, buffer)([[0] * n for n in range(121)])
    assert [length_penalty(n, 100, buffer) for n in range(121)] == pytest.approx(theirs, abs=1e-12)


def test_a_completion_that_no_reward_scores_is_named():
    with pytest.raises(
        InputError, match=r"No reward applies to completion 1, nor to 1 others of 4"
    ):
        total([[1.0, None, 0.0, None], [None, None, 0.0, None]], [1.0, 1.0])
    with pytest.raises(
        InputError, match=r"No reward applies to completion 1, 0, nor to 0 others of 4"
    ):
        total([[[1.0, 1.0], [NAN, 0.0]]], [1.0])


def test_a_group_of_one_and_an_unknown_choice_are_refused():
    with pytest.raises(InputError, match="--group 1 .* 2 or more"):
        group_advantage(torch.zeros(3, 1), "group")
    with pytest.raises(InputError, match="'median' is none of group, mean, loo and batch"):
        group_advantage(torch.zeros(3, 2), "median")
