"""nanopost.eval: estimators against closed forms and enumeration; evaluations as commands."""

import itertools
import json
import math
import random
import shutil
import sys
from statistics import NormalDist

import forked
import numpy as np
import pytest
import torch
from scripts import ENVIRONMENT, run

from nanopost import InputError, hf
from nanopost.batch import Example, batch_of
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.eval import (
    accuracy,
    evaluation,
    main,
    majority,
    normal,
    parsed,
    pass_at_k,
    perplexity,
    student,
    wilson,
)
from nanopost.save import save_model
from nanopost.tokenizer import Tokenizer
from nanopost.verify import answer_of
from runs import toy


# --------------------------------------------------------------------------------------- estimators
@pytest.mark.parametrize(
    "n, right, k", [(5, 2, 1), (6, 3, 2), (7, 1, 4), (6, 0, 3), (6, 4, 3), (4, 4, 4)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, right, k):
    subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(
        sum(any(s) for s in subsets) / len(subsets), abs=1e-15
    )


def test_pass_at_k_is_unbiased():
    """Over draws of n samples, each right with chance p, its mean is 1 - (1 - p)^k."""
    n, p = 9, 0.3
    for k in (1, 3, 9):
        mean = sum(
            math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1)
        )
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


@pytest.mark.parametrize(
    "answers, rewards, expected",
    [
        ([3, 4, 3, 5], [1, 0, 1, 0], 1.0),
        ([3, 4, 4, 3, 5], [1, 0, 0, 1, 0], 0.5),
        ([None, None, 4], [0, 0, 1], 1.0),
        ([None, None], [0, 0], 0.0),
        ([1, 2, 3], [0, 1, 0], 1 / 3),
    ],
)
def test_majority_is_the_reward_of_the_most_frequent_answer_and_ties_share(
    answers, rewards, expected
):
    assert majority(answers, rewards) == pytest.approx(expected)


def test_majority_votes_of_planted_answers_have_their_multinomial_mean():
    """Answers a (right, 0.5), b (0.3), c (0.2), all 27 draws of three: P(a twice or thrice), and a
    third of P(abc)."""
    p = {"a": 0.5, "b": 0.3, "c": 0.2}
    mean = sum(
        math.prod(p[x] for x in draw) * majority(draw, [float(x == "a") for x in draw])
        for draw in itertools.product(p, repeat=3)
    )
    assert mean == pytest.approx(0.5**3 + 3 * 0.5**2 * 0.5 + 6 * 0.5 * 0.3 * 0.2 / 3, abs=1e-14)


def test_a_vote_is_about_the_answer_and_not_its_words():
    assert (
        answer_of("gsm8k", "so 1,200 in all\n#### 1,200")
        == answer_of("gsm8k", "#### 1200.0")
        is not None
    )
    assert answer_of("boxed", r"\boxed{0.5}") == answer_of("boxed", r"\boxed{1/2}") is not None
    assert answer_of("boxed", r"\boxed{\frac12}") == answer_of(
        "boxed", r"thus $\boxed{\frac{1}{2}}$"
    )
    assert answer_of("gsm8k", "none at all") is None and answer_of("boxed", "12") is None
    assert answer_of("exact", " 12 ") == "12" and answer_of("exact", " ") is None


def test_wilson_solves_the_equation_it_comes_from():
    """Its ends are the p from which the mean is 1.96 standard errors away; all within 0 and 1."""
    z = NormalDist().inv_cdf(0.975)
    for mean, n in ((0.3, 50), (0.5, 4), (0.98, 200)):
        for end in wilson(mean, n):
            assert abs(mean - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(z, rel=1e-5)
    assert wilson(0.0, 20)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(1.0, 20)[1] == pytest.approx(1, abs=1e-12)


def test_intervals_cover_what_they_should():
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 30, 4000).reshape(40, 100)
    hit = {"wilson": 0, "normal": 0, "perplexity": 0}
    for row in tokens:
        low, high = wilson(float((draw.random(100) < 0.8).mean()), 100)
        hit["wilson"] += low < 0.8 < high
        _, low, high = normal(draw.exponential(size=100))
        hit["normal"] += low < 1 < high
        _, low, high = perplexity((row * draw.gamma(4, 0.5, 100)).tolist(), row.tolist())
        hit["perplexity"] += low < math.exp(2) < high
    assert all(34 <= n <= 40 for n in hit.values()), hit  # 38 of 40 expected


