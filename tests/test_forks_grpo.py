"""The forks of train_grpo.py, each against an oracle; what runs here are the patched lines.

fork             oracle
two_sided_clip   TRL's loss and gradient; cases by hand
overlong_mask    columns by hand; TRL's loss without the tokens of answers cut off
top_entropy      TRL's mask, loss and gradient
entropy_bonus    TRL's loss and gradient; a run in which every advantage is 0
off_policy_mask  TRL's loss and gradient
gdpo             TRL's own lines
kl_reward        loops; the gradient of E[R] - beta KL, by enumeration
median_baseline  closed form
curriculum       batches by hand; a resumed run; two ranks
multi_turn       the model's log-probs of the whole dialogue; the count of trained tokens
"""

import json
import math
import statistics
from collections import defaultdict
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import metrics, run, weights
from small import random_ids, small_model
from test_advantages import rewards, trl_lines
from test_losses import gradient, packed, padded

import nanopost.batch
from forks import flags_of, function_of, patched, patched_source, run_lines
from nanopost import InputError, advantages, losses, packing
from nanopost.batch import Batch, Example, Sequences, batch_of
from nanopost.dist import World
from nanopost.engine import Engine, Sampling
from nanopost.environment import answer_once
from nanopost.forward import logprobs
from nanopost.rewards import Reward
from nanopost.rollout import Rollout, length_metrics
from nanopost.run import Run
from runs import toy

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
close = torch.testing.assert_close
SCRIPT = "train_grpo.py"
AGGREGATION = {
    "grpo": "sequence",
    "sapo": "sequence",
    "dapo": "token",
    "dr_grpo": "constant",
    "luspo": "sequence_sum",
}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------ losses
class Columns(dict):
    """A batch as the loop's loss sees one: columns, sequences and the mask."""

    def __init__(self, x, **columns):
        super().__init__(columns)
        self.mask_N = x.mask_N
        self.sequences = Sequences(x.mask_N, x.seq_N, x.S)


