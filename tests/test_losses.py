"""Losses in float64: against the installed TRL's own methods, closed forms, and enumeration."""

import inspect
import math
import textwrap
from collections import defaultdict
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from nanopost import InputError, losses
from nanopost.batch import Sequences
from nanopost.rollout import LogpGap

TIGHT = {"rtol": 1e-12, "atol": 1e-12}
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def packed(seed=0, spread=0.5):
    """Six sequences of one stream: prompts, holes in a mask, an empty mask, a masked and an
    unmasked single token."""
    rng = torch.Generator().manual_seed(seed)
    masks = [[0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0], [1], [0], [0, 1, 1, 1, 1, 1, 1, 1]]
    mask_N = torch.tensor([m for mask in masks for m in mask]).bool()
    seq_N = torch.tensor([s for s, mask in enumerate(masks) for _ in mask])
    at_N = torch.tensor([t for mask in masks for t in range(len(mask))])

    logp_N = -3 * torch.rand(len(mask_N), generator=rng) * mask_N
    old_N, ref_N = (
        logp_N + spread * torch.randn(len(mask_N), generator=rng) * mask_N for _ in range(2)
    )
    adv_S = torch.tensor([1.3, -0.7, 0.9, -1.1, 2.0, 0.4])
    return SimpleNamespace(
        logp_N=logp_N.requires_grad_(),
        old_N=old_N,
        ref_N=ref_N,
        mask_N=mask_N,
        seq_N=seq_N,
        at_N=at_N,
        adv_S=adv_S,
        adv_N=adv_S[seq_N] * mask_N,
        S=len(masks),
    )


def sequences(x):
    return Sequences(x.mask_N, x.seq_N, x.S)


def padded(x, values_N):
    return torch.zeros(x.S, int(x.at_N.max()) + 1).index_put((x.seq_N, x.at_N), values_N)


def gradient(loss, leaf_N):
    return torch.autograd.grad(loss, leaf_N, retain_graph=True)[0]


