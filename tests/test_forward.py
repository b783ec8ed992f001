"""Many examples through a model, in micro-batches: each gets what it would get alone."""

import math

import numpy as np
import pytest
import torch
from ranks import on_ranks
from small import random_ids, small_config, small_model

from nanopost import StepError, dist
from nanopost import batch as batch_module
from nanopost import model as model_module
from nanopost.batch import Example, batch_of
from nanopost.forward import (
    _families,
    _unit,
    add_logprobs,
    add_values,
    batches,
    check_finite,
    logprobs,
    scores,
)
from nanopost.logprob import logprob
from nanopost.model import ActorCritic, ScalarModel
from nanopost.packing import cost

pytestmark = pytest.mark.usefixtures("few")


def examples(*lengths, prompt=1):
    return [Example(random_ids(n, seed), np.arange(n) >= prompt) for seed, n in enumerate(lengths)]


# ------------------------------------------------------------------------------------ micro-batches
def computed(batch) -> int:
    """The number of tokens that go through the model."""
    return len(batch.token_N if batch.prefixes is None else batch.prefixes.first_U)


@pytest.mark.parametrize("tokens", [12, 20, 1000])
def test_batches_hold_every_unit_once_within_the_budget(alone, tokens):
    pairs = [tuple(examples(a, b)) for a, b in ((3, 9), (2, 2), (5, 1), (4, 4), (1, 6))]
    made = list(batches(small_model(), pairs, tokens, "cpu"))
    assert max(map(computed, made)) <= tokens and not made[0].dummy
    seen = []
    for batch in made:
        parts = batch.token_N.split(batch.cu_seqlens.diff().tolist())
        sides = [tuple(part.tolist()) for part in parts]
        seen += zip(sides[0::2], sides[1::2])
        assert batch.num_examples == len(sides) and len(sides) % 2 == 0
    whole = [tuple(tuple(e.ids.tolist()) for e in pair) for pair in pairs]
    assert sorted(seen) == sorted(whole)


def completions(prompt, *lengths, seed=0):
    """Examples of one prompt, of that many tokens."""
    start = random_ids(prompt, 100 + seed)
    ids = [[*start, *random_ids(n, 10 * seed + i)] for i, n in enumerate(lengths)]
    return [Example(x, np.arange(len(x)) >= prompt) for x in ids]


@pytest.mark.parametrize("tokens", [31, 64, 1000])
def test_completions_of_a_prompt_come_together_and_the_budget_counts_it_once(alone, tokens):
    groups = [completions(20, 3, 5, 4, 6, seed=s) for s in range(3)]
    mixed = [e for at_once in zip(*groups) for e in at_once]
    made = list(batches(small_model(), mixed, tokens, "cpu"))
    assert sum(batch.num_examples for batch in made) == 12
    assert max(map(computed, made)) <= tokens
    # A group is 38 tokens, or two parts with a prompt each; all are 114.
    assert [len(made), sum(map(computed, made))] == {
        31: [6, 174],
        64: [3, 114],
        1000: [1, 114],
    }[tokens]


def test_pairs_share_their_prompt_and_that_of_other_pairs(alone):
    a, b, c, d = completions(20, 3, 5, 4, 6)
    (batch,) = batches(small_model(), [(a, b), (c, d)], 64, "cpu")
    assert computed(batch) == 20 + 3 + 5 + 4 + 6 and batch.num_examples == 4
    # The second side has another prompt: what follows it shares nothing.
    other = examples(30)[0]
    made = list(batches(small_model(), [(a, other), (c, other)], 90, "cpu"))
    assert [computed(batch) for batch in made] in ([53, 54], [54, 53])


KINDS = {
    "groups": lambda: [e for s in range(2) for e in completions(20, 3, 9, 4, 6, seed=s)],
    "pairs": lambda: [tuple(completions(12, 9, 30, seed=s)) for s in range(3)],
    "turns": lambda: [e[:n] for e in completions(10, 40) for n in (17, 29, 50)],
    "the same twice": lambda: completions(10, 8) * 2 + completions(10, 5, seed=1),
    "kept ids": lambda: with_kept(completions(10, 8, 3, 5)),
}


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_prefixes_change_no_number(alone, monkeypatch, kind, how):
    """Log-probs, entropies and gradients in fp32, of the whole vocabulary's entropy too."""
    model = small_model()
    model.model.checkpointing = how

    def numbers():
        found = {}
        for batch in batches(model, KINDS[kind](), 1000, "cpu"):
            logp_N, entropy_N = model(batch, 0.7)
            (logp_N.sum() + entropy_N.square().sum()).backward()
            for e, *x in zip(
                batch.examples, batch.split(logp_N.detach()), batch.split(entropy_N.detach())
            ):
                found[e.ids.tobytes()] = x
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
        return computed(batch), found, gradient

    few, ours, gradient = numbers()
    monkeypatch.setattr(batch_module, "SHARED", 2)
    many, theirs, expected = numbers()
    assert few < many and ours.keys() == theirs.keys()
    for key, (logp, entropy) in ours.items():
        assert np.abs(logp - theirs[key][0]).max() <= 1e-5
        assert np.abs(entropy - theirs[key][1]).max() <= 1e-5
    assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["critic", "critic with a head", "reward model"])