def trl_grpo(
    x,
    loss_type,
    level="token",
    low=0.2,
    high=0.28,
    delta=None,
    beta=0.0,
    max_length=16,
    off_policy=None,
    entropy_N=None,
    top_entropy=1.0,
):
    """GRPOTrainer._compute_loss over a model that returns these log-probs -> (loss, metrics)."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    mask_ST = padded(x, x.mask_N.double())
    outputs = (padded(x, x.logp_N), mask_ST if entropy_N is None else padded(x, entropy_N), None)
    found = defaultdict(lambda: defaultdict(list))
    self = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: outputs,
        aux_loss_enabled=False,
        loss_type=loss_type,
        top_entropy_quantile=top_entropy,
        off_policy_mask_threshold=off_policy,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=False,
        max_completion_length=max_length,
        model=SimpleNamespace(training=True),
        _metrics=found,
        args=SimpleNamespace(
            delta=delta,
            use_bias_correction_kl=False,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
        ),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=entropy_N is not None,
        entropy_coef=0.1,
        use_adaptive_entropy=False,
        get_off_policy_mask=grpo.GRPOTrainer.get_off_policy_mask,
        accelerator=SimpleNamespace(
            num_processes=1,
            gather=lambda v: v,
            reduce=lambda v, reduction: v,
            pad_across_processes=lambda v, dim, pad_index: v,
            sync_gradients=True,
        ),
    )
    self.get_high_entropy_mask = lambda *given: grpo.GRPOTrainer.get_high_entropy_mask(self, *given)
    inputs = {
        "prompt_ids": torch.zeros(x.S, 1),
        "prompt_mask": torch.ones(x.S, 1),
        "advantages": x.adv_S,
        "completion_ids": torch.zeros_like(mask_ST),
        "completion_mask": mask_ST,
        "old_per_token_logps": padded(x, x.old_N),
        "ref_per_token_logps": padded(x, x.ref_N),
        "num_items_in_batch": mask_ST.sum(),
    }
    loss = grpo.GRPOTrainer._compute_loss(self, None, inputs)
    return loss, {name: values[0] for name, values in found["train"].items()}


def our_grpo(
    x,
    name,
    loss_type,
    level="token",
    low=0.2,
    high=0.28,
    beta=0.0,
    max_length=16,
    entropy_N=None,
    adv_N=None,
    **flags,
):
    """The lines of the patched loop that compute its loss -> (loss, metrics)."""
    policy_loss = partial(losses.policy_loss_clip, low=low, high=high)
    if loss_type == "sapo":
        policy_loss = partial(losses.policy_loss_sapo, tau=(1.0, 1.05))
    adv_N = x.adv_N if adv_N is None else adv_N
    batch = Columns(x, old_logp=x.old_N, engine_logp=x.old_N, ref_logp=x.ref_N, adv=adv_N)
    names = run_lines(
        patched_source(SCRIPT, name),
        "log_ratio_N = losses.log_ratio(",
        "(loss / divisor).backward()",
        args=SimpleNamespace(ratio=level, agg=AGGREGATION[loss_type], beta=beta, **flags),
        batch=batch,
        logp_N=x.logp_N,
        entropy_N=entropy_N,
        correction=losses.no_correction,
        policy_loss=policy_loss,
        reference=None if beta == 0 else "a model",
        kl_estimate=losses.kl_k3,
    )
    tokens = int(x.mask_N.sum())
    loss = names["loss"] / losses.divisor(AGGREGATION[loss_type], tokens, x.S, max_length)
    sums = names["metrics"] | names["correction_metrics"]
    return loss, {name: (value / tokens).item() for name, value in sums.items()}


TRL_CASES = [
    ("two_sided_clip", "delta", "dapo", {"delta": 1.5, "beta": 0.3}),
    ("two_sided_clip", "delta", "dr_grpo", {"delta": 1.4, "low": 0.1, "high": 0.1}),
    ("two_sided_clip", "delta", "luspo", {"delta": 1.1, "level": "sequence", "beta": 0.2}),
    ("off_policy_mask", "off_policy", "dapo", {"off_policy": 0.01}),
    ("off_policy_mask", "off_policy", "sapo", {"off_policy": -0.1}),
]


@pytest.mark.parametrize("name, option, loss_type, options", TRL_CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_equals_that_of_trl_in_value_and_gradient(
    double, name, option, loss_type, options, seed
):
    x = packed(seed)
    theirs, their_metrics = trl_grpo(x, loss_type, **options)
    flag = "off_policy_mask" if option == "off_policy" else option
    ours, our_metrics = our_grpo(x, name, loss_type, **{flag: options[option]}, **without(options))
    close(ours, theirs, **TIGHT)
    close(gradient(ours, x.logp_N), gradient(theirs, x.logp_N), **TIGHT)
    if "level" not in options:  # TRL's sequence level counts sequences, ours tokens
        compared = [metric for metric in our_metrics if metric.startswith("clip_ratio")]
        for metric in compared:
            assert our_metrics[metric] == pytest.approx(their_metrics[metric], abs=1e-12), metric
    unforked, _ = our_grpo(x, name, loss_type, **{flag: 1e9}, **without(options))
    assert abs(ours - unforked) > 1e-6 or seed == 1


def without(options):
    return {k: v for k, v in options.items() if k not in ("delta", "off_policy")}


@pytest.mark.parametrize(
    "ratio, adv, loss, slope, low, high",
    [
        (1.0, 1.0, -1.0, -1.0, 0, 0),
        (1.5, 1.0, -1.28, 0.0, 0, 1),  # above the clip, gain: cut off
        (1.5, -1.0, 1.5, 1.0, 0, 0),  # above the clip, loss: kept
        (3.0, -1.0, 2.0, 0.0, 0, 0),  # above delta: bounded
        (0.5, 1.0, -0.5, -1.0, 0, 0),
        (0.5, -1.0, 0.8, 0.0, 1, 0),
    ],
)
def test_two_sided_clip_cases_by_hand(double, ratio, adv, loss, slope, low, high):
    """slope: d loss / d ratio, from low 0.2, high 0.28 and delta 2."""
    logp_N = torch.tensor([-1.0], requires_grad=True)
    x = SimpleNamespace(logp_N=logp_N, old_N=torch.tensor([-1.0 - math.log(ratio)]), ref_N=None)
    x.mask_N, x.seq_N, x.S = torch.tensor([True]), torch.tensor([0]), 1
    ours, counts = our_grpo(x, "two_sided_clip", "dapo", adv_N=torch.tensor([adv]), delta=2.0)
    assert ours.item() == pytest.approx(loss)
    assert gradient(ours, logp_N).item() == pytest.approx(slope * ratio)
    found = [counts[f"clip_ratio/{k}_mean"] for k in ("low", "high", "region")]
    assert found == [low, high, low + high]


def test_an_entropy_bonus_equals_that_of_trl(double):
    """Under dapo's aggregation TRL's mean over tokens is the sum divided by the trained tokens."""
    x, draw = packed(), torch.Generator().manual_seed(5)
    entropy_N = (torch.rand(len(x.mask_N), generator=draw) * x.mask_N).requires_grad_()
    theirs, _ = trl_grpo(x, "dapo", entropy_N=entropy_N)
    ours, _ = our_grpo(x, "entropy_bonus", "dapo", entropy_N=entropy_N, entropy_coef=0.1)
    close(ours, theirs, **TIGHT)
    for leaf_N in (x.logp_N, entropy_N):
        trained = x.mask_N
        close(gradient(ours, leaf_N)[trained], gradient(theirs, leaf_N)[trained], **TIGHT)


@pytest.mark.parametrize("share, tokens", [(1.0, 15), (0.6, 9), (0.2, 3)])
def test_top_entropy_equals_trl(double, alone, share, tokens):
    """TRL's bonus is a mean over the tokens that are left."""
    x, draw = packed(), torch.Generator().manual_seed(5)
    entropy_N = (torch.rand(len(x.mask_N), generator=draw) * x.mask_N).requires_grad_()
    theirs, _ = trl_grpo(x, "dapo", entropy_N=entropy_N, top_entropy=share)
    examples = []
    for s in range(x.S):
        mask, adv = x.mask_N[x.seq_N == s].numpy(), x.adv_N[x.seq_N == s].numpy()
        examples.append(Example([0] * len(mask), mask, {"adv": adv}))
    source = patched_source(SCRIPT, "top_entropy")
    run_lines(
        source,
        "entropies = per_token(",
        "# ---- update",
        args=SimpleNamespace(top_entropy=share, tokens=100),
        world=SimpleNamespace(device="cpu"),
        examples=examples,
        per_token=lambda *_: [entropy_N.detach()[x.seq_N == s].numpy() for s in range(x.S)],
    )
    adv_N = torch.from_numpy(np.concatenate([e.columns["adv"] for e in examples]))
    learns_N = adv_N != 0
    assert int(learns_N.sum()) == tokens
    ours, _ = our_grpo(x, "off_policy_mask", "dapo", adv_N=adv_N, off_policy_mask=1e9)
    ours = ours - 0.1 * (entropy_N * learns_N).sum() / learns_N.sum()
    close(ours, theirs, **TIGHT)
    close(gradient(ours, x.logp_N), gradient(theirs, x.logp_N), **TIGHT)


