"""Advantages against the installed TRL's own lines, closed forms, and the enumeration of every
group. Statistics over ranks: test_dist.py."""

import inspect
import textwrap
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanopost import InputError, advantages, losses
from nanopost.rewards import total
from nanopost.verify import length_penalty

close = torch.testing.assert_close
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
BASELINES = {
    f.__name__: f
    for f in (advantages.group, advantages.mean, advantages.leave_one_out, advantages.batch)
}
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
    """Run the lines of an installed TRL method from one text to another -> its local variables."""
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
def test_advantages_equal_trl(how, scale, alone):
    reward_PG = rewards()
    theirs = trl_grpo(reward_PG.reshape(-1, 1), [1.0], 4, scale)["advantages"]
    close(BASELINES[how](reward_PG).flatten(), theirs, **TIGHT)


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
    ours = advantages.leave_one_out(reward_PG)
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


@pytest.mark.parametrize("how", BASELINES)
def test_a_group_with_equal_rewards_moves_nothing(how, alone):
    assert BASELINES[how](rewards())[1].abs().max() < 1e-12
    assert BASELINES[how](torch.full((2, 8), 0.1, dtype=torch.float32)).abs().max() < 1e-3


def test_the_z_score_uses_bessel_and_groups_stand_alone():
    adv_PG = advantages.group(torch.tensor([[0.0, 1.0], [5.0, 5.5]]))
    std_0, std_1 = 0.5**0.5, 0.125**0.5
    low, high = 0.5 / (std_0 + 1e-4), 0.25 / (std_1 + 1e-4)
    close(adv_PG, torch.tensor([[-low, low], [-high, high]]), **TIGHT)


def test_the_batch_has_one_scale_and_each_group_its_own_mean(alone):
    reward_PG = rewards(2, prompts=6)
    centred_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    expected_PG = centred_PG / (reward_PG.flatten().std() + 1e-4)
    close(advantages.batch(reward_PG), expected_PG, **TIGHT)


def test_whitened_numbers_have_mean_0_or_their_own_and_deviation_1(alone):
    x_BT = torch.tensor([[1.0, 2.0, 900.0], [4.0, 900.0, 900.0]])
    mask_BT = torch.tensor([[True, True, False], [True, False, False]])
    for shift_mean, mean in ((True, 0.0), (False, 7 / 3)):
        white = advantages.whiten(x_BT, mask_BT, shift_mean)[mask_BT]
        assert float(white.mean()) == pytest.approx(mean)
        assert float(white.std()) == pytest.approx(1.0)
        close(white[2] - white[0], torch.tensor(3 / (7 / 3) ** 0.5))  # by n - 1


def test_the_running_deviation_is_that_of_all_scores_so_far(alone):
    scores, sums = torch.tensor([3.0, 3.0, 1.0, -2.0, 0.5, 7.0]), (0, 0.0, 0.0)
    stds = []
    for part in scores.split(2):
        sums, std = advantages.running_std(sums, part)
        stds.append(std)
    expected = [scores[:n].std(correction=0).item() for n in (4, 6)]
    assert stds == pytest.approx([1.0, *expected])  # the first two are equal: they have no scale
    assert sums == (6, float(scores.sum()), float(scores.square().sum()))


def test_explained_variance_is_1_of_a_perfect_guess_0_of_a_constant_and_may_be_negative(alone):
    ret_BT = torch.tensor([[1.0, 3.0, 99.0], [-2.0, 99.0, 99.0]])
    mask_BT = torch.tensor([[True, True, False], [True, False, False]])
    explained = advantages.explained_variance
    assert explained(ret_BT, ret_BT.clone(), mask_BT) == 1
    assert explained(ret_BT, torch.full_like(ret_BT, 7.0), mask_BT) == pytest.approx(0)
    assert explained(ret_BT, -ret_BT, mask_BT) == pytest.approx(1 - 4)
    assert explained(torch.ones(2, 3), ret_BT, mask_BT) == 0


def expected_gradient(baseline, group):
    """Over every group of answers that a policy over three can draw: E[grad of the loss], and
    - grad E[reward]."""
    logits_V = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    reward_V = torch.tensor([1.0, 0.2, -0.5])
    logp_V = logits_V.log_softmax(0)
    loss = torch.zeros(())
    for draws in product(range(3), repeat=group):
        logp_G = logp_V[list(draws)]
        adv_G = baseline(reward_V[list(draws)][None])[0]
        total, _ = losses.policy_loss_clip(
            logp_G - logp_G.detach(), logp_G, adv_G, torch.ones(group), 0.2, 0.2
        )
        loss = loss + logp_G.sum().exp().detach() * total / group
    expected_reward = (logp_V.exp() * reward_V).sum()
    return [
        torch.autograd.grad(x, logits_V, retain_graph=True)[0] for x in (loss, -expected_reward)
    ]


@pytest.mark.parametrize("group", [2, 3, 4])
def test_leave_one_out_is_an_unbiased_policy_gradient(group):
    ours, exact = expected_gradient(advantages.leave_one_out, group)
    close(ours, exact, **TIGHT)


@pytest.mark.parametrize("group", [2, 3, 4])
def test_the_mean_of_the_group_shrinks_the_gradient_by_the_sample_it_shares(group):
    ours, exact = expected_gradient(advantages.mean, group)
    close(ours, exact * (group - 1) / group, **TIGHT)


def test_the_z_score_is_biased():
    ours, exact = expected_gradient(advantages.group, 3)
    assert not torch.allclose(ours / ours.norm(), exact / exact.norm(), atol=1e-3)


@pytest.mark.parametrize("buffer", [0, 1, 20, 100])
def test_length_penalty_equals_trl_at_every_length(buffer):
    other = pytest.importorskip("trl.rewards.other_rewards")
    theirs = other.get_soft_overlong_punishment(100, buffer)([[0] * n for n in range(121)])
    assert [length_penalty(n, 100, buffer) for n in range(121)] == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("how", BASELINES)
def test_what_no_reward_scores_is_in_no_mean_and_no_std(how, alone):
    """As if the group had one sample less; a group with one reward or none has nothing to say."""
    rewards_PG = torch.tensor([[1.0, NAN, 4.0, 0.0], [2.0, 2.5, NAN, 9.0]], dtype=torch.float64)
    others_PG = torch.tensor([[1.0, 4.0, 0.0], [2.0, 2.5, 9.0]], dtype=torch.float64)
    adv_PG, expected_PG = BASELINES[how](rewards_PG), BASELINES[how](others_PG)
    applies_PG = ~rewards_PG.isnan()
    assert adv_PG[applies_PG].tolist() == pytest.approx(expected_PG.flatten().tolist())
    assert adv_PG[~applies_PG].tolist() == [0, 0]
    bare_PG = torch.tensor([[3.0, NAN, NAN], [NAN] * 3], dtype=torch.float64)
    assert not BASELINES[how](bare_PG).any()
    assert advantages.std(rewards_PG).tolist() == pytest.approx(others_PG.std(1).tolist())
    assert advantages.std(bare_PG).tolist() == [0, 0]


@pytest.mark.parametrize("how", BASELINES)
def test_a_group_of_one_is_refused(how, alone):
    with pytest.raises(InputError, match="--group 1 .* 2 or more"):
        BASELINES[how](torch.zeros(3, 1))


def test_a_batch_without_scores_has_no_scale(alone):
    sums, scale = advantages.running_std((0, 0.0, 0.0), torch.zeros(0, dtype=torch.float64))
    assert scale == 1.0
    sums, scale = advantages.running_std(sums, torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert scale == 1.0 and sums == (2, 4.0, 10.0)  # the std is 1, with n
