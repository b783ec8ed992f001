"""The forks of train_ppo.py, train_dpo.py and train_sft.py, each against an oracle; all of them run
under the slow twins too.

fork             oracle
adaptive_kl      closed form; a resumed run against one never interrupted
kl_stop          the number of optimizer steps
ppo_kl_loss      its slow twin alone
tr_dpo           closed form, on the weights of a checkpoint; a resumed run
ld_dpo           TRL's loss and gradient
wpo              TRL's loss and gradient; transformers' logits
olmo2            transformers' logits and gradients
muon             torch's two optimizers by themselves; singular values; a resumed run
multiple_choice  rows by hand; BIG-Bench Hard
"""

import gzip
import json
import math
import re

import numpy as np
import pytest
import test_ppo
import torch
from scripts import metrics, run, weights
from small import small_model
from test_ppo import EPOCHS, MINIBATCHES, ppo
from trl_dpo import BETA as DPO_BETA
from trl_dpo import P, T, loss_and_gradient, random_step

from forks import function_of, patched, script_of
from nanopost import InputError, checkpoint, hf, optim, pairs, preference
from nanopost.batch import batch_of
from nanopost.tokenizer import Tokenizer
from runs import toy

ppo_place = test_ppo.place


@pytest.mark.parametrize(
    "names", [("adaptive_kl", "kl_stop"), ("kl_stop", "ppo_kl_loss"), ("wpo", "ld_dpo", "tr_dpo")]
)
def test_forks_of_one_script_apply_together(names, tmp_path):
    script = patched(tmp_path, *names) / script_of(names[0])
    assert "show this help message" in run(script, "--help").stdout


# ---------------------------------------------------------------------------------------------- PPO
def test_the_kl_coefficient_follows_the_relative_error_up_to_a_fifth():
    adapted = function_of("adaptive_kl", "train_ppo.py", "adapted")
    assert adapted(0.5, kl=6.0, target=6.0) == 0.5
    assert adapted(0.5, kl=6.6, target=6.0) == pytest.approx(0.5 * 1.01)
    assert adapted(0.5, kl=60.0, target=6.0) == pytest.approx(0.5 * 1.02)
    assert adapted(0.5, kl=0.0, target=6.0) == pytest.approx(0.5 * 0.98)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_coefficient_unless_beta_was_changed(ppo_place, tmp_path):
    """Resumed where the coefficient has been adapted once."""
    script = patched(tmp_path, "adaptive_kl") / "train_ppo.py"
    out = tmp_path / "run"
    flags = ("--steps", 4, "--save_every", 3, "--kl_target", 1.0, "--value_warmup", 2)
    flags = ppo(ppo_place, out, *flags, "--score_scale", "--beta", 0.1)
    run(script, *flags)
    files = [out / "model.safetensors", out / "value" / "model.safetensors"]
    whole, lines = [path.read_bytes() for path in files], metrics(out)
    assert lines[3]["beta"] == 0.1 and abs(lines[4]["objective/kl"]) > 0.01
    assert lines[4]["beta"] == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    for path in files:
        path.unlink()
    done = run(script, *flags, "--resume")
    assert "resumed at step 3" in done.stdout
    assert [path.read_bytes() for path in files] == whole
    assert metrics(out)[4]["beta"] == lines[4]["beta"]
    run(script, *flags, "--resume", "--beta", 0.4)
    assert metrics(out)[4]["beta"] == 0.4


@pytest.mark.slow
@pytest.mark.parametrize(
    "stop, ranks, updates", [(1e-9, 0, 1), (1e-9, 2, 1), (1e9, 0, EPOCHS * MINIBATCHES)]
)
def test_work_on_a_rollout_batch_ends_where_the_kl_does(ppo_place, tmp_path, stop, ranks, updates):
    script = patched(tmp_path, "kl_stop") / "train_ppo.py"
    out = tmp_path / "run"
    run(script, *ppo(ppo_place, out, "--kl_stop", stop), ranks=ranks)
    assert metrics(out)[-1]["updates"] == updates


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adaptive_kl", "ppo_kl_loss"])
def test_a_coefficient_of_0_is_refused(ppo_place, tmp_path, name):
    script = patched(tmp_path, name) / "train_ppo.py"
    done = run(script, *ppo(ppo_place, tmp_path / "run", "--beta", 0), ok=False)
    assert "--beta: 0: give more than 0" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------- DPO