def test_a_top_entropy_of_no_tokens_is_no_error(alone):
    """All answers cut off, with overlong_mask: nothing is trained."""
    examples = [Example([1, 2], [False, False], {"adv": np.zeros(2, np.float32)})]
    run_lines(
        patched_source(SCRIPT, "overlong_mask", "top_entropy"),
        "entropies = per_token(",
        "# ---- update",
        args=SimpleNamespace(top_entropy=0.2, tokens=100),
        world=SimpleNamespace(device="cpu"),
        examples=examples,
        per_token=lambda *_: [np.zeros(2, np.float32)],
    )
    assert not examples[0].columns["adv"].any()


# -------------------------------------------------------------------------------------- advantages
def rollouts_and_examples(finishes):
    """Three sampled tokens each, with log-probs of an old policy and a reference."""
    draw = np.random.default_rng(0)
    rollouts, examples = [], []
    for finish in finishes:
        logp = -draw.random(3).astype(np.float32)
        rollouts.append(Rollout([5, 6], [7, 8, 1], logp, finish, 0))
        example = rollouts[-1].example()
        example.columns["old_logp"] = example.columns["engine_logp"]
        example.columns["policy_logp"] = np.float32([0, 0, *-draw.random(3)])
        example.columns["ref_logp"] = np.float32([0, 0, *-draw.random(3)])
        examples.append(example)
    return rollouts, examples


