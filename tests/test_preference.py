"""Preference losses against TRL's installed code (its methods are run, not transcribed) or the closed form, and what
surrounds them: pairs out of rows, the two passes of coupled losses, reward models, and both scripts.

loss          oracle                                   loss          oracle
sigmoid       TRL; smoothed: closed form (TRL has      aot, unpaired TRL
              none there)                              apo_*         TRL
sigmoid_norm  TRL                                      discopop      TRL
ipo, hinge    TRL                                      simpo, cpo    TRL's cpo_loss, and the nll in closed form
robust, exo   TRL                                      orpo          TRL's odds_ratio_loss, and the nll
nca, sppo     TRL                                      sft           TRL
bco           TRL at shift 0; shifted: closed form     kto           TRL
"""

import json
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import metrics, run, weights

from nanopost import InputError, hf, packing, pairs, preference
from nanopost.batch import Example, batch_of
from nanopost.reference import add_reference
from nanopost.rollout import Rollout
from nanopost.rows import check_pair_row, read_rows
from nanopost.tokenizer import Tokenizer, tokenizer_files
from runs import toy

P, T, BETA = 7, 9, 0.3


@pytest.fixture
def step():
    """Random log-probs of P pairs of uneven answers -> (examples as pairs, logp [S][T], ref_logp [S], log sum p^2)."""
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
    return made, logp_ST, -draw.exponential(1.0, (2 * P, T))


def ours(
    step,
    name,
    half=None,
    ld_alpha=1.0,
    smoothing=0.0,
    divergence="reverse_kl",
    alpha=1.0,
    nll=False,
    **more,
):
    """-> loss (a mean over pairs) and its gradient with respect to logp_ST."""
    made, logp_ST, log_sum_sq_ST = step
    pairs.add_columns(made, ld_alpha, train_prompt=False)
    flat = [e for pair in made for e in pair]
    batch = batch_of(flat)
    logp = torch.tensor(logp_ST, requires_grad=True)

    def packed(x_ST):
        return torch.cat(
            [torch.cat([x_ST[s, 1 : len(e)], x_ST.new_zeros(1)]) for s, e in enumerate(flat)]
        )

    tokens = np.mean([e.mask.sum() for e in flat[0::2]])
    p = preference.of_batch(batch, packed(logp), float(tokens), divergence=divergence, alpha=alpha)
    loss_P = preference.PREFERENCE[name](p, BETA, smoothing, **more)
    if half:  # what temperature 1/2 gives: 2 log p - log sum p^2
        half_N = packed(2 * logp - torch.tensor(log_sum_sq_ST))
        loss_P = loss_P * preference.wpo_weight(
            packed(logp), half_N, batch["weight"], batch.seq_N, 2 * P
        )
    loss = loss_P.mean()
    loss.backward()
    mask_ST = np.array([np.pad(e.mask, (0, T - len(e))) for e in flat])
    return float(loss.detach()), logp.grad.numpy() * mask_ST  # elsewhere a model gives constants


def theirs(
    step,
    name,
    dtype=torch.float64,
    smoothing=0.0,
    ld_alpha=None,
    divergence="reverse_kl",
    alpha=1.0,
    wpo=False,
):
    """The same from DPOTrainer._compute_loss, run with a stub for itself and for the model."""
    trl = pytest.importorskip("trl")
    made, logp_ST, log_sum_sq_ST = step
    flat = [pair[side] for side in range(2) for pair in made]
    order = [2 * p + side for side in range(2) for p in range(P)]
    mask_ST = torch.zeros(2 * P, T, dtype=torch.long)
    for s, e in enumerate(flat):
        mask_ST[s, : len(e)] = torch.tensor(e.mask)
    logp = torch.tensor(logp_ST[order], dtype=dtype, requires_grad=True)
    zeros = torch.zeros(2 * P, T - 1, dtype=dtype)
    outputs = SimpleNamespace(
        log_probs=logp[:, 1:],
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros > 1,
        log_sum_sq_probs=torch.tensor(log_sum_sq_ST[order], dtype=dtype)[:, 1:],
    )
    reference = torch.tensor([e.columns["ref_logp"] for e in flat], dtype=dtype)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=ld_alpha,
        precompute_ref_logps=True,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=alpha,
        loss_types=[name],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=smoothing,
        use_weighting=wpo,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=SimpleNamespace(
            device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x
        ),
    )
    loss = trl.DPOTrainer._compute_loss(
        stub,
        lambda **inputs: outputs,
        {
            "input_ids": torch.ones(2 * P, T, dtype=torch.long),
            "attention_mask": torch.ones(2 * P, T),
            "completion_mask": mask_ST,
            "ref_chosen_logps": reference[:P],
            "ref_rejected_logps": reference[P:],
        },
        False,
    )
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
    # exo: TRL makes its epsilon an fp32 tensor; aot: a Batch's reference is fp32, and so is a difference of two
    same(
        ours(step, name, smoothing=smoothing),
        theirs(step, their_name, smoothing=smoothing),
        1e-6 if name in ("exo", "aot") else 1e-9,
    )