def test_few_rows_have_the_wide_intervals_of_student():
    for n, tabled in ((3, 4.303), (5, 2.776), (10, 2.262), (30, 2.045)):
        assert student(n) == pytest.approx(tabled, rel=0.035 if n == 3 else 5e-3)
    assert perplexity([3.0], [2])[1:] == (0.0, math.inf) and normal([1.0])[2] == math.inf
    draw = np.random.default_rng(1)
    found = [normal(draw.normal(size=4))[1:] for _ in range(4000)]
    assert sum(low < 0 < high for low, high in found) / 4000 == pytest.approx(0.95, abs=0.012)


# -------------------------------------------------------------------------------------- evaluations
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that adds two-digit numbers, more or less; prompts, chats, pairs; a reward model."""
    folder = tmp_path_factory.mktemp("eval")
    toy.write_model(folder / "start")
    write(folder / "sft.jsonl", toy.sft_rows())
    short = ("--save_every", 0, "--eval_every", 0)
    data = ("--model", folder / "start", "--data", folder / "sft.jsonl")
    steps = ("--steps", 40, "--rows", 32, "--lr", 3e-3)
    run("train_sft.py", *data, "--out", folder / "sft", *steps, *short)
    rows = toy.prompt_rows(held_out=True)[:30]
    draw = random.Random(0)
    chats, pairs = [], []
    for row in rows:
        answer, wrong = answered(row["answer"]), answered("9" * draw.randint(1, 4))
        chats.append({"prompt": row["prompt"], "completion": answer})
        pairs.append({"prompt": row["prompt"], "chosen": answer, "rejected": wrong})
    write(folder / "prompts.jsonl", rows)
    write(folder / "chats.jsonl", chats)
    write(folder / "pairs.jsonl", pairs)
    data = ("--model", folder / "sft", "--data", folder / "pairs.jsonl", "--holdout", 5)
    steps = ("--steps", 15, "--rows", 8, "--lr", 3e-3)
    run("train_rm.py", *data, "--out", folder / "rm", *steps, *short)
    noisy(folder / "sft", folder / "noisy")
    return folder


def answered(text):
    return [{"role": "assistant", "content": text}]


def noisy(source, folder):
    """The model in `source` with noise on its weights, and the same tokenizer."""
    shutil.copytree(source, folder)
    model = hf.load_model(source)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    save_model(folder, model.state_dict().items(), model.config)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluated(*arguments, ok=True):
    """-> {name: (value, low, high, rows)}, or the error."""
    done = forked.run(["-m", "nanopost.eval", *arguments], ENVIRONMENT)
    if not ok:
        assert done.returncode == 1
        return done.stderr
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for line in done.stdout.splitlines():
        if " interval " in line:
            numbers = [part.replace(",", "") for part in line[32:].split()]
            value, low, high = float(numbers[0]), float(numbers[3]), float(numbers[5])
            found[line[:32].strip()] = value, low, high, int(numbers[6])
    return found


def test_samples_are_scored_counted_and_kept(place):
    (place / "reward.py").write_text(
        "def even(completions, **columns):\n"
        "    return [float(len(c[-1]['content']) % 2 == 0) for c in completions]\n"
    )
    found = evaluated(
        *("--model", place / "sft", "--data", place / "prompts.jsonl"),
        *("--samples", 6, "--k", 1, 3, 6, "--max_new_tokens", 8, "--out", place / "out.jsonl"),
        *("--reward", f"{place}/reward.py:even", "exact", "length:8:4", "gsm8k", "gsm8k"),
    )
    right = []
    for row, record in zip(read(place / "prompts.jsonl"), read(place / "out.jsonl")):
        texts = record["completions"]
        assert record["rewards"][0] == [len(text) % 2 == 0 for text in texts]
        assert record["rewards"][1] == [text == row["answer"] for text in texts]
        right.append(sum(record["rewards"][0]))
    assert 0 < sum(right) < 180 and len(right) == 30
    for k in (1, 3, 6):
        expected = np.mean([1 - math.comb(6 - int(c), k) / math.comb(6, k) for c in right])
        value, low, high, rows = found[f"pass@{k} even"]
        assert (value, rows) == (pytest.approx(expected, abs=1e-4), 30) and low < value < high
    assert found["accuracy even"][0] == found["pass@1 even"][0] and "mean length" in found
    assert found["majority of 6 gsm8k"] == found["majority of 6 gsm8k-2"]  # both vote on numbers


def test_win_rate_of_planted_checkpoints(place):
    """A checkpoint against itself at the same seeds has nothing but ties. Against one that writes
    other text the reward model decides, and with the two swapped the rest is won."""
    sft, noisy = place / "sft", place / "noisy"
    again = (
        *("--data", place / "prompts.jsonl", "--reward_model", place / "rm"),
        *("--max_new_tokens", 8, "--samples", 2, "--out", place / "wins.jsonl"),
    )
    found = evaluated("--model", sft, "--against", sft, *again)
    assert found["win rate"][0] == 0.5 and found["score difference"][0] == 0.0
    one = evaluated("--model", sft, "--against", noisy, *again)["win rate"][0]
    other = evaluated("--model", noisy, "--against", sft, *again)["win rate"][0]
    assert one + other == pytest.approx(1, abs=2e-4) and one != 0.5
    wins = [record["wins"] for record in read(place / "wins.jsonl")]
    assert np.mean(wins) == pytest.approx(other, abs=1e-4) and len(wins) == 30


def test_perplexity_is_that_of_transformers(place):
    transformers = pytest.importorskip("transformers")
    data = ("--model", place / "sft", "--data", place / "chats.jsonl")
    value, low, high, rows = evaluated(*data, "--perplexity", "--tokens", 100)["perplexity"]
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "sft", dtype=torch.float32)
    tokenizer, total, count = Tokenizer.load(place / "sft"), 0.0, 0
    for row in read(place / "chats.jsonl"):
        e = tokenizer.example(row)
        ids = torch.tensor(e.ids, dtype=torch.long)
        with torch.no_grad():
            logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
        mask = torch.from_numpy(e.mask[1:])
        total -= float(logp[range(len(ids) - 1), ids[1:]][mask].sum())
        count += int(mask.sum())
    assert value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert low < value < high and rows == 30


# --------------------------------------------------------------------------------------- divergence
@torch.no_grad()
def log_probs(model, ids_BT):
    """Of every token of the vocabulary after each position -> fp64 [B, T, V]."""
    batch = batch_of([Example(ids, [False] * len(ids)) for ids in ids_BT.tolist()])
    hidden = model.model.packed(batch.token_N, batch.position_N, batch.cu_seqlens, batch.max_seqlen)
    return model.logits(hidden).double().log_softmax(-1).unflatten(0, ids_BT.shape)


def exact_kl(model, other, prompt, stop_ids):
    """KL of completions of one or two tokens, summed over all of them -> (nats, mean length)."""
    vocabulary, last = model.config.vocab_size, len(prompt) - 1
    ids_BT = torch.tensor([[*prompt, first] for first in range(vocabulary)])
    p_VTV, q_VTV = log_probs(model, ids_BT), log_probs(other, ids_BT)
    p_V, q_V = p_VTV[0, last], q_VTV[0, last]
    p_VV, q_VV = p_VTV[:, last + 1], q_VTV[:, last + 1]
    unended_V = torch.ones(vocabulary, dtype=torch.float64)
    unended_V[list(stop_ids)] = 0
    second_V = unended_V * (p_VV.exp() * (p_VV - q_VV)).sum(1)
    kl = (p_V.exp() * (p_V - q_V + second_V)).sum()
    return float(kl), float(1 + (p_V.exp() * unended_V).sum())


def test_kl_is_that_of_all_completions(place):
    """Of at most two tokens, so that all can be summed; of untrained models, so that many count."""
    models = {}
    for name, seed in (("start", 0), ("other", 1)):
        toy.write_model(place / name, seed)
        models[name] = hf.load_model(place / name)
    write(place / "two.jsonl", read(place / "prompts.jsonl")[:2])
    found = evaluated(
        *("--model", place / "start", "--kl", place / "other", "--data", place / "two.jsonl"),
        *("--samples", 2000, "--max_new_tokens", 2, "--out", place / "kl.jsonl"),
    )
    tokenizer, kept = Tokenizer.load(place / "start"), read(place / "kl.jsonl")
    exact = []
    for row, record in zip(read(place / "two.jsonl"), kept):
        prompt = tokenizer.prompt_ids(row["prompt"])
        kl, length = exact_kl(models["start"], models["other"], prompt, tokenizer.stop_ids)
        exact.append((kl, length))
        ratios = np.array(record["log_ratios"])
        assert len(ratios) == 2000 and abs(ratios.mean() - kl) < 4 * ratios.std() / 2000**0.5
        assert ratios.std() / 2000**0.5 < kl / 20  # else agreement would mean little
    value, low, high, rows = found["kl"]
    means = [np.mean(record["log_ratios"]) for record in kept]
    assert (value, low, high) == pytest.approx(normal(means), abs=1e-4) and rows == 2
    assert value == pytest.approx(np.mean([kl for kl, _ in exact]), rel=0.1)
    expected = np.mean([length for _, length in exact])
    assert found["completion length"][0] == pytest.approx(expected, rel=0.02)


def test_kl_of_a_sample_is_its_log_ratio_and_of_a_model_with_itself_zero(place):
    sft, noisy = place / "sft", place / "noisy"
    flags = ("--data", place / "prompts.jsonl", "--max_new_tokens", 8, "--out", place / "kl.jsonl")
    nothing = evaluated("--model", sft, "--kl", sft, *flags)["kl"]
    assert nothing[:3] == pytest.approx((0, 0, 0), abs=1e-4)
    value, low, high, count = evaluated("--model", sft, "--kl", noisy, *flags)["kl"]
    assert 0.1 < low < value < high and count == 30
    tokenizer, models = Tokenizer.load(sft), [hf.load_model(folder) for folder in (sft, noisy)]
    rows, records = read(place / "prompts.jsonl"), read(place / "kl.jsonl")
    prompts = [tokenizer.prompt_ids(row["prompt"]) for row in rows]
    seeds = [prompt_seed(0, serial) for serial in range(len(rows))]
    groups = Engine.of(models[0], tokenizer).generate(prompts, 1, Sampling(8), seeds)
    for (rollout,), record in zip(groups, records):
        ids = torch.tensor(rollout.prompt + rollout.ids)
        ours, theirs = (log_probs(m, ids[None])[0] for m in models)
        at = torch.arange(len(rollout.prompt) - 1, len(ids) - 1)
        ratio = (ours - theirs)[at, ids[at + 1]].sum()
        assert record["log_ratios"] == pytest.approx([float(ratio)], abs=1e-3)


# ------------------------------------------------------------------------------------ plain prompts
@pytest.mark.parametrize(
    "flags",
    [
        ("--perplexity",),
        ("--reward", "exact", "--max_new_tokens", "4"),
        ("--reward_model", "rm"),
    ],
)
def test_plain_prompts_are_a_doubt_and_several_files_are_read_in_order(
    place, capsys, monkeypatch, flags
):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    plain = []
    for row in read(place / "chats.jsonl")[:4]:
        question, reply = row["prompt"][0]["content"], row["completion"][0]["content"]
        plain.append({"prompt": question, "completion": reply, "answer": reply})
    files = place / "first.jsonl", place / "second.jsonl"
    toy.write_rows(files[0], plain[:1])
    toy.write_rows(files[1], plain[1:])
    flags = [str(place / flag) if flag == "rm" else flag for flag in flags]
    model = () if "--reward_model" in flags else ("--model", str(place / "sft"))
    data = [*model, "--data", *map(str, files), *flags]
    doubt = "warning: 4 of 4 prompts are plain text, which gets no chat template"
    main(data)
    said = capsys.readouterr().out
    assert doubt in said and said.strip().endswith("   4 rows")
    main([*data, "--to_messages"])
    assert doubt not in capsys.readouterr().out
    torch.set_flush_denormal(False)


# ------------------------------------------------------------------------------------------- scores
def test_a_reward_model_scores_pairs_and_answers(place):
    flags = ("--reward_model", place / "rm", "--out", place / "scores.jsonl")
    found = evaluated(*flags, "--data", place / "pairs.jsonl")
    kept = read(place / "scores.jsonl")
    right = np.mean([record["chosen"] > record["rejected"] for record in kept])
    assert found["accuracy"][0] == pytest.approx(right, abs=1e-4)
    assert found["accuracy"][0] > 0.8 and found["margin"][1] > 0
    tokenizer, model = Tokenizer.load(place / "rm"), hf.load_scalar_model(place / "rm")
    for row, record in zip(read(place / "pairs.jsonl"), kept):
        with torch.no_grad():
            score = model(batch_of([tokenizer.pair(row)[0]]))[-1]
        assert record["chosen"] == pytest.approx(float(score), abs=1e-5)
    evaluated(*flags, "--data", place / "chats.jsonl")
    alone = [record["score"] for record in read(place / "scores.jsonl")]
    assert alone == pytest.approx([record["chosen"] for record in kept], abs=1e-5)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("", "give --model, or --reward_model, or both"),
        ("--model x --against y", "needs all of --model, --against and --reward_model"),
        ("--model x --reward exact --samples 4 --k 8", "pass@8 needs --samples 8"),
        ("--model x --reward exact --samples 4 --temperature 0", "all be equal at --temperature 0"),
        ("--model x", "none of them given: choose exactly one of"),
        ("--model x --reward exact --kl y", "--reward, --kl given: choose exactly one of"),
        ("--model x --kl y --temperature 0.5", "--kl needs samples from the whole distribution"),
        ("--model x --kl y --top_p 0.9", "--kl needs samples from the whole distribution"),
        ("--model x --kl y --out no/where", "there is no folder"),
    ],
)
def test_flags_that_do_not_go_together_say_so(flags, sentence):
    with pytest.raises(InputError, match=sentence):
        evaluation(parsed(["--data", "x", *flags.split()]))


@pytest.mark.parametrize(
    "flags", ["--chat_template mine", "--reward mine.py:f", "--reward exact model:mine"]
)
def test_out_replaces_nothing_that_any_flag_names(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "mine.py"):
        (tmp_path / name).write_text("kept")
    out = "mine.py" if "mine.py" in flags else "mine"
    given = ["--model", "x", "--data", "y", "--reward", "exact", *flags.split(), "--out", out]
    with pytest.raises(InputError, match=f"--out {out} would replace what is read"):
        evaluation(parsed(given))


def test_a_value_that_happens_to_be_a_path_is_not_a_file_that_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--model", "x", "--data", "y", "--reward", "exact", "--out", "ans.jsonl"]
    assert evaluation(parsed([*given, "--stop", ".", "--rename", "..", "/"])) is accuracy


@pytest.mark.parametrize(
    "flags",
    [
        *("--samples 0", "--tokens 1", "--top_p 1.5", "--top_p 0", "--temperature -1", "--k 2 0"),
        *("--temperature inf", "--reward_timeout -1"),
    ],
)
def test_numbers_out_of_bounds_are_refused_by_their_flag(capsys, flags):
    with pytest.raises(SystemExit):
        parsed(["--data", "x", *flags.split()])
    assert f"error: {flags.split()[0]}: " in capsys.readouterr().err


def test_flags_are_not_abbreviated(capsys):
    with pytest.raises(SystemExit):
        parsed(["--data", "x", "--sample", "3"])
    assert "--sample 3" in capsys.readouterr().err


def test_rewards_find_their_columns_before_anything_is_sampled(place):
    flags = ("--model", place / "sft", "--data", place / "chats.jsonl", "--reward", "exact")
    error = evaluated(*flags, ok=False)
    assert "chats.jsonl:1: reward exact needs the column answer" in error
    assert "Traceback" not in error


def test_a_reward_that_leaves_or_hangs_is_an_error(place):
    (place / "bad.py").write_text(
        "import sys, time\n\n\ndef leaves(completions, **columns):\n    sys.exit(0)\n\n\n"
        "def hangs(completions, **columns):\n    time.sleep(99)\n"
    )
    flags = ("--model", place / "sft", "--data", place / "prompts.jsonl", "--max_new_tokens", 2)
    error = evaluated(*flags, "--reward", f"{place}/bad.py:leaves", ok=False)
    assert "Reward leaves called exit(0)" in error
    flags += ("--reward_timeout", 0.5)
    error = evaluated(*flags, "--reward", f"{place}/bad.py:hangs", ok=False)
    assert "Reward hangs took more than --reward_timeout 0.5 seconds" in error


def test_a_mistake_is_answered_with_one_sentence(place):
    flags = ("--data", place / "prompts.jsonl", "--model", "nowhere", "--reward", "exact")
    error = evaluated(*flags, ok=False)
    assert "nowhere is not a folder" in error and "Traceback" not in error


def test_kl_to_a_model_with_another_tokenizer_is_refused(place):
    shutil.copytree(place / "sft", place / "foreign")
    path = place / "foreign" / "tokenizer.json"
    path.write_text(path.read_text().replace("</answer>", "</result>"))
    flags = ("--model", place / "sft", "--data", place / "prompts.jsonl")
    error = evaluated(*flags, "--kl", place / "foreign", ok=False)
    assert "--kl" in error and "its tokenizer is not" in error and "Traceback" not in error