def dpo_loss_and_gradient(step, ld_alpha=None, wpo=False):
    """The sigmoid loss as train_dpo.py computes it with a fork: see trl_dpo.loss_and_gradient."""
    made, logp_ST, log_sum_sq_ST = step
    pairs.add_columns(made)
    if ld_alpha is not None:
        function_of("ld_dpo", "train_dpo.py", "desensitize")(made, ld_alpha)
    flat = [e for pair in made for e in pair]
    batch = batch_of(flat)
    logp = torch.tensor(logp_ST, requires_grad=True)

    def packed(x_ST):
        return torch.cat(
            [torch.cat([x_T[1 : len(e)], x_T.new_zeros(1)]) for x_T, e in zip(x_ST, flat)]
        )

    sequences = {
        "logp": batch.sequences.sum(packed(logp) * batch["weight"]),
        "nll": batch.sequences.sum(-packed(logp)),
        "ref_logp": batch["ref_logp"],
        "length": batch["length"],
    }
    pairs_P = preference.read_pairs(sequences, preference.reverse_kl)
    losses, scalars = [preference.LOSSES["sigmoid"]], {"beta": DPO_BETA, "smoothing": 0.0}
    loss_P = preference.weighted(losses, [1.0], pairs_P, **scalars)
    if wpo:
        half_logp_N = packed(2 * logp - torch.tensor(log_sum_sq_ST))  # what temperature 1/2 gives
        alignment = function_of("wpo", "train_dpo.py", "alignment")
        loss_P = loss_P * alignment(packed(logp), half_logp_N, batch)
    loss = loss_P.mean()
    loss.backward()
    mask_ST = np.array([np.pad(e.mask, (0, T - len(e))) for e in flat])
    return float(loss.detach()), logp.grad.numpy() * mask_ST  # elsewhere a model gives constants


@pytest.mark.parametrize("fork", [{"ld_alpha": 0.5}, {"ld_alpha": 0.0}, {"wpo": True}])
def test_ld_dpo_and_wpo_are_those_of_trl(fork):
    ours = dpo_loss_and_gradient(random_step(), **fork)
    theirs = loss_and_gradient(random_step(), "sigmoid", **fork)
    plain = loss_and_gradient(random_step(), "sigmoid")
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-9, atol=1e-9)
    assert np.abs(ours[1] - plain[1]).max() > 1e-3


def test_ld_dpo_weighs_what_is_past_the_shorter_length():
    made, _, _ = random_step()
    pairs.add_columns(made, train_prompt=True)  # for orpo: prompt tokens become targets of weight 0
    function_of("ld_dpo", "train_dpo.py", "desensitize")(made, 0.25)
    for pair in made:
        shorter = min(e.columns["length"] for e in pair)
        for e in pair:
            length = e.columns["length"]
            expected = [0.0] * (len(e) - length) + [1.0] * shorter + [0.25] * (length - shorter)
            assert e.columns["weight"].tolist() == expected
            assert e.columns["weight"].dtype == np.float32
    assert len({e.columns["length"] for pair in made for e in pair}) > 3 and len(made) == P


@pytest.fixture(scope="module")
def dpo_place(tmp_path_factory):
    """A folder with a random toy model and 24 pairs."""
    folder = tmp_path_factory.mktemp("dpo")
    toy.write_model(folder / "toy")
    rows = []
    for a in range(10, 34):
        prompt = [{"role": "user", "content": f"{a}+17=?"}]
        chosen = [{"role": "assistant", "content": f"<answer>{a + 17}</answer>"}]
        rejected = [{"role": "assistant", "content": f"{a + 16}"}]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    toy.write_rows(folder / "pairs.jsonl", rows)
    return folder


def dpo(place, out, *more):
    data = ("--model", place / "toy", "--data", place / "pairs.jsonl", "--holdout", 5)
    flags = ("--steps", 3, "--rows", 8, "--lr", 1e-3, "--warmup", 0, "--save_every", 2)
    return (*data, "--out", out, *flags, "--cache", place / "cache", *more)


