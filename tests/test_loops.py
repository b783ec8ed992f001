"""The loops of the training scripts, watched in the test's own process: which rows a step takes,
what is sampled with which weights, and what a sampled token is credited with."""

import inspect
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from inprocess import run_here
from scripts import SCRIPTS, metrics

from nanopost import InputError, cli, dist, forward, hf, packing, pairs, rewards, rows
from nanopost.batch import batch_of
from nanopost.engine import Engine
from nanopost.run import Run
from nanopost.tokenizer import Tokenizer
from runs import toy

SAMPLING = ["train_grpo.py", "train_ppo.py", "train_online_dpo.py"]  # and learn from rewards
ROLLOUTS = [*SAMPLING, "train_distill.py"]  # sample
LETTERS = "abcdefghijklmnopqrst"  # end about half of the answers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two random toy models, 12 rows of each kind, and a reward that varies."""
    folder = tmp_path_factory.mktemp("loops")
    toy.write_model(folder / "toy")
    toy.write_model(folder / "teacher", seed=1)
    toy.write_rows(folder / "sft.jsonl", toy.sft_rows()[:12])
    prompts = toy.prompt_rows(held_out=False)[:12]
    toy.write_rows(folder / "prompts.jsonl", prompts)
    preferences = []
    for row in prompts:
        chosen = [{"role": "assistant", "content": row["answer"]}]
        rejected = [{"role": "assistant", "content": "5"}]
        preferences.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    toy.write_rows(folder / "pairs.jsonl", preferences)
    (folder / "reward.py").write_text(
        "def ids(completions, completion_ids, **columns):\n"
        "    return [float(sum(ids) % 7) for ids in completion_ids]\n"
        "def odd(completions, completion_ids, **columns):\n"
        "    return [float(ids[0] % 2) for ids in completion_ids]\n"
    )
    return folder


def flags(place, script, out, *more):
    """Four of eight rows per step, four held out, two steps."""
    data, step = "pairs", ("--rows", 4)
    if script == "train_sft.py":
        data = "sft"
    if script in ROLLOUTS:
        data, step = "prompts", ("--prompts", 4, "--max_new_tokens", 6)
        step += ("--reward", f"{place}/reward.py:ids", "--stop", *LETTERS)
        step += ("--group", 2) if script in SAMPLING else ("--teacher", place / "teacher")
    return (
        *("--model", place / "toy", "--data", place / f"{data}.jsonl", "--holdout", 4),
        *("--out", out, "--steps", 2, "--lr", 3e-3, "--warmup", 0, "--save_every", 0),
        *("--eval_every", 0, "--device", "cpu", *step, *more),
    )


@pytest.fixture
def gradients(monkeypatch):
    """The gradient of each optimizer step."""
    found, clip = [], dist.clip_grad_norm

    def watched(model, max_norm):
        found.append([p.grad.clone() for p in model.parameters()])
        return clip(model, max_norm)

    monkeypatch.setattr(dist, "clip_grad_norm", watched)
    return found


def same(gradient, other):
    largest = max(float(g.abs().max()) for g in other)
    gap = max(float((a - b).abs().max()) for a, b in zip(gradient, other, strict=True))
    assert gap <= 1e-5 * largest


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_step_takes_the_rows_after_those_of_the_last(place, tmp_path, monkeypatch, script):
    taken, take = [], packing.take

    def watched(n, seed, consumed, count):
        taken.append((consumed, count))
        return take(n, seed, consumed, count)

    monkeypatch.setattr(packing, "take", watched)
    run_here(script, *flags(place, script, tmp_path, "--steps", 3))
    assert taken == [(0, 4), (4, 4), (8, 4)]


