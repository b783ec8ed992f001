"""Many examples through a model, in micro-batches: each gets what it would get alone."""

import json
import math

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing as mp
from small import random_ids, small_config, small_model

from nanopost import StepError
from nanopost.batch import Example, batch_of
from nanopost.forward import add_logprobs, add_values, batches, check_finite, logprobs, scores
from nanopost.model import ActorCritic, ScalarModel


def examples(*lengths, prompt=1):
    return [Example(random_ids(n, seed), np.arange(n) >= prompt) for seed, n in enumerate(lengths)]


# ------------------------------------------------------------------------------------ micro-batches
@pytest.mark.parametrize("tokens", [12, 20, 1000])
def test_batches_hold_every_unit_once_within_the_budget(alone, tokens):
    pairs = [tuple(examples(a, b)) for a, b in ((3, 9), (2, 2), (5, 1), (4, 4), (1, 6))]
    made = list(batches(pairs, tokens, "cpu"))
    assert max(len(batch.token_N) for batch in made) <= tokens and not made[0].dummy
    seen = []
    for batch in made:
        parts = batch.token_N.split(batch.cu_seqlens.diff().tolist())
        sides = [tuple(part.tolist()) for part in parts]
        seen += zip(sides[0::2], sides[1::2])
        assert batch.num_examples == len(sides) and len(sides) % 2 == 0
    whole = [tuple(tuple(e.ids.tolist()) for e in pair) for pair in pairs]
    assert sorted(seen) == sorted(whole)


def test_single_examples_are_units_too_and_nothing_gives_a_dummy(alone):
    made = list(batches(examples(3, 4, 5), 8, "cpu"))
    assert sorted(batch.num_examples for batch in made) == [1, 2]
    (dummy,) = batches([], 8, "cpu")
    assert dummy.dummy and dummy.num_examples == 0


def _rank(rank, size, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size
    )
    mine = examples(3, 4, 5) if rank == 1 else []
    found = [batch.num_examples for batch in batches(mine, 5, "cpu")]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_every_rank_has_as_many_batches_as_the_one_with_most(tmp_path):
    """Of one with nothing all are dummies."""
    mp.start_processes(_rank, (2, tmp_path), nprocs=2, start_method="fork")
    none, all_of_them = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert none == [0, 0, 0] and all_of_them == [1, 1, 1]


# -------------------------------------------------------------------------------- numbers of tokens
@pytest.mark.parametrize("tokens", [15, 1000])
def test_log_probs_are_those_of_each_example_alone_and_aligned_with_its_ids(alone, tokens):
    model, made = small_model(), examples(9, 15, 2, 1, 7)
    found = logprobs(model, made, tokens, 0.7, "cpu")
    for e, logp in zip(made, found, strict=True):
        expected = np.zeros(len(e), np.float32)
        if len(e) > 1:
            logp_N, _ = model(batch_of([e]), 0.7)
            expected[1:] = logp_N[:-1].detach()
        assert logp.dtype == np.float32
        np.testing.assert_allclose(logp, expected, atol=1e-5)
        assert (logp[e.mask & (np.arange(len(e)) > 0)] < 0).all()
    add_logprobs(made, "ref_logp", model, tokens, 0.7, "cpu")
    for e, logp in zip(made, found):
        assert np.array_equal(e.columns["ref_logp"], logp)


def with_kept(made, vocab=61):
    """Give each token a random set of kept ids with itself."""
    draw = np.random.default_rng(0)
    for e in made:
        others = [draw.permutation(vocab)[: draw.integers(0, 30)] for _ in e.ids]
        e.kept = [np.union1d(ids, [token]) for ids, token in zip(others, e.ids)]
    return made


@pytest.mark.parametrize("tokens", [15, 1000])
def test_over_kept_ids_log_probs_are_those_of_each_example_alone(alone, tokens):
    """Of any model: the reference's are renormalised over the policy's sets."""
    model, made = small_model(4), with_kept(examples(9, 15, 2, 1, 7))
    found = logprobs(model, made, tokens, 0.7, "cpu")
    for e, logp in zip(made, found, strict=True):
        position, cu = torch.arange(len(e)), torch.tensor([0, len(e)], dtype=torch.int32)
        ids = torch.from_numpy(e.ids).long()
        hidden = model.model.packed(ids, position, cu, len(e))
        p_TV = (model.logits(hidden) / 0.7).detach().double().softmax(-1).numpy()
        expected = [np.log(p[t] / p[k].sum()) for p, t, k in zip(p_TV, e.ids[1:], e.kept[1:])]
        np.testing.assert_allclose(logp, [0, *expected], atol=1e-5)