@pytest.mark.slow
def test_the_weights_of_wpo_are_those_of_transformers_logits(dpo_place, tmp_path):
    """At the first step all losses are log 2, so the mean loss is log 2 times the mean weight."""
    transformers = pytest.importorskip("transformers")
    script = patched(tmp_path, "wpo") / "train_dpo.py"
    out = tmp_path / "run"
    flags = ("--holdout", 0, "--rows", 24, "--steps", 1, "--tokens", 200, "--max_length", 50)
    run(script, *dpo(dpo_place, out / "1", *flags))
    run(script, *dpo(dpo_place, out / "2", *flags), ranks=2)
    one, two = metrics(out / "1")[1], metrics(out / "2")[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(dpo_place / "toy")
    tokenizer = Tokenizer.load(dpo_place / "toy")
    expected = []
    for line in (dpo_place / "pairs.jsonl").read_text().splitlines():
        weight = 1.0
        for e in tokenizer.pair(json.loads(line)):
            ids = torch.tensor(e.ids)[None].long()
            with torch.no_grad():
                logp_TV = model(ids).logits[0, :-1].double().log_softmax(-1)
            logp_T = logp_TV.gather(1, ids[0, 1:, None])[:, 0]
            aligned_T = logp_T - (2 * logp_TV).exp().sum(1).log()
            weight *= float(aligned_T[e.mask[1:]].mean().exp())
        expected.append(weight)
    assert one["loss"] == pytest.approx(math.log(2) * np.mean(expected), rel=1e-4)
    assert not 0.9 < np.mean(expected) < 1.1
    for name in ("loss", "grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


@pytest.mark.slow
def test_the_reference_of_tr_dpo_follows_the_policy_and_is_resumed(dpo_place, tmp_path, alone):
    script = patched(tmp_path, "tr_dpo") / "train_dpo.py"
    frozen, follow = tmp_path / "frozen", tmp_path / "follow"
    run("train_dpo.py", *dpo(dpo_place, frozen))
    flags = dpo(dpo_place, follow, "--follow_every", 1)
    run(script, *flags)
    a, b = metrics(frozen), metrics(follow)
    assert b[1]["loss"] == pytest.approx(a[1]["loss"])
    assert abs(b[3]["loss"] - a[3]["loss"]) > 1e-3
    whole = weights(follow)
    (follow / "model.safetensors").unlink()
    done = run(script, *flags, "--resume")
    assert "resumed at step 2" in done.stdout and weights(follow) == whole
    assert [m.get("loss") for m in metrics(follow)] == [m.get("loss") for m in b]

    run(script, *dpo(dpo_place, follow, "--follow_every", 2, "--overwrite"))
    start, policy, ref = (hf.load_model(dpo_place / "toy") for _ in range(3))
    optimizer = optim.adamw(policy, 0.0)
    checkpoint.load(checkpoint.latest(follow), policy, optimizer, reference=ref)
    pieces = zip(start.named_parameters(), policy.parameters(), ref.parameters())
    for (name, first), p, r in pieces:
        assert (p != first).any(), name
        assert torch.allclose(r, first + 0.6 * (p - first), rtol=0, atol=1e-7), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [("--reference", "precomputed"), ("--loss", "simpo"), ("--lora", 4)]
)
def test_tr_dpo_needs_a_reference_to_move(dpo_place, tmp_path, flags):
    script = patched(tmp_path, "tr_dpo") / "train_dpo.py"
    done = run(script, *dpo(dpo_place, tmp_path / "run", *flags), ok=False)
    assert "TR-DPO needs --reference frozen, a --loss that reads it, and no --lora" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------- SFT
@pytest.fixture(scope="module")
def sft_place(tmp_path_factory):
    """A folder with a random toy model and rows for SFT."""
    folder = tmp_path_factory.mktemp("sft")
    toy.write_model(folder / "toy")
    toy.write_rows(folder / "rows.jsonl", toy.sft_rows()[:200])
    return folder


def sft(place, out, *more):
    data = ("--model", place / "toy", "--data", place / "rows.jsonl", "--holdout", 10)
    flags = ("--steps", 4, "--rows", 16, "--lr", 2e-3, "--warmup", 0, "--save_every", 2)
    return (*data, "--out", out, *flags, *more)


def with_gradients(model, seed):
    for i, p in enumerate(model.parameters()):
        draw = torch.Generator().manual_seed(100 * seed + i)
        p.grad = torch.randn(p.shape, generator=draw)
    return model


def test_muon_updates_matrices_of_blocks_and_adamw_the_rest(tmp_path):
    """Against torch's optimizers by themselves, with the state reloaded between two steps."""
    folder = patched(tmp_path, "muon")
    space = {}
    exec((folder / "nanopost" / "optim.py").read_text(), space)
    ours, theirs = small_model(tie_word_embeddings=False), small_model(tie_word_embeddings=False)
    begun = {name: p.detach().clone() for name, p in ours.named_parameters()}
    optimizer = space["MuonAndAdamW"](ours, 0.1)
    matrices = {n: p for n, p in theirs.named_parameters() if re.search(r"layers.*proj", n)}
    others = {n: p for n, p in theirs.named_parameters() if n not in matrices}
    decayed = [p for p in others.values() if p.ndim == 2]
    undecayed = [p for p in others.values() if p.ndim < 2]
    assert len(matrices) == 14 and len(decayed) == 2 and undecayed
    groups = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    muon = torch.optim.Muon(
        matrices.values(), lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(2):
        optim.set_learning_rate(optimizer, 1e-3)
        for model, optimizers in ((ours, [optimizer]), (theirs, [muon, adamw])):
            with_gradients(model, step)
            for one in optimizers:
                one.step()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
            assert torch.allclose(p, q, rtol=0, atol=1e-7), (step, name)
            if name in matrices and step == 0:
                moved = (begun[name] * (1 - 1e-3 * 0.1) - p).detach()
                o = moved / (1e-3 * 0.2 * max(p.shape) ** 0.5)
                u, _, vh = torch.linalg.svd(p.grad, full_matrices=False)
                singular = (u.T @ o @ vh.T).diagonal()
                assert 0.7 < singular.mean() and singular.max() < 1.3, name
                assert (u @ singular.diag() @ vh - o).norm() < 0.05 * o.norm(), name
        optimizer.zero_grad()
        assert all(p.grad is None for p in ours.parameters())
        optimizer.load_state_dict(optimizer.state_dict())
    assert {len(entries) for entries in optimizer.state.values()} == {1, 3}


@pytest.mark.slow
def test_a_resumed_run_with_muon_ends_with_the_same_weights(sft_place, tmp_path):
    script = patched(tmp_path, "muon") / "train_sft.py"
    out = tmp_path / "run"
    run(script, *sft(sft_place, out))
    whole, lines = weights(out), metrics(out)
    (out / "model.safetensors").unlink()
    done = run(script, *sft(sft_place, out, "--resume"))
    assert "resumed at step 2" in done.stdout and weights(out) == whole
    names = ("step", "loss", "grad_norm")
    assert [[m.get(n) for n in names] for m in metrics(out)] == [
        [m.get(n) for n in names] for m in lines
    ]
    assert lines[-1]["loss"] < 0.9 * lines[1]["loss"]


@pytest.mark.slow
def test_muon_on_two_ranks_is_muon_on_one(sft_place, tmp_path):
    """Matrices and momentum are sharded over ranks; their orthogonalisation needs them whole."""
    script = patched(tmp_path, "muon") / "train_sft.py"
    for ranks in (0, 2):
        run(script, *sft(sft_place, tmp_path / str(ranks)), ranks=ranks)
    for one, two in zip(metrics(tmp_path / "0"), metrics(tmp_path / "2"), strict=True):
        for name in one.keys() - {"time/elapsed", "tokens_per_second"}:
            assert two[name] == pytest.approx(one[name], rel=2e-3), (one["step"], name)


QUESTION = {"question": "2 + 2 = ?", "options": ["3", "4", "5"], "answer": 1, "__line__": "q:7"}


def test_a_multiple_choice_question_becomes_a_conversation():
    multiple_choice = function_of("multiple_choice", "train_sft.py", "multiple_choice")
    question = {"role": "user", "content": "2 + 2 = ?\nA. 3\nB. 4\nC. 5"}
    answer = {"role": "assistant", "content": "B"}
    assert multiple_choice(QUESTION) == {**QUESTION, "messages": [question, answer]}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"question": None}, "it needs question (text) and options (a list)"),
        ({"options": "3 4"}, "it needs question (text) and options (a list)"),
        ({"answer": None}, "answer None is not an index (26 options max)"),
        ({"answer": "B"}, "answer 'B' is not an index"),
        ({"answer": 3}, "answer 3 is not an index"),
        ({"answer": -1}, "answer -1 is not an index"),
        ({"options": ["x"] * 27}, "answer 1 is not an index (26 options max)"),
    ],
)
def test_a_wrong_multiple_choice_row_is_named(change, sentence):
    multiple_choice = function_of("multiple_choice", "train_sft.py", "multiple_choice")
    with pytest.raises(InputError, match=f"^q:7: {re.escape(sentence)}"):
        multiple_choice({**QUESTION, **change})


