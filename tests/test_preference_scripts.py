"""train_dpo.py, train_kto.py, train_online_dpo.py and train_rm.py by their command lines: gradients
against one pass over the whole step, ranks, resuming, references, refusals.

Most run in this process, which takes a second less than a subprocess; ranks need processes.
"""

import json

import numpy as np
import pytest
import torch
from inprocess import run_here
from scripts import metrics, run, weights

from nanopost import InputError, dist, hf, packing, pairs, preference, rows
from nanopost.batch import batch_of
from nanopost.save import save_model
from nanopost.tokenizer import Tokenizer, tokenizer_files
from runs import toy

ALL = preference.LOSSES | preference.COUPLED
BETA = 0.3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random toy model, the same with noise (moved), 24 pairs of uneven answers,
    the first 12 of them (few), their prompts, a judge and a reward."""
    folder = tmp_path_factory.mktemp("preference")
    toy.write_model(folder / "toy")
    model = hf.load_model(folder / "toy")
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.Generator().manual_seed(p.numel())
            p.add_(0.02 * torch.randn(p.shape, generator=noise))
    files = toy.tokenizer_files()
    save_model(folder / "moved", model.state_dict().items(), model.config, files)
    stored = []
    for a in range(10, 34):
        right, wrong = (a + 17) * 7 ** (a % 3), str(a + 16) * (1 + a % 2)
        row = {
            "prompt": [{"role": "user", "content": f"{a}+17=?"}],
            "chosen": [{"role": "assistant", "content": f"<answer>{right}</answer>"}],
            "rejected": [{"role": "assistant", "content": wrong}],
            "margin": a % 3,
        }
        stored.append(row)
    toy.write_rows(folder / "pairs.jsonl", stored)
    toy.write_rows(folder / "few.jsonl", stored[:12])
    toy.write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in stored])
    (folder / "judge.py").write_text(
        "def longest(prompts, pairs):\n"
        "    return [None if len(a) == len(b) else int(len(b) > len(a)) for a, b in pairs]\n"
    )
    (folder / "same.py").write_text(
        "def same(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(place):
    return Tokenizer.load(place / "toy")


@pytest.fixture
def gradients(monkeypatch):
    """The gradient of each optimizer step that scripts take in this process."""
    found, clip = [], dist.clip_grad_norm

    def recorded(model, max_norm):
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        return clip(model, max_norm)

    monkeypatch.setattr(dist, "clip_grad_norm", recorded)
    return found


def same(gradient, model):
    """The gradient of a script's step is what a backward pass of the test has left in a model."""
    for name, p in model.named_parameters():
        largest = float(p.grad.abs().max())
        torch.testing.assert_close(gradient[name], p.grad, rtol=1e-4, atol=1e-5 * largest)


def flags(place, out, *more, model="toy", data="pairs"):
    return (
        *("--model", place / model, "--data", place / f"{data}.jsonl", "--holdout", 4),
        *("--out", out, "--steps", 3, "--lr", 1e-3, "--warmup", 0, "--save_every", 2),
        *more,
    )


def stored(place, out, *more, **which):
    """Flags of the scripts whose pairs are in a file."""
    return flags(place, out, "--rows", 8, "--max_length", 20, *more, **which)


def online(place, out, *more):
    sampling = ("--prompts", 8, "--group", 3, "--max_new_tokens", 6)
    return flags(place, out, *sampling, *more, data="prompts")


# --------------------------------------------------------------- gradients, from one pass of a step
def pairs_of_step(place, tokenizer, count, train_prompt=False):
    """The first `count` pairs that a script draws, as often as it draws them."""
    train_rows, _ = rows.load(place / "few.jsonl", None, 4, [], rows.pair)
    made, _ = pairs.fit_to([tokenizer.pair(row) for row in train_rows], 20, "truncate")
    pairs.add_columns(made, train_prompt)
    return [made[i] for i in packing.take(len(made), 0, 0, count)]


def labelled_of_step(place, tokenizer, count):
    """The same for KTO: rows, each with its mismatch."""
    train_rows, _ = rows.load(place / "few.jsonl", None, 4, [], rows.unpaired)
    apart = rows.take_pairs_apart(train_rows)
    examples = [tokenizer.example(row, "completion") for row in apart]
    for e, row in zip(examples, apart):
        e.columns["label"] = float(row["label"])
    made = pairs.mismatched(examples, 20)
    pairs.add_columns(made)
    return [made[i] for i in packing.take(len(made), 0, 0, count)]