def test_shared_prefixes_change_no_value_and_no_score(alone, monkeypatch, kind):
    config = small_config()
    model = {
        "critic": lambda: ActorCritic(config, config.with_scalar_head(0)),
        "critic with a head": lambda: ActorCritic(config, None),
        "reward model": lambda: ScalarModel(config.with_scalar_head(0)),
    }[kind]()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2, generator=torch.Generator().manual_seed(p.numel()))
    found = []
    for share in (1 / 16, 2):
        monkeypatch.setattr(batch_module, "SHARED", share)
        batch = batch_of(completions(20, 3, 9, 4))
        assert computed(batch) == (36 if share < 1 else 76)
        outputs = model(batch)
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        assert {len(x) for x in outputs} == {76}
        sum(x.square().sum() for x in outputs).backward()
        gradients = [p.grad.flatten() for p in model.parameters()]
        found.append([*(x.detach() for x in outputs), torch.cat(gradients)])
        model.zero_grad(set_to_none=True)
    for ours, expected in zip(*found):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_nothing_as_large_as_whole_sequences_goes_through_a_head(monkeypatch):
    """64 completions of a prompt would be 64 prompts of hidden states."""
    seen = []

    def watched(hidden, weight, target, **more):
        seen.append((len(hidden), len(target)))
        return logprob(hidden, weight, target, **more)

    monkeypatch.setattr(model_module, "logprob", watched)
    batch = batch_of(completions(30, *[2] * 64))
    small_model()(batch)
    assert seen == [(128, 128)] and len(batch.token_N) == 64 * 32
    monkeypatch.setattr(model_module, "scalar_head", lambda hidden, _: seen.append(len(hidden)))
    monkeypatch.setattr(model_module, "whole", lambda *_: None)
    ScalarModel(small_config())(batch)
    assert seen[-1] == computed(batch) == 30 + 128


def test_the_budget_holds_where_a_neighbour_has_only_one_side_of_the_prompt(alone):
    a, b, c = completions(20, 3, 4, 5)
    other = examples(30)[0]
    for units in ([(a, other), (b,), (c,)], [(a,), (b, other), (c,)], [(a,), (c,), (b, other)]):
        for tokens in range(60, 90):
            made = list(batches(small_model(), units, tokens, "cpu"))
            assert max(map(computed, made)) <= tokens


def test_the_budget_holds_where_a_prompt_is_not_worth_sharing(alone):
    units = completions(3, *[97] * 4)
    made = list(batches(small_model(max_position_embeddings=200), units, 391, "cpu"))
    assert sorted(map(computed, made)) == [100, 300] or sorted(map(computed, made)) == [200, 200]


def test_a_family_costs_what_the_model_computes_for_it():
    units = [_unit((e,), 0, i) for i, e in enumerate(completions(200, 30, 50, 7))]
    (family,) = _families(units, 1000)
    assert family.tokens == 200 + 30 + 50 + 7
    assert family.cost == pytest.approx(cost(200) + sum(cost(n, 200) for n in (30, 50, 7)))


def test_groups_are_cut_so_that_ranks_have_as_much_to_do(tmp_path):
    """Three groups cannot be dealt to two ranks otherwise."""

    def task(rank, size):
        groups = [completions(4, *[30] * 4, seed=s) for s in range(3)]
        mine = [e for group in groups for e in group] if rank == 0 else []
        return sum(computed(batch) for batch in batches(small_model(), mine, 1000, "cpu"))

    one, other = on_ranks(2, tmp_path, task)
    assert max(one, other) <= 1.1 * min(one, other) and one + other <= 3 * 124 + 3 * 4


def test_single_examples_are_units_too_and_nothing_gives_a_dummy(alone):
    made = list(batches(small_model(), examples(3, 4, 5), 8, "cpu"))
    assert sorted(batch.num_examples for batch in made) == [1, 2]
    (dummy,) = batches(small_model(), [], 8, "cpu")
    assert dummy.dummy and dummy.num_examples == 0


def test_every_rank_has_as_many_batches_and_as_much_to_do(tmp_path):
    """One rank holds all examples, and others run some of them."""

    def task(rank, size):
        mine = examples(3, 4, 5, 4, 3) if rank == 1 else []
        return [batch.num_examples for batch in batches(small_model(), mine, 8, "cpu")]

    found = on_ranks(2, tmp_path, task)
    assert [len(x) for x in found] == [2, 2] and sum(map(sum, found)) == 5
    assert all(min(x) > 0 for x in found)


def held_by(rank, size):
    """Uneven shares of the same examples, two of them alike, with columns and kept ids."""
    made = with_kept(examples(9, 15, 2, 7, 7, 12, 3, 15))
    made.append(made[3])
    for e in made:
        e.columns["adv"] = np.full(len(e), e.ids[0] / 7, np.float32)
    return {1: [made], 2: [made[1:3], made[3:] + made[:1]]}[size][rank]


def test_micro_batches_do_not_depend_on_who_holds_what(tmp_path, monkeypatch):
    """With --reproducible not even on the number of ranks."""
    monkeypatch.setattr(dist, "reproducible", True)

    def task(rank, size):
        found = []
        for batch in batches(small_model(), held_by(rank, size), 20, "cpu"):
            if not batch.dummy:
                token_E, id_E = batch.kept
                numbers = batch.token_N, batch.cu_seqlens, batch["adv"], token_E, id_E
                found.append([x.tolist() for x in numbers])
        return found

    (one,), two = on_ranks(1, tmp_path, task), on_ranks(2, tmp_path, task)
    assert sorted(two[0] + two[1]) == sorted(one) and len(one) > 2


def test_numbers_come_back_to_who_holds_the_example(tmp_path):
    def task(rank, size):
        found = logprobs(small_model(), held_by(rank, size), 20, 0.7, "cpu")
        return [x.tolist() for x in found]

    (one,), (first, second) = on_ranks(1, tmp_path, task), on_ranks(2, tmp_path, task)
    for expected, logp in zip(one, second[-1:] + first + second[:-1], strict=True):
        assert logp == pytest.approx(expected, abs=1e-5)
    assert one[3] == one[8] and len({tuple(x) for x in one}) == 8


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
    made = [*examples(9, 15, 2, 1, 7), *completions(4, 3, 9, 5)]
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