@pytest.mark.parametrize(
    "divergence, their_name, alpha",
    [
        ("forward_kl", "forward_kl", 1.0),
        ("js", "js_divergence", 1.0),
        ("alpha", "alpha_divergence", 0.5),
        ("alpha", "alpha_divergence", 1.0),
    ],
)
def test_divergences_are_those_of_trl(step, divergence, their_name, alpha):
    dtype = (
        torch.float32 if their_name == "alpha_divergence" else torch.float64
    )  # TRL's has no float64
    same(
        ours(step, "sigmoid", divergence=divergence, alpha=alpha),
        theirs(step, "sigmoid", dtype, divergence=their_name, alpha=alpha),
        2e-5 if dtype == torch.float32 else 1e-9,
    )


def test_ld_dpo_and_wpo_are_those_of_trl(step):
    same(ours(step, "sigmoid", ld_alpha=0.5), theirs(step, "sigmoid", ld_alpha=0.5))
    same(ours(step, "sigmoid", half=True), theirs(step, "sigmoid", wpo=True))


def of_pairs(c, r, **more):
    """Pairs with these log-ratios."""
    logp_S = torch.tensor(
        [x for pair in zip(c, r) for x in pair], dtype=torch.float64, requires_grad=True
    )
    return preference.Pairs(
        logp_S, torch.zeros_like(logp_S).detach(), torch.full((len(logp_S),), 2.0), **more
    )


def test_smoothed_sigmoid_is_the_cross_entropy_to_the_smoothed_label():
    """cDPO: minimal where the policy's preference is 1 - smoothing."""
    p = of_pairs([math.log(9) / BETA], [0.0])  # sigmoid(beta margin) = 0.9
    loss = preference.pair_sigmoid(p, BETA, 0.1)
    assert float(loss) == pytest.approx(-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)))
    loss.sum().backward()
    assert p.logp_S.grad.abs().max() < 1e-12


def test_the_shift_of_bco_is_the_boundary():
    loss = preference.pair_bco(of_pairs([2.0], [1.0]), BETA, shift=0.4)
    assert float(loss) == pytest.approx(
        math.log1p(math.exp(-(0.6 - 0.4))) + math.log1p(math.exp(0.3 - 0.4))
    )


@pytest.mark.parametrize(
    "name, more, stub",
    [
        ("simpo", {"gamma": 0.7}, {"loss_type": "simpo", "simpo_gamma": 0.7}),
        ("cpo", {}, {"loss_type": "sigmoid"}),
    ],
)
def test_simpo_and_cpo_are_those_of_trl(name, more, stub):
    cpo = pytest.importorskip("trl.experimental.cpo")
    p = of_pairs([-3.0, -1.0, -2.5], [-2.0, -4.0, -2.5])
    p.nll_S, p.nll_tokens = -p.logp_S.detach(), 2.0
    self = SimpleNamespace(
        alpha=0.0, beta=BETA, label_smoothing=0.1, accelerator=SimpleNamespace(device="cpu"), **stub
    )
    logp_2P = (p.mean_logp_2P if name == "simpo" else p.logp_S.view(-1, 2).T).detach()
    expected, _, _ = cpo.CPOTrainer.cpo_loss(self, *logp_2P)
    nll_P = torch.tensor([3.0, 1.0, 2.5]) / 2 if name == "cpo" else 0.0
    torch.testing.assert_close(
        preference.PREFERENCE[name](p, BETA, 0.1, **more).detach(), expected + nll_P
    )