def as_text(row):
    """A row of messages, each part one message, as plain text."""
    if "messages" in row:
        row = {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
    return {k: v[0]["content"] if isinstance(v, list) else v for k, v in row.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_plain_prompts_are_a_doubt_and_become_messages_if_asked(place, tmp_path, script, capsys):
    given = flags(place, script, tmp_path / "chat", "--steps", 1)
    run_here(script, *given)
    assert "plain text" not in capsys.readouterr().out
    plain = [as_text(row) for row in rows.read_rows(given[3])]
    files = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    toy.write_rows(files[0], plain[:7])
    toy.write_rows(files[1], plain[7:])
    given = [*given[:3], *files, *given[4:]]
    run_here(script, *given, "--out", tmp_path / "text")
    said = capsys.readouterr().out
    assert "prompts are plain text, which gets no chat template, though the model has one" in said
    run_here(script, *given, "--out", tmp_path / "again", "--to_messages")
    assert "plain text" not in capsys.readouterr().out
    chat, text, again = (metrics(tmp_path / out)[-1] for out in ("chat", "text", "again"))
    assert chat["grad_norm"] == again["grad_norm"] != text["grad_norm"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_empty_micro_batches_change_nothing(place, tmp_path, monkeypatch, gradients, script):
    """A rank with less data than another has some."""
    arguments = ("--tokens", 80, "--steps", 1)
    run_here(script, *flags(place, script, tmp_path / "without", *arguments))
    without = gradients.copy()
    gradients.clear()
    micro_batches = packing.micro_batches

    def more_of_them(*given):
        return [[], *micro_batches(*given), []]

    monkeypatch.setattr(packing, "micro_batches", more_of_them)
    monkeypatch.setattr(forward, "micro_batches", more_of_them)
    run_here(script, *flags(place, script, tmp_path / "with", *arguments))
    for gradient, other in zip(gradients, without, strict=True):
        same(gradient, other)
    for line, other in zip(metrics(tmp_path / "with"), metrics(tmp_path / "without"), strict=True):
        assert line.keys() == other.keys()
        for name in line:
            if name.startswith("time/") or name == "tokens_per_second":
                continue
            assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


# ---------------------------------------------------------------------------------------------- SFT
def test_a_step_of_sft_is_a_mean_over_its_trained_tokens(place, tmp_path, gradients):
    """And so is the held-out loss, whatever the micro-batches."""
    model, tokenizer = hf.load_model(place / "toy"), Tokenizer.load(place / "toy")
    train_rows, eval_rows = rows.load(place / "sft.jsonl", None, 4, [], rows.sft)
    step_rows = [train_rows[i] for i in packing.take(len(train_rows), 0, 0, 4)]
    expected = []
    for part in (eval_rows, step_rows):
        batch = batch_of([tokenizer.example(row) for row in part])
        loss = -model(batch)[0].sum() / batch.num_targets
        expected.append(float(loss.detach()))
    loss.backward()
    more = ("--tokens", 60, "--steps", 1)
    run_here("train_sft.py", *flags(place, "train_sft.py", tmp_path, *more))
    before, after = metrics(tmp_path)
    assert [before["eval/loss"], after["loss"]] == pytest.approx(expected, rel=1e-5)
    same(gradients[0], [p.grad for p in model.parameters()])


# ----------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("script", ROLLOUTS)
def test_an_engine_of_its_own_samples_with_the_weights_of_the_trainer(
    place, tmp_path, monkeypatch, script
):
    """As with several ranks: before the first step, after each one, and where a run is resumed."""
    policies, current, generate = [], [], Engine.generate

    def apart(model, folder, world, tokenizer, rows, tokens, ahead):
        policies.append(model)
        return Engine.of(hf.load_model(folder), tokenizer, rows, tokens)

    def watched(engine, *given):
        trained = dict(policies[-1].named_parameters())
        own = engine.model.named_parameters()
        current.append(all(torch.equal(p, trained[name]) for name, p in own))
        return generate(engine, *given)

    monkeypatch.setattr(Engine, "beside", apart)
    monkeypatch.setattr(Engine, "generate", watched)
    arguments = flags(place, script, tmp_path, "--steps", 3, "--save_every", 2)
    run_here(script, *arguments)
    (tmp_path / "model.safetensors").unlink()
    run_here(script, *arguments, "--resume")
    assert len(policies) == 2
    # Two evaluations, three steps, two evaluations; resumed: one step, two evaluations.
    assert current == [True] * (2 + 3 + 2 + 1 + 2)


@pytest.mark.parametrize("script", ROLLOUTS)
def test_held_out_prompts_are_answered_once_at_temperature_1_and_once_greedily(
    place, tmp_path, monkeypatch, script
):
    """No step trains on one of them, and no draw of training is drawn again. No cut of training is
    one of theirs."""
    training, held_out, generate = [], [], Engine.generate

    def watched(engine, prompts, n, sampling, seeds):
        calls = training if sampling.temperature == 0.8 else held_out
        how = sampling.temperature, sampling.cuts
        calls.append(([tuple(ids) for ids in prompts], n, how, seeds))
        return generate(engine, prompts, n, sampling, seeds)

    def of(calls, i):
        return {x for call in calls for x in call[i]}

    monkeypatch.setattr(Engine, "generate", watched)
    learns_cut = script in SAMPLING
    cut = ("--top_k", 40, "--top_p", 0.9, "--min_p", 0.01) if learns_cut else ()
    run_here(script, *flags(place, script, tmp_path, "--temperature", 0.8, *cut))
    assert [call[1:3] for call in training] == [(1 + learns_cut, (0.8, learns_cut))] * 2
    assert [call[1:3] for call in held_out] == [(1, (1.0, False)), (1, (0.0, False))] * 2
    assert len(of(training, 0)) == 8 and len(of(held_out, 0)) == 4
    assert not of(training, 0) & of(held_out, 0)
    assert len(of(training, 3)) == 8 and not of(training, 3) & of(held_out, 3)


@pytest.mark.parametrize("script", ["train_grpo.py", "train_ppo.py", "train_distill.py"])
def test_an_engine_that_is_not_the_trainer_stops_the_run(place, tmp_path, script):
    """Rounding is enough at a tiny limit; the step is in the log, so that one can look at it."""
    with pytest.raises(RuntimeError, match="step 1: before the first .*--max_logp_gap 1e-12"):
        run_here(script, *flags(place, script, tmp_path, "--max_logp_gap", 1e-12))
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1]
    assert (tmp_path / "samples.jsonl").exists()


def test_the_nll_of_online_pairs_is_a_mean_over_the_tokens_of_the_best(
    place, tmp_path, monkeypatch
):
    step_pairs, add_columns = [], pairs.add_columns

    def watched(made, **more):
        step_pairs.extend(made)
        add_columns(made, **more)

    monkeypatch.setattr(pairs, "add_columns", watched)
    more = ("--loss", "sft", "--steps", 1, "--tokens", 80)
    run_here("train_online_dpo.py", *flags(place, "train_online_dpo.py", tmp_path, *more))
    batch = batch_of([best for best, _ in step_pairs])
    with torch.no_grad():
        logp_N, _ = hf.load_model(place / "toy")(batch)
    loss = -float(logp_N.sum()) / batch.num_targets
    assert metrics(tmp_path)[1]["loss"] == pytest.approx(loss, rel=1e-5)
    assert len({e.num_targets for pair in step_pairs for e in pair}) > 1


# ------------------------------------------------------------------------------------- distillation
def distill(place, out, *more):
    return flags(place, "train_distill.py", out, *more)


def test_completions_of_the_rows_are_cut_and_counted(place, tmp_path, capsys):
    """Answers of seven characters or more, and of two, each with the token that ends it."""
    prompts = toy.prompt_rows(held_out=False)[:8]
    for i, row in enumerate(prompts):
        text = "123" if i < 3 else "123456789"
        row["completion"] = [{"role": "assistant", "content": text}]
    toy.write_rows(tmp_path / "rows.jsonl", prompts)
    more = ("--data", tmp_path / "rows.jsonl", "--holdout", 0, "--on_policy", 0, "--prompts", 8)
    run_here("train_distill.py", *distill(place, tmp_path / "out", *more, "--steps", 1))
    assert "5 completions of the rows are cut to --max_new_tokens 6" in capsys.readouterr().out
    line = metrics(tmp_path / "out")[1]
    assert line["num_tokens"] == 3 * 4 + 5 * 6 and line["on_policy"] == 0


REFUSED = {
    "--prompts 7 --minibatches 3": "--prompts 7 does not divide into 1 ranks x 3 minibatches",
    "--on_policy 0.5 --max_staleness 1": "--on_policy below 1 needs --max_staleness 0",
    "--on_policy 0.5 --reproducible": "--reproducible samples whole chunks of prompts: give "
    "--on_policy 0 or 1",
    "--on_policy 0.5": "prompts.jsonl:1: it has no completion, which --on_policy 0.5 needs",
    "--on_policy 0 --data {place}/users.jsonl": "users.jsonl:1: no message of its completion is an",
    "--top_k 5": "--top_k, --top_p and --min_p would cut what the teacher is compared",
    "--top_p 0.9": "--top_k, --top_p and --min_p would cut what the teacher is compared",
    "--min_p 0.1": "--top_k, --top_p and --min_p would cut what the teacher is compared",
    "--reward_weights 2": "--reward_weights has no use here",
    "--teacher_top_k 264": "--teacher_top_k 264 of 264 tokens leaves no rest: give less, or 0",
    "--teacher {place}/toy {place}/teacher": "--teacher takes one folder, or the addresses of",
    "--teacher {place}/other": "--teacher .*/other: its tokenizer is not the policy's",
    "--teacher {place}/short": "and 6 new ones exceed the 10 positions",
    "--teacher localhost:1": "--teacher URL needs --teacher_top_k: a server names",
    "--teacher http://localhost:1 --teacher_top_k 5 --temperature 0.7": "needs --temperature 1, "
    "not 0.7: a server gives log-probs at 1",
    "--teacher localhost:1 --teacher_top_k 5 --reproducible": "--reproducible needs a teacher in a "
    "folder",
    "--teacher http://localhost:1 --teacher_top_k 5": "--teacher: .*localhost:1.*: is it up, and "
    "is it vLLM",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_no_student_can_learn_from_is_refused(place, tmp_path, given):
    if "other" in given and not (place / "other").exists():
        toy.write_model(place / "other")
        text = (place / "other/tokenizer.json").read_text()
        (place / "other/tokenizer.json").write_text(text.replace("<answer>", "<reply>"))
    if "users" in given:
        asked = [{"role": "user", "content": "a"}]
        toy.write_rows(place / "users.jsonl", [{"prompt": asked, "completion": asked}] * 9)
    if "short" in given and not (place / "short").exists():
        shutil.copytree(place / "teacher", place / "short")
        config = json.loads((place / "short/config.json").read_text())
        config |= {"max_position_embeddings": 10}
        (place / "short/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=REFUSED[given]):
        more = given.format(place=place).split()
        run_here("train_distill.py", *distill(place, tmp_path / "x", *more))
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------- environments
ENVIRONMENT = """
class Nods:
    def reset(self, row):
        return None

    def step(self, completion):
        return [], 1.0, True
"""


@pytest.mark.parametrize("script", ROLLOUTS)
def test_an_environment_gets_all_rows_and_the_room_of_what_is_trained(
    place, tmp_path, script, monkeypatch
):
    """Held-out rows too, which need its tools; half of --tokens if pairs are trained."""
    (place / "nods.py").write_text(ENVIRONMENT)
    seen, environment = [], cli.environment

    def watched(args, tokenizer, positions, rows, **more):
        play = environment(args, tokenizer, positions, rows, **more)
        seen.append((len(rows), play.__self__.room))
        return play

    monkeypatch.setattr(cli, "environment", watched)
    given = list(flags(place, script, tmp_path / "out", "--steps", 1, "--tokens", 300))
    at = given.index("--stop")
    given[at : at + 1 + len(LETTERS)] = ["--env", f"{place}/nods.py:Nods"]
    run_here(script, *given)
    assert seen == [(12, 150 if script == "train_online_dpo.py" else 300)]


# --------------------------------------------------------------------------------------------- GRPO
def grpo(place, out, *more):
    return flags(place, "train_grpo.py", out, "--steps", 1, *more)


def test_the_correction_weighs_the_loss_of_each_token(place, tmp_path):
    """A cap of 0 masks every token, so nothing is left to learn from."""
    more = ("--old_logp", "trainer", "--correct", "token-mask")
    for cap in (0, 3):
        out = tmp_path / str(cap)
        run_here("train_grpo.py", *grpo(place, out, *more, "--correct_cap", cap))
        line = metrics(out)[1]
        assert (line["grad_norm"] == 0) == (line["loss"] == 0) == (cap == 0)
        assert line["sampling/capped"] == (cap == 0)


def test_the_kl_and_the_entropy_are_of_groups_of_equal_rewards_too(place, tmp_path, monkeypatch):
    examples, minibatches = [], packing.minibatches

    def watched(items, *rest):
        examples.extend(items)
        return minibatches(items, *rest)

    monkeypatch.setattr(packing, "minibatches", watched)
    more = ("--reward", "regex:never", "--temperature", 0.8, "--minibatches", 1)
    run_here("train_grpo.py", *grpo(place, tmp_path / "kl", *more, "--beta", 0.1))
    line = metrics(tmp_path / "kl")[1]
    batch = batch_of(examples)
    with torch.no_grad():
        _, entropy_N = hf.load_model(place / "toy")(batch, 0.8)
    assert line["entropy"] == pytest.approx(float(entropy_N.sum()) / batch.num_targets, rel=1e-5)
    assert line["kl"] == pytest.approx(0, abs=1e-5)
    run_here("train_grpo.py", *grpo(place, tmp_path / "none", *more))
    assert "entropy" not in metrics(tmp_path / "none")[1]  # no forward pass was needed


def test_groups_of_equal_rewards_are_replaced_by_others(place, tmp_path, monkeypatch):
    trained, minibatches = [], packing.minibatches

    def watched(items, *rest):
        trained.append(items)
        return minibatches(items, *rest)

    monkeypatch.setattr(packing, "minibatches", watched)
    reward = ("--reward", f"{place}/reward.py:odd")
    for rounds in (0, 9):
        out = tmp_path / str(rounds)
        run_here("train_grpo.py", *grpo(place, out, *reward, "--resample", rounds))
    varied = [[e.columns["adv"].any() for e in examples] for examples in trained]
    assert 0 < sum(varied[0]) < 8 == len(varied[0]) == len(varied[1]) and all(varied[1])
    kept, line = metrics(tmp_path / "0")[1], metrics(tmp_path / "9")[1]
    assert (kept["groups"], kept["prompts_drawn"]) == (4, 4)
    assert line["groups"] == 4 < line["prompts_drawn"]
    share = 1 - line["groups"] / line["prompts_drawn"]
    assert line["frac_reward_zero_std"] == pytest.approx(share) and share > 0


# ---------------------------------------------------------------------------------------------- PPO
BETA, GAMMA, LAM, PENALTY = 0.3, 0.97, 0.8, 0.25


def whitened(rows, mean_kept=False):
    every = np.concatenate(rows)
    mean, std = every.mean(), every.std(ddof=1)
    return [(row - mean) / (std + 1e-8) + mean * mean_kept for row in rows]


def credited(rollouts, examples, scores, scale, whiten_rewards):
    """Rewards, advantages and returns of each rollout's tokens, in loops -> (adv_BT, ret_BT)."""
    rewards, values = [], []
    for e, score in zip(examples, scores):
        old, ref, value = (
            e.columns[name][e.mask].astype(float) for name in ("old_logp", "ref_logp", "value")
        )
        reward = -BETA * (old - ref)
        reward[-1] += score / scale
        rewards.append(reward)
        values.append(value)
    if whiten_rewards:
        rewards = whitened(rewards, mean_kept=True)
    advantages = []
    for reward, value in zip(rewards, values):
        adv, later, next_value = np.zeros(len(reward)), 0.0, 0.0
        for t in reversed(range(len(reward))):
            later = reward[t] + GAMMA * next_value - value[t] + GAMMA * LAM * later
            adv[t], next_value = later, value[t]
        advantages.append(adv)
    returns = [adv + value for adv, value in zip(advantages, values)]
    return whitened(advantages), returns


@pytest.mark.parametrize("more", [(), ("--score_scale", "--whiten_rewards")])
def test_ppo_credits_a_token_with_its_kl_and_what_follows(place, tmp_path, monkeypatch, more):
    sampled, trained = [], []
    generate, shuffled = Engine.generate, packing.shuffled_minibatches

    def watched_generate(engine, prompts, n, *rest):
        groups = generate(engine, prompts, n, *rest)
        if n == 2:
            sampled.append([r for group in groups for r in group])
        return groups

    def watched_shuffle(examples, *rest):
        trained.append(examples)
        return shuffled(examples, *rest)

    monkeypatch.setattr(Engine, "generate", watched_generate)
    monkeypatch.setattr(packing, "shuffled_minibatches", watched_shuffle)
    more += ("--beta", BETA, "--gamma", GAMMA, "--lam", LAM, "--eos_penalty", PENALTY)
    run_here("train_ppo.py", *flags(place, "train_ppo.py", tmp_path, *more))
    so_far, lines = [], metrics(tmp_path)
    for line, rollouts, examples in zip(lines[1:], sampled, trained, strict=True):
        assert {r.finish for r in rollouts} == {"stop", "length"}
        scores = [sum(r.ids) % 7 - PENALTY * (r.finish == "length") for r in rollouts]
        so_far += scores
        scale = np.std(so_far) if "--score_scale" in more else 1.0
        credit = credited(rollouts, examples, scores, scale, "--whiten_rewards" in more)
        for r, e, adv, ret in zip(rollouts, examples, *credit, strict=True):
            assert e.columns["old_logp"][e.mask].tolist() == r.logp.tolist()
            assert e.columns["adv"][e.mask] == pytest.approx(adv, rel=1e-4, abs=1e-5)
            assert e.columns["ret"][e.mask] == pytest.approx(ret, rel=1e-4, abs=1e-5)
            assert not e.columns["adv"][~e.mask].any() and not e.columns["ret"][~e.mask].any()
        assert line["objective/scores"] == pytest.approx(np.mean(scores))
        kl = -BETA * line["objective/kl"]
        assert line["objective/non_score_reward"] == pytest.approx(kl, abs=1e-6)
    assert abs(lines[2]["objective/kl"]) > 0.01 and trained[1][0].columns["value"].any()


def test_in_value_warm_up_the_value_model_alone_has_a_gradient(place, tmp_path, monkeypatch):
    learnt, clip = [], dist.clip_grad_norm

    def watched(model, max_norm):
        parts = (model.policy, model.value)
        learnt.append([any(p.grad is not None for p in part.parameters()) for part in parts])
        return clip(model, max_norm)

    monkeypatch.setattr(dist, "clip_grad_norm", watched)
    more = ("--value_warmup", 1, "--ppo_epochs", 1, "--minibatches", 1)
    run_here("train_ppo.py", *flags(place, "train_ppo.py", tmp_path, *more))
    assert learnt == [[False, True], [True, True]]


@pytest.mark.parametrize("script", ["train_sft.py", "train_rm.py", "train_dpo.py", "train_kto.py"])
def test_epochs_say_how_many_steps_there_are_unless_steps_do(place, tmp_path, script):
    """Eight rows (KTO takes pairs apart: sixteen), four per step."""
    plain = [x for x in flags(place, script, tmp_path / "x") if x != "--steps"]
    plain.remove(2)
    per_epoch = 4 if script == "train_kto.py" else 2
    run_here(script, *plain, "--epochs", 1.5)
    assert [m["step"] for m in metrics(tmp_path / "x")] == list(range(per_epoch * 3 // 2 + 1))
    assert metrics(tmp_path / "x")[-1]["epoch"] == 1.5
    run_here(script, *plain, "--epochs", 1.5, "--steps", 1, "--overwrite")
    assert metrics(tmp_path / "x")[-1]["step"] == 1


# ------------------------------------------------------------------------ rewards, inside the loops
OWN = """
class Fed:
    '''Counts the completions it has seen, as a reward relative to a running mean would.'''

    def __init__(self):
        self.seen = 0

    def __call__(self, completions, completion_ids, **columns):
        self.seen += len(completions)
        return [float(sum(ids) % 7) + 100 * self.seen for ids in completion_ids]

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def sometimes(completions, completion_ids, **columns):
    return [None if applies_not(ids) else float(sum(ids) % 7) for ids in completion_ids]

def applies_not(ids):
    return sum(ids) % 3 == 0

def first_step_alone(completions, completion_ids, step, **columns):
    return [float(sum(ids) % 7) if step[0] == 1 else None for ids in completion_ids]

def sums(completions, completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]

def steps(completions, step, **columns):
    return [float(number) for number in step]

def leaves(completions, **columns):
    raise SystemExit(0)
"""


@pytest.fixture(scope="module")
def own(place):
    (place / "own.py").write_text(OWN)
    return lambda name: ("--reward", f"{place}/own.py:{name}")


def samples(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("script", SAMPLING)
def test_the_state_of_a_reward_survives_a_kill_and_no_evaluation_feeds_it(
    place, tmp_path, own, script
):
    arguments = flags(place, script, tmp_path / "x", *own("Fed"), "--steps", 3)
    run_here(script, *arguments, "--save_every", 2, "--eval_every", 1)
    whole = samples(tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").unlink()
    run_here(script, *arguments, "--save_every", 2, "--eval_every", 1, "--resume")
    assert samples(tmp_path / "x") == whole
    name = "score" if script == "train_ppo.py" else "reward"
    penalty = script == "train_online_dpo.py"  # of answers that do not end
    for step in (1, 2, 3):
        seen = {(s[name] + penalty) // 100 for s in whole if s["step"] == step}
        assert seen == {8 * step}  # 4 prompts, 2 samples of each: training's alone


@pytest.mark.parametrize("script", SAMPLING)
def test_a_reward_is_told_the_step(place, tmp_path, own, script):
    more = ("--eos_penalty", 0) if script == "train_online_dpo.py" else ()
    run_here(script, *flags(place, script, tmp_path, *own("steps"), *more))
    name = "objective/scores" if script == "train_ppo.py" else "reward"
    assert [line[name] for line in metrics(tmp_path)[1:]] == [1.0, 2.0]


@pytest.mark.parametrize("script", SAMPLING)
def test_a_reward_that_leaves_is_an_error(place, tmp_path, own, script):
    with pytest.raises(InputError, match=r"Reward leaves called exit\(0\)"):
        run_here(script, *flags(place, script, tmp_path, *own("leaves")))


@pytest.mark.parametrize("script", SAMPLING)
def test_rewards_find_their_columns_before_the_first_step(place, tmp_path, script):
    lines = (place / "prompts.jsonl").read_text().splitlines()
    row = json.loads(lines[6])
    del row["answer"]
    lines[6] = json.dumps(row)
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    arguments = flags(place, script, tmp_path / "x", "--data", tmp_path / "data.jsonl")
    with pytest.raises(InputError, match="data.jsonl:7: reward exact needs the column answer"):
        run_here(script, *arguments, "--reward", "exact")
    assert not (tmp_path / "x").exists()


def test_grpo_learns_nothing_from_what_no_reward_scores(place, tmp_path, monkeypatch, own):
    trained, minibatches = [], packing.minibatches

    def watched(items, *rest):
        trained.append(items)
        return minibatches(items, *rest)

    monkeypatch.setattr(packing, "minibatches", watched)
    more = (*own("sometimes"), "--group", 4, "--beta", 0.1)
    run_here("train_grpo.py", *grpo(place, tmp_path, *more))
    (examples,), line = trained, metrics(tmp_path)[1]
    rewards = []
    for e in examples:
        total = int(e.ids[e.mask].sum())
        rewards.append(np.nan if total % 3 == 0 else total % 7)
    reward_PG = np.array(rewards).reshape(4, 4)
    assert 0 < np.isnan(reward_PG).sum() < 16
    assert line["completions/unrewarded"] == np.isnan(reward_PG).mean()
    assert line["reward"] == pytest.approx(np.nanmean(reward_PG))
    stds = [
        row[~np.isnan(row)].std(ddof=1) if (~np.isnan(row)).sum() > 1 else 0 for row in reward_PG
    ]
    assert line["reward_std"] == pytest.approx(np.mean(stds))
    assert line["frac_reward_zero_std"] == np.mean(np.array(stds) == 0)
    for e, reward, row, std in zip(examples, rewards, reward_PG.repeat(4, 0), np.repeat(stds, 4)):
        expected = 0.0
        if not np.isnan(reward):
            expected = (reward - np.nanmean(row)) / (std + 1e-4)
        assert e.columns["adv"][e.mask] == pytest.approx(np.full(e.mask.sum(), expected), rel=1e-5)
    assert [s["reward"] for s in samples(tmp_path)] == [
        None if np.isnan(x) else x for x in reward_PG[0]
    ]


def test_ppo_learns_nothing_from_what_no_reward_scores(place, tmp_path, monkeypatch, own):
    """Their tokens are in no loss, no statistic and no divisor."""
    trained, shuffled = [], packing.shuffled_minibatches

    def watched(examples, *rest):
        trained.extend(examples)
        return shuffled(examples, *rest)

    monkeypatch.setattr(packing, "shuffled_minibatches", watched)
    more = (*own("sometimes"), "--steps", 1, "--prompts", 8, "--beta", 0.1)
    run_here("train_ppo.py", *flags(place, "train_ppo.py", tmp_path, *more))
    line, scores, advantages = metrics(tmp_path)[1], [], []
    assistant = Tokenizer.load(place / "toy").special["<|assistant|>"]
    for e in trained:
        ids = e.ids.tolist()
        total = sum(ids[ids.index(assistant) + 1 :])
        assert e.mask.any() == (total % 3 != 0)
        if e.mask.any():
            scores.append(total % 7)
            advantages += e.columns["adv"][e.mask].tolist()
        else:
            columns = [column for name, column in e.columns.items() if name != "version"]
            assert not any(np.any(column) for column in columns)
    assert 0 < len(scores) < 16 and line["completions/unrewarded"] == 1 - len(scores) / 16
    assert line["objective/scores"] == pytest.approx(np.mean(scores))
    assert np.mean(advantages) == pytest.approx(0, abs=1e-5)
    assert np.std(advantages, ddof=1) == pytest.approx(1, rel=1e-4)
    assert {s["score"] for s in samples(tmp_path)} >= {None}


def test_online_dpo_pairs_nothing_that_no_reward_scores(place, tmp_path, monkeypatch, own):
    compared, best_and_worst = [], pairs.best_and_worst

    def watched(groups, reward_PG):
        compared.append((groups, reward_PG, best_and_worst(groups, reward_PG)))
        return compared[-1][2]

    monkeypatch.setattr(pairs, "best_and_worst", watched)
    more = (*own("sometimes"), "--group", 4, "--steps", 1)
    run_here("train_online_dpo.py", *flags(place, "train_online_dpo.py", tmp_path, *more))
    ((groups, reward_PG, made),) = compared
    assert 0 < reward_PG.isnan().sum() < 16 and made
    reward_of = {}
    for group, reward_G in zip(groups, reward_PG.tolist()):
        for e, reward in zip(group, reward_G):
            reward_of[tuple(e.ids.tolist())] = reward
    for best, worst in made:
        assert reward_of[tuple(best.ids.tolist())] > reward_of[tuple(worst.ids.tolist())]
    assert metrics(tmp_path)[1]["completions/unrewarded"] == reward_PG.isnan().double().mean()


def test_what_online_dpo_records_as_trained_was_trained(place, tmp_path, own):
    """Rollouts of the same tokens are apart: at most one of them is in a pair."""
    more = (*own("sums"), "--prompts", 8, "--group", 8, "--steps", 1, "--record")
    more += ("--temperature", 0.3, "--max_new_tokens", 2)
    run_here("train_online_dpo.py", *flags(place, "train_online_dpo.py", tmp_path, *more))
    text = (tmp_path / "records" / "000001.jsonl").read_text()
    about, *lines = [json.loads(line) for line in text.splitlines()]
    assert len({str(line["ids"]) for line in lines}) < len(lines) == 64
    trained = [line for line in lines if line["minibatch"]]
    assert len(trained) == 2 * about["divisor"] > 0
    assert about["updates"][0]["loss"] == pytest.approx(
        metrics(tmp_path)[1]["loss"] * about["divisor"]
    )


@pytest.mark.parametrize("script", SAMPLING)
def test_a_minibatch_without_trained_tokens_takes_no_step(
    place, tmp_path, monkeypatch, own, script
):
    """Neither decay nor momentum moves the weights."""
    taken, step = [], torch.optim.AdamW.step

    def watched(optimizer, *rest):
        taken.append(1)
        return step(optimizer, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    more = (*own("first_step_alone"), "--weight_decay", 0.1, "--steps", 3, "--save_every", 1)
    run_here(script, *flags(place, script, tmp_path, *more))
    per_step = {"train_grpo.py": 2, "train_ppo.py": 4, "train_online_dpo.py": 1}[script]
    assert len(taken) == per_step
    lines = metrics(tmp_path)
    assert lines[1]["grad_norm"] > 0 and lines[1]["completions/unrewarded"] == 0
    assert [line["completions/unrewarded"] for line in lines[2:]] == [1.0, 1.0]


@pytest.mark.parametrize("script", SAMPLING)
def test_a_run_that_learns_nothing_says_so_once(place, tmp_path, capsys, script):
    for reward, times in (("regex:never", 1), (f"{place}/reward.py:ids", 0)):
        more = ("--reward", reward, "--steps", 7, "--overwrite")
        if script == "train_online_dpo.py":
            more += ("--eos_penalty", 0)
        run_here(script, *flags(place, script, tmp_path, *more))
        said = capsys.readouterr().out
        assert said.count("nothing is learnt") == times
        if times:
            assert said.index("step 5/7") < said.index("nothing is learnt") < said.index("step 6/7")


def test_so_does_one_whose_loss_has_no_gradient(place, tmp_path, capsys):
    for weight, times in ((0, 1), (1, 0)):
        more = ("--label_weights", weight, weight, "--steps", 6, "--overwrite")
        run_here("train_kto.py", *flags(place, "train_kto.py", tmp_path, *more))
        said = capsys.readouterr().out
        assert said.count("The gradient was 0 in each step so far") == times


def test_a_kl_that_cannot_be_learnt_is_refused(place, tmp_path):
    with pytest.raises(InputError, match="--kl k1 has no expected gradient in a loss: use --kl k3"):
        run_here("train_grpo.py", *grpo(place, tmp_path / "x", "--beta", 0.1, "--kl", "k1"))
    assert not (tmp_path / "x").exists()


def test_a_clip_that_never_clips_is_said(place, tmp_path, capsys):
    for more, said in (
        (("--ratio", "sequence"), True),
        (("--ratio", "sequence", "--clip", 0.2, 0.28), True),
        (("--ratio", "sequence", "--clip", 3e-4, 4e-4), False),
        (("--ratio", "sequence", "--loss", "sapo"), False),
        (("--ratio", "sequence_sum"), False),
    ):
        run_here("train_grpo.py", *grpo(place, tmp_path, *more, "--overwrite"))
        assert ("never clips at --ratio sequence" in capsys.readouterr().out) == said


@pytest.mark.parametrize("more", [(), ("--old_logp", "trainer")])
def test_both_log_probs_of_the_kl_in_ppos_reward_are_the_trainers(place, tmp_path, more):
    """So the KL is exactly 0 before the first update, whatever the engine's rounding."""
    more += ("--beta", 0.1, "--steps", 1, "--dtype", "bf16")
    run_here("train_ppo.py", *flags(place, "train_ppo.py", tmp_path, *more))
    line = metrics(tmp_path)[1]
    assert line["objective/kl"] == 0 == line["objective/non_score_reward"]
    assert line["sampling/sampling_logp_difference/mean"] > 0


def test_a_judge_ranks_what_no_reward_applies_to(place, tmp_path):
    (tmp_path / "own.py").write_text(
        "def none(completions, **columns):\n"
        "    return [None] * len(completions)\n"
        "def longer(prompts, pairs):\n"
        "    return [None if len(a) == len(b) else int(len(b) > len(a)) for a, b in pairs]\n"
    )
    more = ("--reward", f"{tmp_path}/own.py:none", "--judge", f"{tmp_path}/own.py:longer")
    given = flags(place, "train_online_dpo.py", tmp_path / "out")
    at = given.index("--reward")
    run_here("train_online_dpo.py", *given[:at], *given[at + 2 :], *more)
    assert metrics(tmp_path / "out")[1]["pairs"] > 0


@pytest.mark.parametrize("script", ["train_grpo.py"])
def test_a_first_step_that_fails_does_not_block_its_folder(place, tmp_path, script):
    (tmp_path / "own.py").write_text(
        "def one(completions, **c):\n    return [1.0] * len(completions)\n"
    )
    out, rewarded = tmp_path / "out", ("--reward", f"{tmp_path}/own.py:one", "--resample", 1)
    for _ in range(2):
        with pytest.raises(InputError, match="had equal rewards"):
            run_here(script, *grpo(place, out, *rewarded))
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_say_how_reach_what_they_are_for(place, tmp_path, monkeypatch, script):
    """The twins cannot tell: these flags change no number."""
    seen = {}

    def watch(owner, name, *wanted):
        function = getattr(owner, name)
        signature = inspect.signature(function)

        def watched(*given, **named):
            bound = signature.bind(*given, **named)
            bound.apply_defaults()
            values = tuple(bound.arguments[argument] for argument in wanted)
            seen.setdefault(name, set()).add(values)
            return function(*given, **named)

        monkeypatch.setattr(owner, name, watched)

    watch(Run, "__init__", "keep")
    watch(Run, "due_save", "every", "minutes")
    watch(Run, "export", "dtype")
    names = ("checkpointing", "compile", "kernels", "reduce", "replicas", "offload")
    watch(dist, "shard", *names)
    watch(Engine, "beside", "rows", "tokens")
    watch(rewards, "load", "tokens", "timeout")
    more = ("--keep", 3, "--save_every", 7, "--save_minutes", 5, "--save_dtype", "bf16")
    more += (
        "--reduce",
        "step",
        "--offload",
        "--checkpointing",
        "full",
        "--kernels",
        "torch",
        "--steps",
        1,
        "--tokens",
        900,
    )
    expected = {
        "__init__": {(3,)},
        "due_save": {(7, 5.0)},
        "export": {("bf16",)},
        "shard": {("full", False, "torch", "step", 1, True)},
    }
    if script in ROLLOUTS:
        more += ("--engine_rows", 9, "--engine_tokens", 800, "--reward_timeout", 30)
        expected |= {"beside": {(9, 800)}, "load": {(900, 30.0)}}
    run_here(script, *flags(place, script, tmp_path, *more))
    assert seen == expected


@pytest.mark.parametrize("cut", [("top_k", 7), ("top_p", 0.5), ("min_p", 0.2)])
@pytest.mark.parametrize("script", ["train_grpo.py", "train_ppo.py"])
def test_with_a_cut_engine_and_trainer_are_one_policy_and_ratios_are_finite(
    place, tmp_path, script, cut
):
    """Also after the first update, and beside a reference."""
    flag, value = cut
    run_here(script, *flags(place, script, tmp_path, f"--{flag}", value, "--beta", 0.1, "--record"))
    for line in metrics(tmp_path)[1:]:
        assert line["sampling/sampling_logp_difference/max"] < 1e-5
        assert np.isfinite([x for x in line.values() if isinstance(x, float)]).all()
    _, *examples = (tmp_path / "records/000001.jsonl").read_text().splitlines()
    for e in map(json.loads, examples):
        sizes = {len(ids) for ids, trained in zip(e["kept"], e["mask"]) if trained}
        assert min(sizes) > 0 and (flag != "top_k" or sizes == {7})
        assert not any(ids for ids, trained in zip(e["kept"], e["mask"]) if not trained)
        assert np.isfinite(e["ref_logp"]).all() and min(e["ref_logp"]) < 0


def test_an_engine_that_does_not_tell_what_it_cut_stops_the_run(place, tmp_path, monkeypatch):
    generate = Engine.generate

    def silent(engine, prompts, n, sampling, seeds):
        return generate(engine, prompts, n, replace(sampling, kept=False), seeds)

    monkeypatch.setattr(Engine, "generate", silent)
    with pytest.raises(RuntimeError, match="step 1: before the first update engine and trainer"):
        run_here("train_grpo.py", *flags(place, "train_grpo.py", tmp_path, "--top_p", 0.5))