def test_overlong_answers_count_in_the_baseline_and_are_0_in_every_column():
    rollouts, examples = rollouts_and_examples(["stop", "length", "stop", "stop"])
    before = [dict(e.columns) for e in examples]
    reward_FPG = torch.tensor([[[1.0, 0.0, 0.5, 0.0]]], dtype=torch.float64)
    run_lines(
        patched_source(SCRIPT, "overlong_mask"),
        "reward_PG = rewards.total(",
        "# ---- update",
        reward_FPG=reward_FPG,
        reward_weights=[1.0],
        advantage=advantages.mean,
        examples=examples,
        rollouts=rollouts,
    )
    assert [e.num_targets for e in examples] == [3, 0, 3, 3]
    assert not any(column.any() for column in examples[1].columns.values())
    assert batch_of(examples).mask_N.sum() == 9
    for i, adv in ((0, 0.625), (2, 0.125), (3, -0.375)):
        assert examples[i].columns["adv"].tolist() == [0, 0, adv, adv, adv]
        for name, column in before[i].items():
            assert (examples[i].columns[name] == column).all()


KL = {
    "k1": lambda x: x,
    "k2": lambda x: x * x / 2,
    "k3": lambda x: math.exp(-x) - 1 + x,
}


def kl_in_reward(reward_PG, examples, beta, kl, advantage):
    """The patched lines of the advantage -> (what is logged as reward_PG, adv_PG)."""
    names = run_lines(
        patched_source(SCRIPT, "kl_reward"),
        "reward_PG = rewards.total(",
        "for e, adv in zip(",
        reward_FPG=reward_PG[None],
        reward_weights=[1.0],
        advantage=advantage,
        examples=examples,
        reference="a model",
        args=SimpleNamespace(beta=beta),
        kl_estimate=getattr(losses, f"kl_{kl}"),
    )
    return names["score_PG"], names["adv_PG"]


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_the_kl_of_a_sample_is_taken_from_its_reward(kl):
    _, examples = rollouts_and_examples(["stop"] * 4)
    reward_PG = torch.tensor([[1.0, 0.0], [0.5, 0.25]], dtype=torch.float64)
    logged_PG, adv_PG = kl_in_reward(reward_PG, examples, 0.3, kl, advantages.mean)
    assert logged_PG.tolist() == reward_PG.tolist()  # the metric reward is without the KL
    expected = []
    for reward, e in zip(reward_PG.flatten().tolist(), examples):
        policy, ref = e.columns["policy_logp"][2:].tolist(), e.columns["ref_logp"][2:].tolist()
        expected.append(reward - 0.3 * sum(KL[kl](a - b) for a, b in zip(policy, ref)))
    expected_PG = torch.tensor(expected, dtype=torch.float64).view_as(reward_PG)
    close(adv_PG, expected_PG - expected_PG.mean(1, keepdim=True))


def test_rloo_with_the_kl_in_the_reward_is_the_gradient_of_reward_minus_kl(double):
    """Over every group of two answers of one token that a policy over three can draw."""
    logits_V = torch.tensor([0.3, -0.8, 1.1], requires_grad=True)
    logp_V, ref_V = logits_V.log_softmax(0), torch.tensor([-0.5, 0.9, 0.1]).log_softmax(0)
    reward_V, beta = torch.tensor([1.0, 0.2, -0.5]), 0.4
    loss = torch.zeros(())
    for draws in product(range(3), repeat=2):
        examples = []
        for v in draws:
            columns = {"policy_logp": np.array([0, logp_V[v].item()])}
            columns["ref_logp"] = np.array([0, ref_V[v].item()])
            examples.append(Example([0, v], [False, True], columns))
        _, adv_PG = kl_in_reward(
            reward_V[list(draws)][None], examples, beta, "k1", advantages.leave_one_out
        )
        logp_G = logp_V[list(draws)]
        loss = loss - logp_G.sum().exp().detach() * (adv_PG[0] * logp_G).sum() / 2
    kl = (logp_V.exp() * (logp_V - ref_V)).sum()
    objective = (logp_V.exp() * reward_V).sum() - beta * kl
    close(gradient(loss, logits_V), -gradient(objective, logits_V), **TIGHT)


def test_with_the_kl_in_the_reward_the_loss_has_none(double):
    x = packed()
    with_kl, counts = our_grpo(x, "kl_reward", "dapo", beta=0.3)
    close(with_kl, our_grpo(x, "kl_reward", "dapo")[0], **TIGHT)
    assert counts["kl"] == pytest.approx(
        losses.kl_k3(x.logp_N, x.ref_N).sum().item() / x.mask_N.sum().item()
    )


