"""nanopost.eval: estimators against closed forms and enumeration, and each kind of evaluation by its command line."""

import itertools
import json
import math
import random
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scripts import ENVIRONMENT, ROOT, run

from nanopost import hf
from nanopost.batch import batch_of
from nanopost.eval import majority, normal, pass_at_k, perplexity, student, wilson
from nanopost.tokenizer import Tokenizer
from nanopost.verify import answer_of
from runs import toy


# -------------------------------------------------------------------------------------------------------- estimators
@pytest.mark.parametrize(
    "n, right, k", [(5, 2, 1), (6, 3, 2), (7, 1, 4), (6, 0, 3), (6, 4, 3), (4, 4, 4)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, right, k):
    subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(
        sum(any(s) for s in subsets) / len(subsets), abs=1e-15
    )


def test_pass_at_k_is_unbiased():
    """E over the draws of n samples, each right with chance p, is 1 - (1 - p)^k: binomial, summed."""
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
    """Three samples of answers a (right, 0.5), b (0.3), c (0.2), all 27 draws: P(a twice or thrice) + P(abc) / 3."""
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
    """Its ends are the p at which the mean seen lies 1.96 standard errors away; never outside 0 and 1."""
    z = NormalDist().inv_cdf(0.975)
    for mean, n in ((0.3, 50), (0.5, 4), (0.98, 200)):
        for end in wilson(mean, n):
            assert abs(mean - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(z, rel=1e-5)
    assert wilson(0.0, 20)[0] == pytest.approx(0, abs=1e-12) and wilson(1.0, 20)[
        1
    ] == pytest.approx(1, abs=1e-12)


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


# ---------------------------------------------------------------------------------------------------- command lines
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    run(
        "train_sft.py",
        "--out",
        folder / "sft",
        "--steps",
        40,
        "--rows",
        32,
        "--save_every",
        0,
        "--eval_every",
        0,
    )
    draw = random.Random(0)
    rows = toy.prompt_rows(held_out=True)[:30]
    write(folder / "prompts.jsonl", rows)
    write(
        folder / "chats.jsonl",
        [
            {
                "prompt": row["prompt"],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            for row in rows
        ],
    )
    write(
        folder / "pairs.jsonl",
        [
            {
                "prompt": row["prompt"],
                "chosen": [{"role": "assistant", "content": row["answer"]}],
                "rejected": [{"role": "assistant", "content": "9" * draw.randint(1, 4)}],
            }
            for row in rows
        ],
    )
    run(
        "train_rm.py",
        "--model",
        folder / "sft",
        "--data",
        folder / "pairs.jsonl",
        "--out",
        folder / "rm",
        "--steps",
        15,
        "--rows",
        8,
        "--lr",
        3e-3,
        "--holdout",
        5,
        "--save_every",
        0,
    )
    return folder


def write(path, rows):
    path.write_text(
        "".join(
            json.dumps({k: v for k, v in row.items() if k != "__line__"}) + "\n" for row in rows
        )
    )


def evaluated(*arguments, ok=True):
    """-> {name: (value, low, high, rows)}, or the error."""
    done = subprocess.run(
        [sys.executable, "-m", "nanopost.eval", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if not ok:
        assert done.returncode == 1
        return done.stderr
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for line in done.stdout.splitlines():
        if " interval " in line:
            numbers = [part.replace(",", "") for part in line[32:].split()]
            found[line[:32].strip()] = (
                float(numbers[0]),
                float(numbers[4]),
                float(numbers[6]),
                int(numbers[7]),
            )
    return found


def test_samples_are_scored_counted_and_kept(place):
    found = evaluated(
        "--model",
        place / "sft",
        "--data",
        place / "prompts.jsonl",
        "--samples",
        6,
        "--k",
        1,
        3,
        6,
        "--max_new_tokens",
        8,
        "--out",
        place / "out.jsonl",
        "--reward",
        "exact",
        "length:8:4",
        "gsm8k",
        "gsm8k",
    )
    kept = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    right = [sum(row["rewards"][0]) for row in kept]
    prompts = toy.prompt_rows(held_out=True)[:30]
    assert right == [
        sum(text == row["answer"] for text in k["completions"]) for row, k in zip(prompts, kept)
    ]
    assert 0 < sum(right) < 180
    for k in (1, 3, 6):
        expected = np.mean([1 - math.comb(6 - int(c), k) / math.comb(6, k) for c in right])
        value, low, high, rows = found[f"pass@{k} exact"]
        assert (value, rows) == (pytest.approx(expected, abs=1e-4), 30) and low < value < high
    assert found["accuracy exact"][0] == found["pass@1 exact"][0] and "mean length" in found
    assert found["majority of 6 gsm8k"] == found["majority of 6 gsm8k-2"]  # both vote on numbers


def test_win_rate_of_planted_checkpoints(place):
    """Of a checkpoint with itself at the same seeds all are ties; against one that writes other text the reward model
    decides, and the other way round it is the rest."""
    again = (
        "--data",
        place / "prompts.jsonl",
        "--reward_model",
        place / "rm",
        "--max_new_tokens",
        8,
        "--samples",
        2,
    )
    found = evaluated("--model", place / "sft", "--against", place / "sft", *again)
    assert found["win rate"][0] == 0.5 and found["score difference"][0] == 0.0
    model = hf.load_model(place / "sft")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    files = {
        p.name: p.read_bytes()
        for p in (place / "sft").iterdir()
        if p.name.startswith(("tokenizer", "chat_"))
    }
    hf.save_model(place / "noisy", model.state_dict().items(), model.config, files)
    one = evaluated("--model", place / "sft", "--against", place / "noisy", *again)
    other = evaluated(
        "--model",
        place / "noisy",
        "--against",
        place / "sft",
        *again,
        "--out",
        place / "wins.jsonl",
    )
    assert (
        one["win rate"][0] + other["win rate"][0] == pytest.approx(1, abs=2e-4)
        and one["win rate"][0] != 0.5
    )
    wins = [json.loads(line)["wins"] for line in (place / "wins.jsonl").read_text().splitlines()]
    assert np.mean(wins) == pytest.approx(other["win rate"][0], abs=1e-4) and len(wins) == 30


def test_perplexity_is_that_of_transformers(place):
    transformers = pytest.importorskip("transformers")
    value, low, high, rows = evaluated(
        "--model", place / "sft", "--data", place / "chats.jsonl", "--perplexity", "--tokens", 100
    )["perplexity"]
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "sft", dtype=torch.float32)
    tokenizer, total, count = Tokenizer.load(place / "sft"), 0.0, 0
    for row in map(json.loads, (place / "chats.jsonl").read_text().splitlines()):
        e = tokenizer.example(row)
        ids = torch.tensor(e.ids, dtype=torch.long)
        with torch.no_grad():
            logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
        mask = torch.from_numpy(e.mask[1:])
        total -= float(logp[range(len(ids) - 1), ids[1:]][mask].sum())
        count += int(mask.sum())
    assert (
        value == pytest.approx(math.exp(total / count), rel=1e-4)
        and low < value < high
        and rows == 30
    )


def test_a_reward_model_scores_pairs_and_answers(place):
    found = evaluated(
        "--reward_model",
        place / "rm",
        "--data",
        place / "pairs.jsonl",
        "--out",
        place / "scores.jsonl",
    )
    kept = [json.loads(line) for line in (place / "scores.jsonl").read_text().splitlines()]
    assert found["accuracy"][0] == pytest.approx(
        np.mean([k["chosen"] > k["rejected"] for k in kept]), abs=1e-4
    )
    assert found["accuracy"][0] > 0.8 and found["margin"][1] > 0
    tokenizer, model = Tokenizer.load(place / "rm"), hf.load_scalar_model(place / "rm")
    for row, k in zip(map(json.loads, (place / "pairs.jsonl").read_text().splitlines()), kept):
        with torch.no_grad():
            assert k["chosen"] == pytest.approx(
                float(model(batch_of([tokenizer.pair(row)[0]]))[-1]), abs=1e-5
            )
    evaluated(
        "--reward_model",
        place / "rm",
        "--data",
        place / "chats.jsonl",
        "--out",
        place / "scores.jsonl",
    )
    alone = [
        json.loads(line)["score"] for line in (place / "scores.jsonl").read_text().splitlines()
    ]
    assert alone == pytest.approx([k["chosen"] for k in kept], abs=1e-5)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ((), "give --model, or --reward_model, or both"),
        (
            ("--model", "x", "--against", "y"),
            "a win rate needs all of --model, --against and --reward_model",
        ),
        (("--model", "x", "--samples", 4, "--k", 8), "pass@8 needs --samples 8"),
        (
            ("--model", "x", "--samples", 4, "--temperature", 0),
            "would all be alike at --temperature 0",
        ),
        (("--model", "nowhere"), "nowhere is no folder"),
    ],
)
def test_what_cannot_be_evaluated_says_so(flags, sentence):
    assert sentence in evaluated("--data", "toy", *flags, ok=False)