def test_orpo_is_that_of_trl():
    orpo = pytest.importorskip("trl.experimental.orpo")
    p = of_pairs([-3.0, -1.0, -0.01], [-2.0, -4.0, -2.5])
    p.nll_S, p.nll_tokens = torch.arange(6.0, dtype=torch.float64), 4.0
    self = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    expected = orpo.ORPOTrainer.odds_ratio_loss(self, *p.mean_logp_2P.detach())[0]
    loss_P = preference.pair_orpo(p, BETA).detach()
    torch.testing.assert_close(
        loss_P.float(), p.nll_S[0::2].float() / 4 - expected.float(), rtol=1e-5, atol=1e-6
    )


def test_kto_is_that_of_trl():
    kto = pytest.importorskip("trl").KTOTrainer
    draw = torch.Generator().manual_seed(0)
    logp_S = -torch.rand(
        10, 5, generator=draw, dtype=torch.float64
    )  # 5 rows, each followed by its mismatch
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
    p = preference.Pairs(mine, ref_S, torch.full((10,), 5.0), label_P=label_P)
    loss_P = preference.kto(p, BETA, desirable=1.3, undesirable=0.8)
    loss_P.mean().backward()
    assert float(loss_P.detach().mean()) == pytest.approx(float(loss.detach()), rel=1e-9)
    torch.testing.assert_close(mine.grad[0::2], leaf.grad[:, 0])
    assert not mine.grad[1::2].any()


@pytest.mark.parametrize("name", ["robust", "exo"])
def test_losses_that_need_smoothing_say_so(name):
    with pytest.raises(InputError, match="--smoothing 0.7"):
        preference.PREFERENCE[name](of_pairs([1.0], [0.0]), BETA, 0.7)