def test_gdpo_equals_trl(double, alone):
    """With a reward that does not apply to some, one of no variance, and one a thousand times as
    large."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    first_PG, second_PG, third_PG = rewards(2), rewards(3), 1000 * rewards(4)
    second_PG[0, 1] = third_PG[2, :2] = float("nan")
    weights = [1.0, 0.5, 2.0]
    reward_FPG = torch.stack([first_PG, second_PG, third_PG])
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
    adv_PG = function_of("gdpo", SCRIPT, "gdpo")(reward_FPG, weights)
    close(adv_PG.flatten(), theirs, **TIGHT)
    assert float(adv_PG.mean()) == pytest.approx(0, abs=1e-14)


def test_the_median_baseline_is_the_median():
    median = function_of("median_baseline", SCRIPT, "median")
    for group in (4, 5):
        reward_PG = rewards(group=group).double()
        for adv_G, reward_G in zip(median(reward_PG).tolist(), reward_PG.tolist()):
            middle = statistics.median(reward_G)
            assert adv_G == pytest.approx([reward - middle for reward in reward_G], abs=1e-12)


# -------------------------------------------------------------------------------------- curriculum
def test_half_of_a_batch_are_the_prompts_that_varied_most(alone):
    rollout_batch = function_of("curriculum", SCRIPT, "rollout_batch")
    drawn = []

    def spread_of(row):
        return 0.0 if row in (8, 3) else float(row + 1)

    def rollout(rows_P, serials, n, sampling):
        drawn.append((rows_P, serials))
        spread_P1 = torch.tensor([[spread_of(row)] for row in rows_P], dtype=torch.float64)
        reward_PG = spread_P1 * torch.tensor([0.0, math.sqrt(2)])
        return [[row, row] for row in rows_P], reward_PG[None]

    share = partial(packing.share, 12, 0, world=World(0, 1, torch.device("cpu"), torch.float32))
    rollout_batch.__globals__.update(
        args=SimpleNamespace(prompts=4, group=2, seed=0, resample=1),
        world=SimpleNamespace(rank=0, size=1),
        engine=SimpleNamespace(share=share),
        train_rows=list(range(12)),
        rollout=rollout,
        reward_functions=[None],
        reward_weights=[1.0],
        sampling=None,
        state={"again": [8, 3]},
    )
    _, _, _, count, equal, spreads = rollout_batch(0)
    (first, serials), (second, more_serials) = drawn
    fresh = packing.take(12, 0, 0, 6)
    assert first == [8, 3, *fresh[2:4]] and serials == [0, 1, 2, 3] and equal == 2
    assert second == fresh[4:] and more_serials == [4, 5] and count == 6  # fresh prompts alone
    assert [row for _, row in spreads] == first + second
    expected = [spread_of(row) for row in first + second]
    assert [spread for spread, _ in spreads] == pytest.approx(expected)


def test_prompts_whose_rewards_varied_are_drawn_again():
    def again(*spreads):
        state = {"consumed": 8}
        run_lines(
            patched_source(SCRIPT, "curriculum"),
            'state["consumed"] += drawn',
            "rollouts = ",
            state=state,
            drawn=6,
            spreads=spreads,
            args=SimpleNamespace(prompts=4),
        )
        assert state["consumed"] == 14
        return state["again"]

    assert again((0.5, 3), (0.0, 9), (1.5, 4), (0.7, 8)) == [4, 8]
    assert again((0.0, 3), (0.0, 9), (1.5, 4), (0.0, 8)) == [4]


# ------------------------------------------------------------------------------------- two answers
class Tokens:
    """A tokenizer of numbers, of which 1 ends an answer."""

    stop_ids = frozenset({1})

    def decode(self, ids, skip_special=False):
        return " ".join(str(i) for i in ids)


@pytest.fixture
def dialogues(alone):
    """-> (model, turn_ids, groups of rollouts, what the reward was given)."""
    model, turn_ids, seen, seeds = small_model(), [50, 51, 52], [], []
    engine = Engine(model, Tokens.stop_ids)

    def generate(prompts, n, sampling, seeds_P):
        seeds.extend(seed + i for seed in seeds_P for i in range(n))
        return engine.generate(prompts, n, sampling, seeds_P)

    def length(completions, completion_ids, prompt_ids, **columns):
        seen.append((prompt_ids, completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    rollout = function_of("multi_turn", SCRIPT, "rollout")
    rollout.__globals__.update(
        args=SimpleNamespace(seed=3),
        engine=SimpleNamespace(generate=generate, version=0),
        tokenizer=Tokens(),
        reward_functions=[Reward("length", length)],
        turn_ids=turn_ids,
        play=answer_once,
    )
    rows_P = [{"prompt": "a", "prompt_ids": random_ids(4, 0)}]
    rows_P.append({"prompt": "b", "prompt_ids": random_ids(7, 1)})
    groups, reward_FPG = rollout(rows_P, [10, 11], 3, Sampling(20))
    assert len(set(seeds)) == 12  # each answer draws random numbers of its own
    return model, turn_ids, groups, reward_FPG, seen


def test_a_turn_is_not_trained_and_the_reward_reads_the_second_answer(dialogues):
    model, turn_ids, groups, reward_FPG, ((prompt_ids, answers),) = dialogues
    rollouts = [r for group in groups for r in group]
    assert [len(group) for group in groups] == [3, 3]
    assert reward_FPG.flatten().tolist() == [len(ids) for ids in answers]
    firsts = []
    for r, prompt, answer in zip(rollouts, prompt_ids, answers):
        first = r.ids[: len(r.ids) - len(answer) - 3]
        firsts.append(first)
        assert prompt == r.prompt + first + turn_ids and r.ids == first + turn_ids + answer
        assert r.sampled.tolist() == [True] * len(first) + [False] * 3 + [True] * len(answer)
        assert r.length == len(first) + len(answer) and not r.logp[~r.sampled].any()
        assert r.finish == ("stop" if answer[-1] == 1 else "length")
        example = r.example()
        assert example.num_targets == r.length
        assert (example.mask[len(r.prompt) :] == r.sampled).all()
    assert any(len(ids) < 20 for ids in firsts)
    found = length_metrics([rollouts])
    mean = sum(len(a) + len(b) for a, b in zip(firsts, answers)) / 6
    assert found["completions/mean_length"] == pytest.approx(mean)


def test_log_probs_of_a_dialogue_are_those_of_the_trainer(dialogues):
    model, _, groups, _, _ = dialogues
    examples = [r.example() for group in groups for r in group]
    for e, logp in zip(examples, logprobs(model, examples, 200, 1.0, "cpu")):
        assert abs(logp - e.columns["engine_logp"]).max() < 1e-5
        assert not logp[~e.mask].any()


def test_padded_columns_of_a_dialogue_hold_its_sampled_tokens_alone(dialogues):
    """As train_ppo.py lays them out: no value, no reward and no step of GAE for a turn."""
    examples = [r.example() for group in dialogues[2] for r in group]
    logp_BT = nanopost.batch.padded(examples, "engine_logp")
    lengths = [e.num_targets for e in examples]
    assert logp_BT.shape == (6, max(lengths)) and all(
        (logp_BT != 0).sum(1) == torch.tensor(lengths)
    )
    for e in examples:
        e.columns["adv"] = np.zeros(len(e))
    nanopost.batch.add_column(examples, "adv", logp_BT)
    assert all((e.columns["adv"] == e.columns["engine_logp"]).all() for e in examples)


def test_other_log_probs_of_a_turn_change_no_gradient(dialogues):
    """What is masked is 0 in every column; should it not be, it is still masked."""
    model, _, groups, _, _ = dialogues
    examples = [r.example() for group in groups for r in group]
    gradients = []
    for garbage in (0.0, 7.0):
        for e in examples:
            e.columns["adv"] = 0.5 * e.mask
            e.columns["engine_logp"][~e.mask] = garbage
        batch = batch_of(examples)
        assert isinstance(batch, Batch)
        logp_N, _ = model(batch)
        ratio_N = losses.log_ratio(logp_N, batch["engine_logp"], batch.sequences, "sequence")
        weight_N = losses.token_weights(batch.sequences, "sequence")
        loss, _ = losses.policy_loss_clip(ratio_N, logp_N, batch["adv"], weight_N, 0.2, 0.2)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all((a == b).all() for a, b in zip(*gradients))


# -------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks_grpo")
    toy.write_model(folder / "model")
    lines = [json.dumps(row) + "\n" for row in toy.prompt_rows(held_out=False)[:20]]
    (folder / "prompts.jsonl").write_text("".join(lines))
    (folder / "reward.py").write_text(
        "def digits(completions, **columns):\n"
        '    return [sum(c.isdigit() for c in text[0]["content"]) / 8 for text in completions]\n'
    )
    return folder


def grpo(place, out, *more):
    """A run of three steps; the letters end about half of the answers."""
    return (
        *("--model", place / "model", "--data", place / "prompts.jsonl", "--out", out),
        *("--eval_data", place / "prompts.jsonl", "--reward", f"{place}/reward.py:digits"),
        *("--prompts", 4, "--group", 4, "--max_new_tokens", 8, "--stop", *"abcdefghijklmnopqrst"),
        *("--steps", 3, "--save_every", 2, "--lr", 3e-3, "--warmup", 0, "--device", "cpu"),
        *more,
    )


@pytest.mark.slow
def test_a_term_of_ones_own_reaches_sequences_of_advantage_0(place, tmp_path):
    """All rewards are equal, so the policy loss has no gradient; the entropy bonus has one."""
    equal = ("--reward", "regex:never", "--steps", 2, "--minibatches", 1)
    run(patched(tmp_path) / SCRIPT, *grpo(place, tmp_path / "without", *equal))
    assert all(m["grad_norm"] == 0 == m["loss"] for m in metrics(tmp_path / "without")[1:])
    script = patched(tmp_path, "entropy_bonus") / SCRIPT
    run(script, *grpo(place, tmp_path / "with", *equal, "--entropy_coef", 0.1))
    for m in metrics(tmp_path / "with")[1:]:
        assert m["grad_norm"] > 0 and m["loss"] == pytest.approx(-0.1 * m["entropy"], rel=1e-5)


@pytest.mark.slow
def test_a_batch_of_answers_cut_off_has_no_gradient_and_no_error(place, tmp_path):
    script = patched(tmp_path, "overlong_mask") / SCRIPT
    flags = ("--max_new_tokens", 1, "--stop", "no such text", "--beta", 0.1)
    run(script, *grpo(place, tmp_path / "run", *flags))
    assert all(m["grad_norm"] == 0 == m["loss"] for m in metrics(tmp_path / "run")[1:])


@pytest.mark.slow
def test_a_delta_below_the_clip_is_refused(place, tmp_path):
    script = patched(tmp_path, "two_sided_clip") / SCRIPT
    done = run(script, *grpo(place, tmp_path / "run", "--delta", 1.1), ok=False)
    assert "error: --delta 1.1 must be above 1 + HIGH of --clip, 1.2." in done.stderr


@pytest.mark.slow
def test_a_curriculum_resumes_and_does_not_depend_on_the_number_of_ranks(place, tmp_path):
    script = patched(tmp_path, "curriculum") / SCRIPT
    for ranks in (0, 2):
        run(script, *grpo(place, tmp_path / f"{ranks}"), ranks=ranks)
    one, two = metrics(tmp_path / "0"), metrics(tmp_path / "2")
    for a, b in zip(one, two, strict=True):
        for name in ("reward", "reward_std", "grad_norm", "completions/mean_length"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-3), (a["step"], name)
    whole = weights(tmp_path / "0")
    (state,) = (tmp_path / "0" / "checkpoints").glob("*/state.json")
    assert 0 < len(json.loads(state.read_text())["again"]) <= 2
    (tmp_path / "0" / "model.safetensors").unlink()
    done = run(script, *grpo(place, tmp_path / "0", "--resume"))
    assert "resumed at step 2" in done.stdout and weights(tmp_path / "0") == whole
    assert metrics(tmp_path / "0")[3]["reward"] == one[3]["reward"]


@pytest.mark.slow
def test_two_answers_on_two_ranks_are_those_on_one(place, tmp_path):
    """And the gap of engine and trainer is rounding."""
    script = patched(tmp_path, "multi_turn") / SCRIPT
    flags = [x for x in flags_of("multi_turn") if x not in ("--reward", "gsm8k")]
    for ranks in (0, 2):
        run(script, *flags, *grpo(place, tmp_path / f"{ranks}", "--steps", 2), ranks=ranks)
    one, two = metrics(tmp_path / "0"), metrics(tmp_path / "2")
    for a, b in zip(one, two, strict=True):
        for name in ("reward", "completions/mean_length", "eval/accuracy", "num_tokens"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-6), (a["step"], name)
    assert one[1]["grad_norm"] == pytest.approx(two[1]["grad_norm"], rel=1e-4)
    assert all(m["sampling/sampling_logp_difference/max"] < 1e-4 for m in one[1:])
    assert one[1]["completions/max_length"] > 8


def test_a_folder_that_a_forks_flag_names_is_not_replaced(alone, tmp_path):
    """Run looks at the value of every flag, whatever its name."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    world = World(0, 1, torch.device("cpu"), torch.float32)
    for flag in ({"teacher": str(folder)}, {"teachers": ["none", f"model:{folder}"]}):
        arguments = {"out": str(folder), "lr": 1e-3, **flag}
        with pytest.raises(InputError, match=f"this run reads {folder}"):
            Run(folder, world, 3, arguments, []).start(
                None, None, {"step": 0}, resume=False, overwrite=True, about={}
            )
    assert not list(folder.iterdir())