def one_pass(place, step_pairs, losses, loss_weights, f_score=preference.reverse_kl, **scalars):
    """All log-probs of a step in one graph -> (moved's model with its gradient, mean loss)."""
    model, reference = hf.load_model(place / "moved"), hf.load_model(place / "toy")
    batch = batch_of([e for pair in step_pairs for e in pair])
    logp_N, _ = model(batch)
    with torch.no_grad():
        ref_logp_N, _ = reference(batch)
    sequences = {
        "logp": batch.sequences.sum(logp_N * batch["weight"]),
        "nll": batch.sequences.sum(-logp_N),
        "ref_logp": batch.sequences.sum(ref_logp_N * batch["weight"]),
        "length": batch["length"],
    }
    if "label" in batch.columns:
        scalars["label_P"] = batch["label"][0::2]
    ratio_S = (sequences["logp"] - sequences["ref_logp"]).detach()
    loss_P = preference.weighted(
        [ALL[name] for name in losses],
        loss_weights,
        preference.read_pairs(sequences, f_score),
        beta=BETA,
        shift=BETA * ratio_S.mean(),
        nll_tokens=np.mean([chosen.num_targets for chosen, _ in step_pairs]),
        **scalars,
    )
    loss_P.mean().backward()
    return model, float(loss_P.detach().mean())


@pytest.mark.parametrize(
    "losses, more, options",
    [
        (["sigmoid"], (), {}),
        (["sigmoid", "sft"], ("--loss_weights", 0.7, 0.2), {}),
        (["sigmoid"], ("--divergence", "js"), {"f_score": preference.js}),
        (["exo"], ("--smoothing", 0.2), {"smoothing": 0.2}),
        (["simpo"], ("--gamma", 1.5), {"gamma": 1.5}),
        (["orpo"], (), {}),
    ],
)
def test_a_step_of_dpo_is_one_pass_over_its_pairs(
    place, tokenizer, tmp_path, gradients, losses, more, options
):
    step_pairs = pairs_of_step(place, tokenizer, 8, train_prompt="orpo" in losses)
    loss_weights = [0.7, 0.2] if len(losses) == 2 else [1.0]
    scalars = {"smoothing": 0.0, **options}
    model, loss = one_pass(place, step_pairs, losses, loss_weights, **scalars)
    more += ("--loss", *losses, "--beta", BETA)
    if preference.needs_reference([ALL[name] for name in losses]):
        more += ("--reference_model", place / "toy")
    more += ("--tokens", 80, "--steps", 1)
    run_here("train_dpo.py", *stored(place, tmp_path, *more, model="moved", data="few"))
    same(gradients[0], model)
    assert metrics(tmp_path)[1]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("count", [5, 20])
@pytest.mark.parametrize("name, sft", [*((name, 0.0) for name in preference.COUPLED), ("aot", 0.5)])
def test_a_step_of_a_coupled_loss_is_one_pass_with_every_log_prob_in_one_graph(
    place, tokenizer, tmp_path, gradients, name, sft, count
):
    """Twenty are more than there are: a pair that occurs twice has a slope in each place."""
    draw = labelled_of_step if name == "kto" else pairs_of_step
    step_pairs = draw(place, tokenizer, count)
    assert (len({id(pair) for pair in step_pairs}) < count) == (count == 20)
    losses, loss_weights = ([name, "sft"], [1.0, sft]) if sft else ([name], [1.0])
    scalars = {"smoothing": 0.1, "label_weights": (1.3, 0.8)}
    model, loss = one_pass(place, step_pairs, losses, loss_weights, **scalars)
    more = ("--loss", name, "--beta", BETA)
    if name == "kto":
        more += ("--label_weights", 1.3, 0.8)
    if name.startswith("aot"):
        more += ("--smoothing", 0.1)
    more += ("--sft_weight", sft, "--reference_model", place / "toy", "--tokens", 40)
    more += ("--rows", count, "--steps", 1)
    run_here("train_kto.py", *stored(place, tmp_path, *more, model="moved", data="few"))
    same(gradients[0], model)
    assert metrics(tmp_path)[1]["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_step_of_a_reward_model_is_each_pair_by_itself(place, tokenizer, tmp_path, gradients):
    """With the margins of the rows and centred scores."""
    more = ("--centre", 0.05, "--tokens", 80, "--seed", 3, "--steps", 1)
    run_here("train_rm.py", *stored(place, tmp_path, *more, "--holdout", 0, "--rows", 24))
    torch.manual_seed(3)
    model = hf.load_scalar_model(place / "toy", new_head=True)
    total = 0.0
    for row in rows.load(place / "pairs.jsonl", None, 0, [], rows.pair)[0]:
        score_2 = [model(batch_of([e]))[-1] for e in tokenizer.pair(row)]
        margin_P = torch.tensor([float(row["margin"])])
        loss_P = preference.reward_model_loss(torch.stack(score_2), margin_P, 0.05)
        (loss_P.sum() / 24).backward()
        total += float(loss_P.detach()) / 24
    same(gradients[0], model)
    assert metrics(tmp_path)[1]["loss"] == pytest.approx(total, rel=1e-5)


# ---------------------------------------------------------------------------------- every loss runs
def test_every_loss_of_the_family_runs(place, tmp_path):
    others = sorted(preference.LOSSES.keys() - {"exo"})
    for out, losses, smoothing in (("1", others, 0), ("2", ["sigmoid", "robust", "exo"], 0.1)):
        more = ("--loss", *losses, "--loss_weights", *[0.1] * len(losses), "--smoothing", smoothing)
        run_here("train_dpo.py", *stored(place, tmp_path / out, *more))
        lines = metrics(tmp_path / out)
        assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]


