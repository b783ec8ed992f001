"""Preference losses against TRL's installed code (its methods are run, not transcribed) or the
closed form; what each loss is given, and the metrics of pairs. The scripts:
test_preference_scripts.py.

loss          oracle                          loss          oracle
sigmoid       TRL; smoothed: closed form      aot, unpaired TRL
              (TRL has none there)            apo_*         TRL
sigmoid_norm  TRL                             discopop      TRL
ipo, hinge    TRL                             simpo, cpo    TRL's cpo_loss, and the nll
robust, exo   TRL                             orpo          TRL's odds_ratio_loss, and the nll
nca, sppo     TRL                             sft           TRL
bco           TRL at shift 0; shifted:        kto           TRL
              closed form
"""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanopost import InputError, pairs, preference
from nanopost.batch import Example, batch_of
from nanopost.forward import gather_pairs

P, T, BETA = 7, 9, 0.3
ALL = preference.LOSSES | preference.COUPLED


@pytest.fixture
def step():
    """Random log-probs of P pairs of uneven answers -> (examples as pairs, logp [S][T])."""
    draw = np.random.default_rng(3)
    made, logp_ST = [], -draw.exponential(1.0, (2 * P, T))
    for _ in range(P):
        prompt = int(draw.integers(1, 4))
        sides = []
        for _ in range(2):
            length = int(draw.integers(prompt + 1, T + 1))
            sides.append(Example(np.arange(length) + 1, np.arange(length) >= prompt))
        made.append(tuple(sides))
    for s, e in enumerate(e for pair in made for e in pair):
        logp_ST[s, : len(e)] *= e.mask
        logp_ST[s, len(e) :] = 0
        e.columns["ref_logp"] = float(np.float32(logp_ST[s].sum() + draw.normal()))
    return made, logp_ST


def ours(step, name, smoothing=0.0, f_score=preference.reverse_kl):
    """-> loss (a mean over pairs) and its gradient with respect to logp_ST."""
    made, logp_ST = step
    pairs.add_columns(made)
    flat = [e for pair in made for e in pair]
    batch = batch_of(flat)
    logp = torch.tensor(logp_ST, requires_grad=True)
    shifted = [F.pad(logp[s, 1 : len(e)], (0, 1)) for s, e in enumerate(flat)]
    logp_N = torch.cat(shifted)
    sequences = {
        "logp": batch.sequences.sum(logp_N * batch["weight"]),
        "nll": batch.sequences.sum(-logp_N),
        "ref_logp": batch["ref_logp"],
        "length": batch["length"],
    }
    loss_P = preference.weighted(
        [ALL[name]],
        [1.0],
        preference.read_pairs(sequences, f_score),
        beta=BETA,
        smoothing=smoothing,
        shift=0.0,
        nll_tokens=float(np.mean([e.num_targets for e in flat[0::2]])),
    )
    loss_P.mean().backward()
    mask_ST = np.array([np.pad(e.mask, (0, T - len(e))) for e in flat])
    # elsewhere a model gives constants
    return float(loss_P.detach().mean()), logp.grad.numpy() * mask_ST