@pytest.mark.slow
def test_sft_on_questions_of_big_bench_hard(shared, sft_place, tmp_path):
    """Its tasks that have options, as a person would convert them."""
    questions = []
    for line in gzip.open(shared / "tasks" / "bbh_10.jsonl.gz", "rt"):
        row = json.loads(line)
        text, _, listed = row["input"].partition("\nOptions:\n")
        options = re.findall(r"^\(([A-Z])\) (.*)$", listed, re.MULTILINE)
        letters = [letter for letter, _ in options]
        if row["target"].strip("()") in letters and len(row["input"]) < 400:
            answer = letters.index(row["target"].strip("()"))
            texts = [option for _, option in options]
            questions.append({"question": text, "options": texts, "answer": answer})
    assert len(questions) > 100
    toy.write_rows(tmp_path / "questions.jsonl", questions)
    script = patched(tmp_path, "multiple_choice") / "train_sft.py"
    flags = ("--data", tmp_path / "questions.jsonl", "--steps", 6, "--save_every", 0)
    done = run(script, *sft(sft_place, tmp_path / "run", *flags))
    lines = metrics(tmp_path / "run")
    assert lines[-1]["eval/loss"] < 0.7 * lines[0]["eval/loss"]
    assert "untrained" not in done.stdout


# ------------------------------------------------------------------------------------------ models
COMPARE = """
import sys
import torch
from nanopost import hf

torch.set_num_threads(1)
model, expected = hf.load_model(sys.argv[1]), torch.load(sys.argv[2])
token_N = expected["ids"]
where = torch.arange(len(token_N)), torch.tensor([0, len(token_N)]).int(), len(token_N)
logits = model.logits(model.model.packed(token_N, *where))
logits.square().sum().backward()
gradient = model.model.layers[0].self_attn.q_norm.weight.grad
print(float((logits - expected["logits"]).abs().max()))
print(float((gradient / expected["gradient"] - 1).abs().max()))
"""


def test_olmo2_gives_the_logits_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61}
    config = transformers.Olmo2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    oracle = transformers.Olmo2ForCausalLM(config)
    with torch.no_grad():
        for p in oracle.parameters():
            p.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(p.numel()))
    oracle.save_pretrained(tmp_path / "model")
    ids = torch.arange(40) * 7 % 61
    logits = oracle(ids[None]).logits[0]
    logits.square().sum().backward()
    gradient = oracle.model.layers[0].self_attn.q_norm.weight.grad
    expected = {"ids": ids, "logits": logits.detach(), "gradient": gradient}
    torch.save(expected, tmp_path / "expected.pt")
    folder = patched(tmp_path, "olmo2")
    (folder / "compare.py").write_text(COMPARE)
    said = run(folder / "compare.py", tmp_path / "model", tmp_path / "expected.pt").stdout
    assert all(float(gap) <= 1e-4 for gap in said.split()) and logits.std() > 0.5