# --------------------------------------------------------------------------------- length penalty
def test_of_right_answers_the_shorter_are_worth_more():
    """2502.04463, by hand; a group without a right answer, one with a single one, and one in which
    no reward applies to an answer."""
    nan = math.nan
    rewards_PG = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0, -1, 0, 0], [0, 1, 0, 0], [nan, 1, 0, 1]])
    lengths = [[4, 1, 10, 4], [3, 5, 7, 9], [2, 8, 2, 2], [5, 6, 7, 6]]
    groups = [[SimpleNamespace(length=n) for n in row] for row in lengths]
    worth = function_of("length_penalty", SCRIPT, "worth")
    worth.__globals__["args"] = SimpleNamespace(length_penalty=0.3)
    found = worth(rewards_PG.double(), groups)
    expected = rewards_PG.tolist()
    right = [4, 10, 4]
    mean = sum(right) / 3
    std = math.sqrt(sum((n - mean) ** 2 for n in right) / 3)
    for i, n in ((0, 4), (2, 10), (3, 4)):
        expected[0][i] *= 1 - 0.3 / (1 + math.exp(-(n - mean) / (std + 1e-4)))
    for p, i in ((2, 1), (3, 1), (3, 3)):  # as long as the mean
        expected[p][i] *= 1 - 0.3 / 2
    close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True, **TIGHT)
    assert worth(torch.zeros(0, 4), []).shape == (0, 4)  # of a rank without prompts