@pytest.mark.slow
def test_every_divergence_lowers_its_loss(place, tmp_path):
    for name in ("forward_kl", "js", "alpha"):
        run_here("train_dpo.py", *stored(place, tmp_path / name, "--divergence", name))
        lines = metrics(tmp_path / name)
        assert lines[-1]["eval/loss"] < lines[0]["eval/loss"]


# -------------------------------------------------------------------------------------------- ranks
RANKS = [
    ("train_dpo.py", ("--loss", "sigmoid", "sft")),
    ("train_kto.py", ("--loss", "kto")),
    ("train_kto.py", ("--loss", "bco", "--sft_weight", 0.3)),
    ("train_kto.py", ("--loss", "aot_unpaired", "--reference", "precomputed")),
    ("train_rm.py", ("--centre", 0.01)),
]


@pytest.mark.slow
@pytest.mark.parametrize("script, more", RANKS)
def test_two_ranks_are_one(place, tmp_path, script, more):
    """Whatever the micro-batches; 9 rows do not divide into 2 ranks."""
    more += ("--rows", 9)
    if script != "train_rm.py":
        more += ("--cache", tmp_path / "cache")
    run_here(script, *stored(place, tmp_path / "1", *more, "--tokens", 4096))
    if "precomputed" in more:
        for path in (tmp_path / "cache").iterdir():
            path.unlink()  # two ranks are to compute it again
    run(script, *stored(place, tmp_path / "2", *more, "--tokens", 100), ranks=2)
    for one, two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert one.keys() == two.keys()
        names = one.keys() - {"time/elapsed", "tokens_per_second", "num_tokens"}
        if one["step"] == 1:
            # Policy and reference are one: whose rounding is above the other's, and whether it is,
            # says nothing.
            names -= {"rewards/accuracies", "rewards/ties"}
        for name in names:
            assert one[name] == pytest.approx(two[name], rel=2e-3, abs=2e-5), (one["step"], name)


@pytest.mark.slow
def test_online_pairs_on_two_ranks_are_those_of_one(place, tmp_path):
    """The same samples, rewards and pairs, until rounding flips the draw of a token: one step."""
    more = ("--judge", f"{place}/judge.py:longest", "--steps", 1, "--prompts", 7)
    run_here("train_online_dpo.py", *online(place, tmp_path / "1", *more))
    run("train_online_dpo.py", *online(place, tmp_path / "2", *more, "--tokens", 60), ranks=2)
    one, two = metrics(tmp_path / "1")[1], metrics(tmp_path / "2")[1]
    assert one.keys() == two.keys() and one["pairs"] > 0
    for name in one.keys() - {"tokens_per_second", "rewards/accuracies", "rewards/ties"}:
        if name.startswith("time/"):
            continue
        assert one[name] == pytest.approx(two[name], rel=2e-3, abs=2e-5), name