def test_the_reward_model_loss_is_bradley_terry():
    score_S = torch.tensor([2.0, 0.5, -1.0, 1.0], dtype=torch.float64)
    loss_P = preference.reward_model_loss(
        score_S, torch.tensor([0.0, 0.3], dtype=torch.float64), 0.01
    )
    expected = [math.log1p(math.exp(-1.5)) + 0.01 * 2.5**2, math.log1p(math.exp(2.3)) + 0.01 * 0.0]
    assert loss_P.tolist() == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------- rows into pairs
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random toy model and 24 pairs."""
    folder = tmp_path_factory.mktemp("preference")
    toy.write_model(folder / "toy")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{a}+17=?"}],
            "chosen": [{"role": "assistant", "content": f"<answer>{a + 17}</answer>"}],
            "rejected": [{"role": "assistant", "content": f"{a + 16}"}],
        }
        for a in range(10, 34)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tokenizer(place):
    return Tokenizer.load(place / "toy")


def message(role, content):
    return {"role": role, "content": content}


def test_a_pair_has_one_prompt_and_ends_with_the_end_of_the_turn(tokenizer):
    row = {
        "prompt": [message("user", "1+1=?")],
        "chosen": [message("assistant", "2")],
        "rejected": [message("assistant", "11")],
    }
    chosen, rejected = tokenizer.pair(row)
    assert tokenizer.decode(chosen.ids) == "<|user|>1+1=?<|assistant|>2<|end|>"
    assert tokenizer.decode(rejected.ids[rejected.mask]) == "11<|end|>"
    whole = {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
    for a, b in zip(tokenizer.pair(whole), (chosen, rejected)):
        assert a.ids.tolist() == b.ids.tolist() and a.mask.tolist() == b.mask.tolist()


def test_a_prompt_that_depends_on_the_answer_is_refused_by_its_row(tokenizer):
    odd = Tokenizer(
        tokenizer.raw,
        {"eos_token": "<|end|>"},
        "{%- for m in messages -%}{{ '<|' + m['role'] + '|>' }}"
        "{%- if m['role'] == 'user' and messages[-1]['role'] == 'assistant' -%}{{ messages[-1]['content'] "
        "| length }}{%- endif -%}{{ m['content'] + '<|end|>' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}",
    )
    row = {
        "prompt": [message("user", "1+1=?")],
        "chosen": [message("assistant", "2")],
        "rejected": [message("assistant", "eleven")],
        "__line__": "pairs.jsonl:7",
    }
    with pytest.raises(InputError, match="pairs.jsonl:7: .*"):
        odd.pair(row)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "a", "chosen": "b"}, "chosen and rejected"),
        (
            {"prompt": "a", "chosen": "b", "rejected": [message("assistant", "c")]},
            "partly text and partly messages",
        ),
        ({"chosen": "b", "rejected": "c"}, "partly text|no prompt|needs"),
        (
            {
                "chosen": [message("user", "a"), message("assistant", "b")],
                "rejected": [message("user", "a")],
            },
            "nothing but it",
        ),
        (
            {"chosen": [message("assistant", "b")], "rejected": [message("assistant", "c")]},
            "no prompt in common",
        ),
    ],
)
def test_bad_pairs_are_named(row, words):
    with pytest.raises(InputError, match=words):
        check_pair_row(row)


def example(ids, prompt):
    return Example(ids, np.arange(len(ids)) >= prompt)


def test_pairs_are_cut_dropped_and_counted():
    good = example([1, 2, 3, 4, 5, 6], 2), example([1, 2, 7], 2)
    emptied = example([1, 2, 3, 4, 9], 4), example([1, 2, 3, 4, 8], 4)
    alike = example([1, 2], 1), example([1, 2], 1)
    mirrored = good[1], example([1, 2, 3, 4], 2)
    kept, counts = pairs.fit([good, emptied, alike, mirrored], 4, "truncate")
    assert [[len(e) for e in pair] for pair in kept] == [[4, 3], [3, 4]]
    assert counts == {"overlong": 2, "truncated": 1, "emptied": 1, "alike": 1, "swapped": 2}
    kept, counts = pairs.fit([good, emptied, alike, mirrored], 4, "drop")
    assert len(kept) == 1 and counts["overlong"] == 2
    with pytest.raises(InputError, match="none of 1 pairs is left"):
        pairs.fit([emptied], 4, "truncate")


def test_kto_sees_each_prompt_with_another_rows_completion(tokenizer):
    rows = [{"prompt": f"{a}?", "completion": f"{a}!", "label": a % 2} for a in range(1, 7)]
    made, counts = pairs.labelled(tokenizer, rows, 50, "truncate")
    assert [pair[0].columns["label"] for pair in made] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    texts = [tuple(tokenizer.decode(e.ids, skip_special=True) for e in pair) for pair in made]
    assert all(
        a == f"{k}?{k}!" and b.startswith(f"{k}?") and b != a for k, (a, b) in enumerate(texts, 1)
    )
    assert sorted(b.partition("?")[2] for _, b in texts) == sorted(f"{k}!" for k in range(1, 7))


# ------------------------------------------------------------------------------------- two passes, models, scripts
@pytest.mark.parametrize("name", sorted(preference.COUPLED))
def test_the_gradient_of_a_coupled_loss_depends_on_no_micro_batch(name, place, tokenizer, alone):
    """Against one pass over the whole step with every log-prob in one graph."""
    rows = read_rows(place / "pairs.jsonl")[:9]
    if name == "kto":
        made, _ = pairs.labelled(tokenizer, rows, 60, "truncate")
    else:
        made, _ = pairs.fit([tokenizer.pair(row) for row in rows], 60, "truncate")
    model = hf.load_model(place / "toy")
    pairs.add_columns(made)
    add_reference(made, hf.load_model(place / "toy").requires_grad_(False), 100, "cpu")
    with torch.no_grad():
        for q in model.parameters():
            q.add_(0.02 * torch.randn(q.shape, generator=torch.Generator().manual_seed(q.numel())))

    def gradient():
        flat = torch.cat([q.grad.flatten() for q in model.parameters()])
        model.zero_grad()
        return flat

    batch = batch_of([e for pair in made for e in pair])
    logp_N, _ = model(batch)
    p = preference.of_batch(batch, logp_N, 1.0)
    p.label_P = batch.columns["label"][0::2] if name == "kto" else None
    preference.PREFERENCE[name](p, BETA).sum().backward()
    whole = gradient()
    p, mine = preference.gathered(model, made, 40, "cpu")
    preference.PREFERENCE[name](p, BETA).sum().backward()
    units = preference.pulled_back(made, p, mine)
    assert len(units) == (len(made) if name == "kto" else 2 * len(made))
    for part in packing.micro_batches([len(e) for (e,) in units], 40):
        batch = batch_of([units[i][0] for i in part])
        logp_N, _ = model(batch)
        p = preference.of_batch(batch, logp_N, 1.0)
        (batch["slope"] * p.logp_S + batch["nll_slope"] * p.nll_S).sum().backward()
    torch.testing.assert_close(gradient(), whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_a_reward_model_is_one_of_transformers(place, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    run(
        "train_rm.py",
        "--model",
        place / "toy",
        "--data",
        place / "pairs.jsonl",
        "--holdout",
        4,
        "--out",
        tmp_path,
        "--steps",
        8,
        "--rows",
        6,
        "--lr",
        3e-3,
        "--warmup",
        0,
    )
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and theirs.config.num_labels == 1
    )
    model, made = (
        hf.load_scalar_model(tmp_path),
        tokenizer.pair(read_rows(place / "pairs.jsonl")[0]),
    )
    batch = batch_of(list(made))
    score_S = model(batch)[batch.cu_seqlens[1:].long() - 1]
    expected = [float(theirs(torch.tensor(e.ids[None]).long()).logits.detach()) for e in made]
    assert score_S.tolist() == pytest.approx(expected, abs=1e-4) and abs(expected[0]) > 1e-3
    lines = metrics(tmp_path)
    assert lines[-1]["eval/accuracy"] == 1.0 > lines[0]["eval/accuracy"]
    with pytest.raises(InputError, match="reward model and writes no text"):
        hf.load_model(tmp_path)
    with pytest.raises(InputError, match="scores nothing"):
        hf.load_scalar_model(place / "toy")


def dpo(place, out, *more):
    return (
        "--model",
        place / "toy",
        "--data",
        place / "pairs.jsonl",
        "--holdout",
        5,
        "--out",
        out,
        "--steps",
        3,
        "--rows",
        8,
        "--lr",
        1e-3,
        "--warmup",
        0,
        "--save_every",
        2,
        "--cache",
        place / "cache",
        *more,
    )


@pytest.mark.parametrize("loss", ["sigmoid", "kto", "aot_unpaired"])
def test_dpo_on_two_ranks_is_dpo_on_one(place, tmp_path, loss):
    for ranks, tokens in ((1, 4096), (2, 100)):
        run(
            "train_dpo.py",
            *dpo(
                place, tmp_path / str(ranks), "--loss", loss, "--tokens", tokens, "--max_length", 50
            ),
            ranks=ranks,
        )
    for one, two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert one.keys() == two.keys()
        # At first policy and reference are one: whose rounding is above the other's says nothing.
        for name in one.keys() - {
            "tokens_per_second",
            "num_tokens",
            *["rewards/accuracies"] * (one["step"] == 1),
        }:
            assert one[name] == pytest.approx(two[name], rel=2e-3, abs=2e-5), (one["step"], name)


def test_all_references_agree_at_first_and_resume_is_exact(place, tmp_path):
    for kind in ("frozen", "precomputed", "precomputed", "follow"):
        run(
            "train_dpo.py",
            *dpo(place, tmp_path / kind, "--reference", kind, "--follow_every", 1, "--overwrite"),
        )
    frozen, precomputed, follow = (
        metrics(tmp_path / kind) for kind in ("frozen", "precomputed", "follow")
    )
    assert len([*(place / "cache").glob("reference-*.npy")]) == 2  # train and held out, each once
    for a, b in zip(frozen, precomputed):
        assert a["eval/loss" if "eval/loss" in a else "loss"] == pytest.approx(
            b["eval/loss" if "eval/loss" in b else "loss"], rel=1e-5
        )
    assert (
        follow[1]["loss"] == pytest.approx(frozen[1]["loss"])
        and abs(follow[3]["loss"] - frozen[3]["loss"]) > 1e-3
    )
    whole = weights(tmp_path / "follow")
    run(
        "train_dpo.py",
        *dpo(place, tmp_path / "follow", "--reference", "follow", "--follow_every", 1, "--resume"),
    )
    assert weights(tmp_path / "follow") == whole


def test_online_pairs_are_sampled_judged_and_logged(place, tmp_path):
    (place / "judge.py").write_text(
        "def longest(prompts, pairs):\n    return [None if len(a) == len(b) else "
        "int(len(b) > len(a)) for a, b in pairs]\n"
    )
    run(
        "train_rm.py",
        "--model",
        place / "toy",
        "--data",
        place / "pairs.jsonl",
        "--out",
        tmp_path / "rm",
        "--steps",
        2,
        "--holdout",
        4,
    )
    for kind in (["--judge", f"{place}/judge.py:longest"], ["--reward", f"model:{tmp_path}/rm"]):
        run(
            "train_dpo.py",
            *dpo(
                place,
                tmp_path / "online",
                "--online",
                "--group",
                3,
                "--max_new_tokens",
                6,
                "--overwrite",
                *kind,
            ),
        )
        lines = metrics(tmp_path / "online")
        assert all(m["pairs"] == 8 * (1 - m["ties"]) > 0 for m in lines[1:])
        assert (tmp_path / "online" / "samples.jsonl").read_text().count("\n") == 9


def test_of_sampled_answers_the_best_is_chosen_and_the_worst_rejected():
    def answers(*lengths):
        return [Rollout([1, 2], [5] * n, np.zeros(n, np.float32), "stop", 0) for n in lengths]

    groups = [answers(1, 2, 3), answers(4, 5, 6), answers(3, 3, 3)]
    rewards = torch.tensor([[0.0, 2.0, -1.0], [1.0, 1.0, 1.0], [1.0, 1.0 + 1e-6, 1.0]])
    ((chosen, rejected),) = pairs.best_and_worst(
        groups, rewards
    )  # then a tie, and answers that are the same
    assert (chosen.mask.sum(), rejected.mask.sum()) == (2, 3)


def test_online_an_answer_without_an_end_loses(place, tmp_path):
    """All rewards are equal: what makes a pair is the penalty alone, and the ended answer is the chosen one."""
    (place / "same.py").write_text(
        "def same(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    run(
        "train_dpo.py",
        *dpo(
            place,
            tmp_path,
            "--online",
            "--group",
            4,
            "--max_new_tokens",
            120,
            "--reward",
            f"{place}/same.py:same",
            "--eos_penalty",
            0.5,
        ),
    )
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {(r["finish"], r["reward"]) for r in records} == {("stop", 1.0), ("length", 0.5)}
    assert any(m["pairs"] for m in metrics(tmp_path)[1:])


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--online",), "--online needs --reward or --judge."),
        (
            ("--loss", "kto", "sft"),
            "--loss kto pairs a row with another's answer: it goes with no other loss.",
        ),
        (
            ("--loss", "nca", "--divergence", "js"),
            "--divergence js is known to discopop, exo, hinge",
        ),
        (
            ("--online", "--reward", "length:6:2", "--max_new_tokens", 16, "--tokens", 30),
            "16 new ones are more than --tokens 30 / 2, a side of a pair",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(place, tmp_path, flags, sentence):
    assert sentence in run("train_dpo.py", *dpo(place, tmp_path, *flags), ok=False).stderr


def test_without_held_out_rows_and_without_a_reference_to_compute(place, tmp_path):
    for out, flags in (
        ("kto", ("--loss", "kto")),
        ("simpo", ("--loss", "simpo", "--reference", "precomputed")),
    ):
        run("train_dpo.py", *dpo(place, tmp_path / out, *flags, "--holdout", 0))
        assert (
            "eval/loss" not in metrics(tmp_path / out)[-1] and metrics(tmp_path / out)[-1]["loss"]
        )
    run(
        "train_rm.py",
        "--model",
        place / "toy",
        "--data",
        place / "pairs.jsonl",
        "--out",
        tmp_path / "rm",
        "--steps",
        2,
        "--holdout",
        0,
    )


def test_a_reference_with_another_template_is_told(place, tmp_path):
    other = Tokenizer(
        Tokenizer.load(place / "toy").raw, {"eos_token": "<|end|>"}, toy.TEMPLATE + " "
    )
    model = hf.load_model(place / "toy")
    files = tokenizer_files(place / "toy", other)
    hf.save_model(tmp_path / "ref", model.state_dict().items(), model.config, files)
    done = run("train_dpo.py", *dpo(place, tmp_path / "x", "--reference_model", tmp_path / "ref"))
    assert "was trained with another template" in done.stdout


def test_log1mexp_is_right_at_both_ends():
    x = torch.tensor([-1e-12, -1e-3, -0.6931, -5.0, -50.0], dtype=torch.float64)
    expected = [
        math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()
    ]
    assert preference.log1mexp(x).tolist() == pytest.approx(expected, rel=1e-12)
    assert math.isfinite(float(F.softplus(preference.log1mexp(torch.zeros(1)))))