# ------------------------------------------------------------------------------------------- ECHO
def test_echo_adds_the_cross_entropy_of_what_the_environment_said(alone):
    """2605.24517: the gradient of - coef sum log p / n over what was not sampled of a completion,
    by the whole logits of each episode alone."""
    model, examples = small_model(3), []
    for seed, sampled in enumerate(("0011100110", "00010", "000110001", "0000")):
        mask = np.array([x == "1" for x in sampled])
        examples.append(Example(random_ids(len(mask), seed), mask))
    names = run_lines(
        patched_source(SCRIPT, "echo"),
        "turns = []",
        "# If the policy loss",
        args=SimpleNamespace(echo_coef=0.3, tokens=14),
        world=SimpleNamespace(device="cpu"),
        model=model,
        minibatch=examples,
        meter=SimpleNamespace(add=lambda *_, **__: None),
    )
    assert names["heard"] == 3 + 1 + 3
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = 0.0
    for e in examples:
        first = int(e.mask.argmax()) if e.mask.any() else len(e)  # dropped by a fork
        cu = torch.tensor([0, len(e)], dtype=torch.int32)
        ids = torch.from_numpy(e.ids).long()
        logit_TV = model.model.packed(ids, torch.arange(len(e)), cu, len(e)) @ model.head_weight.T
        for t in range(first, len(e)):
            if not e.mask[t]:
                loss = loss - 0.3 * logit_TV[t - 1].log_softmax(-1)[ids[t]] / 7
    loss.backward()
    for name, p in model.named_parameters():
        largest = float(p.grad.abs().max())
        close(found[name], p.grad, rtol=1e-4, atol=1e-5 * largest)