# ------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    "script, more",
    [
        ("train_dpo.py", ()),
        ("train_dpo.py", ("--loss", "sigmoid", "sft", "--reference", "precomputed")),
        ("train_kto.py", ("--loss", "kto")),
        ("train_kto.py", ("--loss", "bco")),  # its boundary is a mean since the run began
        ("train_rm.py", ()),
        ("train_online_dpo.py", ("--judge", "longest")),
    ],
)
def test_a_run_resumed_in_the_middle_ends_with_the_same_bytes(place, tmp_path, script, more):
    if script == "train_online_dpo.py":
        arguments = online(place, tmp_path, "--judge", f"{place}/judge.py:longest")
    else:
        arguments = stored(place, tmp_path, *more)
    if "precomputed" in more:
        arguments += ("--cache", place / "cache")
    run_here(script, *arguments)
    whole, lines = weights(tmp_path), metrics(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    run_here(script, *arguments, "--resume")  # from the checkpoint of step 2
    again = metrics(tmp_path)
    for line in (*lines, *again):
        for name in [n for n in line if n.startswith("time/") or n == "tokens_per_second"]:
            del line[name]
    assert weights(tmp_path) == whole and again == lines
    starts = json.loads((tmp_path / "run.json").read_text())
    assert [start["resumed_at"] for start in starts] == [None, 2]


# --------------------------------------------------------------------------------------- references
@pytest.mark.parametrize(
    "script", ["train_dpo.py", pytest.param("train_kto.py", marks=pytest.mark.slow)]
)
def test_a_precomputed_reference_is_a_frozen_one_and_is_computed_once(place, tmp_path, script):
    for kind in ("frozen", "precomputed", "precomputed"):
        more = ("--reference", kind, "--cache", tmp_path / "cache", "--overwrite")
        run_here(script, *stored(place, tmp_path / kind, *more))
    assert len([*(tmp_path / "cache").glob("reference-*.npy")]) == 2  # train and held out
    frozen, precomputed = (metrics(tmp_path / kind) for kind in ("frozen", "precomputed"))
    assert len(frozen) == 4
    for a, b in zip(frozen, precomputed, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "eval/loss", "grad_norm"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)


def test_a_reference_with_another_template_is_told(place, tmp_path, capsys):
    other = Tokenizer(
        Tokenizer.load(place / "toy").raw, {"eos_token": "<|end|>"}, toy.TEMPLATE + " "
    )
    model = hf.load_model(place / "toy")
    files = tokenizer_files(place / "toy", other)
    save_model(tmp_path / "ref", model.state_dict().items(), model.config, files)
    run_here("train_dpo.py", *stored(place, tmp_path / "x", "--reference_model", tmp_path / "ref"))
    assert f"{tmp_path}/ref was trained with another template" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ reward models
@pytest.mark.slow
def test_a_reward_model_is_one_of_transformers(place, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    run_here("train_rm.py", *stored(place, tmp_path, "--steps", 8, "--lr", 3e-3))
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.num_labels == 1
    model = hf.load_scalar_model(tmp_path)
    made = tokenizer.pair(rows.load(place / "pairs.jsonl", None, 0, [], rows.pair)[0][0])
    batch = batch_of(list(made))
    score_S = model(batch)[batch.last_S]
    expected = [float(theirs(torch.tensor(e.ids[None]).long()).logits.detach()) for e in made]
    assert score_S.tolist() == pytest.approx(expected, abs=1e-4) and abs(expected[0]) > 1e-3
    lines = metrics(tmp_path)
    assert lines[-1]["eval/accuracy"] == 1.0 > lines[0]["eval/accuracy"]
    with pytest.raises(InputError, match="reward model and writes no text"):
        hf.load_model(tmp_path)
    with pytest.raises(InputError, match="scores nothing"):
        hf.load_scalar_model(place / "toy")


# ------------------------------------------------------------------------------------------- online
@pytest.mark.slow
def test_online_pairs_are_sampled_ranked_and_logged(place, tmp_path):
    """By a judge, by a reward model, and by both: an answer's wins are added to its reward."""
    run_here("train_rm.py", *stored(place, tmp_path / "rm", "--steps", 2))
    judge, reward = ("--judge", f"{place}/judge.py:longest"), ("--reward", f"model:{tmp_path}/rm")
    for name, kind in (("judge", judge), ("reward", reward), ("both", judge + reward)):
        run_here("train_online_dpo.py", *online(place, tmp_path / name, *kind))
        lines = metrics(tmp_path / name)
        assert all(m["pairs"] == pytest.approx(8 * (1 - m["ties"])) for m in lines[1:])
        assert all(m["pairs"] > 0 for m in lines[1:])
        assert (tmp_path / name / "samples.jsonl").read_text().count("\n") == 9
        assert ("eval/accuracy" in lines[0]) == ("eval/kl" in lines[0]) == (name != "judge")
    first = {name: metrics(tmp_path / name)[1]["reward"] for name in ("judge", "reward", "both")}
    assert first["both"] == pytest.approx(first["judge"] + first["reward"] + penalty(tmp_path))


def penalty(folder):
    """What answers without an end lose, on average, by the default --eos_penalty of 1."""
    return metrics(folder / "both")[1]["completions/clipped_ratio"]


@pytest.mark.slow
def test_online_an_answer_without_an_end_loses(place, tmp_path):
    """All rewards are equal: the penalty alone makes a pair, and the ended answer is chosen."""
    more = ("--reward", f"{place}/same.py:same", "--eos_penalty", 0.5)
    more += ("--group", 4, "--max_new_tokens", 120)
    run_here("train_online_dpo.py", *online(place, tmp_path, *more))
    records = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {(r["finish"], r["reward"]) for r in records} == {("stop", 1.0), ("length", 0.5)}
    assert any(m["pairs"] for m in metrics(tmp_path)[1:])


def test_online_a_step_of_ties_alone_moves_nothing(place, tmp_path, gradients):
    more = ("--reward", f"{place}/same.py:same", "--eos_penalty", 0, "--lr", 0.5)
    run_here("train_online_dpo.py", *online(place, tmp_path, *more))
    for line in metrics(tmp_path)[1:]:
        assert line["ties"] == 1 and line["pairs"] == 0 and line["grad_norm"] == 0
        assert "loss" not in line and line["reward"] == 1
    before, after = hf.load_model(place / "toy"), hf.load_model(tmp_path)
    for p, q in zip(before.parameters(), after.parameters()):
        assert torch.equal(p, q)


# ----------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "script, more, said",
    [
        (
            "train_dpo.py",
            ("--loss", "nca", "--divergence", "js"),
            "--loss nca does not use --divergence js",
        ),
        (
            "train_dpo.py",
            ("--loss", "sigmoid", "sppo", "--divergence", "js"),
            "--loss sppo does not use --divergence js",
        ),
        (
            "train_dpo.py",
            ("--loss", "ipo", "--smoothing", 0.1),
            "--loss ipo does not use --smoothing",
        ),
        (
            "train_dpo.py",
            ("--loss", "hinge", "nca", "--smoothing", 0.1),
            "--loss hinge nca does not use --smoothing",
        ),
        ("train_dpo.py", ("--loss_weights", 1, 2), "--loss_weights has 2 values for 1 --loss"),
        ("train_dpo.py", ("--loss", "exo"), "--smoothing 0.0: exo needs more than 0"),
        ("train_kto.py", ("--rename", "chosen=better"), "better"),
    ],
)
def test_what_does_not_go_together_is_refused(place, tmp_path, script, more, said):
    with pytest.raises(InputError, match=said):
        run_here(script, *stored(place, tmp_path, *more))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        ((), "give --reward or --judge"),
        (
            ("--reward", "length:6:2", "--max_new_tokens", 16, "--tokens", 30),
            "16 new ones exceed --tokens 30 / 2 .one side of a pair.",
        ),
        (("--judge", "no_file.py:f"), "no_file.py"),
    ],
)
def test_what_cannot_be_sampled_or_ranked_is_refused(place, tmp_path, more, said):
    with pytest.raises(InputError, match=said):
        run_here("train_online_dpo.py", *online(place, tmp_path, *more))