@pytest.mark.parametrize("own", [True, False])
def test_a_value_is_that_of_the_state_before_the_token(alone, own):
    config = small_config()
    model = ActorCritic(config, config.with_scalar_head(None) if own else None)
    for seed, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(seed))
    made = examples(9, 15, 2, 7, prompt=2)
    add_values(made, model, 16, "cpu")
    for e in made:
        value_N = model(batch_of([e]))[2].detach()
        expected = np.zeros(len(e))
        for t in range(2, len(e)):
            expected[t] = value_N[t - 1]
        assert e.columns["value"] == pytest.approx(expected, abs=1e-5)
    assert np.abs(made[0].columns["value"][2:]).min() > 1e-4


def test_log_probs_of_no_examples_are_none(alone):
    assert logprobs(small_model(), [], 10, 1.0, "cpu") == []


def test_a_score_is_the_number_at_the_last_token_whatever_the_budget():
    model = ScalarModel(small_config())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2, generator=torch.Generator().manual_seed(p.numel()))
    made = examples(9, 15, 2, 1, 7)
    expected = [float(model(batch_of([e]))[-1].detach()) for e in made]
    assert max(expected) - min(expected) > 0.1
    for tokens in (4, 16, 1000):  # 4: fewer than the longest example has
        assert scores(model, made, tokens, "cpu") == pytest.approx(expected, abs=1e-5)


# --------------------------------------------------------------------------------------- not finite
def decode(ids):
    return "ids " + " ".join(map(str, ids))


def with_adv(*values):
    made = examples(*[4] * len(values))
    for e, value in zip(made, values):
        e.columns["adv"] = value
        e.columns["old_logp"] = np.zeros(4, np.float32)
    return made


@pytest.mark.parametrize("norm", [0.0, 1e30])
def test_a_finite_gradient_norm_costs_nothing(norm):
    check_finite(norm, 1, None, None, None)  # not even a forward pass


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_column_that_is_not_finite_is_named_with_step_and_example(alone, value):
    made = with_adv(1.0, value, 2.0, value)
    said = rf"step 7: .* norm is nan; not finite: adv of '{decode(made[1].ids)}' .*the first of 2 "
    with pytest.raises(StepError, match=said):
        check_finite(math.nan, 7, small_model(), made, decode)


def test_a_value_of_one_token_is_found_too(alone):
    made = with_adv(1.0, 2.0)
    made[1].columns["old_logp"][2] = -math.inf
    with pytest.raises(StepError, match=f"old_logp of '{decode(made[1].ids)}'"):
        check_finite(math.inf, 7, small_model(), made, decode)


def test_a_weight_that_is_not_finite_shows_in_the_models_output(alone):
    model, made = small_model(), with_adv(1.0, math.nan)
    with torch.no_grad():
        model.model.norm.weight[3] = math.inf
    said = rf"step 2: .*: the model's output of '{decode(made[0].ids)}' .*the first of 2 such"
    with pytest.raises(StepError, match=said):
        check_finite(math.inf, 2, model, made, decode)


def test_where_every_example_is_finite_the_loss_is_blamed(alone):
    said = "step 3: .* inf; no single example gives one: the loss overflows.* still finite"
    with pytest.raises(StepError, match=said):
        check_finite(math.inf, 3, small_model(), with_adv(1.0, 2.0), decode)
    with pytest.raises(StepError, match="no single example"):
        check_finite(math.inf, 3, small_model(), [], decode)


def test_a_reward_models_scores_are_checked_as_well(alone):
    model = ScalarModel(small_config())
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    with pytest.raises(StepError, match="the model's output of .*the first of 2"):
        check_finite(math.nan, 1, model, examples(3, 4), decode)