def theirs(step, name, dtype=torch.float64, smoothing=0.0, divergence="reverse_kl", alpha=1.0):
    """The same from DPOTrainer._compute_loss, run with a stub for itself and for the model."""
    trl = pytest.importorskip("trl")
    made, logp_ST = step
    flat = [pair[side] for side in range(2) for pair in made]
    order = [*range(0, 2 * P, 2), *range(1, 2 * P, 2)]
    mask_ST = torch.zeros(2 * P, T, dtype=torch.long)
    for s, e in enumerate(flat):
        mask_ST[s, : len(e)] = torch.tensor(e.mask)
    logp = torch.tensor(logp_ST[order], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(2 * P, T - 1, dtype=dtype)
    outputs = SimpleNamespace(
        log_probs=logp[:, 1:], entropy=zeros, mean_logits=zeros, is_top1=zeros > 1
    )
    reference = torch.tensor([e.columns["ref_logp"] for e in flat], dtype=dtype)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=alpha,
        loss_types=[name],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=smoothing,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=SimpleNamespace(
            device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
    )
    inputs = {
        "input_ids": torch.ones(2 * P, T, dtype=torch.long),
        "attention_mask": torch.ones(2 * P, T),
        "completion_mask": mask_ST,
        "ref_chosen_logps": reference[:P],
        "ref_rejected_logps": reference[P:],
    }
    loss = trl.DPOTrainer._compute_loss(stub, lambda **inputs: outputs, inputs, False)
    loss.backward()
    grad = np.empty((2 * P, T))
    grad[order] = logp.grad.double().numpy() * mask_ST.numpy()
    return float(loss.detach()), grad


def same(a, b, tolerance=1e-9):
    assert a[0] == pytest.approx(b[0], rel=tolerance, abs=tolerance)
    np.testing.assert_allclose(a[1], b[1], rtol=tolerance, atol=tolerance)
    assert np.abs(a[1]).max() > 1e-3


@pytest.mark.parametrize(
    "name, their_name, smoothing",
    [
        ("sigmoid", "sigmoid", 0.0),
        ("sigmoid_norm", "sigmoid_norm", 0.0),
        ("ipo", "ipo", 0.0),
        ("hinge", "hinge", 0.0),
        ("robust", "robust", 0.2),
        ("exo", "exo_pair", 0.1),
        ("nca", "nca_pair", 0.0),
        ("bco", "bco_pair", 0.0),
        ("sppo", "sppo_hard", 0.0),
        ("aot", "aot", 0.1),
        ("aot_unpaired", "aot_unpaired", 0.1),
        ("apo_zero", "apo_zero", 0.0),
        ("apo_down", "apo_down", 0.0),
        ("discopop", "discopop", 0.0),
        ("sft", "sft", 0.0),
    ],
)
def test_losses_and_gradients_are_those_of_trl(step, name, their_name, smoothing):
    # exo: TRL makes its epsilon an fp32 tensor; aot: a Batch's reference is fp32, and so is a
    # difference of two
    tolerance = 1e-6 if name in ("exo", "aot") else 1e-9
    expected = theirs(step, their_name, smoothing=smoothing)
    same(ours(step, name, smoothing=smoothing), expected, tolerance)


def alpha_of(alpha):
    return lambda log_ratio: preference.alpha_divergence(log_ratio, alpha)


@pytest.mark.parametrize(
    "f_score, their_name, alpha",
    [
        (preference.forward_kl, "forward_kl", 1.0),
        (preference.js, "js_divergence", 1.0),
        (alpha_of(0.5), "alpha_divergence", 0.5),
        (alpha_of(1.0), "alpha_divergence", 1.0),
    ],
)
def test_divergences_are_those_of_trl(step, f_score, their_name, alpha):
    dtype, tolerance = torch.float64, 1e-9
    if their_name == "alpha_divergence":  # TRL's has no float64
        dtype, tolerance = torch.float32, 2e-5
    expected = theirs(step, "sigmoid", dtype, divergence=their_name, alpha=alpha)
    same(ours(step, "sigmoid", f_score=f_score), expected, tolerance)


def of_pairs(c, r):
    """Pairs with these log-ratios, of answers of two tokens -> (what losses read, logp_S)."""
    logp_S = torch.tensor(list(zip(c, r)), dtype=torch.float64).flatten().requires_grad_()
    sequences = {
        "logp": logp_S,
        "nll": -logp_S,
        "ref_logp": torch.zeros(len(logp_S)),
        "length": torch.full((len(logp_S),), 2.0),
    }
    return preference.read_pairs(sequences), logp_S


def loss_of(name, pairs_P, **scalars):
    return preference.weighted([ALL[name]], [1.0], pairs_P, beta=BETA, **scalars)


def test_smoothed_sigmoid_is_the_cross_entropy_to_the_smoothed_label():
    """cDPO: minimal where the policy's preference is 1 - smoothing."""
    pairs_P, logp_S = of_pairs([math.log(9) / BETA], [0.0])  # sigmoid(beta margin) = 0.9
    loss_P = loss_of("sigmoid", pairs_P, smoothing=0.1)
    assert float(loss_P.detach()) == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    loss_P.sum().backward()
    assert logp_S.grad.abs().max() < 1e-12


def test_the_shift_of_bco_is_the_boundary():
    pairs_P, _ = of_pairs([2.0], [1.0])
    loss_P = loss_of("bco", pairs_P, shift=0.4)
    expected = math.log1p(math.exp(-(0.6 - 0.4))) + math.log1p(math.exp(0.3 - 0.4))
    assert float(loss_P.detach()) == pytest.approx(expected)


def test_simpo_and_cpo_are_those_of_trl():
    """TRL's simpo averages log-probs over tokens before it calls its loss; cpo adds the nll."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    pairs_P, logp_S = of_pairs([-3.0, -1.0, -2.5], [-2.0, -4.0, -2.5])
    chosen_P, rejected_P = logp_S.detach().view(-1, 2).T

    def theirs(loss_type, *logps):
        self = SimpleNamespace(
            alpha=0.0,
            beta=BETA,
            label_smoothing=0.1,
            accelerator=SimpleNamespace(device="cpu"),
            loss_type=loss_type,
            simpo_gamma=0.7,
        )
        return cpo.CPOTrainer.cpo_loss(self, *logps)[0]

    simpo = loss_of("simpo", pairs_P, smoothing=0.1, gamma=0.7).detach()
    torch.testing.assert_close(simpo, theirs("simpo", chosen_P / 2, rejected_P / 2))
    ours = loss_of("cpo", pairs_P, smoothing=0.1, nll_tokens=2.0).detach()
    nll_P = torch.tensor([3.0, 1.0, 2.5]) / 2
    torch.testing.assert_close(ours, theirs("sigmoid", chosen_P, rejected_P) + nll_P)


def test_orpo_is_that_of_trl():
    orpo = pytest.importorskip("trl.experimental.orpo")
    pairs_P, logp_S = of_pairs([-3.0, -1.0, -0.01], [-2.0, -4.0, -2.5])
    pairs_P["chosen_nll_P"] = torch.tensor([0.0, 2.0, 4.0])
    self = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    mean_2P = logp_S.detach().view(-1, 2).T / 2
    expected_P = orpo.ORPOTrainer.odds_ratio_loss(self, *mean_2P)[0]
    loss_P = loss_of("orpo", pairs_P, nll_tokens=4.0).detach()
    torch.testing.assert_close(
        loss_P.float(), torch.tensor([0.0, 0.5, 1.0]) - expected_P.float(), rtol=1e-5, atol=1e-6
    )


def test_kto_is_that_of_trl():
    kto = pytest.importorskip("trl").KTOTrainer
    draw = torch.Generator().manual_seed(0)
    # 5 rows, each followed by its mismatch
    logp_S = -torch.rand(10, 5, generator=draw, dtype=torch.float64)
    ref_S = (logp_S.sum(1) - 0.5 * torch.rand(10, generator=draw)).float().double()
    label_P = torch.tensor([True, False, True, True, False])
    leaf = logp_S[0::2].clone().requires_grad_()
    ids = {
        "input_ids": torch.zeros(5, 6, dtype=torch.long),
        "KL_input_ids": torch.ones(5, 6, dtype=torch.long),
    }

    def model(input_ids, **inputs):
        return SimpleNamespace(
            log_probs=logp_S[1::2] if input_ids[0, 0] else leaf,
            entropy=torch.zeros(5, 5),
            mean_logits=torch.zeros(5, 5),
            is_top1=torch.zeros(5, 5) > 1,
        )

    self = SimpleNamespace(
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=BETA,
        desirable_weight=1.3,
        undesirable_weight=0.8,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=SimpleNamespace(
            device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
    )
    self._compute_kl_logps = lambda m, batch: kto._compute_kl_logps(self, m, batch)
    ones = torch.ones(5, 6, dtype=torch.long)
    loss = kto._compute_loss(
        self,
        model,
        {
            **ids,
            "attention_mask": ones,
            "KL_attention_mask": ones,
            "completion_mask": ones,
            "KL_completion_mask": ones,
            "label": label_P,
            "ref_logps": ref_S[0::2],
            "ref_KL_logps": ref_S[1::2],
        },
        False,
    )
    loss.backward()
    mine = logp_S.sum(1).requires_grad_()
    sequences = {"logp": mine, "nll": -mine, "ref_logp": ref_S, "length": torch.full((10,), 5.0)}
    pairs_P = preference.read_pairs(sequences)
    loss_P = loss_of("kto", pairs_P, label_P=label_P.double(), label_weights=(1.3, 0.8))
    loss_P.mean().backward()
    assert float(loss_P.detach().mean()) == pytest.approx(float(loss.detach()), rel=1e-9)
    torch.testing.assert_close(mine.grad[0::2], leaf.grad[:, 0])
    assert not mine.grad[1::2].any()


@pytest.mark.parametrize(
    "name, smoothing", [("robust", 0.7), ("robust", 0.5), ("exo", 0.7), ("exo", 0.0)]
)
def test_losses_that_need_a_smoothing_within_bounds_say_so(name, smoothing):
    pairs_P, _ = of_pairs([1.0], [0.0])
    with pytest.raises(InputError, match=f"--smoothing {smoothing}: {name} needs"):
        loss_of(name, pairs_P, smoothing=smoothing)


def test_the_reward_model_loss_is_bradley_terry():
    score_S = torch.tensor([2.0, 0.5, -1.0, 1.0], dtype=torch.float64)
    margin_P = torch.tensor([0.0, 0.3], dtype=torch.float64)
    loss_P = preference.reward_model_loss(score_S, margin_P, 0.01)
    expected = [math.log1p(math.exp(-1.5)) + 0.01 * 2.5**2, math.log1p(math.exp(2.3)) + 0.01 * 0.0]
    assert loss_P.tolist() == pytest.approx(expected)


# ----------------------------------------------------------------------------- what a loss is given
def test_a_loss_gets_just_what_it_names_and_losses_add_up_with_their_weights():
    given = []

    def first(chosen_ratio_P, beta):
        given.append((chosen_ratio_P, beta))
        return torch.tensor([1.0, 2.0])

    def second(gamma, rejected_nll_P, nll_tokens):
        given.append((gamma, rejected_nll_P, nll_tokens))
        return torch.tensor([10.0, 20.0])

    pairs_P = {"chosen_ratio_P": "c", "rejected_ratio_P": "r", "rejected_nll_P": "n"}
    scalars = {"beta": 0.1, "gamma": 0.5, "nll_tokens": 3.0, "smoothing": 0.0}
    total_P = preference.weighted([first, second], [2.0, 0.5], pairs_P, **scalars)
    assert given == [("c", 0.1), (0.5, "n", 3.0)]
    assert total_P.tolist() == [7.0, 14.0]


@pytest.mark.parametrize("name", ALL)
def test_a_loss_reads_no_more_of_pairs_than_there_is(name):
    """Its parameters are keys of read_pairs, or numbers that scripts pass."""
    pairs_P, _ = of_pairs([1.0, 2.0], [0.5, 0.0])
    known = {*pairs_P, "nll_tokens", "beta", "smoothing"}
    of_one_loss = {"simpo": {"gamma"}, "bco": {"shift"}, "kto": {"label_P", "label_weights"}}
    named = set(preference.parameters(ALL[name]))
    assert named - of_one_loss.get(name, set()) <= known
    assert of_one_loss.get(name, set()) <= named


def test_chosen_and_rejected_come_in_turn_and_the_divergence_makes_the_score():
    sequences = {
        "logp": torch.tensor([-1.0, -2.0, -3.0, -4.0]),
        "ref_logp": torch.tensor([-1.5, -1.5, -1.5, -1.5]),
        "length": torch.tensor([2.0, 3.0, 0.0, 5.0]),
        "nll": torch.tensor([6.0, 7.0, 8.0, 9.0]),
    }
    found = preference.read_pairs(sequences, lambda log_ratio: 10 * log_ratio)
    assert {name: x_P.tolist() for name, x_P in found.items()} == {
        "chosen_logp_P": [-1, -3],
        "rejected_logp_P": [-2, -4],
        "chosen_ref_logp_P": [-1.5, -1.5],
        "rejected_ref_logp_P": [-1.5, -1.5],
        "chosen_ratio_P": [0.5, -1.5],
        "rejected_ratio_P": [-0.5, -2.5],
        "chosen_score_P": [5, -15],
        "rejected_score_P": [-5, -25],
        "chosen_length_P": [2, 1],  # at least 1: it is divided by
        "rejected_length_P": [3, 5],
        "chosen_nll_P": [6, 8],
        "rejected_nll_P": [7, 9],
    }


def test_all_but_four_losses_need_a_reference_and_one_is_enough():
    without = {name for name in ALL if not preference.needs_reference([ALL[name]])}
    assert without == {"simpo", "sft", "cpo", "orpo"}
    assert preference.needs_reference([preference.sft, preference.ipo])
    assert not preference.needs_reference([preference.sft, preference.orpo])


def test_which_losses_know_a_divergence_and_which_a_smoothing():
    def with_ending(ending):
        return {name for name in ALL if preference.any_reads([ALL[name]], ending)}

    f_divergence = {"sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "exo", "discopop"}
    assert with_ending("_score_P") == f_divergence
    smoothed = {"sigmoid", "sigmoid_norm", "robust", "exo", "simpo", "cpo", "aot", "aot_unpaired"}
    assert with_ending("smoothing") == smoothed
    assert preference.any_reads([preference.sigmoid, preference.nca], "_score_P")
    assert not preference.any_reads([preference.nca], "_score_P")


def logp_of(e):
    """Of a stub model: any number that depends on the token and its place."""
    return -np.arange(len(e)) * e.ids / 10


def test_pairs_are_gathered_with_what_losses_read(step, alone):
    """One row per sequence, in float64, and which of them are this rank's."""
    made, _ = step
    pairs.add_columns(made, train_prompt=True)
    made[1][0].columns["label"] = 0.0

    def model(batch, temperature):
        at_N = torch.where(batch.mask_N, batch.position_N + 1, 0)
        return -at_N * batch.target_N.clamp(min=0) / 10, None

    sequences, mine = gather_pairs(model, made, 20, "cpu")
    flat = [e for pair in made for e in pair]
    assert sorted(mine) == list(range(2 * P))
    assert {x_S.dtype for x_S in sequences.values()} == {torch.float64}
    sequences = {name: x_S[mine] for name, x_S in sequences.items()}
    answer = [float((logp_of(e) * e.columns["weight"]).sum()) for e in flat]
    assert sequences["logp"].tolist() == pytest.approx(answer)
    assert sequences["nll"].tolist() == pytest.approx([float(-logp_of(e).sum()) for e in flat])
    assert sequences["nll"][0] > -sequences["logp"][0]  # the prompt's targets too
    assert sequences["ref_logp"].tolist() == [e.columns["ref_logp"] for e in flat]
    assert sequences["length"].tolist() == [int(e.columns["weight"].sum()) for e in flat]
    assert sequences["targets"].tolist() == [len(e) - 1 for e in flat]
    assert sequences["label"].tolist() == [1.0, 1.0, 0.0] + [1.0] * (2 * P - 3)


# ------------------------------------------------------------------------------------------ metrics
def test_metrics_of_pairs_are_sums_of_rewards_and_log_probs():
    pairs_P, _ = of_pairs([-3.0, -1.0, -2.0], [-2.0, -4.0, -2.0])
    found = {k: float(v.detach()) for k, v in preference.pair_metrics(pairs_P, BETA).items()}
    assert found == pytest.approx(
        {
            "rewards/chosen": -6 * BETA,
            "rewards/rejected": -8 * BETA,
            "rewards/margins": 2 * BETA,
            "rewards/accuracies": 1,  # of three: equal rewards are not right
            "rewards/ties": 1,
            "logps/chosen": -6,
            "logps/rejected": -8,
        }
    )


def test_rewards_are_per_token_where_the_loss_is():
    """The longer answer is the likelier one per token, and the unlikelier one as a whole."""
    pairs_P, _ = of_pairs([-3.0], [-2.0])
    pairs_P |= {"chosen_length_P": torch.tensor([6.0]), "rejected_length_P": torch.tensor([1.0])}
    per_token, whole = (-3 / 6 + 2 / 1) * BETA, (-3 + 2) * BETA
    for names, margin in (
        (["simpo"], per_token),
        (["orpo"], per_token),
        (["simpo", "sft"], per_token),
        (["sigmoid"], whole),
        (["ipo"], whole),  # as in TRL
        (["cpo"], whole),
        (["sft"], whole),
        (["simpo", "sigmoid"], whole),
    ):
        losses = [preference.LOSSES[name] for name in names]
        found = preference.pair_metrics(pairs_P, BETA, losses)
        assert float(found["rewards/margins"].detach()) == pytest.approx(margin), names
        assert int(found["rewards/accuracies"]) == (margin > 0) and not int(found["rewards/ties"])


def test_metrics_of_labelled_rows_compare_each_good_row_with_each_bad_one():
    pairs_P, _ = of_pairs([-3.0, -1.0, -2.0, -5.0, -0.5], [9.0, 9.0, 9.0, 9.0, 9.0])
    label_P = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    found = preference.label_metrics(pairs_P, label_P, BETA)
    assert {name: (float(total), int(count)) for name, (total, count) in found.items()} == {
        "rewards/chosen": (pytest.approx(-5.5 * BETA), 3),
        "rewards/rejected": (pytest.approx(-6 * BETA), 2),
        "rewards/accuracies": (4, 6),  # -3 and -2 above -5 alone, -0.5 above both
        "rewards/ties": (0, 6),
        "logps/chosen": (-5.5, 3),
        "logps/rejected": (-6.0, 2),
    }
    assert not any(total.requires_grad for total, _ in found.values())
    one_kind = preference.label_metrics(pairs_P, torch.ones(5), BETA)
    assert one_kind["rewards/accuracies"][1] == one_kind["rewards/rejected"][1] == 0


def test_log1mexp_is_right_at_both_ends():
    x = torch.tensor([-1e-12, -1e-3, -0.6931, -5.0, -50.0], dtype=torch.float64)
    expected = [
        math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()
    ]
    assert preference.log1mexp(x).tolist() == pytest.approx(expected, rel=1e-12)
    assert math.isfinite(float(F.softplus(preference.log1mexp(torch.zeros(1)))))