@pytest.mark.parametrize(
    "script, more, said",
    [
        ("train_dpo.py", ("--loss", "kto"), "--loss: invalid choice: 'kto'"),
        ("train_kto.py", ("--loss", "sigmoid"), "--loss: invalid choice: 'sigmoid'"),
        ("train_dpo.py", ("--rows", 0), "--rows: 0: give 1 or more"),
        ("train_rm.py", ("--centre", -1), "--centre: -1: give 0.0 or more"),
    ],
)
def test_a_wrong_flag_gets_one_sentence(place, tmp_path, capsys, script, more, said):
    with pytest.raises(SystemExit):
        run_here(script, *stored(place, tmp_path, *more))
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {said}") and printed.count("\n") == 1


@pytest.mark.slow
def test_a_refusal_is_one_sentence_without_a_traceback(place, tmp_path):
    done = run("train_dpo.py", *stored(place, tmp_path, "--loss", "exo"), ok=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --smoothing 0.0: exo needs")


@pytest.mark.slow
def test_without_held_out_rows_and_without_a_reference_to_compute(place, tmp_path):
    for script, more in (
        ("train_kto.py", ()),
        ("train_dpo.py", ("--loss", "simpo")),
        ("train_dpo.py", ("--reference", "precomputed")),
        ("train_rm.py", ()),
    ):
        out = tmp_path / "-".join([script, *more])
        run_here(script, *stored(place, out, *more, "--holdout", 0))
        last = metrics(out)[-1]
        assert last["loss"] and not any(name.startswith("eval/") for name in last)