# ---------------------------------------------------------------------------------------------- SFT
def trl_sft(x, loss_type):
    """SFTTrainer.compute_loss over a model that returns these log-probs."""
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    outputs = SimpleNamespace(
        log_probs=x.logp_N * x.mask_N, label_mask=x.mask_N, entropy=x.logp_N, is_top1=x.mask_N
    )
    self = SimpleNamespace(
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        compute_loss_func=None,
        label_smoother=None,
        accelerator=SimpleNamespace(parallelism_config=None, gather_for_metrics=lambda v: v),
        _tp_size=1,
        args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    return sft.SFTTrainer.compute_loss(self, lambda **_: outputs, {"position_ids": x.at_N[None]})


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft_losses_equal_those_of_trl_in_value_and_gradient(loss_type):
    x = packed()
    theirs = trl_sft(x, loss_type)
    loss = {"nll": losses.sft_nll, "dft": losses.sft_dft}[loss_type]
    ours = loss(x.logp_N, x.mask_N) / x.mask_N.sum()
    close(ours, theirs, **TIGHT)
    close(gradient(ours, x.logp_N), gradient(theirs, x.logp_N), **TIGHT)


def test_dft_gradient_of_the_logits_is_that_of_the_probability_itself():
    logits_V = torch.tensor([0.3, -1.0, 2.0], requires_grad=True)
    total = losses.sft_dft(logits_V.log_softmax(0)[1:2], torch.tensor([True]))
    close(gradient(total, logits_V), gradient(-logits_V.softmax(0)[1], logits_V), **TIGHT)


# --------------------------------------------------------------------------------- GRPO against TRL
def trl_grpo(
    x,
    loss_type,
    level="token",
    low=0.2,
    high=0.28,
    beta=0.0,
    max_length=16,
    importance_N=None,
    entropy_N=None,
):
    """GRPOTrainer._compute_loss over a model that returns these log-probs -> (loss, metrics)."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    mask_ST = padded(x, x.mask_N.double())
    outputs = (padded(x, x.logp_N), mask_ST if entropy_N is None else padded(x, entropy_N), None)
    metrics = defaultdict(lambda: defaultdict(list))
    self = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: outputs,
        aux_loss_enabled=False,
        loss_type=loss_type,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=importance_N is not None,
        max_completion_length=max_length,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        _metrics=metrics,
        args=SimpleNamespace(
            delta=None,
            use_bias_correction_kl=False,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
        ),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=entropy_N is not None,
        entropy_coef=0.1,
        use_adaptive_entropy=False,
        accelerator=SimpleNamespace(
            num_processes=1,
            gather=lambda v: v,
            reduce=lambda v, reduction: v,
            pad_across_processes=lambda v, dim, pad_index: v,
            sync_gradients=True,
        ),
    )
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
    if importance_N is not None:
        inputs["importance_sampling_ratio"] = padded(x, importance_N)
    return grpo.GRPOTrainer._compute_loss(self, None, inputs), {
        k: v[0] for k, v in metrics["train"].items()
    }


AGGREGATION = {
    "grpo": "sequence",
    "sapo": "sequence",
    "dapo": "token",
    "cispo": "token",
    "dr_grpo": "constant",
    "luspo": "sequence_sum",
}


POLICY_LOSSES = {
    "sapo": lambda low, high: partial(losses.policy_loss_sapo, tau=(1.0, 1.05)),
    "cispo": lambda low, high: partial(losses.policy_loss_cispo, cap=high),
}


def clip_loss(low, high):
    return partial(losses.policy_loss_clip, low=low, high=high)


def our_grpo(
    x, loss_type, level="token", low=0.2, high=0.28, beta=0.0, max_length=16, importance_N=1.0
):
    how = AGGREGATION[loss_type]
    policy_loss = POLICY_LOSSES.get(loss_type, clip_loss)(low, high)
    weight_N = losses.token_weights(sequences(x), how)
    ratio_N = losses.log_ratio(x.logp_N, x.old_N, sequences(x), level)
    total, metrics = policy_loss(ratio_N, x.logp_N, x.adv_N, weight_N * importance_N)
    total = total + beta * (weight_N * losses.kl_k3(x.logp_N, x.ref_N)).sum()
    tokens = int(x.mask_N.sum())
    ours = total / losses.divisor(how, tokens, x.S, max_length)
    return ours, {name: (value / tokens).item() for name, value in metrics.items()}


GRPO_CASES = [
    ("grpo", {}),
    ("dapo", {}),
    ("dr_grpo", {}),
    ("grpo", {"level": "sequence"}),
    ("grpo", {"beta": 0.3}),
    ("dapo", {"beta": 0.3}),
    ("grpo", {"level": "sequence", "low": 0.03, "high": 0.04, "beta": 0.1}),
    ("dr_grpo", {"low": 0.1, "high": 0.1}),
    ("cispo", {"high": 1.2}),
    ("cispo", {"high": 5.0, "beta": 0.2}),
    ("sapo", {}),
    ("sapo", {"beta": 0.3}),
    ("luspo", {"level": "sequence"}),
    ("luspo", {"level": "sequence", "beta": 0.2}),
]


@pytest.mark.parametrize("loss_type, options", GRPO_CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_grpo_family_equals_trl_in_value_gradient_and_clip_ratios(loss_type, options, seed):
    x = packed(seed)
    theirs, their_metrics = trl_grpo(x, loss_type, **options)
    ours, our_metrics = our_grpo(x, loss_type, **options)
    close(ours, theirs, **TIGHT)
    close(gradient(ours, x.logp_N), gradient(theirs, x.logp_N), **TIGHT)
    # TRL's sequence level counts sequences, ours tokens
    if options.get("level", "token") == "token":
        for name, value in our_metrics.items():
            assert value == pytest.approx(their_metrics[name], abs=1e-12), name
        assert any(our_metrics.values()) or options.get("high") == 5.0 or loss_type == "sapo"


def test_an_entropy_bonus_equals_that_of_trl():
    """Under dapo's aggregation TRL's mean over tokens is the sum divided by the trained tokens."""
    x, draw = packed(), torch.Generator().manual_seed(5)
    entropy_N = (torch.rand(len(x.mask_N), generator=draw) * x.mask_N).requires_grad_()
    theirs, _ = trl_grpo(x, "dapo", entropy_N=entropy_N)
    ours = our_grpo(x, "dapo")[0] - 0.1 * entropy_N.sum() / x.mask_N.sum()
    close(ours, theirs, **TIGHT)
    for leaf_N in (x.logp_N, entropy_N):
        trained = x.mask_N
        close(gradient(ours, leaf_N)[trained], gradient(theirs, leaf_N)[trained], **TIGHT)


def test_on_policy_the_gradient_is_that_of_minus_advantage_times_log_prob():
    x = packed()
    x.old_N = x.logp_N.detach()
    ours, metrics = our_grpo(x, "dapo")
    close(gradient(ours, x.logp_N), -x.adv_N / x.mask_N.sum(), **TIGHT)
    assert set(metrics.values()) == {0.0}


def test_rloo_equals_trl_where_the_ratio_is_of_the_sum():
    rloo = pytest.importorskip("trl.trainer.rloo_trainer")
    x = packed(spread=0.2)
    mask_ST = padded(x, x.mask_N.double())
    metrics = defaultdict(lambda: defaultdict(list))
    self = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(x, x.logp_N), mask_ST, None),
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        model=SimpleNamespace(training=True),
        _metrics=metrics,
        accelerator=SimpleNamespace(gather=lambda v: v, reduce=lambda v, reduction: v),
    )
    theirs = rloo.RLOOTrainer._compute_loss(
        self,
        None,
        {
            "prompt_ids": torch.zeros(x.S, 1),
            "prompt_mask": torch.ones(x.S, 1),
            "advantages": x.adv_S,
            "completion_ids": mask_ST,
            "completion_mask": mask_ST,
            "old_logps": padded(x, x.old_N).sum(1),
        },
    )
    ratio_N = losses.log_ratio(x.logp_N, x.old_N, sequences(x), "sequence_sum")
    weight_N = losses.token_weights(sequences(x), "sequence")
    ours, _ = losses.policy_loss_clip(ratio_N, x.logp_N, x.adv_N, weight_N, 0.2, 0.2)
    # TRL counts a completion without tokens with ratio 1; it has no gradient
    empty = -x.adv_S[[2, 4]].sum() / x.S
    close(ours / x.S, theirs - empty, **TIGHT)
    close(gradient(ours / x.S, x.logp_N), gradient(theirs, x.logp_N), **TIGHT)


# --------------------------------------------------------------------------- engine against trainer
def trl_importance(x, mode, cap):
    """The lines of GRPOTrainer that compute the ratio and cap it, run as they are installed."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    source = inspect.getsource(grpo.GRPOTrainer._generate_and_score_completions)
    first = source.index("                per_token_logps_diff =")
    last = source.index("# Compute the per-token log probabilities for the reference model")
    args = SimpleNamespace(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_clip_max=cap,
    )
    names = {
        "torch": torch,
        "math": math,
        "self": args,
        "mask": padded(x, x.mask_N.double()),
        "old_per_token_logps": padded(x, x.logp_N.detach()),
        "sampling_per_token_logps": padded(x, x.old_N),
    }
    exec(textwrap.dedent(source[first:last]), names)
    return (
        names["vllm_importance_sampling_ratio"].expand_as(names["mask"])[x.seq_N, x.at_N] * x.mask_N
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights_equal_trl_and_metrics_describe_the_ratios_before_the_cap(level, mode):
    x, cap = packed(3), 1.3
    weight_N, metrics = losses.importance_weight(x.logp_N, x.old_N, sequences(x), level, mode, cap)
    close(weight_N, trl_importance(x, f"{level}_{mode}", cap), **TIGHT)
    raw_N = trl_importance(x, f"{level}_truncate", 1e9)
    assert weight_N.max() <= cap < raw_N.max() and not weight_N.requires_grad
    close(metrics["sampling/importance_sampling_ratio/mean"], raw_N.sum(), **TIGHT)
    assert metrics["sampling/capped"] == (raw_N > cap).sum() > 0


def test_no_correction_takes_the_engine_for_the_trainer():
    x = packed(3)
    assert losses.no_correction(x.logp_N, x.old_N, sequences(x)) == (1.0, {})


def test_the_gap_of_engine_and_trainer_is_the_mean_difference_of_their_log_probs(alone):
    x = packed(3)
    gap_N = (x.logp_N - x.old_N).detach().abs()[x.mask_N]
    gap = LogpGap(None, torch.float32)
    for half in (slice(0, 9), slice(9, None)):
        gap.add(x.logp_N[half], x.old_N[half], x.mask_N[half], x.mask_N[half])
    metrics = gap.metrics()
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(float(gap_N.mean()))
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(float(gap_N.max()))
    with pytest.raises(RuntimeError, match=r"step 3: .* \(--max_logp_gap 0.001\)"):
        gap.check(3)
    assert LogpGap(None, torch.bfloat16).limit == 0.1 and LogpGap(0.0, torch.bfloat16).limit == 0
    assert gap.metrics() == {"sampling/sampling_logp_difference/max": 0.0}


def test_importance_weight_multiplies_the_policy_term_alone_as_in_trl():
    x = packed(4)
    weight_N, _ = losses.importance_weight(x.logp_N, x.ref_N, sequences(x), "token", "mask", 1.5)
    theirs, _ = trl_grpo(x, "dapo", beta=0.2, importance_N=weight_N)
    ours, _ = our_grpo(x, "dapo", beta=0.2, importance_N=weight_N)
    close(gradient(ours, x.logp_N), gradient(theirs, x.logp_N), **TIGHT)


# -------------------------------------------------------------------------------- packing and masks
def pieces(x, log_ratio_level="sequence"):
    """Summed GRPO loss with a KL, of whatever sequences x holds."""
    weight_N = losses.token_weights(sequences(x), "sequence")
    ratio_N = losses.log_ratio(x.logp_N, x.old_N, sequences(x), log_ratio_level)
    total, metrics = losses.policy_loss_clip(ratio_N, x.logp_N, x.adv_N, weight_N, 0.1, 0.1)
    return total + 0.1 * (weight_N * losses.kl_k2(x.logp_N, x.ref_N)).sum(), metrics


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
def test_losses_and_metrics_of_split_micro_batches_add_up_to_those_of_one(level):
    x = packed(5)
    whole, whole_metrics = pieces(x, level)
    parts = []
    for first, last in ((0, 1), (2, 2), (3, 5)):
        keep_N = (x.seq_N >= first) & (x.seq_N <= last)
        columns = {name: x_N[keep_N] for name, x_N in vars(x).items() if name.endswith("_N")}
        part = SimpleNamespace(**columns, S=last - first + 1)
        part.seq_N = part.seq_N - first
        parts.append(pieces(part, level))
    total = sum(loss for loss, _ in parts)
    close(total, whole, **TIGHT)
    close(gradient(total, x.logp_N), gradient(whole, x.logp_N), **TIGHT)
    for name, value in whole_metrics.items():
        assert sum(metrics[name] for _, metrics in parts) == value
        assert value.dim() == 0 and not value.requires_grad


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("garbage", [1e4, math.inf, math.nan])
def test_garbage_under_the_mask_leaks_neither_into_values_nor_gradients(level, garbage):
    x = packed(6)
    clean, _ = pieces(x, level)
    clean_grad_N = gradient(clean, x.logp_N)
    dirty_N = x.old_N.where(x.mask_N, garbage)
    for of in (losses.sft_nll, losses.sft_dft):
        logp_N = x.logp_N.detach().where(x.mask_N, garbage).requires_grad_()
        total, expected = of(logp_N, x.mask_N), of(x.logp_N, x.mask_N)
        close(total, expected, **TIGHT)
        close(gradient(total, logp_N), gradient(expected, x.logp_N), **TIGHT)
    x.old_N = dirty_N
    dirty, _ = pieces(x, level)
    assert dirty == clean and torch.equal(gradient(dirty, x.logp_N), clean_grad_N)
    assert not clean_grad_N[~x.mask_N].any()
    weight_N, metrics = losses.importance_weight(
        x.logp_N, dirty_N, sequences(x), level.split("_")[0], "truncate", 3.0
    )
    assert not weight_N[~x.mask_N].any() and all(value.isfinite() for value in metrics.values())


def test_a_micro_batch_with_nothing_trained_gives_zero_and_a_zero_gradient():
    x = packed()
    x.mask_N = torch.zeros_like(x.mask_N)
    x.logp_N = torch.zeros(len(x.mask_N), requires_grad=True)
    x.old_N = x.ref_N = x.adv_N = torch.zeros(len(x.mask_N))
    for level in ("token", "sequence", "sequence_sum"):
        loss, _ = pieces(x, level)
        assert loss == 0 and not gradient(loss, x.logp_N).any()
    assert losses.sft_nll(x.logp_N, x.mask_N) == 0


def test_token_weights_of_a_sequence_sum_to_one_or_to_its_tokens():
    x = packed()
    tokens_S = [4, 3, 0, 1, 0, 7]
    by_sequence = losses.token_weights(sequences(x), "sequence")
    by_token = losses.token_weights(sequences(x), "token")
    for s, tokens in enumerate(tokens_S):
        assert by_sequence[x.seq_N == s].sum() == pytest.approx(float(tokens > 0))
        assert by_token[x.seq_N == s].sum() == tokens
    for how in ("constant", "sequence_sum"):
        assert torch.equal(by_token, losses.token_weights(sequences(x), how))


@pytest.mark.parametrize(
    "how, count", [("token", 15), ("sequence", 6), ("sequence_sum", 6), ("constant", 96)]
)
def test_the_divisor_is_the_count_of_the_aggregation_and_never_zero(how, count):
    assert losses.divisor(how, 15, 6, 16) == count
    assert losses.divisor(how, 0, 0, 16) == 1


def test_fp32_log_probs_stay_fp32_through_every_step():
    torch.set_default_dtype(torch.float32)
    x = packed()
    x.logp_N, x.old_N, x.ref_N, x.adv_N = (
        v.detach().float() for v in (x.logp_N, x.old_N, x.ref_N, x.adv_N)
    )
    assert pieces(x)[0].dtype == torch.float32
    assert losses.sft_dft(x.logp_N, x.mask_N).dtype == torch.float32


# ------------------------------------------------------------------------------- the clip, by cases
@pytest.mark.parametrize(
    "ratio, adv, loss, slope, low, high",
    [
        (1.0, 1.0, -1.0, -1.0, 0, 0),
        (1.5, 1.0, -1.28, 0.0, 0, 1),  # above the clip, gain: cut off
        (1.5, -1.0, 1.5, 1.0, 0, 0),  # above the clip, loss: kept
        (3.0, -1.0, 3.0, 1.0, 0, 0),  # however far
        (0.5, 1.0, -0.5, -1.0, 0, 0),
        (0.5, -1.0, 0.8, 0.0, 1, 0),
    ],
)
def test_clip_cases_by_hand(ratio, adv, loss, slope, low, high):
    """slope: d loss / d ratio, from low 0.2 and high 0.28."""
    log_ratio_N = torch.tensor([math.log(ratio)], requires_grad=True)
    total, metrics = losses.policy_loss_clip(
        log_ratio_N, log_ratio_N, torch.tensor([adv]), torch.ones(1), 0.2, 0.28
    )
    assert total.item() == pytest.approx(loss)
    assert gradient(total, log_ratio_N).item() == pytest.approx(slope * ratio)
    assert {name: int(count) for name, count in metrics.items()} == {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
    }


def test_cispo_cap_bounds_the_ratio_and_no_token_loses_its_gradient():
    logp_N = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    log_ratio_N = torch.tensor([0.5, 1.0, 4.0]).log() + logp_N - logp_N.detach()
    total, metrics = losses.policy_loss_cispo(
        log_ratio_N, logp_N, torch.ones(3), torch.ones(3), cap=2.0
    )
    close(gradient(total, logp_N), -torch.tensor([0.5, 1.0, 2.0]), **TIGHT)
    assert metrics["cispo_clip_ratio"] == 1


def test_a_cispo_cap_below_one_says_what_the_paper_means():
    with pytest.raises(InputError, match="CISPO cap 0.2 .* eps_high = 0.2 is a cap of 1.2"):
        losses.policy_loss_cispo(
            torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.ones(1), cap=0.2
        )


def test_dppo_trusts_a_region_of_probability():
    """2602.04879, by hand: a rare token learns on when it is a hundred times as likely; a sure one
    that has lost 0.24 falls no further, but may rise; within the region the loss is - r A."""
    old = torch.tensor([1e-4, 0.99, 0.99, 0.5, 0.5, 0.3], dtype=torch.float64)
    new = torch.tensor([1e-2, 0.75, 0.75, 0.7, 0.7, 0.3], dtype=torch.float64)
    adv_N = torch.tensor([1.0, -1.0, 1.0, 2.0, -2.0, 0.5], dtype=torch.float64)
    keep_N = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    logp_N, weight_N = new.log().requires_grad_(), torch.arange(1.0, 7.0, dtype=torch.float64)
    found, metrics = losses.policy_loss_dppo(
        logp_N - old.log(), logp_N, adv_N, weight_N, low=0.15, high=0.15
    )
    expected = -(weight_N * keep_N * (logp_N - old.log()).exp() * adv_N).sum()
    close(found, expected, **TIGHT)
    close(gradient(found, logp_N), gradient(expected, logp_N), **TIGHT)
    assert {name: int(x) for name, x in metrics.items()} == {
        "clip_ratio/low_mean": 1,
        "clip_ratio/high_mean": 1,
        "clip_ratio/region_mean": 2,
    }
    # Each side has its own threshold: here only the fall of the second token is within.
    wider, _ = losses.policy_loss_dppo(
        logp_N - old.log(), logp_N, adv_N, weight_N, low=0.25, high=0.15
    )
    close(wider - found, 2 * (new[1] / old[1]), **TIGHT)


@pytest.mark.parametrize("tau", [(1.0, 0.0), (-1.0, 1.0)])
def test_a_sapo_gate_without_a_slope_is_refused(tau):
    zero_N = torch.zeros(1)
    with pytest.raises(InputError, match=rf"SAPO's tau \({tau[0]}, {tau[1]}\): .* above 0"):
        losses.policy_loss_sapo(zero_N, zero_N, zero_N, torch.ones(1), tau=tau)


@pytest.mark.parametrize(
    "call, known",
    [
        (lambda x: losses.divisor("mean", 1, 1, 1), "token, sequence, sequence_sum, constant"),
        (
            lambda x: losses.log_ratio(x.logp_N, x.old_N, sequences(x), "mean"),
            "token, sequence and sequence_sum",
        ),
        (
            lambda x: losses.importance_weight(
                x.logp_N, x.old_N, sequences(x), "mean", "mask", 3.0
            ),
            "token or sequence, and truncate or mask",
        ),
        (
            lambda x: losses.importance_weight(
                x.logp_N, x.old_N, sequences(x), "token", "mean", 3.0
            ),
            "token or sequence, and truncate or mask",
        ),
    ],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(call, known):
    with pytest.raises(InputError, match=f"mean.*{known}"):
        call(packed())


# ----------------------------------------------------------------------------------- by enumeration
LOGITS = [0.2, -1.1, 0.9, 0.4, -0.3]
REFERENCE = [-0.5, 0.3, 0.1, 1.2, -0.8]


def expectation(kl):
    """Over every token of a vocabulary: E[k] and E[grad k], the token drawn from pi itself."""
    logits_V = torch.tensor(LOGITS, requires_grad=True)
    logp_V, ref_V = logits_V.log_softmax(0), torch.tensor(REFERENCE).log_softmax(0)
    kl_V = kl(logp_V, ref_V)
    value = (logp_V.exp() * kl_V).sum().detach()
    return value, gradient((logp_V.exp().detach() * kl_V).sum(), logits_V)


def exact_kl(forward=False):
    logits_V = torch.tensor(LOGITS, requires_grad=True)
    logp_V, ref_V = logits_V.log_softmax(0), torch.tensor(REFERENCE).log_softmax(0)
    kl = (logp_V.exp() * (logp_V - ref_V)).sum()
    if forward:
        kl = (ref_V.exp() * (ref_V - logp_V)).sum()
    return kl.detach(), gradient(kl, logits_V)


def test_k1_is_unbiased_in_value_and_its_expected_gradient_is_zero():
    value, grad_V = expectation(losses.kl_k1)
    close(value, exact_kl()[0], **TIGHT)
    close(grad_V, torch.zeros(5), **TIGHT)
    assert exact_kl()[1].abs().max() > 0.1


def test_k2_is_biased_in_value_and_its_expected_gradient_is_exact():
    value, grad_V = expectation(losses.kl_k2)
    close(grad_V, exact_kl()[1], **TIGHT)
    assert abs(value - exact_kl()[0]) > 5e-3


def test_k3_is_unbiased_in_value_and_its_expected_gradient_is_that_of_the_forward_kl():
    value, grad_V = expectation(losses.kl_k3)
    close(value, exact_kl()[0], **TIGHT)
    close(grad_V, exact_kl(forward=True)[1], **TIGHT)
    assert (grad_V - exact_kl()[1]).abs().max() > 1e-2


def test_k1_in_the_reward_gives_the_gradient_of_the_kl():
    logits_V = torch.tensor(LOGITS, requires_grad=True)
    logp_V, ref_V = logits_V.log_softmax(0), torch.tensor(REFERENCE).log_softmax(0)
    reward_V = -losses.kl_k1(logp_V, ref_V).detach()
    total, _ = losses.policy_loss_clip(
        logp_V - logp_V.detach(), logp_V, reward_V, logp_V.exp().detach(), 0.2, 0.2
    )
    close(gradient(total, logits_V), exact_kl()[1], **TIGHT)


@pytest.mark.parametrize("objective", ["clip", "cispo"])
def test_off_policy_the_ratio_of_the_sum_gives_the_gradient_of_the_expected_reward(objective):
    """Every completion of three tokens over a vocabulary of three, drawn from an old policy; no
    clip in reach."""
    rng = torch.Generator().manual_seed(1)
    logits_TV = torch.randn(3, 3, generator=rng, requires_grad=True)
    logp_TV = logits_TV.log_softmax(1)
    old_TV = (logits_TV.detach() + 0.5 * torch.randn(3, 3, generator=rng)).log_softmax(1)
    draws = torch.tensor(list(product(range(3), repeat=3)))
    reward_S, at_T = torch.randn(len(draws), generator=rng), torch.arange(3)
    logp_N, old_N = (table[at_T, draws].flatten() for table in (logp_TV, old_TV))
    seq_N = torch.arange(len(draws)).repeat_interleave(3)
    whole = Sequences(torch.ones_like(seq_N).bool(), seq_N, len(draws))
    ratio_N = losses.log_ratio(logp_N, old_N, whole, "sequence_sum")
    chance_S = old_TV[at_T, draws].sum(1).exp()
    weight_N = losses.token_weights(whole, "sequence") * chance_S[seq_N]
    if objective == "clip":
        total, _ = losses.policy_loss_clip(ratio_N, logp_N, reward_S[seq_N], weight_N, 1.0, 1e9)
    else:
        total, _ = losses.policy_loss_cispo(ratio_N, 3 * logp_N, reward_S[seq_N], weight_N, cap=1e9)
    expected_reward = (logp_TV[at_T, draws].sum(1).exp() * reward_S).sum()
    close(gradient(total, logits_TV), -gradient(expected_reward, logits_TV), rtol=1e-9, atol=1e-12)
